"""Everything that a requantization pass writes: order, scales, codes in label order, counts."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.channel_lists import BLOCK, entry_layout, tile_layout
from hw.descriptor import Format
from hw.mapper import PIXEL_WIDTH, ScaleMapper, word_width
from hw.memory_port import write_layout

__all__ = ["CodeWriter", "ring_depth"]


def ring_depth(config):
    """Rows of V/4 slots that a ring between two units holds: at least a pixel of any tensor."""
    return max(128, 1 << (config.max_channels // config.quad - 1).bit_length())


class Part(enum.Enum, shape=3):
    """What an operation of the writer contributes to."""

    HEADER = 0  # length and split of a tile's list
    ORDER = 1   # V/4 entries of the list
    SCALE = 2   # scale byte of a group of the pixel
    CODES = 3   # V/4 positions of the pixel
    COUNT = 4   # zero count of a slot, and with the row's first one all of the row's counts


class CodeWriter(wiring.Component):
    """Write the results of a requantization pass to memory.

    After ``start`` it writes the list of each tile as it comes on ``tiles``; for each pixel the
    scale bytes of its groups and the codes of all tiles in the order of the lists; at last, except
    for IN16, the zero counts, and with ``store_counts`` hands them to the detector. ``busy`` is
    high from the cycle after ``start`` until the last write request has been taken.

    It does one operation a cycle: a tile's list takes 1 cycle and 4 for each word of positions; a
    pixel takes 4 cycles for each word of positions, one for each group and, with two planes, one
    more, which is the second plane of its last word. While a write request waits, everything else
    does, and nothing is lost.

    Parameters
    ----------
    config : Config

    Members
    -------
    start : ``In(1)``
    format : ``In(2)``
    pixels : ``In(16)``
    words, groups : ``In``
        Words of V slots, and scales, of a pixel.
    block_words : ``In``
        Port words from one tile's list to the next one's.
    permutation, scales, destination, counts : ``In(address_width)``
        First words of what is written.
    detector : ``In(16)``
        Entry of slot 0.
    store_counts : ``In(1)``
    tiles : ``In(stream.Signature(tile_layout(config)))``
    list_enable, list_row : ``Out``
    list_entries : ``In``
        Rows of the lists; see `ChannelLists`.
    w_enable, w_address, w_codes : ``In``
        Codes of V/4 slots, 8 bits each, into a ring of ``ring_depth(config)`` rows. A pixel takes
        4 * ``words`` of them; the first one begins at 0.
    pixel_ready : ``In(1)``
        The next pixel's codes and scales are all there.
    pixel_take, pixel_release : ``Out(1)``
        Strobes: the writer begins with a pixel; it no longer needs the pixel's codes.
    scale_enable, scale_group : ``Out``
    scale : ``In(8)``
        The next scale in the order of pixels and groups, a cycle after ``scale_enable``; keeps
        until the next.
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
        self.row_bits = (config.max_channels // config.quad - 1).bit_length()
        self.depth = ring_depth(config)
        words = word_width(config)
        address = config.address_width
        super().__init__({
            "start": In(1),
            "format": In(2),
            "pixels": In(PIXEL_WIDTH),
            "words": In(words),
            "groups": In(words),
            "block_words": In((config.tile_channels // config.quad + 1).bit_length()),
            "permutation": In(address),
            "scales": In(address),
            "destination": In(address),
            "counts": In(address),
            "detector": In(16),
            "store_counts": In(1),
            "tiles": In(stream.Signature(tile_layout(config))),
            "list_enable": Out(1),
            "list_row": Out(self.row_bits),
            "list_entries": In(data.ArrayLayout(entry_layout(config), config.quad)),
            "w_enable": In(1),
            "w_address": In(range(self.depth)),
            "w_codes": In(8 * config.quad),
            "pixel_ready": In(1),
            "pixel_take": Out(1),
            "pixel_release": Out(1),
            "scale_enable": Out(1),
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
        plane_words = BLOCK // self.config.vector
        tile = self.tiles.payload

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
        block = Signal(self.config.address_width)    # of the tile's list
        rows_before = Signal(self.row_bits + 1)      # of the lists of the tiles before

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
                m.d.sync += [index.eq(0), pixel.eq(0), rows_before.eq(0), block.eq(0)]
                with m.If(self.start):
                    m.next = "Header"
            with m.State("Header"):
                with m.If(self.tiles.valid):
                    with m.If(issue(Part.HEADER, 1)):
                        m.next = "Order"
            with m.State("Order"):
                m.d.comb += self.list_row.eq(rows_before + index)
                with m.If(issue(Part.ORDER, tile.words << 2)):
                    m.d.comb += self.tiles.ready.eq(1)
                    m.d.sync += [
                        rows_before.eq(rows_before + (tile.words << 2)),
                        block.eq(block + self.block_words),
                    ]
                    m.next = "Header"
                    with m.If(tile.last):
                        m.next = "Scales"
            with m.State("Scales"):
                with m.If((index != 0) | self.pixel_ready):
                    with m.If(advance & (index == 0)):
                        m.d.comb += self.pixel_take.eq(1)
                    with m.If(issue(Part.SCALE, self.groups)):
                        m.next = "Codes"
            with m.State("Codes"):
                m.d.comb += self.list_row.eq(index)
                with m.If(issue(Part.CODES, rows_before)):
                    m.d.sync += pixel.eq(pixel + 1)
                    with m.If(pixel != self.pixels - 1):
                        m.next = "Scales"
                    with m.Elif(is_plane):
                        m.next = "Drain"
                    with m.Else():
                        m.next = "Counts"
            with m.State("Counts"):
                with m.If(issue(Part.COUNT, self.words << quad_bits + 2)):
                    m.next = "Drain"
            with m.State("Drain"):
                with m.If(~cycle_1.valid & ~cycle_2.valid & ~pending & room):
                    m.next = "Idle"

        # cycle 1: list entries are there; read codes, scale or counts
        m.d.comb += [
            self.list_enable.eq(advance),
            self.scale_enable.eq(advance & cycle_1.valid & (cycle_1.part == Part.SCALE)),
            self.scale_group.eq(cycle_1.index),
            self.count_enable.eq(advance & (cycle_1.part == Part.COUNT) & cycle_1.valid),
            self.count_row.eq(cycle_1.index[quad_bits:]),
            self.pixel_release.eq(
                advance & cycle_1.valid & (cycle_1.part == Part.CODES) & cycle_1.last),
        ]
        entries = Signal.like(self.list_entries)
        tiles = max(2, self.config.max_channels // BLOCK)
        number = Signal(range(tiles))      # of the tile
        number_2 = Signal.like(number)
        place = Signal(range(self.depth))  # of the pixel in the ring
        with m.If(advance):
            m.d.sync += [
                cycle_1.eq(issued),
                cycle_2.eq(cycle_1),
                entries.eq(self.list_entries),
                number_2.eq(number),
            ]
            with m.If(cycle_1.valid & (cycle_1.part == Part.HEADER)):
                m.d.sync += number.eq(Mux(tile.last, 0, number + 1))
            with m.If(cycle_1.valid & (cycle_1.part == Part.CODES)
                      & self.list_entries[quad - 1].last):
                m.d.sync += number.eq(Mux(cycle_1.last, 0, number + 1))
        with m.If(self.start & ~self.busy):
            m.d.sync += [number.eq(0), place.eq(0)]
        with m.Elif(self.pixel_release):
            m.d.sync += place.eq(place + (self.words << 2))

        # One copy of the codes for each position that is read in a cycle.
        m.submodules.codes = codes = memory.Memory(
            shape=8 * quad, depth=self.depth, init=[])
        write = codes.write_port()
        m.d.comb += [
            write.addr.eq(self.w_address),
            write.data.eq(self.w_codes),
            write.en.eq(self.w_enable),
        ]
        lows, highs = [], []
        for lane in range(quad):
            read = codes.read_port()
            slot = self.list_entries[lane].slot
            m.d.comb += [
                read.addr.eq(place + slot[quad_bits:]),
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

        m.submodules.scale_mapper = scale_mapper = ScaleMapper(self.config)
        m.d.comb += [
            scale_mapper.base.eq(self.scales),
            scale_mapper.plane.eq(self.pixels),
            scale_mapper.group.eq(cycle_2.index),
            scale_mapper.pixel.eq(cycle_2.pixel),
        ]
        ends_tile = entries[quad - 1].last
        # Where each tile's codes of the next pixel go.
        m.submodules.pointers = pointers = memory.Memory(
            shape=self.config.address_width, depth=tiles, init=[])
        pointers_read = pointers.read_port()
        pointers_write = pointers.write_port()
        fresh = Signal()                                 # no word of the tile has been composed
        next_word = Signal(self.config.address_width)
        next_order = Signal(self.config.address_width)
        first = Signal(tile.first.shape())               # slot of the tile
        m.d.comb += [
            pointers_read.addr.eq(number),
            pointers_read.en.eq(advance),
            pointers_write.addr.eq(number_2),
        ]
        slots = [Mux(entry.pad, 0xFFFF, (entry.slot - first)[:len(first)])
                 for entry in (entries[n] for n in range(quad))]
        composed = Signal(write_layout(self.config))
        m.d.comb += [composed.strobe.eq(~0), emits.eq(cycle_2.valid)]
        with m.Switch(cycle_2.part):
            with m.Case(Part.HEADER):
                m.d.comb += [
                    composed.address.eq(self.permutation + block),
                    composed.data.eq(Cat(
                        *(Cat(field, Const(0, 16 - len(field)))
                          for field in (tile.count, tile.low, tile.high)), tile.cut)),
                    pointers_write.data.eq(self.destination + tile.offset),
                    pointers_write.en.eq(cycle_2.valid),
                ]
                with m.If(advance & cycle_2.valid):
                    m.d.sync += [
                        next_order.eq(composed.address + 1),
                        first.eq(tile.first),
                        fresh.eq(1),
                    ]
            with m.Case(Part.ORDER):
                m.d.comb += [
                    composed.address.eq(next_order),
                    composed.data.eq(Cat(Cat(slot, Const(0, 16))[:16] for slot in slots)),
                ]
                with m.If(advance & cycle_2.valid):
                    m.d.sync += next_order.eq(next_order + 1)
            with m.Case(Part.SCALE):
                m.d.comb += [
                    composed.address.eq(scale_mapper.address),
                    composed.data.eq(self.scale.replicate(port // 8)),
                    composed.strobe.eq(Const(1, port // 8) << scale_mapper.byte),
                ]
            with m.Case(Part.CODES):
                m.d.comb += [
                    composed.address.eq(Mux(fresh, pointers_read.data, next_word)),
                    composed.data.eq(low_word),
                    emits.eq(cycle_2.valid & (cycle_2.index[:2] == 3)),
                    pointers_write.data.eq(
                        composed.address + 1 + Mux(has_planes, plane_words, 0)),
                    pointers_write.en.eq(emits & ends_tile),
                ]
                with m.If(advance & emits):
                    m.d.sync += [next_word.eq(composed.address + 1), fresh.eq(ends_tile)]
            with m.Case(Part.COUNT):
                m.d.comb += [
                    composed.address.eq(self.counts + (cycle_2.index >> quad_bits)),
                    composed.data.eq(self.count_row_data),
                    emits.eq(cycle_2.valid & (cycle_2.index[:quad_bits] == 0)),
                ]

        # cycle 3: the request; the second plane follows the tile's words of the first
        second = Signal(port)
        with m.If(self.write.ready):
            m.d.sync += self.write.valid.eq(0)
        with m.If(room & pending):
            m.d.sync += [
                self.write.valid.eq(1),
                self.write.payload.address.eq(self.write.payload.address + plane_words),
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
