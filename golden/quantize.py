"""From a float denoiser to a quantized one: calibration, constants, what it saves, files.

Calibration needs no data set: it observes a sampling run of the float network.
"""

import dataclasses
import math

import torch

from golden import a4, detector, e4m3, epilogue, mxint8, sensitivity, w4
from golden import policy as policies
from golden.checkpoint import QUANTIZED, ModelError, load_model, read_file, save_model
from golden.fake import (
    HEADROOM, FakeQuantized, calibrate, executing, layer_sqnr, levels, one_hot, sqnr)
from golden.gather import gather_weights
from golden.load import load as load_float
from golden.load import resolve, shipped
from golden.network import build, layer_shapes, macs
from golden.policy import hosted
from golden.quantized_network import (
    RESIZED_GAIN, Y_UNIT, QuantizedLayer, QuantizedModel, decode_weights, exponent_below)
from golden.requantizer import Format
from golden.sampler import STEPS, Sampler, draw_noise, sample
from golden.scatter import plane_bias, plane_scales, plane_weights

__all__ = ["formats", "rule", "quantize", "quantize_model", "summary", "save", "load",
           "load_executable", "resolve", "shipped", "balance", "fixed", "zero_counts",
           "zero_fraction", "sqnr", "denoiser_sqnr"]

IMAGES = 16                # of the sampling run that calibrates, at most
FEWEST_IMAGES = 2
CALIBRATION_MACS = 8e9     # of one evaluation of all its images, beyond `FEWEST_IMAGES`
ACTIVATION_HEADROOM = HEADROOM
RESULT_HEADROOM = 2.0      # of 16-bit tensors over the calibration's largest magnitude
SUM_HEADROOM = 8.0         # of aligned sums over it
VERSION = 3                # of the quantized part of a model file
MXINT8 = "auto"            # layers in MXINT8 of the policy `mixed`, if none are named
# Multipliers and output lanes of both sides of the preset `small`, for the stored thresholds.
SMALL = {"dense_rate": 128, "sparse_rate": 128, "dense_lanes": 8, "sparse_lanes": 64}


def formats(unet):
    """Format of each layer's input by the policy mixed with the paper's rule, a dict by name."""
    names = policies.formats(unet, policies.POLICIES["mixed"], policies.paper(unet))
    return {name: Format[format] for name, format in names.items()}


def default_images(unet):
    """Images of the calibrating run: fewer for large networks, so that it takes minutes."""
    return max(FEWEST_IMAGES, min(IMAGES, int(CALIBRATION_MACS / macs(unet)["total"])))


def rule(policy, mxint8=None):
    """The choice of layers in MXINT8, by default `MXINT8` for the policy mixed, else none."""
    if mxint8 is not None:
        return mxint8
    return MXINT8 if policy == "mixed" else "none"


def quantize(source, **options):
    """The quantized model of the float model `source`: all that `golden.load.load` opens.

    `options` are those of `quantize_model`.

    Raises
    ------
    ModelError
        If the file cannot be used, or its network cannot be quantized.
    """
    model, record = load_float(source)
    record = {name: value for name, value in record.items()
              if name not in ("kind", "architecture", "quantized")}
    return quantize_model(model, record, **options)


def quantize_model(model, record, *, policy="mixed", mxint8=None, budget=None, images=None,
                   seed=0, steps=STEPS, label=None, progress=None):
    """QuantizedModel of the Precond `model`, or FakeQuantized where the accelerator lacks formats.

    The weights are first rounded to half precision, in place.

    Parameters
    ----------
    record : JSON values about the origin of the model
    policy : one of `golden.policy.POLICIES`
    mxint8 : layers in MXINT8: "paper", "none", "auto", or their names or globs between commas; by
        default see `rule`
    budget : share of the MACs that "auto" may put into MXINT8, by default `sensitivity.BUDGET`
    images : of the sampling run from `seed` that calibrates; by default `default_images`
    steps : Heun steps of that run, and of the schedule whose embeddings are stored
    label : class of the images, for networks that have classes, or None
    progress : callable (fraction of the work done) or None

    Raises ValueError if policy, layers, budget or label do not fit the network.
    """
    model = model.half().float().eval().requires_grad_(False)
    unet, chosen = model.unet, policies.get(policy, model.unet)
    mxint8 = rule(policy, mxint8)
    if mxint8 != "none" and chosen.codes != "A4":
        raise ValueError(f"mxint8 must be none for policy {policy}, not {mxint8!r}")
    if mxint8 != "auto" and budget is not None:
        raise ValueError(f"budget must be given with mxint8 auto only, not with {mxint8!r}")
    budget = sensitivity.check_budget(sensitivity.BUDGET if budget is None else budget)
    wide = set()
    if mxint8 == "paper":
        wide = policies.paper(unet)
    elif mxint8 not in ("none", "auto"):
        wide = policies.choose(unet, mxint8)
    images = default_images(unet) if images is None else images
    one_hot(label, model.architecture)

    parts = {"calibrate": 0.4, "choose": 0.3 if mxint8 == "auto" else 0.0,
             "count": 0.3 if chosen.executable else 0.0}
    done = 0.0

    def report(part):
        nonlocal done
        base, share = done, parts[part] / sum(parts.values())
        done += share
        return lambda count, total: progress and progress(base + share * count / total)

    named = policies.formats(unet, chosen, wide)
    calibration = calibrate(model, named, chosen, images=images, seed=seed, steps=steps,
                            label=label, progress=report("calibrate"))
    record = {**record, "calibration": {"images": images, "seed": seed},
              "mxint8": {"rule": mxint8}}
    if mxint8 == "auto":
        found = sensitivity.measure(model, chosen, calibration, label=label,
                                    progress=report("choose"))
        named = policies.formats(unet, chosen, sensitivity.pick(found, budget))
        record["mxint8"] |= {"budget": budget, "sensitivity": found}
    if not chosen.executable:
        quantized = FakeQuantized.from_calibration(model, chosen, named, calibration,
                                                   record=record, steps=steps, label=label)
    else:
        quantized = executable(model, chosen, named, calibration, record, steps, label)
        counts = zero_counts(quantized, draw_noise(images, model.architecture, seed),
                             progress=report("count"))
        for name, item in quantized.layers.items():
            zeros = (counts[name].double() / images).round().to(torch.int32)
            quantized.layers[name] = dataclasses.replace(item, zeros=zeros)
        for name, threshold in balance(quantized, **SMALL).items():
            quantized.layers[name] = dataclasses.replace(quantized.layers[name],
                                                         threshold=threshold)
    record["sqnr_db"] = {name: None if math.isinf(value) else round(value, 2)
                         for name, value in layer_sqnr(quantized, calibration.states).items()}
    if progress:
        progress(1.0)
    return quantized


@torch.no_grad()
def executable(model, chosen, named, calibration, record, steps, label=None):
    """The QuantizedModel, without zero counts and thresholds, of a calibrated Precond."""
    unet = model.unet
    shapes = {shape.name: shape for shape in layer_shapes(unet)}
    count = len(calibration.sigmas)
    exponents, made = {}, {}
    for layer in unet.layers():
        name, shape = layer.name, shapes[layer.name]
        format, gain = Format[named[name]], calibration.gains[name]
        amax = calibration.extremes[name]
        sources, residual_source = calibration.sources[name]

        def stored(source, place, amax=amax):
            if source is not None:
                return exponents[source]
            return epilogue.result_exponent(amax[place] * RESULT_HEADROOM)

        prologue = None
        if format == Format.IN16:
            unit = mxint8.input_scale(amax["input"] * ACTIVATION_HEADROOM)
            inputs = (round(math.log2(unit)) - 9,)
        else:
            inputs = tuple(stored(source, f"segment{n}") for n, source in enumerate(sources))
            if hosted(layer):
                prologue = epilogue.result_exponent(amax["input"] * RESULT_HEADROOM)
                unit = 2.0 ** (prologue - Y_UNIT) / RESIZED_GAIN
            elif format == Format.MX8:
                unit = mxint8.static_scale(amax["input"] * ACTIVATION_HEADROOM)
            else:
                unit = a4.static_scale(amax["input"] * ACTIVATION_HEADROOM, format == Format.A4S)
        residual = None if "residual" not in amax else stored(residual_source, "residual")
        # The bias needs 32 bits in 2^-16 of a unit, the residual's multiplier must stay below 4.
        exponent = epilogue.result_exponent(
            max(amax["output"], amax["constant"]) * RESULT_HEADROOM)
        if residual is not None:
            exponent = max(exponent, residual - 2)
        exponents[name] = exponent

        executed = executed_shape(unet, layer, shape, format)
        codes, scales, weight_unit = encode_weights(format, layer.weight)
        bias = layer.bias.double()[None]
        if name in calibration.embeddings:
            bias = bias + calibration.embeddings[name].double()
        if executed["scattered"]:
            codes, scales, bias = plane_weights(codes), plane_scales(scales), plane_bias(bias)
        made[name] = QuantizedLayer(
            name=name, format=format, **executed, tensor_scale=unit, segment_exponents=inputs,
            prologue_exponent=prologue, residual_exponent=residual, exponent=exponent,
            weight_codes=codes.to(torch.int8), weight_scales=scales.to(torch.uint8),
            weight_unit=weight_unit,
            residual_multiplier=(0 if residual is None else
                                 round(gain * 2.0 ** (residual - exponent + 14))),
            **results(bias * gain, gain * sum_unit(format, unit, weight_unit), exponent,
                      gain * amax["sum"] * SUM_HEADROOM),
            threshold=detector.NEVER,
            zeros=torch.zeros(count, layer.cin, dtype=torch.int32),
            modulation=calibration.modulations.get(name))
    return QuantizedModel(model, made, record, steps, chosen, label)


def executed_shape(unet, layer, shape, format):
    """Fields of the QuantizedLayer of `layer`, whose LayerShape in the network is `shape`."""
    gathered = format == Format.IN16 and layer.kernel == 3
    scattered = layer.name in policies.scattered(unet)
    return {"gathered": gathered, "scattered": scattered,
            "height": shape.height, "width": shape.width,
            "segments": (9 * layer.cin,) if gathered else shape.segments,
            "kernel": 1 if gathered or scattered else layer.kernel}


def encode_weights(format, weight):
    """Codes, scales and unit of `weight`."""
    if format == Format.IN16:
        weight = gather_weights(weight)
    return mxint8.quantize_weights(weight) if format.mx else w4.quantize(weight)


def sum_unit(format, tensor_scale, weight_unit):
    """The unit of a convolution's sums."""
    return 2.0 ** (-9 if format.mx else -18) * tensor_scale * weight_unit


def results(bias, unit, exponent, amax):
    """Fields of the QuantizedLayer for results in units of 2^`exponent`.

    `bias` (evaluations or 1, Cout), the `unit` of the sums and their magnitudes up to `amax`, for
    which 32 bits are enough after the alignment, are with the gain.
    """
    target = 2.0 ** exponent / (1 << epilogue.FRACTION)
    align = 31 - exponent_below((1 << 31) - 1, amax / unit / (1 << 31), 31)
    ratio = unit / target * 2.0 ** align
    shift = exponent_below(32767, ratio, 31)
    return {"align_shift": align, "scale_shift": shift,
            "multiplier": torch.full(bias.shape[1:], min(round(ratio * 2.0 ** shift), 32767),
                                     dtype=torch.int16),
            "bias": (bias / target).round().clamp(-1 << 31, (1 << 31) - 1).to(torch.int32)}


# Labels.

def fixed(model, fraction=0.3):
    """Threshold of every layer, by name: one zero fraction for all, as in the paper."""
    return {name: round(fraction * 65536) if item.sparse_capable else detector.NEVER
            for name, item in model.layers.items()}


def balance(model, dense_rate, sparse_rate, *, dense_lanes=1, sparse_lanes=1, vector=16):
    """Threshold of every layer, by name, with which both sides of an array finish together.

    Takes the calibration's zero counts, labels one evaluation late, and minimizes the time of all
    evaluations, each that of the slower side. Dense work is in whole words of `vector` channels.

    Parameters
    ----------
    dense_rate, sparse_rate : multipliers of each side; 0: no such side
    dense_lanes, sparse_lanes : output channels that a side works on at once
    """
    thresholds = {}
    candidates = [*range(0, 65537, 1024), detector.NEVER]
    for name, item in model.layers.items():
        thresholds[name] = detector.NEVER
        if not item.sparse_capable or not sparse_rate:
            continue
        pixels, outputs = item.height * item.width, len(item.weight_codes)
        zeros = item.zeros.long()
        counts = torch.cat([zeros[:1], zeros[:-1]])             # that give the labels
        left = 1 - zeros.double() / pixels
        costs = []
        for threshold in candidates:
            sparse = counts * 65536 >= threshold * pixels
            words = (((~sparse).sum(1) + vector - 1) // vector).double()
            dense_time = words * vector * lanes(outputs, dense_lanes) / max(dense_rate, 1e-9)
            sparse_time = (left * sparse).sum(1) * lanes(outputs, sparse_lanes) / sparse_rate
            costs.append(torch.maximum(dense_time, sparse_time).sum().item())
        thresholds[name] = candidates[costs.index(min(costs))]
    return thresholds


def lanes(outputs, count):
    """`outputs` rounded up to whole tiles of `count` lanes."""
    return -(-outputs // count) * count


# Measures.

def zero_counts(model, noise, on_evaluation=None, progress=None):
    """Zero codes in the images of a sampling run from `noise`: (evaluations, Cin) by layer.

    `progress` is a callable (evaluations done, evaluations) or None.
    """
    count = len(model.schedule)
    counts = {name: torch.zeros(count, item.zeros.shape[1], dtype=torch.int64)
              for name, item in model.layers.items()}
    current = 0

    def begin(evaluation, x):
        nonlocal current
        current = evaluation.index
        if on_evaluation is not None:
            on_evaluation(evaluation, x)
        if progress is not None:
            progress(current, count)

    def observe(name, x):
        counts[name][current] += (x == 0).sum((0, 2, 3))

    sample(lambda x, sigma: model(x, sigma, on_input=observe), noise, model.steps, begin,
           sampler=Sampler.for_model(model))
    return counts


def zero_fraction(model):
    """Share of the W4A4 layers' MACs whose activation code is 0, from the calibration's counts.

    0 where there are no such layers.
    """
    zero = total = 0
    for item in model.layers.values():
        if item.sparse_capable:
            zeros = item.zeros.double().mean() / (item.height * item.width)
            zero += item.macs * zeros.item()
            total += item.macs
    return zero / total if total else 0.0


def denoiser_sqnr(model, noise):
    """SQNR in dB of the denoiser in each evaluation of a float sampling run from `noise`."""
    found, labels = [], one_hot(model.label, model.architecture)

    def denoise(x, sigma):
        right = model.float_model(x, sigma, labels)
        found.append(sqnr(right, model(x, sigma)))
        return right

    sample(denoise, noise, model.steps, sampler=Sampler.for_model(model))
    return found


def summary(model):
    """What the policy of a quantized model makes of every layer, and what it saves.

    Returns a dict of ``policy``, ``executable``, ``layers`` (``name``, ``format``, bits of an
    element with its share of the scales as ``activation_bits`` and ``weight_bits``, ``sqnr_db`` of
    the layer's result beside float, ``macs``), and totals: ``macs``, of the layers; ``mxint8`` and
    ``input`` (16 bits), shares of them; ``compute_saved`` against FP16, with the cost of a MAC
    linear in the bits of a code; ``memory_saved`` against FP16, of all weights and all layers'
    inputs of one image, with their scales.
    """
    shapes, names = layer_shapes(model.float_model.unet), model.formats
    bits, half = policies.memory(model.policy, names, shapes)
    ratios = model.record.get("sqnr_db")
    ratios = ratios if isinstance(ratios, dict) else {}
    layers = []
    for shape in shapes:
        activation, weight = policies.bits_of(names[shape.name], model.policy, shape)
        layers.append({"name": shape.name, "format": names[shape.name],
                       "activation_bits": round(activation, 4), "weight_bits": round(weight, 4),
                       "sqnr_db": ratios.get(shape.name), "macs": shape.macs})
    return {"policy": model.policy.name, "executable": model.policy.executable, "layers": layers,
            "macs": sum(shape.macs for shape in shapes),
            "mxint8": round(policies.macs_share(names, shapes), 5),
            "input": round(policies.macs_share(names, shapes, ("IN16",)), 5),
            "compute_saved": round(1 - policies.cost(names, shapes), 4),
            "memory_saved": round(1 - bits / half, 4)}


# Files.

SCALARS = {"tensor_scale": float, "weight_unit": float, "segment_exponents": list,
           "prologue_exponent": int, "residual_exponent": int, "exponent": int,
           "align_shift": int, "scale_shift": int, "residual_multiplier": int, "threshold": int}
RANGES = {"exponent": (-120, 100), "prologue_exponent": (-120, 100),
          "residual_exponent": (-120, 100), "align_shift": (0, 31), "scale_shift": (0, 31),
          "residual_multiplier": (0, 65535), "threshold": (0, detector.NEVER)}
TENSORS = {"weight_codes": torch.int8, "weight_scales": torch.uint8, "multiplier": torch.int16,
           "bias": torch.int32, "zeros": torch.int32, "modulation": torch.float32}
LARGEST_MAGNITUDE = 1e30   # of stored magnitudes


def save(model, path):
    """Write a quantized model: float weights in half precision, and what the policy needs.

    For a QuantizedModel these are codes, scales, biases and zero counts; for a FakeQuantized the
    largest magnitudes of calibration, from which every machine rounds the same operands.
    """
    table, tensors = {}, {}
    if isinstance(model, FakeQuantized):
        for name, format in model.formats.items():
            table[name] = {"format": format, "clip": model.clips[name]}
            tensors[f"{QUANTIZED}{name}.amax"] = model.amax[name]
            if name in model.orders:
                tensors[f"{QUANTIZED}{name}.order"] = model.orders[name].to(torch.int32)
    else:
        for name, item in model.layers.items():
            table[name] = {"format": item.format.name,
                           **{field: getattr(item, field) for field in SCALARS}}
            for field in TENSORS:
                if getattr(item, field) is not None:
                    tensors[f"{QUANTIZED}{name}.{field}"] = getattr(item, field)
    head = {"version": VERSION, "steps": model.steps, "label": model.label,
            "policy": dataclasses.asdict(model.policy), "layers": table}
    save_model(path, model.float_model, {**model.record, "quantized": head}, tensors)


def load(source):
    """The quantized model from a file that `save` wrote, or of a shipped name.

    A QuantizedModel has the same integers on every machine; policies that the accelerator lacks
    give a FakeQuantized.

    Raises
    ------
    ModelError
        If the file is missing, damaged, of another kind or not quantized, or if anything in its
        quantized part is missing, unknown, of the wrong shape or type, or out of range.
    """
    path = resolve(source)
    model, record = load_model(path)
    tensors = {name: value for name, value in read_file(path)[0].items()
               if name.startswith(QUANTIZED)}
    try:
        return decode(path, model, record, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: metadata of the quantized part must be whole "
                         f"({type(error).__name__}: {error})") from None


def load_executable(source):
    """`load`, for what needs integers; ModelError if the accelerator lacks the policy's formats."""
    model = load(source)
    if not isinstance(model, QuantizedModel):
        raise ModelError(f"{source}: must be in formats that the accelerator has, "
                         f"not by policy {model.policy.name}")
    return model


def decode(path, model, record, tensors):
    """The quantized model of a file's parts."""
    def need(condition, text):
        if not condition:
            raise ModelError(f"{path}: {text}")

    head = record.get("quantized")
    need(head is not None, "must be a quantized model, not a float one: quantize it first")
    need(head["version"] in range(1, VERSION + 1), "version of the quantized part must be in "
         f"1..{VERSION}, not {head['version']!r}")
    if head["version"] == 1:       # which knew one policy
        head = {**head, "label": None, "policy": dataclasses.asdict(policies.POLICIES["mixed"])}
    steps = head["steps"]
    need(isinstance(steps, int) and 1 <= steps <= 1000,
         f"steps must be an integer in 1..1000, not {steps!r}")
    try:
        one_hot(head["label"], model.architecture)
        chosen = policies.Policy.from_json(head["policy"])
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None
    names = [layer.name for layer in model.unet.layers()]
    need(list(head["layers"]) == names, "quantized layers must be those of the network")
    origin = {name: value for name, value in record.items()
              if name not in ("kind", "architecture", "quantized")}
    used = set()

    def take(key, dtype, size, low=None, high=None):
        key = f"{QUANTIZED}{key}"
        need(key in tensors, f"tensor {key} is missing")
        value = tensors[key]
        need(value.dtype == dtype, f"tensor {key} must be {dtype}, not {value.dtype}")
        need(tuple(value.shape) == size,
             f"tensor {key} must have shape {size}, not {tuple(value.shape)}")
        if low is not None:
            extremes = (value.min().item(), value.max().item())
            need(low <= extremes[0] and extremes[1] <= high,
                 f"tensor {key} must be in {low}..{high}, not {extremes[0]}..{extremes[1]}")
        used.add(key)
        return value

    # Any layer may be in MXINT8, the others take what the policy says.
    for name, wanted in policies.formats(model.unet, chosen).items():
        found = head["layers"][name]["format"]
        need(found == wanted or (found == "MX8" and wanted[:2] == "A4"),
             f"format of {name} must be {wanted}{' or MX8' if wanted[:2] == 'A4' else ''}, "
             f"not {found!r}")
    if chosen.executable:
        made = decode_integers(model, head, chosen, origin, need, take)
    else:
        made = decode_fake(model, head, chosen, origin, need, take,
                           lambda key: f"{QUANTIZED}{key}" in tensors)
    for key in tensors:
        need(key in used, f"tensor {key} must not be there: the network has no such layer")
    return made


def decode_fake(model, head, chosen, origin, need, take, stored):
    """The FakeQuantized of a file's parts, see `decode`."""
    sigmas = torch.tensor([evaluation.sigma for evaluation in levels(model, head["steps"])],
                          dtype=torch.float64)
    amax, clips, orders = {}, {}, {}
    for layer in model.unet.layers():
        clip = head["layers"][layer.name]["clip"]
        need(isinstance(clip, float) and 0 < clip <= 1,
             f"clip of {layer.name} must be a number above 0 and at most 1, not {clip!r}")
        clips[layer.name] = clip
        amax[layer.name] = take(f"{layer.name}.amax", torch.float32, (len(sigmas), layer.cin), 0,
                                LARGEST_MAGNITUDE)
        if stored(f"{layer.name}.order"):
            order = take(f"{layer.name}.order", torch.int32, (layer.cin,), 0, layer.cin - 1).long()
            need(torch.equal(order.sort().values, torch.arange(layer.cin)),
                 f"order of {layer.name} must be a permutation of its channels")
            orders[layer.name] = order
    named = {name: table["format"] for name, table in head["layers"].items()}
    return FakeQuantized(model, chosen, named, sigmas, amax, clips, record=origin,
                         steps=head["steps"], label=head["label"], orders=orders)


def decode_integers(model, head, chosen, origin, need, take):
    """The QuantizedModel of a file's parts, see `decode`."""
    count = len(levels(model, head["steps"]))
    shapes = {shape.name: shape for shape in layer_shapes(model.unet)}
    embedded, modulated = inputs_of(model.architecture)
    layers = {}
    for layer in model.unet.layers():
        name, shape, table = layer.name, shapes[layer.name], head["layers"][layer.name]
        format = Format[table["format"]]
        for field, kind in SCALARS.items():
            check_scalar(need, f"{field} of {name}", table[field], kind, RANGES.get(field),
                         field in ("prologue_exponent", "residual_exponent"))
        need(len(table["segment_exponents"]) == len(shape.segments),
             f"segment_exponents of {name} must be {len(shape.segments)} integers, "
             f"not {table['segment_exponents']!r}")
        need((table["prologue_exponent"] is not None) == hosted(layer),
             f"prologue_exponent of {name} must be there if the host makes its input, "
             "and only then")
        if format.mx:
            for field in ("tensor_scale", "weight_unit"):
                need(math.frexp(table[field])[0] == 0.5,
                     f"{field} of {name} must be a power of two, not {table[field]!r}")
        executed = executed_shape(model.unet, layer, shape, format)
        # Before version 3 all layers were those of the network: neither gathered nor scattered.
        old = head["version"] < 3 and (executed["gathered"] or executed["scattered"])
        cin, cout, kernel = ((layer.cin, layer.cout, layer.kernel) if old else
                             (sum(executed["segments"]),
                              layer.cout * (9 if executed["scattered"] else 1), executed["kernel"]))
        groups = -(-cin // mxint8.BLOCK) if format.mx else 1
        expected = {
            "weight_codes": ((cout, cin, kernel, kernel),
                             *((-127, 127) if format.mx else (-7, 7))),
            "weight_scales": ((cout, kernel ** 2, groups), 0, 15 if format.mx else 126),
            "multiplier": ((cout,), 0, 32767),
            "bias": ((count if name in embedded else 1, cout),),
            "zeros": ((count, layer.cin), 0, shape.height * shape.width),
        }
        if name in modulated:
            expected["modulation"] = ((count, 2, layer.cin), -LARGEST_MAGNITUDE,
                                      LARGEST_MAGNITUDE)
        values = {field: take(f"{name}.{field}", TENSORS[field], *limits)
                  for field, limits in expected.items()}
        fields = {field: table[field] for field in SCALARS}
        fields["segment_exponents"] = tuple(fields["segment_exponents"])
        fields |= values
        if old and executed["gathered"]:
            codes, scales, unit = encode_weights(format, layer.weight)
            need(unit == fields["weight_unit"], f"weight_unit of {name} must be that of its "
                 f"float weights, {unit!r}, not {fields['weight_unit']!r}")
            fields |= {"weight_codes": codes.to(torch.int8),
                       "weight_scales": scales.to(torch.uint8)}
        elif old:
            fields |= planes(format, fields, need, name)
        layers[name] = QuantizedLayer(name=name, format=format, **executed, **fields)
    return QuantizedModel(model, layers, origin, head["steps"], chosen, head["label"])


def planes(format, fields, need, name):
    """Fields of a scattered layer, in place of those that it has as a 3x3 layer, without gain.

    There is no calibration of its planes: their exponent is one that none of them can exceed,
    whatever the input.
    """
    scale, weight_unit = fields["tensor_scale"], fields["weight_unit"]
    codes = plane_weights(fields["weight_codes"])
    scales = plane_scales(fields["weight_scales"])
    bias = plane_bias(fields["bias"].double() * 2.0 ** (fields["exponent"] - epilogue.FRACTION))
    # Of an input with all codes and scales at their ends.
    largest = (2.0 ** -9 * mxint8.LARGEST * 2 ** (mxint8.WINDOW - 1) if format.mx else
               a4.largest(format == Format.A4S) * e4m3.LARGEST) * scale
    weight = decode_weights(format, codes, scales, weight_unit)
    amax = weight.double().abs().sum((1, 2, 3)).max().item() * largest
    need(amax < 2.0 ** 100, f"scales of {name} must leave its results below 2^100, not {amax!r}")
    exponent = epilogue.result_exponent(amax + bias.abs().max().item())
    return {"weight_codes": codes, "weight_scales": scales, "exponent": exponent,
            **results(bias, sum_unit(format, scale, weight_unit), exponent, amax)}


def inputs_of(architecture):
    """Names of the layers that add an embedding, and of those that a modulation changes."""
    embedded, modulated = set(), set()

    def run(layer, segments, embedding, residual, gain, modulation):
        if embedding is not None:
            embedded.add(layer.name)
        if modulation is not None:
            modulated.add(layer.name)
        return layer(segments, embedding, residual, gain, modulation)

    a = architecture
    with torch.device("meta"), torch.no_grad():      # shapes alone: no arithmetic
        shadow = build(a).eval()
        with executing(shadow, run):
            shadow(torch.empty(1, a.img_channels, a.resolution, a.resolution), torch.empty(1))
    return embedded, modulated


def check_scalar(need, name, value, kind, limits, optional):
    """Check a number, or a list of exponents, of the metadata."""
    if optional and value is None:
        return
    if kind is float:
        need(isinstance(value, (int, float)) and not isinstance(value, bool)
             and 0 < value < math.inf, f"{name} must be a positive number, not {value!r}")
    elif kind is list:
        need(isinstance(value, list) and all(type(item) is int and -120 <= item <= 100
                                             for item in value),
             f"{name} must be integers in -120..100, not {value!r}")
    else:
        need(type(value) is int and limits[0] <= value <= limits[1],
             f"{name} must be an integer in {limits[0]}..{limits[1]}, not {value!r}")
