"""Which layers need MXINT8: what each one alone in 4 bits does to the denoiser."""

import math

import torch

from golden.fake import FakeQuantized, executing, one_hot
from golden.network import layer_shapes
from golden.policy import formats

__all__ = ["BUDGET", "measure", "check_budget", "pick"]

BUDGET = 0.034             # share of the MACs, where an 8-bit product costs four of 4 bits
UNITS = 1000


@torch.no_grad()
def measure(model, policy, calibration, *, label=None, progress=None):
    """Error of the denoiser with one layer at a time in 4 bits, all others in float.

    The noise levels are those of the states that `calibration` kept, x being what the float
    sampler had there. Errors are relative: what the layer changes in the network's raw output F,
    over F, squared, mean over the noise levels. As EDM trains F to unit variance, that is what
    the layer adds to EDM's loss.

    Parameters
    ----------
    model : Precond
    policy : Policy of 4-bit codes
    progress : callable (layers done, layers) or None

    Returns a list in execution order of dicts with ``name``, ``error``, ``sqnr_db`` (of it) and
    ``macs``. Layers that read the network's input are not in it.
    """
    unet, labels = model.unet, one_hot(label, model.architecture)
    fake = FakeQuantized.from_calibration(model, policy, formats(unet, policy), calibration)
    layers = [layer for layer in unet.layers() if fake.formats[layer.name][:2] == "A4"]
    shapes = {shape.name: shape for shape in layer_shapes(unet)}
    errors = dict.fromkeys((layer.name for layer in layers), 0.0)
    for place, (sigma, x) in enumerate(calibration.states):
        outputs = {}

        def remember(layer, *arguments, outputs=outputs):
            outputs[layer.name] = layer(*arguments)
            return outputs[layer.name]

        with executing(unet, remember):
            model(x, sigma, labels)
        right = outputs["last"]
        fake.set_levels(torch.full((len(x),), sigma))
        for number, single in enumerate(layers):
            changed = OneRounded(single, fake, outputs)
            with executing(unet, changed):
                model(x, sigma, labels)
            ratio = (changed.last - right).double().square().sum() / right.double().square().sum()
            errors[single.name] += ratio.item() / len(calibration.states)
            if progress is not None:
                progress(place * len(layers) + number + 1, len(calibration.states) * len(layers))
    return [{"name": name, "error": error,
             "sqnr_db": round(-10 * math.log10(error), 2) if error else None,
             "macs": shapes[name].macs} for name, error in errors.items()]


class OneRounded:
    """An executor that rounds the operands of one layer and runs the others in float.

    Before that layer nothing changes: `outputs`, by layer, are taken as they are. `last` is the
    last layer's result.
    """

    def __init__(self, single, fake, outputs):
        self.single, self.fake, self.outputs, self.last = single, fake, outputs, None
        self.reached = False

    def __call__(self, layer, *arguments):
        if layer is self.single:
            self.reached = True
            self.last = self.fake.run_layer(layer, *arguments)
        else:
            self.last = layer(*arguments) if self.reached else self.outputs[layer.name]
        return self.last


def check_budget(budget):
    """`budget` if it is a share; ValueError unless it is in 0..1."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1:
        raise ValueError(f"budget must be in 0..1, not {budget!r}")
    return budget


def pick(found, budget):
    """Names of the layers that MXINT8 takes within a share `budget` of these layers' MACs.

    Those whose errors sum to the most: a knapsack, solved in units of 1/`UNITS` of the budget.

    Parameters
    ----------
    found : list of dicts of `measure`

    Raises ValueError unless `budget` is in 0..1.
    """
    limit = check_budget(budget) * sum(item["macs"] for item in found)
    best = [(0.0, frozenset())] * (UNITS + 1)      # by units that may be spent
    for item in found:
        size = math.ceil(item["macs"] / limit * UNITS) if limit else UNITS + 1
        for units in range(UNITS, size - 1, -1):
            error, names = best[units - size]
            if error + item["error"] > best[units][0]:
                best[units] = (error + item["error"], names | {item["name"]})
    return set(best[UNITS][1])
