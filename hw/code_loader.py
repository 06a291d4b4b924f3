"""The code loader: rows of input codes and their scales into a half of the PEs' buffers."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from .compactor import Compactor
from .job import entry_layout, load_layout, record_layout
from .memory_port import ReadPort

__all__ = ["CodeLoader", "rows_layout"]


def rows_layout(config):
    """What the code loader is told about a run; stable from its ``start`` to ``done``.

    Positions from ``low`` up to ``high`` go to both sides; so do all of MX8, where they are 0 and
    the number of positions.

    Members
    -------
    half : half of the buffers that is filled
    mx : MX8: two planes of a pixel, each a group of its own, and both sides take everything
    words : code words of a group
    low, high : the first position that the sparse side takes, and the first that the dense one
        does not
    row_pixels, in_width : columns of the image, and those that are loaded
    rows : most input rows that the run may take
    address : first code word of the first row
    row_pitch, row_words : code words of a row of the image, and of its columns that are loaded
    scales : first word of the plane of scales
    scale_byte : byte of the first row's first scale, counted from ``scales``
    group_codes, group_entries : dense words of a group, and most entries of a group
    row_codes, row_entries : the same of a row
    """
    groups = config.tile_channels // config.vector
    return data.StructLayout({
        "half": 1, "mx": 1,
        "words": range(groups + 1),
        "low": range(config.tile_channels + 1), "high": range(config.tile_channels + 1),
        "row_pixels": 16, "in_width": 16, "rows": 16,
        "address": config.address_width, "row_pitch": 21, "row_words": 21,
        "scales": config.address_width, "scale_byte": 17,
        "group_codes": range(groups + 1),
        "group_entries": range(config.tile_channels // config.sparse_rate + 1),
        "row_codes": 21, "row_entries": 25,
    })


class CodeLoader(wiring.Component):
    """Load as many rows of input as fit half of the buffers.

    A row is asked for when it fits for certain: what the rows before may take at worst counts
    until it is known what they take. So many rows may be on their way, and the number of rows is
    that of the rule, which knows how many entries all rows before have really taken: a row is
    loaded if used and worst case of the row together are no more than half of a buffer, for
    records, entries (of a core with sparse PEs) and code words (with dense PEs).

    With a memory that never stalls, where a response comes l cycles after its request, the words
    of a run are taken at these cycles after ``start``, in order, c being the cycles for which a
    word occupies the compactor (see `Compactor`; 1 without sparse PEs) and s the words of scales
    of a row:

        taken = moved = free = l + 2
        for each row:
            taken += s + 1
            for each word of the row:
                taken = max(taken + 1, moved)
                moved = max(taken + 1, free)
                free = moved + c

    ``done`` comes 1 to 3 cycles after the last ``free``. A row that would not fit if those on
    their way took the most waits for the end of rows before, which takes l + 8 cycles more.

    Members
    -------
    run : ``In``
        See `rows_layout`.
    start : ``In(1)``
        Begin; ignored while a run is loaded.
    done : ``Out(1)``
        High for one cycle: everything is written, and ``rows`` are loaded.
    rows : ``Out(16)``
    read : ``Out(ReadPort)``
        Takes responses only between ``start`` and ``done``; those of others before must be kept
        away from it.
    dense_codes, dense_records, sparse_entries, sparse_records : ``Out``
        Writes of the PEs' buffers; those of a side that the core lacks stay silent.
    """

    def __init__(self, config):
        self.config = config
        dense, sparse = record_layout(config, "dense"), record_layout(config, "sparse")
        super().__init__({
            "run": In(rows_layout(config)),
            "start": In(1),
            "done": Out(1),
            "rows": Out(16),
            "read": Out(ReadPort(config)),
            "dense_codes": Out(load_layout(1, config.codes_depth, config.port_width)),
            "dense_records": Out(load_layout(1, config.record_depth, dense.size)),
            "sparse_entries": Out(load_layout(1, config.entry_depth, entry_layout(config).size)),
            "sparse_records": Out(load_layout(1, config.record_depth, sparse.size)),
        })

    def elaborate(self, platform):
        m = Module()
        config, run = self.config, self.run
        vector, port_bytes = config.vector, config.port_width // 8
        has_dense, has_sparse = config.dense_pes > 0, config.sparse_pes > 0
        word_bits = (vector - 1).bit_length()
        byte_bits = (port_bytes - 1).bit_length()
        request, response = self.read.request, self.read.response
        dense_record = record_layout(config, "dense")
        sparse_record = record_layout(config, "sparse")

        # a group has ended: its record is written, and what it has really taken counts
        ended, tag = Signal(), Signal(dense_record)
        group_entries = Signal(dict(sparse_record)["count"].shape)

        # asking
        rows, records = Signal(16), Signal(18)
        codes = Signal(22)
        entries = Signal(26)                            # of the rows before, at most
        outstanding = Signal(18)                        # groups that have not ended
        row_records = Signal(17)
        row_address, row_byte = Signal(config.address_width), Signal(17)
        address, left = Signal(config.address_width), Signal(21)
        accept, fits = Signal(), Signal()
        m.d.comb += [
            row_records.eq(run.in_width << run.mx),
            fits.eq((records + row_records <= config.record_depth // 2)
                    & (codes + run.row_codes <= config.codes_depth // 2 if has_dense else 1)
                    & (entries + run.row_entries <= config.entry_depth // 2 if has_sparse else 1)),
            request.payload.eq(address),
            self.rows.eq(rows),
        ]
        m.d.sync += outstanding.eq(outstanding + Mux(accept, row_records, 0) - ended)
        if has_dense:
            m.d.sync += codes.eq(codes + Mux(accept, run.row_codes, 0))
        if has_sparse:
            m.d.sync += entries.eq(entries + Mux(accept, run.row_entries, 0)
                                   - Mux(ended, run.group_entries - group_entries, 0))
        begin = Signal()
        with m.FSM(name="ask"):
            with m.State("Idle"):
                with m.If(self.start):
                    m.d.comb += begin.eq(1)
                    m.d.sync += [
                        rows.eq(0), records.eq(0), codes.eq(0), entries.eq(0),
                        row_address.eq(run.address), row_byte.eq(run.scale_byte)]
                    m.next = "Row"
            with m.State("Row"):
                m.d.sync += [
                    address.eq(run.scales + row_byte[byte_bits:]),
                    left.eq((row_byte[:byte_bits] + run.in_width - 1) >> byte_bits),
                ]
                with m.If((rows != run.rows) & fits):
                    m.d.comb += accept.eq(1)
                    m.d.sync += records.eq(records + row_records)
                    m.next = "Scales"
                with m.Elif(outstanding == 0):
                    m.d.comb += self.done.eq(1)
                    m.next = "Idle"
            with m.State("Scales"):
                m.d.comb += request.valid.eq(1)
                with m.If(request.ready):
                    m.d.sync += [address.eq(address + 1), left.eq(left - 1)]
                    with m.If(left == 0):
                        m.d.sync += [address.eq(row_address), left.eq(run.row_words - 1)]
                        m.next = "Codes"
            with m.State("Codes"):
                m.d.comb += request.valid.eq(1)
                with m.If(request.ready):
                    m.d.sync += [address.eq(address + 1), left.eq(left - 1)]
                    with m.If(left == 0):
                        m.d.sync += [
                            rows.eq(rows + 1), row_address.eq(row_address + run.row_pitch),
                            row_byte.eq(row_byte + run.row_pixels)]
                        m.next = "Row"

        # the scales of the row that comes in, and the one of the pixel that comes in
        m.submodules.scales = scales = memory.Memory(
            shape=config.port_width, depth=config.record_depth // 2 // port_bytes + 1, init=[])
        scale_write, scale_read = scales.write_port(), scales.read_port()
        first_byte = Signal(byte_bits)                  # of the row, in its first word
        scale_word, scale_last = Signal(range(scales.depth)), Signal(17)
        pointer, next_pointer = Signal(17), Signal(17)  # byte of the pixel in the row's words
        m.d.comb += [
            scale_write.addr.eq(scale_word),
            scale_write.data.eq(response.payload),
            scale_last.eq((first_byte + run.in_width - 1) >> byte_bits),
            scale_read.addr.eq(next_pointer >> byte_bits),
        ]

        # the place in the row
        word, plane, column = Signal.like(run.words), Signal(), Signal(16)
        taking, ready, take = Signal(), Signal(init=1), Signal()
        word_last, pixel_last = Signal(), Signal()
        m.d.comb += [
            word_last.eq(word + 1 == run.words),
            pixel_last.eq(word_last & (~run.mx | plane)),
            take.eq(taking & response.valid & ready),
        ]

        with m.FSM(name="take"):
            with m.State("Scales"):
                m.d.comb += [response.ready.eq(1), scale_write.en.eq(response.valid)]
                with m.If(response.valid):
                    m.d.sync += scale_word.eq(scale_word + 1)
                    with m.If(scale_word == scale_last):
                        m.next = "Scale"
            with m.State("Scale"):      # the first one is read
                m.d.comb += next_pointer.eq(first_byte)
                m.d.sync += [pointer.eq(first_byte), scale_word.eq(0)]
                m.next = "Codes"
            with m.State("Codes"):
                m.d.comb += [
                    taking.eq(1), response.ready.eq(ready),
                    next_pointer.eq(pointer + (take & pixel_last)),
                ]
                with m.If(take):
                    m.d.sync += word.eq(Mux(word_last, 0, word + 1))
                    with m.If(word_last):
                        m.d.sync += plane.eq(run.mx & ~plane)
                with m.If(take & pixel_last):
                    m.d.sync += [pointer.eq(next_pointer), column.eq(column + 1)]
                    with m.If(column + 1 == run.in_width):
                        m.d.sync += [
                            column.eq(0), first_byte.eq(first_byte + run.row_pixels)]
                        m.next = "Scales"
        with m.If(begin):
            m.d.sync += first_byte.eq(run.scale_byte)

        # the dense side: words with a position that is its own
        def below(limit):
            """For each channel of the word, whether its position is below ``limit``."""
            limit_word, limit_channel = limit >> word_bits, limit[:word_bits]
            return Cat(
                (word < limit_word) | ((word == limit_word) & (n < limit_channel))
                for n in range(vector))

        dense_mask, dense_take = Signal(vector), Signal()
        code_pointer, group_start = (Signal(range(config.codes_depth)) for _ in range(2))
        record_pointer = Signal(range(config.record_depth))
        incoming = Signal(dense_record)
        m.d.comb += [
            dense_mask.eq(below(run.high)),
            dense_take.eq(take & (word < run.group_codes) if has_dense else 0),
            incoming.start.eq(group_start),
            incoming.count.eq(run.group_codes),
            incoming.scale.eq(scale_read.data.word_select(pointer[:byte_bits], 8)),
        ]
        m.d.sync += [
            self.dense_codes.enable.eq(dense_take),
            self.dense_codes.address.eq(code_pointer),
            self.dense_codes.data.eq(Cat(
                response.payload.word_select(n, 4) & dense_mask[n].replicate(4)
                for n in range(vector))),
            code_pointer.eq(code_pointer + dense_take),
            record_pointer.eq(record_pointer + ended),
        ]
        with m.If(take & word_last):
            m.d.sync += group_start.eq(code_pointer + dense_take)
        with m.If(begin):
            first_code = Mux(run.half, config.codes_depth // 2, 0)
            m.d.sync += [
                code_pointer.eq(first_code), group_start.eq(first_code),
                record_pointer.eq(Mux(run.half, config.record_depth // 2, 0)),
            ]
        if has_dense:
            m.d.comb += [
                self.dense_records.enable.eq(ended),
                self.dense_records.address.eq(record_pointer),
                self.dense_records.data.eq(tag),
            ]

        # the sparse side: every word, so that each group has an end
        if not has_sparse:
            m.d.sync += [ended.eq(take & word_last), tag.eq(incoming)]
            return m
        m.submodules.compactor = compactor = Compactor(config, dense_record)
        out = compactor.o.payload
        m.d.comb += [
            ready.eq(compactor.i.ready),
            compactor.i.valid.eq(taking & response.valid),
            compactor.i.payload.codes.eq(response.payload),
            compactor.i.payload.mask.eq(~below(run.low)),
            compactor.i.payload.early.eq(dense_mask),
            compactor.i.payload.word.eq(word - (run.low >> word_bits)),
            compactor.i.payload.last.eq(word_last),
            compactor.i.payload.tag.eq(incoming),
            ended.eq(compactor.o.valid & out.last),
            tag.eq(out.tag),
        ]
        entry_pointer, entry_start = (Signal(range(config.entry_depth)) for _ in range(2))
        entry_after = Signal.like(entry_pointer)
        record = Signal(sparse_record)
        m.d.comb += [
            self.sparse_entries.enable.eq(compactor.o.valid & out.filled),
            self.sparse_entries.address.eq(entry_pointer),
            self.sparse_entries.data.eq(out.entry),
            entry_after.eq(entry_pointer + self.sparse_entries.enable),
            group_entries.eq(entry_after - entry_start),
            record.start.eq(entry_start), record.count.eq(group_entries),
            record.scale.eq(out.tag.scale),
            record.skip.eq(Mux(out.rest, out.skip, group_entries)),
            self.sparse_records.enable.eq(ended),
            self.sparse_records.address.eq(record_pointer),
            self.sparse_records.data.eq(record),
        ]
        m.d.sync += entry_pointer.eq(entry_after)
        with m.If(ended):
            m.d.sync += entry_start.eq(entry_after)
        with m.If(begin):
            first_entry = Mux(run.half, config.entry_depth // 2, 0)
            m.d.sync += [entry_pointer.eq(first_entry), entry_start.eq(first_entry)]
        return m
