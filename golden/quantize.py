"""From a float denoiser to a QuantizedModel: which layer gets which format, calibration, files.

Calibration needs no data set: it observes a sampling run of the float network.
"""

import dataclasses
import math

import torch
from torch.nn import functional

from golden import a4, detector, epilogue, mxint8, w4
from golden.checkpoint import QUANTIZED, ModelError, load_model, read_file, save_model
from golden.load import load as load_float
from golden.load import resolve, shipped
from golden.network import layer_shapes
from golden.quantized_network import (
    RESIZED_GAIN, Y_UNIT, QuantizedLayer, QuantizedModel, centred, executing, exponent_below)
from golden.requantizer import Format
from golden.sampler import STEPS, draw_noise, evaluations, sample

__all__ = ["formats", "quantize", "save", "load", "resolve", "shipped", "balance", "fixed",
           "zero_counts", "zero_fraction", "sqnr", "denoiser_sqnr"]

IMAGES = 16                # of the sampling run that calibrates
ACTIVATION_HEADROOM = 2.0  # of static scales over the calibration's largest magnitude
RESULT_HEADROOM = 2.0      # of 16-bit tensors over it
SUM_HEADROOM = 8.0         # of aligned sums over it
VERSION = 1                # of the quantized part of a model file
# Multipliers and output lanes of both sides of the preset `small`, for the stored thresholds.
SMALL = {"dense_rate": 128, "sparse_rate": 128, "dense_lanes": 8, "sparse_lanes": 64}


def formats(unet):
    """Format of each layer's input, a dict by name in execution order.

    The first convolution takes 16 bits; the layers of the first block and the last two 3x3
    convolutions MXINT8; the others 4 bits, unsigned after ReLU.
    """
    layers = unet.layers()
    first_block = next(iter(unet.encoder), None)
    wide = {layer.name for layer in [layer for layer in layers if layer.kernel == 3][-2:]}
    found = {}
    for layer in layers:
        if layer.name == "first":
            found[layer.name] = Format.IN16
        elif layer.name in wide or layer.name.startswith(f"encoder.{first_block}."):
            found[layer.name] = Format.MX8
        else:
            found[layer.name] = Format.A4U if layer.relu else Format.A4S
    return found


class Observer:
    """An executor that runs the float network and keeps the largest magnitudes in every layer.

    Members
    -------
    amax : dict by layer of dicts by place: "input" (of the convolution, less its means where they
        are taken out), "sum" (before bias), "output", "residual", "bias" (all that is constant over
        the image, with the gain), "segment0", "segment1"
    sources : dict by layer of the layers that made its segments and its residual, None where the
        host did
    """

    def __init__(self):
        self.amax, self.sources, self.gains, self.alive = {}, {}, {}, []

    def __call__(self, layer, segments, embedding, residual, gain, modulation=None):
        if layer.name == "first":
            self.alive.clear()
        makers = {id(tensor): name for tensor, name in self.alive}
        self.sources[layer.name] = ([makers.get(id(segment)) for segment in segments],
                                    makers.get(id(residual)))
        self.gains[layer.name] = gain
        x = layer.prologue(segments, modulation)
        mean = x.mean((2, 3), keepdim=True) if centred(layer) else torch.zeros(())
        x = x - mean
        total = functional.conv2d(x, layer.weight, None, padding=layer.kernel // 2)
        bias = layer.bias[None] if embedding is None else layer.bias + embedding[:1]
        bias = bias[:, :, None, None]
        if centred(layer):
            bias = bias + functional.conv2d(mean, layer.weight)
        out = total + bias
        out = (out if residual is None else out + residual) * gain
        seen = {"input": x, "sum": total, "output": out, "bias": bias * gain}
        seen |= {f"segment{n}": segment for n, segment in enumerate(segments)}
        if residual is not None:
            seen["residual"] = residual
        kept = self.amax.setdefault(layer.name, {})
        for place, tensor in seen.items():
            kept[place] = max(kept.get(place, 0.0), tensor.abs().max().item())
        self.alive.append((out, layer.name))
        return out


def quantize(source, *, images=IMAGES, seed=0, steps=STEPS, progress=None):
    """QuantizedModel of the float model `source`: whatever `golden.load.load` accepts.

    Parameters
    ----------
    images : of the sampling run from `seed` that calibrates
    steps : Heun steps of that run, and of the schedule whose embeddings are stored
    progress : callable (fraction of the work done) or None

    Raises
    ------
    ModelError
        If the file cannot be used, or its network cannot be quantized.
    """
    path = resolve(source)
    model, record = load_float(path)
    record = {name: value for name, value in record.items()
              if name not in ("kind", "architecture", "quantized")}
    return quantize_model(model, record, images=images, seed=seed, steps=steps, progress=progress,
                          label=str(path))


def quantize_model(model, record, *, images=IMAGES, seed=0, steps=STEPS, progress=None,
                   label="model"):
    """QuantizedModel of the Precond `model`, whose weights are first rounded to half precision."""
    if model.architecture.activation != "relu":
        raise ModelError(f"{label}: activation must be relu to be quantized, "
                         f"not {model.architecture.activation!r}")
    model = model.half().float().eval().requires_grad_(False)
    noise = draw_noise(images, model.architecture, seed)
    total = len(evaluations(steps))

    def report(base):
        return lambda evaluation, x: progress and progress(base + evaluation.index / total / 2)

    observer = Observer()
    with executing(model.unet, observer):
        sample(model, noise, steps, report(0.0))
    layers = constants(model, observer, steps)
    record = {**record, "calibration": {"images": images, "seed": seed}}
    quantized = QuantizedModel(model, layers, record, steps)
    counts = zero_counts(quantized, noise, on_evaluation=report(0.5))
    for name, item in layers.items():
        zeros = (counts[name].double() / images).round().to(torch.int32)
        layers[name] = dataclasses.replace(item, zeros=zeros)
    for name, threshold in balance(quantized, **SMALL).items():
        layers[name] = dataclasses.replace(layers[name], threshold=threshold)
    if progress:
        progress(1.0)
    return quantized


@torch.no_grad()
def constants(model, observer, steps):
    """A QuantizedLayer, without zero counts, for each layer of `model`."""
    unet, chosen = model.unet, formats(model.unet)
    shapes = {shape.name: shape for shape in layer_shapes(unet)}
    biases = embedded_biases(model, steps)
    exponents, made = {}, {}
    for layer in unet.layers():
        name, shape = layer.name, shapes[layer.name]
        format, amax, gain = chosen[name], observer.amax[name], observer.gains[name]
        sources, residual_source = observer.sources[name]

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
            if layer.resample is not None:
                prologue = epilogue.result_exponent(amax["input"] * RESULT_HEADROOM)
                unit = 2.0 ** (prologue - Y_UNIT) / RESIZED_GAIN
            elif format == Format.MX8:
                unit = mxint8.static_scale(amax["input"] * ACTIVATION_HEADROOM)
            else:
                unit = a4.static_scale(amax["input"] * ACTIVATION_HEADROOM, format == Format.A4S)
        residual = None if "residual" not in amax else stored(residual_source, "residual")
        # The bias needs 32 bits in 2^-16 of a unit, the residual's multiplier must stay below 4.
        exponent = epilogue.result_exponent(
            max(amax["output"], amax["bias"]) * RESULT_HEADROOM)
        if residual is not None:
            exponent = max(exponent, residual - 2)
        exponents[name] = exponent

        codes, scales, weight_unit, sum_unit = encode_weights(format, layer.weight, unit)
        target = 2.0 ** exponent / (1 << epilogue.FRACTION)
        align = 31 - exponent_below((1 << 31) - 1,
                                    amax["sum"] * SUM_HEADROOM / sum_unit / (1 << 31), 31)
        ratio = gain * sum_unit / target * 2.0 ** align
        shift = exponent_below(32767, ratio, 31)
        bias = biases.get(name, layer.bias.double()[None]) * gain / target
        made[name] = QuantizedLayer(
            name=name, format=format, segments=shape.segments, height=shape.height,
            width=shape.width, kernel=layer.kernel, tensor_scale=unit, segment_exponents=inputs,
            prologue_exponent=prologue, residual_exponent=residual, exponent=exponent,
            weight_codes=codes.to(torch.int8), weight_scales=scales.to(torch.uint8),
            weight_unit=weight_unit, align_shift=align, scale_shift=shift,
            residual_multiplier=(0 if residual is None else
                                 round(gain * 2.0 ** (residual - exponent + 14))),
            multiplier=torch.full((layer.cout,), min(round(ratio * 2.0 ** shift), 32767),
                                  dtype=torch.int16),
            bias=bias.round().clamp(-1 << 31, (1 << 31) - 1).to(torch.int32),
            threshold=detector.NEVER,
            zeros=torch.zeros(len(evaluations(steps)), layer.cin, dtype=torch.int32))
    return made


def embedded_biases(model, steps):
    """Bias and embedding (evaluations, Cout) of the layers that take one, in float64."""
    sigmas = torch.tensor([evaluation.sigma for evaluation in evaluations(steps)])
    embedding = model.unet.embed(model.coefficients(sigmas)[3])
    blocks = [*model.unet.encoder.values(), *model.unet.decoder.values()]
    return {block.conv0.name: block.affine(embedding).double() + block.conv0.bias.double()
            for block in blocks}


def encode_weights(format, weight, unit):
    """Codes, scales and unit of `weight`, and the unit of sums with activations of sA `unit`."""
    if format in (Format.A4U, Format.A4S):
        codes, scales, weight_unit = w4.quantize(weight)
        return codes, scales, weight_unit, 2.0 ** -18 * unit * weight_unit
    block = weight.shape[1] if format == Format.IN16 else mxint8.BLOCK
    codes, scales, weight_unit = mxint8.quantize_weights(weight, block)
    return codes, scales, weight_unit, 2.0 ** -9 * unit * weight_unit


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

def zero_counts(model, noise, on_evaluation=None):
    """Zero codes in the images of a sampling run from `noise`: (evaluations, Cin) by layer."""
    counts = {name: torch.zeros(len(evaluations(model.steps)), sum(item.segments),
                                dtype=torch.int64) for name, item in model.layers.items()}
    current = 0

    def begin(evaluation, x):
        nonlocal current
        current = evaluation.index
        if on_evaluation is not None:
            on_evaluation(evaluation, x)

    def observe(name, x):
        counts[name][current] += (x == 0).sum((0, 2, 3))

    sample(lambda x, sigma: model(x, sigma, observe), noise, model.steps, begin)
    return counts


def zero_fraction(model):
    """Share of the W4A4 layers' MACs whose activation code is 0, from the calibration's counts."""
    zero = total = 0
    for item in model.layers.values():
        if item.sparse_capable:
            zeros = item.zeros.double().mean() / (item.height * item.width)
            zero += item.macs * zeros.item()
            total += item.macs
    return zero / total


def sqnr(reference, other):
    """Signal of `reference` over its difference to `other`, in dB; infinite if there is none."""
    signal, error = reference.double().square().sum(), (reference - other).double().square().sum()
    return 10 * math.log10(signal / error) if error else math.inf


def denoiser_sqnr(model, noise):
    """SQNR in dB of the denoiser in each evaluation of a float sampling run from `noise`."""
    found = []

    def denoise(x, sigma):
        right = model.float_model(x, sigma)
        found.append(sqnr(right, model(x, sigma)))
        return right

    sample(denoise, noise, model.steps)
    return found


# Files.

SCALARS = {"tensor_scale": float, "weight_unit": float, "segment_exponents": list,
           "prologue_exponent": int, "residual_exponent": int, "exponent": int,
           "align_shift": int, "scale_shift": int, "residual_multiplier": int, "threshold": int}
RANGES = {"exponent": (-120, 100), "prologue_exponent": (-120, 100),
          "residual_exponent": (-120, 100), "align_shift": (0, 31), "scale_shift": (0, 31),
          "residual_multiplier": (0, 65535), "threshold": (0, detector.NEVER)}
TENSORS = {"weight_codes": torch.int8, "weight_scales": torch.uint8, "multiplier": torch.int16,
           "bias": torch.int32, "zeros": torch.int32}


def save(model, path):
    """Write a QuantizedModel: float weights in half precision, codes, scales and calibration."""
    table, tensors = {}, {}
    for name, item in model.layers.items():
        table[name] = {"format": item.format.name,
                       **{field: getattr(item, field) for field in SCALARS}}
        for field in TENSORS:
            tensors[f"{QUANTIZED}{name}.{field}"] = getattr(item, field)
    record = {**model.record, "quantized": {"version": VERSION, "steps": model.steps,
                                            "layers": table}}
    save_model(path, model.float_model, record, tensors)


def load(source):
    """QuantizedModel from a file that `save` wrote, or of a shipped name: the same integers.

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


def decode(path, model, record, tensors):
    """The QuantizedModel of a file's parts."""
    def need(condition, text):
        if not condition:
            raise ModelError(f"{path}: {text}")

    head = record.get("quantized")
    need(head is not None, "must be a quantized model, not a float one: quantize it first")
    need(head["version"] == VERSION, f"version of the quantized part must be {VERSION}, "
         f"not {head['version']!r}")
    steps = head["steps"]
    need(isinstance(steps, int) and 1 <= steps <= 1000,
         f"steps must be an integer in 1..1000, not {steps!r}")
    count = len(evaluations(steps))
    chosen = formats(model.unet)
    shapes = {shape.name: shape for shape in layer_shapes(model.unet)}
    need(list(head["layers"]) == list(chosen), "quantized layers must be those of the network")
    layers, used = {}, set()
    for layer in model.unet.layers():
        name, shape, table = layer.name, shapes[layer.name], head["layers"][layer.name]
        format = chosen[name]
        need(table["format"] == format.name,
             f"format of {name} must be {format.name}, not {table['format']!r}")
        for field, kind in SCALARS.items():
            check_scalar(need, f"{field} of {name}", table[field], kind, RANGES.get(field),
                         field in ("prologue_exponent", "residual_exponent"))
        need(len(table["segment_exponents"]) == len(shape.segments),
             f"segment_exponents of {name} must be {len(shape.segments)} integers, "
             f"not {table['segment_exponents']!r}")
        need((table["prologue_exponent"] is not None) == (layer.resample is not None),
             f"prologue_exponent of {name} must be there if the layer resamples, and only then")
        if format in (Format.MX8, Format.IN16):
            for field in ("tensor_scale", "weight_unit"):
                need(math.frexp(table[field])[0] == 0.5,
                     f"{field} of {name} must be a power of two, not {table[field]!r}")
        four = format in (Format.A4U, Format.A4S)
        groups = -(-layer.cin // mxint8.BLOCK) if format == Format.MX8 else 1
        expected = {
            "weight_codes": (tuple(layer.weight.shape), *((-7, 7) if four else (-127, 127))),
            "weight_scales": ((layer.cout, layer.kernel ** 2, groups), 0, 126 if four else 15),
            "multiplier": ((layer.cout,), 0, 32767),
            "bias": ((count if name.endswith(".conv0") else 1, layer.cout), None, None),
            "zeros": ((count, layer.cin), 0, shape.height * shape.width),
        }
        values = {}
        for field, (size, low, high) in expected.items():
            key = f"{QUANTIZED}{name}.{field}"
            need(key in tensors, f"tensor {key} is missing")
            value = tensors[key]
            need(value.dtype == TENSORS[field],
                 f"tensor {key} must be {TENSORS[field]}, not {value.dtype}")
            need(tuple(value.shape) == size,
                 f"tensor {key} must have shape {size}, not {tuple(value.shape)}")
            if low is not None:
                extremes = (value.min().item(), value.max().item())
                need(low <= extremes[0] and extremes[1] <= high,
                     f"tensor {key} must be in {low}..{high}, not {extremes[0]}..{extremes[1]}")
            used.add(key)
            values[field] = value
        fields = {field: table[field] for field in SCALARS}
        fields["segment_exponents"] = tuple(fields["segment_exponents"])
        layers[name] = QuantizedLayer(
            name=name, format=format, segments=shape.segments, height=shape.height,
            width=shape.width, kernel=layer.kernel, **fields, **values)
    for key in tensors:
        need(key in used, f"tensor {key} must not be there: the network has no such layer")
    origin = {name: value for name, value in record.items()
              if name not in ("kind", "architecture", "quantized")}
    return QuantizedModel(model, layers, origin, steps)


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
