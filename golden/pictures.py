"""PNG pictures: samples of float and quantized models, and what sparsity traces show."""

import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from golden.checkpoint import replace_file
from golden.data import to_pixels

__all__ = ["LAYERS", "samples", "sparsity", "channels_by_time", "zero_statistics", "expected_work",
           "tradeoff", "sensitivity"]

LAYERS = 5   # of `sparsity`, if none are named


def samples(path, rows, title=""):
    """Draw images as a grid.

    Parameters
    ----------
    path : of the PNG file
    rows : dict by title of (N, C, H, W) in [-1, 1], a row of the grid each
    title : of the picture
    """
    count = max(len(images) for images in rows.values())
    size = (max(1.2 + 0.9 * count, 4.2), (0.6 if title else 0.2) + 0.95 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    if title:
        figure.suptitle(textwrap.fill(title, int(12 * size[0])), fontsize=9)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, to_pixels(images), strict=False):
            planes = image.permute(1, 2, 0).numpy()
            axis.imshow(planes if planes.shape[2] == 3 else planes[:, :, 0], cmap="gray",
                        vmin=0, vmax=255)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center",
                     fontsize=9)
    save(figure, path)


def sparsity(path, trace, thresholds=None, names=None):
    """Draw zero fractions, channel by evaluation, and the labels they lead to, of the first image.

    Channels are sorted by their mean zero fraction. Labels follow the counts of the evaluation
    before; those of evaluation 0, the calibration's.

    Parameters
    ----------
    path : of the PNG file
    trace : golden.trace.Trace
    thresholds : by layer, in units of 1/65536; by default those of the trace
    names : of the layers to draw; by default `LAYERS` of the W4A4 layers, from first to last
    """
    if names is None:
        spaced = np.linspace(0, len(trace.labelled) - 1, min(LAYERS, len(trace.labelled)))
        names = [trace.labelled[round(place)].name for place in spaced]
    figure = Figure(figsize=(2.9 * len(names) + 0.8, 6.4), dpi=110, layout="constrained")
    figure.suptitle("Zero activations of W4A4 layers over a sampling run, and the side each channel"
                    " goes to", fontsize=12)
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True)
    for (above, below), name in zip(grid.T, names, strict=True):
        layer = trace.layers[name]
        limit = layer.threshold if thresholds is None else thresholds[name]
        zeros, sparse = layer.fractions()[0], layer.labels(limit)[0]
        order = np.argsort(zeros.mean(0), kind="stable")
        shown = heat_map(above, zeros[:, order])
        below.imshow(sparse[:, order].T, aspect="auto", vmin=0, vmax=1, cmap="gray_r",
                     interpolation="nearest", origin="lower")
        above.set_title(f"{name}\n{layer.height}x{layer.width}, {layer.channels} channels,"
                        f" {zeros.mean():.0%} zeros", fontsize=8)
        text = "never sparse" if limit > 65536 else f"sparse from {limit / 65536:.0%} zeros on"
        below.set_title(f"{text}: {sparse.mean():.0%} of channels", fontsize=8)
        below.set_xlabel("evaluation (noise falls)", fontsize=8)
        for axis in (above, below):
            axis.tick_params(labelsize=7)
    grid[0, 0].set_ylabel("channel, by mean zeros", fontsize=8)
    grid[1, 0].set_ylabel("channel: black is sparse side", fontsize=8)
    zeros_bar(figure, shown, grid[0].tolist())
    save(figure, path)


def heat_map(axis, fractions):
    """Draw zero fractions (evaluations, channels), channels upwards."""
    return axis.imshow(fractions.T, aspect="auto", vmin=0, vmax=1, cmap="viridis",
                       interpolation="nearest", origin="lower")


def zeros_bar(figure, shown, axes):
    """Say what the colours of heat maps mean."""
    bar = figure.colorbar(shown, ax=axes, pad=0.01)
    bar.set_label("zeros / pixels", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def channels_by_time(path, trace):
    """Draw a heat map of zero fractions, channel by evaluation, for every W4A4 layer.

    Fractions are means over the images of `trace`; channels are sorted by their mean.
    """
    layers = trace.labelled
    # Of 6 to 8 columns those that leave the fewest places empty.
    columns = min(len(layers), min(range(6, 9), key=lambda count: -len(layers) % count))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(1.75 * columns + 0.8, 1.45 * rows + 0.6), dpi=90, layout="constrained")
    figure.suptitle(f"Zero activations of {trace.model}, channel by evaluation,"
                    f" mean of {trace.images} image{'s' * (trace.images > 1)}", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis in grid.flat[len(layers):]:
        axis.set_axis_off()
    for axis, layer in zip(grid.flat, layers, strict=False):
        zeros = layer.fractions().mean(0)
        shown = heat_map(axis, zeros[:, np.argsort(zeros.mean(0), kind="stable")])
        axis.set_title(f"{layer.name}\n{layer.channels} ch., {zeros.mean():.0%}", fontsize=6, pad=2)
        axis.tick_params(labelsize=6)
    figure.supxlabel("evaluation (noise falls)", fontsize=8)
    figure.supylabel("channel, by mean zeros", fontsize=8)
    zeros_bar(figure, shown, grid.ravel().tolist())
    save(figure, path, colours=96)


def zero_statistics(path, trace, facts):
    """Draw how zero fractions are distributed, their course over time, and label flips.

    `facts` is the `golden.work.summary` of `trace`.
    """
    figure = Figure(figsize=(11, 3.4), dpi=110, layout="constrained")
    spread, course, turns = figure.subplots(1, 3)
    bins = np.linspace(0, 1, 41)
    heights = sum(np.histogram(layer.fractions(), bins)[0] / layer.zeros.size * layer.macs
                  for layer in trace.labelled)
    spread.bar(bins[:-1], heights / heights.sum(), np.diff(bins), align="edge", color="#4477aa")
    spread.axvline(facts["zero_fraction"], color="black", linewidth=1, linestyle="--")
    spread.set_title(f"{facts['zero_fraction']:.1%} zeros on average", fontsize=9)
    spread.set_xlabel("zero fraction of a channel in an evaluation", fontsize=8)
    spread.set_ylabel("share of the MACs", fontsize=8)
    for layer in trace.labelled:
        course.plot(layer.fractions().mean((0, 2)), color="#aabbcc", linewidth=0.7)
    course.plot(facts["zero_fraction_of_evaluations"], color="black", linewidth=1.8)
    course.set_ylim(0, 1)
    course.set_title("mean by evaluation; thin: single layers", fontsize=9)
    course.set_ylabel("zero fraction", fontsize=8)
    turns.bar(1 + np.arange(len(facts["flips"])), facts["flips"], color="#cc6677")
    interval = facts["interval"]
    turns.set_title("labels that differ from the evaluation before"
                    + (f", interval {interval}" if interval > 1 else ""), fontsize=9)
    turns.set_ylabel("share of the channels", fontsize=8)
    for axis in (course, turns):
        axis.set_xlabel("evaluation (noise falls)", fontsize=8)
    for axis in (spread, course, turns):
        axis.tick_params(labelsize=7)
    save(figure, path)


def expected_work(path, facts):
    """Draw what labels are worth: by threshold, by update interval, by unit and knowledge.

    `facts` is a `golden.work.summary`.
    """
    figure = Figure(figsize=(12, 4.2), dpi=100, layout="constrained")
    figure.suptitle(f"{facts['model']}: bounds of the speed-up over all dense, equal multipliers,"
                    " dense : sparse = 1:1", fontsize=11)
    by_threshold, by_interval, by_unit = figure.subplots(1, 3, width_ratios=(1, 1, 1.7))
    *curve, own = facts["thresholds"]
    series = [(by_threshold, [100 * row["threshold"] for row in curve], curve,
               "threshold, % zeros (one for all layers)"),
              (by_interval, [row["interval"] for row in facts["intervals"]], facts["intervals"],
               "update interval, evaluations")]
    for axis, places, rows, label in series:
        axis.plot(places, [row["speedup"] for row in rows], "o-", markersize=3, color="#4477aa",
                  label="speed-up by threshold")
        axis.plot(places, [row["balance"] for row in rows], "s-", markersize=3, color="#cc6677",
                  label="balance: best split / time")
        axis.set_ylim(0, None)
        axis.set_xlabel(label, fontsize=8)
        axis.legend(fontsize=7, loc="lower left")
        axis.tick_params(labelsize=7)
    by_threshold.axhline(own["speedup"], color="#4477aa", linewidth=0.8, linestyle="--")
    by_threshold.text(100, own["speedup"], "each layer's own", fontsize=7, ha="right", va="bottom")
    by_interval.plot(series[1][1], [row["balanced"] for row in facts["intervals"]], "^-",
                     markersize=3, color="#222255", label="speed-up by balance, no threshold")
    by_interval.set_ylim(0, 1.1 * max(row["balanced"] for row in facts["intervals"]))
    by_interval.legend(fontsize=7, loc="lower left")
    by_interval.set_xscale("log", base=2)
    by_interval.set_xticks(series[1][1], [str(place) for place in series[1][1]])
    groups = {}
    for row in facts["work"]:
        if row["knowledge"]:
            name = row["name"].partition(":")[0]
            groups.setdefault(name, {})[row["knowledge"]] = row["speedup"]["1:1"]
    places = np.arange(len(groups))
    for n, (knowledge, text, colour) in enumerate((
            ("oracle", "perfect labels", "#222255"), ("late", "one evaluation late", "#4477aa"),
            ("static", "static", "#aabbcc"))):
        by_unit.barh(places + 0.27 * (n - 1), [group[knowledge] for group in groups.values()], 0.25,
                     color=colour, label=text)
    by_unit.set_yticks(places, [textwrap.fill(name, 30) for name in groups], fontsize=7)
    by_unit.invert_yaxis()
    limit = next(row["speedup"]["1:1"] for row in facts["work"] if row["name"] == "all sparse")
    by_unit.axvline(limit, color="black", linewidth=0.8, linestyle="--")
    by_unit.text(limit, places.mean(), " all sparse", fontsize=7, va="center", rotation=90)
    by_unit.set_xlim(1, 1 + 1.05 * (limit - 1))
    by_unit.set_xlabel("speed-up", fontsize=8)
    by_unit.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    by_unit.tick_params(labelsize=7)
    save(figure, path)


def tradeoff(path, points, limit=None):
    """Draw what zeros cost: loss over the baseline's, with its interval, against zero codes.

    A line joins what was fine-tuned for the same number of steps.

    Parameters
    ----------
    path : of the PNG file
    points : list of dicts of `golden.tradeoff.measure`; those without zeros are drawn as a band
    limit : relative loss to draw a line at, or None
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    counted = [point for point in points if point["zeros"] is not None]
    for steps in sorted({point["steps"] for point in counted}):
        shown = sorted((point for point in counted if point["steps"] == steps),
                       key=lambda point: point["zeros"])
        values, lows, highs = ([100 * point["loss"][n] for point in shown] for n in range(3))
        zeros = [100 * point["zeros"] for point in shown]
        errors = [[value - low for value, low in zip(values, lows, strict=True)],
                  [high - value for value, high in zip(values, highs, strict=True)]]
        axis.errorbar(zeros, values, errors, marker="o", capsize=3,
                      label=f"ReLU, 4 bits, fine-tuned for {steps} steps")
        for point, x, y in zip(shown, zeros, values, strict=True):
            axis.annotate(point["name"], (x, y), textcoords="offset points", xytext=(7, -11),
                          fontsize=8)
    for point in points:
        if point["zeros"] is None:
            value, low, high = (100 * bound for bound in point["loss"])
            axis.axhspan(low, high, color="tab:green", alpha=0.2)
            axis.axhline(value, color="tab:green",
                         label=f"{point['name']}, {point['steps']} steps")
    axis.axhline(0, color="black", linewidth=0.8, label="float SiLU baseline")
    if limit is not None:
        axis.axhline(100 * limit, color="tab:red", linestyle="--", label=f"limit, {limit:+.0%}")
    axis.set_xlabel("zero codes in 4-bit layers, % of their MACs, mean of a sampling run")
    axis.set_ylabel("EDM loss over the baseline's, %")
    axis.grid(alpha=0.3)
    axis.margins(x=0.12)
    axis.legend(fontsize=8)
    save(figure, path)


def sensitivity(path, model):
    """Draw each layer's SQNR alone in 4 bits, its share of the MACs, and those chosen for MXINT8.

    `model` is a quantized model whose record has the sensitivities of `golden.sensitivity`.
    """
    chosen = model.record["mxint8"]
    found, budget = chosen["sensitivity"], chosen["budget"]
    names = [item["name"] for item in found]
    total = sum(item["macs"] for item in found)
    shares = [100 * item["macs"] / total for item in found]
    colours = ["tab:orange" if model.formats[name] == "MX8" else "tab:blue" for name in names]
    figure = Figure(figsize=(max(7.0, 0.2 * len(names) + 1.5), 6.0), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    spent = sum(share for share, colour in zip(shares, colours) if colour == "tab:orange")
    figure.suptitle(f"One layer at a time in 4 bits, the others in float; orange: in MXINT8, "
                    f"{spent:.1f} % of the MACs, budget {100 * budget:.1f} %", fontsize=10)
    places = np.arange(len(names))
    # Layers of no error at all have no ratio: a gap.
    ratios = [np.nan if item["sqnr_db"] is None else item["sqnr_db"] for item in found]
    above.scatter(places, ratios, c=colours, s=22)
    above.vlines(places, np.nanmin(ratios) - 1, ratios, colors=colours, linewidth=1)
    above.set_ylabel("SQNR of the network's output, dB", fontsize=9)
    above.grid(axis="y", alpha=0.3)
    below.bar(places, shares, color=colours)
    below.set_ylabel("% of the MACs", fontsize=9)
    below.set_xticks(places, names, rotation=90, fontsize=6)
    below.set_xlim(-0.8, len(names) - 0.2)
    save(figure, path)


def save(figure, path, colours=None):
    """Write a figure as PNG; with `colours`, at most so many, which makes heat maps small files."""
    canvas = FigureCanvasAgg(figure)

    def write(temporary):
        if colours is None:
            canvas.print_png(temporary, metadata={"Software": None})
            return
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])
        picture.quantize(colours, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)

    replace_file(path, write)
