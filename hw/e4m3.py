"""E4M3 scale codes: decoding, and the encoder that turns a group's maximum into its scale."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.descriptor import Format
from hw.rounding import round_half_even

__all__ = ["LARGEST_CODE", "ScaleEncoder", "decode", "divide", "shift_right"]

LARGEST_CODE = 0x7E  # 448; 0x7F would be NaN


def decode(code):
    """Mantissa (4 bits) and exponent (4 bits, 1 to 15) of a positive E4M3 code.

    The value is mantissa * 2^(exponent - 1) * 2^-9.
    """
    normal = code[3:7].any()
    return Cat(code[:3], normal), Cat(code[3] | ~normal, code[4:7])


def shift_right(m, value, amount, name):
    """``value`` shifted right, and whether a bit that is not zero was lost."""
    most = (1 << len(amount)) - 1
    shifted = Signal(len(value) + most, name=name)
    m.d.comb += shifted.eq((value << most) >> amount)
    return shifted[most:], shifted[:most].any()


def divide(m, remainder, divisor, steps, name):
    """Quotient bits ``steps`` (descending) of a restoring division, and what remains.

    ``remainder`` must be less than ``divisor`` * 2^(first step + 1).
    """
    bits = []
    for step in steps:
        trial = Signal(signed(len(remainder) + 2), name=f"{name}_trial_{step}")
        left = Signal(len(remainder), name=f"{name}_left_{step}")
        m.d.comb += [
            trial.eq(remainder - (divisor << step)),
            left.eq(Mux(trial < 0, remainder, trial)),
        ]
        remainder = left
        bits.append(~trial[-1])
    return Cat(*reversed(bits)), remainder


class ScaleEncoder(wiring.Component):
    """Scale code of a group from the largest magnitude of its elements.

    Accepts a group every cycle; the code appears ``latency`` cycles later. Nothing stalls it.

    A4U and A4S: the E4M3 code nearest to ``amax`` / n (n = 15 or 7; the value of a code counted as
    mantissa * 2^exponent), ties to the even code, at most 0x7E. MX8: the position of the leading
    one less 7; below that, 0 with ``zero`` set. IN16 has constant scales and no use for this unit.

    Members
    -------
    format : ``In(2)``
        `Format`; constant while groups are under way.
    amax : ``In(23)``
    code : ``Out(8)``
    zero : ``Out(1)``
        Every element of the group gets code 0.
    """

    latency = 5

    format: In(2)
    amax: In(23)
    code: Out(8)
    zero: Out(1)

    def elaborate(self, platform):
        m = Module()
        is_signed = self.format == Format.A4S
        is_block = self.format == Format.MX8

        # cycle 1: leading one, and the shift that leaves 8 bits of quotient at most
        amax = Signal(23)
        shift = Signal(4)
        below = Signal()
        lead = Signal(5)
        for position in range(23):
            with m.If(self.amax[position]):
                m.d.comb += lead.eq(position)
        room = Mux(self.format == Format.A4U, 8, 7)
        m.d.sync += [
            amax.eq(self.amax),
            shift.eq(Mux(lead > room, lead - room, 0)),
            below.eq(lead < room),
        ]

        # cycle 2: shift
        part = Signal(9)
        lost = Signal()
        exponent = Signal(5)
        shifted, sticky = shift_right(m, amax, shift, "shifted")
        below_window = Signal()
        m.d.sync += [
            part.eq(shifted), lost.eq(sticky), exponent.eq(shift), below_window.eq(below)]

        # cycle 3: a quotient of 16 or more takes the next exponent
        n = Signal(4)
        m.d.comb += n.eq(Mux(is_signed, 7, 15))
        operand = Signal(9)
        inexact = Signal()
        exponent_3 = Signal(5)
        below_3 = Signal()
        large = ~is_block & (part >= n << 5)
        m.d.sync += [
            operand.eq(Mux(large, part >> 1, part)),
            inexact.eq(lost | (large & part[0])),
            exponent_3.eq(exponent + large),
            below_3.eq(below_window),
        ]

        # cycle 4: divide, one bit below the mantissa
        quotient = Signal(5)
        inexact_4 = Signal()
        exponent_4 = Signal(5)
        below_4 = Signal()
        bits, remainder = divide(m, operand, n, (4, 3, 2, 1, 0), "quotient")
        m.d.sync += [
            quotient.eq(bits),
            inexact_4.eq(inexact | remainder.any()),
            exponent_4.eq(exponent_3),
            below_4.eq(below_3),
        ]

        # cycle 5: round; a mantissa of 16 runs over into the exponent, as it should
        mantissa = round_half_even(Cat(inexact_4, quotient), 2)
        number = Signal(9)
        code = Signal(8)
        m.d.comb += number.eq(Cat(Const(0, 3), exponent_4) + mantissa)
        with m.If(is_block):
            m.d.comb += code.eq(exponent_4)
            m.d.sync += self.zero.eq(below_4)
        with m.Else():
            m.d.comb += code.eq(Mux(number > LARGEST_CODE, LARGEST_CODE, number))
            m.d.sync += self.zero.eq(number == 0)
        m.d.sync += self.code.eq(code)
        return m
