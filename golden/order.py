"""Channel order: an offline permutation that puts channels of similar activity into one group.

Only formats whose scales tie channels together need it. A permutation belongs to one layer's input:
codes are written and weights stored in that order, GroupNorm's gains and offsets go by the same
table, and every visible tensor keeps its order. With one scale a pixel over all channels the
layer computes the same function bit for bit, in any order.
"""

import numpy as np

__all__ = ["ORDERS", "by_mean", "by_profile", "orders", "inverse"]


def by_mean(layer):
    """Permutation (Cin,) of a TraceLayer's channels by the calibration's mean zeros, ascending."""
    return np.argsort(layer.calibration.astype(np.int64).sum(0), kind="stable")


def by_profile(layer, vector=16):
    """Permutation (Cin,) that groups channels whose zeros run alike over the evaluations.

    Groups of `vector` channels are taken one after the other: the channel with the most zeros of
    all that are left, and those nearest to it (squared distance of the calibration's courses over
    the evaluations).
    """
    courses = layer.calibration.astype(np.float64).T / layer.pixels       # (Cin, evaluations)
    left = by_mean(layer)[::-1]                                           # most zeros first
    groups = []
    while len(left):
        distances = ((courses[left] - courses[left[0]]) ** 2).sum(1)
        nearest = np.argsort(distances, kind="stable")
        groups.append(left[nearest[:vector]])
        left = left[np.sort(nearest[vector:])]
    return np.concatenate(groups)


ORDERS = {"mean": by_mean, "profile": by_profile}


def orders(trace):
    """Permutations of the labelled layers of a Trace, by name of the order and by layer."""
    return {"mean": {layer.name: by_mean(layer) for layer in trace.labelled},
            "profile": {layer.name: by_profile(layer, trace.vector) for layer in trace.labelled}}


def inverse(order):
    """The permutation that undoes `order`."""
    undone = np.empty_like(order)
    undone[order] = np.arange(len(order))
    return undone
