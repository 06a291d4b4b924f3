"""The demo: images from a quantized model, and a part of its layers on the RTL, bit for bit."""

import collections
import itertools
import json
import statistics
import time

from rich.table import Table

from golden import quantize
from golden.checkpoint import replace_file
from golden.sampler import draw_noise, evaluations, sample
from hw import config as presets
from hw import verilog
from sim import pictures, simulate
from sim.progress import task
from sim.sampling import layer_calls, select_layers

__all__ = ["IMAGES", "EVALUATIONS", "compare_images", "run_layers", "layer_table", "demo"]

IMAGES = 8
EVALUATIONS = (0, 17, 34)   # the first, one in the middle and the last of 35


def compare_images(model, noise):
    """Float images, quantized images from the same noise, and the SQNR of every evaluation in dB.

    The SQNR is that of the quantized denoiser at the states of the float run.
    """
    ratios = []

    def denoise(x, sigma):
        right = model.float_model(x, sigma)
        ratios.append(quantize.sqnr(right, model(x, sigma)))
        return right

    total = len(evaluations(model.steps))
    with task("sampling in float, and the quantization's error", total) as advance:
        floats = sample(denoise, noise, model.steps, advance)
    with task("sampling quantized", total) as advance:
        quantized = sample(model, noise, model.steps, advance)
    return floats, quantized, ratios


def run_layers(calls, config, *, total, text=None, waves=None):
    """`sim.simulate.simulate` of the layer calls of an iterable, with progress.

    `total` is their number; `text` is the core's Verilog, where it is there already.
    """
    calls = iter(calls)
    with task("activations of the first evaluation"):
        first = next(calls)   # whether all layers fit shows before the simulator is built
    if text is None:
        with task(f"Verilog of {config.name}"):
            text, _ = verilog.generate(config)
    with task(f"simulator of {config.name}"):
        simulate.build(config, verilog=text, waves=waves is not None)
    with task(f"layers on {config.name}", total) as advance:
        return simulate.simulate(itertools.chain([first], calls), config, verilog=text,
                                 waves=waves, progress=advance)


def layer_table(report):
    """Table of a report, a row for each layer, for rich."""
    table = Table("layer", "format", "evaluations", "elements", "different", "cycles", "dense busy",
                  "sparse busy", "stalled")
    for column in table.columns[2:]:
        column.justify = "right"
    rows = collections.defaultdict(list)
    for record in report.records:
        rows[record.layer].append(record)
    for name, records in [*rows.items(), ("all", report.records)]:
        cycles = sum(record.convolve.get("total_cycles", 0) for record in records)
        shares = [sum(record.convolve.get(key, 0) for record in records) / max(1, cycles)
                  for key in ("dense_busy", "sparse_busy", "stall_cycles")]
        table.add_row(
            name, "" if name == "all" else records[0].format,
            str(len({record.evaluation for record in records})),
            f"{sum(record.elements_compared for record in records):,}",
            f"{sum(record.elements_different for record in records):,}",
            f"{cycles:,}", *(f"{share:.0%}" for share in shares),
            end_section=name == list(rows)[-1])
    return table


def demo(source, out, *, preset="small", yardstick="small-dense", images=IMAGES,
         wanted=EVALUATIONS, layers="*", seed=0):
    """Run the demo; returns what ``report.json`` says, and the report of the layers.

    Leaves in the folder `out` the Verilog, ``samples.png``, ``sparsity.png`` and ``report.json``.

    Parameters
    ----------
    source : name of a shipped model, or path of a quantized one
    preset, yardstick : of the core, and of the all-dense core to compare cycles with
    images : to sample
    wanted, layers : evaluations and globs of layers to run on the RTL
    """
    began = time.monotonic()
    model = quantize.load(source)
    config, dense = presets.load(preset), presets.load(yardstick)
    names = select_layers(layers, model)
    with task(f"Verilog of {config.name}"):
        text, description = verilog.generate(config)
    write(out / f"{verilog.MODULE}.v", text)
    write(out / f"{verilog.MODULE}.json", json.dumps(description, indent=2) + "\n")

    floats, quantized, ratios = compare_images(
        model, draw_noise(images, model.architecture, seed))
    pictures.samples(out / "samples.png", {"float": floats, "quantized": quantized})
    pictures.sparsity(out / "sparsity.png", model)

    total = len(wanted) * len(names)
    calls = []

    def kept():
        for call in layer_calls(model, config, wanted, names, seed=seed):
            calls.append(call)
            yield call

    reports = {config.name: run_layers(kept(), config, total=total, text=text)}
    if reports[config.name].mismatch is None:
        reports[dense.name] = run_layers(calls, dense, total=total)
    results = {
        "model": str(source),
        "preset": config.name,
        "zero_fraction": round(quantize.zero_fraction(model), 4),
        "sqnr_db": round(statistics.fmean(ratios), 2),
        "sqnr_db_of_evaluations": [round(ratio, 2) for ratio in ratios],
        "evaluations": list(wanted),
        "layers": names,
        "elements_compared": sum(report.compared.total() for report in reports.values()),
        "elements_different": sum(report.different.total() for report in reports.values()),
        "cycles": reports[config.name].total("convolve", "total_cycles"),
        "cycles_dense": (reports[dense.name].total("convolve", "total_cycles")
                         if dense.name in reports else None),
        "seconds": round(time.monotonic() - began, 1),
        "simulations": {name: report.as_dict() for name, report in reports.items()},
    }
    write(out / "report.json", json.dumps(results, indent=2) + "\n")
    return results, reports


def write(path, text):
    """Write a text, whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
