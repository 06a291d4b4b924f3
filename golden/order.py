"""Channel order: an offline permutation that puts channels of similar activity into one group.

``python -m golden.order MODEL`` measures what it costs or brings in quality.

Only formats whose scales tie channels together need it. A permutation belongs to one layer's input:
codes are written and weights stored in that order, GroupNorm's gains and offsets go by the same
table, and every visible tensor keeps its order. With one scale a pixel over all channels the
layer computes the same function bit for bit, in any order.
"""

import argparse
import sys

import numpy as np
import rich.progress
import torch

from golden.checkpoint import write_json
from golden.fake import FakeQuantized, calibrate, levels, one_hot, sqnr
from golden.load import load
from golden.policy import POLICIES, Policy, formats, paper
from golden.sampler import STEPS, Sampler, draw_noise, sample

__all__ = ["ORDERS", "by_mean", "by_profile", "at_random", "orders", "inverse", "activity",
           "reordered", "measure"]

IMAGES = 4                 # of the runs that calibrate and measure
ROWS = {"groups of 16, E4M3": Policy(name="", group=16, weight_group=16),
        "int4-vsq": POLICIES["int4-vsq"],
        "all channels (pixel scale)": POLICIES["mixed"]}


def by_mean(zeros, vector=16):
    """Permutation (Cin,) of channels by their mean zeros, ascending.

    `zeros` are counts (evaluations, Cin), `vector` the channels of a group.
    """
    return np.argsort(zeros.astype(np.int64).sum(0), kind="stable")


def by_profile(zeros, vector=16):
    """Permutation (Cin,) that groups channels whose zeros run alike over the evaluations.

    Groups of `vector` channels are taken one after the other: the channel with the most zeros of
    all that are left, and those nearest to it (squared distance of `zeros` (evaluations, Cin)).
    """
    courses = zeros.astype(np.float64).T                         # (Cin, evaluations)
    left = by_mean(zeros)[::-1]                                  # most zeros first
    groups = []
    while len(left):
        distances = ((courses[left] - courses[left[0]]) ** 2).sum(1)
        nearest = np.argsort(distances, kind="stable")
        groups.append(left[nearest[:vector]])
        left = left[np.sort(nearest[vector:])]
    return np.concatenate(groups)


def at_random(zeros, vector=16):
    """A random permutation (Cin,), the same for as many channels."""
    return np.random.default_rng(zeros.shape[1]).permutation(zeros.shape[1])


ORDERS = {"mean": by_mean, "profile": by_profile}


def orders(trace):
    """Permutations of the labelled layers of a Trace, by name of the order and by layer.

    They follow from the model's calibration, not from what the trace counted.
    """
    return {name: {layer.name: made(layer.calibration, trace.vector) for layer in trace.labelled}
            for name, made in ORDERS.items()}


def inverse(order):
    """The permutation that undoes `order`."""
    undone = np.empty_like(order)
    undone[order] = np.arange(len(order))
    return undone


def activity(model, noise, progress=None):
    """Zero codes of the 4-bit layers in a sampling run of a FakeQuantized: (evaluations, Cin) each.

    A dict by layer. `progress` is called after each evaluation, without arguments.
    """
    counts, current = {}, 0

    def begin(evaluation, x):
        nonlocal current
        current = evaluation.index

    def observe(name, x):
        if model.formats[name][:2] == "A4":
            if name not in counts:
                counts[name] = np.zeros((len(model.sigmas), x.shape[1]), dtype=np.int64)
            counts[name][current] += (x == 0).sum((0, 2, 3)).numpy()

    def denoise(x, sigma):
        out = model(x, sigma, on_input=observe)
        if progress is not None:
            progress()
        return out

    sample(denoise, noise, model.steps, begin, sampler=Sampler.for_model(model))
    return counts


def reordered(model, permutations):
    """The FakeQuantized `model` with groups formed in these orders, a dict by layer.

    `golden.quantize.save` keeps the orders in the file.
    """
    return FakeQuantized(
        model.float_model, model.policy, model.formats, model.sigmas, model.amax, model.clips,
        record=model.record, steps=model.steps, label=model.label,
        orders={name: torch.from_numpy(np.ascontiguousarray(order, dtype=np.int64))
                for name, order in permutations.items()})


def measure(model, *, rows=None, images=IMAGES, steps=STEPS, label=None, progress=None):
    """What the channel order changes in quality: a list of dicts.

    Each has the ``policy``, the ``order``, ``sqnr_db`` of the denoiser (mean over the evaluations
    of a run of the float network) and ``zero_fraction`` of the 4-bit layers' codes.

    Parameters
    ----------
    model : Precond, with layers in MXINT8 by the paper's rule
    rows : dict by name of Policy, by default `ROWS`
    images : of the runs that calibrate (seed 0) and measure (seed 1)
    progress : callable (part of the work done) or None
    """
    model = model.half().float().eval().requires_grad_(False)
    rows = ROWS if rows is None else rows
    count = len(levels(model, steps))
    total, done = count * len(rows) * (3 + len(ORDERS)) + count, 0

    def advance(*_):
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / total)

    labels, states = one_hot(label, model.architecture), []

    def denoise(x, sigma):
        states.append((x, sigma, model(x, sigma, labels)))
        advance()
        return states[-1][2]

    sample(denoise, draw_noise(images, model.architecture, 1), steps,
           sampler=Sampler.for_model(model))
    found = []
    for name, policy in rows.items():
        chosen = formats(model.unet, policy, paper(model.unet))
        natural = FakeQuantized.from_calibration(
            model, policy, chosen, calibrate(model, chosen, policy, images=images, steps=steps,
                                             label=label), steps=steps, label=label)
        zeros = activity(natural, draw_noise(images, model.architecture, 0), advance)
        for order, made in {"natural": None, **ORDERS, "random": at_random}.items():
            changed = natural if made is None else reordered(
                natural, {layer: made(counts) for layer, counts in zeros.items()})
            ratios, seen = [], [0, 0]

            def observe(layer, x, seen=seen, changed=changed):
                if changed.formats[layer][:2] == "A4":
                    seen[0] += int((x == 0).sum())
                    seen[1] += x.numel()

            for x, sigma, right in states:
                ratios.append(sqnr(right, changed(x, sigma, on_input=observe)))
                advance()
            found.append({"policy": name, "order": order,
                          "sqnr_db": round(float(np.mean(ratios)), 3),
                          "zero_fraction": round(seen[0] / seen[1], 4)})
    return found


def markdown(table):
    """The table of `measure` as Markdown."""
    lines = ["| 4-bit layers | order | SQNR dB | zero codes |", "|---|---|---|---|"]
    lines += [f"| {row['policy']} | {row['order']} | {row['sqnr_db']:.2f} "
              f"| {row['zero_fraction']:.3f} |" for row in table]
    return "\n".join(lines)


def main(arguments=None):
    """The command: measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m golden.order", description=__doc__)
    parser.add_argument("model", help="shipped name or path of a model file")
    parser.add_argument("--images", type=int, default=IMAGES, help="of each sampling run")
    parser.add_argument("--json", help="file to write the measurements to")
    options = parser.parse_args(arguments)
    try:
        model, record = load(options.model)
        with rich.progress.Progress(transient=True) as bar:
            task = bar.add_task("channel order", total=1)
            table = measure(model, images=options.images,
                            progress=lambda part: bar.update(task, completed=part))
        print(markdown(table))
        if options.json:
            result = {"model": options.model, "record": record, "images": options.images,
                      "rows": table}
            write_json(options.json, result)
    except (ValueError, OSError) as error:
        print(f"order: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
