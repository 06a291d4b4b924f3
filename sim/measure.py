"""The tools measured: seconds of Verilog and simulators, simulation speed, cycles of presets."""

import os
import platform
import tempfile
import time
from pathlib import Path

from rich.table import Table

from golden import quantize
from hw import config as presets
from hw import verilog
from sim import demo, simulate
from sim.progress import task
from sim.sampling import layer_calls, plans, select_layers
from sim.tiler import adjusted

__all__ = ["PRESETS", "EVALUATION", "measure", "measure_table"]

PRESETS = ("small", "small-dense")
EVALUATION = 17   # the one whose layers are run, in the middle of 35


def measure(source, *, names=PRESETS, evaluation=EVALUATION, layers="*"):
    """Dictionary of measurements; ``presets`` has a part for each preset.

    Simulators are built anew, in a folder of their own: the first one compiles Verilator's runtime
    library too. Speed is that of the layer with the most MACs alone, and of all layers while the
    golden model runs beside them. Processor time leaves out what other programs took.

    Parameters
    ----------
    source : name of a shipped model, or path of a quantized one
    names : of presets, all of the same V
    evaluation, layers : what is run
    """
    model = quantize.load_executable(source)
    chosen = select_layers(layers, model)
    with task("activations"):
        made = list(layer_calls(model, presets.load(names[0]), [evaluation], chosen))
    found = {}
    with tempfile.TemporaryDirectory(prefix="sqdm-measure-") as folder:
        for name in names:
            config = presets.load(name)
            tiling = plans(model, config, chosen)
            calls = [(adjusted(call, tiling[call.name]), counts) for call, counts in made]
            largest = max(calls, key=lambda item: model.layers[item[0].name].macs)
            with task(f"Verilog of {name}"):
                began = time.monotonic()
                text, _ = verilog.generate(config)
                seconds = time.monotonic() - began
            with task(f"simulator of {name}, {largest[0].name}"):
                alone = simulate.simulate([largest], config, plans=tiling, verilog=text,
                                          cache_dir=Path(folder))
            with task(f"layers on {name}", len(calls)) as advance:
                report = simulate.simulate(calls, config, plans=tiling, verilog=text,
                                           cache_dir=Path(folder), progress=advance)
            totals = report.as_dict()
            found[name] = {
                "multipliers": config.multipliers,
                "verilog_seconds": round(seconds, 1),
                "verilog_lines": text.count("\n"),
                "build_seconds": round(alone.build_seconds, 1),
                **{key: alone.as_dict()[key] for key in (
                    "cycles_per_second", "cycles_per_processor_second")},
                "cycles_per_second_all": totals["cycles_per_second"],
                "elements_compared": totals["elements_compared"],
                "elements_different": totals["elements_different"],
                "mismatch": totals["mismatch"],
                "cycles_by_format": demo.cycles_by_format(report),
            }
    return {"model": str(source), "evaluation": evaluation, "layers": chosen,
            "largest_layer": largest[0].name, "processors": os.cpu_count(),
            "machine": platform.machine(), "presets": found}


def measure_table(results):
    """Table of a result of `measure`, a column for each preset, for rich."""
    columns = results["presets"]
    table = Table(title="Tools, on this machine")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for text, key in (
            ("4-bit multipliers", "multipliers"), ("Verilog, seconds", "verilog_seconds"),
            ("Verilog, lines", "verilog_lines"), ("simulator build, seconds", "build_seconds"),
            (f"cycles simulated a second, {results['largest_layer']}", "cycles_per_second"),
            ("the same, a second of the simulator's processor time", "cycles_per_processor_second"),
            ("cycles simulated a second, all layers", "cycles_per_second_all"),
            ("elements compared", "elements_compared"), ("different", "elements_different")):
        table.add_row(text, *(f"{column[key]:,}" for column in columns.values()))
    return table
