"""The layer descriptor: what the core is told about one pass, as plain data.

A descriptor is 32 fields' worth of 32-bit words (`WORDS`), packed low word first into port words.
The host writes it to memory and gives its address to the register ``descriptor``.
"""

import enum

__all__ = ["VERSION", "WORDS", "FIELDS", "Kind", "Format", "Error", "pack"]

VERSION = 1
WORDS = 32


class Kind(enum.IntEnum):
    """What a pass does."""

    REQUANTIZE = 1
    CONVOLVE = 2


class Format(enum.IntEnum):
    """Format of the activation codes; it decides the format of the weights."""

    A4U = 0    # unsigned 4-bit codes, one E4M3 scale a pixel; W4 weights
    A4S = 1    # signed 4-bit codes, one E4M3 scale a pixel; W4 weights
    MX8 = 2    # MXINT8, blocks of 32 slots
    IN16 = 3   # 16-bit network input as two planes of MXINT8 with groups of V slots


class Error(enum.IntEnum):
    """Why a pass was refused or failed; the status register's ``error`` field."""

    NONE = 0
    VERSION = 1      # version is not `VERSION`
    KIND = 2         # kind is not one of `Kind`
    VECTOR = 3       # vector is not the core's
    FORMAT = 4       # format, relu and segments do not go together, or group is not the format's
    UNSUPPORTED = 5  # stride, resample, batch, accumulate, tile or halo not as this core needs it
    SHAPE = 6        # height, width, channels or kernel is zero or too large
    CHANNELS = 7     # more channel slots or outputs than the core was generated for
    ACTIVATIONS = 8  # the codes do not fit the activation buffers
    WEIGHTS = 9      # the weights do not fit the weight buffers
    SCALES = 10      # the scales do not fit the scale buffers
    WINDOW = 11      # a window ends before it begins or beyond the address space
    SHIFT = 12       # a shift is larger than 31
    DETECTOR = 13    # the detector's entries do not fit, or interval is zero
    PERMUTATION = 14 # the permutation in memory is not one of this layer
    ACCESS = 15      # an access lay outside the descriptor's windows (it did not reach memory)


# name: (word, low bit, bits, meaning)
FIELDS = {
    "version": (0, 0, 8, "layout of this table: 1"),
    "kind": (0, 8, 8, "1 requantize, 2 convolve"),
    "vector": (0, 16, 8, "V of the core, checked"),
    "kernel": (0, 24, 8, "3 or 1"),
    "format": (1, 0, 4, "0 A4U, 1 A4S, 2 MX8, 3 IN16"),
    "relu": (1, 4, 1, "requantize: negative values become zero"),
    "residual": (1, 5, 1, "convolve: add the residual tensor"),
    "accumulate": (1, 6, 1, "onto existing sums: must be 0"),
    "stride": (1, 8, 4, "must be 1"),
    "resample": (1, 12, 4, "0 none; others must not be used"),
    "group": (1, 16, 16, "channels that share a scale: 0 all (A4), 32 (MX8), V (IN16)"),
    "height": (2, 0, 16, "rows of the tensor"),
    "width": (2, 16, 16, "columns of the tensor"),
    "channels": (3, 0, 16, "input channels of the first segment"),
    "channels_second": (3, 16, 16, "input channels of the second segment, or 0"),
    "outputs": (4, 0, 16, "convolve: output channels"),
    "batch": (4, 16, 16, "must be 1"),
    "tile_y": (5, 0, 16, "row of the tile's origin: must be 0"),
    "tile_x": (5, 16, 16, "column of the tile's origin: must be 0"),
    "halo": (6, 0, 8, "rows and columns around the tile: must be 0"),
    "window_exponent": (6, 8, 8, "of the MXINT8 scales, two's complement; for the host, not read"),
    "source": (7, 0, 32, "requantize: first segment; convolve: codes"),
    "source_second": (8, 0, 32, "requantize: second segment"),
    "scales": (9, 0, 32, "activation scales, written or read"),
    "permutation": (10, 0, 32, "label order, written or read"),
    "counts": (11, 0, 32, "requantize: zero counts"),
    "table": (12, 0, 32, "requantize: affine table; convolve: epilogue table"),
    "weights": (13, 0, 32, "convolve: weight codes"),
    "weight_scales": (14, 0, 32, "convolve: weight scales"),
    "residual_source": (15, 0, 32, "convolve: residual tensor"),
    "destination": (16, 0, 32, "requantize: codes; convolve: 16-bit results"),
    "shift": (17, 0, 8, "requantize: affine shift; convolve: scale shift"),
    "align_shift": (17, 8, 8, "convolve: right shift of the accumulator"),
    "residual_multiplier": (18, 0, 16, "convolve: in units of 2^-14"),
    "detector": (19, 0, 16, "first entry of this layer in the detector"),
    "interval": (19, 16, 16, "evaluations between updates of the labels"),
    "threshold": (20, 0, 32, "sparse when zeros * 65536 >= threshold * pixels"),
    "read_base": (21, 0, 32, "first word that may be read"),
    "read_limit": (22, 0, 32, "first word after it that may not"),
    "write_base": (23, 0, 32, "first word that may be written"),
    "write_limit": (24, 0, 32, "first word after it that may not"),
}


def pack(**values):
    """The descriptor's 32 words as a list of unsigned integers; fields not given are 0.

    Raises
    ------
    ValueError
        If a field is unknown or its value does not fit.
    """
    words = [0] * WORDS
    for name, value in values.items():
        if name not in FIELDS:
            raise ValueError(f"{name} is not a descriptor field")
        word, low, bits, _ = FIELDS[name]
        if not 0 <= int(value) < 1 << bits:
            raise ValueError(f"descriptor field {name} must fit {bits} bits, not {value!r}")
        words[word] |= int(value) << low
    return words
