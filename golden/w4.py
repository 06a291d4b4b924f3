"""W4: signed 4-bit weights, codes -7..7, with a scale for each group of input channels.

A weight is code * (s * sW): s is the group's E4M3 scale and sW the tensor's FP32 scale. The float
definition also takes 8 bits, other scales and other groups: formats to compare with.
"""

import torch
from torch.nn import functional

from golden import checks, e4m3
from golden.granularity import round_scale

__all__ = ["LARGEST", "static_scale", "fake_quantize", "quantize"]

LARGEST = 7


def static_scale(w):
    """Scale sW of the weights `w`: their largest magnitude gets the scale 448; 1 if all are 0."""
    return (w.float().abs().max() / (LARGEST * e4m3.LARGEST)).item() or 1.0


def encode(w, group, shared_taps, scale, tensor_scale, *, whole=False, bits=4, clip=1.0):
    """Codes, scales s and steps s * sW of `w`, all as (Cout, groups, G, k, k) or broadcastable."""
    checks.floats("w", w, (None, None, None, None))
    n = (1 << checks.integer("bits", bits, 2, 8) - 1) - 1
    cin = w.shape[1]
    group = cin if group is None else checks.integer("group", group, 1, 1 << 15)
    w = functional.pad(w.float(), (0, 0, 0, 0, 0, -cin % group))
    grouped = w.unflatten(1, (-1, group))
    amax = grouped.abs().amax((2, 3, 4) if shared_taps or whole else 2, keepdim=True)
    amax = amax.amax((0, 1), keepdim=True) if whole else amax
    fixed = torch.as_tensor(tensor_scale, dtype=torch.float32, device=w.device)
    if not (fixed > 0).all():
        raise ValueError(f"tensor_scale must be positive, not {tensor_scale!r}")
    fixed = fixed.reshape(-1, 1, 1, 1, 1)
    scales = round_scale(amax * clip / (n * fixed), scale)
    step = scales * fixed
    codes = (grouped / torch.where(step > 0, step, torch.inf)).round_().clamp_(-n, n)
    return codes, scales, step


def fake_quantize(w, *, group=None, shared_taps=False, scale="e4m3", tensor_scale=None,
                  whole=False, bits=4, clip=1.0):
    """The float definition of W4: `w` (Cout, Cin, k, k) rounded to what codes and scales represent.

    s = round(amax / (7 * sW)), step = s * sW in float32, code = clip(round(w / step)). A group
    whose s is 0 becomes 0.

    Parameters
    ----------
    group : input channels that share a scale; None: all of them
    shared_taps : whether the taps of a kernel share a scale; with all channels, one per output
    scale : one of `golden.granularity.SCALES`
    tensor_scale : sW, or (Cout,) of them; by default `static_scale` of `w`
    whole : whether all weights share one scale
    bits : of a code
    clip : part of amax that the largest code stands for: a number, or (Cout,) of them
    """
    if tensor_scale is None:
        tensor_scale = static_scale(w)
    clip = torch.as_tensor(clip, dtype=torch.float32, device=w.device).reshape(-1, 1, 1, 1, 1)
    codes, _, step = encode(w, group, checks.boolean("shared_taps", shared_taps), scale,
                            tensor_scale, whole=whole, bits=bits, clip=clip)
    return (codes * step).flatten(1, 2)[:, :w.shape[1]].to(w.dtype)


def quantize(w):
    """Codes and scales of `w` (Cout, Cin, k, k) as the hardware takes them.

    Returns the codes (Cout, Cin, k, k), E4M3 scale codes (Cout, k * k, 1) and sW. Codes times the
    steps are `fake_quantize` of `w` with its defaults, bit for bit.
    """
    fixed = static_scale(w)
    codes, scales, _ = encode(w, None, False, "e4m3", fixed)
    return (codes.flatten(1, 2).to(torch.int64),
            e4m3.encode(scales.flatten(1, 2).flatten(2).transpose(1, 2)), fixed)
