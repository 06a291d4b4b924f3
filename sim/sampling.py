"""Layer calls of a sampling run: what the RTL executes when a model makes an image."""

import fnmatch

from golden.quantized_network import evaluate
from golden.sampler import draw_noise, evaluations, sample
from sim import lowering

__all__ = ["EVERY", "parse_evaluations", "select_layers", "states", "layer_calls"]

EVERY = "*"


def parse_evaluations(text, model):
    """Numbers of evaluations from "0,9,17", "0-3,34" or "all", ascending.

    Raises
    ------
    ValueError
        If the text is something else, or a number is not in the schedule of `model`.
    """
    last = len(evaluations(model.steps)) - 1
    if text == "all":
        return list(range(last + 1))
    found = set()
    for part in text.split(","):
        first, dash, end = part.strip().partition("-")
        if not first.isdecimal() or (dash and not end.isdecimal()):
            raise ValueError(
                f"evaluations must be numbers like 0,9,17 or 0-3, or all, not {text!r}")
        found |= set(range(int(first), int(end if dash else first) + 1))
    if not found or max(found) > last:
        raise ValueError(f"evaluations must be in 0..{last}, not {text!r}")
    return sorted(found)


def select_layers(text, model):
    """Names of the layers that match `text`, globs or names between commas, in execution order.

    Raises
    ------
    ValueError
        If a part matches no layer.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not fnmatch.filter(model.layers, part):
            raise ValueError(f"layers must match some of {', '.join(model.layers)}, not {part!r}")
    return [name for name in model.layers
            if any(fnmatch.fnmatchcase(name, part) for part in parts)]


class _Enough(Exception):
    """The sampler has come as far as needed."""


def states(model, wanted, seed=0):
    """The sampler's state (1, C, H, W) before each evaluation in `wanted`, a dict.

    The run is that of the first image of `seed`, by fake quantization.
    """
    kept = {}

    def keep(evaluation, x):
        if evaluation.index in wanted:
            kept[evaluation.index] = x.float()
        if evaluation.index == max(wanted):
            raise _Enough

    try:
        sample(model, draw_noise(1, model.architecture, seed), model.steps, keep)
    except _Enough:
        pass
    return kept


def layer_calls(model, config, wanted, layers, *, seed=0, interval=1, thresholds=None):
    """Yield (LayerCall, counts) for `sim.simulate.simulate`, in execution order.

    Parameters
    ----------
    model : golden.quantized_network.QuantizedModel
    config : hw.config.Config
    wanted : numbers of evaluations, ascending
    layers : names of layers, see `select_layers`
    seed : of the image
    interval : evaluations between updates of the labels
    thresholds : dict by layer name, in place of the model's

    Labels follow from the counts of the last evaluation that updated them, whether it is wanted or
    not; before evaluation 0, from the calibration's.

    Raises
    ------
    sim.lowering.FitError
        Before the first call of an evaluation, if any of its layers does not fit.
    """
    options = {"vector": config.vector, "interval": interval, "thresholds": thresholds}
    updates = {index: (index - 1) // interval * interval for index in wanted if index}
    inputs = states(model, {*wanted, *updates.values()}, seed)
    detector = model.detector(config.vector)
    held = None   # the evaluation whose counts the detector has
    for index in wanted:
        update = updates.get(index)
        if update != held:
            evaluate(model, inputs[update], update, detector, **options)
        before = detector.counts.clone()
        calls = evaluate(model, inputs[index], index, detector, **options).calls
        held = index if index % interval == 0 else update
        chosen = [call for call in calls if call.name in layers]
        for call in chosen:
            lowering.check_fit(call, config)
        for call in chosen:
            item = model.layers[call.name]
            first = call.detector_base
            yield call, (before[first:first + item.slots(config.vector)]
                         if item.sparse_capable else None)
