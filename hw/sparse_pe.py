"""The sparse PE: every cycle one non-zero activation times L output channels."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Buffer
from .drain import Drain, delay, drive_unit, flush_chunks, group_layout, lanes_of_unit
from .mapper import WeightMapper
from .operands import Operands, Results, load_layout, scale_words, wire_load
from .parts import place
from .scale_unit import ScaleUnit, chunk_layout, connect_unit, unit_members
from .walker import WORD_QUEUE_DEPTH, Compactor, NonzeroWalker, word_layout
from .window import Window, geometry_layout

__all__ = ["SparseGroup", "SparsePE"]


class SparseGroup(wiring.Component):
    """One activation times the output channels that share a scale unit.

    A code enters with ``valid``; its products are added to the sums 2 cycles later (`Drain`'s
    cycle C when the code is the last of its group).

    Members
    -------
    valid, first : ``In(1)``
        A code, and whether it is the first of its group.
    code : ``In(signed(5))``
        Its value, -8 to 15.
    weights : ``In(4 * lanes)``
        Signed nibbles.
    load, step, lane, bank, first_add, scale, weight_scale, mx, flush_lane, flush_bank, flush_sum
        The members of `ScaleUnit` but for its sums.
    """

    def __init__(self, config, lanes):
        self.config, self.lanes = config, lanes
        super().__init__({
            "valid": In(1),
            "first": In(1),
            "code": In(signed(5)),
            "weights": In(4 * lanes),
            **unit_members(config, lanes),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.scale_unit = unit = ScaleUnit(self.config, self.lanes)
        code, weights = Signal(signed(5)), Signal.like(self.weights)
        m.d.sync += [code.eq(self.code), weights.eq(self.weights)]
        valid = delay(m, self.valid, 2, "valid")
        first = delay(m, self.first, 2, "first")
        for lane in range(self.lanes):
            product = Signal(signed(9), name=f"product_{lane}")
            total = Signal(signed(self.config.sum_width), name=f"sum_{lane}")
            m.d.sync += product.eq(code * weights.word_select(lane, 4).as_signed())
            with m.If(valid):
                m.d.sync += total.eq(Mux(first, 0, total) + product)
            m.d.comb += unit.sums[lane].eq(total)
        connect_unit(m, self, unit)
        return m


class SparsePE(wiring.Component):
    """Convolves the sparse channels for every ``sparse_pes``-th output pixel.

    Gathers: for each output pixel and tap it walks the non-zero codes of the input pixel, and
    each of them meets the weights of L output channels in one cycle. Zeros take no cycle, nor do
    taps outside the image. A group of scales with a non-zero takes at least
    L / sparse_scale_units cycles. Results leave in the order of `Window`, V/4 outputs at a time.

    Members
    -------
    geometry : ``In``
        See `geometry_layout`; ``words`` counts the sparse ones. W4A4 only.
    index : ``In``
        The first output pixel of this PE.
    start : ``In(1)``
        Begin; the PE must be idle.
    load_codes, load_scales, load_weights, load_weight_scales : ``In``
        Writes of the buffers; ``load_weights.enable`` has a bit for each V output channels.
    o : ``Out(stream)``
        See `chunk_layout`.
    busy, work, starved : ``Out(1)``
        Work is left; a non-zero is multiplied in this cycle; it waits for room for results.
    """

    def __init__(self, config):
        self.config = config
        self.lanes = lanes_of_unit(config.sparse_lanes, config.sparse_scale_units)
        self.parts = {"sparse_group": SparseGroup(config, self.lanes)}
        super().__init__({
            "geometry": In(geometry_layout(config)),
            "index": In(range(max(2, config.sparse_pes))),
            "start": In(1),
            "load_codes": In(load_layout(1, config.activation_depth, config.port_width)),
            "load_scales": In(load_layout(1, scale_words(config), config.port_width)),
            "load_weights": In(load_layout(
                config.sparse_lanes // config.vector, config.sparse_weight_depth,
                config.port_width)),
            "load_weight_scales": In(load_layout(
                1, config.weight_scale_depth, 8 * config.sparse_scale_units)),
            "o": Out(stream.Signature(chunk_layout(config))),
            "busy": Out(1),
            "work": Out(1),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, geometry = self.config, self.geometry
        lanes, units, vector = config.sparse_lanes, config.sparse_scale_units, config.vector
        columns = lanes // vector
        m.submodules.window = window = Window(config, lanes=lanes, step=config.sparse_pes)
        m.submodules.compactor = compactor = Compactor(config)
        m.submodules.walker = walker = NonzeroWalker(config)
        m.submodules.drain = drain = Drain(
            config, lanes=lanes, units=units, scale_depth=config.weight_scale_depth)
        m.submodules.operands = operands = Operands(config)
        m.submodules.weights = weights = Buffer(
            config.sparse_weight_depth, 4 * lanes, columns=columns)
        m.submodules.weight_scales = weight_scales = Buffer(
            config.weight_scale_depth, 8 * units)
        m.d.comb += wire_load(self.load_weight_scales, weight_scales)
        m.d.comb += [
            weights.write.eq(self.load_weights.enable),
            weights.write_address.eq(self.load_weights.address),
            weights.write_data.eq(self.load_weights.data.replicate(columns)),
            operands.load_codes.eq(self.load_codes),
            operands.load_scales.eq(self.load_scales),
            operands.geometry.eq(geometry),
            window.geometry.eq(geometry),
            window.first.eq(self.index),
            window.start.eq(self.start),
        ]

        # fetch: the words of the input pixel under each tap, while there is room for them
        tap = window.o.payload
        word, room = Signal.like(geometry.words), Signal(
            range(WORD_QUEUE_DEPTH + 1), init=WORD_QUEUE_DEPTH)
        fetch, last_word = Signal(), Signal()
        m.d.comb += [
            fetch.eq(window.o.valid & (room != 0)),
            last_word.eq(word + 1 == geometry.words),
            window.o.ready.eq((room != 0) & last_word),
            operands.issue.eq(fetch),
            operands.word.eq(word),
            operands.pixel.eq(tap.pixel),
        ]
        with m.If(fetch):
            m.d.sync += word.eq(Mux(last_word, 0, word + 1))
        m.d.sync += room.eq(room - fetch + compactor.dropped + walker.taken)
        fetched = Signal(word_layout(config))
        m.d.comb += [
            fetched.word.eq(word), fetched.tap.eq(tap.tap), fetched.tile.eq(tap.tile),
            fetched.chunks.eq(tap.chunks), fetched.group_last.eq(last_word),
            fetched.tile_last.eq(last_word & tap.last),
            compactor.i_valid.eq(operands.valid),
            compactor.i.eq(delay(m, fetched.as_value(), Operands.latency, "fetched")),
            compactor.i.codes.eq(operands.codes),
            compactor.i.scale.eq(operands.scale),
            walker.i_valid.eq(compactor.o_valid),
            walker.i.eq(compactor.o),
        ]

        # cycle 0: a non-zero; 1: its weights' address; 2 and 3: the read; 4: to the groups
        m.submodules.weight_mapper = weight_mapper = WeightMapper(config)
        tiles, tap_rows = Signal(10), Signal(16)
        entry = walker.entry
        slot, offset, request = Signal(16), Signal(16), Signal()
        group_row, tile_step, scale_row = Signal(16), Signal(16), Signal(16)
        m.d.sync += [
            tiles.eq((geometry.output_words + (columns - 1)) >> columns.bit_length() - 1),
            tap_rows.eq(Mux(geometry.kernel3, tiles * 9, tiles)),
            slot.eq(entry.word * vector + walker.channel),
            offset.eq(entry.tap * tiles + entry.tile),
            request.eq(walker.issue & walker.nonzero),
            weights.request.eq(request),
            weights.address.eq(weight_mapper.address),
            # weight scales lie as [tap][step of all tiles]
            group_row.eq(entry.tap * (geometry.output_words * (vector // units))),
            tile_step.eq(entry.tile * self.lanes),
            scale_row.eq(group_row + tile_step),
        ]
        m.d.comb += [
            weight_mapper.slot.eq(slot),
            weight_mapper.row_words.eq(tap_rows),
            weight_mapper.offset.eq(offset),
        ]
        code = Signal(signed(5))
        m.d.comb += code.eq(Mux(
            walker.nonzero,
            Cat(walker.code, walker.code[3] & geometry.signed_codes).as_signed(), 0))
        group = Signal(group_layout(config, lanes, config.weight_scale_depth))
        m.d.comb += [
            group.first.eq(walker.tile_first), group.last.eq(walker.tile_last),
            group.chunks.eq(entry.chunks), group.scale.eq(entry.scale),
            drain.group_valid.eq(delay(m, walker.issue & walker.group_last, 6, "ends")),
            drain.group.eq(delay(m, group.as_value(), 6, "end")),
            drain.group.row.eq(delay(m, scale_row, 4, "scale_row")),
            weight_scales.request.eq(drain.scale_request),
            weight_scales.address.eq(drain.scale_row),
        ]
        valid = delay(m, walker.issue, 4, "issued")
        first = delay(m, walker.group_first, 4, "group_first")
        code = delay(m, code, 4, "code")

        groups = []
        for unit in range(units):
            part = place(m, f"group_{unit}", "sparse_group", self.parts["sparse_group"])
            m.d.comb += [
                part.valid.eq(valid),
                part.first.eq(first),
                part.code.eq(code),
                part.weights.eq(Cat(
                    weights.data.word_select(lane, 4) for lane in range(unit, lanes, units))),
                part.weight_scale.eq(weight_scales.data.word_select(unit, 8)),
                part.mx.eq(0),
            ]
            drive_unit(m, drain, part)
            groups.append(part)
        m.submodules.results = results = Results(config)
        flush_chunks(m, config, drain, groups, units, results.chunk, results.push)
        m.d.comb += walker.popped.eq(results.popped)
        wiring.connect(m, results.o, wiring.flipped(self.o))

        # busy until the last non-zero of the last tile is issued
        tiles_open = Signal(range(WORD_QUEUE_DEPTH + 2))
        m.d.sync += tiles_open.eq(
            tiles_open + (fetch & fetched.tile_last) - (walker.issue & walker.tile_last))
        m.d.comb += [
            self.busy.eq(window.o.valid | (tiles_open != 0)),
            self.work.eq(walker.issue & walker.nonzero),
            self.starved.eq(walker.starved),
        ]
        return m
