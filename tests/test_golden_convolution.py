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
    low, high = {Format.A4U: (0, 15), Format.A4S: (-7, 7), Format.MX8: (-127, 127),
                 Format.IN16: (-128, 127)}[format]
    groups = -(-slots // convolution.group_size(format, slots))
    codes = integers(rng, low, high, slots, *shape)
    codes *= torch.from_numpy(rng.random_sample(codes.shape) < rng.random_sample())
    valid = torch.from_numpy(rng.random_sample(slots) < 0.8)
    codes[~valid] = 0
    top = 15 if format.mx else 126
    scales = torch.from_numpy(rng.randint(0, top + 1, (groups, *shape)))
    limit = 127 if format.mx else 7
    weights = integers(rng, -limit, limit, outputs, slots, kernel, kernel)
    weight_scales = torch.from_numpy(rng.randint(0, top + 1, (outputs, kernel ** 2, groups)))
    return (Codes(codes, scales, (codes == 0).sum((1, 2)), 0, valid, format, vector), weights,
            weight_scales)


def slots_of(words, vector, format):
    """Slots of a tensor of `words` words; blocks of 32 where the format has them, high and low."""
    if not Format[format].mx:
        return words * vector
    return -(-words * vector // 32) * 32 * (2 if format == "IN16" else 1)


cases = given(seeds, st.integers(1, 3), st.integers(1, 4), shapes, st.sampled_from([1, 3]),
              formats, st.sampled_from([16, 32]))


@few
@cases
def test_against_loops(rng, words, outputs, shape, kernel, format, vector):
    slots = slots_of(words, vector, format)
    codes, weights, scales = operands(rng, slots, outputs, shape, kernel, format, vector)
    got = convolution.accumulate(codes, weights, scales)
    expected = naive.accumulate(codes.codes.tolist(), codes.scales.tolist(), codes.format,
                                weights.tolist(), scales.tolist(), kernel)
    assert got.tolist() == expected


def random_lists(rng, codes):
    """ChannelLists with random splits, and the same as of `naive.channel_lists`."""
    pixels = codes.codes[0].numel()
    if codes.format.mx:
        lists = detector.natural_lists(codes.valid)
    else:
        counts = torch.from_numpy(rng.randint(0, pixels + 1, len(codes.codes)))
        costs = detector.Costs(*(int(cost) for cost in rng.randint(0, 200, 4)))
        sides = ((True, True), (True, True), (True, False), (False, True))[rng.randint(4)]
        lists = detector.balanced_lists(counts, pixels, costs, codes.valid, codes.vector, 32,
                                        int(rng.randint(4)), *sides)
    return lists, {
        "first": [item.first for item in lists], "count": [len(item.slots) for item in lists],
        **{name: [getattr(item, name) for item in lists] for name in ("low", "high", "cut")},
        "slots": torch.cat([item.positions(codes.vector) for item in lists]).tolist()}


@few
@cases
def test_work_against_loops(rng, words, outputs, shape, kernel, format, vector):
    """Of the whole image, of tiles of it, and of single tiles of channels."""
    slots = slots_of(words, vector, format)
    codes, _, _ = operands(rng, slots, 1, shape, 1, format, vector)
    lists, plain = random_lists(rng, codes)
    outputs = outputs * int(rng.randint(1, 60))
    share = int(rng.randint(5))
    row, column = (int(rng.randint(size)) for size in shape)
    tile = [(row, shape[0] - row, column, shape[1] - column)]
    if row:
        tile.append((0, row, 0, column + 1))
    whole = [(0, shape[0], 0, shape[1])]
    for lanes, runs in (((8, 32), whole), ((4, 16), tile), ((1, 1), tile)):
        got = convolution.work(codes, lists, kernel, outputs, *lanes, share, runs)
        assert got == naive.work(codes.codes.tolist(), codes.format, plain, kernel, outputs,
                                 *lanes, vector, share, runs)
        apart = [convolution.work(codes, [item], kernel, outputs, *lanes, share, runs)
                 for item in lists]
        assert got == tuple(map(sum, zip(*apart)))
    assert convolution.work(codes, lists, kernel, 8, 8, 8, share) == convolution.work(
        codes, lists, kernel, 8, 8, 8, share, whole)


@few
@cases
def test_loads(rng, words, outputs, shape, kernel, format, vector):
    """Non-zeros that may be either side's, and those that are the sparse side's for certain."""
    codes, _, _ = operands(rng, slots_of(words, vector, format), 1, shape, 1, format, vector)
    for item in random_lists(rng, codes)[0]:
        got = convolution.loads(codes, item)
        tile = codes.codes[item.first:item.first + item.size]
        if codes.format.mx:
            parts = tile % 16 != 0, tile // 16 != 0
        else:
            there = [[slot in part for slot in range(len(tile))]
                     for part in (item.slots[item.low:item.high], item.slots[item.high:])]
            parts = [(tile != 0) & torch.tensor(part)[:, None, None] for part in there]
        assert got.equal(torch.stack([part.sum(0) for part in parts]))


def groups_apart(codes):
    """A mask of slots for each group that shares scales."""
    slots = len(codes.codes)
    size = convolution.group_size(codes.format, slots)
    return [(torch.arange(slots) // size == group)[:, None, None]
            for group in range(-(-slots // size))]


@few
@cases
def test_order_of_channels_and_sides(rng, words, outputs, shape, kernel, format, vector):
    """Any permutation of channels inside a group, and any split in two sides, has the same bits."""
    slots = slots_of(words, vector, format)
    codes, weights, scales = operands(rng, slots, outputs, shape, kernel, format, vector)
    whole = convolution.accumulate(codes, weights, scales)

    key = torch.from_numpy(rng.random_sample(slots))
    size = convolution.group_size(codes.format, slots)
    order = torch.argsort(torch.arange(slots) // size + key)
    moved = dataclasses.replace(codes, codes=codes.codes[order])
    assert convolution.accumulate(moved, weights[:, order], scales).equal(whole)

    def part(mask):
        kept = dataclasses.replace(codes, codes=codes.codes * mask)
        return convolution.accumulate(kept, weights, scales)

    side = torch.from_numpy(rng.random_sample((slots, 1, 1)) < 0.5)
    assert (part(side) + part(~side)).equal(whole)
    sides = torch.from_numpy(rng.random_sample(codes.codes.shape) < 0.5)
    assert (part(sides) + part(~sides)).equal(whole)
    assert sum(part(mask) for mask in groups_apart(codes)).equal(whole)


@few
@given(seeds, st.integers(2, 6), st.integers(1, 5), st.sampled_from([1, 3]), formats)
def test_tiles(rng, height, width, kernel, format):
    """Sums of a tile of rows with its halo are those of the whole image."""
    codes, weights, scales = operands(rng, 32, 3, (height, width), kernel, format, 16)
    whole = convolution.accumulate(codes, weights, scales)
    cut = int(rng.randint(1, height))
    halo = min(height, cut + kernel // 2)
    top = dataclasses.replace(codes, codes=codes.codes[:, :halo], scales=codes.scales[:, :halo])
    assert convolution.accumulate(top, weights, scales)[:, :cut].equal(whole[:, :cut])


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
                                 torch.full((1, 9, groups), scale))
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
        convolution.accumulate(codes, weights, scales)
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
LISTS = detector.natural_lists(torch.ones(32, dtype=torch.bool))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: convolution.accumulate(make(), WEIGHTS * 8, SCALES), ValueError,
     r"^weight_codes must be in -7\.\.7, not 8$"),
    (lambda: convolution.accumulate(make(format=Format.MX8), WEIGHTS * -128, SCALES),
     ValueError, r"^weight_codes must be in -127\.\.127, not -128$"),
    (lambda: convolution.accumulate(make(), WEIGHTS[:, :16], SCALES), ValueError,
     r"^weight_codes must be of shape \(any, 32, any, any\), not \(4, 16, 3, 3\)$"),
    (lambda: convolution.accumulate(make(), WEIGHTS[..., :2], SCALES), ValueError,
     r"^weight_codes must be of kernel 1x1 or 3x3, not 3x2$"),
    (lambda: convolution.accumulate(make(), WEIGHTS, SCALES * 127), ValueError,
     r"^weight_scales must be in 0\.\.126, not 127$"),
    (lambda: convolution.accumulate(make(format=Format.MX8), WEIGHTS, SCALES * 16),
     ValueError, r"^weight_scales must be in 0\.\.15, not 16$"),
    (lambda: convolution.accumulate(make(), WEIGHTS, SCALES[:, :1]), ValueError,
     r"^weight_scales must be of shape \(4, 9, 1\), not \(4, 1, 1\)$"),
    (lambda: convolution.accumulate(make(codes=torch.ones(32784, 1, 1).long()), WEIGHTS, SCALES),
     ValueError, r"^codes must have at most 32768 slots, not 32784$"),
    (lambda: convolution.work(make(), LISTS, 2, 4, 8, 64), ValueError,
     r"^kernel must be 1 or 3, not 2$"),
    (lambda: convolution.work(make(), LISTS, 3, 4, 0, 64), ValueError,
     r"^dense_lanes must be in 1\.\.65536, not 0$"),
    (lambda: convolution.work(make(), LISTS, 3, 4, 8, 64, 256), ValueError,
     r"^share must be in 0\.\.255, not 256$"),
    (lambda: convolution.work(make(), LISTS, 3, 4, 8, 64, 1, [(0, 2, 1, 2)]), ValueError,
     r"^runs must lie in the image of 2 by 2 pixels, not \(0, 2, 1, 2\)$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_work_follows_the_split():
    """Sixteen slots moved to the sparse side cost their non-zeros instead of a word."""
    codes = make()
    half = torch.arange(32) < 16

    def work(labels, **limit):
        lists = detector.threshold_lists(labels, codes.valid, 16, 32, **limit)
        return convolution.work(codes, lists, 1, 8, 8, 64)

    assert work(half & ~half) == (8, 0)
    assert work(half) == (4, 64)
    assert work(half & ~half, dense_limit=1) == (4, 64)
    # Eighteen positions of the dense side take two words; the other fourteen are multiplied.
    assert work(torch.arange(32) < 14) == (8, 56)
    assert work(half, sparse=False) == (8, 0) and work(half, dense=False) == (0, 128)


def test_split_starts_again_with_each_run():
    """Half of the pixels have a word more on the dense side, each second one of a run."""
    codes = make()
    item = detector.ChannelList(0, 32, torch.arange(32), 16, 32, 128)
    assert convolution.work(codes, [item], 1, 8, 8, 64) == (4 + 2, 2 * 16)
    single = [(row, 1, column, 1) for row in range(2) for column in range(2)]
    assert convolution.work(codes, [item], 1, 8, 8, 64, runs=single) == (4, 4 * 16)
    # 3x3: all four input pixels of an output pixel follow its split.
    assert convolution.work(codes, [item], 3, 8, 8, 64) == (4 * (4 + 2), 4 * 2 * 16)


def test_share_of_pixels():
    """One of three output pixels of a run is the dense side's; both planes count."""
    codes = make(codes=torch.full((32, 2, 2), 17), format=Format.MX8)
    assert convolution.work(codes, LISTS, 1, 8, 8, 64) == (4 * 4 * 2, 0)
    assert convolution.work(codes, LISTS, 1, 8, 8, 64, share=0) == (0, 4 * 2 * 64)
    assert convolution.work(codes, LISTS, 1, 8, 8, 64, share=3) == (8, 3 * 2 * 64)
    rows = [(0, 1, 0, 2), (1, 1, 0, 2)]
    assert convolution.work(codes, LISTS, 1, 8, 8, 64, 3, rows) == (0, 4 * 2 * 64)
    codes = make(codes=torch.full((32, 2, 2), 16), format=Format.MX8)
    assert convolution.work(codes, LISTS, 1, 8, 8, 64, share=0) == (0, 2 * 2 * 64)
