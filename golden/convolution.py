"""Convolution of codes: exact sums of scaled groups, so that no order of work changes a bit.

A group is the set of products that share both scales. Its sum is an exact integer, times the exact
product of its scales; groups add up in fixed point without rounding.
"""

import torch
from torch.nn import functional

from golden import checks, e4m3, mxint8

__all__ = ["MAX_SLOTS", "group_size", "accumulate", "loads", "work"]

MAX_SLOTS = 1 << 15    # 9 taps * 2^15 slots * 128 * 128 << 30 stays below 2^63


def group_size(format, slots):
    """Slots of a scaled group: all (A4) or 32 (MX8, IN16)."""
    return mxint8.BLOCK if format.mx else slots


def accumulate(codes, weight_codes, weight_scales):
    """Exact sum of all scaled groups for each output element.

    Parameters
    ----------
    codes : Codes of the input
    weight_codes : (Cout, slots, k, k), k 1 or 3; -7..7 (A4), -127..127 (MX8, IN16)
    weight_scales : (Cout, k * k, groups), E4M3 codes (A4) or 0..15 (MX8, IN16)

    Returns (Cout, H, W) int64: sums of S * (ma * mw) << (xa - 1 + xw - 1) for A4, of
    S << (ea + ew) otherwise, where S is a group's sum of products. Input pixels outside the image
    contribute nothing.
    """
    mx = codes.format.mx
    slots, height, width = codes.codes.shape
    if slots > MAX_SLOTS:
        raise ValueError(f"codes must have at most {MAX_SLOTS} slots, not {slots!r}")
    limit = mxint8.LARGEST if mx else 7
    weights = checks.integers("weight_codes", weight_codes, -limit, limit,
                              (None, slots, None, None))
    outputs, _, kernel, columns = weights.shape
    if kernel not in (1, 3) or columns != kernel:
        raise ValueError(f"weight_codes must be of kernel 1x1 or 3x3, not {kernel}x{columns}")
    size = group_size(codes.format, slots)
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


def loads(codes, channels):
    """Non-zero codes of one tile of input channels, by input pixel.

    Parameters
    ----------
    codes : Codes of the input
    channels : ChannelList of the tile

    Returns (2, H, W): of A4, those at positions from `channels.low` to `channels.high` and those
    from there on; of MX8 and IN16, the non-zero low and high nibbles.
    """
    ordered = channels.gather(codes.codes, codes.vector)         # (positions, H, W)
    if codes.format.mx:
        parts = ordered & 15, ordered >> 4
    else:
        parts = ordered[channels.low:channels.high], ordered[channels.high:]
    return torch.stack([(part != 0).sum(0) for part in parts])


def work(codes, lists, kernel, outputs, dense_lanes, sparse_lanes, share=1, runs=None):
    """Issues of the dense PEs, and non-zero codes that the sparse PEs multiply, in a convolution.

    Parameters
    ----------
    codes : Codes of the input
    lists : ChannelLists of the tiles of input channels that take part
    kernel : 1 or 3
    outputs : output channels
    dense_lanes, sparse_lanes : output channels that an issue serves on either side
    share : MX8 and IN16: of a run's output pixels in raster order, counted from 1, the dense PEs
        take each that `share` divides, the sparse PEs the others; 0 leaves all to the sparse PEs
    runs : output pixels, a list of (row, rows, column, columns); None: the whole image is one run

    An issue is one word of V codes (for MX8 and IN16 of a nibble plane, with one nibble plane of
    the weights) of one input pixel, for one tap of an output pixel and one tile of lanes. Sparse
    work counts each non-zero code (or nibble) in the same way.
    """
    if kernel not in (1, 3):
        raise ValueError(f"kernel must be 1 or 3, not {kernel!r}")
    for name, value in (("outputs", outputs), ("dense_lanes", dense_lanes),
                        ("sparse_lanes", sparse_lanes)):
        checks.integer(name, value, 1, 1 << 16)
    checks.integer("share", share, 0, 255)
    _, height, width = codes.codes.shape
    taps = under_taps(torch.ones(height, width, dtype=torch.int64), kernel)
    # (2, H, W) each, by output pixel
    nonzeros = [torch.stack([under_taps(part, kernel) for part in loads(codes, channels)])
                for channels in lists]
    dense = sparse = 0
    for run in [(0, height, 0, width)] if runs is None else runs:
        row, rows, column, columns = run
        if min(run) < 0 or row + rows > height or column + columns > width:
            raise ValueError(f"runs must lie in the image of {height} by {width} pixels, "
                             f"not {run!r}")

        def cut(values, row=row, rows=rows, column=column, columns=columns):
            return values[..., row:row + rows, column:column + columns].flatten(-2)

        for channels, counts in zip(lists, map(cut, nonzeros), strict=True):
            if codes.format.mx:
                number = torch.arange(1, rows * columns + 1)
                owned = number % share == 0 if share else torch.zeros_like(number).bool()
                words = owned * (4 * mxint8.BLOCK // codes.vector)
                multiplied = 2 * counts.sum(0) * ~owned
            else:
                split = channels.split(rows * columns)
                words = -(-split // codes.vector)
                multiplied = counts[1] + counts[0] * (split < channels.high)
            dense += int((words * cut(taps)).sum())
            sparse += int(multiplied.sum())
    return dense * -(-outputs // dense_lanes), sparse * -(-outputs // sparse_lanes)


def under_taps(values, kernel):
    """Sum of `values` (H, W) of the input pixels that each output pixel takes, (H, W)."""
    border = kernel // 2
    padded = functional.pad(values, (border,) * 4)
    return padded.unfold(0, kernel, 1).unfold(1, kernel, 1).sum((2, 3))
