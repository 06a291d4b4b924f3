"""Test vectors: operands and results of every unit, which others can run without this package.

The npz files beside this module hold what `generate` returns; docs/formats.md says what each key
means. ``python -m golden.vectors --out DIR`` writes them.
"""

import numpy
import torch

from golden import (
    a4,
    convolution,
    detector,
    e4m3,
    epilogue,
    layer,
    mxint8,
    requantizer,
    rounding,
    w4,
)
from golden.gather import gather
from golden.requantizer import Format
from golden.scatter import add_planes, plane_bias, plane_scales, plane_weights

__all__ = ["generate"]

SEED = 20240
LANES = (8, 32)    # of the work counters: those of the preset small


def integers(rng, low, high, *shape):
    """int64 tensor in low..high: magnitudes of every size along axis 0, and both ends."""
    bits = max(high, -low).bit_length()
    size = rng.randint(0, bits + 1, shape[:1] + (1,) * (len(shape) - 1))
    values = rng.randint(low, high + 1, shape) >> size
    ends = numpy.where(rng.randint(0, 2, shape), low, high)
    return torch.from_numpy(numpy.where(rng.randint(0, 32, shape) == 0, ends, values))


def arrays(case, **tensors):
    """Entries ``case.name``; integers are int64, whatever their range."""
    return {f"{case}.{name}": numpy.asarray(value) for name, value in tensors.items()}


def rounding_vectors(rng):
    """Every shift, with ties."""
    n = numpy.arange(32).repeat(16)
    x = torch.from_numpy((rng.randint(-1 << 20, 1 << 20, n.size) << n)
                         + rng.choice([-1, 0, 1], n.size) + ((1 << n) >> 1))
    n = torch.from_numpy(n)
    divisor = torch.from_numpy(rng.randint(1, 1 << 12, n.numel()))
    dividend = torch.from_numpy(rng.randint(0, 32, n.numel())) * divisor // 2
    return (arrays("round_half_even", x=x, n=n, result=rounding.round_half_even(x, n))
            | arrays("round_half_even_quotient", x=dividend, divisor=divisor,
                     result=rounding.round_half_even_quotient(dividend, divisor))
            | arrays("saturate", x=x, bits=16, result=rounding.saturate(x, 16)))


def e4m3_vectors(rng):
    """All codes, and both encoders at and beside every boundary."""
    code = torch.arange(127)
    mantissa, exponent = e4m3.decode(code)
    value = e4m3.value(code)
    tie = (value[1:] + value[:-1]) / 2
    scale = torch.cat([tie, torch.nextafter(tie, torch.tensor(0.0)),
                       torch.nextafter(tie, torch.tensor(1000.0)), torch.tensor([464.0, 1e9])])
    out = (arrays("decode", code=code, mantissa=mantissa, exponent=exponent, value=value)
           | arrays("encode", scale=scale, code=e4m3.encode(scale)))
    for n in (15, 7):
        near = (tie.double() * 1024 * n).long()
        amax = torch.cat([near - 1, near, near + 1, torch.tensor([0, 1, (1 << 23) - 1])])
        out |= arrays(f"scale_code_{n}", amax=amax, code=e4m3.scale_code(amax, n))
    return out


def weight_vectors(rng):
    """Float weights, exact in float32, and what each quantizer makes of them."""
    def weights(*shape):
        size = torch.from_numpy(rng.randint(10, 32, (shape[0], 1, *shape[2:])))
        w = torch.from_numpy(rng.randint(-1 << 20, 1 << 20, shape)).float() * 2.0 ** -size.float()
        w[:, 0, 0, 0] = 0
        return w

    out = {}
    for case, shape in (("w4", (6, 20, 3, 3)), ("w4_1x1", (5, 33, 1, 1))):
        w = weights(*shape)
        codes, scales, tensor_scale = w4.quantize(w)
        out |= arrays(case, w=w, codes=codes, scales=scales,
                      tensor_scale=numpy.float32(tensor_scale))
    for case, shape in (("mx8", (4, 48, 3, 3)), ("mx8_1x1", (3, 32, 1, 1))):
        w = weights(*shape)
        codes, scales, unit = mxint8.quantize_weights(w)
        out |= arrays(case, w=w, codes=codes, scales=scales, unit=numpy.float64(unit))
    for case, shape in (("in16", (4, 3, 3, 3)), ("in16_wide", (3, 4, 3, 3)),
                        ("in16_1x1", (2, 3, 1, 1))):
        w = weights(*shape)
        codes, scales, unit = mxint8.quantize_input_weights(w)
        out |= arrays(case, w=w, codes=codes, scales=scales, unit=numpy.float64(unit))
    return out


def activation_vectors(rng):
    """Float activations, and the float definitions of all formats with other granularities."""
    size = torch.from_numpy(rng.randint(8, 24, (1, 20, 1, 1)))
    x = torch.from_numpy(rng.randint(-1 << 20, 1 << 20, (2, 20, 5, 3))).float()
    x = x * 2.0 ** -size.float()
    out = arrays("x", value=x)
    for case, options in (
            ("a4_pixel", {}), ("a4_group", {"group": 16}), ("a4_block", {"block": 2}),
            ("a4_image", {"block": None}), ("a4_power_of_two", {"scale": "power_of_two"}),
            ("a4_fp32", {"scale": "fp32"})):
        for signed in (False, True):
            scale = a4.static_scale(x.abs().max().item(), signed)
            out |= arrays(f"{case}_{'signed' if signed else 'unsigned'}",
                          tensor_scale=numpy.float32(scale),
                          value=a4.fake_quantize(x, signed, scale, **options))
    bottom = mxint8.window_of(mxint8.static_scale(x.abs().max().item()))
    return (out | arrays("mxint8", value=mxint8.fake_quantize(x))
            | arrays("mxint8_window", bottom=bottom - 3,
                     value=mxint8.fake_quantize(x, window=bottom - 3))
            | arrays("in16", scale=2.0 ** -3, value=mxint8.fake_quantize_input(x, 2.0 ** -3))
            | arrays("result", exponent=-6, value=epilogue.fake_quantize(x, -6)))


REQUANTIZATIONS = {
    # case: (format, V, channels of the segments, height, width, relu, shift, bits of the offset)
    "a4u": (Format.A4U, 16, [20], 5, 4, True, 8, 18),
    "a4u_two_segments": (Format.A4U, 16, [5, 17], 3, 5, True, 7, 4),
    "a4u_32": (Format.A4U, 32, [40, 8], 1, 6, True, 10, 12),
    "a4s": (Format.A4S, 16, [24], 4, 4, False, 6, 3),
    "mx8": (Format.MX8, 16, [40, 9], 3, 4, False, 5, 8),
    "mx8_relu_32": (Format.MX8, 32, [33], 4, 2, True, 12, 12),
    "in16": (Format.IN16, 16, [3], 6, 6, False, 0, 1),
    "in16_32": (Format.IN16, 32, [33], 2, 3, False, 0, 1),
}


def requantization(rng, format, vector, channels, height, width, relu, shift, bits,
                   gathered=False):
    """A Requantization whose pixels have magnitudes of every size; the first one is zero.

    `gathered`: of the taps of such an image.
    """
    size = torch.from_numpy(rng.randint(0, 17, (1, height, width)))
    size[:, -1, -1] = 0
    segments = []
    for count in channels:
        x = torch.from_numpy(rng.randint(-1 << 15, 1 << 15, (count, height, width))) >> size
        x[0, -1, -1], x[-1, -1, -1], x[:, 0, 0] = 128, -1 << 15, 0    # 128 is 256 * 1 - 128
        segments.append(x)
    if gathered:
        segments = [gather(segments[0])]
    order, slots = requantizer.slots([len(x) for x in segments], vector, format.mx)
    valid = torch.zeros(slots, dtype=torch.int64).index_fill(0, order, 1)
    gain = integers(rng, -1 << 15, (1 << 15) - 1, slots) * valid
    offset = torch.from_numpy(rng.randint(-1 << bits, 1 << bits, slots)) * valid
    return layer.Requantization(segments, gain, offset, shift, relu, format)


def operands(call):
    """Entries of a Requantization."""
    return {**{f"segment{n}": segment for n, segment in enumerate(call.segments)},
            "gain": call.gain, "offset": call.offset, "shift": call.shift, "relu": call.relu,
            "format": int(call.format)}


def code_entries(codes):
    """Entries of Codes."""
    return {"vector": codes.vector, "codes": codes.codes, "scales": codes.scales,
            "zero_counts": codes.zero_counts, "saturations": codes.saturations,
            "valid": codes.valid}


def requantizer_vectors(rng):
    """A requantization pass in every format."""
    out = {}
    for case, (format, vector, *rest) in REQUANTIZATIONS.items():
        call = requantization(rng, format, vector, *rest)
        codes = requantizer.requantize(call.segments, call.gain, call.offset, call.shift, call.relu,
                                       format, vector)
        out |= arrays(case, **operands(call), **code_entries(codes))
    return out


def random_weights(rng, outputs, kernel, codes):
    """Weight codes and scales that go with `codes`."""
    limit, top = (127, 15) if codes.format.mx else (7, 126)
    weights = integers(rng, -limit, limit, outputs, len(codes.codes), kernel, kernel)
    weights = weights * codes.valid[:, None, None]
    return weights, torch.from_numpy(
        rng.randint(0, top + 1, (outputs, kernel ** 2, len(codes.scales))))


COSTS = (64, 5, 40, 96)    # of the balanced mode: word, nonzero, group, floor
LISTS = {
    # case: (V, channels, pixels, tile channels, dense limit, has a dense and a sparse side, costs)
    "threshold": (16, [100, 9], 64, 64, 255, True, True, None),
    "threshold_limited": (16, [120], 1024, 96, 2, True, True, None),
    "balanced": (16, [100, 9], 64, 64, 255, True, True, COSTS),
    "balanced_32": (32, [250], 4096, 128, 255, True, True, COSTS),
    "balanced_limited": (16, [128], 30, 128, 1, True, True, (20, 5, 40, 96)),
    "balanced_floor": (16, [60], 1, 32, 255, True, True, (7, 3, 0, 65535)),
    "all_dense": (16, [50], 25, 32, 1, True, False, COSTS),
    "all_sparse": (16, [50], 25, 32, 255, False, True, None),
}


def list_entries(lists, vector):
    """Entries of ChannelLists; `slots` has those of all positions of all tiles."""
    return {"first": [item.first for item in lists], "size": [item.size for item in lists],
            "count": [len(item.slots) for item in lists], "low": [item.low for item in lists],
            "high": [item.high for item in lists], "cut": [item.cut for item in lists],
            "slots": torch.cat([item.positions(vector) for item in lists])}


def list_vectors(rng):
    """Lists of channels and their split, in both modes, and where it is high."""
    out = {}
    for case, (vector, channels, pixels, tile_channels, *options, costs) in LISTS.items():
        order, slots = requantizer.slots(channels, vector)
        valid = torch.zeros(slots, dtype=torch.bool).index_fill(0, order, True)
        share = rng.beta(2, 1, slots)
        counts = torch.from_numpy(numpy.minimum((share * (pixels + 1)).astype(int), pixels))
        counts[~valid] = pixels
        counts[3], counts[5] = 0, 65535
        threshold = 45000
        sides = valid, vector, tile_channels, *options
        labels = detector.labels(counts, pixels, threshold, valid)
        lists = (detector.threshold_lists(labels, *sides) if costs is None else
                 detector.balanced_lists(counts, pixels, detector.Costs(*costs), *sides))
        out |= arrays(case, counts=counts, valid=valid, pixels=pixels, threshold=threshold,
                      costs=numpy.array(costs or [], numpy.int64), vector=vector,
                      tile_channels=tile_channels,
                      **dict(zip(("dense_limit", "dense", "sparse"), options, strict=True)),
                      **list_entries(lists, vector))
    cuts = torch.tensor([0, 1, 100, 128, 255])
    owners = torch.stack([
        detector.ChannelList(0, 32, torch.arange(32), 0, 1, int(cut)).split(600) for cut in cuts])
    return out | arrays("split", cut=cuts, high=owners == 1)


def convolution_vectors(rng):
    """Exact sums and work, with codes of requantization passes and balanced lists."""
    out = {}
    for case, (format, vector, *rest) in REQUANTIZATIONS.items():
        call = requantization(rng, format, vector, *rest)
        codes = requantizer.requantize(call.segments, call.gain, call.offset, call.shift, call.relu,
                                       format, vector)
        _, height, width = codes.codes.shape
        kernel = 1 if case in ("a4u_32", "mx8_relu_32") else 3
        outputs = int(rng.randint(3, 20))
        weights, scales = random_weights(rng, outputs, kernel, codes)
        counts = torch.from_numpy(rng.randint(0, height * width + 1, len(codes.codes)))
        lists = detector.natural_lists(codes.valid) if format.mx else detector.balanced_lists(
            counts, height * width, detector.Costs(*COSTS), codes.valid, vector, 32)
        # Two runs of all columns but the first; the second has the last row.
        runs = [(0, height - 1, 1, width - 1)] * (height > 1) + [(height - 1, 1, 1, width - 1)]
        share = 2 if format.mx else 1
        dense, sparse = convolution.work(codes, lists, kernel, outputs, *LANES, share, runs)
        out |= arrays(
            case, format=int(format), vector=vector, codes=codes.codes, scales=codes.scales,
            valid=codes.valid, kernel=kernel, weight_codes=weights, weight_scales=scales,
            accumulator=convolution.accumulate(codes, weights, scales),
            **list_entries(lists, vector), dense_lanes=LANES[0], sparse_lanes=LANES[1],
            share=share, runs=runs, dense_work=dense, sparse_work=sparse)
    return out


def epilogue_vectors(rng):
    """Every step, with and without residual, up to saturation."""
    out = {}
    for case, align_shift, scale_shift, residual_multiplier in (
            ("small", 0, 7, None), ("large", 26, 13, 11585), ("ends", 31, 0, 65535),
            ("fine", 12, 31, 1 << 14)):
        acc = integers(rng, -1 << 58, (1 << 58) - 1, 5, 4, 6)
        multiplier = integers(rng, -1 << 15, (1 << 15) - 1, 5)
        bias = integers(rng, -1 << 31, (1 << 31) - 1, 5)
        residual = integers(rng, -1 << 15, (1 << 15) - 1, 5, 4, 6)
        a = epilogue.align(acc, align_shift)
        t = epilogue.scale(a, multiplier, scale_shift)
        u = epilogue.add_bias(t, bias)
        out |= arrays(case, acc=acc, align_shift=align_shift, multiplier=multiplier,
                      scale_shift=scale_shift, bias=bias, aligned=a, scaled=t, biased=u)
        if residual_multiplier is not None:
            u = epilogue.add_residual(u, residual, residual_multiplier)
            out |= arrays(case, residual=residual, residual_multiplier=residual_multiplier,
                          added=u)
        out |= arrays(case, result=epilogue.narrow(u))
    return out


def layer_vectors(rng):
    """Whole layer calls; one layer at four evaluations, with counts carried by the detector."""
    out = {}
    kept = detector.Detector(64)
    base, interval = 8, 2
    kept.load(base, torch.from_numpy(rng.randint(0, 31, 48)))    # from calibration
    weights = None
    for evaluation in range(4):
        passed = requantization(rng, Format.A4U, 16, [20, 9], 6, 5, True, 8, 14)
        codes = requantizer.requantize(passed.segments, passed.gain, passed.offset, passed.shift,
                                       True, Format.A4U, 16)
        weights = weights or random_weights(rng, 10, 3, codes)
        out |= layer_entries(rng, f"a4u_{evaluation}", passed, weights, kept.read(base, 48),
                             evaluation, base, interval, 16, COSTS if evaluation >= 2 else None)
        kept.update(base, codes.zero_counts, evaluation, interval)
    for case, format, vector, channels, kernel in (
            ("a4s", Format.A4S, 32, [40], 1), ("mx8", Format.MX8, 16, [24, 16], 3),
            ("in16", Format.IN16, 16, [3], 1), ("in16_wide", Format.IN16, 32, [4], 1)):
        gathered = format == Format.IN16
        passed = requantization(rng, format, vector, channels, 4, 6, False, 8, 14, gathered)
        if gathered:
            out |= arrays(case, image=passed.segments[0].unflatten(0, (9, -1))[4])
        codes = requantizer.requantize(passed.segments, passed.gain, passed.offset, passed.shift,
                                       False, format, vector)
        counts = torch.from_numpy(rng.randint(0, 25, len(codes.codes)))
        out |= layer_entries(rng, case, passed, random_weights(rng, 7, kernel, codes), counts, 0, 0,
                             1, vector)
    return out | scattered_entries(rng)


def scattered_entries(rng):
    """A layer call whose nine planes of each output the host adds up."""
    case, vector = "mx8_scattered", 16
    passed = requantization(rng, Format.MX8, vector, [40], 4, 6, False, 8, 14)
    codes = requantizer.requantize(passed.segments, passed.gain, passed.offset, passed.shift,
                                   False, Format.MX8, vector)
    weights, scales = random_weights(rng, 2, 3, codes)
    bias = integers(rng, -1 << 28, 1 << 28, 2)
    made = layer_entries(rng, case, passed, (plane_weights(weights), plane_scales(scales)),
                         torch.zeros(len(codes.codes), dtype=torch.int64), 0, 0, 1, vector,
                         bias=plane_bias(bias), residual=False)
    planes = torch.from_numpy(made[f"{case}.output"])
    return made | arrays(case, network_weight_codes=weights, network_weight_scales=scales,
                         network_bias=bias, image=add_planes(planes))


def layer_entries(rng, case, passed, weights, counts, evaluation, base, interval, vector,
                  costs=None, bias=None, residual=True):
    """Run one layer call whose results fill their 16 bits; list its operands and results.

    The bias is random by default; without `residual` there is none.
    """
    codes, scales = weights
    outputs, kernel = codes.shape[0], codes.shape[2]
    _, height, width = passed.segments[0].shape
    quantized = requantizer.requantize(passed.segments, passed.gain, passed.offset, passed.shift,
                                       passed.relu, passed.format, vector)
    acc = convolution.accumulate(quantized, codes, scales)
    align_shift = max(0, int(acc.abs().max()).bit_length() - 30)
    multiplier = torch.from_numpy(rng.randint(-1 << 15, 1 << 15, outputs))
    if bias is None:
        bias = torch.from_numpy(rng.randint(-1 << 28, 1 << 28, outputs))
    added = {"residual": integers(rng, -1 << 15, (1 << 15) - 1, outputs, height, width),
             "residual_multiplier": 11585} if residual else {}
    call = layer.LayerCall(case, evaluation, passed, layer.Convolution(
        codes, scales, kernel, multiplier, bias, align_shift, 13, **added),
        base, 36045, interval,    # sparse from 55 % zeros on; residual times sqrt(1/2)
        detector.Costs(*costs) if costs else None, 1, 32)
    c, result = call.convolution, layer.run(call, counts, vector)
    return arrays(
        case, **operands(passed), evaluation=evaluation, detector_base=base,
        threshold=call.threshold, interval=interval, counts=counts,
        costs=numpy.array(costs or [], numpy.int64), dense_limit=call.dense_limit,
        tile_channels=call.tile_channels, kernel=kernel,
        weight_codes=c.weight_codes, weight_scales=c.weight_scales, align_shift=c.align_shift,
        multiplier=c.multiplier, scale_shift=c.scale_shift, bias=c.bias, **added,
        **code_entries(result.codes),
        **list_entries(result.lists, vector), accumulator=result.accumulator,
        output=result.output)


def generate():
    """Files as {name: {key: array}}; the same arrays on every machine.

    The legacy generator of numpy is used because its stream is frozen.
    """
    makers = {"rounding": rounding_vectors, "e4m3": e4m3_vectors, "weights": weight_vectors,
              "activations": activation_vectors, "requantizer": requantizer_vectors,
              "lists": list_vectors, "convolution": convolution_vectors,
              "epilogue": epilogue_vectors, "layer": layer_vectors}
    return {name: make(numpy.random.RandomState(SEED)) for name, make in makers.items()}
