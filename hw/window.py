"""The walk over output pixels, tiles of lanes, taps and groups that both kinds of PE share."""

from amaranth import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .job import geometry_layout, most_tiles

__all__ = ["SETUP_CYCLES", "Window", "own_tiles", "tap_layout"]

SETUP_CYCLES = 2    # from start to the first group, besides one for each PE of the side


def own_tiles(config, side):
    """Tiles of lanes that one PE may have: all of them (dense), or every n-th (sparse)."""
    if side == "dense":
        return most_tiles(config, side)
    return max(1, most_tiles(config, side) // max(1, config.sparse_pes))


def tap_layout(config, side):
    """One scaled group of a unit of work, or a null unit.

    Members
    -------
    record : of the input pixel and plane
    tap : ky * 3 + kx, or 0
    tile : number of the tile among those that this PE has
    plane : nibble planes of MX8: bit 1 of the activations, bit 0 of the weights; else 0
    chunks : V/4 outputs each that the tile has
    high : the output pixel has the high split
    last : last group of its unit
    null : the unit is the other side's; there is no group
    """
    lanes = getattr(config, f"{side}_lanes")
    return data.StructLayout({
        "record": range(config.record_depth),
        "tap": 4,
        "tile": range(max(2, own_tiles(config, side))),
        "plane": 2,
        "chunks": range(lanes // config.quad + 1),
        "high": 1,
        "last": 1,
        "null": 1,
    })


class Window(wiring.Component):
    """Walks the scaled groups of the units of work that one PE of a side has in a run.

    Units are pairs of an output pixel of this side and a tile of lanes, in raster order, tiles
    inside; the PE has number ``index`` and every n-th after it, n being the PEs of the side. Groups
    of a unit: taps inside the image, (ky, kx) ascending, four plane pairs each for MX8. Units of
    the other side are null: every ``skip``-th pixel of an MX8 run on the sparse side, and pixels
    without dense words on the dense side. A null unit is one step; a dense PE that is alone takes
    all tiles of a null pixel in one.

    One step a cycle. After ``start`` in cycle 0 the first one is there in cycle
    n + `SETUP_CYCLES` + 1; the cycles before find the place of the first unit and the way from one
    unit to the next by single steps, so that no division is needed.

    Parameters
    ----------
    side : str
        "dense" or "sparse". The dense side has no ``skip``, the sparse side no ``stride``.

    Members
    -------
    geometry : ``In``
        See `hw.job.geometry_layout`; stable from ``start`` on. ``columns`` must be at most half
        of ``record_depth``, and at least ``stride``.
    index : ``In``
        Number of the PE.
    start : ``In(1)``
        Begin, if the side is active; ignored while ``busy``.
    o : ``Out(stream)``
        See `tap_layout`.
    busy : ``Out(1)``
        From the cycle after ``start`` until the last step has been taken.
    """

    def __init__(self, config, *, side):
        self.config, self.side = config, side
        self.pes = getattr(config, f"{side}_pes")
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "index": In(range(max(2, self.pes))),
            "start": In(1),
            "o": Out(stream.Signature(tap_layout(config, side))),
            "busy": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, geometry, tap = self.config, self.geometry, self.o.payload
        sparse, pes = self.side == "sparse", self.pes
        records = range(config.record_depth)
        place_layout = data.StructLayout({
            "row": range(config.record_depth // 2 + pes + 2),
            "column": records,
            "record": records,
            "phase": 8,          # pixels before modulo ``skip`` (MX8), or their sum of ``cut``
        })

        # what follows from the geometry alone
        stride = Const(1, 1) if sparse else geometry.stride
        in_row, wrap_records, first_record = (Signal(records), Signal(records), Signal(records))
        pixel_records = Signal(records)
        below, after = Signal(), Signal()      # the run's last row or column is the image's
        tile_chunks = getattr(config, f"{self.side}_lanes") // config.quad
        rest = geometry.chunks[:tile_chunks.bit_length() - 1]
        m.d.sync += [
            in_row.eq(geometry.in_width << geometry.mx),
            wrap_records.eq((geometry.in_width - geometry.columns) << geometry.mx),
            pixel_records.eq(stride << geometry.mx),
            first_record.eq(geometry.records + (
                (stride - 1 + geometry.before - geometry.kernel3) << geometry.mx)
                - Mux(geometry.kernel3 & ~geometry.above, in_row, 0)),
            below.eq(geometry.row + geometry.rows == geometry.height),
            after.eq(geometry.in_width - geometry.before == geometry.columns),
        ]

        # one step of a place: by some tiles, and by the pixels that go with it
        here, there, by = Signal(place_layout), Signal(place_layout), Signal(place_layout)
        tile, tile_step, next_tile = (
            Signal(range(most_tiles(config, self.side) + 1)) for _ in range(3))
        tile_sum, column_sum = Signal(len(tile) + 1), Signal(len(here.column) + 1)
        phase_sum = Signal(9)
        tile_over, column_over, phase_over = (
            Signal(signed(len(value) + 1)) for value in (tile_sum, column_sum, phase_sum))
        tile_wraps, column_wraps = ~tile_over[-1], ~column_over[-1]
        rows, columns = geometry.rows[:len(here.row)], geometry.columns[:len(here.column)]
        m.d.comb += [
            tile_sum.eq(tile + tile_step),
            tile_over.eq(tile_sum - geometry.tiles),
            next_tile.eq(Mux(tile_wraps, tile_over, tile_sum)),
            phase_sum.eq(here.phase + by.phase),
            there.phase.eq(phase_sum),
            column_sum.eq(here.column + by.column),
            column_over.eq(column_sum - columns),
            there.row.eq(here.row + by.row + column_wraps),
            there.column.eq(Mux(column_wraps, column_over, column_sum)),
            there.record.eq(here.record + by.record + Mux(column_wraps, wrap_records, 0)),
        ]
        if sparse:
            m.d.comb += phase_over.eq(phase_sum - geometry.skip)
            with m.If(geometry.mx & ~phase_over[-1]):
                m.d.comb += there.phase.eq(phase_over)

        pixel = {"row": 0, "column": stride, "record": pixel_records,
                 "phase": Mux(geometry.mx, 1, geometry.cut) if sparse else geometry.cut}
        origin = {"row": 0, "column": stride - 1, "record": first_record, "phase": 0}

        def step(place):
            """Statements that step by the pixels of ``place``."""
            return [by[name].eq(place[name]) for name in pixel]

        # the taps of a unit
        ky, kx, plane, own = Signal(2), Signal(2), Signal(2), Signal.like(tap.tile)
        high_y, high_x = Signal(2), Signal(2)
        last_y, last_x, last_plane, last_tile, high, null = (Signal() for _ in range(6))
        m.d.comb += [
            high_y.eq(Mux(geometry.kernel3, Mux(
                below & (here.row + 1 == rows), 1, 2), 0)),
            high_x.eq(Mux(geometry.kernel3, Mux(
                after & (here.column + 1 == columns), 1, 2), 0)),
            last_y.eq(ky == high_y), last_x.eq(kx == high_x),
            last_plane.eq(~geometry.mx | (plane == 3)),
            last_tile.eq(tile + 1 == geometry.tiles),
            high.eq(~geometry.mx & (here.phase + geometry.cut >= 256)),
            null.eq(geometry.mx & (here.phase + 1 == geometry.skip) if sparse else
                    ~geometry.mx & ~high & (geometry.low == 0)),
            tap.record.eq(here.record + Mux(ky[1], in_row << 1, Mux(ky[0], in_row, 0))
                          + Mux(geometry.mx, Cat(plane[1], kx), kx)),
            tap.tap.eq((ky << 1) + ky + kx),
            tap.tile.eq(own),
            tap.plane.eq(plane),
            tap.chunks.eq(Mux(last_tile & (rest != 0), rest, tile_chunks)),
            tap.high.eq(high),
            tap.last.eq(last_y & last_x & last_plane),
            tap.null.eq(null),
        ]

        def begin_unit():
            """Statements that go to the place ``there``."""
            return [
                here.eq(there), tile.eq(next_tile), plane.eq(0),
                ky.eq(geometry.kernel3 & ~geometry.above & (there.row == 0)),
                kx.eq(geometry.kernel3 & ~geometry.before & (there.column == 0)),
            ]

        # single steps to unit number ``pes``: the way from one of this PE's units to the next,
        # and the pixels of that way if it passes the last tile
        count, first = Signal(range(pes + 1)), Signal(place_layout)
        first_tile, way_tile = Signal.like(tile), Signal.like(tile)
        way, longer_way = Signal(place_layout), Signal(place_layout)
        m.d.comb += self.busy.eq(1)
        with m.FSM(name="walk"):
            with m.State("Idle"):
                m.d.comb += self.busy.eq(0)
                m.d.sync += [here.eq(0), tile.eq(0), count.eq(0)]
                with m.If(self.start & geometry.active):
                    m.next = "Count"
            with m.State("Count"):
                m.d.comb += [tile_step.eq(1)] + step({
                    name: Mux(last_tile, value, 0) for name, value in pixel.items()})
                m.d.sync += [here.eq(there), tile.eq(next_tile), count.eq(count + 1)]
                with m.If(count == self.index):
                    m.d.sync += [first.eq(here), first_tile.eq(tile)]
                with m.If(count == pes - 1):
                    m.next = "Measure"
            with m.State("Measure"):
                m.d.comb += step(pixel)
                m.d.sync += [
                    way.eq(here), longer_way.eq(there), here.eq(first),
                    way_tile.eq(tile), tile.eq(first_tile),
                ]
                m.next = "Place"
            with m.State("Place"):
                m.d.comb += step(origin)
                m.d.sync += begin_unit()
                if sparse:
                    m.d.sync += own.eq(0)
                else:
                    m.d.sync += own.eq(next_tile)
                m.next = "Walk"
                with m.If(there.row >= rows):
                    m.next = "Idle"
            with m.State("Walk"):
                m.d.comb += [self.o.valid.eq(1), tile_step.eq(way_tile)] + step({
                    name: Mux(tile_wraps, longer_way[name], way[name]) for name in pixel})
                with m.If(self.o.ready):
                    with m.If(tap.last | null):
                        m.d.sync += begin_unit()
                        if not sparse and pes == 1:
                            # all tiles of a null pixel at once
                            with m.If(null & (way_tile != 0)):
                                m.d.comb += step(longer_way) + [next_tile.eq(0)]
                        if sparse:
                            m.d.sync += own.eq(Mux(tile_wraps | (way_tile == 0), 0, own + 1))
                        else:
                            m.d.sync += own.eq(next_tile)
                        with m.If(there.row >= rows):
                            m.next = "Idle"
                    with m.Elif(~last_plane):
                        m.d.sync += plane.eq(plane + 1)
                    with m.Else():
                        m.d.sync += plane.eq(0)
                        with m.If(~last_x):
                            m.d.sync += kx.eq(kx + 1)
                        with m.Else():
                            m.d.sync += [
                                ky.eq(ky + 1),
                                kx.eq(geometry.kernel3 & ~geometry.before & (here.column == 0)),
                            ]
        return m
