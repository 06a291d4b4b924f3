"""Profiles: where the cycles of a sampling run go, layer by layer and evaluation by evaluation.

Cycles are those of `sim.cycles`. What it needs to know, how many non-zeros every pixel has, is
drawn from statistics: the zero fraction of each channel in an evaluation, and how much the
non-zeros of a pixel go together. Lists of channels follow from the counts of the evaluation before,
as on the core. Profiles of codes themselves, which are exact, take an evaluation of the integers
each.
"""

import dataclasses
import math

import numpy as np
import torch
from rich.table import Table

from golden import detector, quantize
from golden import layer as golden_layer
from golden.network import build, layer_shapes
from golden.presets import PRESETS as NETWORKS
from golden.requantizer import slots
from golden.sampler import STEPS, evaluations
from hw.config import PRESETS
from hw.descriptor import Format
from sim import sampling, tiler
from sim.cycles import COLUMN, Layer, a4_counts, exact_counts, mx_counts
from sim.shape import BLOCK, Shape

__all__ = ["ZEROS", "Subject", "all_dense", "exact", "from_model", "from_network",
           "measure", "plan_of", "profile", "report", "shifted", "table"]

ZEROS = 0.65         # of every channel, where nothing is known of a network
LOW, HIGH = 15 / 16, 0.8   # of non-zero MX8 codes, those with a non-zero low or high nibble
WIDE = 1 - 1 / 16    # the same for either nibble of the network's input
LATENCY = 4          # cycles of memory


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A layer, and what is known of its codes in each evaluation.

    Members
    -------
    name : of the layer
    shape : sim.shape.Shape, as it is executed
    macs : multiplications in an evaluation whose tap lies inside the image
    nonzero : (evaluations, channels), share of non-zero codes
    known : (evaluations, channels), share of zeros from which the lists follow, not in MX8
    together : (evaluations,), covariance of being non-zero of two channels at a pixel
    threshold : of the layer in the model, in units of 1/65536
    """

    name: str
    shape: Shape
    macs: int
    nonzero: np.ndarray
    known: np.ndarray
    together: np.ndarray
    threshold: int = detector.NEVER

    @property
    def labelled(self):
        """Whether zeros save work by channel: A4."""
        return self.shape.labelled


def inside(macs, kernel, height, width):
    """Of all the multiplications of a convolution, those whose tap lies inside the image."""
    taps = math.prod(kernel * size - (kernel // 2) * (kernel - 1) for size in (height, width))
    return macs * taps // (kernel ** 2 * height * width)


def from_model(model, config, found=None):
    """Subjects of a quantized model, in execution order.

    Parameters
    ----------
    model : golden.quantized_network.QuantizedModel
    config : hw.config.Config
    found : golden.trace.Trace of the model, whose first image is profiled; None: the mean of the
        calibration's images, zeros independent of each other
    """
    count = len(evaluations(model.steps))
    if found is not None:
        found.check_model(model)
    subjects = []
    for name, item in model.layers.items():
        shape = Shape(
            format=Format(int(item.format)), kernel=item.kernel, height=item.height,
            width=item.width, channels=tuple(item.segments), outputs=len(item.weight_codes),
            vector=config.vector, residual=item.residual_exponent is not None)
        together = np.zeros(count)
        if shape.format == Format.IN16:
            zeros = np.zeros((count, sum(shape.channels)))
        elif found is None:
            zeros = item.zeros.numpy() / shape.pixels
        else:
            layer = found.layers[name]
            zeros = layer.fractions()[0]
            together = covariance(layer, found.vector)
        known = np.concatenate([zeros[:1], zeros[:-1]])
        if found is not None and shape.labelled:
            known[0] = found.layers[name].calibration[0] / shape.pixels
        kernel = 3 if item.gathered or item.scattered else item.kernel
        subjects.append(Subject(
            name, shape, inside(item.macs, kernel, item.height, item.width), 1 - zeros, known,
            together, item.threshold))
    return subjects


def covariance(layer, vector):
    """Of being non-zero of two channels at a pixel, from a TraceLayer's words: (evaluations,).

    One number for an evaluation: what the variance of the words' non-zeros has over that of
    independent channels, for each pair of channels of a word.
    """
    values = np.arange(layer.nonzeros.shape[2])
    pixels = layer.nonzeros.sum(2)
    mean = (layer.nonzeros * values).sum(2) / pixels             # (evaluations, words)
    square = (layer.nonzeros * values ** 2).sum(2) / pixels
    order, _ = slots(list(layer.segments), vector)
    members = np.bincount(order.numpy() // vector, minlength=mean.shape[1])
    filled = 1 - layer.fractions().mean(0)
    excess = (square - mean ** 2).sum(1) - (filled * (1 - filled)).sum(1)
    return excess / max(1, (members * (members - 1)).sum())


def from_network(name, config, zeros=ZEROS, steps=STEPS):
    """Subjects of a published network of `golden.presets`, with ReLU, by name.

    Formats are those of the policy `mixed` with the paper's rule; every channel of W4A4 has the
    same share of ``zeros`` in every evaluation.
    """
    architecture = dataclasses.replace(NETWORKS[name], activation="relu")
    with torch.device("meta"):
        unet = build(architecture)
    formats, count = quantize.formats(unet), len(evaluations(steps))
    layers, subjects = {layer.name: layer for layer in unet.layers()}, []
    for item in layer_shapes(unet):
        format = formats[item.name]
        executed = quantize.executed_shape(unet, layers[item.name], item, format)
        shape = Shape(
            format=Format(int(format)), kernel=executed["kernel"], height=item.height,
            width=item.width, channels=tuple(executed["segments"]),
            outputs=item.cout * (9 if executed["scattered"] else 1), vector=config.vector,
            residual=item.name.endswith((".conv1", ".proj")))
        share = np.full((count, sum(shape.channels)), zeros * shape.labelled)
        subjects.append(Subject(
            item.name, shape, inside(item.macs, item.kernel, item.height, item.width), 1 - share,
            share, np.zeros(count)))
    return subjects


def shifted(subjects, zeros):
    """Subjects whose A4 layers have the mean share of ``zeros``, weighted by MACs.

    One number is added to the logits of all zero fractions, of every evaluation, layer and channel.

    Raises
    ------
    ValueError
        If ``zeros`` is not between 0 and 1.
    """
    if not 0 < zeros < 1:
        raise ValueError(f"zeros must be between 0 and 1, not {zeros!r}")
    chosen = [subject for subject in subjects if subject.labelled]

    def moved(share, by):
        odds = np.clip(share, 1e-4, 1 - 1e-4)
        return 1 / (1 + (1 - odds) / odds * np.exp(-by))

    def mean(by):
        return (sum(subject.macs * moved(1 - subject.nonzero, by).mean() for subject in chosen)
                / sum(subject.macs for subject in chosen))

    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < zeros else (low, middle)
    return [dataclasses.replace(subject, nonzero=1 - moved(1 - subject.nonzero, low),
                                known=moved(subject.known, low))
            if subject.labelled else subject for subject in subjects]


def plan_of(subject, config, objective="total"):
    """`sim.tiler.Plan` of a subject, for its mean share of non-zero codes."""
    return tiler.plan(subject.shape, config,
                      tiler.density(subject.shape, float(subject.nonzero.mean())),
                      objective=objective)


class Run:
    """A subject on a core: its plan, and the cycles of an evaluation.

    Parameters
    ----------
    subject : Subject
    config : hw.config.Config
    threshold : share of zeros from which a channel is sparse; None: balanced lists
    objective : of `sim.tiler.plan`
    """

    def __init__(self, subject, config, threshold=None, objective="total"):
        self.subject, self.config, self.threshold = subject, config, threshold
        shape = subject.shape
        self.plan = plan_of(subject, config, objective)
        self.layer = Layer(shape.kernel, self.plan.jobs, self.plan.share, config, shape.residual)
        order, _ = slots(list(shape.channels), config.vector)
        if shape.format == Format.IN16:
            half = -(-shape.channels[0] // BLOCK) * BLOCK
            order = torch.cat([order, half + order])
        self.channels = [np.flatnonzero((order >= first) & (order < first + size))
                         for first, size, _ in shape.tiles(self.plan.tile_channels)]

    def draw(self, evaluation, rng, oracle=False):
        """Counts of every channel tile in an evaluation."""
        subject = self.subject
        nonzero = subject.nonzero[evaluation]
        known = 1 - nonzero if oracle else subject.known[evaluation]
        if subject.shape.mx:
            return [self.draw_mx(nonzero, channels, rng) for channels in self.channels]
        return [self.draw_a4(nonzero[channels], known[channels], subject.together[evaluation], rng)
                for channels in self.channels]

    def draw_mx(self, nonzero, channels, rng):
        """Counts of a block of 32 slots."""
        if self.subject.shape.format == Format.IN16:
            shares = [np.full(len(channels), WIDE)] * 2
        else:
            shares = [nonzero[channels] * part for part in (LOW, HIGH)]
        counts = np.stack([self.pixels(share, 0.0, rng) for share in shares])
        return mx_counts(counts, len(channels), self.config)

    def draw_a4(self, nonzero, known, together, rng):
        """Counts of a channel tile."""
        order, low, high, cut = self.split(known)
        rest = self.pixels(nonzero[order[high:]], together, rng)
        boundary = self.pixels(nonzero[order[low:high]], together, rng)
        return a4_counts(np.stack([rest + boundary, rest]), len(order), low, high, cut,
                         self.config)

    def pixels(self, shares, together, rng):
        """Non-zeros of every pixel among channels with these shares, (H, W).

        They are normal, rounded, within what is possible.
        """
        shape, count = (self.subject.shape.height, self.subject.shape.width), len(shares)
        if not count:
            return np.zeros(shape, dtype=np.int32)
        variance = (shares * (1 - shares)).sum() + count * (count - 1) * together
        drawn = rng.standard_normal(shape, dtype=np.float32)
        drawn = shares.sum() + math.sqrt(max(0.0, variance)) * drawn
        return np.clip(np.rint(drawn), 0, count).astype(np.int32)

    def split(self, known):
        """(order of a tile's channels, low, high, cut) from known shares of zeros."""
        config, pixels, count = self.config, self.subject.shape.pixels, len(known)
        order = np.arange(count)
        if not config.sparse_pes:
            return order, count, count, 0
        if not config.dense_pes:
            return order, 0, 0, 0
        limit = self.plan.dense_limit
        zeros = np.rint(known * pixels).astype(np.int64)
        if self.threshold is not None:
            sparse = known >= self.threshold
            size = min(int((~sparse).sum()), limit * config.vector)
            return np.concatenate([order[~sparse], order[sparse]]), size, size, 0
        buckets = zeros >> max(0, pixels.bit_length() - detector.BUCKET_BITS)
        order = np.argsort(buckets, kind="stable")
        left = np.concatenate([pixels - zeros[order], np.zeros(-count % config.vector, np.int64)])
        words, cut = detector.balance(
            left.reshape(-1, config.vector).sum(1).tolist(), pixels, self.plan.costs, limit)
        low, high = (min(n * config.vector, count) for n in (words, words + (cut > 0)))
        return order, low, high, cut

    def measure(self, counts, latency=LATENCY):
        """What an evaluation with these Counts takes, see `measure`."""
        return measure(self.subject, self.plan, self.layer, counts, self.config, latency)


def measure(subject, plan, layer, counts, config, latency=LATENCY):
    """What a layer takes in an evaluation: a dict of plain numbers.

    ``macs``, ``nonzero_macs``: inside the image. ``fp16``: cycles of an array of FP16 multipliers,
    a quarter as many, that are always busy. ``compute``, ``dense_busy``, ``sparse_busy``,
    ``stall``: as the core counts them. ``total``: cycles with loading; ``load``: of these, those
    without computing; ``requantize``: cycles of the pass before, an estimate. For either side
    ``issue``, ``scale``, ``empty``, ``room``: cycles of a PE that issue products, wait for scale
    units, pass empty groups, wait for room; ``macs``: what its products are worth. ``bound``: what
    needs most cycles by itself.
    """
    runs, ends = layer.runs(counts)
    cycles, waited, loading = layer.total(counts, runs, ends, latency)
    parts = np.add.reduceat(runs, np.concatenate([[0], ends[:-1]]))
    sums = (parts * np.bincount(layer.place)[:, None]).sum(0)
    outputs = np.bincount(layer.place, layer.outputs)
    products = (parts[:, [COLUMN["dense_products"], COLUMN["sparse_products"]]]
                * outputs[:, None]).sum(0) / (4 if subject.shape.mx else 1)

    def of(name):
        return int(sums[COLUMN[name]])

    found = {
        "layer": subject.name, "format": subject.shape.format.name, "macs": subject.macs,
        "nonzero_macs": round(subject.macs * float(subject.nonzero.mean())),
        "fp16": 4 * subject.macs / config.multipliers,
        "compute": of("compute"), "total": int(cycles), "load": int(waited),
        "requantize": requantize_cycles(subject.shape, plan, latency),
        "dense_busy": of("dense_busy"), "sparse_busy": of("sparse_busy"), "stall": of("stall"),
        "jobs": len(plan.jobs), "runs": int((np.diff(ends, prepend=0)[layer.place]).sum()),
    }
    needs = {"output": of("chunks"), "load": int(loading)}
    for side, worth in zip(("dense", "sparse"), products):
        pes = max(1, getattr(config, f"{side}_pes"))
        for cause in ("issue", "scale", "empty", "room"):
            found[f"{side}_{cause}"] = of(f"{side}_{cause}") / pes
        found[f"{side}_macs"] = float(worth)
        needs[side] = sum(found[f"{side}_{cause}"] for cause in ("issue", "scale", "empty"))
    found["bound"] = max(needs, key=needs.get)
    return found


def requantize_cycles(shape, plan, latency):
    """Cycles of the requantization pass, from the contract of `hw.requantizer`: an estimate."""
    words = shape.slots // shape.vector
    pixel = 4 * words + 1 + (shape.groups if shape.mx else 0)
    lists = sum(2 * size + 14 + (64 if shape.labelled else 1)
                for _, size, _ in shape.tiles(plan.tile_channels))
    return pixel * shape.pixels + lists + (shape.vector + 8) * words + 30 + latency


def profile(subjects, config, wanted, *, threshold=None, oracle=False, objective="total", seed=0,
            progress=None):
    """Rows of `measure`, with ``evaluation``, for all subjects in these evaluations.

    Parameters
    ----------
    subjects : list of Subject
    config : hw.config.Config
    wanted : numbers of evaluations
    threshold : share of zeros from which a channel is sparse; None: balanced lists
    oracle : lists follow from the counts of the evaluation itself
    objective : of `sim.tiler.plan`
    seed : of what is drawn
    progress : callable, called after each layer and evaluation, or None

    Raises
    ------
    sim.shape.FitError
        If a layer does not fit the core.
    """
    runs = [Run(subject, config, threshold, objective) for subject in subjects]
    rows = []
    for evaluation in wanted:
        for number, run in enumerate(runs):
            rng = np.random.default_rng([seed, evaluation, number])
            rows.append({"evaluation": evaluation,
                         **run.measure(run.draw(evaluation, rng, oracle))})
            if progress is not None:
                progress()
    return rows


def exact(model, config, wanted, *, objective="total", seed=0, progress=None):
    """Rows of the codes of a model's first image of ``seed``, in exact integers: (subjects, rows).

    Lists are balanced; the others as for `profile`.
    """
    subjects = {subject.name: subject for subject in from_model(model, config)}
    rows = []
    for call, counts in sampling.layer_calls(model, config, wanted, list(model.layers), seed=seed):
        subject = subjects[call.name]
        plan = plan_of(subject, config, objective)
        call = tiler.adjusted(call, plan)
        result = golden_layer.run(call, counts, config.vector, dense=config.dense_pes > 0,
                                  sparse=config.sparse_pes > 0)
        layer = Layer(subject.shape.kernel, plan.jobs, plan.share, config, subject.shape.residual)
        values = result.codes.codes[result.codes.valid] != 0
        subject = dataclasses.replace(subject, nonzero=np.array([float(values.double().mean())]))
        rows.append({"evaluation": call.evaluation, **measure(
            subject, plan, layer,
            [exact_counts(result.codes, channels, config) for channels in result.lists], config)})
        if progress is not None:
            progress()
    return list(subjects.values()), rows


def all_dense(config):
    """An all-dense core with as many multipliers: the yardstick of what zeros save.

    Raises
    ------
    ValueError
        If there is none: multipliers are no multiple of V.
    """
    named = PRESETS.get(f"{config.name}-dense")
    if named is not None and named.multipliers == config.multipliers:
        return named
    lanes = config.vector
    while config.multipliers % (config.vector * lanes):
        lanes //= 2
    if lanes < config.quad:
        raise ValueError(f"multipliers must be a multiple of {config.vector * config.quad} for an"
                         f" all-dense core, not {config.multipliers!r}")
    return dataclasses.replace(
        config, name=f"{config.name}-dense", sparse_pes=0, dense_lanes=lanes,
                   dense_scale_units=lanes,
                   dense_pes=config.multipliers // (config.vector * lanes))


def totals(rows, config):
    """Figures of some rows together: a dict.

    ``utilization``: products over what all multipliers could do, ``..._utilization`` those of a
    side, ``..._efficiency`` the same while it has work, ``..._scale`` and so on the share of the
    cycles that a PE of it spends so. ``balance``: mean of both sides' busy cycles over all.
    ``speedup_dense``: over the rows' ``dense_compute``, ``speedup_fp16``: over ``fp16``.
    """
    def total(name):
        return sum(row[name] for row in rows)

    compute = total("compute")
    found = {name: total(name) for name in (
        "macs", "nonzero_macs", "compute", "total", "load", "requantize", "stall")}
    found["utilization"] = (total("dense_macs") + total("sparse_macs")) / (
        compute * config.multipliers)
    for side in ("dense", "sparse"):
        multipliers = getattr(config, f"{side}_multipliers")
        busy = total(f"{side}_busy")
        found[f"{side}_utilization"] = (
            total(f"{side}_macs") / (compute * multipliers) if multipliers else None)
        found[f"{side}_efficiency"] = (
            total(f"{side}_macs") / (busy * multipliers) if multipliers and busy else None)
        for cause in ("scale", "empty", "room"):
            found[f"{side}_{cause}"] = total(f"{side}_{cause}") / compute
    found["balance"] = None
    if config.dense_pes and config.sparse_pes:
        found["balance"] = (total("dense_busy") + total("sparse_busy")) / (2 * compute)
    found["speedup_fp16"] = total("fp16") / compute
    dense = [row.get("dense_compute") for row in rows]
    found["speedup_dense"] = sum(dense) / compute if all(dense) else None
    return found


def report(subjects, rows, config, facts, objective="total"):
    """Everything as plain data, with keys that stay.

    ``layers``: for each subject its sizes, the sums of `totals` over its rows, and the rows;
    ``evaluations``: sums over the layers of each evaluation; ``totals``: of all rows, ``w4a4`` of
    the A4 layers, ``mxint8`` of the others. ``dense_compute`` is what an all-dense core takes.
    ``facts`` come first.
    """
    dense = dense_cycles(subjects, config, objective)
    by_layer = {subject.name: [] for subject in subjects}
    by_evaluation = {}
    for row in rows:
        row["dense_compute"] = dense.get(row["layer"])
        by_layer[row["layer"]].append(row)
        by_evaluation.setdefault(row["evaluation"], []).append(row)

    def figures(chosen):
        return totals(chosen, config) if chosen else None

    layers = []
    for subject in subjects:
        shape = subject.shape
        layers.append({
            "name": subject.name, "format": shape.format.name, "channels": list(shape.channels),
            "outputs": shape.outputs, "height": shape.height, "width": shape.width,
            "kernel": shape.kernel, **totals(by_layer[subject.name], config),
            "bound": common(row["bound"] for row in by_layer[subject.name]),
            "evaluations": by_layer[subject.name]})
    labelled = {subject.name for subject in subjects if subject.labelled}
    return {
        **facts, "preset": config.name, "multipliers": config.multipliers,
        "config": config.as_dict(),
        "totals": {
            "all": figures(rows),
            "w4a4": figures([row for row in rows if row["layer"] in labelled]),
            "mxint8": figures([row for row in rows if row["layer"] not in labelled])},
        "evaluations": [{"evaluation": number, **totals(chosen, config)}
                        for number, chosen in by_evaluation.items()],
        "layers": layers,
    }


def common(values):
    """The most frequent of some values, the first one of those."""
    values = list(values)
    return max(values, key=values.count)


def dense_cycles(subjects, config, objective):
    """Compute cycles of each layer on `all_dense`, by name; empty if there is no such core."""
    try:
        other = all_dense(config)
    except ValueError:
        return {}
    rows = profile(subjects, other, [0], objective=objective)
    return {row["layer"]: row["compute"] for row in rows}


def table(found):
    """Table of a `report`, for rich."""
    def share(value):
        return "" if value is None else f"{value:.1%}"

    def factor(value):
        return "" if value is None else f"{value:.2f}"

    title = f"Cycles on {found['preset']}, mean of {len(found['evaluations'])} evaluations"
    layers = Table(title=title, box=None, pad_edge=False)
    names = ("layer", "format", "MACs", "zeros", "cycles", "total", "bound", "dense", "sparse",
             "efficiency", "balance", "room", "x dense", "x FP16")
    for name in names:
        layers.add_column(
            name, justify="left" if name in ("layer", "format", "bound") else "right")
    count = len(found["evaluations"])
    for row in (*found["layers"], *(
            {"name": f"all {name}", "format": "", "bound": "", **figures}
            for name, figures in (("W4A4", found["totals"]["w4a4"]),
                                  ("MXINT8", found["totals"]["mxint8"]),
                                  ("layers", found["totals"]["all"])) if figures)):
        layers.add_row(
            row["name"], row["format"], f"{row['macs'] / count / 1e6:,.1f}M",
            share(1 - row["nonzero_macs"] / row["macs"]), f"{row['compute'] / count:,.0f}",
            f"{row['total'] / count:,.0f}", row["bound"], share(row["dense_utilization"]),
            share(row["sparse_utilization"]), share(row["sparse_efficiency"]),
            share(row["balance"]), share(row["stall"] / row["compute"]),
            factor(row["speedup_dense"]), factor(row["speedup_fp16"]))
    return layers
