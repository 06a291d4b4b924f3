"""Scaled groups and rounded scales of float tensors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import granularity
from tests.strategies import few, many


@few
@given(st.tuples(*[st.integers(1, 9)] * 4), st.sampled_from([None, 1, 4, 16]),
       st.sampled_from([None, 1, 2, 3]))
def test_split_names_every_element_once(shape, group, block):
    n, channels, height, width = shape
    x = torch.arange(1, math.prod(shape) + 1).reshape(shape)
    grouped = granularity.split(x, group, block)
    assert torch.equal(granularity.join(grouped, shape), x)
    assert int(grouped.sum()) == int(x.sum())
    # Elements that share the indices of a group are those of its channels and pixels.
    group, rows, columns = group or channels, block or height, block or width
    for image in range(n):
        for g in range(grouped.shape[1]):
            for i in range(grouped.shape[3]):
                for j in range(grouped.shape[5]):
                    part = x[image, g * group:(g + 1) * group, i * rows:(i + 1) * rows,
                             j * columns:(j + 1) * columns]
                    members = grouped[image, g, :, i, :, j, :]
                    assert sorted(members[members > 0].tolist()) == part.flatten().tolist()


@many
@given(st.floats(2**-126, 2**126, width=32))
def test_power_of_two_scale_is_rounded_up(scale):
    rounded = granularity.round_scale(torch.tensor([scale]), "power_of_two").item()
    assert math.frexp(rounded)[0] == 0.5
    assert rounded / 2 < scale <= rounded


def test_scales():
    scale = torch.tensor([0, 2**-11, 0.3, 1, 1.0625, 500])
    assert granularity.round_scale(scale, "fp32").equal(scale)
    assert granularity.round_scale(scale, "e4m3").tolist() == [0, 0, 0.3125, 1, 1, 448]
    assert granularity.round_scale(scale, "power_of_two").tolist() == [0, 2**-11, 0.5, 1, 2, 512]
    assert granularity.round_scale(scale * 3, "int4").tolist() == [0, 0, 1, 3, 3, 15]


def test_exponents_are_exact():
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    powers = granularity.power_of_two(exponents)
    assert powers.tolist() == [2.0 ** e for e in range(-126, 128)]
    assert granularity.floor_log2(powers).equal(exponents)
    below = torch.nextafter(powers, torch.tensor(0.0))
    assert granularity.floor_log2(below).equal(exponents - 1)
    assert granularity.floor_log2(torch.tensor([0.0])).tolist() == [-1]


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda x: granularity.split(x[0]), ValueError,
     r"^x must be of shape \(N, C, H, W\), not \(2, 3, 4\)$"),
    (lambda x: granularity.split(x, 0), ValueError, r"^group must be in 1\.\.32768, not 0$"),
    (lambda x: granularity.split(x, 2.0), TypeError, r"^group must be an integer, not 2\.0$"),
    (lambda x: granularity.split(x, None, 0), ValueError, r"^block must be in 1\.\.32768, not 0$"),
    (lambda x: granularity.round_scale(x, "e5m2"), ValueError,
     r"^scale must be one of e4m3, power_of_two, int4, fp32, not 'e5m2'$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(1, 2, 3, 4))
