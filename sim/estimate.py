"""Compute cycles of convolutions from a trace alone: an estimate beside the exact cycle model.

``python -m sim.estimate MODEL TRACE`` compares it with `sim.cycles.conv_cycles` on the codes of the
trace's first image.

A trace has counts, no codes. They say exactly how many words the dense side takes and how many
non-zeros the sparse side walks. How these lie over the pixels is taken as normal, with the mean of
the channels' counts and a variance from the words' histograms. Waiting for room for results is not
in it.
"""

import argparse
import math
import sys

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from golden import detector, quantize, trace
from golden.checkpoint import write_json
from golden.quantized_network import evaluate
from golden.requantizer import Format, slots, spread
from hw import config as presets
from sim.cycles import DENSE_FLUSH, SPARSE_FLUSH, conv_cycles, taps_of_pixels
from sim.progress import task
from sim.sampling import parse_evaluations, states, thresholds_for
from sim.simulate import one_thread

__all__ = ["layer_cycles", "compare", "error_table"]


def layer_cycles(layer, labels, config, vector=16):
    """Estimated cycles of a layer in every image and evaluation of a trace.

    Parameters
    ----------
    layer : golden.trace.TraceLayer
    labels : (images, evaluations, Cin) bool, true for channels on the sparse side, all false if
        there is none; for layers without labels None
    config : hw.config.Config
    vector : V, which must be that of the trace

    Returns a dict of float arrays (images, evaluations): ``compute``, ``dense_busy``,
    ``sparse_busy``, as of `conv_cycles`. For IN16, of which a trace has no counts, (1, 1).
    """
    if config.vector != vector:
        raise ValueError(f"vector must be that of the trace, {vector}, not {config.vector!r}")
    inside = [len(taps) for taps in taps_of_pixels(layer.height, layer.width, layer.kernel)]
    taps = sum(inside)
    words = slots(list(layer.segments), vector)[1] // vector
    if layer.format == Format.IN16:
        dense = dense_cycles(layer, taps, [4, 4], config)
    elif layer.format == Format.MX8:
        block = 32 // vector
        dense = dense_cycles(
            layer, taps, [4 * min(block, words - first) for first in range(0, words, block)],
            config)
    if not layer.labelled:
        shape = layer.zeros.shape[:2] if layer.counted else (1, 1)
        return together(layer, np.full(shape, float(dense)), np.zeros(shape), config)
    taken = -(-(~labels).sum(-1) // vector)                      # (images, evaluations)
    by_words = np.array([dense_cycles(layer, taps, [count] if count else [], config)
                         for count in range(words + 2)], dtype=np.float64)
    dense = by_words[taken]
    # Each PE has every n-th pixel; borders may fall to some of them only.
    most = max((sum(inside[first::config.sparse_pes]) for first in range(config.sparse_pes)),
               default=0)
    sparse = sparse_cycles(layer, most, labels, config)
    return together(layer, dense, sparse, config)


def together(layer, dense, sparse, config):
    """The result of `layer_cycles` from the last issues of both sides."""
    # The post-processor takes V/4 outputs of a pixel a cycle.
    merging = layer.pixels * -(-layer.cout // config.vector) * 4
    ends = [np.where(busy > 0, np.maximum(busy, merging) + latency, 0.0) for busy, latency in (
        (dense, tail(layer, config.dense_lanes, config.dense_scale_units, DENSE_FLUSH, config)),
        (sparse, tail(layer, config.sparse_lanes, config.sparse_scale_units, SPARSE_FLUSH,
                      config)))]
    return {"compute": np.maximum(*ends), "dense_busy": dense, "sparse_busy": sparse}


def tail(layer, lanes, units, flush, config):
    """Cycles from the last issue to the last chunk at the post-processor, as of `sim.cycles.Side`.

    One more cycle merges it.
    """
    size = tiles(layer.cout, lanes, config)[-1]
    units = min(units, config.quad)
    return flush + -(-size * config.quad // units) + size * (config.quad // units)


def tiles(outputs, lanes, config):
    """Chunks of V/4 outputs in each tile of `lanes`."""
    chunks, tile = -(-outputs // config.quad), lanes // config.quad
    return [min(tile, chunks - first) for first in range(0, chunks, tile)]


def dense_cycles(layer, taps, groups, config):
    """Cycles of the dense side whose groups take these many issues in each of all `taps`.

    A group takes no less than its scale operations do, a tile no less than its results.
    """
    if not groups:
        return 0
    units, total = config.dense_scale_units, 0
    for size in tiles(layer.cout, config.dense_lanes, config):
        steps = -(-size * config.quad // units)
        total += taps * sum(max(issues, steps) for issues in groups)
    return total


def sparse_cycles(layer, taps, labels, config):
    """Cycles of a sparse PE that has these `taps`, (images, evaluations)."""
    if not config.sparse_pes:
        return np.zeros(labels.shape[:2])
    mean, deviation = moments(layer, labels, config.vector)
    words = -(-labels.sum(-1) // config.vector)
    cycles = 0
    for size in tiles(layer.cout, config.sparse_lanes, config):
        steps = -(-size * config.quad // config.sparse_scale_units)
        # A tap takes its non-zeros, or its scale operations if it has any; and a cycle a word.
        walk = at_least(steps, mean, deviation) - steps * below(0.5, mean, deviation)
        cycles = cycles + taps * np.maximum(walk, words)
    return np.where(words > 0, cycles, 0.0)


def moments(layer, labels, vector):
    """Mean and standard deviation of a pixel's non-zeros in the channels of `labels`.

    (images, evaluations) each. The covariance of two channels is taken as one number for an
    evaluation: what the histograms' variance has over that of independent channels.
    """
    filled = 1 - layer.fractions()
    mean = (filled * labels).sum(-1)
    alone = (filled * (1 - filled) * labels).sum(-1)
    counts = np.arange(layer.nonzeros.shape[2])
    pixels = layer.nonzeros.sum(2)
    first = (layer.nonzeros * counts).sum(2) / pixels            # (evaluations, words)
    second = (layer.nonzeros * counts ** 2).sum(2) / pixels
    order, _ = slots(list(layer.segments), vector)
    members = np.bincount(order.numpy() // vector, minlength=first.shape[1])
    share = filled.mean(0)                                       # (evaluations, Cin)
    excess = (second - first ** 2).sum(1) - (share * (1 - share)).sum(1)
    covariance = excess / max(1, (members * (members - 1)).sum())
    size = labels.sum(-1)
    variance = np.maximum(alone + size * (size - 1) * covariance, 0.25)
    return mean, np.sqrt(variance)


def below(limit, mean, deviation):
    """Share of a normal distribution below `limit`."""
    return torch.special.ndtr(torch.from_numpy((limit - mean) / deviation)).numpy()


def at_least(limit, mean, deviation):
    """Mean of max(x, limit) for normal x."""
    place = (mean - limit) / deviation
    density = np.exp(-place ** 2 / 2) / math.sqrt(2 * math.pi)
    return limit + (mean - limit) * (1 - below(0, place, 1.0)) + deviation * density


# Against the exact model.

def compare(model, found, config, wanted, *, layers=None, threshold=None, progress=None):
    """Exact and estimated cycles of layers of the first image: a list of dicts.

    Parameters
    ----------
    model : QuantizedModel
    found : golden.trace.Trace of it
    config : hw.config.Config
    wanted : numbers of evaluations
    layers : names; by default all
    threshold : as for `sim.sampling.thresholds_for`
    progress : callable, called with each layer call, or None
    """
    found.check_model(model, vector=config.vector)
    limits = thresholds_for(model, config, threshold)
    estimates, labels = {}, {}
    for layer in found.layers.values():
        # A core without sparse PEs takes every channel as dense.
        limit = limits[layer.name] if config.sparse_pes else detector.NEVER
        labels[layer.name] = layer.labels(limit) if layer.labelled else None
        estimates[layer.name] = layer_cycles(layer, labels[layer.name], config, found.vector)
    rows = {name: {"layer": name, "format": layer.format.name, "exact": 0, "estimate": 0.0,
                   "errors": []} for name, layer in found.layers.items()
            if layers is None or name in layers}
    inputs = states(model, set(wanted), found.seed)
    state = model.detector(config.vector)
    for index in wanted:
        def on_layer(call, result, index=index):
            name = call.name
            if name not in rows:
                return
            row, layer, shown = rows[name], found.layers[name], result.labels
            if layer.labelled:
                shown = spread(torch.from_numpy(labels[name][0, index]), layer.segments,
                               config.vector)
            exact = conv_cycles(result.codes, shown, layer.kernel, layer.cout, config)["compute"]
            guesses = estimates[name]["compute"]
            guess = float(guesses[0, index if guesses.shape[1] > 1 else 0])
            row["exact"] += exact
            row["estimate"] += guess
            row["errors"].append(guess / exact - 1)
            if progress is not None:
                progress(call)

        evaluate(model, inputs[index], index, state, vector=config.vector, on_layer=on_layer)
    return [{**row, "error": row["estimate"] / row["exact"] - 1,
             "worst": max(row["errors"], key=abs)} for row in rows.values()]


def error_table(rows, config):
    """Table of the rows of `compare`, for rich."""
    made = Table(title=f"Compute cycles on {config.name}: exact, and estimated from the trace",
                 box=None, pad_edge=False)
    for name in ("layer", "format", "exact", "estimate", "error", "worst call"):
        made.add_column(name, justify="left" if name in ("layer", "format") else "right")
    for row in rows:
        made.add_row(row["layer"], row["format"], f"{row['exact']:,}", f"{row['estimate']:,.0f}",
                     f"{row['error']:+.1%}", f"{row['worst']:+.1%}")
    exact, estimate = (sum(row[name] for row in rows) for name in ("exact", "estimate"))
    made.add_row("all", "", f"{exact:,}", f"{estimate:,.0f}", f"{estimate / exact - 1:+.1%}", "")
    return made


def main(arguments=None):
    """The command: compare, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m sim.estimate", description=__doc__)
    parser.add_argument("model", help="shipped name or path of a quantized model")
    parser.add_argument("trace", help="file of `sqdm trace`")
    parser.add_argument("--preset", default="small", help="name or TOML file of a core")
    parser.add_argument("--evaluations", default="0,17,34", help="numbers, as in sqdm simulate")
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args(arguments)
    try:
        model, found = quantize.load_executable(options.model), trace.load(options.trace)
        config = presets.load(options.preset)
        wanted = parse_evaluations(options.evaluations, model)
        with task("exact cycles", len(wanted) * len(model.layers)) as advance, one_thread():
            rows = compare(model, found, config, wanted, progress=advance)
        Console(width=100).print(error_table(rows, config))
        if options.json:
            result = {"model": options.model, "preset": config.name, "evaluations": wanted,
                      "layers": rows}
            write_json(options.json, result)
    except (ValueError, OSError) as error:
        print(f"estimate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
