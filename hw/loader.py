"""The loader: brings a job's operands to the PEs, and its input run by run.

It works ahead: while one run is computed, the next one goes into the other half of the activation
buffers, and the next job's weights into what the job before leaves of the weight buffers.
"""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .code_loader import CodeLoader
from .descriptor import Format
from .job import (
    entry_layout, load_layout, most_tiles, record_layout, run_layout, table_depth,
    weight_scale_columns)
from .layer import layer_layout
from .memory_port import ReadPort
from .scale_unit import decode_weight_scales

__all__ = ["Loader", "lanes_load_layout"]

PADDING = 0xFFFF  # slot of a position without a channel


def lanes_load_layout(config, columns, depth, width):
    """A write of a buffer of some sparse PEs: `load_layout`, lane ``tile`` of the job, and ``pes``.

    ``pes`` has a bit for each PE that computes the tile.
    """
    return data.StructLayout({
        **{name: field.shape for name, field in load_layout(columns, depth, width)},
        "tile": range(max(2, most_tiles(config, "sparse"))),
        "pes": max(1, config.sparse_pes)})


class Loader(wiring.Component):
    """Load a job's permutation, table, weight scales, weights and input, and hand its runs over.

    The sections of a job follow each other without a gap where nothing that is read decides about
    them. With a memory that answers l cycles after a request and never stalls, the first word of
    the first run is taken this many cycles after ``start``:

        l + 1 + slots / (V/4)               the permutation
        max(table, l + 6)                   port words of the table
        scales                              2 * ceil(outputs / V) port words for each tap
        weights                             ceil(outputs / V) port words for each tap and nibble
                                            plane of each position with a channel
        12

    A port word takes a cycle, but: two cycles for weight scales, if a side has but V/4 scale units;
    one cycle for each tile of K outputs, for weights of a position that the dense side takes. What
    weights take so in excess hides the 12 cycles. With ``keep_weights`` only l + 12 are left. From
    there on a run takes what `CodeLoader` says, and l + 11 cycles to the first word of the next.

    Weights of jobs that load any lie in turn at the bottom and at the top of their memories. If
    they do not fit beside those of the job before, loading waits until no run is left. Input is
    loaded while at most one run is loaded and not released. All responses are taken as they come.

    Members
    -------
    layer : ``In``
        See `layer_layout`; stable from ``start`` until ``ready``.
    start : ``In(1)``
        Begin a job, a convolution that the sequencer has checked; only while ``ready``.
    ready : ``Out(1)``
        Low from the cycle after ``start`` until the job's last run is offered and its first one
        has been taken, or until the cycle after ``refused``. So no more than two jobs are
        unfinished.
    refused : ``Out(1)``
        High for one cycle: the permutation is not one of this tile. Nothing is left to be read, no
        run of the job will come, and the next job must not keep the weights.
    read : ``Out(ReadPort)``
    run : ``Out(stream.Signature(run_layout))``
        Runs whose input, weights and table are in the buffers.
    released : ``In(1)``
        High for one cycle: the oldest run that has been taken is computed.
    table, dense_codes, dense_records, dense_weights, dense_weight_scales, sparse_entries,
    sparse_records, sparse_weights, sparse_weight_scales : ``Out``
        Writes of the buffers, see `load_layout` and `lanes_load_layout`; those of a side that the
        core lacks stay silent.
    """

    def __init__(self, config):
        self.config = config
        width = config.port_width
        super().__init__({
            "layer": In(layer_layout(config)),
            "start": In(1),
            "ready": Out(1),
            "refused": Out(1),
            "read": Out(ReadPort(config)),
            "run": Out(stream.Signature(run_layout(config))),
            "released": In(1),
            "table": Out(load_layout(1, table_depth(config), width)),
            "dense_codes": Out(load_layout(1, config.codes_depth, width)),
            "dense_records": Out(load_layout(
                1, config.record_depth, record_layout(config, "dense").size)),
            "dense_weights": Out(load_layout(
                config.vector, config.weight_depth, 4 * config.dense_lanes)),
            "dense_weight_scales": Out(load_layout(
                weight_scale_columns(config, "dense"), config.weight_scale_depth,
                min(8 * config.dense_scale_units, width))),
            "sparse_entries": Out(load_layout(1, config.entry_depth, entry_layout(config).size)),
            "sparse_records": Out(load_layout(
                1, config.record_depth, record_layout(config, "sparse").size)),
            "sparse_weights": Out(lanes_load_layout(
                config, max(1, config.sparse_lanes // config.vector), config.sparse_weight_depth,
                width)),
            "sparse_weight_scales": Out(lanes_load_layout(
                config, weight_scale_columns(config, "sparse"), config.sparse_weight_scale_depth,
                min(8 * config.sparse_scale_units, width))),
        })

    def elaborate(self, platform):
        m = Module()
        config, layer = self.config, self.layer
        vector, quad, lanes = config.vector, config.quad, config.dense_lanes
        has_dense, has_sparse = config.dense_pes > 0, config.sparse_pes > 0
        word_bits, quad_bits = (vector - 1).bit_length(), (quad - 1).bit_length()
        port_bytes = config.port_width // 8
        request, response = self.read.request, self.read.response
        m.submodules.codes = codes = CodeLoader(config)

        # what the header says; a job with MX8 codes has all positions on both sides
        positions = range(config.tile_channels + 1)
        count, low, high = Signal(positions), Signal(positions), Signal(positions)
        cut = Signal(9)
        words = Signal(range(config.tile_channels // vector + 1))
        dense_pitch, sparse_pitch = Signal.like(words), Signal(positions)
        group_entries = Signal(range(config.tile_channels // config.sparse_rate + 1))
        m.d.comb += [
            words.eq((count + (vector - 1)) >> word_bits),
            dense_pitch.eq((high + (vector - 1)) >> word_bits if has_dense else 0),
            sparse_pitch.eq((words - (low >> word_bits)) << word_bits if has_sparse else 0),
            group_entries.eq((count - low + (config.sparse_rate - 1))
                             >> config.sparse_rate.bit_length() - 1 if has_sparse else 0),
        ]

        # a product a cycle, two cycles after its factors
        factor_a, factor_b = Signal(16), Signal(16)
        multiplicand, multiplier, product = Signal(16), Signal(16), Signal(32)
        first_stage, second_stage = Signal(init=1), Signal(init=1)
        with m.If(first_stage):
            m.d.sync += [multiplicand.eq(factor_a), multiplier.eq(factor_b)]
        with m.If(second_stage):
            m.d.sync += product.eq(multiplicand * multiplier)
        step = Signal(range(10))

        def multiply(*factors):
            """Give pair after pair of factors, by ``step``."""
            m.d.sync += step.eq(step + 1)
            with m.Switch(step):
                for number, (a, b) in enumerate(factors):
                    with m.Case(number):
                        m.d.comb += [factor_a.eq(a), factor_b.eq(b)]

        # rows of the weight buffers: of this job, of the job before, and this job's first ones
        def all_taps(rows):
            return Mux(layer.kernel3, (rows << 3) + rows, rows)

        dense_lines, sparse_lines = Signal(16), Signal(16)
        dense_steps, sparse_steps = Signal(16), Signal(16)      # rows of scales of a tap
        m.d.comb += [
            dense_lines.eq(all_taps(layer.dense_tiles) << layer.mx),
            sparse_lines.eq(all_taps(layer.sparse_own) << layer.mx),
            dense_steps.eq(layer.dense_tiles * config.dense_steps),
            sparse_steps.eq(layer.sparse_own * config.sparse_steps),
        ]
        depths = {"dense_weights": config.weight_depth,
                  "dense_weight_scales": config.weight_scale_depth,
                  "sparse_weights": config.sparse_weight_depth,
                  "sparse_weight_scales": config.sparse_weight_scale_depth}
        sides = ["dense"] * has_dense + ["sparse"] * has_sparse
        memories = [name for name in depths if name.split("_")[0] in sides]
        new, old = ({name: Signal(17, name=f"{age}_{name}") for name in depths}
                    for age in ("new", "old"))
        first = {name: Signal(range(depth), name=f"first_{name}")
                 for name, depth in depths.items()}
        m.d.comb += [
            new["dense_weight_scales"].eq(all_taps(dense_steps)),
            new["sparse_weight_scales"].eq(all_taps(sparse_steps)),
        ]
        dense_row, dense_first = (Signal(range(config.weight_depth)) for _ in range(2))
        sparse_row, sparse_first = (Signal(range(config.sparse_weight_depth)) for _ in range(2))
        dense_scale_row = Signal(range(config.weight_scale_depth))
        sparse_scale_row = Signal(range(config.sparse_weight_scale_depth))
        top, bank = Signal(), Signal()
        place = {name: Mux(top, depth - new[name], 0) for name, depth in depths.items()}
        fits = Cat(new[name] + old[name] <= depths[name] for name in memories).all()

        # the list: slots for those who ask, gaps for those who take
        slot_bits = (config.tile_channels - 1).bit_length()
        entry = data.StructLayout({"slot": slot_bits, "gap": 1})
        m.submodules.list = slots = memory.Memory(
            shape=data.ArrayLayout(entry, quad), depth=config.tile_channels // quad, init=[])
        m.submodules.gaps = gaps = memory.Memory(
            shape=quad, depth=config.tile_channels // quad, init=[])
        list_write, list_read = slots.write_port(), slots.read_port(domain="comb")
        gap_write, gap_read = gaps.write_port(), gaps.read_port(domain="comb")

        # runs
        unreleased = Signal(range(3))
        half, row, rows_end = Signal(), Signal(16), Signal(16)
        begin, pixel = Signal(16), Signal(16)
        pixel_words = Signal(range(2 * config.tile_channels // vector + 1))
        run = codes.run
        first_code = Signal(config.address_width)
        row_pitch, row_words, row_codes, row_entries = (
            Signal(run[name].shape(), name=name)
            for name in ("row_pitch", "row_words", "row_codes", "row_entries"))
        push, run_last = Signal(), Signal()
        m.d.comb += [
            begin.eq(row - (layer.kernel3 & (row != 0))),
            pixel_words.eq(words << layer.mx),
            run.half.eq(half), run.mx.eq(layer.mx), run.words.eq(words),
            run.low.eq(low), run.high.eq(high),
            run.row_pixels.eq(layer.width), run.in_width.eq(layer.input_width),
            run.address.eq(first_code), run.row_pitch.eq(row_pitch),
            run.row_words.eq(row_words), run.row_codes.eq(row_codes),
            run.row_entries.eq(row_entries),
            run.rows.eq(layer.input_last + 1 - begin),
            run.scales.eq(layer.scales), run.scale_byte.eq(layer.scale_byte + pixel),
            run.group_codes.eq(dense_pitch), run.group_entries.eq(group_entries),
            rows_end.eq(begin + codes.rows),
            run_last.eq(rows_end == layer.input_last + 1),
        ]
        m.d.sync += unreleased.eq(unreleased + push - self.released)
        with m.If(self.run.ready):
            m.d.sync += self.run.valid.eq(0)
        offered = Signal(run_layout(config))
        tile_end = layer.tile_y + layer.tile_height
        m.d.comb += [
            offered.first.eq(row == layer.tile_y), offered.last.eq(run_last),
            offered.bank.eq(bank),
        ]
        for side in ("dense", "sparse"):
            geometry = offered[side]
            m.d.comb += [
                geometry.kernel3.eq(layer.kernel3), geometry.mx.eq(layer.mx),
                geometry.signed_codes.eq(layer.format == Format.A4S),
                geometry.height.eq(layer.height), geometry.width.eq(layer.width),
                geometry.row.eq(row), geometry.column.eq(layer.tile_x),
                geometry.rows.eq(Mux(run_last, tile_end, rows_end - layer.kernel3) - row),
                geometry.columns.eq(layer.tile_width),
                geometry.above.eq(begin != row),
                geometry.before.eq(layer.input_column != layer.tile_x),
                geometry.in_width.eq(layer.input_width),
                geometry.records.eq(Mux(half, config.record_depth // 2, 0)),
                geometry.tiles.eq(layer[f"{side}_tiles"]),
                geometry.chunks.eq(layer.chunks), geometry.cut.eq(cut),
                geometry.weights.eq(first[f"{side}_weights"]),
                geometry.weight_scales.eq(first[f"{side}_weight_scales"]),
            ]
        m.d.comb += [
            offered.dense.active.eq(Mux(layer.mx, layer.share != 0, high != 0) & has_dense),
            offered.sparse.active.eq(Mux(layer.mx, layer.share != 1, low != count) & has_sparse),
            offered.dense.low.eq(Mux(layer.mx, words, (low + (vector - 1)) >> word_bits)),
            offered.dense.high.eq((high + (vector - 1)) >> word_bits),
            offered.sparse.high.eq(high - (low >> word_bits << word_bits)),
            offered.dense.stride.eq(Mux(layer.mx & (layer.share != 0), layer.share, 1)),
            offered.sparse.stride.eq(1),
            offered.sparse.skip.eq(Mux(layer.mx, layer.share, 0)),
            offered.dense.pitch.eq(dense_pitch), offered.sparse.pitch.eq(sparse_pitch),
        ]

        for name in ("dense_codes", "dense_records", "sparse_entries", "sparse_records"):
            m.d.comb += getattr(self, name).eq(getattr(codes, name))

        # asking
        asking = Signal()
        address, left = Signal(config.address_width), Signal(16)
        base = Signal(config.address_width)         # of a tap's or a slot's words
        tap, line = Signal(4), Signal(5)
        lines = Signal(5)
        asked, listed, bad, job_end = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            request.valid.eq(asking | codes.read.request.valid),
            request.payload.eq(Mux(asking, address, codes.read.request.payload)),
            codes.read.request.ready.eq(request.ready),
            codes.read.response.payload.eq(response.payload),
            lines.eq(layer.taps << layer.mx),
            asked.eq(asking & request.ready),
        ]
        with m.If(asked):
            m.d.sync += [address.eq(address + 1), left.eq(left - 1)]

        def section(at, length):
            m.d.sync += [address.eq(at), left.eq(length - 1)]

        table_words = layer.output_words << (vector * 64 // config.port_width - 1).bit_length()
        scale_words = layer.output_words << 1
        position = Signal(positions)
        slot, ready_slot, ready_base, live = (
            Signal(entry), Signal(), Signal(), Signal())
        m.d.comb += [
            list_read.addr.eq(position >> quad_bits),
            slot.eq(list_read.data[position[:quad_bits]]),
        ]
        take_base, slot_asked = Signal(), Signal()
        with m.FSM(name="ask"):
            with m.State("Idle"):
                m.d.comb += self.ready.eq(~(self.run.valid & self.run.payload.first))
                m.d.sync += [row.eq(layer.tile_y), step.eq(0)]
                section(layer.permutation, (layer.slot_words << 2) + 1)
                with m.If(self.start):
                    m.next = "Permutation"
                    with m.If(layer.keep_weights):
                        m.next = "Sizes"
            with m.State("Permutation"):
                m.d.comb += asking.eq(1)
                with m.If(asked & (left == 0)):
                    section(layer.table, table_words)
                    m.next = "Table"
            with m.State("Table"):
                m.d.comb += asking.eq(1)
                with m.If(asked & (left == 0)):
                    m.next = "Rows"
            with m.State("Rows"):
                with m.If(self.refused):
                    m.next = "Idle"
                with m.Elif(listed & ~bad):
                    multiply((dense_lines, dense_pitch), (sparse_lines, sparse_pitch))
                    with m.If(step == 2):
                        m.d.sync += new["dense_weights"].eq(product)
                    with m.If(step == 3):
                        m.d.sync += [new["sparse_weights"].eq(product), step.eq(0)]
                        m.next = "Room"
            with m.State("Room"):
                section(layer.weight_scales, scale_words)
                m.d.sync += [base.eq(layer.weight_scales), tap.eq(0)]
                with m.If(fits | (unreleased == 0)):
                    m.d.sync += top.eq(~top)
                    for name in depths:
                        m.d.sync += [first[name].eq(place[name]), old[name].eq(new[name])]
                    first_position = place["sparse_weights"] - (low >> word_bits << word_bits)
                    m.d.sync += [
                        dense_row.eq(place["dense_weights"]),
                        dense_first.eq(place["dense_weights"]),
                        sparse_row.eq(first_position), sparse_first.eq(first_position),
                        dense_scale_row.eq(place["dense_weight_scales"]),
                        sparse_scale_row.eq(place["sparse_weight_scales"]),
                    ]
                    m.next = "Weight scales"
            with m.State("Weight scales"):
                m.d.comb += asking.eq(1)
                with m.If(asked & (left == 0)):
                    section(base + layer.scale_pitch, scale_words)
                    m.d.sync += [base.eq(base + layer.scale_pitch), tap.eq(tap + 1)]
                    with m.If(tap + 1 == layer.taps):
                        m.d.sync += position.eq(0)
                        m.next = "Weights"
            # A slot goes through three stages: its entry of the list and its product with the
            # slots' pitch are those of the next slots, while this one's words are asked for.
            with m.State("Weights"):
                m.d.comb += [
                    factor_a.eq(slot.slot), factor_b.eq(layer.slot_pitch),
                    asking.eq(live),
                    slot_asked.eq(asked & (left == 0) & (line + 1 == lines)),
                    take_base.eq(ready_base & (~live | slot_asked)),
                    second_stage.eq(~ready_base | take_base),
                    first_stage.eq(~ready_slot | second_stage),
                ]
                with m.If(first_stage):
                    m.d.sync += ready_slot.eq((position != count) & ~slot.gap)
                    with m.If(position != count):
                        m.d.sync += position.eq(position + 1)
                with m.If(second_stage):
                    m.d.sync += ready_base.eq(ready_slot)
                with m.If(asked & (left == 0)):
                    section(base + layer.weight_pitch, layer.output_words)
                    m.d.sync += [base.eq(base + layer.weight_pitch), line.eq(line + 1)]
                with m.If(slot_asked):
                    m.d.sync += live.eq(0)
                with m.If(take_base):
                    section(layer.weights + product, layer.output_words)
                    m.d.sync += [base.eq(layer.weights + product), line.eq(0), live.eq(1)]
                with m.If((position == count) & ~ready_slot & ~ready_base
                          & (~live | slot_asked)):
                    m.next = "Sizes"
            with m.State("Sizes"):
                multiply(
                    (begin, layer.width), (layer.width, pixel_words),
                    (layer.input_width, pixel_words), (layer.input_width, dense_pitch),
                    (layer.input_width, group_entries), (pixel, pixel_words))
                results = (
                    pixel.eq(product + layer.input_column), row_pitch.eq(product),
                    row_words.eq(product), row_codes.eq(product << layer.mx),
                    row_entries.eq(product << layer.mx),
                    first_code.eq(layer.source + product))
                with m.Switch(step):
                    for number, result in enumerate(results):
                        with m.Case(number + 2):
                            m.d.sync += result
                with m.If(step == len(results) + 1):
                    m.d.sync += step.eq(0)
                    m.next = "Half"
            with m.State("Half"):
                with m.If(unreleased != 2):
                    m.d.comb += codes.start.eq(1)
                    m.next = "Codes"
            with m.State("Codes"):
                with m.If(codes.done):
                    m.next = "Run"
            with m.State("Run"):
                with m.If(~self.run.valid | self.run.ready):
                    m.d.sync += [self.run.valid.eq(1), self.run.payload.eq(offered)]
                    m.d.comb += push.eq(1)
                    m.d.sync += [row.eq(rows_end - layer.kernel3), half.eq(~half)]
                    m.next = "Sizes"
                    with m.If(run_last):
                        m.d.comb += job_end.eq(1)
                        m.next = "Idle"

        # taking
        index, end = Signal(16), Signal()
        take, word_end = Signal(), Signal(init=1)
        part = Signal(range(max(2, vector // quad)))
        number = Signal.like(position)              # of the position whose weights come in
        strange = Signal()
        header = response.payload
        header_low, header_high = header[16:32], header[32:48]
        list_end = (layer.slot_words << 2) - 1
        slot_total = layer.slot_words << word_bits
        entries = [header.word_select(n, 16) for n in range(quad)]
        m.d.comb += [
            list_write.addr.eq(index), gap_write.addr.eq(index),
            list_write.data.eq(Cat(
                Cat(value[:slot_bits], value == PADDING) for value in entries)),
            gap_write.data.eq(Cat(value == PADDING for value in entries)),
            strange.eq(Cat(
                (Cat(Const(n, quad_bits), index) < count) & (value != PADDING)
                & (value >= slot_total) for n, value in enumerate(entries)).any()),
            gap_read.addr.eq(number >> quad_bits),
        ]

        def count_words(last, after):
            """Take response after response, ``index`` counting them, then go to ``after``."""
            m.d.comb += [response.ready.eq(word_end), take.eq(response.valid)]
            with m.If(response.valid):
                m.d.sync += part.eq(Mux(word_end, 0, part + 1))
            with m.If(response.valid & word_end):
                m.d.sync += index.eq(index + 1)
                with m.If(index == last):
                    m.d.comb += end.eq(1)
                    m.d.sync += index.eq(0)
                    m.next = after

        m.d.sync += [
            self.table.enable.eq(0),
            self.table.address.eq(Cat(
                index[:(table_depth(config) // 2).bit_length() - 1], bank)),
            self.table.data.eq(response.payload),
        ]

        # rows that the buffers of the weights and their scales are written to
        line_taken, word_taken = Signal(5), Signal.like(layer.output_words)
        gap, is_dense, is_sparse = Signal(), Signal(), Signal()
        line_end, slot_end = Signal(), Signal()
        dense_tile = Signal.like(layer.dense_tiles)
        column_bits = max(0, (config.sparse_lanes // vector).bit_length() - 1)
        next_dense = Signal.like(dense_first)
        m.d.comb += [
            gap.eq(gap_read.data.bit_select(number[:quad_bits], 1)),
            is_dense.eq(number < high if has_dense else 0),
            is_sparse.eq(number >= low if has_sparse else 0),
            next_dense.eq(dense_first + number[:word_bits].all()),
        ]
        m.d.sync += [
            self.dense_weights.enable.eq(0), self.sparse_weights.enable.eq(0),
            self.dense_weights.address.eq(dense_row),
            self.dense_weights.data.eq(response.payload.word_select(part, 4 * lanes)),
            self.sparse_weights.address.eq(sparse_row),
            self.sparse_weights.data.eq(response.payload),
        ]

        # a tile of sparse lanes belongs to every sparse PE whose turn it is
        tile, turn = Signal(range(max(2, most_tiles(config, "sparse")))), Signal(5)
        tile_turn_last, pes = Signal(), Signal(max(1, config.sparse_pes))
        m.d.comb += tile_turn_last.eq(turn == max(0, config.sparse_pes - 1))
        for tiles in range(1, config.sparse_pes + 1):
            these = layer.sparse_tiles >= tiles if tiles == config.sparse_pes else (
                layer.sparse_tiles == tiles)
            with m.If(these):
                m.d.comb += pes.eq(Cat(
                    turn == pe % tiles for pe in range(config.sparse_pes)))

        def next_tile(last):
            m.d.sync += [
                tile.eq(Mux(last, 0, tile + 1)),
                turn.eq(Mux(last | tile_turn_last, 0, turn + 1))]

        tile_word_bits = (config.sparse_lanes // port_bytes).bit_length() - 1
        decoded = Signal(config.port_width)
        m.d.comb += decoded.eq(decode_weight_scales(response.payload, layer.mx))

        def scale_write(side, word, row, rows):
            """Write this part of the response, the word-th of a tap or tile, if it is below."""
            units = getattr(config, f"{side}_scale_units")
            columns, parts = max(1, units // port_bytes), max(1, port_bytes // units)
            column_bits, part_bits = columns.bit_length() - 1, parts.bit_length() - 1
            port = getattr(self, f"{side}_weight_scales")
            offset, here = Signal(16, name=f"{side}_offset"), Signal(name=f"{side}_here")
            m.d.comb += [
                offset.eq(((word << part_bits) + part) >> column_bits),
                here.eq((part < parts) & (offset < rows) if side in sides else 0),
            ]
            m.d.sync += [
                port.enable.eq(0), port.address.eq(row + offset),
                port.data.eq(decoded.word_select(part, 8 * units) if parts > 1 else decoded)]
            return parts, here, 1 << word[:column_bits] if column_bits else Const(1)

        dense_parts, dense_here, dense_columns = scale_write(
            "dense", index, dense_scale_row, dense_steps)
        sparse_parts, sparse_here, sparse_columns = scale_write(
            "sparse", index[:tile_word_bits], sparse_scale_row, config.sparse_steps)
        scale_parts = max(
            dense_parts if has_dense else 1, sparse_parts if has_sparse else 1)
        for port in (self.sparse_weights, self.sparse_weight_scales):
            m.d.sync += [port.tile.eq(tile), port.pes.eq(pes)]
        with m.FSM(name="take"):
            with m.State("Idle"):
                with m.If(self.start):
                    m.next = "Codes"
                    with m.If(~layer.keep_weights):
                        m.d.sync += [bank.eq(top), listed.eq(0)]
                        m.next = "Header"
            with m.State("Header"):
                count_words(0, "List")
                m.d.sync += [
                    count.eq(header[:16]),
                    low.eq(Mux(layer.mx, 0, header_low)),
                    high.eq(Mux(layer.mx, header[:16], header_high)),
                    cut.eq(Mux(layer.mx, 0, header[48:57])),
                    bad.eq(
                        (header[:16] == 0) | (header[:16] > slot_total)
                        | Mux(layer.mx, header[:16] != slot_total,
                              (header_low > header_high) | (header_high > header[:16])
                              | (header_high > (layer.dense_limit << word_bits if has_dense else 0))
                              | (0 if has_sparse else header_low != header[:16])
                              | (header[48:64] > 256)
                              | ((header_low != header_high)
                                 & header_low[:word_bits].any()))),
                ]
            with m.State("List"):
                count_words(list_end, "Table")
                m.d.comb += [list_write.en.eq(take), gap_write.en.eq(take)]
                m.d.sync += bad.eq(bad | (take & strange))
                with m.If(end):
                    m.d.sync += listed.eq(1)
            with m.State("Table"):
                count_words(table_words - 1, "Table end")
                m.d.sync += self.table.enable.eq(take)
            with m.State("Table end"):
                m.d.comb += self.refused.eq(bad)
                m.next = "Weight scales"
                with m.If(bad):
                    m.next = "Idle"
            with m.State("Weight scales"):
                m.d.comb += word_end.eq(part == scale_parts - 1)
                count_words(scale_words - 1, "Weight scales")
                m.d.sync += [
                    self.dense_weight_scales.enable.eq(Mux(take & dense_here, dense_columns, 0)),
                    self.sparse_weight_scales.enable.eq(
                        Mux(take & sparse_here, sparse_columns, 0)),
                ]
                with m.If(take & word_end & (end | index[:tile_word_bits].all())):
                    next_tile(end)
                    with m.If(end | tile_turn_last):
                        m.d.sync += sparse_scale_row.eq(sparse_scale_row + config.sparse_steps)
                with m.If(end):
                    m.d.sync += [
                        dense_scale_row.eq(dense_scale_row + dense_steps),
                        line_taken.eq(line_taken + 1)]
                    with m.If(line_taken + 1 == layer.taps):
                        m.d.sync += [line_taken.eq(0), number.eq(0)]
                        m.next = "Weights"
            with m.State("Weights"):
                m.d.comb += [
                    take.eq(response.valid & ~gap),
                    response.ready.eq(~gap & word_end),
                    word_end.eq(~is_dense | (part == vector // lanes - 1)
                                | (dense_tile + 1 == layer.dense_tiles)),
                    line_end.eq(take & word_end & (word_taken + 1 == layer.output_words)),
                    slot_end.eq(gap | (line_end & (line_taken + 1 == lines))),
                ]
                m.d.sync += [
                    self.dense_weights.enable.eq((take & is_dense) << number[:word_bits]),
                    self.sparse_weights.enable.eq(
                        (take & is_sparse & (part == 0)) << word_taken[:column_bits]
                        if column_bits else take & is_sparse & (part == 0)),
                ]
                with m.If(take):
                    m.d.sync += [
                        part.eq(Mux(word_end, 0, part + 1)),
                        dense_tile.eq(Mux(line_end, 0, dense_tile + 1)),
                        dense_row.eq(dense_row + dense_pitch)]
                with m.If(take & word_end):
                    m.d.sync += word_taken.eq(Mux(line_end, 0, word_taken + 1))
                    with m.If(line_end | word_taken[:column_bits].all()):
                        next_tile(line_end)
                        with m.If(line_end | tile_turn_last):
                            m.d.sync += sparse_row.eq(sparse_row + sparse_pitch)
                with m.If(line_end):
                    m.d.sync += line_taken.eq(line_taken + 1)
                with m.If(slot_end):
                    m.d.sync += [
                        number.eq(number + 1), line_taken.eq(0),
                        dense_first.eq(next_dense), dense_row.eq(next_dense),
                        sparse_first.eq(sparse_first + 1), sparse_row.eq(sparse_first + 1)]
                    with m.If(number + 1 == count):
                        m.next = "Codes"
            with m.State("Codes"):
                m.d.comb += [
                    codes.read.response.valid.eq(response.valid),
                    response.ready.eq(codes.read.response.ready),
                ]
                with m.If(job_end):
                    m.next = "Idle"
        return m
