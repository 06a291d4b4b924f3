"""The dispatcher: brings operands to the PEs, each channel to the side of its label.

The permutation that the requantizer has written decides: the channels of its dense list go to the
dense PE, those of its sparse list to the sparse PEs (system rules, section 4).
"""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from .descriptor import Format
from .layer import layer_layout
from .mapper import ActivationMapper, WeightMapper
from .memory_port import ReadPort
from .operands import load_layout, scale_words
from .window import geometry_layout

__all__ = ["Dispatcher"]

PADDING = 0xFFFF  # slot of a position without a channel


class Dispatcher(wiring.Component):
    """Loads permutation, epilogue table, scales, weights and codes, one section after the other.

    A port word is taken a cycle, or each few cycles where it holds several rows of a buffer.

    Members
    -------
    layer : ``In``
        See `layer_layout`; stable while busy.
    start : ``In(1)``
        Begin.
    done : ``Out(1)``
        High for one cycle: everything is loaded and ``dense_geometry``, ``sparse_geometry`` are
        valid.
    refused : ``Out(1)``
        High for one cycle instead: the permutation is not one of this layer.
    read : ``Out(ReadPort)``
    table : ``Out``
        Writes of the epilogue table.
    scales : ``Out``
        Writes of the activation scales of all PEs.
    dense_codes, dense_weights, dense_weight_scales, sparse_codes, sparse_weights,
    sparse_weight_scales : ``Out``
        Writes of the PEs' buffers; the sparse ones go to all sparse PEs.
    """

    def __init__(self, config):
        self.config = config
        words, width = config.activation_depth, config.port_width
        columns = max(1, config.sparse_lanes // config.vector)
        super().__init__({
            "layer": In(layer_layout(config)),
            "start": In(1),
            "done": Out(1),
            "refused": Out(1),
            "read": Out(ReadPort(config)),
            "dense_geometry": Out(geometry_layout(config)),
            "sparse_geometry": Out(geometry_layout(config)),
            "table": Out(load_layout(1, config.max_outputs // (width // 64), width)),
            "scales": Out(load_layout(1, scale_words(config), width)),
            "dense_codes": Out(load_layout(1, words, width)),
            "dense_weights": Out(load_layout(
                config.vector, config.weight_depth, 4 * config.dense_lanes)),
            "dense_weight_scales": Out(load_layout(
                1, config.weight_scale_depth, 8 * config.dense_scale_units)),
            "sparse_codes": Out(load_layout(1, words, width)),
            "sparse_weights": Out(load_layout(columns, config.sparse_weight_depth, width)),
            "sparse_weight_scales": Out(load_layout(
                1, config.weight_scale_depth, 8 * config.sparse_scale_units)),
        })

    def elaborate(self, platform):
        m = Module()
        config, layer = self.config, self.layer
        vector, quad, lanes = config.vector, config.quad, config.dense_lanes
        word_bits = (vector - 1).bit_length()
        quad_bits = (quad - 1).bit_length()
        dense, sparse = self.dense_geometry, self.sparse_geometry
        width = config.address_width

        # sizes
        taps, output_words = Signal(4), layer.output_words
        dense_words, sparse_words = Signal.like(dense.words), Signal.like(dense.words)
        groups = Signal.like(dense.groups)
        dense_total, code_total = Signal(width), Signal(width)
        scale_total, weight_total, row_words = Signal(width), Signal(16), Signal(16)
        tiles, plane_rows = Signal(10), Signal(16)
        m.d.comb += [
            taps.eq(Mux(layer.kernel == 3, 9, 1)),
            groups.eq(Mux(layer.format == Format.IN16, 2, Mux(
                layer.format == Format.MX8,
                (layer.slot_words * vector + 31) >> 5, 1))),
            tiles.eq(output_words << (vector // lanes).bit_length() - 1),
        ]
        for side, side_words in ((dense, dense_words), (sparse, sparse_words)):
            m.d.comb += [
                side.height.eq(layer.height), side.width.eq(layer.width),
                side.plane.eq(layer.plane), side.kernel3.eq(layer.kernel == 3),
                side.mx.eq(layer.mx), side.signed_codes.eq(layer.format == Format.A4S),
                side.words.eq(side_words),
                side.group_words.eq(Mux(layer.format == Format.IN16, 1, 32 // vector)),
                side.groups.eq(groups), side.output_words.eq(output_words),
                side.chunks.eq((layer.outputs + (quad - 1)) >> quad_bits),
            ]
        bytes_bits = (config.port_width // 8 - 1).bit_length()
        m.d.sync += [
            dense_total.eq((dense_words * layer.plane) << layer.mx),
            code_total.eq(dense_total + sparse_words * layer.plane),
            scale_total.eq((groups * layer.plane + (config.port_width // 8 - 1)) >> bytes_bits),
            row_words.eq((taps * output_words) << layer.mx),
            weight_total.eq(taps * groups * output_words * 2),
            plane_rows.eq(dense_words * tiles),
        ]

        # a section is `total` words from `base` on, or one slot's row of the weights
        asked, got = Signal(width), Signal(width)
        base, total = Signal(width), Signal(width)
        weights_here, active = Signal(), Signal()
        m.submodules.mapper = mapper = ActivationMapper(config)
        m.submodules.weight_mapper = weight_mapper = WeightMapper(config)
        slot = Signal(16)
        request, response = self.read.request, self.read.response
        take, part, part_last = Signal(), Signal(range(max(2, vector))), Signal(init=1)
        m.d.comb += [
            mapper.base.eq(base + asked),
            weight_mapper.base.eq(layer.weights),
            weight_mapper.slot.eq(slot),
            weight_mapper.row_words.eq(row_words),
            weight_mapper.offset.eq(asked),
            request.valid.eq(active & (asked != total)),
            request.payload.eq(Mux(weights_here, weight_mapper.address, mapper.address)),
            response.ready.eq(active & part_last),
            take.eq(active & response.valid),
        ]
        with m.If(request.valid & request.ready):
            m.d.sync += asked.eq(asked + 1)
        ends = Signal()
        m.d.comb += ends.eq(take & part_last & (got + 1 == total))
        with m.If(take):
            m.d.sync += part.eq(Mux(part_last, 0, part + 1))
        with m.If(take & part_last):
            m.d.sync += got.eq(got + 1)
        with m.If(ends):
            m.d.sync += [asked.eq(0), got.eq(0)]

        # the list of positions
        positions = (config.max_channels // vector + 1) * vector
        m.submodules.list = entries = memory.Memory(
            shape=16 * quad, depth=positions // quad, init=[])
        list_write, list_read = entries.write_port(), entries.read_port()
        position = Signal(range(positions + 1))
        position_total = Signal(range(positions + vector + 1))
        m.d.comb += [
            list_write.addr.eq(got),
            list_write.data.eq(response.payload),
            list_read.addr.eq(position >> quad_bits),
            slot.eq(list_read.data.word_select(position[:quad_bits], 16)),
        ]
        strange = Signal()
        m.d.comb += strange.eq(Cat(
            (entry != PADDING) & (entry >= layer.slot_words * vector)
            for entry in (response.payload.word_select(n, 16) for n in range(quad))).any())

        # rows of the weight buffers
        dense_row, dense_tile = Signal(16), Signal(10)
        dense_first_row = Signal(16)            # of this word of channels
        sparse_row, sparse_word = Signal(16), Signal.like(output_words)
        sparse_columns = max(1, config.sparse_lanes // vector)
        column_bits = sparse_columns.bit_length() - 1
        sparse_tiles = (output_words + (sparse_columns - 1)) >> column_bits
        is_dense = Signal()
        m.d.comb += [
            is_dense.eq(position < dense_words * vector),
            self.dense_weights.address.eq(dense_row + dense_tile),
            self.dense_weights.data.eq(response.payload.word_select(part, 4 * lanes)),
            self.sparse_weights.address.eq(sparse_row + (sparse_word >> column_bits)),
            self.sparse_weights.data.eq(response.payload),
        ]
        dense_scale_row, sparse_scale_row = Signal(16), Signal(16)
        dense_scale_parts = vector // 2 // config.dense_scale_units
        sparse_scale_parts = (
            vector // 2 // config.sparse_scale_units if config.sparse_pes else 1)
        m.d.comb += [
            self.table.address.eq(got), self.table.data.eq(response.payload),
            self.scales.address.eq(got), self.scales.data.eq(response.payload),
            self.dense_weight_scales.address.eq(dense_scale_row),
            self.dense_weight_scales.data.eq(
                response.payload.word_select(part, 8 * config.dense_scale_units)),
            self.sparse_weight_scales.address.eq(sparse_scale_row),
            self.sparse_weight_scales.data.eq(
                response.payload.word_select(part, 8 * config.sparse_scale_units)),
            self.dense_codes.address.eq(got), self.dense_codes.data.eq(response.payload),
            self.sparse_codes.address.eq(got - dense_total),
            self.sparse_codes.data.eq(response.payload),
        ]

        def section(at, words):
            m.d.comb += [active.eq(1), base.eq(at), total.eq(words)]

        header_dense, header_sparse = response.payload[:16], response.payload[16:32]
        slots = layer.slot_words * vector
        with m.FSM(name="load"):
            with m.State("Idle"):
                with m.If(self.start):
                    m.next = "Header"
            with m.State("Header"):
                section(layer.permutation, 1)
                m.d.sync += [
                    dense_words.eq((header_dense + (vector - 1)) >> word_bits),
                    sparse_words.eq((header_sparse + (vector - 1)) >> word_bits),
                ]
                with m.If(ends):
                    m.next = "Size"
                    with m.If((header_dense > slots) | (header_sparse > slots)
                              | ((header_dense == 0) & (header_sparse == 0))
                              | (header_dense + header_sparse > slots)
                              | ((layer.mx | (config.sparse_pes == 0)) & (header_sparse != 0))
                              | (layer.mx & (header_dense != slots))):
                        m.d.comb += self.refused.eq(1)
                        m.next = "Idle"
            with m.State("Size"):
                m.d.sync += [
                    position_total.eq((dense_words + sparse_words) << word_bits),
                    position.eq(0), sparse_row.eq(0), dense_first_row.eq(0),
                    dense_scale_row.eq(0), sparse_scale_row.eq(0),
                ]
                m.next = "List"
            with m.State("List"):
                section(layer.permutation + 1, position_total >> quad_bits)
                m.d.comb += list_write.en.eq(take)
                with m.If(take & strange):
                    m.next = "Flush"
                    with m.If(ends):
                        m.d.comb += self.refused.eq(1)
                        m.next = "Idle"
                with m.Elif(ends):
                    m.next = "Table"
            # A refused list is read to its end, so that no response is left on its way.
            with m.State("Flush"):
                section(layer.permutation + 1, position_total >> quad_bits)
                with m.If(ends):
                    m.d.comb += self.refused.eq(1)
                    m.next = "Idle"
            with m.State("Table"):
                section(layer.table, (output_words << word_bits) // (config.port_width // 64))
                m.d.comb += self.table.enable.eq(take)
                with m.If(ends):
                    m.next = "Scales"
            with m.State("Scales"):
                section(layer.scales, scale_total)
                m.d.comb += self.scales.enable.eq(take)
                with m.If(ends):
                    m.next = "Weight scales"
            with m.State("Weight scales"):
                section(layer.weight_scales, weight_total)
                parts = max(dense_scale_parts, sparse_scale_parts)
                m.d.comb += [
                    part_last.eq(part == parts - 1),
                    self.dense_weight_scales.enable.eq(take & (part < dense_scale_parts)),
                    self.sparse_weight_scales.enable.eq(
                        take & (part < sparse_scale_parts) & ~layer.mx),
                ]
                m.d.sync += [
                    dense_scale_row.eq(dense_scale_row + self.dense_weight_scales.enable),
                    sparse_scale_row.eq(sparse_scale_row + self.sparse_weight_scales.enable),
                ]
                with m.If(ends):
                    m.next = "Slot"
            with m.State("Slot"):       # one cycle for the list's memory
                m.d.sync += [
                    dense_row.eq(dense_first_row), dense_tile.eq(0), sparse_word.eq(0)]
                m.next = "Weights"
                with m.If(position == position_total):
                    m.next = "Codes"
            with m.State("Weights"):
                section(0, row_words)
                m.d.comb += [weights_here.eq(1), active.eq(slot != PADDING)]
                with m.If(is_dense):
                    m.d.comb += [
                        part_last.eq(part == vector // lanes - 1),
                        self.dense_weights.enable.eq(take << position[:word_bits]),
                    ]
                with m.Else():
                    m.d.comb += self.sparse_weights.enable.eq(
                        take << (sparse_word[:column_bits] if column_bits else 0))
                with m.If(take & is_dense):
                    m.d.sync += dense_tile.eq(dense_tile + 1)
                    with m.If(dense_tile + 1 == tiles):
                        m.d.sync += [dense_tile.eq(0), dense_row.eq(dense_row + plane_rows)]
                with m.If(take & ~is_dense):
                    m.d.sync += sparse_word.eq(sparse_word + 1)
                    with m.If(sparse_word + 1 == output_words):
                        m.d.sync += [sparse_word.eq(0), sparse_row.eq(sparse_row + sparse_tiles)]
                with m.If(ends | (slot == PADDING)):
                    m.d.sync += position.eq(position + 1)
                    with m.If(is_dense & (position[:word_bits] == vector - 1)):
                        m.d.sync += dense_first_row.eq(dense_first_row + tiles)
                    m.next = "Slot"
            with m.State("Codes"):
                section(layer.source, code_total)
                m.d.comb += [
                    self.dense_codes.enable.eq(take & (got < dense_total)),
                    self.sparse_codes.enable.eq(take & (got >= dense_total)),
                ]
                with m.If(ends):
                    m.d.comb += self.done.eq(1)
                    m.next = "Idle"
        return m
