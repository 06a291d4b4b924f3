"""The post-processor: from exact sums of both sides to the 16-bit results of a convolution."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import fifo, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .drain import delay
from .layer import layer_layout
from .mapper import ActivationMapper
from .memory_port import ReadPort, WritePort
from .operands import load_layout
from .parts import place
from .rounding import round_half_even, saturate
from .scale_unit import chunk_layout

__all__ = ["EpilogueLane", "PostProcessor"]


class EpilogueLane(wiring.Component):
    """Epilogue of one output channel; named steps as in ``golden.epilogue``.

    A sum enters every cycle; its result appears `latency` = 6 cycles later. ``multiplier`` and
    ``bias`` belong to the sum of the cycle before, ``residual`` to the sum of the same cycle.

    Members
    -------
    dense, sparse : ``In(signed(accumulator_width))``
        Exact sums of both sides.
    residual : ``In(signed(16))``
    multiplier : ``In(signed(16))``
    bias : ``In(signed(32))``
        In 2^-16 of the result's unit.
    align_shift, scale_shift : ``In(5)``
    residual_multiplier : ``In(16)``
        In 2^-14.
    result : ``Out(signed(16))``
    """

    latency = 6

    def __init__(self, config):
        super().__init__({
            "dense": In(signed(config.accumulator_width)),
            "sparse": In(signed(config.accumulator_width)),
            "residual": In(signed(16)),
            "multiplier": In(signed(16)),
            "bias": In(signed(32)),
            "align_shift": In(5),
            "scale_shift": In(5),
            "residual_multiplier": In(16),
            "result": Out(signed(16)),
        })

    def elaborate(self, platform):
        m = Module()
        total = Signal.like(self.dense)
        aligned, multiplier = Signal(signed(32)), Signal(signed(16))
        product = Signal(signed(48))
        scaled, biased = Signal(signed(49)), Signal(signed(51))
        m.d.sync += [
            total.eq(self.dense + self.sparse),                                         # cycle 0
            aligned.eq(saturate(round_half_even(total, self.align_shift), 32)),         # cycle 1
            multiplier.eq(self.multiplier),
            product.eq(aligned * multiplier),                                           # cycle 2
            scaled.eq(round_half_even(product, self.scale_shift)),                      # cycle 3
        ]
        residual = Signal(signed(33))
        m.d.sync += residual.eq(
            delay(m, self.residual, 2, "residual") * self.residual_multiplier)          # cycle 2
        residual = delay(m, residual, 1, "residual_product")
        bias = delay(m, self.bias, 3, "bias")
        m.d.sync += [
            biased.eq(scaled + bias + (residual << 2)),                                 # cycle 4
            self.result.eq(saturate(round_half_even(biased, 16), 16)),                  # cycle 5
        ]
        return m


class PostProcessor(wiring.Component):
    """Adds both sides' sums, applies the epilogue and writes results, V/4 outputs a cycle.

    Takes chunks pixel by pixel, output channels ascending, the sparse ones from the PEs in turn.
    Padding of the last word of outputs is written as zeros. A chunk waits until each side that
    takes part has it, the residual has arrived and there is room on the way to memory.

    Members
    -------
    layer : ``In``
        See `layer_layout`; stable while busy.
    dense_part, sparse_part : ``In(1)``
        Whether that side has channels; the other's sums are zero.
    load_table : ``In``
        Writes of the epilogue table: port words.
    start : ``In(1)``
        Begin.
    i_dense, i_sparse_0, ... : ``In(stream)``
        See `chunk_layout`.
    read : ``Out(ReadPort)``
        Residual tensor.
    write : ``Out(WritePort)``
        Results.
    busy : ``Out(1)``
        Until the last result is on its way to memory.
    merging : ``Out(1)``
        Until the last chunk has been taken.
    """

    queue_depth = 16

    def __init__(self, config):
        self.config = config
        self.entries = config.port_width // 64      # table entries in a port word
        self.parts = {"epilogue_lane": EpilogueLane(config)}
        super().__init__({
            "layer": In(layer_layout(config)),
            "dense_part": In(1),
            "sparse_part": In(1),
            "load_table": In(load_layout(
                1, config.max_outputs // self.entries, config.port_width)),
            "start": In(1),
            "i_dense": In(stream.Signature(chunk_layout(config))),
            **{f"i_sparse_{number}": In(stream.Signature(chunk_layout(config)))
               for number in range(config.sparse_pes)},
            "read": Out(ReadPort(config)),
            "write": Out(WritePort(config)),
            "busy": Out(1),
            "merging": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, layer, quad = self.config, self.layer, self.config.quad

        # residual: one word ahead for each chunk
        m.submodules.residual_walk = residual_walk = ChunkWalk(config)
        m.submodules.residual_mapper = residual_mapper = ActivationMapper(config)
        m.submodules.residuals = residuals = fifo.SyncFIFOBuffered(
            width=config.port_width, depth=self.queue_depth)
        residual_room = Signal(range(self.queue_depth + 1), init=self.queue_depth)
        asked = Signal()
        m.d.comb += [
            residual_walk.layer.eq(layer),
            residual_walk.start.eq(self.start & layer.residual),
            residual_mapper.base.eq(layer.residual_source),
            residual_mapper.plane.eq(layer.plane),
            residual_mapper.word.eq(residual_walk.word),
            residual_mapper.pixel.eq(residual_walk.pixel),
            residual_mapper.unit.eq(2),
            residual_mapper.sub.eq(residual_walk.sub),
            self.read.request.valid.eq(residual_walk.valid & (residual_room != 0)),
            self.read.request.payload.eq(residual_mapper.address),
            asked.eq(self.read.request.valid & self.read.request.ready),
            residual_walk.advance.eq(asked),
            self.read.response.ready.eq(residuals.w_rdy),
            residuals.w_en.eq(self.read.response.valid),
            residuals.w_data.eq(self.read.response.payload),
        ]

        # merge
        m.submodules.walk = walk = ChunkWalk(config)
        m.submodules.results = results = fifo.SyncFIFOBuffered(
            width=config.address_width + config.port_width, depth=self.queue_depth)
        room = Signal(range(self.queue_depth + 1), init=self.queue_depth)
        take, real, residual_taken = Signal(), Signal(), Signal()
        pe = Signal(range(max(2, config.sparse_pes)))
        sparse_valid, sparse = Signal(), Signal(chunk_layout(config))
        with m.Switch(pe):
            for number in range(config.sparse_pes):
                port = getattr(self, f"i_sparse_{number}")
                with m.Case(number):
                    m.d.comb += [
                        sparse_valid.eq(port.valid), sparse.eq(port.payload),
                        port.ready.eq(take & real & self.sparse_part),
                    ]
        m.d.comb += [
            walk.layer.eq(layer),
            walk.start.eq(self.start),
            walk.advance.eq(take),
            # chunks beyond the outputs pad their word with zeros
            real.eq(((walk.word * 4 + walk.sub) * quad) < layer.outputs),
            take.eq(walk.valid & (room != 0)
                    & (~real | ~self.dense_part | self.i_dense.valid)
                    & (~real | ~self.sparse_part | sparse_valid)
                    & (~layer.residual | residuals.r_rdy)),
            self.i_dense.ready.eq(take & real & self.dense_part),
            residual_taken.eq(take & layer.residual),
            residuals.r_en.eq(residual_taken),
            self.merging.eq(walk.valid),
        ]
        with m.If(take & walk.pixel_last):
            m.d.sync += pe.eq(0 if config.sparse_pes < 2 else pe + 1)
        with m.If(self.start):
            m.d.sync += pe.eq(0)
        m.d.sync += residual_room.eq(residual_room - asked + residual_taken)

        # table
        rows = config.max_outputs // quad
        m.submodules.table = table = memory.Memory(
            shape=64 * quad, depth=rows, init=[])
        write = table.write_port(granularity=config.port_width)
        read = table.read_port()
        words_of_row = quad // self.entries
        column_bits = (words_of_row - 1).bit_length()
        m.d.comb += [
            write.addr.eq(self.load_table.address >> column_bits),
            write.data.eq(self.load_table.data.replicate(words_of_row)),
            write.en.eq(self.load_table.enable
                        << (self.load_table.address[:column_bits] if column_bits else 0)),
            read.addr.eq((walk.word << 2) | walk.sub),
        ]

        lanes = []
        for number in range(quad):
            lane = place(m, f"lane_{number}", "epilogue_lane", self.parts["epilogue_lane"])
            entry = read.data.word_select(number, 64)
            live = real & take
            m.d.comb += [
                lane.dense.eq(Mux(live & self.dense_part, self.i_dense.payload[number], 0)),
                lane.sparse.eq(Mux(live & self.sparse_part, sparse[number], 0)),
                lane.residual.eq(Mux(
                    layer.residual, residuals.r_data.word_select(number, 16).as_signed(), 0)),
                lane.bias.eq(entry[:32].as_signed()),
                lane.multiplier.eq(entry[32:48].as_signed()),
                lane.align_shift.eq(layer.align_shift),
                lane.scale_shift.eq(layer.shift),
                lane.residual_multiplier.eq(layer.residual_multiplier),
            ]
            lanes.append(lane)

        # to memory
        m.submodules.mapper = mapper = ActivationMapper(config)
        m.d.comb += [
            mapper.base.eq(layer.destination), mapper.plane.eq(layer.plane),
            mapper.word.eq(walk.word), mapper.pixel.eq(walk.pixel), mapper.unit.eq(2),
            mapper.sub.eq(walk.sub),
        ]
        arriving = delay(m, take, EpilogueLane.latency, "taken")
        address = delay(m, mapper.address, EpilogueLane.latency, "address")
        sent = Signal()
        m.d.comb += [
            results.w_en.eq(arriving),
            results.w_data.eq(Cat(address, (lane.result for lane in lanes))),
            self.write.request.valid.eq(results.r_rdy),
            self.write.request.payload.address.eq(results.r_data[:config.address_width]),
            self.write.request.payload.data.eq(results.r_data[config.address_width:]),
            self.write.request.payload.strobe.eq(-1),
            results.r_en.eq(self.write.request.ready),
            sent.eq(self.write.request.valid & self.write.request.ready),
            self.busy.eq(walk.valid | (room != self.queue_depth)),
        ]
        m.d.sync += room.eq(room - take + sent)
        return m


class ChunkWalk(wiring.Component):
    """Walks the chunks of a 16-bit tensor: pixels, then its words, then their four port words.

    Members
    -------
    layer : ``In``
        ``plane`` and ``output_words`` say how many.
    start, advance : ``In(1)``
        Begin with the first chunk; go to the next one.
    valid : ``Out(1)``
        ``pixel``, ``word`` and ``sub`` are a chunk.
    pixel_last : ``Out(1)``
        It is the last one of its pixel.
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
        })

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.pixel_last.eq(
            (self.sub == 3) & (self.word + 1 == self.layer.output_words))
        with m.If(self.advance):
            m.d.sync += self.sub.eq(self.sub + 1)
            with m.If(self.sub == 3):
                m.d.sync += self.word.eq(self.word + 1)
            with m.If(self.pixel_last):
                m.d.sync += [self.word.eq(0), self.pixel.eq(self.pixel + 1)]
                m.d.sync += self.valid.eq(self.pixel + 1 != self.layer.plane)
        with m.If(self.start):
            m.d.sync += [self.valid.eq(1), self.pixel.eq(0), self.word.eq(0), self.sub.eq(0)]
        return m
