"""A descriptor inside the core: its fields and the sizes that follow from them."""

from amaranth.lib import data

from .descriptor import FIELDS
from .job import most_tiles

__all__ = ["derived_sizes", "layer_layout"]


def derived_sizes(config):
    """Names and bits of the sizes that the sequencer derives; see `layer_layout`."""
    words = (max(config.max_channels, config.max_outputs) // config.vector).bit_length() + 1
    sparse_tiles = most_tiles(config, "sparse").bit_length()
    return {
        "plane": 16,
        "mx": 1,
        "slot_words": words,
        "output_words": words,
        "chunks": (config.tile_outputs // config.quad).bit_length(),
        "dense_tiles": most_tiles(config, "dense").bit_length(),
        "sparse_tiles": max(1, sparse_tiles),
        "sparse_own": max(1, sparse_tiles),
        "kernel3": 1,
        "taps": 4,
        "slot_pitch": 21,
        "origin": 16,
        "input_row": 16,
        "input_last": 16,
        "input_column": 16,
        "input_width": 16,
    }


def layer_layout(config):
    """The fields of `hw.descriptor.FIELDS` and what the sequencer derives from them.

    Every derived size is exact for a descriptor that passes the sequencer's checks.

    Members
    -------
    plane : pixels of the tensor
    mx : two nibble planes of codes: MX8 or IN16
    slot_words : ceil(slots / V): of both segments, of all blocks of IN16, or of the tile
    output_words : ceil(outputs / V)
    chunks : ceil(outputs / (V/4))
    dense_tiles, sparse_tiles : ceil(outputs / K), ceil(outputs / L)
    sparse_own : tiles of a sparse PE, max(1, sparse_tiles / sparse_pes)
    kernel3 : 3x3; else 1x1
    taps : 9 or 1
    slot_pitch : port words from the weights of a slot to those of the next one
    origin : pixel of the tensor at which the tile's output begins
    input_row, input_last : first and last row of input that the job needs
    input_column, input_width : first column of input that the job needs, and how many
    """
    return data.StructLayout({
        **{name: bits for name, (_, _, bits, _) in FIELDS.items()}, **derived_sizes(config)})
