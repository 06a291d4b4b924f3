"""Layer calls of a sampling run: what the RTL executes when a model makes an image."""

import dataclasses
import fnmatch

import numpy as np
import torch

from golden import quantize
from golden.quantized_network import evaluate
from golden.requantizer import spread
from golden.sampler import Sampler, draw_noise, evaluations, sample
from hw.descriptor import Format
from sim import lowering, tiler
from sim.shape import Shape

__all__ = ["parse_evaluations", "select_layers", "thresholds_for", "plans", "states",
           "layer_calls"]


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


def thresholds_for(model, config, fraction=None):
    """Threshold of every layer, by name, for the threshold mode.

    With `fraction`, a channel is sparse where that share of its activations was 0. By default those
    with which both sides of `config` need the fewest cycles on the calibration's zero counts.

    Raises
    ------
    ValueError
        If `fraction` is not in 0..1.
    """
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"threshold must be in 0..1, not {fraction!r}")
        return quantize.fixed(model, fraction)
    return quantize.balance(
        model, config.dense_multipliers, config.sparse_multipliers,
        dense_lanes=config.dense_lanes, sparse_lanes=config.sparse_lanes, vector=config.vector)


def plans(model, config, layers=None, objective="total"):
    """`sim.tiler.Plan` of each layer in `layers` (names; by default all), by name.

    The density of non-zeros is that of the calibration, in whole percent; `objective` is the
    tiler's.

    Raises
    ------
    sim.shape.FitError
        If a layer does not fit the core.
    """
    found = {}
    for name in model.layers if layers is None else layers:
        item = model.layers[name]
        shape = Shape(
            format=Format(int(item.format)), kernel=item.kernel, height=item.height,
            width=item.width, channels=tuple(item.segments), outputs=len(item.weight_codes),
            vector=config.vector, residual=item.residual_exponent is not None)
        zeros = float(item.zeros.double().mean()) / (item.height * item.width)
        density = tiler.density(shape, 1 - zeros)
        found[name] = lowering.check_shape(name, shape, config, density=density,
                                           objective=objective)
    return found


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
        sample(model, draw_noise(1, model.architecture, seed), model.steps, keep,
               sampler=Sampler.for_model(model))
    except _Enough:
        pass
    return kept


def layer_calls(model, config, wanted, layers, *, seed=0, interval=1, thresholds=None,
                trace=None):
    """Yield (LayerCall, counts) for `sim.simulate.simulate`, in execution order.

    Parameters
    ----------
    model : golden.quantized_network.QuantizedModel
    config : hw.config.Config
    wanted : numbers of evaluations, ascending
    layers : names of layers, see `select_layers`
    seed : of the image
    interval : evaluations between updates of the counts
    thresholds : dict by layer name, from which zero fraction on a channel is sparse; None: balanced
        mode, in which the counts divide the work between both sides
    trace : golden.trace.Trace of the model and seed whose counts are taken, or None: then the
        evaluations that gave them are replayed

    Tiles of channels and costs are those of `plans`. Counts are those of the last evaluation that
    updated them, whether it is wanted or not; before evaluation 0, the calibration's. `layers` take
    the core's detector entries one after the other.

    Raises
    ------
    golden.trace.TraceError
        If `trace` is of another model, seed or V.
    sim.shape.FitError
        Before the first call of an evaluation, if any of its layers does not fit.
    """
    found = plans(model, config, layers)

    def adjust(call):
        plan = found.get(call.name)
        return call if plan is None else tiler.adjusted(call, plan, balanced=thresholds is None)

    options = {"vector": config.vector, "interval": interval, "thresholds": thresholds,
               "adjust": adjust, "dense": config.dense_pes > 0, "sparse": config.sparse_pes > 0}
    bases, total = {}, 0
    for name in layers:
        bases[name] = total
        total += model.layers[name].slots(config.vector) * model.layers[name].sparse_capable
    updates = {index: (index - 1) // interval * interval for index in wanted if index}
    if trace is not None:
        trace.check_model(model, seed=seed, vector=config.vector)
    inputs = states(model, {*wanted, *(updates.values() if trace is None else ())}, seed)
    detector = model.detector(config.vector)
    held = None   # the evaluation whose counts the detector has
    for index in wanted:
        update = updates.get(index)
        if update is not None and trace is not None:
            load_counts(model, detector, trace, update)
        elif update != held:
            evaluate(model, inputs[update], update, detector, **options)
        before = detector.counts.clone()
        calls = evaluate(model, inputs[index], index, detector, **options).calls
        held = index if index % interval == 0 else update
        chosen = [(call.detector_base, dataclasses.replace(call, detector_base=bases[call.name]))
                  for call in calls if call.name in bases]
        for _, call in chosen:
            lowering.check_fit(call, config, found[call.name])
        for first, call in chosen:
            item = model.layers[call.name]
            yield call, (before[first:first + item.slots(config.vector)]
                         if item.sparse_capable else None)


def load_counts(model, detector, trace, evaluation):
    """Give `detector` the counts of the first image of `trace` after an evaluation."""
    for name, base in model.bases(trace.vector).items():
        item = model.layers[name]
        if item.sparse_capable:
            counts = torch.from_numpy(trace.layers[name].zeros[0, evaluation].astype(np.int64))
            slots = spread(counts, item.segments, trace.vector)
            # A slot without a channel is all zeros, as the core counts it.
            valid = spread(torch.ones_like(counts), item.segments, trace.vector)
            detector.load(base, torch.where(valid > 0, slots, item.height * item.width))
