"""Convolution of codes: exact sums of scaled groups, so that no order of work changes a bit.

A group is the set of products that share both scales. Its sum is an exact integer, times the exact
product of its scales; groups add up in fixed point without rounding.
"""

import torch

from golden import checks, e4m3, mxint8
from golden.detector import permutation
from golden.requantizer import Format, check_vector

__all__ = ["MAX_SLOTS", "group_size", "accumulate", "work"]

MAX_SLOTS = 1 << 15    # 9 taps * 2^15 slots * 128 * 128 << 30 stays below 2^63


def group_size(format, slots, vector):
    """Slots of a scaled group: all (A4), 32 (MX8), V (IN16)."""
    return {Format.MX8: mxint8.BLOCK, Format.IN16: vector}.get(format, slots)


def accumulate(codes, weight_codes, weight_scales, vector):
    """Exact sum of all scaled groups for each output element.

    Parameters
    ----------
    codes : Codes of the input
    weight_codes : (Cout, slots, k, k), k 1 or 3; -7..7 (A4), -127..127 (MX8, IN16)
    weight_scales : (Cout, k * k, groups), E4M3 codes (A4) or 0..15 (MX8, IN16)
    vector : V

    Returns (Cout, H, W) int64: sums of S * (ma * mw) << (xa - 1 + xw - 1) for A4, of
    S << (ea + ew) otherwise, where S is a group's sum of products. Input pixels outside the image
    contribute nothing.
    """
    check_vector(vector)
    if vector != codes.vector:
        raise ValueError(f"vector must be that of codes, {codes.vector}, not {vector!r}")
    mx = codes.format in (Format.MX8, Format.IN16)
    slots, height, width = codes.codes.shape
    if slots > MAX_SLOTS:
        raise ValueError(f"codes must have at most {MAX_SLOTS} slots, not {slots!r}")
    limit = mxint8.LARGEST if mx else 7
    weights = checks.integers("weight_codes", weight_codes, -limit, limit,
                              (None, slots, None, None))
    outputs, _, kernel, columns = weights.shape
    if kernel not in (1, 3) or columns != kernel:
        raise ValueError(f"weight_codes must be of kernel 1x1 or 3x3, not {kernel}x{columns}")
    size = group_size(codes.format, slots, vector)
    groups = -(-slots // size)
    scales = checks.integers(
        "weight_scales", weight_scales, 0, mxint8.WINDOW - 1 if mx else e4m3.LARGEST_CODE,
        (outputs, kernel * kernel, groups))

    factors, weight_factors = factor(codes.scales, mx), factor(scales, mx)
    taps = weights.flatten(2).permute(2, 0, 1)                   # (taps, Cout, slots)
    border = kernel // 2
    acc = torch.zeros(outputs, height + 2 * border, width + 2 * border, dtype=torch.int64,
                      device=weights.device)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        # Exact in float64: at most 2^15 slots of at most 2^14 stay below 2^53.
        pixels = codes.codes[part].flatten(1).to(torch.float64)  # (size, H * W)
        sums = taps[:, :, part].to(torch.float64) @ pixels       # (taps, Cout, H * W)
        sums = sums.to(torch.int64) * factors[group].flatten()
        sums *= weight_factors[:, :, group].T[:, :, None]
        for tap, total in enumerate(sums.unflatten(2, (height, width))):
            # Output (y, x) reads input (y + ky - border, x + kx - border): scatter to outputs.
            top, left = 2 * border - tap // kernel, 2 * border - tap % kernel
            acc[:, top:top + height, left:left + width] += total
    return acc[:, border:border + height, border:border + width].contiguous()


def factor(scales, mx):
    """What scale codes multiply a sum by, as integers: m << (x - 1), or 2^e."""
    if mx:
        return torch.ones_like(scales) << scales
    mantissa, exponent = e4m3.decode(scales)
    return mantissa << (exponent - 1)


def work(codes, labels, kernel, outputs, dense_lanes, sparse_lanes):
    """Issues of the dense PE, and of the sparse PE for non-zero codes, in one convolution.

    Parameters
    ----------
    codes : Codes of the input
    labels : (slots,) bool, true where the slot is sparse; false throughout for MX8 and IN16
    kernel : 1 or 3
    outputs : output channels
    dense_lanes, sparse_lanes : output channels an issue serves on either side

    An issue is one word of V channels (for MX8 and IN16 one of its four nibble passes), or one
    non-zero code, of one input pixel, for one tap whose output pixel exists and one tile of lanes.
    """
    if kernel not in (1, 3):
        raise ValueError(f"kernel must be 1 or 3, not {kernel!r}")
    for name, value in (("outputs", outputs), ("dense_lanes", dense_lanes),
                        ("sparse_lanes", sparse_lanes)):
        checks.integer(name, value, 1, 1 << 16)
    mx = codes.format in (Format.MX8, Format.IN16)
    dense, sparse = permutation(labels, codes.valid, codes.vector, natural=mx)
    if mx and labels.any():
        raise ValueError(f"labels must be False for {codes.format.name}, not {labels.tolist()!r}")
    _, height, width = codes.codes.shape
    reach = torch.outer(*(torch.full((size,), kernel) - ends(size, kernel)
                          for size in (height, width)))          # (H, W) outputs of an input pixel
    words = -(-len(dense) // codes.vector) * (4 if mx else 1)
    nonzero = (codes.codes[sparse] != 0).sum(0)                  # (H, W)
    return (int(reach.sum()) * words * -(-outputs // dense_lanes),
            int((reach * nonzero).sum()) * -(-outputs // sparse_lanes))


def ends(size, kernel):
    """For each of `size` positions in a row, the taps that reach beyond its ends."""
    outside = torch.zeros(size, dtype=torch.int64)
    if kernel == 3:
        outside[0] += 1
        outside[-1] += 1
    return outside
