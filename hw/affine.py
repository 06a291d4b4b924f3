"""One lane of the requantizer's first half: the per-channel multiply-add and ReLU."""

from amaranth.hdl import Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.rounding import round_half_even

__all__ = ["LARGEST", "LARGEST_INPUT", "AffineLane"]

LARGEST = (1 << 23) - 1  # magnitude of an element before it is quantized
LARGEST_INPUT = 32639    # magnitude of the network input that two planes of 8 bits hold


class AffineLane(wiring.Component):
    """Apply a channel's gain and offset to a 16-bit element, then ReLU.

    y = clip(round_half_even(``x`` * ``gain``, ``shift``) + ``offset``), to magnitudes of at most
    2^23 - 1; negative y becomes 0 with ``relu``. With ``raw``, y = clip(``x``) to at most 32639,
    whatever gain, shift and offset. Without ``valid`` the element is 0 and not clipped.

    Accepts an element every cycle; the result appears ``latency`` cycles later. Nothing stalls it.

    Members
    -------
    relu, raw, shift : ``In``
        Constant while elements are under way.
    valid : ``In(1)``
    x, gain : ``In(signed(16))``
    offset : ``In(signed(32))``
    negative : ``Out(1)``
    magnitude : ``Out(23)``
    clipped : ``Out(1)``
        y was clipped, before ReLU.
    """

    latency = 4

    relu: In(1)
    raw: In(1)
    shift: In(5)
    valid: In(1)
    x: In(signed(16))
    gain: In(signed(16))
    offset: In(signed(32))
    negative: Out(1)
    magnitude: Out(23)
    clipped: Out(1)

    def elaborate(self, platform):
        m = Module()
        # cycle 1: multiply
        product = Signal(signed(32))
        offset_1 = Signal(signed(32))
        valid_1 = Signal()
        m.d.sync += [
            product.eq(self.x * Mux(self.raw, Const(1, signed(16)), self.gain)),
            offset_1.eq(Mux(self.raw, 0, self.offset)),
            valid_1.eq(self.valid),
        ]

        # cycle 2: shift
        rounded = Signal(signed(33))
        offset_2 = Signal(signed(32))
        valid_2 = Signal()
        m.d.sync += [
            rounded.eq(round_half_even(product, Mux(self.raw, 0, self.shift))),
            offset_2.eq(offset_1),
            valid_2.eq(valid_1),
        ]

        # cycle 3: add and clip
        total = Signal(signed(34))
        y = Signal(signed(24))
        clipped = Signal()
        high = Mux(self.raw, Const(LARGEST_INPUT, signed(24)), Const(LARGEST, signed(24)))
        low = Mux(self.raw, Const(-LARGEST_INPUT, signed(24)), Const(-LARGEST, signed(24)))
        above, under = total > high, total < low
        m.d.comb += total.eq(rounded + offset_2)
        with m.If(valid_2):
            m.d.sync += [
                y.eq(Mux(above, high, Mux(under, low, total))),
                clipped.eq(above | under),
            ]
        with m.Else():
            m.d.sync += [y.eq(0), clipped.eq(0)]

        # cycle 4: ReLU, sign and magnitude
        m.d.sync += [
            self.negative.eq((y < 0) & ~self.relu),
            self.magnitude.eq(Mux(y < 0, Mux(self.relu, 0, -y), y)),
            self.clipped.eq(clipped),
        ]
        return m
