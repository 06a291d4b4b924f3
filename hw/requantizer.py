"""The requantization pass: 16-bit values become codes, scales, zero counts and channel order."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from hw.affine import AffineLane
from hw.channel_lists import ChannelLists, most_slots
from hw.code_writer import PIXELS, CodeWriter
from hw.descriptor import Format
from hw.detector import Detector
from hw.e4m3 import ScaleEncoder, decode
from hw.mapper import PIXEL_WIDTH, word_width
from hw.memory_port import ReadPort, WritePort
from hw.parts import place
from hw.quantizer import QuantizerLane
from hw.ring import Ring
from hw.tensor_fetch import TensorFetch
from hw.zero_counters import ZeroCounters

__all__ = ["Requantizer", "fields_layout"]

BLOCK = 32       # slots that share an MXINT8 scale
HIGH_SCALE = 8   # scale of the high halves of the network input; that of the low halves is 0


def fields_layout(config):
    """The descriptor's fields that a requantization pass needs."""
    address = config.address_width
    return data.StructLayout({
        "format": 2,
        "relu": 1,
        "height": 16,
        "width": 16,
        "channels": 16,
        "channels_second": 16,
        "source": address,
        "source_second": address,
        "scales": address,
        "permutation": address,
        "counts": address,
        "table": address,
        "destination": address,
        "shift": 5,
        "detector": 16,
        "interval": 16,
        "threshold": 32,
    })


def delayed(m, value, cycles, name):
    """``value`` as it was ``cycles`` cycles ago."""
    bits = Value.cast(value)
    line = Signal(len(bits) * cycles, name=name)
    m.d.sync += line.eq(Cat(bits, line))
    oldest = line[-len(bits):]
    return data.View(value.shape(), oldest) if isinstance(value, data.View) else oldest


class Requantizer(wiring.Component):
    """Run a requantization pass over one tensor.

    ``start`` begins a pass; ``busy`` is high from the next cycle until the last write request has
    been taken. ``fields`` and ``evaluation`` must keep until then and must describe a legal pass:
    height * width from 1 to 65535, channels in every segment but a missing second one, slots
    within ``max_channels`` (IN16: one segment of at most V channels), ``relu`` set for A4U and
    clear for IN16, ``interval`` not 0, and detector entries within ``detector_depth``. ``start``
    while busy is ignored. Results do not depend on when memory answers.

    Three units work on different pixels at the same time: the affine lanes (4 cycles for V slots),
    the quantizer lanes (4 cycles for V slots) and the writer (4 cycles for V positions, one a scale
    and, for MX8 and IN16, one more). The slowest sets the pace when memory keeps up: 4 * (Wd + Ws)
    + 1 cycles a pixel for A4. Around the pixels a pass of W words of V slots takes W * max(V, 16)
    cycles for the affine table and the lists, W * V for the zero counts (not IN16), 8 * W until
    the first pixel has passed all units, and about 30 more plus the latency of memory.

    Parameters
    ----------
    config : Config

    Members
    -------
    start : ``In(1)``
    fields : ``In(fields_layout(config))``
    evaluation : ``In(16)``
    busy : ``Out(1)``
    read : ``Out(ReadPort(config))``
    write : ``Out(WritePort(config))``
        ``done`` is not used.
    saturations : ``Out(32)``
        Groups with a clipped element in this or, when idle, the last pass.
    register_entry_write, register_count_write, register_count_read : ``In(1)``
    register_data, register_entry, register_count : ``In(16)``, ``Out(16)``, ``Out(16)``
        The detector's registers, for an idle requantizer; see `Detector`. The count appears a cycle
        after its strobe.

    Attributes
    ----------
    parts : dict
        Lanes by the name of their Verilog module; see `hw.parts`.
    """

    def __init__(self, config):
        self.config = config
        self.parts = {"sqdm_affine_lane": AffineLane(), "sqdm_quantizer_lane": QuantizerLane()}
        super().__init__({
            "start": In(1),
            "fields": In(fields_layout(config)),
            "evaluation": In(16),
            "busy": Out(1),
            "read": Out(ReadPort(config)),
            "write": Out(WritePort(config)),
            "saturations": Out(32),
            "register_entry_write": In(1),
            "register_count_write": In(1),
            "register_count_read": In(1),
            "register_data": In(16),
            "register_entry": Out(16),
            "register_count": Out(16),
        })

    def elaborate(self, platform):
        m = Module()
        config, fields = self.config, self.fields
        quad, vector = config.quad, config.vector
        quad_bits, vector_bits = quad.bit_length() - 1, vector.bit_length() - 1
        row_bits = (most_slots(config) // quad - 1).bit_length()
        block_bits = (BLOCK // quad).bit_length() - 1  # rows of a block
        place_bits = PIXELS.bit_length() - 1
        is_plane = fields.format == Format.IN16
        is_block = fields.format == Format.MX8
        has_labels = (fields.format == Format.A4U) | (fields.format == Format.A4S)

        m.submodules.fetch = fetch = TensorFetch(config)
        m.submodules.detector = detector = Detector(config)
        m.submodules.lists = lists = ChannelLists(config)
        m.submodules.encoder = encoder = ScaleEncoder()
        m.submodules.zero_counters = zero_counters = ZeroCounters(config)
        m.submodules.writer = writer = CodeWriter(config)
        m.submodules.elements = elements_ring = Ring(PIXELS)
        m.submodules.codes = codes_ring = Ring(PIXELS)

        # What follows from the fields: two cycles after start.
        begin = Signal(2)
        pixels = Signal(PIXEL_WIDTH)
        words_first = Signal(word_width(config))
        words = Signal(word_width(config))      # of the input
        codes_words = Signal(word_width(config))
        groups = Signal(word_width(config))     # scales of a pixel
        go = begin[1]
        accept = self.start & ~self.busy
        m.d.sync += begin.eq(Cat(accept, begin[0]))
        m.d.comb += self.busy.eq(begin.any() | writer.busy)
        blocks = (words * vector + BLOCK - 1) // BLOCK
        m.d.sync += [
            pixels.eq(fields.height * fields.width),
            words_first.eq((fields.channels + vector - 1) >> vector_bits),
            words.eq(((fields.channels + vector - 1) >> vector_bits)
                     + ((fields.channels_second + vector - 1) >> vector_bits)),
            codes_words.eq(Mux(is_plane, 2, words)),
            groups.eq(Mux(is_plane, 2, Mux(is_block, blocks, 1))),
        ]

        m.d.comb += [
            fetch.start.eq(go),
            fetch.has_table.eq(~is_plane),
            fetch.table.eq(fields.table),
            fetch.source.eq(fields.source),
            fetch.source_second.eq(fields.source_second),
            fetch.first_words.eq(words_first),
            fetch.words.eq(words),
            fetch.pixels.eq(pixels),

            detector.start.eq(begin[1]),
            detector.threshold.eq(fields.threshold),
            detector.pixels.eq(pixels),
            detector.evaluation.eq(self.evaluation),
            detector.interval.eq(fields.interval),
            detector.entry.eq(lists.detector_entry),
            detector.w_enable.eq(writer.detector_enable),
            detector.w_entry.eq(writer.detector_entry),
            detector.w_count.eq(writer.detector_count),
            detector.register_entry_write.eq(self.register_entry_write),
            detector.register_count_write.eq(self.register_count_write),
            detector.register_count_read.eq(self.register_count_read),
            detector.register_data.eq(self.register_data),
            self.register_entry.eq(detector.register_entry),
            self.register_count.eq(detector.count),

            lists.start.eq(go),
            lists.natural.eq(~has_labels),
            lists.labelled.eq(has_labels if config.sparse_pes else 0),
            lists.first_words.eq(words_first),
            lists.words.eq(codes_words),
            lists.channels.eq(fields.channels),
            lists.channels_second.eq(Mux(is_plane, fields.channels, fields.channels_second)),
            lists.base.eq(fields.detector),
            lists.detector_sparse.eq(detector.sparse),
            lists.enable.eq(writer.list_enable),
            lists.row.eq(writer.list_row),

            writer.start.eq(go),
            writer.lists_ready.eq(~lists.busy & ~detector.busy),
            writer.format.eq(fields.format),
            writer.pixels.eq(pixels),
            writer.words.eq(codes_words),
            writer.groups.eq(groups),
            writer.permutation.eq(fields.permutation),
            writer.scales.eq(fields.scales),
            writer.destination.eq(fields.destination),
            writer.counts.eq(fields.counts),
            writer.detector.eq(fields.detector),
            writer.store_counts.eq(has_labels & detector.due),
            writer.dense_count.eq(lists.dense_count),
            writer.sparse_count.eq(lists.sparse_count),
            writer.dense_words.eq(lists.dense_words),
            writer.sparse_words.eq(lists.sparse_words),
            writer.list_entries.eq(lists.entries),
        ]
        connect(m, fetch.request, flipped(self.read.request))
        connect(m, writer.write, flipped(self.write.request))

        # Table words arrive first: an entry is 64 bits, its upper 16 unused.
        loading = Signal()
        table_index = Signal(row_bits + 2)
        arrived = self.read.response.valid & self.read.response.ready
        word = self.read.response.payload
        entries = [word.word_select(n, 64)[:48] for n in range(config.port_width // 64)]
        m.submodules.table = table = memory.Memory(
            shape=48 * quad, depth=1 << row_bits, init=[])
        table_write = table.write_port(granularity=48 * len(entries))
        table_read = table.read_port()
        m.d.comb += [
            table_write.addr.eq(table_index[2:]),
            table_write.data.eq(Cat(entries).replicate(4)),
        ]
        with m.If(go):
            m.d.sync += [loading.eq(~is_plane), table_index.eq(0)]
        with m.Elif(loading & arrived):
            m.d.comb += table_write.en.eq(Const(1, 4) << table_index[:2])
            m.d.sync += table_index.eq(table_index + 1)
            with m.If(table_index == (words << 4) - 1):
                m.d.sync += loading.eq(0)

        # Then rows of V/4 elements: the affine lanes take one a cycle and never stop.
        row = Signal(row_bits)
        pixel = Signal(PIXELS.bit_length() - 1 + place_bits)  # low bits: scales outlive a ring
        left = Signal(range(-most_slots(config), (1 << 16)))  # channels from here on
        second_row = row - (words_first << 2)
        m.d.comb += [
            self.read.response.ready.eq(loading | (row != 0) | elements_ring.room),
            left.eq(Mux(row < words_first << 2,
                        fields.channels - (row << quad_bits),
                        fields.channels_second - (second_row << quad_bits))),
        ]
        entered = arrived & ~loading
        row_last = row == (words << 2) - 1
        group = Mux(is_block, row >> block_bits, 0)
        group_last = row_last | (is_block & row[:block_bits].all())
        m.d.comb += elements_ring.reserve.eq(entered & (row == 0))
        with m.If(go):
            m.d.sync += [row.eq(0), pixel.eq(0)]
        with m.Elif(entered):
            m.d.sync += [row.eq(Mux(row_last, 0, row + 1)), pixel.eq(pixel + row_last)]

        # cycle 1: gain and offset
        m.d.comb += table_read.addr.eq(row)
        elements = delayed(m, word, 1, "element")
        inside = delayed(m, Cat(left > lane for lane in range(quad)), 1, "inside")
        lanes = []
        for lane in range(quad):
            unit = place(m, f"affine_{lane}", "sqdm_affine_lane", self.parts["sqdm_affine_lane"])
            coefficients = table_read.data.word_select(lane, 48)
            m.d.comb += [
                unit.relu.eq(fields.relu),
                unit.raw.eq(is_plane),
                unit.shift.eq(fields.shift),
                unit.valid.eq(inside[lane]),
                unit.x.eq(elements.word_select(lane, 16)),
                unit.offset.eq(coefficients[:32]),
                unit.gain.eq(coefficients[32:]),
            ]
            lanes.append(unit)

        # after the lanes: keep the elements, and find the largest of the row
        step = data.StructLayout({
            "valid": 1, "pixel": len(pixel), "row": row_bits, "group": len(words),
            "group_first": 1, "group_last": 1, "row_last": 1})
        entering = Signal(step)
        m.d.comb += [
            entering.valid.eq(entered),
            entering.pixel.eq(pixel),
            entering.row.eq(row),
            entering.group.eq(group),
            entering.group_first.eq((row == 0) | (is_block & ~row[:block_bits].any())),
            entering.group_last.eq(group_last),
            entering.row_last.eq(row_last),
        ]
        done = delayed(m, entering, 1 + AffineLane.latency, "affine_step")
        m.submodules.element_memory = element_memory = memory.Memory(
            shape=24 * quad, depth=PIXELS << row_bits, init=[])
        element_write = element_memory.write_port()
        element_read = element_memory.read_port()
        m.d.comb += [
            element_write.addr.eq(Cat(done.row, done.pixel[:place_bits])),
            element_write.data.eq(Cat(Cat(unit.magnitude, unit.negative) for unit in lanes)),
            element_write.en.eq(done.valid),
        ]
        magnitudes = [unit.magnitude for unit in lanes]
        while len(magnitudes) > 1:
            magnitudes = [Mux(left > right, left, right)
                          for left, right in zip(magnitudes[::2], magnitudes[1::2], strict=True)]
        row_largest = delayed(m, magnitudes[0], 1, "row_largest")
        row_clipped = delayed(m, Cat(unit.clipped for unit in lanes).any(), 1, "row_clipped")
        found = delayed(m, done, 1, "row_step")

        # the largest of the group, then its scale
        largest = Signal(23)
        clipped = Signal()
        before = Mux(found.group_first, 0, largest)
        group_clipped = row_clipped | (clipped & ~found.group_first)
        with m.If(found.valid):
            m.d.sync += [
                largest.eq(Mux(row_largest > before, row_largest, before)),
                clipped.eq(group_clipped),
            ]
        with m.If(accept):
            m.d.sync += self.saturations.eq(0)
        with m.Elif(found.valid & found.group_last & group_clipped):
            m.d.sync += self.saturations.eq(self.saturations + 1)
        m.d.comb += [
            encoder.format.eq(fields.format),
            encoder.amax.eq(largest),
        ]
        coded = delayed(m, found, 1 + encoder.latency, "scale_step")

        # Scales keep until the writer has the pixel: as many as both rings hold.
        m.submodules.scale_memory = scale_memory = memory.Memory(
            shape=9, depth=2 * PIXELS << len(words), init=[])
        scale_write = scale_memory.write_port()
        scale_read = scale_memory.read_port()
        scale_out = scale_memory.read_port()
        m.d.comb += [
            scale_write.addr.eq(Cat(coded.group, coded.pixel)),
            scale_write.data.eq(Cat(encoder.code, encoder.zero)),
            scale_write.en.eq(coded.valid & coded.group_last),
            elements_ring.fill.eq(coded.valid & coded.row_last),
        ]

        # The quantizer lanes take a row of elements a cycle; the network input goes twice.
        q_row = Signal(row_bits)
        q_pixel = Signal.like(pixel)
        q_first = Signal()
        q_last = q_row == (codes_words << 2) - 1
        q_enter = (q_row != 0) | (elements_ring.ready & codes_ring.room)
        low = is_plane & q_row[2]
        m.d.comb += [
            elements_ring.take.eq(q_enter & (q_row == 0)),
            codes_ring.reserve.eq(q_enter & (q_row == 0)),
            elements_ring.release.eq(q_enter & q_last),
            element_read.addr.eq(Cat(Mux(is_plane, q_row[:2], q_row)[:row_bits],
                                     q_pixel[:place_bits])),
            scale_read.addr.eq(Cat(Mux(is_block, q_row >> block_bits, 0)[:len(words)], q_pixel)),
        ]
        with m.If(go):
            m.d.sync += [q_row.eq(0), q_pixel.eq(0), q_first.eq(1)]
        with m.Elif(q_enter):
            m.d.sync += [q_row.eq(Mux(q_last, 0, q_row + 1)), q_pixel.eq(q_pixel + q_last)]
            with m.If(q_last):
                m.d.sync += q_first.eq(0)

        # cycle 1: element and scale
        mantissa, exponent = decode(scale_read.data[:8])
        low_half = delayed(m, low, 1, "low_half")
        quantizers = []
        for lane in range(quad):
            unit = place(m, f"quantizer_{lane}", "sqdm_quantizer_lane",
                         self.parts["sqdm_quantizer_lane"])
            element = element_read.data.word_select(lane, 24)
            m.d.comb += [
                unit.format.eq(fields.format),
                unit.low.eq(low_half),
                unit.zero.eq(scale_read.data[8]),
                unit.mantissa.eq(mantissa),
                unit.shift.eq(Mux(is_block, scale_read.data[:4], exponent - 1)),
                unit.magnitude.eq(element[:23]),
                unit.negative.eq(element[23]),
            ]
            quantizers.append(unit)

        # after the lanes: keep the codes and count zeros
        q_step = data.StructLayout({
            "valid": 1, "pixel": len(pixel), "row": row_bits, "last": 1, "first": 1})
        q_entering = Signal(q_step)
        m.d.comb += [
            q_entering.valid.eq(q_enter),
            q_entering.pixel.eq(q_pixel),
            q_entering.row.eq(q_row),
            q_entering.last.eq(q_last),
            q_entering.first.eq(q_first),
        ]
        q_done = delayed(m, q_entering, 1 + QuantizerLane.latency, "quantizer_step")
        m.d.comb += [
            writer.w_enable.eq(q_done.valid),
            writer.w_pixel.eq(q_done.pixel[:place_bits]),
            writer.w_row.eq(q_done.row),
            writer.w_codes.eq(Cat(unit.code for unit in quantizers)),
            codes_ring.fill.eq(q_done.valid & q_done.last),
            zero_counters.enable.eq(q_done.valid),
            zero_counters.row.eq(q_done.row),
            zero_counters.first.eq(q_done.first),
            zero_counters.zeros.eq(Cat(unit.code == 0 for unit in quantizers)),
            zero_counters.r_enable.eq(writer.count_enable),
            zero_counters.r_row.eq(writer.count_row),
            writer.count_row_data.eq(zero_counters.r_counts),
        ]

        # the writer's side
        constant = Mux(writer.scale_group[0], 0, HIGH_SCALE)
        plane_scale = Signal(8)
        with m.If(writer.scale_enable):
            m.d.sync += plane_scale.eq(constant)
        m.d.comb += [
            writer.pixel_ready.eq(codes_ring.ready),
            codes_ring.take.eq(writer.pixel_take),
            codes_ring.release.eq(writer.pixel_release),
            scale_out.addr.eq(Cat(writer.scale_group, writer.scale_pixel[:len(pixel)])),
            scale_out.en.eq(writer.scale_enable),
            writer.scale.eq(Mux(is_plane, plane_scale, scale_out.data[:8])),
        ]
        return m
