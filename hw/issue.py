"""From the groups of a PE's units of work to one product a cycle."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Buffer
from .drain import Throttle, delay, group_layout, scale_rows_of
from .job import geometry_layout, load_layout, most_tiles, record_layout
from .window import own_tiles, tap_layout

__all__ = ["ISSUE_CYCLES", "Issue", "product_layout"]

ISSUE_CYCLES = Buffer.latency + 2     # from a group of `Window` to its first issue
QUEUE_DEPTH = ISSUE_CYCLES            # groups on that way when one is issued every cycle


def product_layout(config, side):
    """One issue.

    Members
    -------
    address : entry, or word of codes
    row : row of weights of the word (dense), or of position 0 (sparse)
    first : first issue of its group
    empty : there is no operand; the codes count as zeros
    masked : codes of positions below ``high`` count as zeros
    codes_signed, weights_signed : nibbles are two's complement
    """
    depth, rows = ((config.codes_depth, config.weight_depth) if side == "dense"
                   else (config.entry_depth, config.sparse_weight_depth))
    return data.StructLayout({
        "address": range(depth), "row": range(rows), "first": 1, "empty": 1, "masked": 1,
        "codes_signed": 1, "weights_signed": 1})


class Issue(wiring.Component):
    """Reads the records of groups and issues their words or entries, one a cycle.

    A group takes a cycle for each of its words or entries. Of W4A4, the split of the output pixel
    says how many: ``low`` or ``high`` words on the dense side; on the sparse side all entries, or
    those behind the first ``skip``. An empty one takes a cycle in which nothing is issued, but the
    last group of a unit is then issued as one empty product. A null unit takes a cycle. Nothing
    stalls this but `Throttle`, and the last issue of a scaled group alone: the queue of groups is
    filled one a cycle, so it is never empty from the first issue, `ISSUE_CYCLES` after the first
    group came, to the last.

    Parameters
    ----------
    side : str
        "dense" or "sparse".

    Members
    -------
    geometry : ``In``
        See `hw.job.geometry_layout`.
    i : ``In(stream)``
        Groups from `Window`.
    load_records : ``In``
        Writes of the records, see `hw.job.record_layout`.
    returned : ``In(1)``
        The last chunk of a unit's results has been taken.
    fire : ``Out(1)``
        A product is issued.
    product : ``Out``
        See `product_layout`; with ``fire``.
    ends : ``Out(1)``
        It is the last one of a group.
    group : ``Out``
        See `hw.drain.group_layout`; with ``ends``. An empty group of W4A4 has scale 0.
    busy : ``Out(1)``
        From the cycle after a group came until the last group has left.
    starved : ``Out(1)``
        The last issue of a unit waits for room for its results.
    """

    def __init__(self, config, *, side):
        self.config, self.side = config, side
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "i": In(stream.Signature(tap_layout(config, side))),
            "load_records": In(load_layout(
                1, config.record_depth, record_layout(config, side).size)),
            "returned": In(1),
            "fire": Out(1),
            "product": Out(product_layout(config, side)),
            "ends": Out(1),
            "group": Out(group_layout(config, side)),
            "busy": Out(1),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, side, geometry = self.config, self.side, self.geometry
        record_of_pixel = record_layout(config, side)
        m.submodules.records = records = Buffer(config.record_depth, record_of_pixel.size)
        records.connect_load(m, self.load_records)
        waiting_layout = data.StructLayout({
            "start": record_of_pixel["start"].shape, "count": record_of_pixel["count"].shape,
            "scale": 8, "row": self.product.row.shape(),
            "scale_row": range(scale_rows_of(config, side)),
            "plane": 2, "high": 1, "last": 1, "null": 1, "chunks": self.group.chunks.shape(),
        })
        m.submodules.queue = queue = fifo.SyncFIFO(width=waiting_layout.size, depth=QUEUE_DEPTH)

        # cycle 0: read the record; number of the group's rows in units of the pitch
        tap, credit = self.i.payload, Signal(range(QUEUE_DEPTH + 1), init=QUEUE_DEPTH)
        taken = Signal()
        most = own_tiles(config, side)
        tiles = Signal(range(most + 1))      # of this PE
        if side == "dense":
            m.d.sync += tiles.eq(geometry.tiles)
            pitch_bits = (config.tile_channels // config.vector).bit_length()
        else:
            with m.Switch(geometry.tiles):
                for count in range(1, most_tiles(config, side) + 1):
                    with m.Case(count):
                        m.d.sync += tiles.eq(max(1, count // config.sparse_pes))
            pitch_bits = config.tile_channels.bit_length()
        m.d.comb += [
            self.i.ready.eq(credit != 0),
            taken.eq(self.i.valid & self.i.ready),
            records.request.eq(taken),
            records.address.eq(tap.record),
        ]
        m.d.sync += credit.eq(credit - taken + queue.r_en)
        steps = getattr(config, f"{side}_steps")
        number, scale_number = Signal(range(18 * most)), Signal(range(9 * most))
        rows = Signal.like(self.product.row)
        scale_row = Signal(range(scale_rows_of(config, side)))
        m.d.sync += [
            number.eq(Mux(geometry.mx, Cat(tap.plane[0], tap.tap), tap.tap) * tiles + tap.tile),
            scale_number.eq(tap.tap * tiles + tap.tile),
            # cycle 1
            rows.eq(number * geometry.pitch[:pitch_bits]),
            scale_row.eq(scale_number * steps),
        ]
        # cycle 2: the record is here
        arriving, record = Signal(waiting_layout), Signal(record_of_pixel)
        passed = Cat(tap.plane, tap.high, tap.last, tap.null, tap.chunks)
        start, count = record.start, record.count
        if side == "dense":
            count = Mux(geometry.mx, count, Mux(arriving.high, geometry.high, geometry.low))
        else:
            left_out = Mux(arriving.high, record.skip, 0)
            start, count = start + left_out, count - left_out
        m.d.comb += [
            record.eq(records.data),
            arriving.start.eq(start), arriving.count.eq(count), arriving.scale.eq(record.scale),
            arriving.row.eq(geometry.weights + rows),
            arriving.scale_row.eq(geometry.weight_scales + scale_row),
            Cat(arriving.plane, arriving.high, arriving.last, arriving.null, arriving.chunks).eq(
                delay(m, passed, Buffer.latency, "passed")),
            queue.w_en.eq(records.response),
            queue.w_data.eq(arriving),
        ]

        # the group that is issued
        waiting, here, valid = Signal(waiting_layout), Signal(waiting_layout), Signal()
        first, empty, last, scaled, leaves = (Signal() for _ in range(5))
        product, group = self.product, self.group
        m.submodules.throttle = throttle = Throttle(config, side)
        m.d.comb += [
            waiting.eq(queue.r_data),
            throttle.group_last.eq(valid & scaled & last),
            throttle.unit_last.eq(valid & scaled & last & here.last),
            throttle.returned.eq(self.returned),
            self.starved.eq(throttle.starved),
            self.fire.eq(valid & scaled & (~last | throttle.allowed)),
            self.ends.eq(valid & scaled & last & throttle.allowed),
            throttle.issue.eq(self.ends),
            leaves.eq(valid & last & (~scaled | throttle.allowed)),
            queue.r_en.eq(queue.r_rdy & (~valid | leaves)),
            self.busy.eq(valid | (credit != QUEUE_DEPTH)),
            product.address.eq(here.start),
            product.row.eq(here.row),
            product.first.eq(first),
            product.empty.eq(empty),
            product.masked.eq(here.high),
            product.codes_signed.eq(Mux(geometry.mx, here.plane[1], geometry.signed_codes)),
            product.weights_signed.eq(~geometry.mx | here.plane[0]),
            group.row.eq(here.scale_row),
            group.scale.eq(Mux(empty & ~geometry.mx, 0, here.scale)),
            group.mx.eq(geometry.mx),
            group.power.eq(here.plane[0] + here.plane[1]),
            group.last.eq(here.last),
            group.chunks.eq(here.chunks),
        ]
        with m.If(leaves):
            m.d.sync += valid.eq(0)
        with m.If(self.fire):
            m.d.sync += [
                first.eq(0), last.eq(here.count == 2),
                here.count.eq(here.count - 1),
                here.start.eq(here.start + 1),
            ]
            if side == "dense":
                m.d.sync += here.row.eq(here.row + 1)
        with m.If(queue.r_en):
            m.d.sync += [
                valid.eq(1), here.eq(waiting), first.eq(1),
                last.eq(waiting.null | (waiting.count[1:] == 0)),
                empty.eq(waiting.count == 0),
                scaled.eq(~waiting.null & ((waiting.count != 0) | waiting.last)),
            ]
        return m
