"""MXINT8 (OCP Microscaling Formats 1.0): 8-bit integers in blocks of 32 with a shared exponent.

In hardware the exponents of a tensor lie in a window of `WINDOW` and are stored above its bottom.
"""

import torch
from torch.nn import functional

from golden import checks
from golden.rounding import round_half_even

__all__ = ["BLOCK", "WINDOW", "LARGEST", "blocks", "quantize", "split"]

BLOCK = 32
WINDOW = 16
LARGEST = 127              # codes are symmetric: -128 appears only in the halves of `split`
BOTTOM = 7                 # position of the leading one at the bottom of the integer window
SPLIT_LIMIT = 32639        # 127 * 256 + 127: both halves fit 8 bits
SPLIT_SCALES = (8, 0)      # of high and low halves: a factor of 256 between them


def blocks(x, block=BLOCK):
    """`x` (C, ...) as (ceil(C / block), block, ...), the last block padded with zeros."""
    channels = x.shape[0]
    count = -(-channels // block)
    pad = [0, 0] * (x.dim() - 1) + [0, count * block - channels]
    return functional.pad(x, pad).unflatten(0, (count, block))


def lead(amax):
    """floor(log2 `amax`), the position of the leading one, and -1 for 0; `amax` below 2^53."""
    # frexp is exact for integers below 2^53: amax = mantissa * 2^exponent, mantissa in [1/2, 1).
    return torch.frexp(amax.to(torch.float64)).exponent.to(torch.int64) - 1


def quantize(y):
    """Codes and exponents of `y`, in blocks of 32 channels, the last padded with zeros.

    Parameters
    ----------
    y : (C, H, W) integers below 2^23 in magnitude, in units of 2^-10 of the tensor's static scale

    Returns the codes (C, H, W), -127..127, and scales (ceil(C / 32), H, W), 0..15. An element is
    code * 2^(scale + 1) units. A block below the window, with no magnitude of 128 or more, has
    scale 0 and codes 0.
    """
    limit = (1 << 23) - 1
    y = checks.integers("y", y, -limit, limit, (None, None, None))
    grouped = blocks(y)                                          # (groups, 32, H, W)
    exponent = lead(grouped.abs().amax(1, keepdim=True))         # (groups, 1, H, W)
    below = exponent < BOTTOM
    magnitude = round_half_even(grouped.abs(), (exponent - 6).clamp(min=0)).clamp(max=LARGEST)
    codes = torch.where(below, 0, grouped.sign() * magnitude)
    return codes.flatten(0, 1)[:len(y)], torch.where(below, 0, exponent - BOTTOM).squeeze(1)


def split(x):
    """High and low halves of the 16-bit `x` (C, H, W): x = 256 * high + low, both of 8 bits.

    Returns codes (2 C, H, W), high halves first; scales (2, H, W); and where x was clipped to
    `SPLIT_LIMIT`, (C, H, W). Low halves may be -128.
    """
    x = checks.integers("x", x, -1 << 15, (1 << 15) - 1, (None, None, None))
    clipped = x.abs() > SPLIT_LIMIT
    x = x.clamp(-SPLIT_LIMIT, SPLIT_LIMIT)
    low = ((x + 128) & 255) - 128
    scales = torch.tensor(SPLIT_SCALES)[:, None, None].expand(2, *x.shape[1:]).clone()
    return torch.cat([(x - low) >> 8, low]), scales, clipped
