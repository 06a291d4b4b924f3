"""The epilogue's steps at their extremes, against loops, and the bound to real arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import epilogue
from tests import naive
from tests.strategies import edges, few, integers, many, seeds, shapes

sums = edges(-2**58, 2**58)
i16, u16, i32, shifts = edges(-2**15, 2**15 - 1), edges(0, 65535), edges(-2**31, 2**31 - 1), edges(
    0, 31)


def one(x):
    return torch.tensor([[[x]]])


@many
@given(sums, shifts, i16, shifts, i32, i16, u16)
def test_steps(acc, align_shift, multiplier, scale_shift, bias, residual, residual_multiplier):
    a = naive.clip(naive.round_half_even(acc, align_shift), -2**31, 2**31 - 1)
    assert epilogue.align(one(acc), align_shift).item() == a
    t = naive.round_half_even(a * multiplier, scale_shift)
    assert epilogue.scale(one(a), torch.tensor([multiplier]), scale_shift).item() == t
    u = t + bias
    assert epilogue.add_bias(one(t), torch.tensor([bias])).item() == u
    v = u + residual * residual_multiplier * 4
    assert epilogue.add_residual(one(u), one(residual), residual_multiplier).item() == v
    for value in (u, v):
        expected = naive.clip(naive.round_half_even(value, 16), -2**15, 2**15 - 1)
        assert epilogue.narrow(one(value)).item() == expected


@few
@given(seeds, st.integers(1, 9), shapes, st.booleans())
def test_against_loops(rng, outputs, shape, with_residual):
    acc = integers(rng, -2**58, 2**58, outputs, *shape)
    multiplier = integers(rng, -2**15, 2**15 - 1, outputs)
    bias = integers(rng, -2**31, 2**31 - 1, outputs)
    residual = integers(rng, -2**15, 2**15 - 1, outputs, *shape) if with_residual else None
    shift, scale, gain = (int(rng.randint(limit)) for limit in (32, 32, 65536))
    got = epilogue.epilogue(acc, shift, multiplier, scale, bias, residual, gain)
    assert got.tolist() == naive.epilogue(
        acc.tolist(), shift, multiplier.tolist(), scale, bias.tolist(),
        None if residual is None else residual.tolist(), gain)


def test_extremes():
    """Every step at both ends of its range; nothing wraps."""
    low, high = -2**31, 2**31 - 1
    assert epilogue.align(one(2**62), 0).item() == high
    assert epilogue.align(one(-2**62), 31).item() == low
    assert epilogue.align(one(2**62 - 1), 31).item() == high       # 2^31 after rounding
    assert epilogue.align(one(high), 0).item() == high
    assert epilogue.scale(one(low), torch.tensor([-2**15]), 0).item() == 2**46
    assert epilogue.scale(one(low), torch.tensor([-2**15]), 31).item() == 2**15
    assert epilogue.add_bias(one(2**46), torch.tensor([high])).item() == 2**46 + high
    assert epilogue.add_residual(one(0), one(-2**15), 65535).item() == -2**17 * 65535
    assert epilogue.narrow(one(2**47)).item() == 32767
    assert epilogue.narrow(one(-2**47)).item() == -32768
    # Ties at the last place, and the largest value that does not saturate.
    assert [epilogue.narrow(one(x)).item() for x in (2**15, 3 * 2**15, -2**15, 32767 * 2**16)] == [
        0, 2, 0, 32767]


def test_without_residual_the_multiplier_does_not_matter():
    acc = one(1 << 20)
    arguments = (acc, 0, torch.tensor([1 << 14]), 0, torch.tensor([5]))
    assert epilogue.epilogue(*arguments).equal(
        epilogue.epilogue(*arguments, residual_multiplier=7))


@few
@given(seeds, st.integers(1, 9), shapes)
def test_bound_to_real_arithmetic(rng, outputs, shape):
    """Out = acc * f + b + r * g in units of the result, from integers that approximate f, b and g.

    With f = (multiplier + at most 1/2) * 2^-(align_shift + scale_shift + 16), the difference before
    the result's own rounding is at most, in units of 2^-16 of the result,
    |a| 2^-scale_shift / 2 (multiplier) + |multiplier| 2^-scale_shift / 2 (align) + 1/2 (scale)
    + 1/2 (bias) + 2 |r| (residual_multiplier); then narrow adds 1/2 of the result.
    """
    bits = int(rng.randint(20, 56))
    acc = integers(rng, -2**bits, 2**bits, outputs, *shape)
    residual = integers(rng, -2**15, 2**15 - 1, outputs, *shape)
    align_shift = max(0, bits - 30)
    top = float(rng.uniform(0.5, 2)) * 2.0 ** (14 - bits)
    f = [Fraction(top * float(rng.uniform(0.1, 1))) for _ in range(outputs)]
    b = [Fraction(float(rng.uniform(-5000, 5000))) for _ in range(outputs)]
    g = Fraction(float(rng.uniform(0, 3.9)))

    scale_shift = 31
    while max(f) * 2 ** (align_shift + scale_shift + 16) > 32767:
        scale_shift -= 1
    multiplier = [round(x * 2 ** (align_shift + scale_shift + 16)) for x in f]
    bias = [round(x * 2**16) for x in b]
    got = epilogue.epilogue(acc, align_shift, torch.tensor(multiplier), scale_shift,
                            torch.tensor(bias), residual, round(g * 2**14))
    half = Fraction(1, 2)
    for k in range(outputs):
        for total, r, out in zip(*(x[k].flatten().tolist() for x in (acc, residual, got))):
            real = naive.clip(total * f[k] + b[k] + r * g, -2**15, 2**15 - 1)
            a = Fraction(total, 2**align_shift)
            fine = ((abs(a) + multiplier[k]) * half / 2**scale_shift + 1 + 2 * abs(r))
            assert abs(out - real) <= half + fine / 2**16


@many
@given(st.floats(-1e6, 1e6, width=32), st.integers(-20, 10))
def test_definition_of_results(value, exponent):
    got = epilogue.fake_quantize(torch.tensor([value]), exponent).item()
    code = naive.clip(round(Fraction(value) / Fraction(2) ** exponent), -2**15, 2**15 - 1)
    assert Fraction(got) == code * Fraction(2) ** exponent


@pytest.mark.parametrize("amax", [32767.0, 32768.0, 1.0, 0.99, 1e-9, 3e12])
def test_result_exponent(amax):
    exponent = epilogue.result_exponent(amax)
    assert 32767 * 2.0 ** exponent >= amax > 32767 * 2.0 ** (exponent - 1)
    assert epilogue.result_exponent(0.0) == 0


ONE = one(1)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: epilogue.align(ONE, 32), ValueError, r"^align_shift must be in 0\.\.31, not 32$"),
    (lambda: epilogue.align(ONE, 1.0), TypeError, r"^align_shift must be an integer, not 1\.0$"),
    (lambda: epilogue.align(ONE.float(), 1), TypeError,
     r"^x must be a tensor of integers, not torch\.float32$"),
    (lambda: epilogue.scale(ONE << 31, torch.tensor([1]), 0), ValueError,
     r"^a must be in -2147483648\.\.2147483647, not 2147483648$"),
    (lambda: epilogue.scale(ONE, torch.tensor([1 << 15]), 0), ValueError,
     r"^multiplier must be in -32768\.\.32767, not 32768$"),
    (lambda: epilogue.scale(ONE, torch.tensor([1, 1]), 0), ValueError,
     r"^multiplier must be of shape \(1\), not \(2,\)$"),
    (lambda: epilogue.scale(ONE, torch.tensor([1]), -1), ValueError,
     r"^scale_shift must be in 0\.\.31, not -1$"),
    (lambda: epilogue.add_bias(ONE, torch.tensor([1 << 31])), ValueError,
     r"^bias must be in -2147483648\.\.2147483647, not 2147483648$"),
    (lambda: epilogue.add_residual(ONE, ONE << 15, 1), ValueError,
     r"^residual must be in -32768\.\.32767, not 32768$"),
    (lambda: epilogue.add_residual(ONE, ONE[0], 1), ValueError,
     r"^residual must be of shape \(1, 1, 1\), not \(1, 1\)$"),
    (lambda: epilogue.add_residual(ONE, ONE, 65536), ValueError,
     r"^residual_multiplier must be in 0\.\.65535, not 65536$"),
    (lambda: epilogue.fake_quantize(ONE.float(), 101), ValueError,
     r"^exponent must be in -120\.\.100, not 101$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()
