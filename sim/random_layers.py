"""Layer calls made up at random, to compare the RTL with golden where no network leads it."""

import dataclasses
import itertools

import numpy as np
import torch

from golden import detector, layer
from golden.convolution import accumulate
from golden.requantizer import requantize, spread
from hw.descriptor import Format
from sim import lowering, tiler
from sim.shape import BLOCK, FitError, Shape

__all__ = ["random_call", "random_calls", "edge_calls"]

BUDGET = 3_000_000   # multiplications of a random layer
THRESHOLDS = (0, 19661, 45875, 65535, 65536, 65537, detector.NEVER)   # 0.3 and 0.7 among them


def _pick(rng, *values):
    return values[int(rng.integers(len(values)))]


def _size(rng, high):
    """1..high, small ones more often."""
    return int(np.exp(rng.uniform(0, np.log(high + 1))))


def _tensor(values):
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def _bits(values):
    """Bits of the largest magnitude."""
    return int(abs(values).max()).bit_length()


def _normal(rng, bits, shape, limit):
    """Integers of about ``bits`` bits, within -limit - 1..limit."""
    values = np.rint(rng.standard_normal(shape) * 2.0 ** bits)
    return np.clip(values, -limit - 1, limit).astype(np.int64)


def _shape(rng, config, chosen):
    """A `Shape`; ``chosen`` are fields that are given."""
    format = chosen.get("format", _pick(rng, *Format, Format.A4U, Format.A4U))
    widest = config.max_channels // (2 if format == Format.IN16 else 1)
    channels = (_size(rng, widest),)
    if format != Format.IN16 and channels[0] < widest and rng.random() < 0.4:
        channels = (channels[0], _size(rng, widest - channels[0]))
    fields = {
        "format": format, "kernel": _pick(rng, 1, 3, 3), "height": _size(rng, 40),
        "width": _size(rng, 40), "channels": channels, "outputs": _size(rng, config.max_outputs),
        "residual": bool(rng.integers(2)),
    } | chosen
    return Shape(vector=config.vector, **fields)


def _products(shape):
    return shape.pixels * shape.taps * shape.slots * shape.outputs


def random_call(rng, config, *, name="random", evaluation=0, budget=BUDGET, **chosen):
    """A layer call that fits ``config``, and the detector's counts before it.

    Parameters
    ----------
    rng : numpy.random.Generator
    config : Config
    name, evaluation : of the call
    budget : int
        The most multiplications that the layer may take, where its shape is not given.
    chosen
        Any of ``format``, ``kernel``, ``height``, ``width``, ``channels`` (a tuple), ``outputs``
        and ``residual``; the others are made up.

    Returns
    -------
    golden.layer.LayerCall
    counts : (slots,) int64 tensor, or None for formats without labels

    Raises
    ------
    sim.shape.FitError
        If no layer with what is chosen seems to fit.
    """
    for attempt in itertools.count():
        shape = _shape(rng, config, chosen)
        try:
            lowering.check_shape(name, shape, config)
        except FitError:
            if attempt == 1000:
                raise
            continue
        if _products(shape) <= budget or attempt >= 1000:
            return _call(rng, config, shape, name, evaluation)


def _call(rng, config, shape, name, evaluation):
    """A layer call of a shape, and counts."""
    requantization = _requantization(rng, shape)
    codes = requantize(requantization.segments, requantization.gain, requantization.offset,
                       requantization.shift, requantization.relu, requantization.format,
                       shape.vector)
    threshold, counts = _labels(rng, shape) if shape.labelled else (detector.NEVER, None)
    entries = config.detector_depth - (shape.slots if shape.labelled else 0)
    call = layer.LayerCall(
        name=name, evaluation=evaluation, requantization=requantization,
        convolution=_convolution(rng, shape, codes), threshold=threshold,
        detector_base=_pick(rng, 0, entries, int(rng.integers(entries + 1))),
        interval=_pick(rng, 1, 1, 2, 3))
    return _tiled(rng, config, shape, call), counts


def _tiled(rng, config, shape, call):
    """``call`` with channel tiles of a size, a limit of the dense side, and costs or none."""
    call = tiler.adjusted(call, tiler.plan(shape, config))
    if not shape.labelled:
        return call
    balance = _pick(rng, None, call.balance, call.balance, detector.Costs(
        *(int(rng.integers(_pick(rng, 2, 40, 1000))) for _ in range(4))))
    call = dataclasses.replace(call, balance=balance)
    if rng.random() < 0.5:
        return call
    other = dataclasses.replace(
        call, tile_channels=int(rng.integers(1, config.tile_channels // BLOCK + 1)) * BLOCK)
    if config.sparse_pes:
        other = dataclasses.replace(other, dense_limit=int(rng.integers(
            other.tile_channels // config.vector + 2)))
    try:
        lowering.check_fit(other, config)
    except FitError:
        return call
    return other


def _requantization(rng, shape):
    """Operands of a requantization pass: usual ones, or ones that clip or vanish."""
    relu = shape.format == Format.A4U or (
        shape.format != Format.IN16 and bool(rng.integers(2)))
    style = _pick(rng, *["usual"] * 9, "large", "tiny", "zero")
    bits = {"usual": rng.uniform(4, 14), "large": 16, "tiny": 1, "zero": -9}[style]
    segments = [_normal(rng, bits, (count, shape.height, shape.width), 32767)
                for count in shape.channels]
    for segment in segments:
        segment[rng.random(segment.shape) < _pick(rng, 0, 0, 0.5)] = 0
    if shape.format == Format.IN16:
        return layer.Requantization([_tensor(x) for x in segments], None, None, 0, False,
                                    shape.format)
    # y is to have about `reach` bits: gain = 2^(reach - bits + shift)
    reach = _pick(rng, 23, 20, 20, 14, 14, 10, 6, 1)
    shift = int(np.clip(rng.integers(15) + max(bits, 0) - reach, 0, 31))
    channels = sum(shape.channels)
    gain = rng.choice([-1, 1], channels) * np.exp2(np.clip(
        reach - max(bits, 0) + shift + rng.uniform(-_pick(rng, 0, 1, 4), 0, channels), 0, 15))
    # offsets differ, so that channels differ in how often they are zero
    offset = np.exp2(reach) * rng.normal(
        _pick(rng, 0, 0, -0.5, -1) * relu, _pick(rng, 0, 0.5), channels)
    gain, offset = np.rint(gain).astype(np.int64), np.rint(offset).astype(np.int64)
    if style == "large":
        gain = gain * _pick(rng, 1, 4)
        offset = offset * _pick(rng, 1, 1 << 8)
    gain, offset = np.clip(gain, -32768, 32767), np.clip(offset, -1 << 31, (1 << 31) - 1)
    return layer.Requantization(
        [_tensor(x) for x in segments], _table(rng, gain, shape), _table(rng, offset, shape),
        shift, relu, shape.format)


def _table(rng, values, shape):
    """``values`` of all channels by slot; in slots without a channel lies something else."""
    counts = list(shape.channels)
    there = spread(torch.ones(len(values), dtype=torch.int64), counts, shape.vector, mx=shape.mx)
    noise = _tensor(rng.integers(-32768, 32768, len(there)))
    return torch.where(
        there == 1, spread(_tensor(values), counts, shape.vector, mx=shape.mx), noise)


def _labels(rng, shape):
    """A threshold, and the counts before the call: anything, or just above and below it."""
    threshold = _pick(rng, *THRESHOLDS, int(rng.integers(65537)))
    if rng.random() < 0.3:
        edge = -(-threshold * shape.pixels // 65536)
        counts = edge + rng.integers(-1, 2, shape.slots)
    else:
        counts = np.rint(rng.random(shape.slots) ** _pick(rng, 0.3, 1, 3) * shape.pixels)
    return threshold, _tensor(np.clip(counts, 0, min(shape.pixels, 65535)))


def _convolution(rng, shape, codes):
    """Operands of a convolution pass whose results are mostly neither zero nor saturated."""
    limit = 127 if shape.mx else 7
    outputs = shape.outputs
    weights = rng.integers(-limit, limit + 1, (outputs, shape.slots, shape.kernel, shape.kernel))
    weights[rng.random(weights.shape) < _pick(rng, 0, 0.3, 0.9)] = 0
    if rng.random() < 0.15:
        weights[:] = _pick(rng, limit, -limit)
    weights[:, ~np.asarray(codes.valid)] = 0
    low, high = _pick(rng, (0, 16), (4, 9)) if shape.mx else _pick(rng, (0, 0x7F), (0x28, 0x50))
    scales = rng.integers(low, high, (outputs, shape.taps, shape.groups))
    if shape.format == Format.IN16:    # both halves of a value have the same weight
        half = shape.slots // 2
        weights[:, half:] = weights[:, :half]
        scales[:, :, half // BLOCK:] = scales[:, :, :half // BLOCK]
    weights, scales = _tensor(weights), _tensor(scales)

    acc = np.asarray(accumulate(codes, weights, scales))
    align = int(np.clip(_bits(acc) - 31 + rng.integers(-2, 6), 0, 31))
    factor_bits = int(rng.integers(1, 16))
    multiplier = _normal(rng, factor_bits, outputs, 32767)
    result_bits = min(_bits(acc) - align, 31) + factor_bits
    shift = int(np.clip(result_bits - 31 + rng.integers(-2, 4), 0, 31))
    bias = _normal(rng, rng.uniform(0, 31), outputs, (1 << 31) - 1)
    residual, residual_multiplier = None, 0
    if shape.residual:
        residual = _tensor(_normal(rng, rng.uniform(4, 15), (outputs, shape.height, shape.width),
                                   32767))
        residual_multiplier = _pick(rng, 0, 11585, 16384, 65535, int(rng.integers(65536)))
    return layer.Convolution(weights, scales, shape.kernel, _tensor(multiplier), _tensor(bias),
                             align, shift, residual, residual_multiplier)


def random_calls(rng, config, count, *, budget=BUDGET):
    """Yield ``count`` random calls with their counts, as `sim.simulate.simulate` takes them.

    Formats take turns. Some calls are followed by the same layer at the next evaluations, with
    new activations: its labels are then those that the core keeps itself.
    """
    number = 0
    for format in itertools.cycle(Format):
        if number == count:
            return
        call, counts = random_call(rng, config, name=f"random {number}", budget=budget,
                                   evaluation=int(rng.integers(8)), format=format)
        yield call, counts
        number += 1
        shape = Shape.of(call, config)
        for _ in range(int(rng.integers(5)) if counts is not None else 0):
            if number == count:
                return
            call = dataclasses.replace(call, evaluation=call.evaluation + 1,
                                       requantization=_requantization(rng, shape))
            yield call, None
            number += 1


def _fullest(config, what):
    """The shape whose jobs leave least of one buffer unused, and of these the one of least work."""
    best, best_rank = None, None
    planes = [(1 << a, 1 << b) for a in range(1, 6) for b in range(a, 7)]
    for format, kernel, channels, outputs, (height, width) in itertools.product(
            (Format.A4U, Format.MX8), (1, 3), (32, 64, 96), (16, 32, 64, 96), planes):
        shape = Shape(
            format=format, kernel=kernel, height=height, width=width, channels=(channels,),
            outputs=outputs, vector=config.vector, residual=False)
        if _products(shape) > 4 * BUDGET:
            continue
        try:
            plan = lowering.check_shape(what, shape, config)
        except FitError:
            continue
        need = max((need for job in plan.jobs[:4] for _, name, need, _ in
                    tiler.job_demands(shape, config, job, plan.dense_limit) if what in name),
                   default=0)
        rank = need, -_products(shape)
        if best is None or rank > best_rank:
            best, best_rank = shape, rank
    return best


def edge_calls(rng, config):
    """Yield calls of edge sizes, with counts: the smallest, the widest, and buffers just full."""
    for format, kernel in itertools.product(Format, (1, 3)):
        for height, width in ((1, 1), (1, 5), (5, 1), (2, 2)):
            yield random_call(
                rng, config, name=f"{format.name} {kernel}x{kernel} {height}x{width}",
                format=format, kernel=kernel, height=height, width=width, channels=(1,), outputs=1)
    tile, vector = config.tile_channels, config.vector
    for format in (Format.A4U, Format.A4S, Format.MX8):
        for channels in ((tile,), (tile + 1,), (tile - vector, 2 * vector), (1, 1), (vector + 1,),
                         (1, vector - 1)):
            yield random_call(rng, config, name=f"{format.name} channels {channels}",
                              format=format, channels=channels, height=3, width=4,
                              outputs=_pick(rng, vector - 1, vector, vector + 1))
        for outputs in (config.tile_outputs, config.tile_outputs + 1):
            yield random_call(rng, config, name=f"{format.name} outputs {outputs}",
                              format=format, outputs=outputs, channels=(vector,), height=2,
                              width=3)
    for channels in (vector, BLOCK, BLOCK + 1):
        yield random_call(rng, config, name=f"IN16 channels {channels}", format=Format.IN16,
                          channels=(channels,), height=4, width=4)
    for what in ("records", "entries", "words of codes", "dense weights", "sparse weights",
                 "partial sums"):
        side = {"entries": config.sparse_pes, "sparse weights": config.sparse_pes,
                "words of codes": config.dense_pes, "dense weights": config.dense_pes}
        if side.get(what, 1):
            yield _call(rng, config, _fullest(config, what), f"most {what}", int(rng.integers(4)))
