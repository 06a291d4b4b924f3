"""Everything that a requantization pass writes: order, scales, codes in label order, counts."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.channel_lists import entry_layout, most_slots
from hw.descriptor import Format
from hw.mapper import PIXEL_WIDTH, ActivationMapper, ScaleMapper, word_width
from hw.memory_port import write_layout

__all__ = ["PIXELS", "CodeWriter"]

PIXELS = 4  # pixels of codes that the writer keeps



class Part(enum.Enum, shape=3):
    """What an operation of the writer contributes to."""

    HEADER = 0  # lengths of the lists
    ORDER = 1   # V/4 entries of the permutation
    SCALE = 2   # scale byte of a group of the pixel
    CODES = 3   # V/4 positions of the pixel
    COUNT = 4   # zero count of a slot, and with the row's first one all of the row's counts


class CodeWriter(wiring.Component):
    """Write the results of a requantization pass to memory.

    After ``start`` it waits for ``lists_ready``, then writes the permutation; for each pixel the
    scale bytes of its groups and its codes in the order of the lists; at last, except for IN16,
    the zero counts, and with ``store_counts`` hands them to the detector. ``busy`` is high from
    the cycle after ``start`` until the last write request has been taken.

    It does one operation a cycle, so that a pixel takes 4 cycles a word of positions, one a group
    and, with two planes, one more. While a write request waits, everything else does, and nothing
    is lost.

    Parameters
    ----------
    config : Config

    Members
    -------
    start, lists_ready : ``In(1)``
    format : ``In(2)``
    pixels : ``In(16)``
    words, groups : ``In``
        Words of V slots, and scales, of a pixel.
    permutation, scales, destination, counts : ``In(address_width)``
        First words of what is written.
    detector : ``In(16)``
        Entry of slot 0.
    store_counts : ``In(1)``
    dense_count, sparse_count, dense_words, sparse_words : ``In``
        Lengths of the lists.
    list_enable, list_row : ``Out``
    list_entries : ``In``
        Rows of the lists; see `ChannelLists`.
    w_enable, w_pixel, w_row, w_codes : ``In``
        Codes of V/4 slots, 8 bits each, into one of `PIXELS` places.
    pixel_ready : ``In(1)``
        The next pixel's codes and scales are all there.
    pixel_take, pixel_release : ``Out(1)``
        Strobes: the writer begins with a pixel; it no longer needs the pixel's place.
    scale_enable, scale_pixel, scale_group : ``Out``
    scale : ``In(8)``
        A cycle after ``scale_enable``; keeps until the next.
    count_enable, count_row : ``Out``
    count_row_data : ``In(V/4 * 16)``
        Zero counts; a cycle after ``count_enable``; keeps until the next.
    detector_enable, detector_entry, detector_count : ``Out``
        A count for the detector.
    write : ``Out(stream.Signature(write_layout(config)))``
    busy : ``Out(1)``
    """

    def __init__(self, config):
        self.config = config
        self.row_bits = (most_slots(config) // config.quad - 1).bit_length()
        self.list_bits = (2 * most_slots(config) // config.quad - 1).bit_length()
        words = word_width(config)
        address = config.address_width
        count = most_slots(config).bit_length()
        super().__init__({
            "start": In(1),
            "lists_ready": In(1),
            "format": In(2),
            "pixels": In(PIXEL_WIDTH),
            "words": In(words),
            "groups": In(words),
            "permutation": In(address),
            "scales": In(address),
            "destination": In(address),
            "counts": In(address),
            "detector": In(16),
            "store_counts": In(1),
            "dense_count": In(count),
            "sparse_count": In(count),
            "dense_words": In(words),
            "sparse_words": In(words),
            "list_enable": Out(1),
            "list_row": Out(self.list_bits),
            "list_entries": In(data.ArrayLayout(entry_layout(config), config.quad)),
            "w_enable": In(1),
            "w_pixel": In(range(PIXELS)),
            "w_row": In(self.row_bits),
            "w_codes": In(8 * config.quad),
            "pixel_ready": In(1),
            "pixel_take": Out(1),
            "pixel_release": Out(1),
            "scale_enable": Out(1),
            "scale_pixel": Out(PIXEL_WIDTH),
            "scale_group": Out(words),
            "scale": In(8),
            "count_enable": Out(1),
            "count_row": Out(self.row_bits),
            "count_row_data": In(16 * config.quad),
            "detector_enable": Out(1),
            "detector_entry": Out(16),
            "detector_count": Out(16),
            "write": Out(stream.Signature(write_layout(config))),
            "busy": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        quad, port = self.config.quad, self.config.port_width
        quad_bits = quad.bit_length() - 1
        is_plane = self.format == Format.IN16
        has_planes = is_plane | (self.format == Format.MX8)

        # An operation: `index` counts the rows, groups or slots of its part.
        operation = data.StructLayout({
            "valid": 1,
            "part": Part,
            "index": self.row_bits + quad_bits + 1,
            "pixel": PIXEL_WIDTH,
            "last": 1,
        })
        issued = Signal(operation)
        cycle_1 = Signal(operation)
        cycle_2 = Signal(operation)

        # Writes that wait hold up the operations; so does a second plane that still has to leave.
        room = ~self.write.valid | self.write.ready
        pending = Signal()
        emits = Signal()
        advance = Signal()

        # issue
        index = Signal.like(issued.index)
        pixel = Signal(PIXEL_WIDTH)
        order_rows = (self.dense_words + self.sparse_words) << 2
        lengths = {
            Part.ORDER: order_rows,
            Part.SCALE: self.groups,
            Part.CODES: order_rows,
            Part.COUNT: self.words << quad_bits + 2,
        }

        def issue(part, length):
            """Operations of ``part``, one for each index; the last one restarts the index."""
            last = index == length - 1
            m.d.comb += [
                issued.valid.eq(1),
                issued.part.eq(part),
                issued.index.eq(index),
                issued.pixel.eq(pixel),
                issued.last.eq(last),
            ]
            with m.If(advance):
                m.d.sync += index.eq(Mux(last, 0, index + 1))
            return advance & last

        m.d.comb += self.busy.eq(1)
        with m.FSM(name="write"):
            with m.State("Idle"):
                m.d.comb += self.busy.eq(0)
                m.d.sync += [index.eq(0), pixel.eq(0)]
                with m.If(self.start):
                    m.next = "Wait"
            with m.State("Wait"):
                with m.If(self.lists_ready):
                    m.next = "Header"
            with m.State("Header"):
                with m.If(issue(Part.HEADER, 1)):
                    m.next = "Order"
            with m.State("Order"):
                with m.If(issue(Part.ORDER, lengths[Part.ORDER])):
                    m.next = "Scales"
            with m.State("Scales"):
                with m.If((index != 0) | self.pixel_ready):
                    with m.If(advance & (index == 0)):
                        m.d.comb += self.pixel_take.eq(1)
                    with m.If(issue(Part.SCALE, lengths[Part.SCALE])):
                        m.next = "Codes"
            with m.State("Codes"):
                with m.If(issue(Part.CODES, lengths[Part.CODES])):
                    m.d.sync += pixel.eq(pixel + 1)
                    with m.If(pixel != self.pixels - 1):
                        m.next = "Scales"
                    with m.Elif(is_plane):
                        m.next = "Drain"
                    with m.Else():
                        m.next = "Counts"
            with m.State("Counts"):
                with m.If(issue(Part.COUNT, lengths[Part.COUNT])):
                    m.next = "Drain"
            with m.State("Drain"):
                with m.If(~cycle_1.valid & ~cycle_2.valid & ~pending & room):
                    m.next = "Idle"

        # cycle 1: list entries are there; read codes, scale or counts
        m.d.comb += [
            self.list_enable.eq(advance),
            self.list_row.eq(issued.index),
            self.scale_enable.eq(advance),
            self.scale_pixel.eq(cycle_1.pixel),
            self.scale_group.eq(cycle_1.index),
            self.count_enable.eq(advance & (cycle_1.part == Part.COUNT) & cycle_1.valid),
            self.count_row.eq(cycle_1.index[quad_bits:]),
            self.pixel_release.eq(
                advance & cycle_1.valid & (cycle_1.part == Part.CODES) & cycle_1.last),
        ]
        entries = Signal.like(self.list_entries)
        with m.If(advance):
            m.d.sync += [cycle_1.eq(issued), cycle_2.eq(cycle_1), entries.eq(self.list_entries)]

        # One copy of the codes for each position that is read in a cycle.
        m.submodules.codes = codes = memory.Memory(
            shape=8 * quad, depth=PIXELS << self.row_bits, init=[])
        write = codes.write_port()
        m.d.comb += [
            write.addr.eq(Cat(self.w_row, self.w_pixel)),
            write.data.eq(self.w_codes),
            write.en.eq(self.w_enable),
        ]
        lows, highs = [], []
        for lane in range(quad):
            read = codes.read_port()
            slot = self.list_entries[lane].slot
            m.d.comb += [
                read.addr.eq(Cat(slot[quad_bits:], cycle_1.pixel[:PIXELS.bit_length() - 1])),
                read.en.eq(advance),
            ]
            code = Signal(8, name=f"code_{lane}")
            with m.If(~entries[lane].pad):
                m.d.comb += code.eq(read.data.word_select(entries[lane].slot[:quad_bits], 8))
            lows.append(code[:4])
            highs.append(code[4:])

        # cycle 2: collect four rows to a word
        low = Signal(3 * port // 4)
        high = Signal.like(low)
        low_word = Cat(low, lows)
        high_word = Cat(high, highs)
        m.d.comb += advance.eq(room & ~(pending & emits))
        with m.If(advance & cycle_2.valid & (cycle_2.part == Part.CODES)):
            m.d.sync += [low.eq(low_word[port // 4:]), high.eq(high_word[port // 4:])]

        m.submodules.activation_mapper = activation_mapper = ActivationMapper(self.config)
        m.submodules.scale_mapper = scale_mapper = ScaleMapper(self.config)
        m.d.comb += [
            activation_mapper.base.eq(self.destination),
            activation_mapper.plane.eq(self.pixels),
            activation_mapper.word.eq(cycle_2.index >> 2),
            activation_mapper.pixel.eq(cycle_2.pixel),
            activation_mapper.unit.eq(has_planes),
            scale_mapper.base.eq(self.scales),
            scale_mapper.plane.eq(self.pixels),
            scale_mapper.group.eq(cycle_2.index),
            scale_mapper.pixel.eq(cycle_2.pixel),
        ]
        slots = [Mux(entry.pad, 0xFFFF, entry.slot) for entry in (entries[n] for n in range(quad))]
        composed = Signal(write_layout(self.config))
        m.d.comb += [composed.strobe.eq(~0), emits.eq(cycle_2.valid)]
        with m.Switch(cycle_2.part):
            with m.Case(Part.HEADER):
                m.d.comb += [
                    composed.address.eq(self.permutation),
                    composed.data.eq(Cat(self.dense_count, Const(0, 16 - len(self.dense_count)),
                                     self.sparse_count)),
                ]
            with m.Case(Part.ORDER):
                m.d.comb += [
                    composed.address.eq(self.permutation + 1 + cycle_2.index),
                    composed.data.eq(Cat(slot[:16] for slot in slots)),
                ]
            with m.Case(Part.SCALE):
                m.d.comb += [
                    composed.address.eq(scale_mapper.address),
                    composed.data.eq(self.scale.replicate(port // 8)),
                    composed.strobe.eq(Const(1, port // 8) << scale_mapper.byte),
                ]
            with m.Case(Part.CODES):
                m.d.comb += [
                    composed.address.eq(activation_mapper.address),
                    composed.data.eq(low_word),
                    emits.eq(cycle_2.valid & (cycle_2.index[:2] == 3)),
                ]
            with m.Case(Part.COUNT):
                m.d.comb += [
                    composed.address.eq(self.counts + (cycle_2.index >> quad_bits)),
                    composed.data.eq(self.count_row_data),
                    emits.eq(cycle_2.valid & (cycle_2.index[:quad_bits] == 0)),
                ]

        # cycle 3: the request; a second plane follows the first in the next word
        second = Signal(port)
        with m.If(self.write.ready):
            m.d.sync += self.write.valid.eq(0)
        with m.If(room & pending):
            m.d.sync += [
                self.write.valid.eq(1),
                self.write.payload.address.eq(self.write.payload.address + 1),
                self.write.payload.data.eq(second),
                pending.eq(0),
            ]
        with m.Elif(room & emits):
            m.d.sync += [
                self.write.valid.eq(1),
                self.write.payload.eq(composed),
                second.eq(high_word),
                pending.eq(has_planes & (cycle_2.part == Part.CODES)),
            ]

        # Counts reach the detector one by one.
        m.d.comb += [
            self.detector_enable.eq(
                advance & cycle_2.valid & (cycle_2.part == Part.COUNT) & self.store_counts),
            self.detector_entry.eq(self.detector + cycle_2.index),
            self.detector_count.eq(
                self.count_row_data.word_select(cycle_2.index[:quad_bits], 16)),
        ]
        return m
