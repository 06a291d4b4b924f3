"""The compactor: code words to entries of M non-zeros, once for all sparse PEs, when codes load."""

from amaranth import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .job import entry_layout

__all__ = ["Compactor", "word_layout"]


def word_layout(config, tag):
    """A code word of a group.

    ``codes``; ``mask``: the channels that count; ``early``: those that some output pixels leave
    out; ``word``: its place in the weights; ``last`` of its group; ``tag``: comes out at the
    group's end.
    """
    return data.StructLayout({
        "codes": 4 * config.vector, "mask": config.vector, "early": config.vector,
        "word": range(config.tile_channels // config.vector), "last": 1, "tag": tag})


def prefix_sums(values):
    """Sums of ``values[:n + 1]`` for each n, in a logarithmic number of adders' delays."""
    if len(values) == 1:
        return values
    half = len(values) // 2
    low, high = prefix_sums(values[:half]), prefix_sums(values[half:])
    return low + [low[-1] + value for value in high]


def fours_of(bits):
    return [bits[n:n + 4] for n in range(0, len(bits), 4)]


def ones_of(four):
    """Number of ones of four bits, a look-up table a bit."""
    return Array(Const(n.bit_count(), 3) for n in range(16))[four]


class Compactor(wiring.Component):
    """Gather the non-zeros of a group's words, M to an entry, in the order of their positions.

    The last entry of a group is filled up with codes 0. A word occupies the unit for as many cycles
    as entries become full with it (the rest of a group being full), at least one; so it sustains a
    word or an entry a cycle, whichever is more. An entry leaves `latency` = 3 cycles after its
    word has been taken, if nothing is before it.

    Parameters
    ----------
    config : Config
    tag : ShapeLike
        What accompanies a group; that of its last word comes out.

    Members
    -------
    i : ``In(stream.Signature(word_layout(config, tag)))``
        Position of a channel is ``word`` * V + channel.
    o : ``Out(stream.Signature({entry, filled, last, skip, rest, tag}, always_ready=True))``
        ``entry``: see `entry_layout`; items that are missing have code 0 and any position.
        ``filled``: it is an entry. ``last``: the group ends, with ``tag``; a group without
        non-zeros gives one payload with ``last`` and without ``filled``. With ``last`` come
        ``skip``, the number of entries full of early non-zeros, and ``rest``, whether there are
        any others.
    """

    latency = 3

    def __init__(self, config, tag):
        self.config, self.tag = config, tag
        super().__init__({
            "i": In(stream.Signature(word_layout(config, tag))),
            "o": Out(stream.Signature(data.StructLayout({
                "entry": entry_layout(config), "filled": 1, "last": 1,
                "skip": range(config.tile_channels // config.sparse_rate + 1), "rest": 1,
                "tag": tag,
            }), always_ready=True)),
        })

    def elaborate(self, platform):
        m = Module()
        vector, rate = self.config.vector, self.config.sparse_rate
        rate_bits = rate.bit_length() - 1
        word_bits = (vector - 1).bit_length()
        i, o = self.i.payload, self.o.payload
        word_shape = word_layout(self.config, self.tag)

        # cycle 1: which codes count
        first_valid, first = Signal(), Signal(word_shape)
        nonzero = Signal(vector)
        # cycle 2: the rank of each of them, counted from the rest of the word before
        valid, word = Signal(), Signal(word_shape)
        left = Signal(vector)
        ranks = [Signal(range(vector + rate), name=f"rank_{n}") for n in range(vector)]
        total, rest = Signal(range(vector + rate)), Signal(range(rate))
        held = Signal.like(rest)                # items that wait from the word before
        move, done = Signal(), Signal()
        m.d.comb += [
            move.eq(~valid | done),
            self.i.ready.eq(~first_valid | move),
        ]
        with m.If(self.i.ready):
            m.d.sync += [
                first_valid.eq(self.i.valid),
                first.eq(i),
                nonzero.eq(i.mask & Cat(
                    i.codes.word_select(n, 4).any() for n in range(vector))),
            ]
        fours = fours_of(nonzero)
        counts = []
        for number, four in enumerate(fours):
            count = Signal(3, name=f"count_{number}")
            m.d.comb += count.eq(ones_of(four))
            counts.append(count)
        before = [Const(0), *prefix_sums(counts)]
        next_total = Signal.like(total)
        m.d.comb += next_total.eq(rest + before[-1])
        with m.If(move):
            m.d.sync += [valid.eq(first_valid), word.eq(first), left.eq(nonzero)]
            m.d.sync += [
                ranks[4 * number + n].eq(rest + before[number] + sum(four[:n], start=Const(0)))
                for number, four in enumerate(fours) for n in range(4)]
            m.d.sync += [total.eq(next_total), held.eq(rest)]
            with m.If(first_valid):
                m.d.sync += rest.eq(Mux(first.last, 0, next_total[:rate_bits]))

        # non-zeros of the group that are early, and whether there are others
        early, some_rest = Signal(range(self.config.tile_channels + 1)), Signal()
        fresh = Signal(init=1)
        with m.If(move & first_valid):
            m.d.sync += [
                early.eq(Mux(fresh, 0, early) + sum(ones_of(four) for four in fours_of(
                    nonzero & first.early))),
                some_rest.eq((~fresh & some_rest) | (nonzero & ~first.early).any()),
                fresh.eq(first.last),
            ]

        # cycle 2 on: a row of M ranks a cycle; what does not fill a row waits for the next word
        row = Signal(range((vector + rate - 1) // rate + 1))
        full, entries = Signal.like(row), Signal.like(row)
        item = entry_layout(self.config).elem_shape
        m.d.comb += [
            full.eq(total >> rate_bits),
            entries.eq(full + (word.last & total[:rate_bits].any())),
            done.eq(row + 1 >= entries),
        ]
        with m.If(valid):
            m.d.sync += row.eq(Mux(done, 0, row + 1))

        def pick(number, rows, name):
            """The item of rank ``rows`` * M + ``number`` in the word, and whether there is one."""
            ones = Signal(vector, name=f"{name}_ones_{number}")
            result = Signal(item, name=f"{name}_{number}")
            m.d.comb += [
                ones.eq(Cat(
                    left[n] & (rank >> rate_bits == rows)
                    & ((rank[:rate_bits] == number) if rate_bits else 1)
                    for n, rank in enumerate(ranks))),
                result.position.eq(Cat(*(
                    Cat(one for n, one in enumerate(ones) if n >> bit & 1).any()
                    for bit in range(word_bits)), word.word)),
                result.code.eq(Cat(
                    Cat(one & word.codes[4 * n + bit] for n, one in enumerate(ones)).any()
                    for bit in range(4))),
            ]
            return result, ones.any()

        m.d.sync += [
            self.o.valid.eq(valid & ((row < entries) | (done & word.last))),
            o.filled.eq(row < entries),
            o.last.eq(done & word.last),
            o.skip.eq(early >> rate_bits),
            o.rest.eq(some_rest),
            o.tag.eq(word.tag),
        ]
        for number in range(rate):
            picked, _ = pick(number, row, "picked")
            with m.If(valid):
                m.d.sync += o.entry[number].eq(picked)
            if number < rate - 1:
                waiting = Signal(item, name=f"waiting_{number}")
                with m.If(valid & (row == 0) & (number < held)):
                    m.d.sync += o.entry[number].eq(waiting)
                kept, some = pick(number, full, "kept")
                with m.If(valid & done & some):
                    m.d.sync += waiting.eq(kept)
        return m
