"""The array's figures: what its two sides, its lists and zeros are worth, beside those of others.

All figures of a report are of one preset, on the cycle model, over a sampling run. Those of compute
cycles are of jobs chosen for few of them, those with the bus of jobs chosen for few cycles in all.
"""

import dataclasses
import json

import numpy as np

from golden import quantize, trace
from hw.config import MEDIUM
from hw.descriptor import Format
from sim import profile
from sim.progress import task
from sim.sampling import parse_evaluations
from sim.shape import Shape

__all__ = ["PAPER", "SHAPES", "STONNE", "all_sparse", "markdown", "measure"]

TARGET = 0.65         # of zeros, the paper's
FIXED = 0.3           # the paper's threshold
BY_ZEROS = (0.3, 0.5, 0.65, 0.8)
SHAPES = {"64->64 8x8": (64, 8), "128->128 8x8": (128, 8), "128->128 16x16": (128, 16),
          "256->256 8x8": (256, 8)}   # channels of input and output, size; kernel 3

# SQ-DM (arXiv 2501.15448): speed-up by zeros, and of all of it over dense FP16.
PAPER = {"sparsity_speedup": 1.83, "total_speedup": 6.91}
# Sparse SIGMA over dense MAERI in STONNE, 256 multipliers, uniform zeros; untuned tiles, but the
# best one for each point in the last row.
STONNE = {
    "64->64 8x8": (0.96, 0.99, 1.88, 3.65), "128->128 8x8": (0.92, 1.48, 1.88, 3.36),
    "128->128 16x16": (0.96, 1.33, 1.64, 2.37), "256->256 8x8": (0.96, 1.34, 1.93, 3.67),
    "256->256 8x8, best tiles": (1.19, 1.78, 2.41, 4.24)}


def all_sparse(config):
    """An all-sparse core with as many multipliers, or None if its PEs do not divide them."""
    one = config.sparse_lanes * config.sparse_rate
    if config.multipliers % one:
        return None
    return dataclasses.replace(config, name=f"{config.name}-sparse", dense_pes=0,
                               sparse_pes=config.multipliers // one)


def measure(source, config=MEDIUM, evaluations="all", areas=None):
    """Every figure: a dict with keys that stay.

    Parameters
    ----------
    source : name of a shipped model, or path of a quantized one
    config : hw.config.Config
    evaluations : as for `sim.sampling.parse_evaluations`
    areas : path of a JSON file ``{array: {library: area}}`` with the arrays of `config`, and of the
        all-dense and the all-sparse one, by name; None: no figures of equal area

    ``sparsity_speedup`` is over an all-dense array of as many multipliers, on the W4A4 layers with
    all zero fractions moved to a mean of 65 %; ``..._real_zeros`` as they are;
    ``..._by_zeros``: of single layers with uniform zeros, and of the model moved to them.
    """
    model = quantize.load_executable(source)
    wanted = parse_evaluations(evaluations, model)
    dense, sparse = profile.all_dense(config), all_sparse(config)
    with task("a trace of one image", trace.rounds(model, 1)) as advance:
        found = trace.record(model, label=str(source), progress=advance)
    real = profile.from_model(model, config, found)
    moved = profile.shifted(real, TARGET)

    def run(subjects, core, **options):
        rows = profile.profile(subjects, core, wanted, **{"objective": "compute"} | options)
        return {subject.name: [row for row in rows if row["layer"] == subject.name]
                for subject in subjects}

    labelled = [subject.name for subject in real if subject.labelled]
    square = [subject.name for subject in real if subject.labelled and subject.shape.kernel == 3]
    wide = [subject.name for subject in real
            if subject.labelled and subject.shape.kernel == 3 and sum(subject.shape.channels) >= 64]

    def cycles(rows, names=labelled, key="compute"):
        return sum(row[key] for name in names for row in rows[name])

    def figures(rows, names, core):
        return profile.totals([row for name in names for row in rows[name]], core)

    with task("cycles"):
        base, ours, as_is = run(real, dense), run(moved, config), run(real, config)
        oracle = run(moved, config, oracle=True)
        fixed = run(real, config, threshold=FIXED)
        bus = {name: run(subjects, core, objective="total") for name, subjects, core in (
            ("dense", real, dense), ("moved", moved, config), ("real", real, config))}
        only = run(moved, sparse) if sparse else None
        zeros = {str(share): by_zeros(share, real, config, dense, run, labelled, base, cycles)
                 for share in BY_ZEROS}
    everything = list(ours)
    totals, of_square = figures(ours, labelled, config), figures(ours, square, config)
    whole = figures(ours, everything, config)
    speedup = cycles(base) / cycles(ours)
    macs = {format: sum(subject.macs for subject in real if subject.shape.format.name == format)
            for format in Format.__members__}
    report = {
        "model": str(source), "preset": config.name, "multipliers": config.multipliers,
        "evaluations": wanted, "zeros": 1 - totals["nonzero_macs"] / totals["macs"],
        "real_zeros": found.zero_fraction(),
        "dense_utilization": figures(base, wide, dense)["utilization"],
        "sparse_efficiency": totals["sparse_efficiency"],
        "balance": totals["balance"],
        "whole_run_utilization": whole["utilization"],
        "sparsity_speedup": speedup,
        "sparsity_speedup_real_zeros": cycles(base) / cycles(as_is),
        "sparsity_speedup_by_zeros": zeros,
        "equal_area_speedup": {},
        "all_sparse": None if only is None else {
            "name": sparse.name, "sparsity_speedup": cycles(base) / cycles(only),
            "sparse_efficiency": figures(only, labelled, sparse)["sparse_efficiency"],
            "total_speedup": figures(only, everything, sparse)["speedup_fp16"]},
        "all_dense": {
            "name": dense.name, "sparsity_speedup": 1.0,
            "utilization": figures(base, labelled, dense)["utilization"],
            "total_speedup": figures(base, everything, dense)["speedup_fp16"]},
        "mxint8_mac_share": macs["MX8"] / sum(macs.values()),
        "total_speedup": whole["speedup_fp16"],
        "total_speedup_real_zeros": figures(as_is, everything, config)["speedup_fp16"],
        "layers_3x3": {
            "sparsity_speedup": cycles(base, square) / cycles(ours, square),
            "sparse_efficiency": of_square["sparse_efficiency"],
            "balance": of_square["balance"], "dense_efficiency": of_square["dense_efficiency"]},
        "stalls": {name: totals[name] for name in totals if name.endswith(
            ("_scale", "_empty", "_room"))},
        "oracle_over_late": cycles(ours) / cycles(oracle),
        "threshold_over_balanced": cycles(fixed) / cycles(as_is),
        "with_bus": {
            "sparsity_speedup": (cycles(bus["dense"], key="total")
                                 / cycles(bus["moved"], key="total")),
            "sparsity_speedup_real_zeros": (cycles(bus["dense"], key="total")
                                            / cycles(bus["real"], key="total")),
            "load": cycles(bus["moved"], key="load") / cycles(bus["moved"], key="total")},
        "paper": PAPER, "stonne": {name: dict(zip(map(str, BY_ZEROS), values))
                                   for name, values in STONNE.items()},
    }
    add_areas(report, areas, (config, dense, sparse))
    return report


def by_zeros(share, real, config, dense, run, labelled, base, cycles):
    """Speed-ups at a share of zeros: of layers with uniform zeros, and of the model."""
    subjects = []
    for name, (channels, size) in SHAPES.items():
        shape = Shape(format=Format.A4U, kernel=3, height=size, width=size, channels=(channels,),
                      outputs=channels, vector=config.vector, residual=False)
        known = np.full((max(len(subject.nonzero) for subject in real), channels), share)
        macs = profile.inside(9 * channels ** 2 * size ** 2, 3, size, size)
        subjects.append(profile.Subject(name, shape, macs, 1 - known, known, np.zeros(len(known))))
    slow, fast = run(subjects, dense), run(subjects, config)
    found = {name: cycles(slow, [name]) / cycles(fast, [name]) for name in SHAPES}
    return found | {"model": cycles(base) / cycles(run(profile.shifted(real, share), config))}


def add_areas(report, path, cores):
    """Figures of equal area: speed-ups divided by what the arrays are larger than all dense.

    Raises
    ------
    ValueError
        If the file has not the areas of the arrays.
    """
    found = report["equal_area_speedup"] = dict.fromkeys(("ecp5", "ihp", "asap7"))
    if path is None:
        return
    try:
        areas = json.loads(path.read_text(encoding="utf-8"))
        config, dense, sparse = (core and areas[core.name] for core in cores)
        for library in config:
            if library in ("pes", "config"):
                continue
            scale = dense[library] / config[library]
            found[library] = report["sparsity_speedup"] * scale
            if sparse:
                report["all_sparse"].setdefault("equal_area_speedup", {})[library] = (
                    report["all_sparse"]["sparsity_speedup"] * dense[library] / sparse[library])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: must have areas of {', '.join(c.name for c in cores if c)} by"
                         f" library ({type(error).__name__}: {error})") from None


def markdown(report):
    """The report as text, with the goals and the figures of others beside it."""
    def share(value):
        return "" if value is None else f"{value:.1%}"

    def factor(value):
        return "" if value is None else f"{value:.2f}"

    square, bus, sparse = report["layers_3x3"], report["with_bus"], report["all_sparse"] or {}
    rows = [
        ("dense utilization, all dense, 3x3 layers of 64 channels and more",
         share(report["dense_utilization"]), "", ">= 95 %"),
        ("sparse efficiency, W4A4 layers (3x3 alone)",
         f"{share(report['sparse_efficiency'])} ({share(square['sparse_efficiency'])})",
         "SIGMA 83 %", ">= 85 %"),
        ("balance, W4A4 layers (3x3 alone)",
         f"{share(report['balance'])} ({share(square['balance'])})", "", ">= 95 %"),
        ("utilization of all multipliers, all layers", share(report["whole_run_utilization"]), "",
         ""),
        (f"speed-up by {report['zeros']:.0%} zeros, equal multipliers (3x3 alone)",
         f"{factor(report['sparsity_speedup'])} ({factor(square['sparsity_speedup'])})",
         f"paper {PAPER['sparsity_speedup']}", ">= 2.2"),
        (f"the same at the model's own {report['real_zeros']:.1%} zeros",
         factor(report["sparsity_speedup_real_zeros"]), "", ""),
        ("the same with bus, at both",
         f"{factor(bus['sparsity_speedup'])}, {factor(bus['sparsity_speedup_real_zeros'])}", "",
         ""),
        ("all sparse, equal multipliers", factor(sparse.get("sparsity_speedup")), "", ""),
        ("equal area", ", ".join(
            f"{name} {factor(value) or '-'}"
            for name, value in report["equal_area_speedup"].items()), "", ">= 1.5 on ECP5"),
        ("equal area, all sparse", ", ".join(
            f"{name} {factor(value)}"
            for name, value in sparse.get("equal_area_speedup", {}).items()), "", ""),
        ("over dense FP16, all layers", factor(report["total_speedup"]),
         f"paper {PAPER['total_speedup']}", "> 6.91"),
        ("share of MXINT8 in the MACs", share(report["mxint8_mac_share"]), "paper 5.8 %", ""),
        ("counts one evaluation late, over an oracle's", factor(report["oracle_over_late"]), "",
         ""),
        (f"fixed threshold of {FIXED:.0%}, cycles over balanced",
         factor(report["threshold_over_balanced"]), "", ""),
    ]
    lines = [f"# {report['preset']} on {report['model']}", "",
             (f"{report['multipliers']} multipliers, {len(report['evaluations'])} evaluations,"
              " compute cycles unless stated."), "",
             "| figure | measured | others | goal |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "Speed-up by uniform zeros, STONNE's sparse SIGMA over dense MAERI in brackets:",
              "", f"| layer | {' | '.join(f'{share:.0%}' for share in BY_ZEROS)} |",
              f"|---|{'---|' * len(BY_ZEROS)}"]
    for name in (*SHAPES, "model"):
        cells = []
        for share_of in map(str, BY_ZEROS):
            cell = factor(report["sparsity_speedup_by_zeros"][share_of][name])
            beside = [found[share_of] for place, found in report["stonne"].items()
                      if place.startswith(name)]
            cells.append(f"{cell} ({factor(max(beside))})" if beside else cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
