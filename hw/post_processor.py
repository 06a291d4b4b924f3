"""The post-processor: from exact sums of both sides to the 16-bit results of a convolution."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .buffer import Buffer
from .drain import delay
from .job import load_layout, run_layout, table_depth
from .layer import layer_layout
from .mapper import ActivationMapper
from .memory_guard import inside
from .memory_port import ReadPort, WritePort
from .parts import place
from .rounding import round_half_even, saturate
from .scale_unit import chunk_layout

__all__ = ["EpilogueLane", "PostProcessor"]


class EpilogueLane(wiring.Component):
    """Epilogue of one output channel; named steps as in ``golden.epilogue``.

    Sums enter every cycle; the result appears `latency` = 8 cycles later. What belongs to the sums
    of a cycle comes as many cycles later as its member says.

    Members
    -------
    dense, sparse : ``In(signed(accumulator_width))``
        Exact sums of both sides.
    residual : ``In(signed(16))``
    partial : ``In(signed(accumulator_width))``
        Sum of the tiles before; 2 cycles later.
    total : ``Out(signed(accumulator_width))``
        Sum of all three; 3 cycles later.
    align_shift : ``In(5)``
        3 cycles later.
    multiplier : ``In(signed(16))``
        3 cycles later.
    bias : ``In(signed(32))``
        In 2^-16 of the result's unit; 3 cycles later.
    residual_multiplier : ``In(16)``
        In 2^-14; 4 cycles later.
    scale_shift : ``In(5)``
        5 cycles later.
    result : ``Out(signed(16))``
    """

    latency = 8
    partial_cycles = 2      # how much later than the sums each of them comes
    total_cycles = 3
    align_cycles = 3
    table_cycles = 3
    residual_cycles = 4
    scale_cycles = 5

    def __init__(self, config):
        super().__init__({
            "dense": In(signed(config.accumulator_width)),
            "sparse": In(signed(config.accumulator_width)),
            "residual": In(signed(16)),
            "partial": In(signed(config.accumulator_width)),
            "total": Out(signed(config.accumulator_width)),
            "align_shift": In(5),
            "multiplier": In(signed(16)),
            "bias": In(signed(32)),
            "residual_multiplier": In(16),
            "scale_shift": In(5),
            "result": Out(signed(16)),
        })

    def elaborate(self, platform):
        m = Module()
        sides = Signal.like(self.dense)
        aligned, multiplier = Signal(signed(32)), Signal(signed(16))
        product = Signal(signed(48))
        scaled, biased = Signal(signed(49)), Signal(signed(51))
        m.d.sync += [
            sides.eq(self.dense + self.sparse),                                         # cycle 0
            self.total.eq(delay(m, sides, 1, "sides") + self.partial),                  # cycle 2
            aligned.eq(saturate(round_half_even(self.total, self.align_shift), 32)),    # cycle 3
            multiplier.eq(self.multiplier),
            product.eq(aligned * multiplier),                                           # cycle 4
            scaled.eq(round_half_even(product, self.scale_shift)),                      # cycle 5
        ]
        residual = Signal(signed(33))
        m.d.sync += residual.eq(delay(m, self.residual, self.residual_cycles, "residual")
                                * self.residual_multiplier)                             # cycle 4
        residual = delay(m, residual, 1, "residual_product")
        bias = delay(m, self.bias, 3, "bias")
        m.d.sync += [
            biased.eq(scaled + bias + (residual << 2)),                                 # cycle 6
            self.result.eq(saturate(round_half_even(biased, 16), 16)),                  # cycle 7
        ]
        return m


class PostProcessor(wiring.Component):
    """Adds both sides' sums, applies the epilogue and writes results, V/4 outputs a cycle.

    Takes the chunks of a run pixel by pixel, output channels ascending, from the PEs of each side
    in turn. A W4A4 pixel has sums of the sparse side, and of the dense side where the split leaves
    it a word; an MX8 pixel has those of one side (``share``). The last word of outputs is filled up
    with chunks of zeros, a cycle each. A chunk waits until the sides that it needs have it, its
    residual has arrived and there is room on the way to memory.

    With ``accumulate`` the sums that the job before has kept are added; with ``keep_sums`` sums are
    kept and neither residuals nor chunks of zeros nor results have a place. Partial sums count
    chunks from the job's start on. Each is read and written back within `EpilogueLane.total_cycles`
    of its chunk, which is less than the PEs take until the first chunk of the next run.

    Residuals are fetched ahead from the job's start on, over all of its runs, once everything that
    was written before is in memory.

    Members
    -------
    layer : ``In``
        See `layer_layout`; of the job that is computed, from its first run's ``start`` until its
        last run has ended.
    run : ``In(run_layout)``
        Stable while ``merging``.
    load_table : ``In``
        Writes of the epilogue table: port words; the top bit of the address is the bank.
    start : ``In(1)``
        Begin a run.
    i_dense_0, ..., i_sparse_0, ... : ``In(stream)``
        See `chunk_layout`.
    settled : ``In(1)``
        No write is on its way in memory.
    read : ``Out(ReadPort)``
        Residual tensor.
    write : ``Out(WritePort)``
        Results; ``done`` is not used.
    write_inside : ``Out(1)``
        The write that is offered lies in its descriptor's window.
    merging : ``Out(1)``
        From the cycle after ``start`` until the last chunk of the run has been taken.
    ended : ``Out(1)``
        It is taken in this cycle.
    busy : ``Out(1)``
        Until the last result is on its way to memory.
    blocked : ``Out(1)``
        A chunk waits for nothing but the memory port.
    """

    queue_depth = 16

    def __init__(self, config):
        self.config = config
        self.parts = {"epilogue_lane": EpilogueLane(config)}
        super().__init__({
            "layer": In(layer_layout(config)),
            "run": In(run_layout(config)),
            "load_table": In(load_layout(1, table_depth(config), config.port_width)),
            "start": In(1),
            **{f"i_{side}_{number}": In(stream.Signature(chunk_layout(config)))
               for side, pes in (("dense", config.dense_pes), ("sparse", config.sparse_pes))
               for number in range(pes)},
            "settled": In(1),
            "read": Out(ReadPort(config)),
            "write": Out(WritePort(config)),
            "write_inside": Out(1),
            "merging": Out(1),
            "ended": Out(1),
            "busy": Out(1),
            "blocked": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, layer, quad = self.config, self.layer, self.config.quad
        begins = self.start & self.run.first
        needs_residual, gives_results = Signal(), Signal()
        m.d.comb += [
            gives_results.eq(~layer.keep_sums),
            needs_residual.eq(layer.residual & ~layer.keep_sums),
        ]
        # results that have been taken and are not yet on their way to memory
        room = Signal(range(self.queue_depth + 1), init=self.queue_depth)
        empty = Signal()
        m.d.comb += empty.eq(room == self.queue_depth)

        # residual: one word ahead for each chunk
        m.submodules.residual_walk = residual_walk = ChunkWalk(config)
        m.submodules.residual_mapper = residual_mapper = ActivationMapper(config)
        m.submodules.residuals = residuals = fifo.SyncFIFOBuffered(
            width=config.port_width, depth=self.queue_depth)
        residual_room = Signal(range(self.queue_depth + 1), init=self.queue_depth)
        asked, early = Signal(), Signal()
        with m.If(begins):
            m.d.sync += early.eq(1)
        with m.Elif(empty & self.settled):
            m.d.sync += early.eq(0)
        m.d.comb += [
            residual_walk.layer.eq(layer),
            residual_walk.start.eq(begins & needs_residual),
            residual_mapper.base.eq(layer.residual_source),
            residual_mapper.plane.eq(layer.plane),
            residual_mapper.word.eq(residual_walk.word),
            residual_mapper.pixel.eq(residual_walk.pixel),
            residual_mapper.unit.eq(2),
            residual_mapper.sub.eq(residual_walk.sub),
            self.read.request.valid.eq(residual_walk.valid & (residual_room != 0) & ~early),
            self.read.request.payload.eq(residual_mapper.address),
            asked.eq(self.read.request.valid & self.read.request.ready),
            residual_walk.advance.eq(asked),
            self.read.response.ready.eq(residuals.w_rdy),
            residuals.w_en.eq(self.read.response.valid),
            residuals.w_data.eq(self.read.response.payload),
        ]

        # where the next chunk comes from
        m.submodules.walk = walk = ChunkWalk(config)
        place_bits = len(walk.word) + 2
        chunk, outputs_before = Signal(place_bits), Signal(place_bits + quad.bit_length() - 1)
        take, real = Signal(), Signal()
        turn, dense_pixel = Signal(8), Signal()             # MX8: whose pixel it is
        phase, phase_sum = Signal(8), Signal(9)             # W4A4: where the split is
        dense_words = Signal(range(config.tile_channels + 1))
        rows_left = Signal(16)
        geometry = self.run.dense if config.dense_pes else self.run.sparse
        m.d.comb += [
            chunk.eq(Cat(walk.sub, walk.word)),
            outputs_before.eq(chunk * quad),
            real.eq(chunk < layer.chunks),
            dense_pixel.eq(turn + 1 == layer.share),
            phase_sum.eq(phase + self.run.dense.cut),
            dense_words.eq(Mux(phase_sum[8], self.run.dense.high, self.run.dense.low)),
            walk.layer.eq(layer),
            walk.start.eq(begins),
            walk.advance.eq(take),
            self.ended.eq(take & walk.row_last & (rows_left == 1)),
        ]
        with m.If(take & walk.pixel_last):
            m.d.sync += [turn.eq(Mux(dense_pixel, 0, turn + 1)), phase.eq(phase_sum)]
        with m.If(take & walk.row_last):
            m.d.sync += rows_left.eq(rows_left - 1)
        with m.If(self.ended):
            m.d.sync += self.merging.eq(0)
        with m.If(self.start):
            m.d.sync += [
                self.merging.eq(1), turn.eq(0), phase.eq(0), rows_left.eq(geometry.rows)]

        def choose(side, pes, lanes, here, counts):
            """Need and validity of one side's chunk, and the chunk of the PE whose turn it is.

            ``here``: the side has a sum at this pixel; ``counts``: the pixel is one of its units'.
            """
            need, valid, sums = (Signal(name=f"{side}_need"), Signal(name=f"{side}_valid"),
                                 Signal(chunk_layout(config), name=f"{side}_sums"))
            m.d.comb += need.eq(real & self.run[side].active & here)
            number = Signal(range(max(2, pes)), name=f"{side}_number")
            tile_bits = (lanes // quad).bit_length() - 1
            whole = chunk[:tile_bits].all() if tile_bits else 1
            tile_last = (chunk + 1 == layer.chunks) | whole
            with m.If(take & real & counts & tile_last):
                m.d.sync += number.eq(Mux(number == pes - 1, 0, number + 1))
            with m.If(self.start):
                m.d.sync += number.eq(0)
            with m.Switch(number):
                for pe in range(pes):
                    port = getattr(self, f"i_{side}_{pe}")
                    with m.Case(pe):
                        m.d.comb += [
                            valid.eq(port.valid), port.ready.eq(take & need),
                            sums.eq(Mux(need, port.payload.as_value(), 0)),
                        ]
            return need, valid, sums

        dense_need, dense_valid, dense = choose(
            "dense", config.dense_pes, config.dense_lanes,
            Mux(layer.mx, dense_pixel, dense_words != 0), ~layer.mx | dense_pixel)
        sparse_need, sparse_valid, sparse = choose(
            "sparse", config.sparse_pes, config.sparse_lanes, ~(layer.mx & dense_pixel), 1)
        summed, served = Signal(), Signal()
        m.d.comb += [
            summed.eq(self.merging & (~dense_need | dense_valid) & (~sparse_need | sparse_valid)),
            served.eq((~gives_results | (room != 0)) & (~needs_residual | residuals.r_rdy)),
            take.eq(summed & served),
            self.blocked.eq(summed & ~served),
            residuals.r_en.eq(take & needs_residual),
        ]
        m.d.sync += residual_room.eq(residual_room - asked + residuals.r_en)

        # partial sums
        m.submodules.partials = partials = Buffer(
            config.partial_depth, quad * config.accumulator_width)
        partial = Signal(range(config.partial_depth))
        with m.If(take & real):
            m.d.sync += partial.eq(partial + 1)
        with m.If(begins):
            m.d.sync += partial.eq(0)
        accumulate = delay(
            m, layer.accumulate & take & real, EpilogueLane.partial_cycles, "accumulate")
        m.d.comb += [
            partials.request.eq(layer.accumulate & take),
            partials.address.eq(partial),
            partials.write.eq(delay(
                m, layer.keep_sums & take & real, EpilogueLane.total_cycles, "keep")),
            partials.write_address.eq(delay(m, partial, EpilogueLane.total_cycles, "partial")),
        ]

        # table
        depth = table_depth(config)
        words_of_row = 64 * quad // config.port_width
        column_bits = (words_of_row - 1).bit_length()
        row_bits = (depth // 2 // words_of_row - 1).bit_length()
        m.submodules.table = table = memory.Memory(
            shape=64 * quad, depth=depth // words_of_row, init=[])
        write = table.write_port(granularity=config.port_width)
        read = table.read_port()
        row = Signal(row_bits + 1)
        m.d.comb += [
            write.addr.eq(self.load_table.address >> column_bits),
            write.data.eq(self.load_table.data.replicate(words_of_row)),
            write.en.eq(self.load_table.enable << self.load_table.address[:column_bits]),
            row.eq(Cat(chunk[:row_bits], self.run.bank)),
            read.addr.eq(delay(m, row, EpilogueLane.table_cycles - 1, "row")),
        ]

        # Fields travel with their sums: the next job's may come two cycles after the last chunk.
        align_shift = delay(m, layer.align_shift[:5], EpilogueLane.align_cycles, "align_shift")
        scale_shift = delay(m, layer.shift[:5], EpilogueLane.scale_cycles, "scale_shift")
        multiplier = delay(
            m, layer.residual_multiplier, EpilogueLane.residual_cycles, "residual_multiplier")
        lanes = []
        for number in range(quad):
            lane = place(m, f"lane_{number}", "epilogue_lane", self.parts["epilogue_lane"])
            entry = read.data.word_select(number, 64)
            kept = partials.data.word_select(number, config.accumulator_width).as_signed()
            m.d.comb += [
                lane.dense.eq(dense[number]),
                lane.sparse.eq(sparse[number]),
                lane.partial.eq(Mux(accumulate, kept, 0)),
                lane.residual.eq(Mux(
                    needs_residual, residuals.r_data.word_select(number, 16).as_signed(), 0)),
                lane.bias.eq(entry[:32].as_signed()),
                lane.multiplier.eq(entry[32:48].as_signed()),
                lane.align_shift.eq(align_shift),
                lane.scale_shift.eq(scale_shift),
                lane.residual_multiplier.eq(multiplier),
            ]
            lanes.append(lane)
        m.d.comb += partials.write_data.eq(Cat(lane.total for lane in lanes))

        # to memory
        m.submodules.mapper = mapper = ActivationMapper(config)
        m.submodules.results = results = fifo.SyncFIFOBuffered(
            width=1 + config.address_width + config.port_width, depth=self.queue_depth)
        latency = EpilogueLane.latency
        arriving = delay(m, take & gives_results, latency, "taken")
        # Nothing is loaded for lanes beyond the outputs, and their table may be anything.
        exists = delay(m, Cat(outputs_before + number < layer.outputs for number in range(quad)),
                       latency, "exists")
        address = delay(m, mapper.address, 1, "address_taken")
        allowed = delay(m, inside(address, layer.write_base, layer.write_limit), latency - 1,
                        "allowed")
        address = delay(m, address, latency - 1, "address")
        sent = Signal()
        m.d.comb += [
            mapper.base.eq(layer.destination), mapper.plane.eq(layer.plane),
            mapper.word.eq(walk.word), mapper.pixel.eq(walk.pixel), mapper.unit.eq(2),
            mapper.sub.eq(walk.sub),
            results.w_en.eq(arriving),
            results.w_data.eq(Cat(
                allowed, address,
                (Mux(exists[number], lane.result, 0)[:16] for number, lane in enumerate(lanes)))),
            self.write.request.valid.eq(results.r_rdy),
            Cat(self.write_inside, self.write.request.payload.address,
                self.write.request.payload.data).eq(results.r_data),
            self.write.request.payload.strobe.eq(-1),
            results.r_en.eq(self.write.request.ready),
            sent.eq(self.write.request.valid & self.write.request.ready),
            self.busy.eq(self.merging | ~empty),
        ]
        m.d.sync += room.eq(room - (take & gives_results) + sent)
        return m


class ChunkWalk(wiring.Component):
    """Walks the chunks of a job: pixels of its tile row by row, words of outputs, four chunks each.

    With ``keep_sums`` the chunks of a pixel end with its outputs, else with the last word.

    Members
    -------
    layer : ``In``
        See `layer_layout`.
    start, advance : ``In(1)``
        Begin with the first chunk; go to the next one.
    valid : ``Out(1)``
        ``pixel``, ``word`` and ``sub`` are a chunk.
    pixel_last, row_last : ``Out(1)``
        It is the last one of its pixel; and of its row.
    """

    def __init__(self, config):
        layer = layer_layout(config)
        super().__init__({
            "layer": In(layer),
            "start": In(1),
            "advance": In(1),
            "valid": Out(1),
            "pixel": Out(16),
            "word": Out(layer["output_words"].shape),
            "sub": Out(2),
            "pixel_last": Out(1),
            "row_last": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        layer = self.layer
        columns_left, rows_left = Signal(16), Signal(16)
        chunk = Cat(self.sub, self.word)
        m.d.comb += [
            self.pixel_last.eq(Mux(
                layer.keep_sums, chunk + 1 == layer.chunks,
                (self.sub == 3) & (self.word + 1 == layer.output_words))),
            self.row_last.eq(self.pixel_last & (columns_left == 1)),
        ]
        with m.If(self.advance):
            m.d.sync += chunk.eq(chunk + 1)
            with m.If(self.pixel_last):
                m.d.sync += [chunk.eq(0), self.pixel.eq(self.pixel + 1),
                             columns_left.eq(columns_left - 1)]
            with m.If(self.row_last):
                m.d.sync += [
                    self.pixel.eq(self.pixel + 1 + layer.width - layer.tile_width),
                    columns_left.eq(layer.tile_width), rows_left.eq(rows_left - 1),
                    self.valid.eq(rows_left != 1),
                ]
        with m.If(self.start):
            m.d.sync += [
                self.valid.eq(1), chunk.eq(0), self.pixel.eq(layer.origin),
                columns_left.eq(layer.tile_width), rows_left.eq(layer.tile_height),
            ]
        return m
