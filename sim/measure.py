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
from sim import simulate
from sim.progress import task
from sim.sampling import layer_calls, select_layers

__all__ = ["PRESETS", "EVALUATION", "measure", "measure_table"]

PRESETS = ("small", "small-dense")
EVALUATION = 17   # the one whose layers are run, in the middle of 35


def measure(source, *, names=PRESETS, evaluation=EVALUATION, layers="*"):
    """Dictionary of measurements, by preset.

    Simulators are built anew, in a folder of their own: the first one compiles Verilator's runtime
    library too.

    Parameters
    ----------
    source : name of a shipped model, or path of a quantized one
    names : of presets, the first of which decides V
    evaluation, layers : what is run
    """
    model = quantize.load(source)
    chosen = select_layers(layers, model)
    with task("activations"):
        calls = list(layer_calls(model, presets.load(names[0]), [evaluation], chosen))
    found = {}
    with tempfile.TemporaryDirectory(prefix="sqdm-measure-") as folder:
        for name in names:
            config = presets.load(name)
            with task(f"Verilog of {name}"):
                began = time.monotonic()
                text, _ = verilog.generate(config)
                seconds = time.monotonic() - began
            with task(f"layers on {name}", len(calls)) as advance:
                report = simulate.simulate(calls, config, verilog=text, cache_dir=Path(folder),
                                           progress=advance)
            totals = report.as_dict()
            found[name] = {
                "multipliers": config.multipliers,
                "verilog_seconds": round(seconds, 1),
                "verilog_lines": text.count("\n"),
                "build_seconds": round(report.build_seconds, 1),
                "cycles": report.total("convolve", "total_cycles"),
                **{key: totals[key] for key in (
                    "compute_cycles", "requantize_cycles", "cycles_per_second",
                    "elements_compared", "elements_different")},
            }
    return {"model": str(source), "evaluation": evaluation, "layers": chosen,
            "processors": os.cpu_count(), "machine": platform.machine(), "presets": found}


def measure_table(results):
    """Table of a result of `measure`, a column for each preset, for rich."""
    table = Table("", *results["presets"])
    for column in table.columns[1:]:
        column.justify = "right"
    columns = list(results["presets"].values())
    for key in columns[0]:
        table.add_row(key.replace("_", " "), *(f"{column[key]:,}" for column in columns))
    return table
