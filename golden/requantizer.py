"""The requantization pass over one tensor: affine, ReLU, scales, codes and zero counts.

Channels sit in *slots*: each segment of the input is padded to a multiple of V channels, so that a
memory word never holds channels of two segments, and 8-bit formats to blocks of 32 besides.
"""

import dataclasses
import enum

import torch

from golden import a4, checks, mxint8
from golden.rounding import round_half_even

__all__ = ["Y_LIMIT", "Format", "Codes", "slots", "spread", "affine", "requantize"]

Y_LIMIT = (1 << 23) - 1    # largest magnitude after the affine


class Format(enum.IntEnum):
    """Format of a tensor of activation codes."""

    A4U = 0    # codes 0..15, one E4M3 scale a pixel
    A4S = 1    # codes -7..7, one E4M3 scale a pixel
    MX8 = 2    # MXINT8, blocks of 32 slots
    IN16 = 3   # 16-bit network input: blocks of 32 high halves, then as many of low halves

    @property
    def mx(self):
        """Whether codes have 8 bits, and an exponent for each block of 32 slots."""
        return self in (Format.MX8, Format.IN16)


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized activation tensor, slots in natural order.

    Members
    -------
    codes : (slots, H, W), 0 in slots without a channel; of IN16, twice as many as the input has
    scales : (groups, H, W), E4M3 codes (A4) or exponents above the window's bottom (MX8, IN16)
    zero_counts : (slots,), pixels whose code is 0; 0 throughout for IN16
    saturations : groups in which an element was clipped
    valid : (slots,) bool, whether the slot has a channel
    format : Format
    vector : V
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zero_counts: torch.Tensor
    saturations: int
    valid: torch.Tensor
    format: Format
    vector: int


def slots(channels, vector, mx=False):
    """Slot of each channel, segment after segment, and the number of slots.

    Parameters
    ----------
    channels : channels of each segment, a list of one or two positive ints
    vector : V, 16 or 32; each segment begins at a multiple of it
    mx : bool, whether the slots fill blocks of 32
    """
    check_vector(vector)
    if not 1 <= len(channels) <= 2:
        raise ValueError(f"channels must be of one or two segments, not {channels!r}")
    order, total = [], 0
    for count in channels:
        checks.integer("channels", count, 1, 1 << 15)
        order.append(torch.arange(count) + total)
        total += -(-count // vector) * vector
    if mx:
        total += -total % mxint8.BLOCK
    return torch.cat(order), total


def spread(x, channels, vector, dim=0, mx=False):
    """`x` with its dimension `dim` of concatenated channels moved to slots; other slots hold 0."""
    order, total = slots(channels, vector, mx)
    if x.shape[dim] != len(order):
        raise ValueError(f"x must have {len(order)} channels, not {x.shape[dim]!r}")
    shape = list(x.shape)
    shape[dim] = total
    return x.new_zeros(shape).index_copy(dim, order.to(x.device), x)


def affine(x, gain, offset, shift):
    """clip(round_half_even(x * gain, shift) + offset) and where it clipped; x is (slots, H, W)."""
    y = round_half_even(x * gain[:, None, None], shift) + offset[:, None, None]
    return y.clamp(-Y_LIMIT, Y_LIMIT), y.abs() > Y_LIMIT


def requantize(segments, gain, offset, shift, relu, format, vector):
    """Quantize one image's tensor.

    Parameters
    ----------
    segments : list of one or two (C, H, W) tensors of 16-bit integers
    gain, offset : (slots,), 16 and 32 bits; not used in slots without a channel, nor for IN16
    shift : 0..31, right shift of x * gain; not used for IN16
    relu : bool; true for A4U, false for IN16
    format : Format
    vector : V, 16 or 32

    Returns Codes.
    """
    format = check_format(format)
    check_vector(vector)
    segments = check_segments(segments)
    channels = [len(segment) for segment in segments]
    x = spread(torch.cat(segments), channels, vector, mx=format.mx)         # (slots, H, W)
    valid = torch.zeros(len(x), dtype=torch.bool)
    valid[slots(channels, vector)[0]] = True
    checks.boolean("relu", relu)

    if format == Format.IN16:
        if len(segments) > 1:
            raise ValueError(f"segments must be one for IN16, not {channels!r}")
        if relu:
            raise ValueError("relu must be False for IN16, not True")
        codes, scales, clipped = mxint8.split(x)
        return Codes(codes, scales, torch.zeros(len(codes), dtype=torch.int64),
                     int(clipped.any(0).sum()), valid.repeat(2), format, vector)

    if format == Format.A4U and not relu:
        raise ValueError("relu must be True for A4U, not False")
    checks.integer("shift", shift, 0, 31)
    gain = checks.integers("gain", gain, -1 << 15, (1 << 15) - 1, (len(x),))
    offset = checks.integers("offset", offset, -1 << 31, (1 << 31) - 1, (len(x),))
    y, clipped = affine(x, gain * valid, offset * valid, shift)
    if relu:
        y = y.clamp(min=0)
    if format == Format.MX8:
        codes, scales = mxint8.quantize(y)
        groups = mxint8.blocks(clipped)                          # (groups, 32, H, W)
    else:
        codes, scales = a4.quantize(y, signed=format == Format.A4S)
        groups = clipped[None]
    return Codes(codes, scales, (codes == 0).sum((1, 2)), int(groups.any(1).sum()), valid, format,
                 vector)


def check_vector(vector):
    """Raise unless `vector` is a width that cores are generated with."""
    if vector not in (16, 32):
        raise ValueError(f"vector must be 16 or 32, not {vector!r}")


def check_format(format):
    """`format` as a Format."""
    try:
        return Format(format)
    except ValueError:
        raise ValueError(f"format must be one of {', '.join(Format.__members__)}, "
                         f"not {format!r}") from None


def check_segments(segments):
    """One or two int64 tensors of equal height and width, elements of 16 bits."""
    if not isinstance(segments, (list, tuple)) or not 1 <= len(segments) <= 2:
        raise ValueError(f"segments must be a list of one or two tensors, not {segments!r}")
    segments = [checks.integers(f"segments[{n}]", segment, -1 << 15, (1 << 15) - 1,
                                (None, None, None)) for n, segment in enumerate(segments)]
    for n, segment in enumerate(segments):
        if 0 in segment.shape or segment.shape[1:] != segments[0].shape[1:]:
            raise ValueError(f"segments[{n}] must be of the first one's height and width and not "
                             f"empty, not {tuple(segment.shape)!r}")
    return segments
