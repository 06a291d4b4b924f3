"""Labels, lists and their split, and the counts that outlive an evaluation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import detector
from tests import naive
from tests.strategies import many, seeds


@many
@given(st.integers(1, 65535), st.integers(0, 131071), st.data())
def test_labels(pixels, threshold, data):
    counts = data.draw(st.lists(st.one_of(
        st.integers(0, pixels), st.just(min(pixels, threshold * pixels // 65536)),
        st.just(min(pixels, threshold * pixels // 65536 + 1))), min_size=1))
    valid = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    expected = [ok and naive.Fraction(count, pixels) >= naive.Fraction(threshold, 65536)
                for count, ok in zip(counts, valid)]
    got = detector.labels(torch.tensor(counts), pixels, threshold, torch.tensor(valid))
    assert got.tolist() == expected


def test_thresholds_at_the_ends():
    counts, valid = torch.tensor([0, 255, 256, 256]), torch.tensor([True, True, True, False])
    assert detector.labels(counts, 256, 0, valid).tolist() == [True, True, True, False]
    assert detector.labels(counts, 256, 65536, valid).tolist() == [False, False, True, False]
    assert not detector.labels(counts, 256, 65537, valid).any()
    assert not detector.labels(counts, 256, detector.NEVER, valid).any()


@st.composite
def tensors(draw):
    """Counts and valid of (slots,), pixels, V and tile_channels."""
    vector = draw(st.sampled_from([16, 32]))
    slots = vector * draw(st.integers(1, 12))
    rng = draw(seeds)
    pixels = draw(st.one_of(st.integers(1, 4096), st.sampled_from([63, 64, 65, 127, 128, 65535])))
    counts = (rng.beta(draw(st.sampled_from([0.3, 2])), 1, slots) * (pixels + 1)).astype(int)
    counts[rng.random_sample(slots) < 0.05] = 65535
    valid = rng.random_sample(slots) < draw(st.sampled_from([0.5, 0.9, 1]))
    return (torch.from_numpy(counts), torch.from_numpy(valid), pixels, vector,
            draw(st.sampled_from([32, 64, 96, 256])))


sides = st.sampled_from([(True, True)] * 4 + [(True, False), (False, True)])
limits = st.one_of(st.just(255), st.integers(0, 8))
# Costs of a real core, and any others.
all_costs = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 60), st.integers(0, 200)),
    st.tuples(*[st.integers(0, 65535)] * 4))


def plain(lists, vector):
    """ChannelLists as `naive.channel_lists` gives them."""
    return {**{name: [getattr(item, name) for item in lists]
               for name in ("first", "size", "low", "high", "cut")},
            "count": [len(item.slots) for item in lists],
            "slots": [slot for item in lists for slot in item.positions(vector).tolist()]}


@many
@given(tensors(), st.integers(0, 65537), limits, sides)
def test_threshold_lists_against_loops(tensor, threshold, limit, sides):
    counts, valid, pixels, vector, tile_channels = tensor
    labels = detector.labels(counts, pixels, threshold, valid)
    got = detector.threshold_lists(labels, valid, vector, tile_channels, limit, *sides)
    assert plain(got, vector) == naive.channel_lists(
        counts.tolist(), valid.tolist(), pixels, threshold, None, vector, tile_channels, limit,
        *sides)


@many
@given(tensors(), all_costs, limits, sides)
def test_balanced_lists_against_loops(tensor, costs, limit, sides):
    counts, valid, pixels, vector, tile_channels = tensor
    got = detector.balanced_lists(counts, pixels, detector.Costs(*costs), valid, vector,
                                  tile_channels, limit, *sides)
    assert plain(got, vector) == naive.channel_lists(
        counts.tolist(), valid.tolist(), pixels, 0, costs, vector, tile_channels, limit, *sides)


@many
@given(tensors(), all_costs, limits, sides)
def test_split(tensor, costs, limit, sides):
    """Every channel is in its tile's list once; the dense side has as many words as balance."""
    counts, valid, pixels, vector, tile_channels = tensor
    lists = detector.balanced_lists(counts, pixels, detector.Costs(*costs), valid, vector,
                                    tile_channels, limit, *sides)
    listed = torch.cat([item.first + item.slots for item in lists])
    assert listed.sort().values.equal(torch.arange(len(valid))[valid])
    for item in lists:
        assert item.slots.numel() == 0 or 0 <= item.slots.min() <= item.slots.max() < item.size
        n, low, high, cut = len(item.slots), item.low, item.high, item.cut
        assert 0 <= low <= high <= n and 0 <= cut < 256 and (cut > 0) == (high > low)
        assert all(end == n or end % vector == 0 for end in (low, high))
        if sides != (True, True):
            assert low == high == n * sides[0]
            continue
        assert high <= limit * vector
        left = pixels - counts[item.first + item.slots].clamp(max=pixels)
        buckets = (pixels - left) // 2 ** max(0, pixels.bit_length() - 6)
        assert (buckets.diff() >= 0).all() and (not n or buckets.max() < 64)

        def dense(words):
            return words * costs[0] * pixels

        def sparse(words, left=left):
            rest = left[words * vector:]
            return max(int(rest.sum()) * costs[1] + pixels * costs[2],
                       pixels * costs[3]) if len(rest) else 0

        words = -(-low // vector)
        assert dense(words) <= sparse(words)
        if high > low:      # one word more would be too much, but by less than the word
            assert dense(words + 1) > sparse(words + 1)
            ends = [dense(words) + (dense(words + 1) - dense(words)) * part / 256
                    <= sparse(words) - (sparse(words) - sparse(words + 1)) * part / 256
                    for part in (cut, cut + 1)]
            assert ends == [True, False]


def test_high_pixels_are_even():
    """Of any 256 pixels in succession `cut` are high, of n about n cut / 256; never the first."""
    for cut in (0, 1, 3, 100, 128, 254, 255):
        item = detector.ChannelList(0, 32, torch.arange(32), 16, 32, cut)
        high = (item.split(1000) == 32).long()
        assert high.tolist() == [int(naive.is_high(pixel, cut)) for pixel in range(1000)]
        assert item.split(1000).unique().tolist() == ([16, 32] if cut else [16])
        assert high.unfold(0, 256, 1).sum(1).eq(cut).all() and not high[0]
        sums = high.cumsum(0)
        assert (sums - torch.arange(1, 1001) * cut / 256).abs().max() <= 1


def test_zeros_move_the_split():
    """Emptier channels leave the sparse side time for more of them."""
    valid = torch.ones(64, dtype=torch.bool)
    costs = detector.Costs(word=16, nonzero=1, group=0, floor=0)
    found = []
    for zeros in (0, 25, 50, 75, 100):
        item, = detector.balanced_lists(torch.full((64,), zeros), 100, costs, valid, 16, 64)
        found.append(item.low + item.cut / 16)
        assert item.slots.equal(torch.arange(64))
    # Dense time of x words 16 x, sparse time (64 - 16 x) (1 - zeros / 100), both by pixel.
    expected = [64 * (1 - part) / (2 - part) for part in (0, 0.25, 0.5, 0.75, 1)]
    assert [abs(a - b) < 1 / 16 for a, b in zip(found, expected)] == [True] * 5


def test_natural_lists():
    valid = torch.arange(64) < 40
    first, second = detector.natural_lists(valid)
    assert first.slots.equal(torch.arange(32)) and (first.first, second.first) == (0, 32)
    assert second.slots.tolist() == [*range(8)] + [detector.NO_CHANNEL] * 24
    for item in (first, second):
        assert (item.size, item.low, item.high, item.cut) == (32, 32, 32, 0)
        assert item.positions(16).equal(item.slots)


def test_gather():
    """Codes in order of position, zeros in the padding and where there is no channel."""
    codes = torch.arange(96)[:, None, None].expand(96, 2, 3) + 100
    item = detector.ChannelList(32, 32, torch.tensor([5, 0, 31]), 3, 3, 0)
    got = item.gather(codes, 16)
    assert got.shape == (16, 2, 3)
    assert got[:, 1, 2].tolist() == [137, 132, 163] + [0] * 13
    natural = detector.natural_lists(torch.arange(32) < 2)[0].gather(codes, 16)
    assert natural[:, 0, 0].tolist() == [100, 101] + [0] * 30


def test_detector_updates_every_interval():
    kept = detector.Detector(64)
    first = torch.arange(16)
    kept.load(8, first)
    assert kept.read(8, 16).equal(first) and int(kept.counts.sum()) == 120
    kept.update(8, first + 1, 2, 3)
    assert kept.read(8, 16).equal(first)
    kept.update(8, first + 1, 3, 3)
    assert kept.read(8, 16).equal(first + 1)
    kept.update(8, first + 2, 0, 3)
    assert kept.read(8, 16).equal(first + 2)
    kept.read(8, 16).zero_()
    assert kept.read(8, 16).equal(first + 2)


FLAGS = torch.ones(16, dtype=torch.bool)
COUNTS = torch.zeros(16, dtype=torch.int64)
COSTS = detector.Costs(1, 1, 1, 1)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: detector.labels(COUNTS - 1, 4, 0, FLAGS), ValueError,
     r"^counts must be in 0\.\.65535, not -1$"),
    (lambda: detector.labels(COUNTS, 65536, 0, FLAGS), ValueError,
     r"^pixels must be in 1\.\.65535, not 65536$"),
    (lambda: detector.labels(COUNTS, 4, 131072, FLAGS), ValueError,
     r"^threshold must be in 0\.\.131071, not 131072$"),
    (lambda: detector.labels(COUNTS, 4, 0, COUNTS), TypeError,
     r"^valid must be a tensor of bool, not tensor\("),
    (lambda: detector.labels(COUNTS[:4], 4, 0, FLAGS), ValueError,
     r"^counts must be of shape \(16\), not \(4,\)$"),
    (lambda: detector.Costs(1, 2, 65536, 0), ValueError,
     r"^group must be in 0\.\.65535, not 65536$"),
    (lambda: detector.threshold_lists(COUNTS, FLAGS, 16, 32), TypeError,
     r"^labels must be a tensor of bool, not tensor\("),
    (lambda: detector.threshold_lists(FLAGS[:4], FLAGS, 16, 32), ValueError,
     r"^labels must be of shape \(16\), not \(4,\)$"),
    (lambda: detector.threshold_lists(FLAGS, FLAGS, 32, 32), ValueError,
     r"^valid must be a multiple of 32 slots, not 16$"),
    (lambda: detector.threshold_lists(FLAGS, FLAGS, 8, 32), ValueError,
     r"^vector must be 16 or 32, not 8$"),
    (lambda: detector.threshold_lists(FLAGS, FLAGS, 16, 48), ValueError,
     r"^tile_channels must be a multiple of 32, not 48$"),
    (lambda: detector.threshold_lists(FLAGS, FLAGS, 16, 288), ValueError,
     r"^tile_channels must be in 32\.\.256, not 288$"),
    (lambda: detector.threshold_lists(FLAGS, FLAGS, 16, 32, 256), ValueError,
     r"^dense_limit must be in 0\.\.255, not 256$"),
    (lambda: detector.threshold_lists(FLAGS, FLAGS, 16, 32, dense=False, sparse=False), ValueError,
     r"^sparse must be True where dense is False, not False$"),
    (lambda: detector.balanced_lists(COUNTS, 0, COSTS, FLAGS, 16, 32), ValueError,
     r"^pixels must be in 1\.\.65535, not 0$"),
    (lambda: detector.balanced_lists(COUNTS, 4, (1, 1, 1, 1), FLAGS, 16, 32), TypeError,
     r"^costs must be of Costs, not \(1, 1, 1, 1\)$"),
    (lambda: detector.natural_lists(FLAGS), ValueError,
     r"^valid must be a multiple of 32 slots, not 16$"),
    (lambda: detector.Detector(0), ValueError, r"^entries must be in 1\.\.65536, not 0$"),
    (lambda: detector.Detector(20).load(8, COUNTS), ValueError,
     r"^base must leave room for 16 entries of 20, not 8$"),
    (lambda: detector.Detector(20).read(20, 1), ValueError, r"^base must be in 0\.\.19, not 20$"),
    (lambda: detector.Detector(20).update(0, COUNTS, -1, 1), ValueError,
     r"^evaluation must be in 0\.\.65535, not -1$"),
    (lambda: detector.Detector(20).update(0, COUNTS, 0, 0), ValueError,
     r"^interval must be in 1\.\.65535, not 0$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()
