"""Labels, their order, and the counts that outlive an evaluation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import detector
from tests import naive
from tests.strategies import few, many, seeds


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


@few
@given(seeds, st.sampled_from([16, 32]), st.integers(1, 4), st.booleans())
def test_order(rng, vector, words, natural):
    valid = rng.random_sample(words * vector) < 0.8
    labels = rng.random_sample(words * vector) < rng.random_sample()
    lists = detector.permutation(torch.tensor(labels), torch.tensor(valid), vector, natural)
    got = detector.positions(*lists, vector)
    expected, dense, sparse = naive.positions(labels, valid, vector, natural)
    assert got.tolist() == [0xFFFF if slot is None else slot for slot in expected]
    assert [len(part) for part in lists] == [dense, sparse]
    assert len(got) % vector == 0


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
    (lambda: detector.permutation(COUNTS, FLAGS, 16), TypeError,
     r"^labels must be a tensor of bool, not tensor\("),
    (lambda: detector.permutation(FLAGS[:4], FLAGS, 16), ValueError,
     r"^labels must be of shape \(16\), not \(4,\)$"),
    (lambda: detector.permutation(FLAGS, FLAGS, 32), ValueError,
     r"^valid must be a multiple of 32 slots, not 16$"),
    (lambda: detector.permutation(FLAGS, FLAGS, 8), ValueError,
     r"^vector must be 16 or 32, not 8$"),
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
