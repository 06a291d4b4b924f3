"""A4: 4-bit activations, unsigned 0..15 after ReLU or signed -7..7, with a scale for each group.

An element is code * (s * sA): s is the group's E4M3 scale, found on the fly, and sA the tensor's
static FP32 scale. The float definitions also take 8 bits, other scales and other groups: formats
to compare with.
"""

import torch

from golden import checks, e4m3
from golden.granularity import join, round_scale, split
from golden.rounding import round_half_even_quotient

__all__ = ["largest", "static_scale", "fake_quantize", "fake_quantize_static", "quantize"]


def largest(signed, bits=4):
    """Largest code."""
    return (1 << checks.integer("bits", bits, 2, 8) - checks.boolean("signed", signed)) - 1


def static_scale(amax, signed):
    """Static scale sA: the magnitude `amax` gets the scale 448; 1 if it is 0."""
    if not amax > 0:
        return 1.0
    scale = torch.tensor(amax, dtype=torch.float32) / (largest(signed) * e4m3.LARGEST)
    return scale.item() or 1.0


def fake_quantize(x, signed, tensor_scale, *, group=None, block=1, scale="e4m3", bits=4, clip=1.0):
    """The float definition of A4: `x` (N, C, H, W) rounded to what codes and scales represent.

    s = round(amax / (n * sA)), step = s * sA in float32, code = clip(round(x / step)), n = 15 or 7.
    Unsigned, negative elements become 0 and do not count for amax. A group whose s is 0 becomes 0.

    Parameters
    ----------
    signed : bool
    tensor_scale : sA, a positive number, or a tensor such as (N, 1, 1, 1), one for each image
    group : channels that share a scale; None: all of them
    block : side of the block of pixels that shares a scale; None: the whole image
    scale : one of `golden.granularity.SCALES`
    bits : of a code
    clip : part of amax that the largest code stands for
    """
    n = largest(signed, bits)
    grouped = split(checks.floats("x", x).float(), group, block)
    # (N, 1, 1, 1) or () -> beside (N, groups, G, rows, b, columns, b)
    fixed = torch.as_tensor(tensor_scale, dtype=torch.float32, device=x.device)
    if not (fixed > 0).all():
        raise ValueError(f"tensor_scale must be positive, not {tensor_scale!r}")
    fixed = fixed[..., None, None, None] if fixed.dim() else fixed
    amax = (grouped.abs() if signed else grouped.clamp(min=0)).amax((2, 4, 6), keepdim=True)
    step = round_scale(amax * clip / (n * fixed), scale) * fixed
    codes = codes_of(grouped, step, signed, bits)
    return join(codes * step, x.shape).to(x.dtype)


def fake_quantize_static(x, signed, steps, *, bits=4):
    """`x` (N, C, H, W) rounded to multiples of steps fixed beforehand.

    `steps` is a number, (C,), or (N, 1, 1, 1).
    """
    largest(signed, bits)
    steps = torch.as_tensor(steps, dtype=torch.float32, device=x.device)
    if not (steps >= 0).all():
        raise ValueError(f"steps must be at least 0, not {steps.tolist()!r}")
    steps = steps if steps.dim() == 4 else steps.reshape(-1, 1, 1)
    return (codes_of(checks.floats("x", x).float(), steps, signed, bits) * steps).to(x.dtype)


def codes_of(x, step, signed, bits=4):
    """clip(round(x / step)), 0 where the step is 0."""
    n = largest(signed, bits)
    codes = (x / torch.where(step > 0, step, torch.inf)).round_()
    return codes.clamp_(-n if signed else 0, n)


def quantize(y, signed):
    """The integer implementation of A4, one group per pixel over all channels.

    Parameters
    ----------
    y : (C, H, W) integers in units of 2^-10 * sA; not negative if unsigned
    signed : bool

    Returns the codes (C, H, W) and the E4M3 scale codes (1, H, W). The step of a code is m << x
    units. Equal to `fake_quantize` of y * 2^-10 with the tensor scale 1, bit for bit.
    """
    n = largest(signed)
    limit = 1 << 40
    y = checks.integers("y", y, -limit if signed else 0, limit, (None, None, None))
    scales = e4m3.scale_code(y.abs().amax(0, keepdim=True), n)
    mantissa, exponent = e4m3.decode(scales)
    step = mantissa << exponent                                  # (1, H, W)
    magnitude = round_half_even_quotient(y.abs(), step.clamp(min=1)).clamp(max=n)
    return torch.where(step == 0, 0, y.sign() * magnitude), scales
