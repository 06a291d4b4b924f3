"""Scaled groups of float tensors: which elements share a scale, and how the scale is rounded."""

import torch
from torch.nn import functional

from golden import checks, e4m3

__all__ = ["SCALES", "INT4_LARGEST", "split", "join", "round_scale", "largest_scale", "floor_log2",
           "power_of_two"]

SCALES = ("e4m3", "power_of_two", "int4", "fp32")
INT4_LARGEST = 15          # of the unsigned 4-bit scales of VS-Quant


def split(x, group=None, block=1):
    """`x` (N, C, H, W) as (N, groups, G, rows, b, columns, b); a group is the axes 2, 4 and 6.

    Parameters
    ----------
    group : channels of a group, or None for all
    block : side of a group's block of pixels, or None for the whole image

    What does not fill a group is padded with zeros.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be of shape (N, C, H, W), not {tuple(x.shape)!r}")
    _, channels, height, width = x.shape
    group = channels if group is None else checks.integer("group", group, 1, 1 << 15)
    if block is None:
        rows, columns = height, width
    else:
        rows = columns = checks.integer("block", block, 1, 1 << 15)
    pad = [0, -width % columns, 0, -height % rows, 0, -channels % group]
    if any(pad):
        x = functional.pad(x, pad)
    return x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows)).unflatten(1, (-1, group))


def join(x, shape):
    """Inverse of `split`: (N, groups, G, rows, b, columns, b) cut to `shape` (N, C, H, W)."""
    _, channels, height, width = shape
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, :channels, :height, :width]


def round_scale(scale, kind):
    """`scale`, not negative, in float32, rounded to one of `SCALES`.

    "e4m3" rounds to nearest as `golden.e4m3.encode` does, "power_of_two" rounds up, "int4" rounds
    to nearest in 0..15 (the per-vector scales of VS-Quant, Dai et al. 2021), "fp32" keeps.
    """
    if kind == "e4m3":
        return e4m3.value(e4m3.encode(scale))
    if kind == "power_of_two":
        # 2^exponent >= scale unless scale is a power of two itself, of mantissa 1/2.
        mantissa, exponent = torch.frexp(scale)
        return torch.where(scale > 0, power_of_two(exponent - (mantissa == 0.5).int()), 0.0)
    if kind == "int4":
        return scale.round().clamp(max=INT4_LARGEST)
    if kind == "fp32":
        return scale
    raise ValueError(f"scale must be one of {', '.join(SCALES)}, not {kind!r}")


def largest_scale(kind):
    """The scale of the largest group where a second scale, in FP32, stands above the groups'."""
    return INT4_LARGEST if kind == "int4" else e4m3.LARGEST


def floor_log2(x):
    """floor(log2 `x`) from the exponent bits of a positive float tensor, int32; -1 for 0."""
    return torch.frexp(x).exponent - 1


def power_of_two(exponent):
    """2^`exponent` in float32 from int32, assembled from its bits; exponents clip to -126..127."""
    return ((exponent.to(torch.int32).clamp(-126, 127) + 127) << 23).view(torch.float32)
