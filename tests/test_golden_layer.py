"""Whole layer calls against loops, and labels from one evaluation to the next."""

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
    mx = format in (Format.MX8, Format.IN16)
    _, slots = requantizer.slots(channels, vector)
    count = 2 * vector if format == Format.IN16 else slots
    groups = {Format.MX8: -(-slots // 32), Format.IN16: 2}.get(format, 1)
    limit, top = (127, 15) if mx else (7, 126)
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
    return layer.LayerCall("example", 0, passed, convolution, 0, int(rng.randint(65537)), 1)


@few
@given(seeds, st.integers(1, 20), st.integers(0, 20), st.integers(1, 4), shapes,
       st.sampled_from([1, 3]), formats, st.sampled_from([16, 32]), st.booleans())
def test_against_loops(rng, first, second, outputs, shape, kernel, format, vector, residual):
    channels = [min(first, vector)] if format == "IN16" or not second else [first, second]
    call = example(rng, channels, outputs, shape, kernel, format, vector, residual)
    r, c = call.requantization, call.convolution
    expected = naive.requantize([s.tolist() for s in r.segments], r.gain.tolist(),
                                r.offset.tolist(), r.shift, r.relu, r.format, vector)
    counts = torch.from_numpy(rng.randint(0, shape[0] * shape[1] + 1, len(expected["valid"])))
    got = layer.run(call, counts, vector)
    assert got.codes.codes.tolist() == expected["codes"]
    assert got.zero_counts.tolist() == expected["zero_counts"]
    assert got.saturations == expected["saturations"]
    labels = [r.format in (naive.A4U, naive.A4S) and ok
              and count * 65536 >= call.threshold * shape[0] * shape[1]
              for count, ok in zip(counts.tolist(), expected["valid"])]
    assert got.labels.tolist() == labels
    acc = naive.accumulate(expected["codes"], expected["scales"], r.format,
                           c.weight_codes.tolist(), c.weight_scales.tolist(), kernel, vector)
    assert got.accumulator.tolist() == acc
    assert got.output.tolist() == naive.epilogue(
        acc, c.align_shift, c.multiplier.tolist(), c.scale_shift, c.bias.tolist(),
        None if c.residual is None else c.residual.tolist(), c.residual_multiplier)


@few
@given(seeds, formats)
def test_labels_never_change_the_output(rng, format):
    call = example(rng, [10], 3, (3, 4), 3, format, 16)
    slots = 32 if format == "IN16" else 16
    none = torch.zeros(slots, dtype=torch.bool)
    one = layer.run(call, none, 16)
    other = layer.run(call, torch.ones_like(none), 16)
    assert one.output.equal(other.output) and one.accumulator.equal(other.accumulator)
    assert not one.labels.any()
    assert int(other.labels.sum()) == (10 if format in ("A4U", "A4S") else 0)


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
        seen.append(int(got.labels.sum()))
    assert seen == [0, 1, 1, 3, 3]


def test_without_threshold_all_is_dense():
    call = example(numpy.random.RandomState(5), [16], 2, (2, 2), 1, "A4U", 16)
    call = dataclasses.replace(call, threshold=detector.NEVER)
    assert not layer.run(call, torch.full((16,), 4), 16).labels.any()


def test_kernel_must_be_that_of_the_weights():
    call = example(numpy.random.RandomState(5), [16], 2, (2, 2), 1, "A4U", 16)
    call = dataclasses.replace(call, convolution=dataclasses.replace(call.convolution, kernel=3))
    with pytest.raises(ValueError, match=r"^kernel must be that of weight_codes, 1, not 3$"):
        layer.run(call, torch.zeros(16, dtype=torch.int64), 16)
