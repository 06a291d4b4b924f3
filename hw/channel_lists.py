"""Channel lists: which channel slot stands at which position of a tensor of codes."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from hw.mapper import word_width

__all__ = ["ChannelLists", "entry_layout", "most_slots"]


def most_slots(config):
    """Channel slots of the largest tensor; the network input has two words of them."""
    return max(config.max_channels, 2 * config.vector)


def entry_layout(config):
    """A list entry: the channel ``slot``, or ``pad`` where the position holds no channel."""
    return data.StructLayout({"slot": (most_slots(config) - 1).bit_length(), "pad": 1})


class ChannelLists(wiring.Component):
    """Build the dense and the sparse list of a pass, and read them by position.

    ``start`` begins a scan of one slot a cycle that ends when ``busy`` is low. A slot that holds a
    channel goes to the sparse list if the detector says so and ``labelled`` is set, else to the
    dense list, in ascending order. With ``natural`` every slot is in the dense list at its own
    number, slots without a channel as pads; ``labelled`` must be low then.

    The dense list takes ``dense_words`` words of V positions, the sparse list the ``sparse_words``
    after it. The V/4 entries of ``row`` appear a cycle after ``enable`` and keep until the next;
    positions beyond a list's end read as pads.

    Members
    -------
    start, natural, labelled : ``In(1)``
    first_words, words : ``In``
        Words of V slots of the first segment, and of both.
    channels, channels_second : ``In(16)``
        Channels of the segments.
    base : ``In(16)``
        The detector's entry of slot 0.
    detector_entry : ``Out(16)``
    detector_sparse : ``In(1)``
        Label of the entry asked for in the cycle before.
    busy : ``Out(1)``
    dense_count, sparse_count : ``Out``
        Entries of the lists.
    dense_words, sparse_words : ``Out``
    enable : ``In(1)``
    row : ``In``
    entries : ``Out(ArrayLayout(entry_layout(config), V/4))``
    """

    def __init__(self, config):
        self.config = config
        self.row_bits = (2 * most_slots(config) // config.quad - 1).bit_length()
        words = word_width(config)
        count = most_slots(config).bit_length()
        super().__init__({
            "start": In(1),
            "natural": In(1),
            "labelled": In(1),
            "first_words": In(words),
            "words": In(words),
            "channels": In(16),
            "channels_second": In(16),
            "base": In(16),
            "detector_entry": Out(16),
            "detector_sparse": In(1),
            "busy": Out(1),
            "dense_count": Out(count),
            "sparse_count": Out(count),
            "dense_words": Out(words),
            "sparse_words": Out(words),
            "enable": In(1),
            "row": In(self.row_bits),
            "entries": Out(data.ArrayLayout(entry_layout(config), config.quad)),
        })

    def elaborate(self, platform):
        m = Module()
        vector, quad = self.config.vector, self.config.quad
        vector_bits, quad_bits = vector.bit_length() - 1, quad.bit_length() - 1
        layout = entry_layout(self.config)
        half_bits = self.row_bits - 1

        m.submodules.store = store = memory.Memory(
            shape=layout.size * quad, depth=1 << self.row_bits, init=[])
        read = store.read_port()
        write = store.write_port(granularity=layout.size)

        # cycle 1: ask for the slot's label
        scanning = Signal()
        slot = Signal(layout["slot"].width)
        second = Signal()
        index = Signal.like(slot)  # channel within the segment
        last_of_first = slot == (self.first_words << vector_bits) - 1
        last = slot == (self.words << vector_bits) - 1
        m.d.comb += self.detector_entry.eq(self.base + slot)
        with m.If(self.start):
            m.d.sync += [scanning.eq(1), slot.eq(0), index.eq(0), second.eq(0)]
        with m.Elif(scanning):
            m.d.sync += [scanning.eq(~last), slot.eq(slot + 1), index.eq(index + 1)]
            with m.If(last_of_first & ~second):
                m.d.sync += [second.eq(1), index.eq(0)]

        # cycle 2: append
        pending = Signal()
        entry = Signal(layout)
        sparse = ~entry.pad & self.labelled & self.detector_sparse
        count = Mux(sparse, self.sparse_count, self.dense_count)
        m.d.comb += self.busy.eq(scanning | pending)
        m.d.sync += [
            pending.eq(scanning),
            entry.slot.eq(slot),
            entry.pad.eq(index >= Mux(second, self.channels_second, self.channels)),
        ]
        m.d.comb += [
            write.addr.eq(Cat(count[quad_bits:quad_bits + half_bits], sparse)),
            write.data.eq(entry.as_value().replicate(quad)),
        ]
        with m.If(self.start):
            m.d.sync += [self.dense_count.eq(0), self.sparse_count.eq(0)]
        with m.Elif(pending & (~entry.pad | self.natural)):
            m.d.comb += write.en.eq(Const(1, quad) << count[:quad_bits])
            with m.If(sparse):
                m.d.sync += self.sparse_count.eq(self.sparse_count + 1)
            with m.Else():
                m.d.sync += self.dense_count.eq(self.dense_count + 1)
        m.d.comb += [
            self.dense_words.eq((self.dense_count + vector - 1) >> vector_bits),
            self.sparse_words.eq((self.sparse_count + vector - 1) >> vector_bits),
        ]

        # reading: rows after the dense list's words are of the sparse list
        dense_rows = self.dense_words << 2
        in_sparse = self.row >= dense_rows
        row = Mux(in_sparse, self.row - dense_rows, self.row)[:half_bits]
        left = Mux(in_sparse, self.sparse_count, self.dense_count) - (row << quad_bits)
        beyond = Signal(quad)
        m.d.comb += [
            read.addr.eq(Cat(row, in_sparse)),
            read.en.eq(self.enable),
        ]
        with m.If(self.enable):
            m.d.sync += beyond.eq(Cat(left <= lane for lane in range(quad)))
        for lane in range(quad):
            stored = data.View(layout, read.data.word_select(lane, layout.size))
            m.d.comb += [
                self.entries[lane].slot.eq(stored.slot),
                self.entries[lane].pad.eq(stored.pad | beyond[lane]),
            ]
        return m
