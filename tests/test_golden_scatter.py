"""golden/scatter.py: nine shifted planes of 1x1 weights are the 3x3 convolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import convolution, mxint8, policy, requantizer
from golden.requantizer import Format
from golden.scatter import add_planes, plane_bias, plane_scales, plane_weights
from tests import naive, networks
from tests.strategies import few, integers, seeds, shapes


@few
@given(seeds, st.integers(1, 3), shapes)
def test_against_loops(rng, channels, shape):
    planes = integers(rng, -32768, 32767, 9 * channels, *shape)
    assert add_planes(planes).tolist() == naive.add_planes(planes.tolist())


def test_order_and_border():
    """Plane t C + k goes against the direction of tap t; what leaves the image is gone."""
    planes = torch.zeros(18, 3, 4, dtype=torch.int64)
    planes[2 * 2 + 1, 1, 2] = 5                     # tap (0, 2) of output 1, from pixel (1, 2)
    planes[2 * 2 + 1, 2, 0] = 7                     # which would give to pixel (3, -1)
    found = add_planes(planes)
    assert found[1, 2, 1] == 5 and found.sum() == 5
    assert add_planes(torch.ones(1, 9, 2, 3)).tolist() == [[[[4, 6, 4], [4, 6, 4]]]]


def test_sums_need_more_than_16_bits():
    planes = torch.full((9, 3, 3), -32768)
    assert add_planes(planes)[0, 1, 1] == -9 * 32768


def test_bias_is_in_the_centre():
    """Every output pixel has it, at the border too."""
    bias = torch.tensor([[3.0, 4.0]])
    planes = plane_bias(bias)[0, :, None, None].expand(-1, 2, 5)
    assert planes.shape[0] == 18
    assert add_planes(planes).equal(bias[0, :, None, None].expand(-1, 2, 5))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 3)])
def test_is_the_3x3_convolution(channels, shape):
    """In exact integers, of the same codes and scales: only their places change."""
    rng = torch.Generator().manual_seed(channels)
    image = torch.randint(-32768, 32768, (40, *shape), generator=rng)
    image[32:] >>= 3                                 # so that both blocks have their own scales
    ones = torch.full((64,), 1 << 7)
    quantized = requantizer.requantize([image], ones * (torch.arange(64) < 40), ones * 0, 0, False,
                                       Format.MX8, 16)
    codes, scales, _ = mxint8.quantize_weights(torch.randn(channels, 64, 3, 3, generator=rng))
    assert len(scales.unique()) > 1 and len(quantized.scales.unique()) > 1
    planes = convolution.accumulate(quantized, plane_weights(codes), plane_scales(scales))
    assert planes.shape == (9 * channels, *shape)
    assert add_planes(planes).equal(convolution.accumulate(quantized, codes, scales))


@pytest.mark.parametrize(("name", "scattered"), [
    ("relu", {"last"}), ("residual", {"last"}), ("diffusers", {"last"}), ("adm", {"last"}),
    ("skip", set())])
def test_scattered_layers(name, scattered):
    """Not in NCSN++ with skips, whose last layer adds to an image."""
    assert policy.scattered(networks.make(name).unet) == scattered


def test_many_outputs_are_not_scattered():
    unet = networks.make("relu").unet
    unet.last.cout = 4
    assert policy.scattered(unet) == set()
