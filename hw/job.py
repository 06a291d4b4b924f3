"""What the units of a convolution tell each other: jobs, runs, records and writes of buffers.

A *job* is what one descriptor asks for: a tile of rows, columns, outputs and input channels. The
loader divides it into *runs*: as many output rows as fit half of the PEs' activation buffers. While
one run is computed, the next one is loaded into the other half.
"""

from amaranth.lib import data

__all__ = [
    "entry_layout", "geometry_layout", "load_layout", "most_tiles", "record_layout", "run_layout",
    "table_depth", "weight_scale_columns"]


def most_tiles(config, side):
    """Tiles of a side's lanes that the outputs of a job may take."""
    return -(-config.tile_outputs // getattr(config, f"{side}_lanes"))


def table_depth(config):
    """Port words of both banks of the epilogue table; the bank is the address's highest bit."""
    words = config.tile_outputs * 64 // config.port_width
    return 2 << (words - 1).bit_length()


def weight_scale_columns(config, side):
    """Port words that hold a row of weight scales, if not less than one."""
    return max(1, 8 * getattr(config, f"{side}_scale_units") // config.port_width)


def load_layout(columns, depth, width):
    """A write of a buffer: an ``enable`` bit for each column, ``address`` and ``data``."""
    return data.StructLayout({
        "enable": columns, "address": range(max(2, depth)), "data": width})


def entry_layout(config):
    """An entry of a sparse PE: up to M non-zeros of a scaled group; missing ones have code 0.

    ``position`` counts the slots that the sparse side has weights of, from 0.
    """
    return data.ArrayLayout(data.StructLayout({
        "position": range(config.tile_channels), "code": 4}), config.sparse_rate)


def record_layout(config, side):
    """What a PE knows of an input pixel, and for MX8 of each of its two nibble planes.

    ``start``: first code word (dense) or entry (sparse) of the pixel; ``count``: how many;
    ``scale``: the code of the activation scale. ``skip`` (sparse): entries to leave out where the
    split is the high one, see `geometry_layout`; ``count`` if no others have a non-zero.
    """
    dense = side == "dense"
    depth = config.codes_depth if dense else config.entry_depth
    most = -(-config.tile_channels // (config.vector if dense else config.sparse_rate))
    fields = {"start": range(depth), "count": range(most + 1), "scale": 8}
    if not dense:
        fields["skip"] = range(most + 1)
    return data.StructLayout(fields)


def geometry_layout(config):
    """What the PEs of one side are told about a run; stable while they compute it.

    Members
    -------
    active : the side has work in this run
    kernel3 : 3x3 with a border of one, or 1x1
    mx : MX8, two nibble planes of codes and of weights
    signed_codes : A4S
    height, width : rows and columns of the image
    row, column : place of the run's first output pixel in the image
    rows, columns : size of the run
    above, before : whether a row of input above and a column before the run has been loaded
    in_width : columns of input that have been loaded
    records : record of the first input pixel
    tiles : tiles of this side's lanes that the outputs take
    chunks : V/4 outputs each that the job has
    cut : added to eight bits once an output pixel; where it carries, the split is the high one
    low, high : where the split is low or high: words of a group (dense); the first position that
        counts where it is high (sparse)
    stride : output pixels from one of this side's to the next; the first is number ``stride`` - 1
    skip : every skip-th output pixel is the other side's; 0: none
    weights : first row of the weights
    pitch : rows of a (tap, plane, tile): words of channels (dense) or positions (sparse)
    weight_scales : first row of the weight scales
    """
    return data.StructLayout({
        "active": 1, "kernel3": 1, "mx": 1, "signed_codes": 1,
        "height": 16, "width": 16, "row": 16, "column": 16, "rows": 16, "columns": 16,
        "above": 1, "before": 1, "in_width": 16,
        "records": range(config.record_depth),
        "tiles": max(most_tiles(config, side) for side in ("dense", "sparse")).bit_length(),
        "chunks": (config.tile_outputs // config.quad).bit_length(),
        "cut": 9, "low": range(config.tile_channels + 1), "high": range(config.tile_channels + 1),
        "stride": 8, "skip": 8,
        "weights": range(max(config.weight_depth, config.sparse_weight_depth)),
        "pitch": range(config.tile_channels + 1),
        "weight_scales": range(
            max(config.weight_scale_depth, config.sparse_weight_scale_depth)),
    })


def run_layout(config):
    """A run that is loaded and may be computed; ``first`` and ``last`` of its job.

    ``bank``: half of the epilogue table that belongs to the job.
    """
    geometry = geometry_layout(config)
    return data.StructLayout({
        "dense": geometry, "sparse": geometry, "first": 1, "last": 1, "bank": 1})
