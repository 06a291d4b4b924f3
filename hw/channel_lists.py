"""Channel lists: which channel slot stands at which position of a tensor of codes."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from hw.mapper import PIXEL_WIDTH

__all__ = ["BLOCK", "ChannelLists", "entry_layout", "tile_layout"]

BLOCK = 32         # slots that share an MXINT8 scale, and of the smallest tile
BUCKET_BITS = 6    # a balanced list is sorted by so many leading bits of the zero count
COUNT_BITS = 16    # of a zero count
FRACTION_BITS = 8  # of the cut


def entry_layout(config):
    """A list entry: the channel ``slot`` of the tensor, or ``pad`` where there is no channel.

    ``last`` is set at the last position of a tile.
    """
    return data.StructLayout({
        "slot": (config.max_channels - 1).bit_length(), "pad": 1, "last": 1})


def tile_layout(config):
    """What is known of a tile once its list has been built.

    Members
    -------
    count : entries of the list
    low, high, cut : the split; see `ChannelLists`
    words : words of V positions
    first : slot of the tensor at which the tile begins
    offset : port words from the first tile's codes to this one's
    last : no tile follows
    """
    count = config.tile_channels.bit_length()
    return data.StructLayout({
        "count": count, "low": count, "high": count, "cut": FRACTION_BITS + 1,
        "words": (config.tile_channels // config.vector).bit_length(),
        "first": (config.max_channels - 1).bit_length(),
        "offset": config.address_width, "last": 1})


class ChannelLists(wiring.Component):
    """Build the list of each channel tile of a pass, and read them by position.

    ``start`` begins; then the tiles appear on ``o``, one after the other, while the next one is
    being built. A tile takes ``tile_channels`` slots, the last one what is left. Slots that hold a
    channel are put in order:

    - by their label, those that are not sparse first, slots of a label ascending;
    - with ``balance`` by their zero count, slots of a bucket ascending. A bucket is the count,
      at most ``pixels``, shifted right until ``pixels`` has 6 bits;
    - where the core has one kind of PE only, ascending.

    Without ``balance`` the split is at the first sparse slot, or at ``dense_limit`` words of V if
    that is less: ``low`` = ``high``, ``cut`` = 0. With ``balance`` the dense side has k words, k at
    most ``dense_limit``, and of ``cut`` of 256 pixels one more, so that both sides' costs meet:

    - dense: D(k) = k * ``cost_word`` * ``pixels``
    - sparse: S(k) = max(N * ``cost_nonzero`` + ``pixels`` * ``cost_group``,
      ``pixels`` * ``cost_floor``), N being the non-zero codes from position k * V on, or 0 if none
      is left.

    A core without sparse PEs splits at the end, one without dense PEs at the beginning. With
    ``natural`` every slot is at the position of its own number, slots without a channel as pads,
    and the split is at the end.

    A tile of T slots takes 2 T + 14 cycles, one more for each bucket (2 by label, 64 balanced, 1
    otherwise) and one for each pad. Balanced tiles take 4 k more, and 15, or 4 where k is all words
    or ``dense_limit``. The first tile of a pass takes 6 more.

    The lists follow each other, each padded to a multiple of V. The V/4 entries of ``row`` appear a
    cycle after ``enable`` and keep until the next.

    Members
    -------
    start, natural, balance : ``In(1)``
        The inputs must keep until the last tile has appeared.
    first_slots, slots : ``In``
        Slot at which the second segment begins, and slots in all, a multiple of V.
    channels, channels_second : ``In(16)``
        Channels of the segments.
    tile_channels : ``In``
        A multiple of 32.
    dense_limit : ``In(8)``
    pixels, cost_word, cost_nonzero, cost_group, cost_floor : ``In(16)``
    base : ``In(16)``
        The detector's entry of slot 0.
    detector_entry : ``Out(16)``
    detector_count, detector_sparse : ``In(16)``, ``In(1)``
        Zero count and label of the entry asked for in the cycle before.
    o : ``Out(stream.Signature(tile_layout(config)))``
    enable : ``In(1)``
    row : ``In``
    entries : ``Out(ArrayLayout(entry_layout(config), V/4))``
    """

    def __init__(self, config):
        self.config = config
        self.row_bits = (config.max_channels // config.quad - 1).bit_length()
        slots = config.max_channels.bit_length()
        super().__init__({
            "start": In(1),
            "natural": In(1),
            "balance": In(1),
            "first_slots": In(slots),
            "slots": In(slots),
            "channels": In(16),
            "channels_second": In(16),
            "tile_channels": In(config.tile_channels.bit_length()),
            "dense_limit": In(8),
            "pixels": In(PIXEL_WIDTH),
            "cost_word": In(16),
            "cost_nonzero": In(16),
            "cost_group": In(16),
            "cost_floor": In(16),
            "base": In(16),
            "detector_entry": Out(16),
            "detector_count": In(COUNT_BITS),
            "detector_sparse": In(1),
            "o": Out(stream.Signature(tile_layout(config))),
            "enable": In(1),
            "row": In(self.row_bits),
            "entries": Out(data.ArrayLayout(entry_layout(config), config.quad)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        vector, quad = config.vector, config.quad
        vector_bits, quad_bits = vector.bit_length() - 1, quad.bit_length() - 1
        layout, tile = entry_layout(config), tile_layout(config).members
        has_sides = bool(config.dense_pes and config.sparse_pes)
        most_words = config.tile_channels // vector
        nonzeros_bits = (config.tile_channels * 0xFFFF).bit_length()

        m.submodules.store = store = memory.Memory(
            shape=layout.size * quad, depth=1 << self.row_bits, init=[])
        list_read = store.read_port()
        list_write = store.write_port(granularity=layout.size)
        # Entries of each bucket, then the next position of each bucket.
        m.submodules.buckets = buckets = memory.Memory(
            shape=tile["count"], depth=1 << BUCKET_BITS, init=[])
        bucket_read = buckets.read_port(domain="comb")
        bucket_write = buckets.write_port()
        met = Signal(1 << BUCKET_BITS)  # buckets that have an entry, while they are counted
        # Non-zero codes in each word of V positions.
        m.submodules.nonzeros = nonzeros = memory.Memory(
            shape=nonzeros_bits, depth=max(2, most_words), init=[])
        nonzeros_read = nonzeros.read_port(domain="comb")
        nonzeros_write = nonzeros.write_port()

        first = Signal(tile["first"])       # slot of the tile
        last_slot = Signal(tile["first"])
        place = Signal(range(config.max_channels + 1))  # position of the tile's first entry
        offset = Signal(config.address_width)
        count = Signal(tile["count"])
        labelled_dense = Signal(tile["count"])
        nonzeros_left = Signal(nonzeros_bits)
        shift = Signal(range(PIXEL_WIDTH))
        words = Signal(tile["words"])
        end = Signal(tile["count"])         # positions, with pads
        last_tile = Signal()
        m.d.comb += [
            words.eq((count + vector - 1) >> vector_bits),
            end.eq(words << vector_bits),
            last_tile.eq(last_slot == self.slots - 1),
        ]

        # cycle 1: ask for the slot's count
        scanning = Signal()
        placing = Signal()
        slot = Signal(tile["first"])
        second = slot >= self.first_slots
        m.d.comb += self.detector_entry.eq(self.base + slot)
        with m.If(scanning):
            m.d.sync += [slot.eq(slot + 1), scanning.eq(slot != last_slot)]
        step = data.StructLayout({"valid": 1, "slot": tile["first"], "pad": 1})
        asked, labelled, sorted_ = (Signal(step, name=f"scan_{n}") for n in range(3))
        m.d.sync += [
            asked.valid.eq(scanning),
            asked.slot.eq(slot),
            asked.pad.eq(Mux(second, slot - self.first_slots >= self.channels_second,
                             slot >= self.channels)),
        ]

        # cycle 2: count and label
        zeros = Signal(PIXEL_WIDTH)
        sparse = Signal()
        m.d.sync += [
            labelled.eq(asked),
            zeros.eq(Mux(self.detector_count > self.pixels, self.pixels, self.detector_count)),
            sparse.eq(self.detector_sparse),
        ]

        # cycle 3: bucket
        bucket = Signal(BUCKET_BITS)
        nonzero = Signal(PIXEL_WIDTH)
        m.d.sync += [
            sorted_.eq(labelled),
            nonzero.eq(self.pixels - zeros),
        ]
        if has_sides:
            m.d.sync += bucket.eq(
                Mux(self.natural, 0, Mux(self.balance, zeros >> shift, sparse)))

        # cycle 4: count the bucket's entries, or take its next position
        index = Signal(BUCKET_BITS)
        accumulating = Signal()
        kept = Signal(tile["count"])
        enters = sorted_.valid & (~sorted_.pad | self.natural)
        m.d.comb += [
            bucket_read.addr.eq(Mux(accumulating, index, bucket)),
            kept.eq(Mux(placing | met.bit_select(bucket_read.addr, 1), bucket_read.data, 0)),
            bucket_write.addr.eq(bucket_read.addr),
            bucket_write.data.eq(kept + 1),
            bucket_write.en.eq(enters),
        ]
        with m.If(enters):
            m.d.sync += met.bit_select(bucket, 1).eq(1)
        placed = Signal(step)
        passed = Signal()
        position = Signal(tile["count"])
        nonzero_placed = Signal(PIXEL_WIDTH)
        m.d.sync += [
            placed.eq(sorted_),
            placed.valid.eq(enters & placing),
            passed.eq(sorted_.valid),
            position.eq(kept),
            nonzero_placed.eq(nonzero),
        ]

        # cycle 5: the entry and its word's non-zeros
        padding = Signal()
        entry = Signal(layout)
        at = Signal(range(config.max_channels))
        word = Signal(range(max(2, most_words)))  # for the split
        m.d.comb += [
            at.eq(place + position),
            entry.slot.eq(placed.slot),
            entry.pad.eq(placed.pad | padding),
            entry.last.eq(position == end - 1),
            list_write.addr.eq(at >> quad_bits),
            list_write.data.eq(entry.as_value().replicate(quad)),
            list_write.en.eq(
                Mux(placed.valid | padding, Const(1, quad) << at[:quad_bits], 0)),
            nonzeros_read.addr.eq(Mux(placed.valid, position >> vector_bits, word)),
            nonzeros_write.addr.eq(Mux(accumulating, index, position >> vector_bits)),
            nonzeros_write.data.eq(Mux(accumulating, 0, nonzeros_read.data + nonzero_placed)),
            nonzeros_write.en.eq(placed.valid | (accumulating & (index < most_words))),
        ]
        with m.If(placed.valid):
            m.d.sync += nonzeros_left.eq(nonzeros_left + nonzero_placed)

        # One multiplier: the product follows its factors by two cycles.
        factor = Signal(nonzeros_bits)
        other = Signal(16)
        product = Signal(nonzeros_bits + 16)
        m.d.sync += product.eq(factor * other)

        # The split. All costs are below 2^sum_bits.
        sum_bits = nonzeros_bits + 17
        cost_word, cost_group, cost_floor = (
            Signal(32, name=name) for name in ("word_cost", "group_cost", "floor_cost"))
        dense, sparse_now, sparse_next = (
            Signal(sum_bits, name=name) for name in ("dense", "sparse_now", "sparse_next"))
        remainder = Signal(sum_bits + 2)
        divisor = Signal(sum_bits + 1)
        cut = Signal(FRACTION_BITS)
        low, high = Signal(tile["count"]), Signal(tile["count"])
        taken = Signal(tile["words"])      # k
        after = Signal(tile["words"])      # words before the ones whose cost is being computed
        begun = Signal()
        cycle = Signal(range(8))
        beyond = Signal(tile["count"] + 1)
        m.d.comb += beyond.eq((taken + 1) << vector_bits)

        empty = ~(scanning | asked.valid | labelled.valid | sorted_.valid | passed)

        def scan(start):
            m.d.sync += [scanning.eq(1), slot.eq(start)]

        def begin_tile(start):
            """Go over the slots from ``start`` on."""
            remaining = self.slots - start
            scan(start)
            m.d.sync += [
                first.eq(start),
                last_slot.eq(Mux(remaining > self.tile_channels,
                                 start + self.tile_channels, self.slots) - 1),
                met.eq(0),
                count.eq(0),
                nonzeros_left.eq(0),
                placing.eq(0),
            ]

        def split_at(value):
            m.d.sync += [low.eq(value), high.eq(value), cut.eq(0)]

        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.FSM(name="lists"):
            with m.State("Idle"):
                m.d.sync += [place.eq(0), offset.eq(0), cycle.eq(0), shift.eq(0)]
                with m.If(self.start):
                    m.next = "Prepare"
            with m.State("Prepare"):
                m.d.sync += [cycle.eq(cycle + 1), factor.eq(self.pixels)]
                with m.Switch(cycle):
                    with m.Case(0):
                        m.d.sync += other.eq(self.cost_word)
                    with m.Case(1):
                        m.d.sync += other.eq(self.cost_group)
                    with m.Case(2):
                        m.d.sync += [other.eq(self.cost_floor), cost_word.eq(product)]
                    with m.Case(3):
                        m.d.sync += cost_group.eq(product)
                    with m.Case(4):
                        m.d.sync += cost_floor.eq(product)
                        begin_tile(0)
                        m.next = "Count"
                for bit in range(BUCKET_BITS, PIXEL_WIDTH):
                    with m.If(self.pixels[bit]):
                        m.d.sync += shift.eq(bit + 1 - BUCKET_BITS)
            with m.State("Count"):
                m.d.sync += index.eq(0)
                with m.If(empty):
                    m.next = "Accumulate"
            with m.State("Accumulate"):
                m.d.comb += [
                    accumulating.eq(1),
                    bucket_write.data.eq(count),
                    bucket_write.en.eq(1),
                ]
                m.d.sync += [index.eq(index + 1), count.eq(count + kept)]
                with m.If(index == 0):
                    m.d.sync += labelled_dense.eq(kept)
                last_bucket = Mux(self.natural, 0, Mux(self.balance, (1 << BUCKET_BITS) - 1, 1))
                with m.If(index == (last_bucket if has_sides else 0)):
                    scan(first)
                    m.d.sync += placing.eq(1)
                    m.next = "Place"
            with m.State("Place"):
                with m.If(empty):
                    m.d.sync += position.eq(count)
                    m.next = "Pad"
            with m.State("Pad"):
                m.d.sync += [
                    position.eq(position + 1),
                    after.eq(0),
                    begun.eq(0),
                    dense.eq(0),
                    taken.eq(0),
                    word.eq(0),
                    factor.eq(nonzeros_left),
                    other.eq(self.cost_nonzero),
                    cycle.eq(0),
                ]
                with m.If(position != end):
                    m.d.comb += padding.eq(1)
                with m.Else():
                    m.next = "Size"
                    if has_sides:
                        limit = self.dense_limit << vector_bits
                        with m.If(self.natural):
                            split_at(count)
                        with m.Elif(self.balance):
                            m.next = "Multiply"
                        with m.Else():
                            split_at(Mux(labelled_dense > limit, limit, labelled_dense))
                    else:
                        split_at(count if config.dense_pes else Mux(self.natural, count, 0))
            if has_sides:
                with m.State("Multiply"):
                    m.next = "Sum"
                with m.State("Sum"):
                    total = product + cost_group
                    m.d.sync += sparse_next.eq(
                        Mux(after == words, 0, Mux(total > cost_floor, total, cost_floor)))
                    m.next = "Compare"
                with m.State("Compare"):
                    # The cost of no word is always less than that of all non-zeros.
                    dense_next = Mux(begun, dense + cost_word, 0)
                    with m.If(dense_next <= sparse_next):
                        m.d.sync += [
                            dense.eq(dense_next),
                            sparse_now.eq(sparse_next),
                            taken.eq(after),
                            begun.eq(1),
                        ]
                        m.next = "Next"
                    with m.Else():
                        m.d.sync += [
                            remainder.eq(sparse_now - dense),
                            divisor.eq(cost_word + (sparse_now - sparse_next)),
                        ]
                        m.next = "Divide"
                with m.State("Next"):
                    left = nonzeros_left - nonzeros_read.data
                    m.d.sync += [
                        nonzeros_left.eq(left),
                        factor.eq(left),
                        word.eq(word + 1),
                        after.eq(taken + 1),
                    ]
                    with m.If((taken == words) | (taken == self.dense_limit)):
                        everything = taken << vector_bits
                        split_at(Mux(everything > count, count, everything))
                        m.next = "Size"
                    with m.Else():
                        m.next = "Multiply"
                with m.State("Divide"):
                    twice = remainder << 1
                    fits = twice >= divisor
                    quotient = Cat(fits, cut)[:FRACTION_BITS]
                    m.d.sync += [
                        cycle.eq(cycle + 1),
                        cut.eq(quotient),
                        remainder.eq(Mux(fits, twice - divisor, twice)),
                        low.eq(taken << vector_bits),
                        high.eq(Mux(beyond > count, count, beyond)),
                    ]
                    with m.If(cycle == FRACTION_BITS - 1):
                        with m.If(quotient == 0):
                            m.d.sync += high.eq(taken << vector_bits)
                        m.next = "Size"
            with m.State("Size"):
                m.d.sync += [factor.eq(words), other.eq(self.pixels)]
                m.next = "Product"
            with m.State("Product"):
                m.next = "Offer"
            with m.State("Offer"):
                with m.If(~self.o.valid | self.o.ready):
                    m.d.sync += [
                        self.o.valid.eq(1),
                        self.o.payload.count.eq(count),
                        self.o.payload.low.eq(low),
                        self.o.payload.high.eq(high),
                        self.o.payload.cut.eq(cut),
                        self.o.payload.words.eq(words),
                        self.o.payload.first.eq(first),
                        self.o.payload.offset.eq(offset),
                        self.o.payload.last.eq(last_tile),
                        place.eq(place + end),
                        offset.eq(offset + (product << self.natural)),
                    ]
                    begin_tile(last_slot + 1)
                    with m.If(last_tile):
                        m.d.sync += scanning.eq(0)
                        m.next = "Idle"
                    with m.Else():
                        m.next = "Count"

        # reading
        m.d.comb += [
            list_read.addr.eq(self.row),
            list_read.en.eq(self.enable),
            self.entries.eq(list_read.data),
        ]
        return m
