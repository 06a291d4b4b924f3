"""Expected work of a hybrid array on a trace: how much faster than all dense it can be.

Both sides together have the multipliers of the all-dense array; each side needs its work over its
share of them, and a layer takes as long as the slower side. Nothing else costs time here: no scale
operations, no rounding to words or lanes, no memory. So these are bounds.
"""

import dataclasses

import numpy as np

from golden.order import inverse
from golden.requantizer import slots

__all__ = ["RATIOS", "ROWS", "FULL", "Row", "Speed", "expected", "labelled_speed", "table",
           "thresholds", "intervals", "flips", "summary"]

RATIOS = {"3:1": 0.75, "1:1": 0.5, "1:3": 0.25}   # dense : sparse, and the dense share
FULL = 65536               # a threshold of all zeros
CUTS = 16                  # parts of a unit that is cut by pixels


@dataclasses.dataclass(frozen=True)
class Row:
    """What is put on one side or the other, and by which knowledge.

    Members
    -------
    unit : "channel", or "vector": words of V channels
    knowledge : "oracle" (the counts of this evaluation), "late" (of the one before; the
        calibration's before evaluation 0) or "static" (one split for all evaluations, from the
        calibration)
    cut : whether one unit may be divided by pixels
    order : name of the channel order in which words are formed, None for the natural one
    """

    unit: str
    knowledge: str
    cut: bool = False
    order: str = None

    @property
    def name(self):
        words = {"channel": "single channels", "vector": "vectors"}[self.unit]
        order = "" if self.order is None else f", ordered by {self.order}"
        cut = ", boundary cut by pixels" if self.cut else ""
        knowledge = {"oracle": "perfect labels", "late": "labels one evaluation late",
                     "static": "static labels"}[self.knowledge]
        return f"{words}{order}{cut}: {knowledge}"


KNOWLEDGE = ("oracle", "late", "static")
ROWS = (
    *(Row("channel", knowledge) for knowledge in KNOWLEDGE),
    *(Row("vector", knowledge, cut, order) for order in (None, "mean", "profile")
      for cut in (False, True) for knowledge in KNOWLEDGE))


@dataclasses.dataclass(frozen=True)
class Speed:
    """Sums over images, evaluations and layers, in multiplications.

    Members
    -------
    dense : work of an all-dense array
    time : that the hybrid array takes, times all multipliers
    best : the same with every unit, here channels, perfectly divided between both sides
    """

    dense: float
    time: float
    best: float

    @property
    def speedup(self):
        return self.dense / self.time

    @property
    def balance(self):
        """Share of `time` that a perfect division would take."""
        return self.best / self.time

    def __add__(self, other):
        return Speed(self.dense + other.dense, self.time + other.time, self.best + other.best)


def total(parts):
    """Sum of Speeds."""
    parts = list(parts)
    return sum(parts[1:], parts[0])


def units(layer, vector, order=None):
    """Unit of each channel if words of `vector` channels are formed.

    In natural order a word never holds channels of two segments; in a given `order`, a permutation
    of all channels, words are cut from it one after the other.
    """
    if order is None:
        return slots(list(layer.segments), vector)[0].numpy() // vector
    return inverse(np.asarray(order)) // vector


def grouped(values, unit):
    """Sums of `values` (..., Cin) over the channels of each unit: (..., units)."""
    return values @ np.eye(unit.max() + 1)[unit]


def expected(layer, row, dense_share, vector=16, order=None, interval=1):
    """Speed of one layer of a trace over all its images and evaluations.

    Units go to the sparse side from the sparsest on, as many as make both sides finish together by
    what is known; what they cost is what they have in this evaluation.

    Parameters
    ----------
    layer : TraceLayer
    row : Row
    dense_share : of all multipliers that the dense side has, in 0..1
    order : permutation of the channels, where `row` has one
    interval : evaluations between updates of what is known late
    """
    unit = (np.arange(layer.channels) if row.unit == "channel"
            else units(layer, vector, order if row.order else None))
    left = layer.pixels - layer.zeros.astype(np.float64)         # (images, evaluations, Cin)
    actual = grouped(left, unit)
    size = grouped(np.full(layer.channels, float(layer.pixels)), unit)
    guess = {"oracle": lambda: actual,
             "late": lambda: grouped(
                 layer.pixels - layer.known(interval).astype(np.float64), unit),
             "static": lambda: np.broadcast_to(grouped(
                 layer.pixels - layer.calibration.astype(np.float64), unit), actual.shape)}
    known = guess[row.knowledge]()
    static = row.knowledge == "static"
    # Sparsest first; one order for all evaluations if labels are static.
    density = (known.mean((0, 1), keepdims=True) if static else known) / size
    ranks = np.broadcast_to(np.argsort(density, axis=-1, kind="stable"), known.shape)
    spots = np.arange(0, len(size) * CUTS + 1) / CUTS if row.cut else np.arange(len(size) + 1.0)

    def times(work):
        """Time of every split, (images, evaluations, splits)."""
        sparse = running(np.take_along_axis(work, ranks, -1), spots)
        rest = size.sum() - running(size[ranks], spots)
        return slower(rest, sparse, dense_share)

    cost = times(known)
    if static:
        cost = np.broadcast_to(cost.sum((0, 1), keepdims=True), cost.shape)
    chosen = np.take_along_axis(times(actual), cost.argmin(-1)[..., None], -1)
    weight = layer.kernel ** 2 * layer.cout
    return Speed(weight * size.sum() * known.shape[0] * known.shape[1],
                 weight * float(chosen.sum()), weight * best(layer, dense_share))


def running(work, spots):
    """Sums of the first units of `work` (..., units) up to each of `spots`, which may cut one."""
    sums = np.concatenate([np.zeros((*work.shape[:-1], 1)), work.cumsum(-1)], -1)
    low = np.floor(spots).astype(np.int64)
    high = np.minimum(low + 1, work.shape[-1])
    return sums[..., low] + (sums[..., high] - sums[..., low]) * (spots - low)


def slower(dense, sparse, dense_share):
    """Time of the slower side, in units of all multipliers; a side without any has no work."""
    def side(work, share):
        return work / share if share else np.where(work > 0, np.inf, 0.0)

    return np.maximum(side(dense, dense_share), side(sparse, 1 - dense_share))


def best(layer, dense_share):
    """Least time of all images and evaluations, the boundary channel cut as fine as need be."""
    left = np.sort(layer.pixels - layer.zeros.astype(np.float64), -1)
    sparse = np.concatenate([np.zeros((*left.shape[:-1], 1)), left.cumsum(-1)], -1)
    dense = layer.pixels * np.arange(layer.channels, -1, -1.0)
    dense = np.broadcast_to(dense, sparse.shape)
    if dense_share in (0, 1):
        return float(slower(dense, sparse, dense_share).min(-1).sum())
    # Dense time falls and sparse time rises from split to split: where the lines cross.
    gap = dense / dense_share - sparse / (1 - dense_share)
    after = (gap <= 0).argmax(-1)[..., None]                     # at least 1: all dense has gap > 0
    low, high = (np.take_along_axis(gap, place, -1) for place in (after - 1, after))
    part = low / (low - high)
    ends = [np.take_along_axis(dense, place, -1) for place in (after - 1, after)]
    return float(((ends[0] + part * (ends[1] - ends[0])) / dense_share).sum())


def labelled_speed(layer, dense_share, threshold=None, interval=1):
    """Speed with the labels of a threshold (in units of 1/65536), by default the model's."""
    labels = layer.labels(threshold, interval)
    left = layer.pixels - layer.zeros.astype(np.float64)
    time = slower(layer.pixels * (~labels).sum(-1), (left * labels).sum(-1), dense_share)
    weight = layer.kernel ** 2 * layer.cout
    return Speed(weight * layer.pixels * labels.size, weight * float(time.sum()),
                 weight * best(layer, dense_share))


def table(trace, orders, rows=ROWS, ratios=None):
    """Speed-up over all dense of every row of `ROWS`: a list of dicts.

    Parameters
    ----------
    trace : Trace, with labelled layers
    orders : dict by name of dicts by layer of permutations, see `golden.order`
    ratios : dict by name of the dense side's share of the multipliers; by default `RATIOS`
    """
    found = []
    for row in rows:
        order = orders[row.order] if row.order else {}
        speeds = {name: total(expected(layer, row, share, trace.vector, order.get(layer.name))
                              for layer in trace.labelled).speedup
                  for name, share in (ratios or RATIOS).items()}
        found.append({"name": row.name, **dataclasses.asdict(row), "speedup": speeds})
    dense = sum(layer.macs for layer in trace.labelled)
    left = sum(layer.macs * (1 - float(layer.fractions().mean())) for layer in trace.labelled)
    found.append({"name": "all sparse", "unit": "channel", "knowledge": None, "cut": False,
                  "order": None, "speedup": dict.fromkeys(ratios or RATIOS, dense / left)})
    return found


def thresholds(trace, dense_share=0.5, interval=1, values=None):
    """Speed-up and balance by one threshold for all layers, in 0..1: a list of dicts.

    The last one, of ``threshold`` None, is for the layers' own thresholds.
    """
    found = []
    for value in [*(np.linspace(0, 1, 21).round(2) if values is None else values), None]:
        fixed = None if value is None else round(value * FULL)
        speed = total(labelled_speed(layer, dense_share, fixed, interval)
                      for layer in trace.labelled)
        found.append({"threshold": None if value is None else float(value),
                      "speedup": speed.speedup, "balance": speed.balance})
    return found


def intervals(trace, dense_share=0.5, threshold=None, values=None):
    """Speed-up, balance and label flips by update interval: a list of dicts.

    `threshold` is in 0..1; by default that of each layer of the model. ``balanced`` is the speed-up
    without threshold: single channels, as many on the sparse side as the counts advise.
    """
    fixed = None if threshold is None else round(threshold * FULL)
    found = []
    for value in values or [n for n in (1, 2, 4, 8, 16, 32) if n < 2 * trace.evaluations]:
        speed = total(labelled_speed(layer, dense_share, fixed, value)
                      for layer in trace.labelled)
        balanced = total(expected(layer, Row("channel", "late"), dense_share, interval=value)
                         for layer in trace.labelled)
        found.append({"interval": value, "balanced": balanced.speedup,
                      "speedup": speed.speedup, "balance": speed.balance,
                      "flips": float(flips(trace, threshold, value).mean())})
    return found


def flips(trace, threshold=None, interval=1):
    """Share of the labelled channels whose label differs from the evaluation before.

    (evaluations - 1,) mean over images; empty for one evaluation.
    """
    fixed = None if threshold is None else round(threshold * FULL)
    changed, channels = 0, 0
    for layer in trace.labelled:
        labels = layer.labels(fixed, interval)
        changed = changed + (labels[:, 1:] != labels[:, :-1]).mean(0).sum(-1)
        channels += layer.channels
    return changed / channels


def summary(trace, orders, threshold=None, interval=1):
    """What a trace shows, as plain data: by layer, by evaluation, and the expected work.

    Parameters
    ----------
    trace : Trace
    orders : as for `table`
    threshold : zero fraction from which a channel is sparse; by default that of each layer
    interval : evaluations between updates of the labels
    """
    fixed = None if threshold is None else round(threshold * FULL)
    layers = []
    for layer in trace.layers.values():
        row = {"layer": layer.name, "format": layer.format.name, "channels": layer.channels,
               "macs": layer.macs}
        if layer.counted:
            zeros = layer.fractions()
            by_channel = zeros.mean((0, 1))
            row |= {"zero_fraction": float(zeros.mean()), "emptiest_channel": by_channel.max(),
                    "fullest_channel": by_channel.min(),
                    "by_evaluation": zeros.mean((0, 2)).tolist()}
        if layer.labelled:
            row |= {"threshold": (layer.threshold if fixed is None else fixed) / FULL,
                    "sparse_share": float(layer.labels(fixed, interval).mean())}
        layers.append(row)
    return {
        **{field.name: getattr(trace, field.name) for field in dataclasses.fields(trace)
           if field.name != "layers"},
        "zero_fraction": trace.zero_fraction(),
        "zero_fraction_of_evaluations": mean_zeros(trace).tolist(),
        "interval": interval,
        "flips": flips(trace, threshold, interval).tolist(),
        "work": table(trace, orders),
        "thresholds": thresholds(trace, interval=interval),
        "intervals": intervals(trace, threshold=threshold),
        "layers": layers,
    }


def mean_zeros(trace):
    """Zero fraction of the labelled layers in each evaluation, weighted by MACs: (evaluations,)."""
    total = sum(layer.macs for layer in trace.labelled)
    return sum(layer.macs / total * layer.fractions().mean((0, 2)) for layer in trace.labelled)
