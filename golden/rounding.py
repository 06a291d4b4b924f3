"""The two ways in which a number is ever narrowed: rounding to nearest even, and saturation."""

import torch

from golden import checks

__all__ = ["round_half_even", "round_half_even_quotient", "saturate"]


def round_half_even(x, n):
    """`x` / 2^n rounded to the nearest integer, ties to the even one.

    Parameters
    ----------
    x : tensor of integers
    n : an int, or a tensor of integers that broadcasts against `x`, in 0..62
    """
    x = checks.integers("x", x)
    if isinstance(n, torch.Tensor):
        n = checks.integers("n", n, 0, 62)
    else:
        n = torch.tensor(checks.integer("n", n, 0, 62), device=x.device)
    quotient = x >> n
    twice = (x - (quotient << n)) << 1     # of the remainder; below 2^63
    unit = torch.ones_like(n) << n
    return quotient + ((twice > unit) | ((twice == unit) & (quotient & 1 == 1)))


def round_half_even_quotient(x, divisor):
    """`x` / `divisor` rounded to the nearest integer, ties to the even one.

    Parameters
    ----------
    x : tensor of integers in 0..2^62-1
    divisor : tensor of integers in 1..2^62-1 that broadcasts against `x`
    """
    limit = (1 << 62) - 1
    x, divisor = checks.integers("x", x, 0, limit), checks.integers("divisor", divisor, 1, limit)
    quotient = x // divisor
    twice = (x - quotient * divisor) << 1
    return quotient + ((twice > divisor) | ((twice == divisor) & (quotient & 1 == 1)))


def saturate(x, bits):
    """`x` clipped to the range of `bits`-bit two's complement, `bits` in 1..63."""
    x = checks.integers("x", x)
    top = 1 << checks.integer("bits", bits, 1, 63) - 1
    return x.clamp(-top, top - 1)
