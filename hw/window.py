"""The walk over output pixels, output tiles and kernel taps that both kinds of PE share."""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Window", "geometry_layout", "tap_layout"]


def geometry_layout(config):
    """What a PE is told about a convolution; stable while it runs.

    ``plane`` is ``height * width``; ``words`` are the code words of a pixel on this side;
    ``group_words`` the words that share a scale (MX formats) and ``groups`` their number;
    ``output_words`` is ceil(outputs / V) and ``chunks`` ceil(outputs / (V/4)).
    """
    words = (config.max_channels // config.vector).bit_length() + 1
    return data.StructLayout({
        "height": 16, "width": 16, "plane": 16,
        "kernel3": 1,        # 3x3 with a border of one, or 1x1
        "mx": 1,             # MX8 and IN16: two nibbles a code
        "signed_codes": 1,   # A4S
        "words": words,
        "group_words": 2,
        "groups": words,
        "output_words": (config.max_outputs // config.vector).bit_length(),
        "chunks": (config.max_outputs // config.quad).bit_length(),
    })


def tap_layout(config, lanes):
    """One step of `Window`."""
    return data.StructLayout({
        "pixel": 16,         # input pixel under the tap
        "tap": 4,            # ky * 3 + kx, or 0
        "tile": max(1, (config.max_outputs // lanes).bit_length()),
        "chunks": (lanes // config.quad).bit_length(),   # V/4 outputs each that this tile has
        "last": 1,           # last tap of this output pixel and tile
    })


class Window(wiring.Component):
    """Walks the taps that lie inside the image, for every output pixel and tile of lanes.

    Order: output pixels in raster order from ``first`` in steps of ``step``, then tiles of
    ``lanes`` outputs, then taps. One tap a cycle; taps outside the image take no cycle.

    Parameters
    ----------
    lanes : int
        Output channels of a tile.
    step : int
        Output pixels from one to the next.

    Members
    -------
    geometry : ``In``
        See `geometry_layout`.
    first : ``In``
        The first output pixel.
    start : ``In(1)``
        Begin; ``o`` is valid from the next cycle on if there is a pixel.
    o : ``Out(stream)``
        See `tap_layout`.
    """

    def __init__(self, config, *, lanes, step):
        self.config, self.lanes, self.step = config, lanes, step
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "first": In(range(max(2, step))),
            "start": In(1),
            "o": Out(stream.Signature(tap_layout(config, lanes))),
        })

    def elaborate(self, platform):
        m = Module()
        geometry, record = self.geometry, self.o.payload
        tile_chunks = self.lanes // self.config.quad
        active = Signal()
        pixel, row, column = Signal(17), Signal(16), Signal(16)
        tile, chunks_left = Signal.like(record.tile), Signal.like(geometry.chunks)
        ky, kx = Signal(2), Signal(2)

        def low(position):
            return geometry.kernel3 & (position == 0)

        def high(position, size):
            return Mux(geometry.kernel3, Mux(position + 1 == size, 1, 2), 0)

        def following(position):
            y, x = position
            wrap = x + 1 == geometry.width
            after_y, after_x = Signal(16), Signal(16)
            m.d.comb += [after_y.eq(y + wrap), after_x.eq(Mux(wrap, 0, x + 1))]
            return after_y, after_x

        def begin_taps(y, x):
            return [ky.eq(low(y)), kx.eq(low(x))]

        def begin_tiles():
            return [tile.eq(0), chunks_left.eq(geometry.chunks)]

        next_place = (row, column)
        for _ in range(self.step):
            next_place = following(next_place)
        first_place = [(Signal(16, init=0, name="zero_y"), Signal(16, init=0, name="zero_x"))]
        for _ in range(self.step - 1):
            first_place.append(following(first_place[-1]))
        first_y, first_x = Signal(16), Signal(16)
        with m.Switch(self.first):
            for number, (y, x) in enumerate(first_place):
                with m.Case(number):
                    m.d.comb += [first_y.eq(y), first_x.eq(x)]

        last_column = kx == high(column, geometry.width)
        last_row = ky == high(row, geometry.height)
        last_tile = chunks_left <= tile_chunks
        shift_y = Mux(geometry.kernel3, Mux(ky == 0, -geometry.width, Mux(
            ky == 2, geometry.width, 0)), 0)
        m.d.comb += [
            self.o.valid.eq(active),
            record.pixel.eq(pixel + shift_y + Mux(geometry.kernel3, kx, 1) - 1),
            record.tap.eq(ky * 3 + kx),
            record.tile.eq(tile),
            record.chunks.eq(Mux(last_tile, chunks_left, tile_chunks)),
            record.last.eq(last_column & last_row),
        ]

        with m.If(active & self.o.ready):
            with m.If(~last_column):
                m.d.sync += kx.eq(kx + 1)
            with m.Elif(~last_row):
                m.d.sync += [kx.eq(low(column)), ky.eq(ky + 1)]
            with m.Elif(~last_tile):
                m.d.sync += [tile.eq(tile + 1), chunks_left.eq(chunks_left - tile_chunks)]
                m.d.sync += begin_taps(row, column)
            with m.Else():
                m.d.sync += begin_tiles() + begin_taps(*next_place)
                m.d.sync += [row.eq(next_place[0]), column.eq(next_place[1])]
                m.d.sync += pixel.eq(pixel + self.step)
                m.d.sync += active.eq(pixel + self.step < geometry.plane)
        with m.If(self.start):
            m.d.sync += begin_tiles() + begin_taps(first_y, first_x)
            m.d.sync += [row.eq(first_y), column.eq(first_x), pixel.eq(self.first)]
            m.d.sync += active.eq(self.first < geometry.plane)
        return m
