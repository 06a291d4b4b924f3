"""The scale operation: an integer group sum times its scales, added to a partial sum."""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["ScaleUnit", "activation_scale_layout", "chunk_layout", "connect_unit", "unit_members"]

activation_scale_layout = data.StructLayout({"factor": 4, "shift": 4})
"""A decoded activation scale: ``factor << shift`` in units of the smallest scale."""


def chunk_layout(config):
    """V/4 consecutive outputs of a pixel as exact sums."""
    return data.ArrayLayout(signed(config.accumulator_width), config.quad)


def unit_members(config, lanes):
    """Members of a `ScaleUnit` that a part around it passes on."""
    lane = range(max(2, lanes))
    return {
        "load": In(1),
        "step": In(1),
        "lane": In(lane),
        "bank": In(1),
        "first_add": In(1),
        "scale": In(activation_scale_layout),
        "weight_scale": In(8),
        "mx": In(1),
        "flush_lane": In(lane),
        "flush_bank": In(1),
        "flush_sum": Out(signed(config.accumulator_width)),
    }


def connect_unit(m, part, unit):
    """Pass the members of ``part`` that belong to its scale unit on to ``unit``."""
    for name in unit_members(unit.config, unit.lanes):
        if name == "flush_sum":
            m.d.comb += part.flush_sum.eq(unit.flush_sum)
        else:
            m.d.comb += getattr(unit, name).eq(getattr(part, name))


class ScaleUnit(wiring.Component):
    """Scales the sums of ``lanes`` output channels, one a cycle, into exact partial sums.

    ``load`` takes all ``sums``; every ``step`` scales the next lane, lane 0 first, and adds it to
    partial sum ``lane`` of ``bank`` (or replaces it, with ``first_add``). Neither the product nor
    the addition rounds: sums are `Config.accumulator_width` bits wide. A partial sum is final
    `latency` = 4 cycles after its step. ``load`` may come in the cycle of the last step.

    Members
    -------
    load, sums : ``In``
        Take the sums of a finished group.
    step, lane, bank, first_add : ``In``
        Scale one lane.
    scale : ``In``
        See `activation_scale_layout`; with ``step``.
    weight_scale : ``In(8)``
        E4M3 code (system rules, section 2), or the exponent code of an MX block; with ``step``.
    mx : ``In(1)``
        MX formats: factors are 1.
    flush_lane, flush_bank : ``In``
        Which partial sum to show.
    flush_sum : ``Out(signed(accumulator_width))``
        That partial sum, in the same cycle.
    """

    latency = 4

    def __init__(self, config, lanes):
        self.config, self.lanes = config, lanes
        super().__init__({
            **unit_members(config, lanes),
            "sums": In(data.ArrayLayout(signed(config.sum_width), lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        width = self.config.sum_width
        held = Signal(self.lanes * width)
        with m.If(self.load):
            m.d.sync += held.eq(self.sums)
        with m.Elif(self.step):
            m.d.sync += held.eq(held >> width)

        # cycle 0: choose the lane, combine both scales
        exponent, mantissa = self.weight_scale[3:7], self.weight_scale[0:3]
        normal = exponent != 0
        weight_factor = Mux(self.mx, 1, Mux(normal, 8, 0) | mantissa)
        weight_shift = Mux(self.mx, self.weight_scale[0:4], Mux(normal, exponent - 1, 0)[0:4])
        group_sum, factor, shift = Signal(signed(width)), Signal(8), Signal(5)
        m.d.sync += [
            group_sum.eq(held[0:width].as_signed()),
            factor.eq(self.scale.factor * weight_factor),
            shift.eq(self.scale.shift + weight_shift),
        ]
        # cycle 1: multiply; cycle 2: shift; cycle 3: add
        product, product_shift = Signal(signed(width + 8)), Signal(5)
        term = Signal(signed(self.config.accumulator_width))
        m.d.sync += [
            product.eq(group_sum * factor),
            product_shift.eq(shift),
            term.eq(product << product_shift),
        ]
        place = {"active": self.step, "lane": self.lane, "bank": self.bank, "first": self.first_add}
        for cycle in (1, 2, 3):
            delayed = {}
            for name, value in place.items():
                delayed[name] = Signal(len(value), name=f"{name}_{cycle}")
                m.d.sync += delayed[name].eq(value)
            place = delayed

        m.submodules.partial = partial = memory.Memory(
            shape=signed(self.config.accumulator_width), depth=2 * max(2, self.lanes), init=[])
        write, old = partial.write_port(), partial.read_port(domain="comb")
        flush = partial.read_port(domain="comb")
        lane_bits = len(self.lane)
        address = Signal(lane_bits + 1)
        m.d.comb += [
            address.eq(place["lane"] | (place["bank"] << lane_bits)),
            old.addr.eq(address),
            write.addr.eq(address),
            write.en.eq(place["active"]),
            write.data.eq(Mux(place["first"], 0, old.data) + term),
            flush.addr.eq(self.flush_lane | (self.flush_bank << lane_bits)),
            self.flush_sum.eq(flush.data),
        ]
        return m
