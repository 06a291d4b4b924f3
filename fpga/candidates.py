"""Areas of the candidates in hw/candidates, and of the parts that the design shares with them.

``python -m fpga.candidates --liberty ihp=FILE --liberty asap7=FILE,FILE --out areas.json`` measures
all of them as `fpga.area` does, the organization of an earlier commit included.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer
from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.candidates.lanes import DenseLanes, SparseLanes, WordMultiplexer
from hw.candidates.scale_operation import FORMATS, ScaleOperation
from hw.candidates.walker import PairWalker
from hw.carry import CarryCells
from hw.compactor import Compactor
from hw.config import MEDIUM
from hw.lanes import DenseGroup, SparseGroup
from hw.scale_unit import ScaleUnit
from hw.verilog import emit

from .area import LUTS, NAME, cells, read_counts, run
from .area import measure as measure_component
from .build import SMALL_PRODUCTS

__all__ = ["CONTROL", "EARLIER", "PREVIOUS", "UNITS", "control", "earlier", "measure"]


class CompactorPorts(wiring.Component):
    """A compactor whose streams end in ports, its ``ready`` that is constant left out."""

    def __init__(self):
        self.compactor = Compactor(MEDIUM, 8)
        entries = self.compactor.o.payload.shape()
        super().__init__({
            "i": In(self.compactor.i.signature.flip()),
            "valid": Out(1), "payload": Out(entries),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.compactor = compactor = self.compactor
        wiring.connect(m, wiring.flipped(self.i), compactor.i)
        m.d.comb += [self.valid.eq(compactor.o.valid), self.payload.eq(compactor.o.payload)]
        return m


LANES = 4
"""Of the sparse units: enough to spread what they share."""

UNITS = {
    **{f"sparse lanes, {rate} a cycle": (lambda rate=rate: SparseLanes(LANES, rate), LANES * rate)
       for rate in (1, 2, 4)},
    **{f"word multiplexer, {rate} a cycle":
       (lambda rate=rate: WordMultiplexer(LANES, rate), LANES * rate) for rate in (2, 4)},
    "dense lane": (lambda: DenseLanes(1), 16),
    "dense lane, 2 pixels": (lambda: DenseLanes(1, 2), 32),
    "dense lane, half rate": (lambda: DenseLanes(1, half_rate=True), 16),
    **{f"scale unit, {lanes} lanes": (lambda lanes=lanes: ScaleUnit(MEDIUM, lanes), 0)
       for lanes in (1, 2, 4, 8, 16)},
    "pair walker": (PairWalker, 0),
    "compactor": (CompactorPorts, 0),
    **{f"scale operation, {scales}": (lambda scales=scales: ScaleOperation(scales), 0)
       for scales in FORMATS},
    "chosen sparse group": (lambda: SparseGroup(MEDIUM, 2), 8),
    "chosen dense group": (lambda: DenseGroup(MEDIUM, 1), 16),
}
"""By name: how to make the unit, and its multipliers."""

PREVIOUS = "dd8881f"
"""The last commit with products by ``*`` and a walker in each sparse PE."""

EARLIER = {
    "earlier sparse group": ("from hw.sparse_pe import SparseGroup as part; arguments = (8,)", 8),
    "earlier dense group": ("from hw.dense_pe import DenseGroup as part; arguments = (1,)", 16),
    "earlier scale unit, 8 lanes":
        ("from hw.scale_unit import ScaleUnit as part; arguments = (8,)", 0),
    "earlier walker": ("from hw.walker import NonzeroWalker as part; arguments = ()", 0),
}
"""By name: Python that names a class and its arguments after the preset, and its multipliers."""


def earlier(commit, code):
    """Verilog of a part as it was at ``commit``, for that commit's preset ``small``."""
    archive = subprocess.run(["git", "archive", commit, "hw"], check=True, capture_output=True)
    with tempfile.TemporaryDirectory(prefix="sqdm-earlier-") as folder:
        with tarfile.open(fileobj=BytesIO(archive.stdout)) as tree:
            tree.extractall(folder, filter="data")
        script = (f"{code}\nfrom hw.config import SMALL\nfrom hw.verilog import emit\n"
                  f"print(emit(part(SMALL, *arguments), {NAME!r}))")
        return subprocess.run([sys.executable, "-c", script], cwd=folder, check=True,
                              capture_output=True, text=True).stdout

CONTROL = ("sparse control", "dense control")
"""What a PE of the design has besides its groups."""


def ecp5(text, folder):
    """LUTs, DSPs and flip-flops on ECP5; by abc, as abc9 ends on lanes that are all carry cells."""
    (folder / "top.v").write_text(text)
    run(folder, f"""
read_verilog -sv top.v
{SMALL_PRODUCTS}
synth_ecp5 -nowidelut -top {NAME} -run begin:map_luts
abc -lut 4
opt_lut_ins -tech lattice
opt_clean
tee -q -o stat.json stat -json -top {NAME}
""")
    counts, _ = read_counts(folder / "stat.json")
    counts["LUT4"] = counts.pop("$lut", 0)
    return {"lut": sum(weight * counts.get(cell, 0) for cell, weight in LUTS.items()),
            "dsp": counts.get("MULT18X18D", 0), "ff": counts.get("TRELLIS_FF", 0)}


def measure(plain, carried, libraries, multipliers):
    """Areas of the Verilog texts ``plain`` (in cells) and ``carried`` (on ECP5) as a dictionary."""
    with tempfile.TemporaryDirectory(prefix="sqdm-area-") as name:
        folder = Path(name)
        return {"multipliers": multipliers, "ecp5": ecp5(carried, folder),
                "cells": {name: cells(plain, folder, paths) for name, paths in libraries.items()}}


def control(side, libraries):
    """Areas of what a PE of the design has besides its groups and its memories.

    That in cells is estimated: the LUTs, at the group's area a LUT. Mapping whole PEs takes long.
    """
    pe = measure_component(MEDIUM, f"{side}-pe", {})["ecp5"]
    group = measure_component(MEDIUM, f"{side}-group", libraries)
    groups = getattr(MEDIUM, f"{side}_scale_units")
    logic = {key: pe[key] - groups * group["ecp5"][key] for key in ("lut", "dsp", "ff")}
    share = logic["lut"] / group["ecp5"]["lut"]
    return {"multipliers": 0, "ecp5": logic,
            "cells": {name: {"um2": round(share * area["um2"], 1)}
                      for name, area in group["cells"].items()}}


def main(liberty: Annotated[list[str] | None, typer.Option()] = None, only: str = "",
         previous: str = PREVIOUS, out: Path = Path("areas.json")):
    """Measure what ``out`` does not have yet, of the units whose names contain ``only``."""
    libraries = {}
    for entry in liberty or []:
        name, _, paths = entry.partition("=")
        libraries[name] = paths.split(",")
    results = json.loads(out.read_text()) if out.exists() else {}
    for name in [*UNITS, *EARLIER, *CONTROL]:
        if name in results or only not in name:
            continue
        if name in CONTROL:
            results[name] = control(name.split()[0], libraries)
        elif name in UNITS:
            make, multipliers = UNITS[name]
            plain, carried = (emit(make(), NAME, platform) for platform in (None, CarryCells()))
        else:
            code, multipliers = EARLIER[name]
            plain = carried = earlier(previous, code)
        if name not in results:
            results[name] = measure(plain, carried, libraries, multipliers)
        out.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name]), flush=True)


if __name__ == "__main__":
    typer.run(main)
