"""What the property tests of golden share: settings, and integer tensors with many edge values."""

import numpy
import torch
from hypothesis import settings
from hypothesis import strategies as st

__all__ = ["few", "many", "seeds", "integers", "edges", "shapes", "formats"]

# A failing example prints the blob that reproduces it; nothing is stored between runs.
few = settings(max_examples=25, deadline=None, database=None, print_blob=True)
many = settings(max_examples=200, deadline=None, database=None, print_blob=True)

seeds = st.integers(0, 2**32 - 1).map(numpy.random.RandomState)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))
formats = st.sampled_from(["A4U", "A4S", "MX8", "IN16"])


def edges(low, high):
    """Ends of a range, powers of two and their neighbours inside it, and anything else in it."""
    near = {low, high, 0, *(sign * (1 << n) + d for n in range(48) for sign in (-1, 1)
                            for d in (-1, 0, 1))}
    return st.one_of(st.sampled_from(sorted(x for x in near if low <= x <= high)),
                     st.integers(low, high))


def integers(rng, low, high, *shape):
    """Tensor of integers in low..high: of one size each row, some rows zero, ends included."""
    size = rng.randint(0, max(high, -low).bit_length() + 1, shape[:1] + (1,) * (len(shape) - 1))
    values = rng.randint(low, high + 1, shape) >> size
    values = numpy.where(rng.random_sample(shape) < 0.05, rng.choice([low, high, 0], shape), values)
    return torch.from_numpy(values)
