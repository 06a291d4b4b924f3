"""Sums with a gate or a choice at their inputs, in the carry cells of an FPGA where it has them.

A carry cell of the ECP5 (CCU2C) adds two bits that are any function of four inputs each, so an
operand that is gated, negated or chosen costs nothing there. Synthesis tools put the gate into
LUTs in front of the adder instead. With `CarryCells` as their platform these functions place the
cells by name; without it they are plain additions that any tool takes, with the same results.
"""

from amaranth import C, Cat, Instance, Mux, Signal, signed
from amaranth.hdl import Value

__all__ = ["CarryCells", "WideMultipliers", "accumulate", "add", "mux_add", "pair_add"]

# Sum bit of a cell as a function of its inputs A (bit 0 of the index) to D; the low four entries
# are the carry's value where that bit is 0.
PAIR = 0x7888         # (A & B) ^ (C & D)
ACCUMULATE = 0x2DD2   # (A & ~B) ^ C ^ D
CHOOSE = 0x596A       # A ^ (B ? C : D)


class WideMultipliers:
    """A platform whose multipliers take 18 bits, used or not; for the argument of ``elaborate``."""


class CarryCells(WideMultipliers):
    """A platform whose sums are made of ECP5 carry cells, for the argument of ``elaborate``."""


def add(m, platform, name, a, b, width):
    """``a + b``, signed, modulo 2^``width``.

    As cells, because yosys would turn a tree of plain additions into carry-save adders of LUTs.
    """
    return pair_add(m, platform, name, a, C(1, 1), b, C(1, 1), width)


def pair_add(m, platform, name, a, x, b, y, width):
    """``(a if x else 0) + (b if y else 0)``, signed, modulo 2^``width``."""
    total = Signal(signed(width), name=name)
    if isinstance(platform, CarryCells):
        _cells(m, total, PAIR, (_fit(a, width), x, _fit(b, width), y))
    else:
        m.d.comb += total.eq(Mux(x, a, 0) + Mux(y, b, 0))
    return total


def accumulate(m, platform, name, a, clear, b, width, negate=None):
    """``(0 if clear else a) + (-b if negate else b)``, signed, modulo 2^``width``."""
    total = Signal(signed(width), name=name)
    negate = C(0, 1) if negate is None else negate
    if isinstance(platform, CarryCells):
        _cells(m, total, ACCUMULATE, (_fit(a, width), clear, _fit(b, width), negate), negate)
    else:
        m.d.comb += total.eq(Mux(clear, 0, a) + Mux(negate, -b, b))
    return total


def mux_add(m, platform, name, a, choose, b, c, width):
    """``a + (b if choose else c)``, signed, modulo 2^``width``."""
    total = Signal(signed(width), name=name)
    if isinstance(platform, CarryCells):
        _cells(m, total, CHOOSE, (_fit(a, width), choose, _fit(b, width), _fit(c, width)))
    else:
        m.d.comb += total.eq(a + Mux(choose, b, c))
    return total


def _fit(value, width):
    """The low ``width`` bits of ``value``, extended by its sign if it has one."""
    value = Value.cast(value)
    extended = Cat(value, value[-1].replicate(width) if value.shape().signed else C(0, width))
    return extended[:width]


def _cells(m, total, table, inputs, carry=0):
    """Drive ``total`` by a chain of cells; inputs of one bit go to all of them."""
    width = len(total)
    spread = [value if len(value) == width else value.replicate(width)
              for value in map(Value.cast, inputs)]
    for low in range(0, width, 2):
        out = Signal(name=f"{total.name}_carry_{low}")
        ports = {"i_CIN": carry, "o_COUT": out}
        for half in (0, 1):
            inside = low + half < width
            for letter, value in zip("ABCD", spread):
                ports[f"i_{letter}{half}"] = value[low + half] if inside else C(0, 1)
            if inside:
                ports[f"o_S{half}"] = total[low + half]
            ports[f"p_INIT{half}"] = C(table, 16)
            ports[f"p_INJECT1_{half}"] = "NO"
        m.submodules[f"{total.name}_cell_{low}"] = Instance("CCU2C", **ports)
        carry = out
