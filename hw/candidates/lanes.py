"""Multipliers of the candidates, without their scale units."""

from amaranth import C, Cat, Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from ..carry import accumulate, pair_add
from ..lanes import join, tree

__all__ = ["DenseLanes", "SparseLanes", "WordMultiplexer"]


def delayed(m, value, cycles, name):
    """``value``, that many cycles later."""
    for cycle in range(cycles):
        later = Signal.like(value, name=f"{name}_{cycle}")
        m.d.sync += later.eq(value)
        value = later
    return value


class SparseLanes(wiring.Component):
    """M non-zero activations a cycle times L lanes, by the bits of the weights.

    The lanes of a gather PE are output channels. Those of a fan-out PE are (tap, output channel):
    only what stands behind the sums differs, so this unit serves both. Operands that enter with
    ``valid`` are in ``sums`` `latency` = 2 cycles later.

    Members
    -------
    valid, first : ``In(1)``
        Operands, and whether they are the first of their group.
    plain, negated : ``In``
        M codes and what the highest bits of the weights multiply, see `hw.lanes.SparseCodes`.
    weights : ``In(4 * M * L)``
        Nibbles, ``[lane][non-zero]``.
    sums : ``Out``
        Of each lane, modulo 2^width.
    """

    latency = 2

    def __init__(self, lanes, rate, width=18):
        self.lanes, self.rate, self.width = lanes, rate, width
        values = In(data.ArrayLayout(signed(5), rate))
        super().__init__({
            "valid": In(1), "first": In(1), "plain": values, "negated": values,
            "weights": In(4 * rate * lanes),
            "sums": Out(data.ArrayLayout(signed(width), lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        rate = self.rate
        plain = [self.plain[n] for n in range(rate)]
        negated = [self.negated[n] for n in range(rate)]
        valid, first = (delayed(m, value, 1, name) for value, name in
                        ((self.valid, "valid"), (self.first, "first")))
        for lane in range(self.lanes):
            weights = [self.weights.word_select(lane * rate + n, 4) for n in range(rate)]
            if rate == 1:
                bits = weights[0]
                low = pair_add(m, platform, f"low_{lane}", plain[0], bits[0],
                               plain[0] << 1, bits[1], 7)
                high = pair_add(m, platform, f"high_{lane}", plain[0], bits[2],
                                negated[0] << 1, bits[3], 7)
            else:
                rows = [tree(m, platform, f"row_{lane}_{bit}", [
                    pair_add(m, platform, f"pair_{lane}_{bit}_{n}", values[n], weights[n][bit],
                             values[n + 1], weights[n + 1][bit], 6) for n in range(0, rate, 2)])
                    for bit, values in enumerate((plain, plain, plain, negated))]
                low = join(m, platform, f"low_{lane}", rows[0], rows[1], 1)
                high = join(m, platform, f"high_{lane}", rows[2], rows[3], 1)
            low_sum, high_sum = (Signal.like(value, name=f"{name}_sum_{lane}")
                                 for name, value in (("low", low), ("high", high)))
            m.d.sync += [low_sum.eq(low), high_sum.eq(high)]
            products = join(m, platform, f"products_{lane}", low_sum, high_sum, 2)
            total = Signal(signed(self.width), name=f"sum_{lane}")
            joined = accumulate(m, platform, f"joined_{lane}", total, first, products, self.width)
            with m.If(valid):
                m.d.sync += total.eq(joined)
            m.d.comb += self.sums[lane].eq(total)
        return m


class DenseLanes(wiring.Component):
    """Dot products of V channels for K lanes and P pixels, by the bits of the codes.

    The P pixels share a word of weights, so the weight memory is read for P * V * K products.
    With ``half_rate`` weights have 8 bits and codes 4, so two passes make 8 x 8 bits where four
    would. Words that enter with ``valid`` are in ``sums`` `latency` = 3 cycles later.

    Members
    -------
    valid, first : ``In(1)``
        A word, and whether it is the first of its group.
    codes : ``In(4 * V * P)``
        Nibbles, ``[pixel][channel]``; signed with ``codes_signed``.
    weights : ``In(4 * V * K)``, 8 with ``half_rate``
        ``[lane][channel]``; signed with ``weights_signed``.
    sums : ``Out``
        ``[lane][pixel]``, modulo 2^width.
    """

    latency = 3

    def __init__(self, lanes, pixels=1, vector=16, width=18, *, half_rate=False):
        self.lanes, self.pixels, self.vector, self.width = lanes, pixels, vector, width
        self.bits = 8 if half_rate else 4
        super().__init__({
            "valid": In(1), "first": In(1), "codes_signed": In(1), "weights_signed": In(1),
            "codes": In(4 * vector * pixels), "weights": In(self.bits * vector * lanes),
            "sums": Out(data.ArrayLayout(signed(width), lanes * pixels)),
        })

    def elaborate(self, platform):
        m = Module()
        vector, bits = self.vector, self.bits
        codes_signed = delayed(m, self.codes_signed, 1, "codes_signed")
        valid, first = (delayed(m, value, 2, name) for value, name in
                        ((self.valid, "valid"), (self.first, "first")))
        for lane in range(self.lanes):
            word = self.weights.word_select(lane, bits * vector)
            weights = []
            for n in range(vector):
                weight = Signal(signed(bits + 1), name=f"weight_{lane}_{n}")
                part = word.word_select(n, bits)
                m.d.comb += weight.eq(Cat(part, part[-1] & self.weights_signed).as_signed())
                weights.append(weight)
            for pixel in range(self.pixels):
                codes = self.codes.word_select(pixel, 4 * vector)
                name = f"{lane}_{pixel}"
                rows = []
                for bit in range(4):
                    eighths = []
                    for base in range(0, vector, 8):
                        partial = tree(m, platform, f"tree_{name}_{bit}_{base}", [
                            pair_add(m, platform, f"pair_{name}_{bit}_{n}",
                                     weights[n], codes[4 * n + bit],
                                     weights[n + 1], codes[4 * n + 4 + bit], bits + 2)
                            for n in range(base, base + 8, 2)])
                        held = Signal.like(partial, name=f"eight_{name}_{bit}_{base}")
                        m.d.sync += held.eq(partial)
                        eighths.append(held)
                    rows.append(tree(m, platform, f"row_{name}_{bit}", eighths))
                low = join(m, platform, f"low_{name}", rows[0], rows[1], 1)
                wide = len(low)
                upper = accumulate(m, platform, f"upper_{name}", rows[2] >> 1, C(0, 1), rows[3],
                                   wide - 1, negate=codes_signed)
                low_sum, high_sum = (Signal(signed(wide), name=f"{part}_sum_{name}")
                                     for part in ("low", "high"))
                m.d.sync += [low_sum.eq(low), high_sum.eq(Cat(rows[2][0], upper))]
                products = join(m, platform, f"products_{name}", low_sum, high_sum, 2)
                total = Signal(signed(self.width), name=f"sum_{name}")
                joined = accumulate(
                    m, platform, f"joined_{name}", total, first, products, self.width)
                with m.If(valid):
                    m.d.sync += total.eq(joined)
                m.d.comb += self.sums[lane * self.pixels + pixel].eq(total)
        return m


class WordMultiplexer(wiring.Component):
    """Chooses M of a word's V weights for each lane, as skipping zeros in a dot product needs.

    ``chosen`` is 2 cycles behind ``weights``; ``channels`` come a cycle after them.

    Members
    -------
    weights : ``In(4 * V * L)``
        ``[lane][channel]``.
    channels : ``In``
        Of the M non-zeros.
    chosen : ``Out(4 * M * L)``
        ``[lane][non-zero]``.
    """

    def __init__(self, lanes, rate, vector=16):
        self.lanes, self.rate, self.vector = lanes, rate, vector
        super().__init__({
            "weights": In(4 * vector * lanes),
            "channels": In(data.ArrayLayout((vector - 1).bit_length(), rate)),
            "chosen": Out(4 * rate * lanes),
        })

    def elaborate(self, platform):
        m = Module()
        weights = delayed(m, self.weights, 1, "weights")
        for lane in range(self.lanes):
            word = weights.word_select(lane, 4 * self.vector)
            for n in range(self.rate):
                m.d.sync += self.chosen.word_select(lane * self.rate + n, 4).eq(
                    word.word_select(self.channels[n], 4))
        return m
