# amaranth: UnusedElaboratable=no
"""Parts: one module in the Verilog however often they are placed."""

import re

import pytest
from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.parts import collect, place
from hw.verilog import emit
from sim import verilator


class Bit(wiring.Component):
    """A bit and the one before it."""

    i: In(1)
    o: Out(wiring.Signature({"now": Out(1), "late": Out(1)}))

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.o.now.eq(self.i)
        m.d.sync += self.o.late.eq(self.i)
        return m


class Lane(wiring.Component):
    """Bits in a row."""

    def __init__(self, bits):
        self.bits = bits
        self.parts = {"bit_part": Bit()}
        super().__init__({"i": In(bits), "o": Out(bits)})

    def elaborate(self, platform):
        m = Module()
        for number in range(self.bits):
            bit = place(m, f"bit_{number}", "bit_part", self.parts["bit_part"])
            m.d.comb += [bit.i.eq(self.i[number]), self.o[number].eq(bit.o.now ^ bit.o.late)]
        return m


class Lanes(wiring.Component):
    """Lanes, and a bit of their own, of a kind that the lanes have too."""

    def __init__(self, lanes, bits=2):
        self.lanes, self.bits = lanes, bits
        self.parts = {"lane_part": Lane(bits), "bit_part": Bit()}
        super().__init__({"i": In(bits), "o": Out(bits * lanes), "late": Out(1)})

    def elaborate(self, platform):
        m = Module()
        for number in range(self.lanes):
            lane = place(m, f"lane_{number}", "lane_part", self.parts["lane_part"])
            m.d.comb += [lane.i.eq(self.i),
                         self.o.word_select(number, self.bits).eq(lane.o)]
        bit = place(m, "bit", "bit_part", self.parts["bit_part"])
        m.d.comb += [bit.i.eq(self.i[0]), self.late.eq(bit.o.late)]
        return m


def test_innermost_parts_come_first():
    parts = collect(Lanes(2))
    assert list(parts) == ["bit_part", "lane_part"]
    assert isinstance(parts["lane_part"], Lane)
    assert collect(Bit()) == {}


def test_each_part_is_emitted_once():
    text = emit(Lanes(4), "lanes")
    assert re.findall(r"^module (\w+)", text, re.MULTILINE) == ["bit_part", "lane_part", "lanes"]
    assert len(re.findall(r"^\s+lane_part \\?lane_\d", text, re.MULTILINE)) == 4


def test_lanes_grow_by_their_instances():
    """A lane more is an instance more: the lines of the lane itself are there once."""
    lines = [emit(Lanes(count), "lanes").count("\n") for count in (2, 3, 4)]
    assert lines[2] - lines[1] == lines[1] - lines[0]
    inside = emit(Lane(2), "lane").count("\n")
    assert lines[1] - lines[0] < inside / 2


def test_ports_reach_their_part():
    """Verilator finds every port of every instance connected by its own name and width."""
    warnings = verilator.lint({"lanes.v": emit(Lanes(2), "lanes")}, "lanes")
    assert not [line for line in warnings if line.split(":")[0] in {
        "PINMISSING", "PINNOTFOUND", "WIDTHEXPAND", "WIDTHTRUNC", "UNDRIVEN"}], warnings


def test_one_name_for_two_parts():
    class Mixed(wiring.Component):
        o: Out(1)

        def __init__(self):
            self.parts = {"lane_part": Lane(2), "bit_part": Lane(3)}
            super().__init__()

        def elaborate(self, platform):
            m = Module()
            m.d.comb += self.o.eq(Signal())
            return m

    with pytest.raises(
            ValueError, match=r"^part 'bit_part' must be one component, not two with other ports$"):
        collect(Mixed())
