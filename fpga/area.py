"""Area of a component: on ECP5, and in the standard cells of liberty files.

``python -m fpga.area --preset small --component sparse-pe --out area.json`` measures on ECP5;
every ``--liberty NAME=FILE[,FILE...]`` adds a library. Numbers are yosys's, before placement.
``--component array`` measures the PEs of the preset, of its all-dense twin and of an all-sparse
array of the same multipliers, for ``sqdm bench --areas``.
"""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hw.carry import CarryCells
from hw.config import PRESETS, load
from hw.verilog import emit

from .build import SMALL_PRODUCTS, run_tool

__all__ = ["COMPONENTS", "arrays", "cells", "create", "ecp5", "measure", "memories", "shipped"]

NAME = "top"

SRAM_DEPTH = 17
"""Words from which a memory counts as SRAM; smaller ones are flip-flops in standard cells."""

LUTS = {"LUT4": 1, "CCU2C": 2, "TRELLIS_DPR16X4": 6}
"""LUTs that a cell of ECP5 takes: LUT RAM also takes those that it keeps others from using."""

EXCHANGE = {"lut": 1, "ebr": 402, "dsp": 536}
"""LUTs for which a block RAM or a multiplier block stands: what an LFE5U-85F has of each."""

SRAM_UM2 = {"ihp": 5.7, "asap7": 0.06}
"""Area of a bit by library: IHP's macro of 256 x 64; ASAP7 has none here, so an assumption."""

COMPONENTS = {
    "core": "hw.core.Core",
    "dense-pe": "hw.dense_pe.DensePE",
    "sparse-pe": "hw.sparse_pe.SparsePE",
    "dense-group": "hw.lanes.DenseGroup",
    "sparse-group": "hw.lanes.SparseGroup",
    "dense-scale-unit": "hw.scale_unit.ScaleUnit",
    "sparse-scale-unit": "hw.scale_unit.ScaleUnit",
    "loader": "hw.loader.Loader",
    "requantizer": "hw.requantizer.Requantizer",
    "post-processor": "hw.post_processor.PostProcessor",
}
"""Components by name; a group is the lanes of one scale unit, with it."""


def create(config, component):
    """A component of `COMPONENTS`.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if component not in COMPONENTS:
        raise ValueError(f"component must be one of {', '.join(COMPONENTS)}, not {component!r}")
    module, name = COMPONENTS[component].rsplit(".", 1)
    kind = getattr(__import__(module, fromlist=[name]), name)
    if component.endswith(("group", "unit")):
        side = component.split("-")[0]
        return kind(config, getattr(config, f"{side}_steps"))
    return kind(config)


def run(folder, script):
    """Run yosys on ``script`` in ``folder``."""
    (folder / "script.ys").write_text(script)
    run_tool("synthesis", ["yosys", "-q", "script.ys"], folder, folder / "yosys.log",
             lambda *_, **__: None)


def read_counts(path):
    """Cells by type, of the whole hierarchy, and the result of ``stat`` itself."""
    design = json.loads(path.read_text())["design"]
    counts = {}
    for kind, count in design["num_cells_by_type"].items():
        counts[kind] = count["count"] if isinstance(count, dict) else count
    return counts, design


def ecp5(text, folder, *, flatten=True):
    """What the Verilog ``text`` of module `NAME` takes on ECP5.

    Returns
    -------
    dict
        ``lut4``, ``ccu2c``, ``dpr16x4``, ``ff``, ``dsp``, ``ebr``, and ``lut``: all LUTs.
    """
    (folder / "top.v").write_text(text)
    options = "" if flatten else "-noflatten"
    run(folder, f"""
read_verilog -sv top.v
{SMALL_PRODUCTS}
synth_ecp5 -nowidelut {options} -top {NAME}
tee -q -o stat.json stat -json -top {NAME}
""")
    counts, _ = read_counts(folder / "stat.json")
    names = {"lut4": "LUT4", "ccu2c": "CCU2C", "dpr16x4": "TRELLIS_DPR16X4", "ff": "TRELLIS_FF",
             "dsp": "MULT18X18D", "ebr": "DP16KD"}
    result = {key: counts.get(cell, 0) for key, cell in names.items()}
    return result | {"lut": sum(weight * counts.get(cell, 0) for cell, weight in LUTS.items())}


def memories(text, folder):
    """Memories of module `NAME` that count as SRAM, as dictionaries with ``depth``, ``width``."""
    (folder / "top.v").write_text(text)
    run(folder, f"read_verilog -sv top.v\nhierarchy -top {NAME}\nproc\nflatten\nopt_clean\n"
        "memory_collect\nselect t:$mem_v2\nwrite_json -selected memories.json\n")
    modules = json.loads((folder / "memories.json").read_text())["modules"]
    found = []
    for module in modules.values():
        for name, cell in module["cells"].items():
            depth, width = (int(cell["parameters"][key], 2) for key in ("SIZE", "WIDTH"))
            if cell["type"] == "$mem_v2" and depth >= SRAM_DEPTH:
                found.append({"name": name, "depth": depth, "width": width})
    return found


def cells(text, folder, libraries):
    """Area in standard cells, memories that count as SRAM left out.

    Modules keep their borders, so a part that appears many times is mapped once.

    Parameters
    ----------
    libraries : list of path
        Liberty files of one library; may be compressed by gzip.

    Returns
    -------
    dict
        ``um2``: of all cells; ``sequential_um2``: of flip-flops; ``cells``: how many.
    """
    (folder / "top.v").write_text(text)
    names = []
    for number, path in enumerate(map(Path, libraries)):
        data = path.read_bytes()
        names.append(f"library_{number}.lib")
        (folder / names[-1]).write_bytes(
            gzip.decompress(data) if path.suffix == ".gz" else data)
    options = " ".join(f"-liberty {name}" for name in names)
    run(folder, f"""
read_verilog -sv top.v
synth -booth -run begin:fine -top {NAME}
memory_map t:$mem_v2 r:SIZE<{SRAM_DEPTH} %i
opt -undriven -fine
simplemap
techmap
opt -fast
dfflibmap {options}
abc {options}
opt_clean
tee -q -o stat.json stat -json {options} -top {NAME}
""")
    counts, design = read_counts(folder / "stat.json")
    return {"um2": round(design["area"], 1),
            "sequential_um2": round(design["sequential_area"], 1),
            "cells": sum(count for kind, count in counts.items() if kind != "$mem_v2")}


def measure(config, component, libraries, *, flatten=True):
    """Areas of a component of `COMPONENTS` as a dictionary for JSON.

    Parameters
    ----------
    libraries : dict of str to list of path
        Liberty files by a name for their library.
    """
    plain, carried = (emit(create(config, component), NAME, platform)
                      for platform in (None, CarryCells()))
    with tempfile.TemporaryDirectory(prefix="sqdm-area-") as name:
        folder = Path(name)
        store = memories(plain, folder)
        return {
            "preset": config.name, "component": component,
            "ecp5": ecp5(carried, folder, flatten=flatten),
            "cells": {name: cells(plain, folder, paths) for name, paths in libraries.items()},
            "sram_bits": sum(one["depth"] * one["width"] for one in store), "sram": store}


def arrays(config, libraries):
    """Areas of all PEs together, by array.

    The arrays are that of ``config``, an all-sparse one with as many multipliers and the preset
    whose name ends with "-dense". An array has ``ecp5``: LUTs with block RAMs and multiplier blocks
    by `EXCHANGE`; a library's name: um2 with SRAM by `SRAM_UM2`, if that is known; ``ecp5_lut`` and
    "<library>_logic" without them; ``config``, ``pes`` and ``parts``: what was counted.

    Raises
    ------
    ValueError
        If there is no all-dense preset of as many multipliers, or no number of sparse PEs has them.
    """
    dense = PRESETS.get(f"{config.name}-dense")
    one = config.sparse_lanes * config.sparse_rate
    if dense is None or dense.multipliers != config.multipliers or config.multipliers % one:
        raise ValueError(f"preset must be a hybrid with an all-dense twin, not {config.name!r}")
    parts = {name: measure(core, component, libraries) for name, core, component in (
        ("dense", config, "dense-pe"), ("sparse", config, "sparse-pe"),
        ("all dense", dense, "dense-pe"))}
    found = {}
    for name, pes in (
            (config.name, {"dense": config.dense_pes, "sparse": config.sparse_pes}),
            (dense.name, {"all dense": dense.dense_pes}),
            (f"{config.name}-sparse", {"sparse": config.multipliers // one})):
        def total(value, pes=pes):
            return sum(count * value(parts[part]) for part, count in pes.items())

        areas = {
            "ecp5": total(lambda part: sum(
                luts * part["ecp5"][kind] for kind, luts in EXCHANGE.items())),
            "ecp5_lut": total(lambda part: part["ecp5"]["lut"])}
        for library in libraries:
            logic = total(lambda part, library=library: part["cells"][library]["um2"])
            if library in SRAM_UM2:
                areas[library] = round(
                    logic + SRAM_UM2[library] * total(lambda part: part["sram_bits"]))
            areas[f"{library}_logic"] = round(logic)
        found[name] = areas | {"pes": pes, "config": (
            dense if name == dense.name else config).as_dict()}
    return found | {"parts": {
        name: {key: value for key, value in part.items() if key != "sram"}
        for name, part in parts.items()}}


def shipped(config):
    """Path of the areas that come with sqdm, if they are those of ``config``, or None."""
    path = Path(__file__).parent / "areas.json"
    found = json.loads(path.read_text(encoding="utf-8")).get(config.name)
    return path if found and found["config"] == config.as_dict() else None


def main(preset: str = "small", component: str = "core",
         liberty: Annotated[list[str] | None, typer.Option()] = None, flatten: bool = True,
         out: Path = Path("area.json")):
    """Measure a component and add the result to a JSON file, a list; or write that of arrays."""
    libraries = {}
    for entry in liberty or []:
        name, _, paths = entry.partition("=")
        libraries[name] = paths.split(",")
    if component == "array":
        out.write_text(json.dumps(arrays(load(preset), libraries), indent=1) + "\n")
        return
    result = measure(load(preset), component, libraries, flatten=flatten)
    results = json.loads(out.read_text()) if out.exists() else []
    out.write_text(json.dumps([*results, result], indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "sram"}))


if __name__ == "__main__":
    typer.run(main)
