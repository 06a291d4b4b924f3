"""A4: both forms against slow ones, and the bound between them."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import a4, e4m3
from tests import naive
from tests.strategies import edges, few, integers, many, seeds, shapes

signs = st.booleans()
scales = st.sampled_from([1.0, 2.0**-7, 0.0123, 3.7])


def float_tensor(rng, *shape):
    """Float32 tensor whose channels have different magnitudes, with zeros."""
    x = torch.from_numpy(rng.standard_normal(shape)).float()
    size = torch.from_numpy(rng.randint(-14, 5, (1, shape[1], 1, 1)))
    x = x * 2.0 ** size
    return x * torch.from_numpy(rng.random_sample(shape) > 0.3)


@many
@given(st.lists(edges(-2**23 + 1, 2**23 - 1), min_size=1), signs)
def test_quantize_one_pixel(pixel, signed):
    pixel = pixel if signed else [abs(y) for y in pixel]
    codes, scale = a4.quantize(torch.tensor(pixel)[:, None, None], signed)
    expected = naive.quantize_pixel(pixel, [], naive.A4S if signed else naive.A4U)
    assert (codes.flatten().tolist(), scale.flatten().tolist()) == expected[:2]


@pytest.mark.parametrize("signed", [False, True])
def test_ties_of_elements(signed):
    """Odd multiples of half a step go to the even code, for every scale but zero."""
    n = a4.largest(signed)
    for scale in range(1, 127):
        mantissa, exponent = (int(part) for part in e4m3.decode(torch.tensor(scale)))
        step = mantissa << exponent
        halves = torch.arange(2 * n + 1)
        y = torch.cat([halves * (step // 2), torch.tensor([n * step])])[:, None, None]
        codes, scales = a4.quantize(y, signed)
        assert scales.item() == scale
        assert codes.flatten().tolist() == [round(Fraction(int(h), 2)) for h in halves] + [n]
        if signed:
            assert a4.quantize(-y, True)[0].equal(-codes)


@pytest.mark.parametrize("signed", [False, True])
def test_extremes(signed):
    n, top = a4.largest(signed), (1 << 23) - 1
    y = torch.tensor([[0, 1, n, n + 1, top], [0, 0, 1, 1, 458752]])[:, None]
    codes, scales = a4.quantize(y, signed)
    # amax / n of at most one unit is below half the smallest step: everything is zero.
    assert scales.tolist() == [[[0, 0, 0, 1, 0x7E]]]
    assert codes.tolist() == [[[0, 0, 0, (n + 1) // 2, n]], [[0, 0, 0, 0, 1]]]


@few
@given(seeds, shapes, signs)
def test_implementation_equals_definition(rng, shape, signed):
    """With the same y and a power of two sA both forms agree on every bit."""
    y = integers(rng, -2**23 + 1, 2**23 - 1, 37, *shape)
    y = y if signed else y.clamp(min=0)
    codes, scale = a4.quantize(y, signed)
    mantissa, exponent = e4m3.decode(scale)
    for fixed in (1.0, 2.0**-9):
        represented = (codes * (mantissa << exponent)).float() * (fixed / 1024)
        defined = a4.fake_quantize(y[None].float() * (fixed / 1024), signed, fixed)[0]
        assert torch.equal(represented, defined)


@few
@given(seeds, st.integers(1, 40), shapes, signs, scales,
       st.sampled_from([None, 1, 16, 32]), st.sampled_from([None, 1, 2]))
def test_definition_against_scalars(rng, channels, shape, signed, fixed, group, block):
    x = float_tensor(rng, 1, channels, *shape)
    got = a4.fake_quantize(x, signed, fixed, group=group, block=block)
    n, height, width = a4.largest(signed), *shape
    group, rows, columns = group or channels, block or height, block or width
    for c in range(0, channels, group):
        for i in range(0, height, rows):
            for j in range(0, width, columns):
                part = (0, slice(c, c + group), slice(i, i + rows), slice(j, j + columns))
                members = x[part].flatten().tolist()
                codes, step = naive.float_codes(members, n, not signed, fixed)
                expected = torch.tensor(codes).float() * torch.tensor(float(step))
                assert torch.equal(got[part].flatten(), expected)


@few
@given(seeds, signs, st.sampled_from(["e4m3", "power_of_two", "fp32"]))
def test_error_is_half_a_step(rng, signed, scale):
    """Elements that do not clip are at most half a step away; zeros stay zeros."""
    x = float_tensor(rng, 2, 20, 3, 3)
    x = x if signed else x.relu()
    n = a4.largest(signed)
    fixed = a4.static_scale(x.abs().max().item(), signed)
    got = a4.fake_quantize(x, signed, fixed, scale=scale)
    amax = x.abs().amax(1, keepdim=True)
    # E4M3 is at most 1/16 off where it is normal, and half of 2^-9 where it is not.
    step = {"e4m3": torch.maximum(amax / n * 17 / 16, amax / n + fixed * 2**-10),
            "power_of_two": 2 * amax / n, "fp32": amax / n}[scale]
    clip = (amax / 15.9).clamp(min=fixed * n * 2**-10) if scale == "e4m3" else 0 * amax
    assert ((got - x).abs() <= torch.maximum(step / 2, clip) * 1.0001).all()
    assert (got[x == 0] == 0).all()
    if not signed:
        assert torch.equal(a4.fake_quantize(x - (x == 0) * 1.0, False, fixed, scale=scale), got)


def test_scales_of_their_own_for_each_image():
    x = torch.rand(3, 8, 4, 4)
    fixed = torch.tensor([0.5, 1.0, 0.01])
    together = a4.fake_quantize(x, False, fixed.reshape(3, 1, 1, 1))
    apart = [a4.fake_quantize(x[n:n + 1], False, fixed[n].item()) for n in range(3)]
    assert torch.equal(together, torch.cat(apart))


def test_static_steps():
    x = torch.tensor([[0.1, 0.25, 9.0], [-1.0, 0.75, 1.25]])[None, :, None]
    got = a4.fake_quantize_static(x, False, torch.tensor([0.1, 0.5]))
    assert torch.allclose(got, torch.tensor([[0.1, 0.2, 1.5], [0, 1.0, 1.0]])[None, :, None])
    got = a4.fake_quantize_static(x, True, 0.5)
    assert got.tolist() == [[[[0, 0, 3.5]], [[-1, 1, 1]]]]
    assert a4.fake_quantize_static(x, True, 0.0).abs().max() == 0


def test_static_scale():
    for signed in (False, True):
        scale = a4.static_scale(12.5, signed)
        assert scale == torch.tensor(12.5).div(a4.largest(signed) * 448).item()
        assert a4.static_scale(0.0, signed) == 1.0


def test_dtype_is_kept():
    x = torch.rand(1, 4, 2, 2).to(torch.bfloat16)
    assert a4.fake_quantize(x, False, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda x: a4.largest(1), TypeError, r"^signed must be a bool, not 1$"),
    (lambda x: a4.fake_quantize(x, False, 0.0), ValueError,
     r"^tensor_scale must be positive, not 0\.0$"),
    (lambda x: a4.fake_quantize(x / 0, False, 1.0), ValueError, r"^x must be finite, not inf$"),
    (lambda x: a4.fake_quantize(x.long(), False, 1.0), TypeError,
     r"^x must be a tensor of floats, not torch\.int64$"),
    (lambda x: a4.fake_quantize(x, False, 1.0, scale="int8"), ValueError,
     r"^scale must be one of e4m3, power_of_two, int4, fp32, not 'int8'$"),
    (lambda x: a4.fake_quantize_static(x, False, [-1.0]), ValueError,
     r"^steps must be at least 0, not \[-1\.0\]$"),
    (lambda x: a4.quantize(-x[0].long(), False), ValueError,
     r"^y must be in 0\.\.1099511627776, not -1$"),
    (lambda x: a4.quantize(x.long(), False), ValueError,
     r"^y must be of shape \(any, any, any\), not \(1, 2, 3, 4\)$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(1, 2, 3, 4))
