"""One lane of the requantizer's second half: an element becomes a code of 4 or 8 bits."""

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.descriptor import Format
from hw.e4m3 import divide, shift_right
from hw.rounding import round_half_even

__all__ = ["QuantizerLane"]


class QuantizerLane(wiring.Component):
    """Quantize an element given as sign and magnitude.

    A4U and A4S: magnitude / (``mantissa`` * 2^(``shift`` + 1)), rounded to nearest, ties to even,
    at most 15 (A4U) or 7 (A4S), with the sign. MX8: magnitude / 2^(``shift`` + 1) likewise, at most
    127, with the sign. IN16: the element plus 128 without its low byte, or with ``low`` its low
    byte, both signed. With ``zero`` the code is 0 except in IN16.

    Accepts an element every cycle; the code appears ``latency`` cycles later. Nothing stalls it.

    Members
    -------
    format : ``In(2)``
        `Format`; constant while elements are under way.
    low, zero : ``In(1)``
    mantissa, shift : ``In(4)``
    negative : ``In(1)``
    magnitude : ``In(23)``
    code : ``Out(signed(8))``
    """

    latency = 4

    format: In(2)
    low: In(1)
    zero: In(1)
    mantissa: In(4)
    shift: In(4)
    negative: In(1)
    magnitude: In(23)
    code: Out(signed(8))

    def elaborate(self, platform):
        m = Module()
        is_plane = self.format == Format.IN16
        has_steps = (self.format == Format.A4U) | (self.format == Format.A4S)

        # cycle 1: shift; one bit below the code stays
        operand = Signal(9)
        beyond = Signal()
        lost = Signal()
        mantissa = Signal(4)
        negative = Signal()
        zero = Signal()
        shifted, sticky = shift_right(m, self.magnitude, self.shift, "shifted")
        element = Signal(signed(24))
        plane = Mux(self.low, element[:8], (element + 128)[8:16])
        m.d.comb += element.eq(Mux(self.negative, -self.magnitude, self.magnitude))
        m.d.sync += [
            operand.eq(Mux(is_plane, plane, shifted)),
            beyond.eq(shifted[9:].any()),
            lost.eq(sticky),
            mantissa.eq(self.mantissa),
            negative.eq(self.negative),
            zero.eq(self.zero),
        ]

        # cycle 2: three quotient bits
        value = Signal(9)
        high_bits = Signal(3)
        over = Signal()
        lost_2 = Signal()
        mantissa_2 = Signal(4)
        negative_2 = Signal()
        zero_2 = Signal()
        bits, remainder = divide(m, operand, mantissa, (4, 3, 2), "high")
        m.d.sync += [
            value.eq(Mux(has_steps, remainder, operand)),
            high_bits.eq(bits),
            over.eq(beyond | (operand >= mantissa << 5)),
            lost_2.eq(lost),
            mantissa_2.eq(mantissa),
            negative_2.eq(negative),
            zero_2.eq(zero),
        ]

        # cycle 3: two more
        quotient = Signal(9)
        inexact = Signal()
        over_3 = Signal()
        negative_3 = Signal()
        zero_3 = Signal()
        bits, remainder = divide(m, value, mantissa_2, (1, 0), "low")
        m.d.sync += [
            quotient.eq(Mux(has_steps, Cat(bits, high_bits), value)),
            inexact.eq(lost_2 | (has_steps & remainder.any())),
            over_3.eq(has_steps & over),
            negative_3.eq(negative_2),
            zero_3.eq(zero_2),
        ]

        # cycle 4: round, clip, sign
        limit = Signal(8)
        rounded = Signal(10)
        m.d.comb += rounded.eq(round_half_even(Cat(inexact, quotient), 2))
        size = Signal(8)
        with m.Switch(self.format):
            with m.Case(Format.A4U):
                m.d.comb += limit.eq(15)
            with m.Case(Format.A4S):
                m.d.comb += limit.eq(7)
            with m.Default():
                m.d.comb += limit.eq(127)
        with m.If(~zero_3):
            m.d.comb += size.eq(Mux(over_3 | (rounded > limit), limit, rounded))
        with m.If(is_plane):
            m.d.sync += self.code.eq(quotient)
        with m.Else():
            m.d.sync += self.code.eq(Mux(negative_3, -size, size))
        return m
