"""Walker of two non-zeros a cycle, for a sparse PE that skips zeros at every tap anew."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["PairWalker", "word_layout"]

DEPTH = 16
"""Words that wait."""


def word_layout(vector, tag):
    """A word of codes: ``tag`` goes with its non-zeros; ``last`` ends a group, ``done`` a tile."""
    return data.StructLayout({"codes": 4 * vector, "tag": tag, "last": 1, "done": 1})


def lowest(m, bits, name):
    """Index of the lowest set bit, and the bits without it."""
    rest, one = (Signal(len(bits), name=f"{name}_{part}") for part in ("rest", "one"))
    m.d.comb += [rest.eq(bits & (bits - 1)), one.eq(bits & ~rest)]
    places = (len(bits) - 1).bit_length()
    index = Cat(Cat(one[n] for n in range(len(bits)) if n >> place & 1).any()
                for place in range(places))
    return index, rest


class PairWalker(wiring.Component):
    """Gives up to two non-zeros of a group a cycle, the odd one of a word with the next word's.

    A word occupies it for half of its non-zeros, so it has no bubbles while words wait. Words
    without non-zeros must not enter, but for one that ends a tile.

    Members
    -------
    i : ``In(stream)``
        See `word_layout`.
    allow : ``In(1)``
        The end of a group may be issued.
    issue : ``Out(1)``
        Non-zeros leave in this cycle.
    filled : ``Out(2)``
        Which of the two there are.
    channels, codes, tags : ``Out``
        Of both.
    last, done : ``Out(1)``
        The group ends; the tile ends.
    """

    def __init__(self, vector=16, tag=16):
        self.vector, self.tag = vector, tag
        super().__init__({
            "i": In(stream.Signature(word_layout(vector, tag))),
            "allow": In(1), "issue": Out(1), "filled": Out(2),
            "channels": Out(data.ArrayLayout((vector - 1).bit_length(), 2)),
            "codes": Out(data.ArrayLayout(4, 2)), "tags": Out(data.ArrayLayout(tag, 2)),
            "last": Out(1), "done": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        vector = self.vector
        layout = data.StructLayout({
            "word": word_layout(vector, self.tag), "first": (vector - 1).bit_length(),
            "any": 1, "rest": vector})
        m.submodules.queue = queue = fifo.SyncFIFO(width=layout.size, depth=DEPTH)

        def code(entry, channel):
            return entry.word.codes.word_select(channel, 4)

        # the first non-zero is found before the queue, so that a borrowed one is ready
        word = self.i.payload
        filled = Cat(word.codes.word_select(n, 4).any() for n in range(vector))
        first, rest = lowest(m, filled, "enter")
        entry = Signal(layout)
        m.d.comb += [
            entry.word.eq(word), entry.first.eq(first), entry.any.eq(filled.any()),
            entry.rest.eq(rest),
            queue.w_en.eq(self.i.valid), queue.w_data.eq(entry), self.i.ready.eq(queue.w_rdy)]

        valid, current, following = Signal(), Signal(layout), Signal(layout)
        m.d.comb += following.eq(queue.r_data)
        second, after_second = lowest(m, current.rest, "second")
        third, after_third = lowest(m, after_second, "third")
        alone = current.rest == 0                      # one non-zero, or an empty word
        partner = valid & alone & ~current.word.last   # is the next word's
        borrow, used = Signal(), Signal()
        m.d.comb += [
            borrow.eq(partner & queue.r_rdy),
            self.channels[0].eq(current.first),
            self.codes[0].eq(code(current, current.first)),
            self.tags[0].eq(current.word.tag),
            self.channels[1].eq(Mux(alone, following.first, second)),
            self.codes[1].eq(Mux(alone, code(following, following.first), code(current, second))),
            self.tags[1].eq(Mux(alone, following.word.tag, current.word.tag)),
            self.filled.eq(Cat(current.any, ~alone | borrow)),
            self.last.eq(valid & Mux(borrow, (following.rest == 0) & following.word.last,
                                     (after_second == 0) & current.word.last)),
            self.done.eq(self.last & Mux(borrow, following.word.done, current.word.done)),
            self.issue.eq(valid & (~partner | queue.r_rdy) & (~self.last | self.allow)),
            used.eq(self.issue & (after_second == 0)),
            queue.r_en.eq(queue.r_rdy & (~valid | used)),
        ]
        with m.If(self.issue):
            m.d.sync += [current.rest.eq(after_third), current.first.eq(third)]
            with m.If(used):
                m.d.sync += valid.eq(0)
        with m.If(queue.r_en):
            m.d.sync += [valid.eq(1), current.eq(following)]
            with m.If(borrow & used):                  # its first has just been issued
                channel, left = lowest(m, following.rest, "borrowed")
                m.d.sync += [current.first.eq(channel), current.rest.eq(left),
                             valid.eq(following.rest != 0)]
        return m
