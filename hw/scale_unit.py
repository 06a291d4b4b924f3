"""The scale operation: an integer group sum times its scales, added to a partial sum."""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .carry import WideMultipliers, add, mux_add, pair_add
from .e4m3 import decode

__all__ = [
    "ScaleUnit", "activation_scale_layout", "chunk_layout", "connect_unit",
    "decode_activation_scale", "decode_weight_scales", "tile_sum_width", "unit_members",
]

activation_scale_layout = data.StructLayout({"factor": 4, "middle": 1, "high": 1, "shift": 4})
"""A decoded activation scale: ``factor`` << ``shift`` in units of the smallest scale. ``middle``
and ``high`` stand for 16 and 256, whatever the weight's factor, of MX8's pairs of planes."""


def chunk_layout(config):
    """V/4 consecutive outputs of a pixel as exact sums."""
    return data.ArrayLayout(signed(config.accumulator_width), config.quad)


def tile_sum_width(config):
    """Bits that hold every reachable sum of scaled groups of one tile of input channels.

    W4A4: nine taps of 15*8*channels, times 15*15, shifted by at most 28.
    MX8: nine taps of 32 products of 128*128, shifted by at most 30.
    """
    pixel = 9 * 15 * 8 * config.tile_channels * 15 * 15 << 28
    block = 9 * 32 * 128 * 128 << 30
    return max(pixel, block).bit_length() + 1


def decode_weight_scales(word, mx):
    """Bytes for the PEs' weight scale buffers from scale codes, a byte each.

    A byte is the factor in its low nibble and the shift in its high one. It is decoded once where
    it is loaded instead of in every unit that reads it.
    """
    decoded = []
    for byte in range(0, len(word), 8):
        factor, exponent = decode(word[byte:byte + 8])
        decoded += [Mux(mx, 1, factor)[:4], Mux(mx, word[byte:byte + 4], exponent - 1)[:4]]
    return Cat(*decoded)


def decode_activation_scale(code, mx, power):
    """Value of `activation_scale_layout`; ``power``: of 16, 0 to 2, for MX8's pairs of planes."""
    factor, exponent = decode(code)
    return Cat(
        Mux(mx, power == 0, factor)[:4], mx & (power == 1), mx & (power == 2),
        Mux(mx, code[:4], exponent - 1)[:4])


def unit_members(config):
    """Members of a `ScaleUnit` that a part around it passes on."""
    return {
        "step": In(1),
        "first": In(1),
        "last": In(1),
        "scale": In(activation_scale_layout),
        "weight_scale": In(8),
        "advance": In(1),
        "sum": Out(signed(tile_sum_width(config))),
    }


def connect_unit(m, part, unit):
    """Pass the members of ``part`` that belong to its scale unit on to ``unit``.

    ``first`` is ``group_first`` there, since ``first`` is a part's first product.
    """
    for name in unit_members(unit.config):
        if name == "sum":
            m.d.comb += part.sum.eq(unit.sum)
        else:
            m.d.comb += getattr(unit, name).eq(
                getattr(part, "group_first" if name == "first" else name))


class ScaleUnit(wiring.Component):
    """Scales the sums of ``lanes`` output channels, one a cycle, into exact partial sums.

    A group takes ``lanes`` steps in consecutive cycles, lane 0 first, and may follow the one
    before without a pause. Partial sums circulate in a ring of registers. Those of the last group
    of a unit of work leave it for a second row of registers, and the ring is zero again.
    Neither product nor addition rounds: sums are `tile_sum_width` bits wide.

    Lane n's sum is final `latency` = 3 cycles after its step of a ``last`` group. It is shown as
    ``sum`` once the steps after it and an ``advance`` for each lane before it have come; the
    ``last`` group after it must not have moved on to its sums by then.

    Members
    -------
    step, first, last : ``In(1)``
        Scale the next lane; ``first``: of a group, whose ``sums`` are taken in this cycle.
        ``last``: the group is the last of its unit of work.
    scale : ``In``
        See `activation_scale_layout`; with ``step``.
    weight_scale : ``In(8)``
        See `decode_weight_scales`; with ``step``.
    sums : ``In``
        Sums of a group.
    advance : ``In(1)``
        Show the next lane's sum.
    sum : ``Out(signed(tile_sum_width))``
        Finished sum.
    """

    latency = 3

    def __init__(self, config, lanes):
        self.config, self.lanes = config, lanes
        super().__init__({
            **unit_members(config),
            "sums": In(data.ArrayLayout(signed(config.sum_width), lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        width, sum_width = self.config.sum_width, tile_sum_width(self.config)
        step, last = [self.step], [self.last]
        for cycle in (1, 2):
            for stages, name in ((step, "step"), (last, "last")):
                stages.append(Signal(name=f"{name}_{cycle}"))
                m.d.sync += stages[cycle].eq(stages[cycle - 1])

        # cycle 0: take the sums; combine both scales
        held = Signal(self.lanes * width)
        with m.If(self.step & self.first):
            m.d.sync += held.eq(self.sums)
        with m.Elif(step[1]):
            m.d.sync += held.eq(held >> width)
        factor, weight = self.scale.factor, self.weight_scale
        low = pair_add(m, platform, "low", factor, weight[0], factor << 1, weight[1], 6)
        high = pair_add(m, platform, "high", factor, weight[2], factor << 1, weight[3], 6)
        upper, both, shift = Signal(6), Signal(9), Signal(5)
        m.d.comb += [
            upper.eq(add(m, platform, "factors", low[2:], high.as_unsigned(), 6)),
            both.eq(Cat(low[:2], upper[:2], upper[2] | self.scale.middle, upper[3:],
                        self.scale.high)),
            shift.eq(self.scale.shift + weight[4:]),
        ]
        # less than a byte is shifted in front of a multiplier that has bits to spare, else behind
        wide = isinstance(platform, WideMultipliers)
        multiplier, rest = Signal(16 if wide else 9), Signal(5)
        m.d.sync += [multiplier.eq(both << shift[:3] if wide else both), rest.eq(shift)]

        # cycle 1: multiply, shift by a byte
        exact = held[:width].as_signed() * Cat(multiplier, 0).as_signed()
        product = Signal(signed(width + 15))
        term, two_bytes = Signal(signed(width + 23)), Signal()
        m.d.comb += product.eq(exact if wide else exact << rest[:3])
        m.d.sync += [term.eq(Mux(rest[3], product << 8, product)), two_bytes.eq(rest[4])]

        # cycle 2: shift by two bytes, add
        ring = [Signal(signed(sum_width), name=f"ring_{lane}") for lane in range(self.lanes)]
        done = [Signal(signed(sum_width), name=f"done_{lane}") for lane in range(self.lanes)]
        total = mux_add(
            m, platform, "total", ring[-1], two_bytes, term << 16, term, sum_width)
        ends = step[2] & last[2]
        with m.If(step[2]):
            m.d.sync += [ring[0].eq(total), *map(Signal.eq, ring[1:], ring)]
        with m.If(ends):
            m.d.sync += ring[0].eq(0)
        with m.If(ends | (self.advance if self.lanes > 1 else 0)):
            m.d.sync += [done[0].eq(total), *map(Signal.eq, done[1:], done)]
        m.d.comb += self.sum.eq(done[-1])
        return m
