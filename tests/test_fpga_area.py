"""Areas of small components, counted against what is known of them."""

import gzip
import json
from dataclasses import replace

import pytest
from amaranth import Module, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from fpga import area
from fpga.build import FlowError
from hw.config import MEDIUM, MEDIUM_DENSE, TINY
from hw.verilog import emit

LIBRARY = """
library(few) {
  cell(INV) { area: 2; pin(A) { direction: input; }
    pin(Y) { direction: output; function: "!A"; } }
  cell(NAND2) { area: 3; pin(A) { direction: input; } pin(B) { direction: input; }
    pin(Y) { direction: output; function: "!(A & B)"; } }
  cell(NOR2) { area: 3; pin(A) { direction: input; } pin(B) { direction: input; }
    pin(Y) { direction: output; function: "!(A | B)"; } }
  cell(BUF) { area: 4; pin(A) { direction: input; }
    pin(Y) { direction: output; function: "A"; } }
"""
FLIP_FLOPS = """
library(more) {
  cell(DFF) { area: 10; ff(IQ, IQN) { clocked_on: "C"; next_state: "D"; }
    pin(C) { direction: input; clock: true; } pin(D) { direction: input; }
    pin(Q) { direction: output; function: "IQ"; } }
"""


class Example(wiring.Component):
    """Five inverted registers, two memories of 24 x 8 and one of 4 x 8 bits."""

    a: In(5)
    o: Out(5)
    data: Out(24)

    def elaborate(self, platform):
        m = Module()
        held = Signal(5)
        m.d.sync += held.eq(self.a)
        m.d.comb += self.o.eq(~held)
        for number, depth in enumerate((24, 24, 4)):
            m.submodules[f"store_{number}"] = store = memory.Memory(shape=8, depth=depth, init=[])
            write, read = store.write_port(), store.read_port()
            m.d.comb += [
                write.addr.eq(self.a), write.data.eq(Signal.like(write.data, init=3)),
                write.en.eq(1), read.addr.eq(self.a),
                self.data[8 * number:8 * number + 8].eq(read.data)]
        return m


def test_memories(tmp_path):
    found = area.memories(emit(Example(), "top"), tmp_path)
    assert sorted((one["depth"], one["width"]) for one in found) == [(24, 8), (24, 8)]


class Inverted(wiring.Component):
    """Five registers and as many inverters."""

    a: In(5)
    o: Out(5)

    def elaborate(self, platform):
        m = Module()
        held = Signal(5, reset_less=True)
        m.d.sync += held.eq(self.a)
        m.d.comb += self.o.eq(~held)
        return m


def test_cells(tmp_path):
    """A library of two files, one of them compressed."""
    few, more = tmp_path / "few.lib", tmp_path / "more.lib.gz"
    few.write_text(LIBRARY + "}\n")
    more.write_bytes(gzip.compress((FLIP_FLOPS + "}\n").encode()))
    result = area.cells(emit(Inverted(), "top"), tmp_path, [few, more])
    assert result == {"um2": 60, "sequential_um2": 50, "cells": 10}


def test_a_library_without_flip_flops(tmp_path):
    few = tmp_path / "few.lib"
    few.write_text(LIBRARY + "}\n")
    with pytest.raises(FlowError, match=r"^synthesis: .*: D flip-flops are not supported"):
        area.cells(emit(Inverted(), "top"), tmp_path, [few])


def test_ecp5_and_the_file(tmp_path, capsys):
    """One scale unit: a multiplier block, carry cells, no memory; results are a list."""
    out = tmp_path / "area.json"
    area.main("tiny", "dense-scale-unit", None, out=out)
    area.main("tiny", "dense-scale-unit", [], out=out)
    first, second = json.loads(out.read_text())
    assert first == second == json.loads(capsys.readouterr().out.splitlines()[0]) | {"sram": []}
    used = first["ecp5"]
    assert used["dsp"] == 1 and used["ebr"] == used["dpr16x4"] == 0
    assert used["lut"] == used["lut4"] + 2 * used["ccu2c"] < 220
    assert used["ccu2c"] >= 27 and used["ff"] < 230


def test_unknown_component():
    with pytest.raises(ValueError, match=r"^component must be one of core, .*, not 'pe'$"):
        area.create(TINY, "pe")


def test_areas_of_arrays(monkeypatch):
    """The PEs of all three arrays, with what stands for a block RAM, a block of DSP and a bit."""
    areas = {"dense-pe": (10, 1, 2, 5.0, 100), "sparse-pe": (20, 3, 4, 7.0, 200)}

    def measure(config, component, libraries):
        lut, ebr, dsp, um2, bits = areas[component]
        scale = config.dense_lanes // 8 if component == "dense-pe" else 1
        return {"ecp5": {"lut": scale * lut, "ebr": ebr, "dsp": dsp}, "sram_bits": bits,
                "cells": {name: {"um2": um2} for name in libraries}, "sram": []}

    monkeypatch.setattr(area, "measure", measure)
    found = area.arrays(MEDIUM, {"ihp": [], "other": []})
    assert found["medium"]["ecp5_lut"] == 10 + 3 * 20
    assert found["medium"]["ecp5"] == 70 + 402 * (1 + 3 * 3) + 536 * (2 + 3 * 4)
    assert found["medium"]["ihp_logic"] == found["medium"]["other_logic"] == 5 + 3 * 7
    assert found["medium"]["ihp"] == 26 + 5.7 * 700 and "other" not in found["medium"]
    assert found["medium-sparse"]["ecp5_lut"] == 80
    assert found["medium-dense"]["ecp5_lut"] == 40
    assert "sram" not in found["parts"]["sparse"]
    with pytest.raises(ValueError, match="^preset must be a hybrid with an all-dense twin, not"):
        area.arrays(TINY, {})


def test_shipped_areas_are_those_of_the_presets():
    """Or they would be measured again: ``python -m fpga.area --component array``."""
    found = json.loads(area.shipped(MEDIUM).read_text())
    assert found["medium-dense"]["config"] == MEDIUM_DENSE.as_dict()
    assert area.shipped(TINY) is None
    assert area.shipped(replace(MEDIUM, result_depth=64)) is None
