"""golden/gather.py: a gathered image under 1x1 weights is the 3x3 convolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import convolution, mxint8, requantizer
from golden.gather import gather, gather_weights, scatter_weights
from golden.requantizer import Format
from tests import naive
from tests.strategies import few, integers, seeds, shapes


@few
@given(seeds, st.integers(1, 5), shapes)
def test_against_loops(rng, channels, shape):
    image = integers(rng, -32768, 32767, channels, *shape)
    assert gather(image).tolist() == naive.gather(image.tolist())


def test_order_and_border():
    """Tap after tap, in it channel after channel; a tap outside the image is 0."""
    image = torch.arange(1, 13).reshape(2, 2, 3)
    assert gather(image)[:, 0, 0].tolist() == [0] * 8 + [1, 7, 2, 8, 0, 0, 4, 10, 5, 11]
    assert gather(torch.full((2, 1, 1, 1), 5)).flatten().tolist() == ([0] * 4 + [5] + [0] * 4) * 2


@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_come_back(kernel):
    w = torch.arange(2 * 3 * kernel ** 2).reshape(2, 3, kernel, kernel)
    gathered = gather_weights(w)
    assert gathered.shape == (2, 3 * kernel ** 2, 1, 1)
    assert gathered[1, 1, 0, 0] == w[1, 1, 0, 0] and gathered[1, -1, 0, 0] == w[1, 2, -1, -1]
    assert scatter_weights(gathered, kernel).equal(w)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 3)])
def test_is_the_3x3_convolution(channels, shape):
    """In exact integers, where eight bits hold the weights: beside taps apart, and beside loops."""
    generator = torch.Generator().manual_seed(channels)
    image = torch.randint(-32639, 32640, (channels, *shape), generator=generator)
    w = torch.randint(-127, 128, (2, channels, 3, 3), generator=generator)
    w[0, 0, 0, 0] = 127
    right = [[[sum(int(w[k, c, ky, kx]) * int(image[c, y + ky - 1, x + kx - 1])
                   for c in range(channels) for ky in range(3) for kx in range(3)
                   if 0 <= y + ky - 1 < shape[0] and 0 <= x + kx - 1 < shape[1])
               for x in range(shape[1])] for y in range(shape[0])] for k in range(2)]

    def sums(image, codes, scales, unit):
        quantized = requantizer.requantize([image], None, None, 0, False, Format.IN16, 16)
        return (convolution.accumulate(quantized, codes, scales) * unit).tolist()

    assert sums(gather(image), *mxint8.quantize_input_weights(w.float())) == right
    codes, scales, unit = mxint8.quantize_weights(w.float())
    halves = mxint8.blocks(codes, dim=1).flatten(1, 2).repeat(1, 2, 1, 1)
    assert sums(image, halves, scales.repeat(1, 1, 2), unit) == right
