"""What follows the lanes of a PE: the schedule of its scale units and the way of finished sums."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import memory_attributes
from .scale_unit import (
    ScaleUnit, activation_scale_layout, chunk_layout, decode_activation_scale, tile_sum_width)

__all__ = [
    "Drain", "Results", "Throttle", "capacity", "connect_drain", "delay", "group_layout",
    "lanes_of", "scale_rows_of", "steps", "unit_cycles", "units_of",
]


def lanes_of(config, side):
    """Output lanes of a PE of side "dense" or "sparse"."""
    return getattr(config, f"{side}_lanes")


def units_of(config, side):
    """Scale units of a PE; lane n of unit u is output n * units + u of a tile."""
    return getattr(config, f"{side}_scale_units")


def scale_rows_of(config, side):
    """Rows of weight scales that a PE keeps."""
    return config.weight_scale_depth if side == "dense" else config.sparse_weight_scale_depth


def steps(config, side):
    """Least cycles from the last issue of a scaled group to that of the next: a step each lane."""
    return lanes_of(config, side) // units_of(config, side)


def unit_cycles(config, side):
    """Least cycles from the last issue of a unit of work to that of the next.

    Finished sums leave at V/4 a cycle. Where a row of them takes more than one, the rows of the
    next unit must not move in before the last of them has left.
    """
    moving = steps(config, side) - 1 if units_of(config, side) > config.quad else 0
    return lanes_of(config, side) // config.quad + moving


def capacity(config, side):
    """Units of work whose results may be on their way."""
    return config.result_depth // steps(config, side)


def chunks_of_tile(config, side):
    """Chunks of V/4 outputs that a PE has lanes for."""
    return lanes_of(config, side) // config.quad


def group_layout(config, side):
    """A scaled group on its way to the scale units.

    Members
    -------
    row : of the buffer of weight scales, for its first step; the others follow
    scale : code of the activation scale
    mx, power : MX8, and the planes' weight as a power of 16: 0 to 2
    last : it is the last of its unit of work
    chunks : of V/4 outputs that the unit of work has
    """
    return data.StructLayout({
        "row": range(scale_rows_of(config, side)), "scale": 8, "mx": 1, "power": 2, "last": 1,
        "chunks": range(chunks_of_tile(config, side) + 1)})


def delay(m, value, cycles, name):
    """``value`` as it was ``cycles`` cycles ago."""
    for cycle in range(cycles):
        later = Signal(value.shape(), name=f"{name}_{cycle + 1}")
        m.d.sync += later.eq(value)
        value = later
    return value


def choose(number, values):
    """One of 2^n values, by n/2 levels of two 4-input functions a bit."""
    if len(values) == 1:
        return values[0]
    if len(values) == 2:
        return Mux(number[0], values[1], values[0])
    if len(values) > 4:
        quarter = len(values) // 4
        values = [choose(number, values[first:first + quarter])
                  for first in range(0, len(values), quarter)]
        number = number[quarter.bit_length() - 1:]
    low, high = number[0], number[1]
    # the first function passes the second one its choice where it has nothing else to say
    first = Mux(high, low.replicate(len(values[0])), Mux(low, values[1], values[0]))
    return Mux(high, (first & values[3]) | (~first & values[2]), first)


def connect_drain(m, drain, results, groups, weight_scales):
    """Connect a `Drain` with ``groups``, the parts with a scale unit each, and with `Results`.

    ``weight_scales`` is a row of the buffer of weight scales, a byte each unit.
    """
    for unit, group in enumerate(groups):
        m.d.comb += [
            group.step.eq(drain.step), group.group_first.eq(drain.first),
            group.last.eq(drain.last), group.scale.eq(drain.scale),
            group.advance.eq(drain.advance),
            group.weight_scale.eq(weight_scales.word_select(unit, 8)),
            results.sums[unit].eq(group.sum),
        ]
    m.d.comb += [
        results.push.eq(drain.flush), results.part.eq(drain.flush_part),
        results.left.eq(drain.flush_left),
    ]


class Drain(wiring.Component):
    """Sequences scale units: a step a lane for each group, then the way out of finished sums.

    A group enters `lead` = 1 cycle before the cycle C in which its last product is added to the
    sums. Lane n is scaled in C + 1 + n. Chunk c of a finished unit leaves in
    C + 3 + steps + c. `Throttle` keeps groups and units of work as far apart as this
    needs; nothing here can stall.

    Members
    -------
    group_valid, group : ``In``
        See `group_layout`.
    scale_request, scale_row : ``Out``
        Read of the weight scales of a step, two cycles ahead of it.
    step, first, last, scale, advance : ``Out``
        To all scale units, see `ScaleUnit`.
    flush, flush_part, flush_left : ``Out``
        The sums that units ``flush_part`` * V/4 and the next ones show are a chunk, the first of
        ``flush_left`` of its unit of work that have not left.
    """

    lead = 1

    def __init__(self, config, side):
        self.config, self.side = config, side
        self.parts_of_row = units_of(config, side) // config.quad
        super().__init__({
            "group_valid": In(1),
            "group": In(group_layout(config, side)),
            "scale_request": Out(1),
            "scale_row": Out(range(scale_rows_of(config, side))),
            "step": Out(1),
            "first": Out(1),
            "last": Out(1),
            "scale": Out(activation_scale_layout),
            "advance": Out(1),
            "flush": Out(1),
            "flush_part": Out(range(max(2, self.parts_of_row))),
            "flush_left": Out(range(chunks_of_tile(config, side) + 1)),
        })

    def elaborate(self, platform):
        m = Module()
        depth = steps(self.config, self.side)

        # C - 1 to C - 2 + steps: read the weight scales, a row each step
        row, steps_left = Signal.like(self.scale_row), Signal(range(max(2, depth)))
        m.d.comb += [
            self.scale_request.eq(self.group_valid | (steps_left != 0)),
            self.scale_row.eq(row),
        ]
        with m.If(self.group_valid):
            m.d.comb += self.scale_row.eq(self.group.row)
            m.d.sync += steps_left.eq(depth - 1)
        with m.Elif(steps_left != 0):
            m.d.sync += steps_left.eq(steps_left - 1)
        m.d.sync += row.eq(self.scale_row + 1)

        # C: decode the scale; C + 1 to C + steps: the steps
        group, begins, requested = Signal.like(self.group), Signal(), Signal()
        chunks = Signal.like(self.group.chunks)
        m.d.sync += [
            begins.eq(self.group_valid), self.first.eq(begins),
            requested.eq(self.scale_request), self.step.eq(requested),
        ]
        with m.If(self.group_valid):
            m.d.sync += group.eq(self.group)
        with m.If(begins):
            m.d.sync += [
                self.scale.eq(decode_activation_scale(group.scale, group.mx, group.power)),
                self.last.eq(group.last), chunks.eq(group.chunks),
            ]

        # after the last step: the sums are final, lane 0 is shown
        ended = Signal.like(chunks)
        m.d.comb += ended.eq(0)
        with m.If(self.step & self.last & (~requested | begins)):
            m.d.comb += ended.eq(chunks)
        final = delay(m, ended, ScaleUnit.latency - 1, "final")
        left = self.flush_left
        m.d.comb += self.flush.eq(left != 0)
        last_part = Signal()
        m.d.comb += [
            last_part.eq(self.flush_part == self.parts_of_row - 1),
            self.advance.eq(self.flush & last_part),
        ]
        with m.If(self.flush):
            m.d.sync += left.eq(left - 1)
            if self.parts_of_row > 1:
                m.d.sync += self.flush_part.eq(self.flush_part + 1)
        with m.If(final != 0):
            m.d.sync += [left.eq(final), self.flush_part.eq(0)]
        return m


class Throttle(wiring.Component):
    """Decides when the last issue of a scaled group may come, so that nothing after it stalls.

    Groups keep the distance `steps`, units of work the distance `unit_cycles`, and a unit of work
    waits until there is room for its results, see `capacity`.

    Members
    -------
    group_last, unit_last : ``In(1)``
        The issue that waits ends a scaled group; it ends a unit of work (and a scaled group).
    issue : ``In(1)``
        It is issued in this cycle.
    returned : ``In(1)``
        The last chunk of a unit of work has been taken.
    allowed : ``Out(1)``
        It may be issued in this cycle.
    starved : ``Out(1)``
        It waits for room for its results.
    """

    def __init__(self, config, side):
        self.config, self.side = config, side
        super().__init__({
            "group_last": In(1),
            "unit_last": In(1),
            "issue": In(1),
            "returned": In(1),
            "allowed": Out(1),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        ends_group, ends_unit = self.group_last | self.unit_last, self.unit_last

        def countdown(name, cycles, event):
            """High for ``cycles`` - 1 cycles after an event."""
            left = Signal(range(max(2, cycles)), name=name)
            with m.If(event):
                m.d.sync += left.eq(cycles - 1)
            with m.Elif(left != 0):
                m.d.sync += left.eq(left - 1)
            return left != 0

        group_waits = countdown("steps_left", steps(self.config, self.side),
                                self.issue & ends_group)
        unit_waits = countdown("unit_left", unit_cycles(self.config, self.side),
                               self.issue & ends_unit)
        most = capacity(self.config, self.side)
        room = Signal(range(most + 1), init=most)
        m.d.sync += room.eq(room - (self.issue & ends_unit) + self.returned)
        m.d.comb += [
            self.starved.eq(ends_unit & (room == 0)),
            self.allowed.eq(~(ends_group & group_waits) & ~(ends_unit & unit_waits)
                            & ~self.starved),
        ]
        return m


class Results(wiring.Component):
    """Finished chunks on their way to the post-processor.

    A chunk that is pushed appears at ``o`` `latency` = 2 cycles later, if none is before it.

    Members
    -------
    push : ``In(1)``
        A chunk ends here; there is room, because `Throttle` has reserved it.
    part : ``In``
        It is sums ``part`` * V/4 and the next ones.
    left : ``In``
        Chunks of its unit of work that have not been pushed, this one among them.
    sums : ``In``
        What the scale units show.
    o : ``Out(stream)``
        Chunks in order, see `chunk_layout`.
    returned : ``Out(1)``
        The last chunk of a unit of work is taken in this cycle.
    """

    latency = 2

    def __init__(self, config, side):
        self.config, self.side = config, side
        units = units_of(config, side)
        self.parts_of_row = units // config.quad
        super().__init__({
            "push": In(1),
            "part": In(range(max(2, self.parts_of_row))),
            "left": In(range(chunks_of_tile(config, side) + 1)),
            "sums": In(data.ArrayLayout(signed(tile_sum_width(config)), units)),
            "o": Out(stream.Signature(chunk_layout(config))),
            "returned": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        width, quad = tile_sum_width(self.config), self.config.quad
        bits, units = width * quad, capacity(self.config, self.side)
        depth = units * chunks_of_tile(self.config, self.side)

        # No chunk is read in the cycle in which it is written, and none is written over.
        m.submodules.queue = queue = memory.Memory(
            shape=bits, depth=depth, init=[], attrs=memory_attributes(depth))
        write, read = queue.write_port(), queue.read_port()
        waiting, fetch = Signal(range(depth + 1)), Signal()
        taken = self.o.valid & self.o.ready
        sums = self.sums.as_value()
        m.d.comb += [
            fetch.eq((waiting != 0) & (~self.o.valid | self.o.ready)),
            write.en.eq(self.push),
            write.data.eq(choose(self.part, [
                sums[first:first + bits] for first in range(0, len(sums), bits)])),
            read.en.eq(fetch),
        ]
        m.d.comb += [
            self.o.payload[number].eq(read.data[number * width:(number + 1) * width].as_signed())
            for number in range(quad)]
        m.d.sync += [
            waiting.eq(waiting + self.push - fetch),
            write.addr.eq(write.addr + self.push),
            read.addr.eq(read.addr + fetch),
            self.o.valid.eq(fetch | (self.o.valid & ~self.o.ready)),
        ]

        # Chunks of each unit of work, written with its first one.
        m.submodules.sizes = sizes = memory.Memory(
            shape=self.left.shape(), depth=units, init=[], attrs=memory_attributes(units))
        write_size, size = sizes.write_port(), sizes.read_port(domain="comb")
        begins, number = Signal(init=1), Signal.like(self.left)
        m.d.comb += [
            write_size.en.eq(self.push & begins),
            write_size.data.eq(self.left),
            self.returned.eq(taken & (number + 1 == size.data)),
        ]
        m.d.sync += [
            write_size.addr.eq(write_size.addr + write_size.en),
            size.addr.eq(size.addr + self.returned),
        ]
        with m.If(self.push):
            m.d.sync += begins.eq(self.left == 1)
        with m.If(self.returned):
            m.d.sync += number.eq(0)
        with m.Elif(taken):
            m.d.sync += number.eq(number + 1)
        return m
