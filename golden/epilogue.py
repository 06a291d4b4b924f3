"""Epilogue of a convolution: five named steps from exact sums to 16-bit results.

Every step is per output channel where it has a table; tensors are (Cout, H, W). Results are 16-bit
fixed point with an exponent for each tensor.
"""

import torch

from golden import checks
from golden.rounding import round_half_even, saturate

__all__ = ["result_exponent", "fake_quantize", "align", "scale", "add_bias", "add_residual",
           "narrow", "epilogue"]

FRACTION = 16              # bits below the result's last place that `scale` leaves
RESIDUAL_FRACTION = 14     # bits of residual_multiplier below one


def result_exponent(amax):
    """Least exponent whose 32767 units of 2^exponent reach the magnitude `amax`; 0 if it is 0."""
    if not amax > 0:
        return 0
    exponent = int(torch.frexp(torch.tensor(amax / 32767, dtype=torch.float64)).exponent) - 1
    return exponent + (32767 * 2.0 ** exponent < amax)


def fake_quantize(x, exponent):
    """The float definition of a stored result: `x` rounded to 16-bit multiples of 2^`exponent`."""
    checks.integer("exponent", exponent, -120, 100)
    codes = (checks.floats("x", x).float() * 2.0 ** -exponent).round_().clamp_(-32768, 32767)
    return (codes * 2.0 ** exponent).to(x.dtype)


def align(acc, align_shift):
    """saturate(round_half_even(acc, align_shift), 32)."""
    checks.integer("align_shift", align_shift, 0, 31)
    return saturate(round_half_even(acc, align_shift), 32)


def scale(a, multiplier, scale_shift):
    """round_half_even(a * multiplier, scale_shift): the result in units of 2^-16.

    Parameters
    ----------
    a : (Cout, H, W), 32 bits
    multiplier : (Cout,), 16 bits
    scale_shift : 0..31
    """
    a = checks.integers("a", a, -1 << 31, (1 << 31) - 1, (None, None, None))
    multiplier = checks.integers("multiplier", multiplier, -1 << 15, (1 << 15) - 1, (len(a),))
    checks.integer("scale_shift", scale_shift, 0, 31)
    return round_half_even(a * multiplier[:, None, None], scale_shift)


def add_bias(t, bias):
    """Sum t + bias; `bias` is (Cout,) of 32 bits in units of 2^-16 of the result."""
    t = checks.integers("t", t, -1 << 47, 1 << 47, (None, None, None))
    bias = checks.integers("bias", bias, -1 << 31, (1 << 31) - 1, (len(t),))
    return t + bias[:, None, None]


def add_residual(u, residual, residual_multiplier):
    """Sum u + ((residual * residual_multiplier) << 2).

    Parameters
    ----------
    u : (Cout, H, W), in units of 2^-16 of the result
    residual : (Cout, H, W), 16 bits
    residual_multiplier : 0..65535 in units of 2^-14: one residual LSB over one result LSB
    """
    u = checks.integers("u", u, -1 << 48, 1 << 48, (None, None, None))
    residual = checks.integers("residual", residual, -1 << 15, (1 << 15) - 1, tuple(u.shape))
    checks.integer("residual_multiplier", residual_multiplier, 0, 65535)
    return u + ((residual * residual_multiplier) << (FRACTION - RESIDUAL_FRACTION))


def narrow(u):
    """saturate(round_half_even(u, 16), 16): the stored result."""
    return saturate(round_half_even(u, FRACTION), 16)


def epilogue(acc, align_shift, multiplier, scale_shift, bias, residual=None,
             residual_multiplier=0):
    """All steps in order; without `residual` that step is left out."""
    u = add_bias(scale(align(acc, align_shift), multiplier, scale_shift), bias)
    if residual is not None:
        u = add_residual(u, residual, residual_multiplier)
    return narrow(u)
