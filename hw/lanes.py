"""Multipliers of the PEs: products of 4-bit codes and weights by the bits of the latter.

A product is a sum of gated copies of one operand. `hw.carry` adds two of them in one row of carry
cells, so the tree of sums is all that a multiplier costs.
"""

from amaranth import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .carry import accumulate, add, pair_add
from .scale_unit import ScaleUnit, connect_unit, unit_members

__all__ = ["DenseGroup", "SparseCodes", "SparseGroup", "extend_codes"]


def extend_codes(nibbles, is_signed):
    """The nibbles of a word as an array of signed 5-bit values."""
    return Cat(*(
        Cat(nibbles[low:low + 4], nibbles[low + 3] & is_signed)
        for low in range(0, len(nibbles), 4)))


def group_members(config):
    """Members that both kinds of groups share."""
    members = unit_members(config)
    return {"valid": In(1), "first": In(1), "group_first": members.pop("first"), **members}


def join(m, platform, name, low, high, places):
    """``low + (high << places)`` as a signed signal that holds every sum."""
    width = max(len(low), len(high) + places) + 1
    total = Signal(signed(width), name=name)
    upper = add(m, platform, f"{name}_upper", low >> places, high, width - places)
    m.d.comb += total.eq(Cat(low[:places], upper))
    return total


def tree(m, platform, name, terms):
    """Sum of signed terms, added in pairs."""
    while len(terms) > 1:
        terms = [add(m, platform, f"{name}_{len(terms)}_{n}", *terms[n:n + 2], len(terms[n]) + 1)
                 for n in range(0, len(terms), 2)]
    return terms[0]


def add_products(m, platform, lane, unit, valid, first, low, high):
    """Add products with ``valid`` to the sum of ``lane``, or with ``first`` begin a sum with them.

    ``low``, ``high``: products with the low and the high two bits of the weights.
    """
    width = unit.config.sum_width
    total = Signal(signed(width), name=f"sum_{lane}")
    products = join(m, platform, f"products_{lane}", low, high, 2)
    joined = accumulate(m, platform, f"joined_{lane}", total, first, products, width)
    with m.If(valid):
        m.d.sync += total.eq(joined)
    m.d.comb += unit.sums[lane].eq(total)


class SparseCodes(wiring.Component):
    """Prepares the codes of an entry for all lanes of a sparse PE, in `latency` = 1 cycle.

    Members
    -------
    codes : ``In``
        M nibbles.
    codes_signed, weights_signed : ``In(1)``
        Whether the nibbles of codes and weights are signed.
    plain, negated : ``Out``
        Values of the codes, and what the highest bits of the weights multiply: the same or, where
        weights are signed, its negative.
    """

    latency = 1

    def __init__(self, config):
        self.rate = config.sparse_rate
        super().__init__({
            "codes": In(data.ArrayLayout(4, self.rate)),
            "codes_signed": In(1),
            "weights_signed": In(1),
            "plain": Out(data.ArrayLayout(signed(5), self.rate)),
            "negated": Out(data.ArrayLayout(signed(5), self.rate)),
        })

    def elaborate(self, platform):
        m = Module()
        values = Signal.like(self.plain)
        m.d.comb += values.eq(extend_codes(self.codes.as_value(), self.codes_signed))
        m.d.sync += self.plain.eq(values)
        for number in range(self.rate):
            value = values[number]
            m.d.sync += self.negated[number].eq(Mux(self.weights_signed, -value, value))
        return m


class SparseGroup(wiring.Component):
    """M codes times the output channels that share a scale unit.

    Products enter with ``valid`` and are added to the sums `latency` = 1 cycle later, which is
    `Drain`'s cycle C when they are the last of their group.

    Members
    -------
    valid, first : ``In(1)``
        Products, and whether they are the first of their group.
    plain, negated : ``In``
        From `SparseCodes`; codes of 0 add nothing.
    weights : ``In(4 * M * lanes)``
        Nibbles, ``[lane][non-zero]``; signed or not as `SparseCodes` was told.
    step, group_first, last, scale, weight_scale, advance, sum
        The members of `ScaleUnit`, its ``first`` as ``group_first``.
    """

    latency = 1

    def __init__(self, config, lanes):
        self.config, self.lanes = config, lanes
        values = In(data.ArrayLayout(signed(5), config.sparse_rate))
        super().__init__({
            **group_members(config),
            "plain": values,
            "negated": values,
            "weights": In(4 * config.sparse_rate * lanes),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.scale_unit = unit = ScaleUnit(self.config, self.lanes)
        rate = self.config.sparse_rate
        plain = [self.plain[number] for number in range(rate)]
        negated = [self.negated[number] for number in range(rate)]
        valid, first = Signal(), Signal()
        m.d.sync += [valid.eq(self.valid), first.eq(self.first)]
        for lane in range(self.lanes):
            weights = [self.weights.word_select(lane * rate + number, 4) for number in range(rate)]

            def row(bit, values, lane=lane, weights=weights):
                """Sum of the values whose weights have this bit."""
                return tree(m, platform, f"row_{lane}_{bit}", [
                    pair_add(m, platform, f"pair_{lane}_{bit}_{n}", values[n], weights[n][bit],
                             values[n + 1], weights[n + 1][bit], 6)
                    for n in range(0, rate, 2)])

            # cycle 0: sums of the low and of the high two bits of the weights
            if rate > 1:
                low = join(m, platform, f"low_{lane}", row(0, plain), row(1, plain), 1)
                high = join(m, platform, f"high_{lane}", row(2, plain), row(3, negated), 1)
            else:
                bits = weights[0]
                low = pair_add(m, platform, f"low_{lane}", plain[0], bits[0],
                               plain[0] << 1, bits[1], 7)
                high = pair_add(m, platform, f"high_{lane}", plain[0], bits[2],
                                negated[0] << 1, bits[3], 7)
            low_sum, high_sum = (Signal.like(value, name=f"{name}_sum_{lane}")
                                 for name, value in (("low", low), ("high", high)))
            m.d.sync += [low_sum.eq(low), high_sum.eq(high)]

            # cycle 1: their sum joins the group's
            add_products(m, platform, lane, unit, valid, first, low_sum, high_sum)
        connect_unit(m, self, unit)
        return m


class DenseGroup(wiring.Component):
    """Dot products for the output channels that share a scale unit.

    A word enters with ``valid``; its dot products are added to the sums `latency` = 2 cycles
    later, which is `Drain`'s cycle C when it is the last of its group.

    Members
    -------
    valid, first : ``In(1)``
        A word, and whether it is the first of its group.
    codes : ``In``
        V values, see `extend_codes`.
    weights : ``In(4 * V * lanes)``
        Nibbles, ``[lane][channel]``; signed with ``weights_signed``.
    step, group_first, last, scale, weight_scale, advance, sum
        The members of `ScaleUnit`, its ``first`` as ``group_first``.
    """

    latency = 2

    def __init__(self, config, lanes):
        self.config, self.lanes = config, lanes
        super().__init__({
            **group_members(config),
            "codes": In(data.ArrayLayout(signed(5), config.vector)),
            "weights": In(4 * config.vector * lanes),
            "weights_signed": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.scale_unit = unit = ScaleUnit(self.config, self.lanes)
        vector = self.config.vector
        controls = [Cat(self.valid, self.first, self.weights_signed)]
        for cycle in (1, 2):
            controls.append(Signal(3, name=f"controls_{cycle}"))
            m.d.sync += controls[cycle].eq(controls[cycle - 1])
        weights_signed = controls[1][2]
        valid, first = controls[2][:2]
        for lane in range(self.lanes):
            # cycle 0: for each bit of the weights, sums of eight of the codes that have it
            rows = []
            for bit in range(4):
                eighths = []
                for base in range(0, vector, 8):
                    name = f"{lane}_{bit}_{base // 8}"
                    partial = tree(m, platform, f"tree_{name}", [
                        pair_add(m, platform, f"pair_{name}_{n}",
                                 self.codes[n], self.weights[4 * (lane * vector + n) + bit],
                                 self.codes[n + 1],
                                 self.weights[4 * (lane * vector + n + 1) + bit], 6)
                        for n in range(base, base + 8, 2)])
                    held = Signal.like(partial, name=f"eight_{name}")
                    m.d.sync += held.eq(partial)
                    eighths.append(held)
                # cycle 1: of all of them; then of the low and of the high two bits
                rows.append(tree(m, platform, f"row_{lane}_{bit}", eighths))
            low = join(m, platform, f"low_{lane}", rows[0], rows[1], 1)
            wide = len(low)
            upper = accumulate(m, platform, f"upper_{lane}", rows[2] >> 1, 0, rows[3], wide - 1,
                               negate=weights_signed)
            low_sum, high_sum = (Signal(signed(wide), name=f"{name}_sum_{lane}")
                                 for name in ("low", "high"))
            m.d.sync += [low_sum.eq(low), high_sum.eq(Cat(rows[2][0], upper))]

            # cycle 2: their sum joins the group's
            add_products(m, platform, lane, unit, valid, first, low_sum, high_sum)
        connect_unit(m, self, unit)
        return m
