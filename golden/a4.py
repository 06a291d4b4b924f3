"""A4: 4-bit activations, unsigned 0..15 or signed -7..7, with a scale for each group."""

import torch

from golden import checks, e4m3
from golden.rounding import round_half_even_quotient

__all__ = ["largest", "quantize"]


def largest(signed):
    """Largest code."""
    return 7 if signed else 15


def quantize(y, signed):
    """Codes and scale codes of `y`, one group per pixel over all channels.

    Parameters
    ----------
    y : (C, H, W) integers in units of 2^-10 of the tensor's static scale; not negative if unsigned
    signed : bool

    Returns the codes (C, H, W) and the E4M3 scale codes (1, H, W). The step of a code is m << x.
    """
    checks.boolean("signed", signed)
    limit = (1 << 40) if signed else 0
    y = checks.integers("y", y, -limit, 1 << 40, (None, None, None))
    n = largest(signed)
    scales = e4m3.scale_code(y.abs().amax(0, keepdim=True), n)
    mantissa, exponent = e4m3.decode(scales)
    step = mantissa << exponent                                  # (1, H, W)
    magnitude = round_half_even_quotient(y.abs(), step.clamp(min=1)).clamp(max=n)
    return torch.where(step == 0, 0, y.sign() * magnitude), scales
