"""One scale operation with scales of different formats, to see what each format costs."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..carry import WideMultipliers, add, mux_add, pair_add

__all__ = ["FORMATS", "ScaleOperation", "total_width"]

FORMATS = ("e4m3", "power of two activation", "power of two both", "integer")


def total_width(scales):
    """Bits of a partial sum of nine taps of 18-bit sums times both scales."""
    factors = {"e4m3": 15 * 15 << 28, "power of two activation": 15 << 29,
               "power of two both": 1 << 30, "integer": 15 * 15}
    return (9 * 15 * 8 * 128 * factors[scales]).bit_length() + 1


class ScaleOperation(wiring.Component):
    """Scales a sum and adds it to a partial sum, one a cycle, `latency` = 3 cycles later.

    Parameters
    ----------
    scales : one of `FORMATS`
        ``e4m3``: decoded, a factor of 4 bits and a shift of 0 to 14 each. A power of two has no
        factor and a shift of 0 to 15, an integer is a factor alone.

    Members
    -------
    step, first : ``In(1)``
        Scale; the partial sum was 0.
    sum : ``In(signed(18))``
    factor, shift, weight_factor, weight_shift : ``In(4)``
        With ``step``; a format ignores what it does not have.
    total : ``Out``
        Exact partial sum, `total_width` bits.
    """

    latency = 3

    def __init__(self, scales):
        self.scales, self.width = scales, total_width(scales)
        super().__init__({
            "step": In(1), "first": In(1), "sum": In(signed(18)),
            "factor": In(4), "shift": In(4), "weight_factor": In(4), "weight_shift": In(4),
            "total": Out(signed(self.width)),
        })

    def elaborate(self, platform):
        m = Module()
        wide = isinstance(platform, WideMultipliers)
        factor, weight = self.factor, self.weight_factor
        low = pair_add(m, platform, "low", factor, weight[0], factor << 1, weight[1], 6)
        high = pair_add(m, platform, "high", factor, weight[2], factor << 1, weight[3], 6)
        upper = add(m, platform, "upper", low[2:], high.as_unsigned(), 6)
        multiplier = {"e4m3": Cat(low[:2], upper), "power of two activation": weight,
                      "power of two both": None, "integer": Cat(low[:2], upper)}[self.scales]
        shift, step, first = Signal(5), Signal(2), Signal(2)
        held = Signal(signed(18))
        m.d.sync += [held.eq(self.sum), step.eq(Cat(self.step, step)),
                     first.eq(Cat(self.first, first))]
        if self.scales != "integer":
            m.d.sync += shift.eq(self.shift + self.weight_shift)
        if multiplier is None:
            product = held << shift[:3]
        elif wide:   # the multiplier has bits to spare for a shift of less than a byte
            shifted = Signal(len(multiplier) + 7)
            total_shift = (self.shift + self.weight_shift)[:3]
            m.d.sync += shifted.eq(
                multiplier if self.scales == "integer" else multiplier << total_shift)
            product = held * Cat(shifted, 0).as_signed()
        else:
            factors = Signal(len(multiplier))
            m.d.sync += factors.eq(multiplier)
            product = held * Cat(factors, 0).as_signed() << shift[:3]
        term, two_bytes = Signal(signed(42)), Signal()
        m.d.sync += [term.eq(Mux(shift[3], product << 8, product)), two_bytes.eq(shift[4])]
        start = Signal.like(self.total)
        m.d.comb += start.eq(Mux(first[1], 0, self.total))
        total = mux_add(m, platform, "joined", start, two_bytes, term << 16, term, self.width)
        with m.If(step[1]):
            m.d.sync += self.total.eq(total)
        return m
