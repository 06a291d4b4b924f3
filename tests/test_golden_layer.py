"""Whole layer calls against loops, and lists from one evaluation to the next."""

import dataclasses

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import detector, layer, requantizer
from golden.requantizer import Format
from tests import naive
from tests.strategies import few, formats, integers, seeds, shapes


def example(rng, channels, outputs, shape, kernel, format, vector, residual=True):
    """A LayerCall with random operands over their whole ranges."""
    format = Format[format]
    _, slots = requantizer.slots(channels, vector, format.mx)
    count = 2 * slots if format == Format.IN16 else slots
    groups = count // 32 if format.mx else 1
    limit, top = (127, 15) if format.mx else (7, 126)
    passed = layer.Requantization(
        [integers(rng, -32768, 32767, n, *shape) for n in channels],
        integers(rng, -32768, 32767, slots), integers(rng, -2**20, 2**20, slots),
        int(rng.randint(6, 16)), format == Format.A4U, format)
    convolution = layer.Convolution(
        integers(rng, -limit, limit, outputs, count, kernel, kernel),
        torch.from_numpy(rng.randint(0, top + 1, (outputs, kernel ** 2, groups))), kernel,
        integers(rng, -32768, 32767, outputs), integers(rng, -2**31, 2**31 - 1, outputs),
        int(rng.randint(32)), int(rng.randint(32)),
        integers(rng, -32768, 32767, outputs, *shape) if residual else None,
        int(rng.randint(65536)))
    costs = detector.Costs(*(int(cost) for cost in rng.randint(0, 100, 4)))
    return layer.LayerCall("example", 0, passed, convolution, 0, int(rng.randint(65537)), 1,
                           costs if rng.randint(2) else None, int(rng.randint(4)), 32)


@few
@given(seeds, st.integers(1, 40), st.integers(0, 20), st.integers(1, 4), shapes,
       st.sampled_from([1, 3]), formats, st.sampled_from([16, 32]), st.booleans())
def test_against_loops(rng, first, second, outputs, shape, kernel, format, vector, residual):
    channels = [first] if format == "IN16" or not second else [first, second]
    call = example(rng, channels, outputs, shape, kernel, format, vector, residual)
    r, c = call.requantization, call.convolution
    expected = naive.requantize([s.tolist() for s in r.segments], r.gain.tolist(),
                                r.offset.tolist(), r.shift, r.relu, r.format, vector)
    counts = torch.from_numpy(rng.randint(0, shape[0] * shape[1] + 1, len(expected["valid"])))
    got = layer.run(call, counts, vector)
    assert got.codes.codes.tolist() == expected["codes"]
    assert got.zero_counts.tolist() == expected["zero_counts"]
    assert got.saturations == expected["saturations"]
    if r.format.mx:
        lists = naive.natural_lists(expected["valid"])
    else:
        costs = None if call.balance is None else tuple(vars(call.balance).values())
        lists = naive.channel_lists(
            counts.tolist(), expected["valid"], shape[0] * shape[1], call.threshold, costs, vector,
            call.tile_channels, call.dense_limit, True, True)
    for name in ("first", "size", "low", "high", "cut"):
        assert [getattr(item, name) for item in got.lists] == lists[name], name
    assert torch.cat([item.positions(vector) for item in got.lists]).tolist() == lists["slots"]
    acc = naive.accumulate(expected["codes"], expected["scales"], r.format,
                           c.weight_codes.tolist(), c.weight_scales.tolist(), kernel)
    assert got.accumulator.tolist() == acc
    assert got.output.tolist() == naive.epilogue(
        acc, c.align_shift, c.multiplier.tolist(), c.scale_shift, c.bias.tolist(),
        None if c.residual is None else c.residual.tolist(), c.residual_multiplier)


@few
@given(seeds, formats)
def test_lists_never_change_the_output(rng, format):
    call = example(rng, [10], 3, (3, 4), 3, format, 16)
    call = dataclasses.replace(call, dense_limit=255)
    none = torch.zeros(16, dtype=torch.bool)
    runs = [layer.run(call, none, 16), layer.run(call, ~none, 16),
            layer.run(call, none.long(), 16), layer.run(call, none.long(), 16, sparse=False),
            layer.run(call, none.long(), 16, dense=False)]
    for other in runs[1:]:
        assert runs[0].output.equal(other.output)
        assert runs[0].accumulator.equal(other.accumulator)
    if format in ("A4U", "A4S"):
        assert [runs[n].lists[0].low for n in (0, 1, 3, 4)] == [10, 0, 10, 0]


def test_labels_follow_the_evaluation_before():
    """Counts of an evaluation take effect at the next one, where the interval divides it."""
    kept = detector.Detector(32)
    x = torch.ones(16, 2, 2, dtype=torch.int64)
    gain = torch.full((16,), 1 << 10)
    table = torch.zeros(16, dtype=torch.int64)
    convolution = layer.Convolution(
        torch.ones(1, 16, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 56), 1,
        torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 0, 0)
    seen = []
    for evaluation in range(5):
        x = x.clone()
        x[evaluation] = -1          # one channel more is zero after ReLU
        passed = layer.Requantization([x], gain, table, 0, True, Format.A4U)
        call = layer.LayerCall("zeros", evaluation, passed, convolution, 16, 65536, 2)
        got = layer.run(call, kept.read(call.detector_base, 16), 16)
        kept.update(call.detector_base, got.zero_counts, evaluation, call.interval)
        seen.append(16 - got.lists[0].low)
    assert seen == [0, 1, 1, 3, 3]


def test_without_threshold_all_is_dense():
    call = example(numpy.random.RandomState(5), [16], 2, (2, 2), 1, "A4U", 16)
    call = dataclasses.replace(call, threshold=detector.NEVER, balance=None, dense_limit=255)
    assert layer.run(call, torch.full((16,), 4), 16).lists[0].low == 16


def test_balance_takes_the_place_of_the_threshold():
    call = example(numpy.random.RandomState(5), [64], 2, (2, 2), 1, "A4U", 16)
    call = dataclasses.replace(call, threshold=0, dense_limit=255, tile_channels=64,
                               balance=detector.Costs(3, 1, 0, 0))
    item, = layer.run(call, (torch.arange(64) >= 32) * 4, 16).lists
    # By pixel 3 a word; 16 non-zeros beyond the first word, none beyond the second.
    assert (item.low, item.high, item.cut) == (16, 32, 256 * (16 - 3) // (3 + 16))
    assert item.slots.equal(torch.arange(64))
    item, = layer.run(call, torch.zeros(64).long(), 16).lists
    assert (item.low, item.high, item.cut) == (48, 64, 256 * (16 - 9) // (3 + 16))
    item, = layer.run(dataclasses.replace(call, balance=None), torch.zeros(64).long(), 16).lists
    assert (item.low, item.high) == (0, 0)


def test_kernel_must_be_that_of_the_weights():
    call = example(numpy.random.RandomState(5), [16], 2, (2, 2), 1, "A4U", 16)
    call = dataclasses.replace(call, convolution=dataclasses.replace(call.convolution, kernel=3))
    with pytest.raises(ValueError, match=r"^kernel must be that of weight_codes, 1, not 3$"):
        layer.run(call, torch.zeros(16, dtype=torch.int64), 16)
