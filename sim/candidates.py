"""Cycles and areas of organizations of the array on the zeros of a sampling run: table, picture.

``python -m sim.candidates areas.json --out build/candidates`` records one image of
``mnist32`` with the golden model, counts cycles of every organization, and adds the areas that
``python -m fpga.candidates`` measured. A PE takes max(issues, scale steps) cycles a scaled group;
the memory port is left out.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import typer
from matplotlib.figure import Figure

from golden import quantize
from golden.requantizer import Format
from golden.sampler import draw_noise, sample

__all__ = ["CANDIDATES", "GROUPS", "Dense", "Layer", "Sparse", "area", "compare", "count",
           "picture", "record", "table", "with_zeros", "zero_share"]

V = 16
LAYER = 40             # cycles to fill and drain a layer
EVALUATIONS = range(1, 35, 3)
ROWS = 1024            # weights of each output channel that a PE stores: 2 x 56 channels of 3x3
OUTPUTS = 32           # output channels of them
IHP_BIT = 93180.53 / (256 * 64)   # um2, from area in the liberty file of RM_IHPSG13_1P_256x64
ASAP7_BIT = 0.06       # um2, an assumption: cells of 0.029 um2 in half of the area
EBR_LUTS, DSP_LUTS = 402, 536     # an LFE5U-85F has so many LUTs for each of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer's shape; ``nonzero`` where a code is not 0, (evaluations, C, H, W).

    MX8 has a plane of low and one of high nibbles, (evaluations, 2, C, H, W).
    """

    height: int
    width: int
    kernel: int
    outputs: int
    mx: bool
    nonzero: np.ndarray

    @property
    def channels(self):
        return self.nonzero.shape[-3]

    @property
    def macs(self):
        """MACs of taps inside the image."""
        return taps(self).sum() * self.channels * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Dense PEs: ``pixels`` of a PE share its weights; ``passes`` of an MXINT8 product."""

    pes: int = 1
    pixels: int = 1
    lanes: int = 8
    units: int = 8
    passes: int = 4
    lane: str = "dense lane"

    @property
    def multipliers(self):
        return self.pes * self.pixels * self.lanes * V

    @property
    def steps(self):
        return max(1, self.pixels * self.lanes // self.units)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparse:
    """Sparse PEs of ``rate`` non-zeros a cycle.

    ``choose`` is from which the non-zeros of an issue may come: ``group``, ``word`` (of V), or
    ``banks`` (weights lie in two banks by the parity of the position). ``fan_out``: lanes are
    (tap, output). ``walker`` in each PE. ``channels`` of a scaled group, 0: all.
    """

    pes: int = 4
    lanes: int = 32
    rate: int = 1
    units: int = 4
    choose: str = "group"
    fan_out: bool = False
    walker: str = ""
    channels: int = 0
    lane: str = ""

    @property
    def sums(self):
        return self.lanes * (9 if self.fan_out else 1)

    @property
    def multipliers(self):
        return self.pes * self.sums * self.rate

    @property
    def steps(self):
        return self.sums // self.units


def record(source="mnist32"):
    """`Layer` by name of the W4A4 and MXINT8 layers, from one image of a shipped model."""
    model = quantize.load_executable(source)
    seen = {}

    def observe(name, x):
        layer, x = model.layers[name], x[0]
        if layer.format in (Format.A4U, Format.A4S):
            seen.setdefault(name, []).append((x != 0).numpy())
        elif layer.format == Format.MX8:
            blocks = x.unflatten(0, (-1, 32))
            exponent = torch.floor(torch.log2(blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)))
            codes = (blocks * 2.0 ** (6 - exponent)).round().long().flatten(0, 1)
            seen.setdefault(name, []).append(torch.stack([codes & 15, codes >> 4]).numpy() != 0)

    sample(lambda x, sigma: model(x, sigma, on_input=observe),
           draw_noise(1, model.architecture, 0), model.steps)
    return {name: Layer(
        height=layer.height, width=layer.width, kernel=layer.kernel,
        outputs=len(layer.weight_codes), mx=layer.format == Format.MX8,
        nonzero=np.stack(seen[name])) for name, layer in model.layers.items() if name in seen}


def zero_share(layers):
    """Zeros of the W4A4 layers, weighted by MACs."""
    chosen = [layer for layer in layers.values() if not layer.mx]
    return (sum(layer.macs * (1 - layer.nonzero.mean()) for layer in chosen)
            / sum(layer.macs for layer in chosen))


def with_zeros(layers, share, seed=1):
    """The layers with ``share`` of zeros: one constant on the logit of each channel's fraction."""
    chosen = {name: layer for name, layer in layers.items() if not layer.mx}
    zeros = {name: np.clip(1 - layer.nonzero.mean((2, 3)), 1e-6, 1 - 1e-6)
             for name, layer in chosen.items()}
    total = sum(layer.macs for layer in chosen.values())

    def moved(name, constant):
        return 1 / (1 + (1 / zeros[name] - 1) * math.exp(-constant))

    low, high = -6.0, 6.0
    for _ in range(40):
        middle = (low + high) / 2
        reached = sum(layer.macs * moved(name, middle).mean() for name, layer in chosen.items())
        low, high = (middle, high) if reached < share * total else (low, middle)
    rng = np.random.default_rng(seed)
    result = dict(layers)
    for name, layer in chosen.items():
        new, old = moved(name, low)[..., None, None], zeros[name][..., None, None]
        draw = rng.random(layer.nonzero.shape, dtype=np.float32)
        kept = layer.nonzero & (draw < (1 - new) / (1 - old))
        filled = ~layer.nonzero & (draw >= new / old)
        result[name] = dataclasses.replace(layer, nonzero=kept | filled)
    return result


def box(values, kernel):
    """Sum over the taps inside the image, (..., H, W)."""
    if kernel == 1:
        return values
    padded = np.pad(values, [(0, 0)] * (values.ndim - 2) + [(1, 1), (1, 1)])
    rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
    return rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]


def taps(layer):
    return box(np.ones((layer.height, layer.width)), layer.kernel)


def ceil(a, b):
    return -(-a // b)


def tiles(layer, side):
    fan_out = isinstance(side, Sparse) and side.fan_out and layer.kernel == 1
    return ceil(layer.outputs, side.sums if fan_out else side.lanes)


def issues(nonzero, sparse):
    """Issues of each pixel's group, (..., H, W), of non-zeros (..., C, H, W)."""
    if sparse.choose == "group":
        return ceil(nonzero.sum(-3), sparse.rate)
    if sparse.choose == "banks":
        return np.maximum(*(ceil(nonzero[..., n::2, :, :].sum(-3), sparse.rate // 2)
                            for n in range(2)))
    channels = nonzero.shape[-3]
    words = np.split(nonzero, range(V, channels, V), axis=-3)
    return sum(ceil(word.sum(-3), sparse.rate) for word in words)


def group_cycles(nonzero, sparse):
    """Cycles of an input pixel in a PE."""
    size = sparse.channels or nonzero.shape[-3]
    groups = np.split(nonzero, range(size, nonzero.shape[-3], size), axis=-3)
    counts = [issues(group, sparse) for group in groups]
    return sum(np.maximum(count, sparse.steps * (count > 0)) for count in counts).astype(float)


def sparse_pixels(nonzero, layer, sparse):
    """Cycles of each output pixel, of a fan-out each input pixel, all tiles."""
    cycles = group_cycles(nonzero, sparse)
    return (cycles if sparse.fan_out else box(cycles, layer.kernel)) * tiles(layer, sparse)


def dense_pixels(words, layer, dense):
    """Cycles of each output pixel, all tiles; pixels that share weights share their taps."""
    cycles = taps(layer)
    if dense.pixels > 1 and layer.kernel == 3:   # neighbours take the taps that any of them has
        cycles = np.repeat(cycles[:, layer.width // 2:layer.width // 2 + 1], layer.width, 1)
    return cycles * max(words, dense.steps) * (words > 0) * tiles(layer, dense) / dense.pixels


def slowest(cycles, side, layer):
    """Cycles of the PE with most work, (pixel, tile) dealt in turn."""
    parts = tiles(layer, side)
    dealt = np.repeat(cycles.reshape(-1) / parts, parts)
    return max(dealt[n::side.pes].sum() for n in range(side.pes))


def expected(chances, layer, sparse):
    """Expected cycles of the sparse side for channels of these chances not to be 0."""
    if not len(chances):
        return 0.0
    mean = chances.sum() / sparse.rate + (sparse.rate - 1) / 2 / sparse.rate
    spread = max(1e-6, 1.3 * math.sqrt((chances * (1 - chances)).sum()) / sparse.rate)
    z = (mean - sparse.steps) / spread   # of max(issues, steps), issues taken as normal
    cycles = (sparse.steps + (mean - sparse.steps) * 0.5 * (1 + math.erf(z / math.sqrt(2)))
              + spread * math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    return taps(layer).sum() * cycles * tiles(layer, sparse) / sparse.pes


def split(chances, layer, dense, sparse):
    """(words of few pixels, words of the others, share of the latter) where both sides meet."""
    if dense is None:
        return 0, 0, 0.0
    words = ceil(layer.channels, V)
    if sparse is None:
        return words, words, 0.0
    both = [(dense_pixels(n, layer, dense).sum() / dense.pes,
             expected(chances[n * V:], layer, sparse)) for n in range(words + 1)]
    for n in range(words):
        (dense_now, sparse_now), (dense_next, sparse_next) = both[n:n + 2]
        if dense_next > sparse_next:
            change = dense_next - dense_now + sparse_now - sparse_next
            return n, n + 1, max(0.0, (sparse_now - dense_now) / change)
    return words, words, 0.0


def layer_cycles(layer, evaluation, dense, sparse):
    """Cycles of both sides; non-zero MACs of the sparse side and all MACs of the dense one."""
    nonzero = layer.nonzero[evaluation]
    before = layer.nonzero[evaluation - 1].mean((1, 2))
    if sparse is not None and sparse.channels:
        order = np.arange(layer.channels)
    else:
        order = np.argsort(-before, kind="stable")
    low, high, share = split(before[order], layer, dense, sparse)
    cut, number = round(share * 256), np.arange(layer.height * layer.width)
    upper = ((number * cut & 255) + cut >= 256).reshape(layer.height, layer.width)
    dense_cycles = sparse_cycles = np.zeros((layer.height, layer.width))
    useful = products = 0.0
    for pixels, words in ((upper, high), (~upper, low)):
        if not pixels.any():
            continue
        if words:
            dense_cycles = dense_cycles + dense_pixels(words, layer, dense) * pixels
            products += ((taps(layer) * pixels).sum() * min(words * V, layer.channels)
                         * layer.outputs)
        if words * V < layer.channels:
            rest = nonzero[order[words * V:]]
            sparse_cycles = sparse_cycles + sparse_pixels(rest, layer, sparse) * pixels
            useful += (box(rest.sum(0), layer.kernel) * pixels).sum() * layer.outputs
    return (slowest(dense_cycles, dense, layer) if dense else 0.0,
            slowest(sparse_cycles, sparse, layer) if sparse else 0.0, useful, products)


def mx_cycles(layer, evaluation, dense, sparse):
    """Cycles of an MXINT8 layer whose output pixels both sides share."""
    rates = []
    if dense:
        words = layer.channels // 32 * max(2 * dense.passes, dense.steps * dense.passes)
        rates.append(dense_pixels(words, layer, dense).sum() / dense.pes)
    if sparse:
        planes = layer.nonzero[evaluation]
        block = dataclasses.replace(sparse, channels=32)
        cycles = 2 * group_cycles(planes, block).sum(0)
        cycles = cycles if sparse.fan_out else box(cycles, layer.kernel)
        rates.append(cycles.sum() * tiles(layer, sparse) / sparse.pes)
    return LAYER + 1 / sum(1 / rate for rate in rates)


def count(layers, dense, sparse):
    """Mean cycles an evaluation of W4A4 and of MXINT8 layers, efficiency, utilization, balance."""
    totals, four, eight = np.zeros(4), 0.0, 0.0
    for layer in layers.values():
        for evaluation in EVALUATIONS:
            if layer.mx:
                eight += mx_cycles(layer, evaluation, dense, sparse)
            else:
                parts = layer_cycles(layer, evaluation, dense, sparse)
                totals += parts
                four += max(parts[:2]) + LAYER
    in_dense, in_sparse, useful, products = totals
    return {
        "cycles": four / len(EVALUATIONS), "mx_cycles": eight / len(EVALUATIONS),
        "efficiency": useful / (in_sparse * sparse.multipliers) if sparse else None,
        "utilization": products / (in_dense * dense.multipliers) if dense else None,
        "balance": (in_dense + in_sparse) / (2 * four) if dense and sparse else None}


def ebrs(rows, width):
    """EBRs of a memory: 512 x 36 or 1024 x 18."""
    return min(ceil(width, 36) * ceil(rows, 512), ceil(width, 18) * ceil(rows, 1024))


def area(dense, sparse, units):
    """LUT, DSP, EBR, um2 of logic by library, and bits of memory, from areas by unit."""
    total = {"LUT": 0.0, "DSP": 0.0, "EBR": 0, "ihp": 0.0, "asap7": 0.0, "bits": 0.0}

    def take(name, times):
        for key, path in (("LUT", ("ecp5", "lut")), ("DSP", ("ecp5", "dsp")),
                          ("ihp", ("cells", "ihp", "um2")), ("asap7", ("cells", "asap7", "um2"))):
            number = units[name]
            for part in path:
                number = number[part]
            total[key] += number * times

    def take_scale_units(lanes, times):
        """Those that were measured; between and beyond them along a line."""
        low = max(n for n in (1, 2, 4, 8) if n <= lanes)
        weight = (lanes - low) / low
        take(f"scale unit, {low} lanes", times * (1 - weight))
        take(f"scale unit, {2 * low} lanes", times * weight)

    def store(copies, rows, width):
        total["bits"] += copies * rows * width
        total["EBR"] += copies * ebrs(rows, width)

    if dense:
        take(dense.lane, dense.pes * dense.lanes)
        take("dense control", dense.pes)
        take_scale_units(dense.steps, dense.pes * dense.units)
        store(dense.pes, ROWS * OUTPUTS // (V * dense.lanes), 4 * V * dense.lanes)
    if sparse:
        if sparse.lane:                              # groups with their scale units
            take(sparse.lane, sparse.multipliers / units[sparse.lane]["multipliers"])
        else:
            name = f"sparse lanes, {sparse.rate} a cycle"
            take(name, sparse.multipliers / units[name]["multipliers"])
            take_scale_units(sparse.steps, sparse.pes * sparse.units)
        take("sparse control", sparse.pes)
        if sparse.walker:
            take(sparse.walker, sparse.pes)
        else:
            take("compactor", 1)
        if sparse.choose == "word":
            name = f"word multiplexer, {sparse.rate} a cycle"
            take(name, sparse.multipliers / units[name]["multipliers"])
            store(sparse.pes, ROWS * OUTPUTS // (V * sparse.lanes), 4 * V * sparse.lanes)
        elif sparse.fan_out:
            store(sparse.pes * sparse.rate, ROWS * OUTPUTS // sparse.sums, 4 * sparse.sums)
            store(9 * sparse.pes, 3 * 32 * OUTPUTS // 9 // sparse.lanes, 58 * sparse.lanes)
        else:
            copies = 2 if sparse.choose == "banks" else sparse.rate
            store(sparse.pes * copies, ROWS * OUTPUTS // sparse.lanes, 4 * sparse.lanes)
    return total


YARDSTICK = "dense V x K, K 16, u 8"
CHOSEN = "128 dense + 384 sparse"

CANDIDATES = {
    YARDSTICK: (Dense(pes=2, lanes=16, units=8), None),
    "the same, u 16": (Dense(pes=2, lanes=16, units=16), None),
    "dense V x K, K 8, u 8": (Dense(pes=4, lanes=8, units=8), None),
    "2 pixels share weights, K 8": (
        Dense(pes=2, pixels=2, lanes=8, units=8, lane="dense lane, 2 pixels"), None),
    "dense, MXINT8 at half rate": (
        Dense(pes=2, lanes=16, units=8, passes=2, lane="dense lane, half rate"), None),
    "before: 1 a cycle, * and walkers": (
        None, Sparse(pes=16, units=4, walker="earlier walker", lane="earlier sparse group")),
    "gather 1 a cycle, u 2": (None, Sparse(pes=16, units=2)),
    "gather 1 a cycle, u 4": (None, Sparse(pes=16, units=4)),
    "gather 2 a cycle, u 4": (None, Sparse(pes=8, rate=2, units=4)),
    "gather 2, u 4, walkers": (None, Sparse(pes=8, rate=2, units=4, walker="pair walker")),
    "gather 2 a cycle, u 8": (None, Sparse(pes=8, rate=2, units=8)),
    "gather 4 a cycle, u 8": (None, Sparse(pes=4, rate=4, units=8)),
    "gather 4 a cycle, u 16": (None, Sparse(pes=4, rate=4, units=16)),
    "gather 4, u 16, two banks": (None, Sparse(pes=4, rate=4, units=16, choose="banks")),
    "fan-out 9 x 16, 1 a cycle, u 16": (None, Sparse(
        pes=3, lanes=16, units=16, fan_out=True)),
    "fan-out 9 x 16, 2 a cycle, u 16": (None, Sparse(
        pes=2, lanes=16, rate=2, units=16, fan_out=True)),
    "dot product, 2 of a word, u 8": (None, Sparse(pes=8, rate=2, units=8, choose="word")),
    "dot product, 4 of a word, u 8": (None, Sparse(pes=4, rate=4, units=8, choose="word")),
    "128 dense + 384 sparse, u 8": (Dense(), Sparse(pes=3, rate=4, units=8)),
    CHOSEN: (Dense(), Sparse(pes=3, rate=4, units=16)),
    "256 dense + 256 sparse": (
        Dense(lanes=16, units=16), Sparse(pes=2, rate=4, units=16)),
}

GROUPS = {f"{channels or 'all'} channels, u {units}":
          (None, Sparse(pes=4, rate=4, units=units, channels=channels))
          for channels in (16, 32, 64, 0) for units in (8, 16, 32)}
"""Scales per so many channels and pixel, in an array that is all sparse."""


def compare(layers, units):
    """A dictionary of figures by candidate: cycles at 65 % and at the layers' own zeros, areas.

    Speed-ups ``x65`` and ``real`` are over `YARDSTICK`, for equal multipliers; ``equal_`` ones at
    65 % for equal area (LUTs, with EBR and DSP at the device's ratio in ``equal_ecp5``).
    """
    promoted = with_zeros(layers, 0.65)
    rows = {}
    for name, (dense, sparse) in {**CANDIDATES, **GROUPS}.items():
        multipliers = sum(side.multipliers for side in (dense, sparse) if side)
        row = {"multipliers": multipliers, **count(promoted, dense, sparse)}
        row["real_cycles"] = count(layers, dense, sparse)["cycles"]
        row = {key: value if value is None else float(value) for key, value in row.items()}
        total = area(dense, sparse, units)
        row |= {key: number / multipliers for key, number in total.items()}
        row["ecp5"] = row["LUT"] + EBR_LUTS * row["EBR"] + DSP_LUTS * row["DSP"]
        row["ihp_all"] = row["ihp"] + IHP_BIT * row["bits"]
        row["asap7_all"] = row["asap7"] + ASAP7_BIT * row["bits"]
        base = rows.get(YARDSTICK, row)
        scale = 512 / multipliers
        row["x65"] = base["cycles"] / row["cycles"] * scale
        row["real"] = base["cycles"] / row["real_cycles"] * scale
        row["mx"] = base["mx_cycles"] / row["mx_cycles"] * scale
        for key in ("LUT", "ecp5", "ihp", "asap7", "ihp_all", "asap7_all"):
            row[f"equal_{key}"] = row["x65"] * base[key] / row[key]
        rows[name] = row
        print(name, {key: round(value, 3) for key, value in row.items() if value is not None},
              flush=True)
    return rows


COLUMNS = {
    "x65": "{:.2f}", "real": "{:.2f}", "efficiency": "{:.2f}", "utilization": "{:.2f}",
    "mx": "{:.2f}", "LUT": "{:.0f}", "DSP": "{:.3f}", "EBR": "{:.2f}", "ihp": "{:.0f}",
    "asap7": "{:.0f}", "bits": "{:.0f}", "equal_LUT": "{:.2f}", "equal_ecp5": "{:.2f}",
    "equal_ihp": "{:.2f}", "equal_ihp_all": "{:.2f}", "equal_asap7": "{:.2f}",
    "equal_asap7_all": "{:.2f}",
}


def table(rows):
    """Markdown of the figures, a line a candidate."""
    lines = ["| candidate | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = ["-" if row[key] is None else form.format(row[key])
                 for key, form in COLUMNS.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def picture(rows, path):
    """Draw speed against area a multiplier, on ECP5 and in IHP's cells with memories."""
    figure = Figure(figsize=(11, 5.2), dpi=110, layout="constrained")
    names = list(CANDIDATES)
    panels = {"LUT": (1, "LUTs a multiplier, ECP5"), "ihp_all": (
        1000, "1000 um² a multiplier, memories included, IHP sg13g2")}
    colors = {"dense": "tab:blue", "sparse": "tab:orange", "both": "tab:red"}
    for axes, (key, (scale, label)) in zip(figure.subplots(1, 2), panels.items()):
        points = {name: (rows[name][key] / scale, rows[name]["x65"]) for name in names}
        front, best = [], 0.0
        for point in sorted(points.values(), key=lambda p: (p[0], -p[1])):
            if point[1] > best:
                best = point[1]
                front.append(point)
        axes.step(*zip(*front), where="post", color="0.75", zorder=1, label="Pareto front")
        for number, name in enumerate(names, 1):
            dense, sparse = CANDIDATES[name]
            kind = "dense" if sparse is None else "sparse" if dense is None else "both"
            chosen = name == CHOSEN
            axes.scatter(*points[name], color=colors[kind], zorder=3, s=90 if chosen else 22,
                         marker="*" if chosen else "o", label="chosen" if chosen else kind)
            axes.annotate(str(number), points[name], xytext=(5, (3, -9)[number % 2]),
                          textcoords="offset points", fontsize=8)
        x, y = points[YARDSTICK]
        right = 1.05 * max(point[0] for point in points.values())
        end = min(right, 3 * x)
        axes.plot([0, end], [0, end / x * y], ":", color="0.6", label="MACs an area as dense")
        axes.set(xlim=(0, right), ylim=(0, 3), xlabel=label,
                 ylabel="speed at 65 % zeros, equal multipliers")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    axes.legend(once.values(), once.keys(), loc="lower right", fontsize=8)
    lines = "\n".join(f"{number} {name}" for number, name in enumerate(names, 1))
    figure.text(1.01, 0.5, lines, va="center", fontsize=8)
    figure.savefig(path, bbox_inches="tight")


def main(areas: Path, out: Path = Path("build/candidates"), source: str = "mnist32"):
    """Write candidates.json, candidates.md and pe_choice.png to the folder ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    layers = record(source)
    print(f"zeros {zero_share(layers):.3f}", flush=True)
    rows = compare(layers, json.loads(areas.read_text()))
    (out / "candidates.json").write_text(json.dumps(rows, indent=2) + "\n")
    (out / "candidates.md").write_text(table(rows))
    picture(rows, out / "pe_choice.png")


if __name__ == "__main__":
    typer.run(main)
