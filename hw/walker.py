"""The walk over the non-zero activations of a pixel."""

from amaranth import Cat, Module, Signal
from amaranth.lib import data, fifo, wiring
from amaranth.lib.wiring import In, Out

from .drain import Throttle
from .scale_unit import activation_scale_layout
from .window import geometry_layout

__all__ = ["WORD_QUEUE_DEPTH", "Compactor", "NonzeroWalker", "word_layout"]

WORD_QUEUE_DEPTH = 16  # words between the reads of codes and the walk over them


def word_layout(config):
    """A word of codes and where it stands."""
    return data.StructLayout({
        "codes": config.port_width,
        "word": geometry_layout(config)["words"].shape,
        "tap": 4,
        "tile": max(1, (config.max_outputs // config.sparse_lanes).bit_length()),
        "chunks": (config.sparse_lanes // config.quad).bit_length(),
        "scale": activation_scale_layout,
        "group_last": 1,    # last word of its scaled group (input pixel)
        "tile_last": 1,     # and of its output tile
    })


class Compactor(wiring.Component):
    """Drops words without non-zero codes and moves their ends to the word before them.

    A group without non-zeros vanishes. A tile without non-zeros leaves one empty word with
    ``group_last`` and ``tile_last``. A word leaves when the next word with codes enters, or the
    empty word that ends its tile; a word that ends its tile itself leaves one cycle after it came.

    Members
    -------
    i_valid, i : ``In``
        A word; see `word_layout`.
    dropped : ``Out(1)``
        The word that entered in this cycle leaves no trace of its own.
    o_valid, o : ``Out``
        A word that leaves; it is taken in any case.
    """

    def __init__(self, config):
        self.config = config
        super().__init__({
            "i_valid": In(1),
            "i": In(word_layout(config)),
            "dropped": Out(1),
            "o_valid": Out(1),
            "o": Out(word_layout(config)),
        })

    def elaborate(self, platform):
        m = Module()
        held_valid, held = Signal(), Signal(word_layout(self.config))
        empty, closes = Signal(), Signal()
        m.d.comb += [
            empty.eq(self.i.codes == 0),
            # the end of a tile whose last words are empty falls on the word held, if it has one
            closes.eq(self.i_valid & empty & self.i.tile_last & held_valid & ~held.tile_last),
            self.dropped.eq(self.i_valid & empty & (~self.i.tile_last | closes)),
            self.o_valid.eq(held_valid & (
                held.tile_last | (self.i_valid & (~empty | self.i.tile_last)))),
            self.o.eq(held),
            self.o.group_last.eq(held.group_last | closes),
            self.o.tile_last.eq(held.tile_last | closes),
        ]
        with m.If(self.o_valid):
            m.d.sync += held_valid.eq(0)
        with m.If(self.i_valid & ~self.dropped):
            m.d.sync += [held_valid.eq(1), held.eq(self.i)]
        with m.Elif(self.i_valid & empty & self.i.group_last & ~self.o_valid):
            m.d.sync += held.group_last.eq(1)
        return m


class NonzeroWalker(wiring.Component):
    """Issues the non-zero codes of words one a cycle, lowest channel first, without a bubble.

    Words wait in a queue of `WORD_QUEUE_DEPTH`. An empty word (only at the end of a tile without
    non-zeros) takes one cycle. `Throttle` may hold back the last code of a group.

    Members
    -------
    i_valid, i : ``In``
        A word from `Compactor`; there must be room.
    taken : ``Out(1)``
        A word left the queue in this cycle.
    issue : ``Out(1)``
        A code is issued in this cycle; the members below belong to it.
    nonzero : ``Out(1)``
        It is a code, not an empty word.
    channel, code : ``Out``
        Channel within the word and its nibble.
    entry : ``Out``
        Its word, see `word_layout`.
    group_first, group_last, tile_first, tile_last : ``Out(1)``
        First and last of its group; its group is the first of its tile; it ends the tile.
    popped : ``In(1)``, starved : ``Out(1)``
        See `Throttle`.
    """

    def __init__(self, config):
        self.config = config
        super().__init__({
            "i_valid": In(1),
            "i": In(word_layout(config)),
            "taken": Out(1),
            "issue": Out(1),
            "nonzero": Out(1),
            "channel": Out(range(config.vector)),
            "code": Out(4),
            "entry": Out(word_layout(config)),
            "group_first": Out(1, init=1),
            "group_last": Out(1),
            "tile_first": Out(1, init=1),
            "tile_last": Out(1),
            "popped": In(1),
            "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, vector = self.config, self.config.vector
        m.submodules.throttle = throttle = Throttle(
            config, lanes=config.sparse_lanes, units=config.sparse_scale_units)
        layout = word_layout(config)
        m.submodules.queue = queue = fifo.SyncFIFO(
            width=layout.size + vector, depth=WORD_QUEUE_DEPTH)
        filled = Cat(self.i.codes.word_select(n, 4).any() for n in range(vector))
        m.d.comb += [
            queue.w_en.eq(self.i_valid),
            queue.w_data.eq(Cat(self.i, filled)),
        ]

        valid, left = Signal(), Signal(vector)      # left: non-zeros not issued yet
        following = Signal(vector)
        last = Signal()
        m.d.comb += [
            following.eq(left & (left - 1)),
            last.eq(following == 0),
            throttle.group_last.eq(last & self.entry.group_last),
            throttle.tile_last.eq(last & self.entry.tile_last),
            throttle.chunks.eq(self.entry.chunks),
            throttle.popped.eq(self.popped),
            self.issue.eq(valid & throttle.allowed),
            throttle.issue.eq(self.issue),
            self.starved.eq(valid & throttle.starved),
            self.nonzero.eq(left.any()),
            self.group_last.eq(throttle.group_last),
            self.tile_last.eq(throttle.tile_last),
            self.taken.eq(queue.r_rdy & (~valid | (self.issue & last))),
            queue.r_en.eq(self.taken),
        ]
        lowest = left & ~following
        channel_bits = (vector - 1).bit_length()
        m.d.comb += self.channel.eq(Cat(
            Cat(lowest[n] for n in range(vector) if n >> bit & 1).any()
            for bit in range(channel_bits)))
        m.d.comb += self.code.eq(self.entry.codes.word_select(self.channel, 4))
        with m.If(self.issue):
            m.d.sync += left.eq(following)
            m.d.sync += self.group_first.eq(self.group_last)
            with m.If(self.group_last):
                m.d.sync += self.tile_first.eq(self.tile_last)
            with m.If(last):
                m.d.sync += valid.eq(0)
        with m.If(self.taken):
            m.d.sync += [
                valid.eq(1), self.entry.eq(queue.r_data[:layout.size]),
                left.eq(queue.r_data[layout.size:]),
            ]
        return m
