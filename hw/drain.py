"""The order in which the scale units of a PE work off a group and hand out a finished tile."""

from amaranth import Cat, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .scale_unit import ScaleUnit, activation_scale_layout

__all__ = [
    "Drain", "Throttle", "delay", "drive_unit", "flush_chunks", "group_layout", "lanes_of_unit",
    "outputs_of_flush", "steps_of_tile",
]


def lanes_of_unit(lanes, units):
    """Output lanes that one of ``units`` scale units serves; lane n of unit u is n * units + u."""
    return lanes // units


def outputs_of_flush(config, units):
    """Outputs that a PE hands out in a cycle: as many as it has units, at most V/4."""
    return min(units, config.quad)


def steps_of_tile(config, units, chunks):
    """Cycles in which ``units`` scale units work off ``chunks`` times V/4 outputs."""
    if units >= config.quad:
        whole = units // config.quad
        return (chunks + (whole - 1)) // whole
    return chunks * (config.quad // units)


def group_layout(config, lanes, scale_depth):
    """A finished group on its way to the scale units."""
    return data.StructLayout({
        "row": range(scale_depth),       # of its weight scales
        "scale": activation_scale_layout,
        "first": 1,                      # first group of its output tile
        "last": 1,                       # last group of its output tile
        "chunks": (lanes // config.quad).bit_length(),
    })


def delay(m, value, cycles, name):
    """``value`` as it was ``cycles`` cycles ago."""
    for cycle in range(cycles):
        later = Signal(value.shape(), name=f"{name}_{cycle + 1}")
        m.d.sync += later.eq(value)
        value = later
    return value


def flush_chunks(m, config, drain, groups, units, chunk, valid):
    """Drive the registers ``chunk`` and ``valid`` with the tiles that ``drain`` flushes.

    ``groups`` are the interfaces of the parts with one scale unit each.
    """
    width = outputs_of_flush(config, units)
    shown = Signal(width * config.accumulator_width)
    with m.Switch(drain.flush_part):
        for part in range(units // width):
            with m.Case(part):
                m.d.comb += shown.eq(Cat(
                    group.flush_sum for group in groups[part * width:(part + 1) * width]))
    pieces = config.quad // width
    if pieces == 1:
        m.d.sync += [valid.eq(drain.flush), chunk.eq(shown)]
    else:
        piece = Signal(range(pieces))
        m.d.sync += valid.eq(drain.flush & (piece == pieces - 1))
        with m.If(drain.flush):
            m.d.sync += [
                piece.eq(piece + 1),
                chunk.eq(Cat(chunk.as_value()[len(shown):], shown)),
            ]


def drive_unit(m, drain, part):
    """Drive the control members that ``part`` has from its scale unit."""
    for name in ("load", "step", "lane", "bank", "scale", "flush_lane", "flush_bank"):
        m.d.comb += getattr(part, name).eq(getattr(drain, name))
    m.d.comb += part.first_add.eq(drain.first)


class Drain(wiring.Component):
    """Sequences scale units: a step a lane for each group, then a flush for each finished tile.

    A group enters in the cycle C in which the last product is added to its sums. The sums are
    loaded in C + 1 and lane n is scaled in C + 2 + n. When the tile of a ``last`` group is final,
    it is handed out, `outputs_of_flush` outputs a cycle. `Throttle` keeps groups as far apart as
    this needs; nothing here can stall.

    Members
    -------
    group_valid, group : ``In``
        See `group_layout`.
    scale_request, scale_row : ``Out``
        Read of the weight scales of a step, two cycles ahead of it.
    load, step, lane, bank, first, scale : ``Out``
        To all scale units, see `ScaleUnit`.
    flush, flush_lane, flush_bank, flush_part : ``Out``
        Part ``flush_part`` of the units' sums for ``flush_lane`` is final.
    """

    def __init__(self, config, *, lanes, units, scale_depth):
        self.config, self.units = config, units
        self.depth = lanes_of_unit(lanes, units)
        self.parts_of_step = units // outputs_of_flush(config, units)
        lane = range(max(2, self.depth))
        super().__init__({
            "group_valid": In(1),
            "group": In(group_layout(config, lanes, scale_depth)),
            "scale_request": Out(1),
            "scale_row": Out(range(scale_depth)),
            "load": Out(1),
            "step": Out(1),
            "lane": Out(lane),
            "bank": Out(1),
            "first": Out(1),
            "scale": Out(activation_scale_layout),
            "flush": Out(1),
            "flush_lane": Out(lane),
            "flush_bank": Out(1),
            "flush_part": Out(range(max(2, self.parts_of_step))),
        })

    def elaborate(self, platform):
        m = Module()
        chunk_cycles = self.config.quad // outputs_of_flush(self.config, self.units)

        # C to C + steps - 1: read the weight scales, one row a step
        row, steps_left = Signal.like(self.scale_row), Signal(range(self.depth + 1))
        m.d.comb += self.scale_request.eq(self.group_valid | (steps_left != 0))
        with m.If(self.group_valid):
            steps = steps_of_tile(self.config, self.units, self.group.chunks)
            m.d.comb += self.scale_row.eq(self.group.row)
            m.d.sync += [row.eq(self.group.row + 1), steps_left.eq(steps - 1)]
        with m.Elif(steps_left != 0):
            m.d.comb += self.scale_row.eq(row)
            m.d.sync += [row.eq(row + 1), steps_left.eq(steps_left - 1)]

        # C + 2 to C + 1 + steps: the steps
        requested, begins, bank = Signal(), Signal(), Signal()
        group = Signal.like(self.group)
        closing, chunks = Signal(), Signal.like(self.group.chunks)
        m.d.sync += [
            self.load.eq(self.group_valid), begins.eq(self.group_valid),
            requested.eq(self.scale_request), self.step.eq(requested),
            self.lane.eq(self.lane + 1),
        ]
        with m.If(self.group_valid):
            m.d.sync += group.eq(self.group)
        with m.If(begins):
            m.d.sync += [
                self.lane.eq(0), self.first.eq(group.first), self.scale.eq(group.scale),
                self.bank.eq(bank), bank.eq(bank ^ group.last),
                closing.eq(group.last), chunks.eq(group.chunks),
            ]

        # a tile is final ScaleUnit.latency cycles after its last step
        tile = {"ends": self.step & closing & (~requested | begins), "chunks": chunks,
                "bank": self.bank}
        for cycle in range(1, ScaleUnit.latency):
            later = {}
            for name, value in tile.items():
                later[name] = Signal(len(value), name=f"{name}_{cycle}")
                m.d.sync += later[name].eq(value)
            tile = later
        left = Signal(range(self.depth * self.units // self.config.quad * chunk_cycles + 1))
        m.d.comb += self.flush.eq(left != 0)
        with m.If(self.flush):
            m.d.sync += left.eq(left - 1)
            with m.If(self.flush_part == self.parts_of_step - 1):
                m.d.sync += [self.flush_part.eq(0), self.flush_lane.eq(self.flush_lane + 1)]
            with m.Else():
                m.d.sync += self.flush_part.eq(self.flush_part + 1)
        with m.If(tile["ends"]):
            m.d.sync += [
                left.eq(tile["chunks"] * chunk_cycles), self.flush_lane.eq(0),
                self.flush_part.eq(0), self.flush_bank.eq(tile["bank"]),
            ]
        return m


class Throttle(wiring.Component):
    """Decides when the last product of a group may be issued, so that nothing after it can stall.

    Groups keep the distance that their scale steps need, tiles the distance that their flush
    needs, and a tile waits until there is room for its results.

    Members
    -------
    group_last, tile_last, chunks : ``In``
        The product that waits to be issued: whether it ends a group, a tile, and that tile's size.
    issue : ``In(1)``
        It is issued in this cycle.
    popped : ``In(1)``
        A chunk of results has been taken.
    allowed : ``Out(1)``
        It may be issued in this cycle.
    starved : ``Out(1)``
        It waits for room for its results.
    """

    def __init__(self, config, *, lanes, units):
        self.config, self.lanes, self.units = config, lanes, units
        super().__init__({
            "group_last": In(1),
            "tile_last": In(1),
            "chunks": In((lanes // config.quad).bit_length()),
            "issue": In(1),
            "popped": In(1),
            "allowed": Out(1),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        most = lanes_of_unit(self.lanes, self.units)
        chunk_cycles = self.config.quad // outputs_of_flush(self.config, self.units)
        steps, flush = Signal(range(most + 1)), Signal(range(self.lanes + 1))
        steps_left, flush_left = Signal(range(most + 1)), Signal(range(self.lanes + most + 1))
        room = Signal(range(self.config.result_depth + 1), init=self.config.result_depth)
        m.d.comb += [
            steps.eq(steps_of_tile(self.config, self.units, self.chunks)),
            flush.eq(self.chunks * chunk_cycles),
            self.starved.eq(self.tile_last & (room < self.chunks)),
            self.allowed.eq(~(self.group_last & (steps_left != 0))
                            & ~(self.tile_last & (flush_left > steps)) & ~self.starved),
        ]
        with m.If(self.issue & self.group_last):
            m.d.sync += steps_left.eq(steps - 1)
        with m.Elif(steps_left != 0):
            m.d.sync += steps_left.eq(steps_left - 1)
        ends = Signal()
        m.d.comb += ends.eq(self.issue & self.tile_last)
        with m.If(ends):
            m.d.sync += flush_left.eq(flush + steps - 1)
        with m.Elif(flush_left != 0):
            m.d.sync += flush_left.eq(flush_left - 1)
        taken = Signal.like(self.chunks)
        with m.If(ends):
            m.d.comb += taken.eq(self.chunks)
        m.d.sync += room.eq(room - taken + self.popped)
        return m
