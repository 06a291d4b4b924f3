"""The demo: images from a quantized model, and a part of its layers on the RTL, bit for bit."""

import collections
import itertools
import time

from rich.table import Table

from golden import pictures, quality, quantize, trace
from golden.checkpoint import write_json, write_text
from golden.sampler import Sampler, draw_noise, evaluations
from hw import config as presets
from hw import verilog
from sim import simulate
from sim.progress import task
from sim.sampling import layer_calls, plans, select_layers, thresholds_for
from sim.tiler import adjusted

__all__ = ["IMAGES", "EVALUATIONS", "draw_samples", "run_layers",
           "layer_table", "cycles_by_format", "cycles_table", "demo"]

IMAGES = 8
EVALUATIONS = (0, 17, 34)   # the first, one in the middle and the last of 35
PRODUCTS = {"A4U": 1, "A4S": 1, "MX8": 4, "IN16": 8}   # 4-bit products in a MAC
FORMATS = {"A4U": "W4A4", "A4S": "W4A4", "MX8": "MXINT8", "IN16": "MXINT8"}


def draw_samples(model, source, path, count, seed=0, steps=None, **options):
    """Draw `count` images as a PNG file, float above quantized; returns facts and the noise.

    ``sqnr_db`` is that of all images, ``sqnr_db_of_evaluations`` that of the denoiser. `options`
    are those of `golden.sampler.Sampler`.
    """
    steps = steps or model.steps
    sampler = Sampler.for_model(model, **options)
    noise = draw_noise(count, model.architecture, seed)
    total = 2 * len(evaluations(steps, sampler))
    with simulate.one_thread(), task("sampling, float and quantized", total) as advance:
        floats, quantized, ratios = quality.compare(model, noise, steps, advance, sampler=sampler,
                                                    seed=seed)
    name = str(source).rpartition("/")[2].removesuffix(".safetensors")
    pictures.samples(path, {"float": floats, "quantized": quantized},
                     f"{name}: {count} images, seed {seed}, {steps} {sampler.solver.title()} steps")
    return {"model": str(source), "images": count, "seed": seed, "steps": steps,
            "solver": sampler.solver, "churn": sampler.churn,
            "sqnr_db": round(quantize.sqnr(floats, quantized), 2),
            "sqnr_db_of_evaluations": [round(ratio, 2) for ratio in ratios]}, noise


def run_layers(calls, config, *, total, plans=None, text=None, waves=None):
    """`sim.simulate.simulate` of the layer calls of an iterable, with progress.

    `total` is their number; `plans` are by layer; `text` is the core's Verilog, where it is there
    already.
    """
    calls = iter(calls)
    with task("activations of the first evaluation"), simulate.one_thread():
        first = next(calls)   # whether all layers fit shows before the simulator is built
    if text is None:
        with task(f"Verilog of {config.name}"):
            text, _ = verilog.generate(config)
    with task(f"simulator of {config.name}"):
        simulate.build(config, verilog=text, waves=waves is not None)
    with task(f"layers on {config.name}", total) as advance:
        return simulate.simulate(itertools.chain([first], calls), config, plans=plans,
                                 verilog=text, waves=waves, progress=advance)


def layer_table(report, config):
    """Table of a report, a row for each layer, for rich.

    Zeros and channels by side are means over the evaluations, the rest are sums; both sides take
    some channels, at different pixels. Use is the 4-bit products of all useful MACs over
    multipliers and compute cycles: above 100 % where zeros are skipped.
    """
    table = Table(title=f"Layers on {config.name}: cycles of both passes, what was compared",
                  box=None, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("layer", "format", "size"):
        table.add_column(name, no_wrap=True)
    for name in ("channels", "zeros", "dense+both\n+sparse", "requan-\ntize", "con-\nvolve",
                 "of it\ncompute", "use", "elements\ncompared", "diff-\nerent"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = collections.defaultdict(list)
    for record in report.records:
        rows[record.layer].append(record)
    for name, records in rows.items():
        first = records[0]
        zeros, *sides = (
            sum(getattr(record, field) for record in records) / len(records)
            for field in ("zero_fraction", "dense_channels", "shared_channels", "sparse_channels"))
        table.add_row(
            name, first.format, f"{first.height}x{first.width}",
            f"{first.channels}->{first.outputs}", f"{zeros:.0%}",
            "+".join(f"{side:.0f}" for side in sides), *_sums(records, config))
    table.add_row("all", *[""] * 5, *_sums(report.records, config))
    return table


def _sums(records, config):
    """The last columns of `layer_table`."""
    requantize, convolve, compute = (
        sum(getattr(record, kind).get(key, 0) for record in records) for kind, key in
        (("requantize", "total_cycles"), ("convolve", "total_cycles"),
         ("convolve", "compute_cycles")))
    products = sum(record.macs * PRODUCTS[record.format] for record in records
                   if record.convolve)
    return (f"{requantize:,}", f"{convolve:,}", f"{compute:,}",
            f"{products / max(1, compute * config.multipliers):.0%}",
            f"{sum(record.elements_compared for record in records):,}",
            f"{sum(record.elements_different for record in records):,}")


def cycles_by_format(report):
    """Cycles of a report by W4A4, MXINT8 and all: requantize, convolve, of it compute, total."""
    found = {}
    for name in (*dict.fromkeys(FORMATS.values()), "all"):
        records = [record for record in report.records if name in (FORMATS[record.format], "all")]
        requantize = sum(record.requantize.get("total_cycles", 0) for record in records)
        convolve = sum(record.convolve.get("total_cycles", 0) for record in records)
        found[name] = {
            "layer_calls": len(records), "macs": sum(record.macs for record in records),
            "requantize": requantize, "convolve": convolve,
            "compute": sum(record.convolve.get("compute_cycles", 0) for record in records),
            "total": requantize + convolve}
    return found


def cycles_table(cycles):
    """Table of a dictionary of `cycles_by_format` by preset, the all-dense one last, for rich."""
    hybrid, dense = next(iter(cycles)), next(reversed(cycles))
    table = Table(
        title=f"Cycles of the same layer calls on {hybrid} and {dense}",
        caption="Convolve includes compute and the memory port.", caption_justify="left")
    table.add_column("layers")
    table.add_column("cycles")
    for name in (hybrid, dense, "speed-up"):
        table.add_column(name, justify="right")
    for name in cycles[hybrid]:
        for kind in ("compute", "convolve", "requantize", "total"):
            ours, theirs = cycles[hybrid][name][kind], cycles[dense][name][kind]
            table.add_row(name if kind == "compute" else "", kind, f"{ours:,}", f"{theirs:,}",
                          f"{theirs / ours:.2f}" if ours else "", end_section=kind == "total")
    return table


def demo(source, out, *, preset="small", yardstick="small-dense", images=IMAGES,
         wanted=EVALUATIONS, layers="*", seed=0):
    """Run the demo; returns what ``report.json`` says, and the report of the layers by preset.

    Leaves in the folder `out` the Verilog, ``samples.png``, ``sparsity.png`` and ``report.json``.

    Parameters
    ----------
    source : name of a shipped model, or path of a quantized one
    preset, yardstick : of the core, and of the all-dense core to compare cycles with
    images : to sample
    wanted, layers : evaluations and globs of layers to run on the RTL
    seed : of the images; the layers are those of the first one
    """
    began = time.monotonic()
    model = quantize.load_executable(source)
    config, dense = presets.load(preset), presets.load(yardstick)
    names = select_layers(layers, model)
    with task(f"Verilog of {config.name}"):
        text, description = verilog.generate(config)
    write_text(out / f"{verilog.MODULE}.v", text)
    write_json(out / f"{verilog.MODULE}.json", description)

    samples, _ = draw_samples(model, source, out / "samples.png", images, seed)
    with simulate.one_thread():
        found = trace.record(model, label=source, seed=seed)
    pictures.sparsity(out / "sparsity.png", found, thresholds_for(model, config))

    total = len(wanted) * len(names)
    calls = []

    def kept():
        for call in layer_calls(model, config, wanted, names, seed=seed):
            calls.append(call)
            yield call

    reports = {config.name: run_layers(kept(), config, total=total, text=text,
                                       plans=plans(model, config, names))}
    if reports[config.name].mismatch is None:
        found = plans(model, dense, names)
        reports[dense.name] = run_layers(
            ((adjusted(call, found[call.name]), counts) for call, counts in calls), dense,
            total=total, plans=found)
    cycles = {name: cycles_by_format(report) for name, report in reports.items()}
    results = {
        "preset": config.name,
        "zero_fraction": round(quantize.zero_fraction(model), 4),
        **samples,
        "evaluations": list(wanted),
        "layers": names,
        "elements_compared": sum(report.compared.total() for report in reports.values()),
        "elements_different": sum(report.different.total() for report in reports.values()),
        "cycles": cycles[config.name]["all"]["total"],
        "cycles_dense": cycles[dense.name]["all"]["total"] if dense.name in cycles else None,
        "cycles_by_format": cycles,
        "seconds": round(time.monotonic() - began, 1),
        "simulations": {name: report.as_dict() for name, report in reports.items()},
    }
    write_json(out / "report.json", results)
    return results, reports
