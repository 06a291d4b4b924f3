"""W4: signed 4-bit weights, codes -7..7, with a scale for each group of input channels.

A weight is code * (s * sW): s is the group's E4M3 scale and sW the tensor's FP32 scale.
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


def encode(w, group, shared_taps, scale, tensor_scale):
    """Codes, scales s and steps s * sW of `w`, all as (Cout, groups, G, k, k) or broadcastable."""
    checks.floats("w", w, (None, None, None, None))
    cin = w.shape[1]
    group = cin if group is None else checks.integer("group", group, 1, 1 << 15)
    w = functional.pad(w.float(), (0, 0, 0, 0, 0, -cin % group))
    grouped = w.unflatten(1, (-1, group))
    amax = grouped.abs().amax((2, 3, 4) if shared_taps else 2, keepdim=True)
    fixed = torch.as_tensor(tensor_scale, dtype=torch.float32, device=w.device)
    if not (fixed > 0).all():
        raise ValueError(f"tensor_scale must be positive, not {tensor_scale!r}")
    fixed = fixed.reshape(-1, 1, 1, 1, 1)
    scales = round_scale(amax / (LARGEST * fixed), scale)
    step = scales * fixed
    codes = (grouped / torch.where(step > 0, step, torch.inf)).round_().clamp_(-LARGEST, LARGEST)
    return codes, scales, step


def fake_quantize(w, *, group=None, shared_taps=False, scale="e4m3", tensor_scale=None):
    """The float definition of W4: `w` (Cout, Cin, k, k) rounded to what codes and scales represent.

    s = round(amax / (7 * sW)), step = s * sW in float32, code = clip(round(w / step)). A group
    whose s is 0 becomes 0.

    Parameters
    ----------
    group : input channels that share a scale; None: all of them
    shared_taps : whether the taps of a kernel share a scale; with all channels, one per output
    scale : one of `golden.granularity.SCALES`
    tensor_scale : sW, or (Cout,) of them; by default `static_scale` of `w`
    """
    if tensor_scale is None:
        tensor_scale = static_scale(w)
    codes, _, step = encode(w, group, checks.boolean("shared_taps", shared_taps), scale,
                            tensor_scale)
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
