"""The requantization pass: 16-bit values become codes, scales, zero counts and channel order."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from hw.affine import AffineLane
from hw.channel_lists import BLOCK, ChannelLists
from hw.code_writer import CodeWriter, ring_depth
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

PIXELS = 8       # most pixels in a ring between two units
HIGH_SCALE = 8   # scale of the high halves of the network input; that of the low halves is 0


def fields_layout(config):
    """The descriptor's fields that a requantization pass needs."""
    address = config.address_width
    return data.StructLayout({
        "format": 2,
        "relu": 1,
        "balance": 1,
        "height": 16,
        "width": 16,
        "channels": 16,
        "channels_second": 16,
        "tile_channels": 16,
        "dense_limit": 8,
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
        "cost_word": 16,
        "cost_nonzero": 16,
        "cost_group": 16,
        "cost_floor": 16,
    })


def scales_depth(config, depth):
    """Scales, rounded up to a power of two, of the pixels in two rings of ``depth`` rows."""
    most = 0
    for rows in range(4, config.max_channels // config.quad + 1, 4):
        groups = -(-rows * config.quad // BLOCK)
        full = min(PIXELS, depth // rows)
        most = max(most, groups * (full + min(PIXELS, full + 1)))
    return 1 << (most - 1).bit_length()


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
    within ``max_channels`` (MX8: in blocks of 32; IN16: one segment, two blocks of 32 for each 32
    channels), ``tile_channels`` a multiple of 32 within the core's (MX8 and IN16: 32), ``relu`` set
    for A4U and clear for IN16, ``balance`` clear for MX8 and IN16, ``interval`` not 0, and detector
    entries within ``detector_depth``. ``start`` while busy is ignored. Results do not depend on
    when memory answers.

    Three units work on different pixels at the same time: the affine lanes (4 cycles for a word of
    V slots of the input), the quantizer lanes (4 cycles for a word of slots of the codes) and the
    writer (4 cycles for a word of positions, one for each scale and, for MX8 and IN16, one more).
    The slowest sets the pace when memory keeps up: 4 * W + 1 cycles a pixel for A4 of W words of
    positions in all tiles. The rings between the units hold ``ring_depth(config)`` rows of V/4
    slots, at most 8 pixels. Where only two pixels fit, the quantizer lanes and the writer wait 3
    cycles a pixel for each other; where only one fits, they take turns.

    Before the first pixel can be written all lists have to be. A pass takes what `ChannelLists`
    takes for its tiles, 4 cycles for each word of the last list, the pixels, V cycles a word of
    slots for the zero counts (not IN16), and 5 more. Where the lists take less than the affine
    table (16 cycles a word of V slots) and the first pixel's way through all units (8 cycles a
    word, and about 25 and the latency of memory), these count in their place.

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
        row_bits = (config.max_channels // quad - 1).bit_length()
        block_bits = (BLOCK // quad).bit_length() - 1  # rows of a block
        block_words = BLOCK // vector
        depth = ring_depth(config)
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
        codes_rows = Signal(row_bits + 1)
        groups = Signal(word_width(config))     # scales of a pixel
        go = begin[1]
        accept = self.start & ~self.busy
        m.d.sync += begin.eq(Cat(accept, begin[0]))
        m.d.comb += self.busy.eq(begin.any() | writer.busy)
        blocks = (words + block_words - 1) >> (block_words.bit_length() - 1)
        plane_blocks = (fields.channels + BLOCK - 1) >> (BLOCK.bit_length() - 1)
        m.d.sync += [
            pixels.eq(fields.height * fields.width),
            words_first.eq((fields.channels + vector - 1) >> vector_bits),
            words.eq(((fields.channels + vector - 1) >> vector_bits)
                     + ((fields.channels_second + vector - 1) >> vector_bits)),
            groups.eq(Mux(is_plane, plane_blocks << 1, Mux(is_block, blocks, 1))),
            codes_words.eq(Mux(is_plane, plane_blocks << block_words.bit_length(),
                               Mux(is_block, blocks * block_words, words))),
        ]
        m.d.comb += codes_rows.eq(codes_words << 2)

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
            lists.balance.eq(fields.balance),
            lists.first_slots.eq(Mux(is_plane, codes_words >> 1, words_first) << vector_bits),
            lists.slots.eq(codes_words << vector_bits),
            lists.channels.eq(fields.channels),
            lists.channels_second.eq(Mux(is_plane, fields.channels, fields.channels_second)),
            lists.tile_channels.eq(fields.tile_channels),
            lists.dense_limit.eq(fields.dense_limit),
            lists.pixels.eq(pixels),
            lists.cost_word.eq(fields.cost_word),
            lists.cost_nonzero.eq(fields.cost_nonzero),
            lists.cost_group.eq(fields.cost_group),
            lists.cost_floor.eq(fields.cost_floor),
            lists.base.eq(fields.detector),
            lists.detector_count.eq(detector.count),
            lists.detector_sparse.eq(detector.sparse),
            lists.enable.eq(writer.list_enable),
            lists.row.eq(writer.list_row),

            writer.start.eq(go),
            writer.format.eq(fields.format),
            writer.pixels.eq(pixels),
            writer.words.eq(codes_words),
            writer.groups.eq(groups),
            writer.block_words.eq((fields.tile_channels >> quad_bits) + 1),
            writer.permutation.eq(fields.permutation),
            writer.scales.eq(fields.scales),
            writer.destination.eq(fields.destination),
            writer.counts.eq(fields.counts),
            writer.detector.eq(fields.detector),
            writer.store_counts.eq(has_labels & detector.due),
            writer.list_entries.eq(lists.entries),
        ]
        connect(m, lists.o, writer.tiles)
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
        left = Signal(range(-config.max_channels, (1 << 16)))  # channels from here on
        elements_free = Signal(range(depth + 1), init=depth)
        second_row = row - (words_first << 2)
        m.d.comb += [
            self.read.response.ready.eq(
                loading | ((elements_free != 0) & ((row != 0) | elements_ring.room))),
            left.eq(Mux(row < words_first << 2,
                        fields.channels - (row << quad_bits),
                        fields.channels_second - (second_row << quad_bits))),
        ]
        entered = arrived & ~loading
        row_last = row == (words << 2) - 1
        group_last = row_last | (is_block & row[:block_bits].all())
        m.d.comb += elements_ring.reserve.eq(entered & (row == 0))
        with m.If(go):
            m.d.sync += row.eq(0)
        with m.Elif(entered):
            m.d.sync += row.eq(Mux(row_last, 0, row + 1))

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
            "valid": 1, "group_first": 1, "group_last": 1, "row_last": 1})
        entering = Signal(step)
        m.d.comb += [
            entering.valid.eq(entered),
            entering.group_first.eq((row == 0) | (is_block & ~row[:block_bits].any())),
            entering.group_last.eq(group_last),
            entering.row_last.eq(row_last),
        ]
        done = delayed(m, entering, 1 + AffineLane.latency, "affine_step")
        m.submodules.element_memory = element_memory = memory.Memory(
            shape=24 * quad, depth=depth, init=[])
        element_write = element_memory.write_port()
        element_read = element_memory.read_port()
        elements_end = Signal(range(depth))  # row of the ring after the last element
        with m.If(go):
            m.d.sync += elements_end.eq(0)
        with m.Elif(done.valid):
            m.d.sync += elements_end.eq(elements_end + 1)
        m.d.comb += [
            element_write.addr.eq(elements_end),
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

        # Scales keep until the writer has the pixel, in the order in which they are used.
        scales = scales_depth(config, depth)
        m.submodules.scale_memory = scale_memory = memory.Memory(shape=9, depth=scales, init=[])
        scale_write = scale_memory.write_port()
        scale_read = scale_memory.read_port()
        scale_out = scale_memory.read_port()
        scales_end, scale_next, scale_written = (
            Signal(range(scales), name=name)
            for name in ("scales_end", "scale_next", "scale_written"))
        scale_coded = coded.valid & coded.group_last
        m.d.comb += [
            scale_write.addr.eq(scales_end),
            scale_write.data.eq(Cat(encoder.code, encoder.zero)),
            scale_write.en.eq(scale_coded),
            elements_ring.fill.eq(coded.valid & coded.row_last),
        ]

        # The quantizer lanes take a row of elements a cycle; the network input goes twice. Rows
        # that only fill a block are zeros.
        q_row = Signal(row_bits)
        q_first = Signal()
        element_next = Signal(range(depth))  # row of the ring
        pixel_begin = Signal(range(depth))   # of the network input
        codes_free = Signal(range(depth + 1), init=depth)
        half_rows = codes_rows >> 1
        q_last = q_row == codes_rows - 1
        low = is_plane & (q_row >= half_rows)
        present = Mux(low, q_row - half_rows, q_row) < words << 2
        element_after = element_next + present
        q_enter = (q_row != 0) | (
            elements_ring.ready & codes_ring.room & (codes_free >= codes_rows))
        q_begin = q_enter & (q_row == 0)
        q_group_last = q_last | (is_block & q_row[:block_bits].all())
        element_leaves = q_enter & present & (~is_plane | low)
        m.d.comb += [
            elements_ring.take.eq(q_begin),
            codes_ring.reserve.eq(q_begin),
            elements_ring.release.eq(q_enter & q_last),
            element_read.addr.eq(element_next),
            scale_read.addr.eq(scale_next),
        ]
        with m.If(go):
            m.d.sync += [
                q_row.eq(0),
                q_first.eq(1),
                element_next.eq(0),
                pixel_begin.eq(0),
            ]
        with m.Elif(q_enter):
            m.d.sync += [q_row.eq(Mux(q_last, 0, q_row + 1)), element_next.eq(element_after)]
            with m.If(is_plane & (q_row == half_rows - 1)):
                m.d.sync += element_next.eq(pixel_begin)
            with m.If(q_last):
                m.d.sync += [q_first.eq(0), pixel_begin.eq(element_after)]
        m.d.sync += [
            elements_free.eq(elements_free - entered + element_leaves),
            codes_free.eq(codes_free - Mux(q_begin, codes_rows, 0)
                          + Mux(writer.pixel_release, codes_rows, 0)),
        ]
        with m.If(go):
            m.d.sync += [scales_end.eq(0), scale_next.eq(0), scale_written.eq(0)]
        with m.Else():
            m.d.sync += [
                scales_end.eq(scales_end + scale_coded),
                scale_next.eq(scale_next + (q_enter & q_group_last)),
                scale_written.eq(scale_written + writer.scale_enable),
            ]

        # cycle 1: element and scale
        mantissa, exponent = decode(scale_read.data[:8])
        low_half = delayed(m, low, 1, "low_half")
        has_element = delayed(m, present, 1, "has_element")
        quantizers = []
        for lane in range(quad):
            unit = place(m, f"quantizer_{lane}", "sqdm_quantizer_lane",
                         self.parts["sqdm_quantizer_lane"])
            element = Mux(has_element, element_read.data.word_select(lane, 24), 0)
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
            "valid": 1, "row": row_bits, "last": 1, "first": 1})
        q_entering = Signal(q_step)
        m.d.comb += [
            q_entering.valid.eq(q_enter),
            q_entering.row.eq(q_row),
            q_entering.last.eq(q_last),
            q_entering.first.eq(q_first),
        ]
        q_done = delayed(m, q_entering, 1 + QuantizerLane.latency, "quantizer_step")
        codes_end = Signal(range(depth))
        with m.If(go):
            m.d.sync += codes_end.eq(0)
        with m.Elif(q_done.valid):
            m.d.sync += codes_end.eq(codes_end + 1)
        m.d.comb += [
            writer.w_enable.eq(q_done.valid),
            writer.w_address.eq(codes_end),
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
        constant = Mux(writer.scale_group >= groups >> 1, 0, HIGH_SCALE)
        plane_scale = Signal(8)
        with m.If(writer.scale_enable):
            m.d.sync += plane_scale.eq(constant)
        m.d.comb += [
            writer.pixel_ready.eq(codes_ring.ready),
            codes_ring.take.eq(writer.pixel_take),
            codes_ring.release.eq(writer.pixel_release),
            scale_out.addr.eq(scale_written),
            scale_out.en.eq(writer.scale_enable),
            writer.scale.eq(Mux(is_plane, plane_scale, scale_out.data[:8])),
        ]
        return m
