"""What zeros cost: quality of fine-tuned networks against their share of zero codes.

``python -m golden.tradeoff BASELINE MODEL... --data DIR --json FILE --picture FILE`` measures
models that `sqdm train` made and prints the table of ``docs/training.md``.
"""

import argparse
import pathlib
import sys

import rich.progress

from golden import data, pictures, quality, quantize
from golden.checkpoint import write_json
from golden.load import load
from golden.sampler import STEPS

__all__ = ["measure", "markdown", "main"]

IMAGES = 2048              # held out
LIMIT = 0.10               # of loss, that the fine-tuned model may cost over the baseline


def measure(baseline, models, images, *, calibration_images=None, steps=STEPS,
            progress=None):
    """Measure `models` against the float `baseline`, on the same images, noise and resamples.

    A model with ReLU is quantized first; one with SiLU is measured in float, as the control that
    got the same training.

    Parameters
    ----------
    baseline : Precond
    models : dict by name of (Precond, record)
    images : (N, C, H, W) in [-1, 1], held out from training
    calibration_images, steps : of the sampling runs that calibrate, by default quantize's; zeros
        are counted there
    progress : callable (models done, models) or None

    Returns a list of dicts: ``name``, ``quantized``, ``zeros`` (of a sampling run, or None),
    ``edm_loss``, ``loss`` ([value, low, high]: EDM's loss over the baseline's, less 1, with the
    bounds of the 95 % bootstrap interval of the pairs), ``steps``, ``target`` and ``strength``.
    """
    held = quality.hold(images, baseline.sigma_min, baseline.sigma_max, levels=())
    weights = quality.resamples(len(images))

    def lost(model):
        return quality.losses(model, held, baseline.sigma_data)[quality.LOGNORMAL]

    right, found = lost(baseline), []
    for name, (model, record) in models.items():
        quantized = model.architecture.activation == "relu"
        zeros = None
        if quantized:
            model = quantize.quantize_model(model, {}, images=calibration_images, steps=steps)
            zeros = round(quantize.zero_fraction(model), 4)
        losses, how = lost(model), record.get("finetune") or {}
        found.append({
            "name": name, "quantized": quantized, "zeros": zeros,
            "edm_loss": round(losses.mean().item(), 6),
            "loss": quality.relative(losses, right, weights).as_list(),
            "steps": record.get("steps"), "target": how.get("zeros"),
            "strength": how.get("strength") if how.get("zeros") else None})
        if progress is not None:
            progress(len(found), len(models))
    return found


def markdown(points):
    """The table of `measure` as Markdown."""
    lines = ["| model | zeros aimed at | zero codes | loss | steps |", "|---|---|---|---|---|"]
    for point in points:
        value, low, high = (100 * bound for bound in point["loss"])
        target, zeros = ("-" if share is None else f"{share:.3f}"
                         for share in (point["target"], point["zeros"]))
        lines.append(f"| {point['name']} | {target} | {zeros} "
                     f"| {value:+.1f} % ({low:+.1f} to {high:+.1f}) | {point['steps']} |")
    return "\n".join(lines)


def main(arguments=None):
    """The command: measure, print the table, write JSON and picture; 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m golden.tradeoff", description=__doc__)
    parser.add_argument("baseline", help="float SiLU model: shipped name or path")
    parser.add_argument("models", nargs="+", help="fine-tuned models, TITLE=PATH or PATH")
    parser.add_argument("--data", help="folder of the data set (or SQDM_DATA)")
    parser.add_argument("--images", type=int, default=IMAGES, help="held-out images")
    parser.add_argument("--json", help="file to write the points to")
    parser.add_argument("--picture", help="PNG file to draw")
    options = parser.parse_args(arguments)
    try:
        if options.images < 2:
            raise ValueError(f"images must be at least 2, not {options.images!r}")
        baseline, record = load(options.baseline)
        models = {}
        for text in options.models:
            title, _, path = text.rpartition("=")
            models[title or pathlib.Path(path).stem] = load(path)
        pixels = data.load(record.get("data"), options.data, "test").pixels[:options.images]
        with rich.progress.Progress() as bar:
            task = bar.add_task("models", total=len(models))
            points = measure(baseline, models, data.to_float(pixels),
                             progress=lambda done, total: bar.update(task, completed=done))
        print(markdown(points))
        if options.json:
            result = {"baseline": options.baseline, "record": record, "images": len(pixels),
                      "points": points}
            write_json(options.json, result)
        if options.picture:
            pictures.tradeoff(options.picture, points, LIMIT)
    except (ValueError, OSError) as error:
        print(f"tradeoff: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
