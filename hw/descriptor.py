"""The descriptor: what the core is told about one pass over a tensor or a tile, as plain data.

A descriptor is 32 fields' worth of 32-bit words (`WORDS`), packed low word first into port words.
The host writes descriptors to memory and gives the first one's address to the register
``descriptor``; each names the next one. A requantization pass takes a whole tensor. A convolution
takes a tile: some rows and columns of the output, some outputs, one tile of input channels.
"""

import enum

__all__ = ["VERSION", "WORDS", "FIELDS", "Kind", "Format", "Error", "pack"]

VERSION = 2
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
    IN16 = 3   # 16-bit network input: MX8 blocks of high, then of low halves; requantize only


class Error(enum.IntEnum):
    """Why a pass was refused or failed; the status register's ``error`` field."""

    NONE = 0
    VERSION = 1      # version is not `VERSION`
    KIND = 2         # kind is not one of `Kind`
    VECTOR = 3       # vector is not the core's
    FORMAT = 4       # format, relu and segments do not go together, or group is not the format's
    UNSUPPORTED = 5  # stride, resample, batch or a reserved bit not as this core needs it
    SHAPE = 6        # height, width, channels, outputs, kernel or tile is zero or too large
    CHANNELS = 7     # more channel slots or outputs than the core was generated for
    ACTIVATIONS = 8  # the rows that one row of output needs do not fit half of a PE's buffers
    WEIGHTS = 9      # the weights do not fit the weight buffers
    SCALES = 10      # the weight scales do not fit their buffers
    WINDOW = 11      # a window ends before it begins or beyond the address space
    SHIFT = 12       # a shift is larger than 31
    DETECTOR = 13    # the detector's entries do not fit, or interval is zero
    PERMUTATION = 14 # the permutation in memory is not one of this tile
    ACCESS = 15      # an access lay outside the descriptor's windows (it did not reach memory)
    PARTIALS = 16    # the partial sums of the tile do not fit their buffer
    TILES = 17       # the tiles of sparse lanes neither divide the sparse PEs nor are a multiple


# name: (word, low bit, bits, meaning)
FIELDS = {
    "version": (0, 0, 8, "layout of this table: 2"),
    "kind": (0, 8, 8, "1 requantize, 2 convolve"),
    "vector": (0, 16, 8, "V of the core, checked"),
    "kernel": (0, 24, 8, "3 or 1"),
    "format": (1, 0, 4, "0 A4U, 1 A4S, 2 MX8, 3 IN16 (requantize only)"),
    "relu": (1, 4, 1, "requantize: negative values become zero"),
    "residual": (1, 5, 1, "convolve: add the residual tensor"),
    "accumulate": (1, 6, 1, "convolve: add to the partial sums that the tile before has kept"),
    "keep_sums": (1, 7, 1, "convolve: keep exact partial sums on chip, write no results"),
    "keep_weights": (1, 8, 1, "convolve: list, weights, scales and table are still those before"),
    "balance": (1, 9, 1, "requantize: split channels so that both sides end together"),
    "stride": (1, 12, 2, "must be 1"),
    "resample": (1, 14, 2, "0 none; others must not be used"),
    "group": (1, 16, 16, "channels that share a scale: 0 all (A4), 32 (MX8, IN16)"),
    "height": (2, 0, 16, "rows of the tensor"),
    "width": (2, 16, 16, "columns of the tensor"),
    "channels": (3, 0, 16, "requantize: channels of segment one; convolve: slots of the tile"),
    "channels_second": (3, 16, 16, "requantize: channels of the second segment, or 0"),
    "outputs": (4, 0, 16, "convolve: output channels of the tile"),
    "batch": (4, 16, 16, "must be 1"),
    "tile_y": (5, 0, 16, "convolve: first row of the tile"),
    "tile_x": (5, 16, 16, "convolve: first column of the tile"),
    "tile_height": (6, 0, 16, "convolve: rows of the tile"),
    "tile_width": (6, 16, 16, "convolve: columns of the tile"),
    "tile_channels": (7, 0, 16, "requantize: slots of a tile of input channels"),
    "dense_limit": (7, 16, 8, "most words of V channels of a tile on the dense side"),
    "share": (7, 24, 8, "convolve MX8: each share-th pixel is the dense side's; 0 none, 1 all"),
    "source": (8, 0, 32, "requantize: first segment; convolve: codes of the tile"),
    "source_second": (9, 0, 32, "requantize: second segment"),
    "scales": (10, 0, 32, "activation scales, written or read"),
    "permutation": (11, 0, 32, "lists of channels, written or read"),
    "counts": (12, 0, 32, "requantize: zero counts"),
    "table": (13, 0, 32, "requantize: affine table; convolve: epilogue table of the outputs"),
    "weights": (14, 0, 32, "convolve: weight codes of the first slot and the first outputs"),
    "weight_scales": (15, 0, 32, "convolve: weight scales of the first tap and outputs"),
    "residual_source": (16, 0, 32, "convolve: residual tensor from the first outputs on"),
    "destination": (17, 0, 32, "requantize: codes; convolve: results from the first outputs on"),
    "weight_pitch": (18, 0, 16, "convolve: port words of the layer's outputs in a row of weights"),
    "scale_pitch": (18, 16, 16, "convolve: port words from one tap's weight scales to the next"),
    "shift": (19, 0, 8, "requantize: affine shift; convolve: scale shift"),
    "align_shift": (19, 8, 8, "convolve: right shift of the accumulator"),
    "residual_multiplier": (19, 16, 16, "convolve: in units of 2^-14"),
    "detector": (20, 0, 16, "first entry of this layer in the detector"),
    "interval": (20, 16, 16, "evaluations between updates of the labels"),
    "threshold": (21, 0, 32, "without balance: sparse when zeros * 65536 >= threshold * pixels"),
    "cost_word": (22, 0, 16, "balance: dense side's cost of a word of V channels and a pixel"),
    "cost_nonzero": (22, 16, 16, "balance: sparse side's cost of a non-zero"),
    "cost_group": (23, 0, 16, "balance: sparse side's cost of a pixel, besides"),
    "cost_floor": (23, 16, 16, "balance: sparse side's least cost of a pixel"),
    "scale_byte": (24, 0, 8, "convolve: byte of the first activation scale in its port word"),
    "window_exponent": (24, 8, 8, "of the MXINT8 scales, two's complement; for the host, not read"),
    "read_base": (25, 0, 32, "first word that may be read"),
    "read_limit": (26, 0, 32, "first word after it that may not"),
    "write_base": (27, 0, 32, "first word that may be written"),
    "write_limit": (28, 0, 32, "first word after it that may not"),
    "next": (29, 0, 32, "address of the next descriptor, or 0"),
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
