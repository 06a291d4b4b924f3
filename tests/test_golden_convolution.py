"""Exact sums and work counters against loops over products, and independence of order."""

import dataclasses
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import convolution, detector
from golden.requantizer import Codes, Format
from tests import naive
from tests.strategies import few, formats, integers, seeds, shapes


def operands(rng, slots, outputs, shape, kernel, format, vector):
    """Random Codes, weight codes and weight scales over the whole range of every field."""
    format = Format[format]
    mx = format in (Format.MX8, Format.IN16)
    low, high = {Format.A4U: (0, 15), Format.A4S: (-7, 7), Format.MX8: (-127, 127),
                 Format.IN16: (-128, 127)}[format]
    groups = -(-slots // convolution.group_size(format, slots, vector))
    codes = integers(rng, low, high, slots, *shape)
    codes *= torch.from_numpy(rng.random_sample(codes.shape) < rng.random_sample())
    valid = torch.from_numpy(rng.random_sample(slots) < 0.8)
    codes[~valid] = 0
    top = 15 if mx else 126
    scales = torch.from_numpy(rng.randint(0, top + 1, (groups, *shape)))
    limit = 127 if mx else 7
    weights = integers(rng, -limit, limit, outputs, slots, kernel, kernel)
    weight_scales = torch.from_numpy(rng.randint(0, top + 1, (outputs, kernel ** 2, groups)))
    return (Codes(codes, scales, (codes == 0).sum((1, 2)), 0, valid, format, vector), weights,
            weight_scales)


cases = given(seeds, st.integers(1, 3), st.integers(1, 4), shapes, st.sampled_from([1, 3]),
              formats, st.sampled_from([16, 32]))


@few
@cases
def test_against_loops(rng, words, outputs, shape, kernel, format, vector):
    words = 2 if format == "IN16" else words
    codes, weights, scales = operands(rng, words * vector, outputs, shape, kernel, format, vector)
    got = convolution.accumulate(codes, weights, scales, vector)
    expected = naive.accumulate(codes.codes.tolist(), codes.scales.tolist(), codes.format,
                                weights.tolist(), scales.tolist(), kernel, vector)
    assert got.tolist() == expected


@few
@cases
def test_work_against_loops(rng, words, outputs, shape, kernel, format, vector):
    codes, _, _ = operands(rng, words * vector, 1, shape, 1, format, vector)
    labels = torch.from_numpy(rng.random_sample(words * vector) < rng.random_sample())
    if format in ("MX8", "IN16"):
        labels[:] = False
    outputs = outputs * int(rng.randint(1, 60))
    for dense_lanes, sparse_lanes in ((8, 64), (4, 32), (1, 1)):
        got = convolution.work(codes, labels, kernel, outputs, dense_lanes, sparse_lanes)
        assert got == naive.work(codes.codes.tolist(), codes.format, labels.tolist(),
                                 codes.valid.tolist(), kernel, outputs, dense_lanes, sparse_lanes,
                                 vector)


def groups_apart(codes):
    """A mask of slots for each group that shares scales."""
    slots = len(codes.codes)
    size = convolution.group_size(codes.format, slots, codes.vector)
    return [(torch.arange(slots) // size == group)[:, None, None]
            for group in range(-(-slots // size))]


@few
@cases
def test_order_of_channels_and_sides(rng, words, outputs, shape, kernel, format, vector):
    """Any permutation of channels inside a group, and any split in two sides, has the same bits."""
    words = 2 if format == "IN16" else words
    codes, weights, scales = operands(rng, words * vector, outputs, shape, kernel, format, vector)
    whole = convolution.accumulate(codes, weights, scales, vector)

    key = torch.from_numpy(rng.random_sample(words * vector))
    size = convolution.group_size(codes.format, words * vector, vector)
    order = torch.argsort(torch.arange(words * vector) // size + key)
    moved = dataclasses.replace(codes, codes=codes.codes[order])
    assert convolution.accumulate(moved, weights[:, order], scales, vector).equal(whole)

    def part(mask):
        kept = dataclasses.replace(codes, codes=codes.codes * mask)
        return convolution.accumulate(kept, weights, scales, vector)

    side = torch.from_numpy(rng.random_sample((words * vector, 1, 1)) < 0.5)
    assert (part(side) + part(~side)).equal(whole)
    sides = torch.from_numpy(rng.random_sample(codes.codes.shape) < 0.5)
    assert (part(sides) + part(~sides)).equal(whole)
    assert sum(part(mask) for mask in groups_apart(codes)).equal(whole)


@few
@given(seeds, st.integers(2, 6), st.integers(1, 5), st.sampled_from([1, 3]), formats)
def test_tiles(rng, height, width, kernel, format):
    """Sums of a tile of rows with its halo are those of the whole image."""
    codes, weights, scales = operands(rng, 32, 3, (height, width), kernel, format, 16)
    whole = convolution.accumulate(codes, weights, scales, 16)
    cut = int(rng.randint(1, height))
    halo = min(height, cut + kernel // 2)
    top = dataclasses.replace(codes, codes=codes.codes[:, :halo], scales=codes.scales[:, :halo])
    assert convolution.accumulate(top, weights, scales, 16)[:, :cut].equal(whole[:, :cut])


@pytest.mark.parametrize("format", ["A4U", "A4S", "MX8", "IN16"])
def test_largest_sums(format):
    """Every operand at its end, 1024 slots: the sums are exact, far from 63 bits."""
    slots = 64 if format == "IN16" else 1024
    largest = {"A4U": 15, "A4S": -7, "MX8": -127, "IN16": -128}[format]
    mx = format in ("MX8", "IN16")
    groups = slots // {"MX8": 32, "IN16": 32}.get(format, slots)
    scale, factor = (15, 1 << 30) if mx else (0x7E, (14 << 14) ** 2)
    codes = Codes(torch.full((slots, 3, 3), largest), torch.full((groups, 3, 3), scale),
                  torch.zeros(slots, dtype=torch.int64), 0, torch.ones(slots, dtype=torch.bool),
                  Format[format], 32)
    weight = 127 if mx else -7
    got = convolution.accumulate(codes, torch.full((1, slots, 3, 3), weight),
                                 torch.full((1, 9, groups), scale), 32)
    taps = [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
    expected = slots * largest * weight * factor
    assert got.tolist() == [[[count * expected for count in row] for row in taps]]
    assert abs(9 * expected) < 1 << 58


def test_speed():
    """A 3x3 convolution of 64 by 64 channels at 32x32 takes well under a second."""
    rng = torch.Generator().manual_seed(4)
    codes = Codes(torch.randint(0, 16, (64, 32, 32), generator=rng),
                  torch.randint(0, 127, (1, 32, 32), generator=rng),
                  torch.zeros(64, dtype=torch.int64), 0, torch.ones(64, dtype=torch.bool),
                  Format.A4U, 16)
    weights = torch.randint(-7, 8, (64, 64, 3, 3), generator=rng)
    scales = torch.randint(0, 127, (64, 9, 1), generator=rng)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        convolution.accumulate(codes, weights, scales, 16)
        seconds.append(time.perf_counter() - start)
    # 0.01 s alone on one core; the margin is for busy machines.
    assert min(seconds) < 1.0


def make(**changes):
    """Codes of 32 slots, 2 by 2 pixels, all ones, with `changes`."""
    fields = {"codes": torch.ones(32, 2, 2).long(), "scales": torch.ones(1, 2, 2).long(),
              "zero_counts": torch.zeros(32).long(), "saturations": 0,
              "valid": torch.ones(32, dtype=torch.bool), "format": Format.A4U, "vector": 16}
    return Codes(**{**fields, **changes})


WEIGHTS, SCALES = torch.ones(4, 32, 3, 3).long(), torch.ones(4, 9, 1).long()
NONE = torch.zeros(32, dtype=torch.bool)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: convolution.accumulate(make(), WEIGHTS, SCALES, 32), ValueError,
     r"^vector must be that of codes, 16, not 32$"),
    (lambda: convolution.accumulate(make(), WEIGHTS * 8, SCALES, 16), ValueError,
     r"^weight_codes must be in -7\.\.7, not 8$"),
    (lambda: convolution.accumulate(make(format=Format.MX8), WEIGHTS * -128, SCALES, 16),
     ValueError, r"^weight_codes must be in -127\.\.127, not -128$"),
    (lambda: convolution.accumulate(make(), WEIGHTS[:, :16], SCALES, 16), ValueError,
     r"^weight_codes must be of shape \(any, 32, any, any\), not \(4, 16, 3, 3\)$"),
    (lambda: convolution.accumulate(make(), WEIGHTS[..., :2], SCALES, 16), ValueError,
     r"^weight_codes must be of kernel 1x1 or 3x3, not 3x2$"),
    (lambda: convolution.accumulate(make(), WEIGHTS, SCALES * 127, 16), ValueError,
     r"^weight_scales must be in 0\.\.126, not 127$"),
    (lambda: convolution.accumulate(make(format=Format.MX8), WEIGHTS, SCALES * 16, 16),
     ValueError, r"^weight_scales must be in 0\.\.15, not 16$"),
    (lambda: convolution.accumulate(make(), WEIGHTS, SCALES[:, :1], 16), ValueError,
     r"^weight_scales must be of shape \(4, 9, 1\), not \(4, 1, 1\)$"),
    (lambda: convolution.accumulate(make(codes=torch.ones(32784, 1, 1).long()), WEIGHTS, SCALES,
                                    16), ValueError,
     r"^codes must have at most 32768 slots, not 32784$"),
    (lambda: convolution.work(make(), NONE, 2, 4, 8, 64), ValueError,
     r"^kernel must be 1 or 3, not 2$"),
    (lambda: convolution.work(make(), NONE, 3, 4, 0, 64), ValueError,
     r"^dense_lanes must be in 1\.\.65536, not 0$"),
    (lambda: convolution.work(make(format=Format.MX8), ~NONE, 3, 4, 8, 64), ValueError,
     r"^labels must be False for MX8, not \[True, "),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_work_follows_labels():
    """Sixteen slots moved to the sparse side cost their non-zeros instead of a word."""
    codes = make()
    half = torch.arange(32) < 16
    assert convolution.work(codes, NONE, 1, 8, 8, 64) == (8, 0)
    assert convolution.work(codes, half, 1, 8, 8, 64) == (4, 64)
    dense, sparse = detector.permutation(half, codes.valid, 16)
    assert (dense.tolist(), sparse.tolist()) == ([*range(16, 32)], [*range(16)])
