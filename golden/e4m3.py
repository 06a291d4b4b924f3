"""E4M3 scales: the non-negative finite half of OCP's 8-bit floating point format "fn".

A scale code is a byte 0..126: exponent field E = code >> 3, mantissa field M = code & 7. With
m = M + (8 if E else 0) and x = max(E, 1) its value is m * 2^(x-1) * 2^-9: from 2^-9 to 448.
"""

import functools

import torch

from golden import checks

__all__ = ["LARGEST_CODE", "LARGEST", "decode", "value", "encode", "scale_code"]

LARGEST_CODE = 0x7E    # 0x7F would be NaN and never appears
LARGEST = 448.0


def decode(code):
    """Integer mantissa m and shift x of each code: the value is m * 2^(x-1) * 2^-9."""
    code = checks.integers("code", code, 0, LARGEST_CODE)
    field = code >> 3
    return (code & 7) + 8 * (field > 0), field.clamp(min=1)


def value(code):
    """Value of each code in float32, exactly."""
    code = checks.integers("code", code, 0, LARGEST_CODE)
    return values().to(code.device)[code]


@functools.cache
def values():
    """Values of the codes 0..126 in float32."""
    mantissa, exponent = decode(torch.arange(LARGEST_CODE + 1))
    return torch.tensor([m * 2.0 ** (x - 10) for m, x in zip(mantissa.tolist(), exponent.tolist(),
                                                            strict=True)])


@functools.cache
def midpoints():
    """Midpoint of the values of each code 0..125 and the next one, in units of 2^-10 (int64)."""
    mantissa, exponent = decode(torch.arange(LARGEST_CODE + 1))
    doubled = mantissa << exponent     # even, so that midpoints are integers
    return (doubled[1:] + doubled[:-1]) >> 1


def encode(scale):
    """Code nearest to each element of `scale`, ties to the even code, at most `LARGEST_CODE`.

    Parameters
    ----------
    scale : tensor of floats, none negative or NaN; infinity saturates
    """
    if not isinstance(scale, torch.Tensor) or not scale.is_floating_point():
        raise TypeError(f"scale must be a tensor of floats, not {scale!r}")
    if scale.numel() and not (scale.min() >= 0):
        raise ValueError(f"scale must be at least 0, not {scale.min().item()!r}")
    if scale.dtype in (torch.float16, torch.bfloat16):
        scale = scale.to(torch.float32)
    # Midpoints have at most 5 significant bits. From an odd code a tie goes up, from an even
    # code it takes the next larger float.
    first = midpoints().to(scale.dtype) / 1024
    first[0::2] = torch.nextafter(first[0::2], torch.tensor(torch.inf, dtype=scale.dtype))
    return torch.searchsorted(first.to(scale.device), scale.contiguous(), right=True)


def scale_code(amax, n):
    """Scale code of groups with the largest magnitudes `amax`: E4M3 of amax / (n * 1024).

    `amax` counts units of 2^-10 of the tensor's static scale, so that a code's step is m << x of
    them. The comparison is between integers: nearest, ties to the even code, at most
    `LARGEST_CODE`; 0 where amax / n is at most 1.

    Parameters
    ----------
    amax : tensor of integers in 0..2^40
    n : the largest element code, 15 (unsigned) or 7 (signed)
    """
    amax = checks.integers("amax", amax, 0, 1 << 40)
    n = checks.integer("n", n, 1, 127)
    first = midpoints() * n            # smallest amax of the next code, ...
    first[0::2] += 1                   # ... which an even code keeps at a tie
    return torch.searchsorted(first.to(amax.device), amax.contiguous(), right=True)
