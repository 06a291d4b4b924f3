"""Fake quantization: a float network whose operands are rounded as a policy says.

Every policy has this execution; those of the accelerator also have the integers of
`golden.quantized_network`. Calibration, for both, observes a sampling run of the float network.
"""

import contextlib
import dataclasses
import math

import torch
from torch.nn import functional

from golden import a4, mxint8, w4
from golden.granularity import largest_scale
from golden.policy import FORMATS, scattered, takes_means
from golden.sampler import STEPS, Sampler, draw_noise, evaluations, sample
from golden.scatter import plane_bias, plane_weights

__all__ = ["HEADROOM", "Calibration", "calibrate", "FakeQuantized", "executing", "one_hot",
           "levels", "round_weight", "round_activation", "layer_sqnr", "sqnr"]

HEADROOM = 2.0             # of static scales over the calibration's largest magnitude
# Noise levels at which layers are compared with float, where the run is nearest to them: the 10th,
# 30th, 50th, 70th and 90th percentile of EDM's training levels (Karras et al. 2022, table 1).
TYPICAL = tuple(math.exp(-1.2 + 1.2 * z) for z in (-1.2816, -0.5244, 0.0, 0.5244, 1.2816))
KEPT = 4                   # calibration images for one kept there
ACTIVATION_CLIPS = tuple(n / 20 for n in range(20, 3, -1))
WEIGHT_CLIPS = tuple(n / 20 for n in range(20, 5, -1))


@contextlib.contextmanager
def executing(unet, executor):
    """Let `executor` run the layers of `unet`."""
    before, unet.executor = unet.executor, executor
    try:
        yield
    finally:
        unet.executor = before


def one_hot(label, architecture):
    """Labels (1, label_dim) of the class `label`, or None for no class.

    Raises ValueError if the network has no such class.
    """
    if label is None:
        return None
    count = architecture.label_dim
    if not count:
        raise ValueError(f"label must not be given: the network has no classes, not {label!r}")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
        raise ValueError(f"label must be in 0..{count - 1}, not {label!r}")
    return functional.one_hot(torch.tensor([label]), count).float()


def levels(model, steps):
    """Evaluations of a Heun run of `steps` over the noise levels of the Precond `model`."""
    return evaluations(steps, Sampler.for_model(model))


def sqnr(reference, other):
    """Signal of `reference` over its difference to `other`, in dB; infinite if there is none."""
    signal, error = reference.double().square().sum(), (reference - other).double().square().sum()
    return 10 * math.log10(signal / error) if error and signal else math.inf


@dataclasses.dataclass
class Calibration:
    """What a sampling run of the float network showed, by layer where it is a dict.

    Members
    -------
    sigmas : noise levels of the evaluations, (E,) float64
    amax : largest magnitude of each channel of the convolution's input, (E, Cin), less channel
        means where they are taken out
    extremes : dict by place of largest magnitudes: "sum" (before bias), "output", "residual",
        "constant" (all that is constant over the image, with the gain), "segment0", "segment1",
        "input"; "sum" and "output" of a scattered layer are those of its planes
    sources : names of the layers that made its segments and its residual, None where the host did
    gains : of the layers
    embeddings : (E, Cout), of the layers that add one
    modulations : (E, 2, Cin), of the layers that have one
    clips : part of the largest magnitude with the least squared error, where the policy wants it
    states : list of (sigma, x), those of the run at typical noise levels
    """

    sigmas: torch.Tensor
    amax: dict
    extremes: dict
    sources: dict
    gains: dict
    embeddings: dict
    modulations: dict
    clips: dict
    states: list


class Observer:
    """An executor that runs the float network and keeps what `Calibration` lists."""

    def __init__(self, count, formats, policy, scattered=()):
        self.count, self.formats, self.policy = count, formats, policy
        self.scattered = scattered
        self.amax, self.extremes, self.sources, self.gains = {}, {}, {}, {}
        self.embeddings, self.modulations, self.errors = {}, {}, {}
        self.alive, self.evaluation = [], 0

    def begin(self, evaluation):
        self.evaluation = evaluation
        self.alive.clear()

    def __call__(self, layer, segments, embedding, residual, gain, modulation):
        name = layer.name
        makers = {id(tensor): maker for tensor, maker in self.alive}
        self.sources[name] = ([makers.get(id(segment)) for segment in segments],
                              makers.get(id(residual)))
        self.gains[name] = gain
        x = layer.prologue(segments, modulation)
        bias = layer.bias[None] if embedding is None else layer.bias + embedding[:1]
        if takes_means(layer, self.formats[name]) and self.policy.skips != "plain":
            mean = x.mean((2, 3), keepdim=True)
            x, bias = x - mean, bias[:, :, None, None] + functional.conv2d(mean, layer.weight)
        else:
            bias = bias[:, :, None, None]
        total = functional.conv2d(x, layer.weight, None, padding=layer.kernel // 2)
        out = total + bias
        out = (out if residual is None else out + residual) * gain
        seen = {"sum": total, "output": out, "constant": bias * gain}
        if name in self.scattered:
            seen["sum"] = functional.conv2d(x, plane_weights(layer.weight))
            seen["output"] = (seen["sum"] + plane_bias(layer.bias)[:, None, None]) * gain
        seen |= {f"segment{n}": segment for n, segment in enumerate(segments)}
        if residual is not None:
            seen["residual"] = residual
        amax = self.keep(self.amax, name, x.abs().amax((0, 2, 3)))
        kept = self.extremes.setdefault(name, {})
        for place, tensor in seen.items():
            low, high = tensor.aminmax()
            kept[place] = max(kept.get(place, 0.0), -low.item(), high.item())
        kept["input"] = max(kept.get("input", 0.0), amax.max().item())
        if embedding is not None:
            self.keep(self.embeddings, name, embedding[0].float())
        if modulation is not None:
            self.keep(self.modulations, name, torch.stack([part[0] for part in modulation]).float())
        if self.policy.clip and self.formats[name] in ("A8U", "A8S", "A4U", "A4S"):
            self.try_clips(name, x)
        self.alive.append((out, name))
        return out

    def keep(self, table, name, value):
        """Put `value` into the row of this evaluation."""
        if name not in table:
            table[name] = value.new_zeros(self.count, *value.shape)
        table[name][self.evaluation] = value
        return value

    def try_clips(self, name, x):
        """Add up squared errors of candidates, over the signal, on the first image."""
        bits, signed = FORMATS[self.formats[name]]
        x = x[:1]
        signal = x.square().sum().clamp(min=1e-30)
        errors = [((a4.fake_quantize(x, signed, 1.0, block=None, scale="fp32", bits=bits, clip=clip)
                    - x).square().sum() / signal).item() for clip in ACTIVATION_CLIPS]
        found = self.errors.setdefault(name, torch.zeros(len(errors), dtype=torch.float64))
        found += torch.tensor(errors, dtype=torch.float64)


@torch.no_grad()
def calibrate(model, formats, policy, *, images, seed=0, steps=STEPS, label=None, progress=None):
    """Calibration of the Precond `model` from a Heun run over all its noise levels.

    Parameters
    ----------
    formats : of the layers, by name
    images, seed : of the run's noise
    label : class of the images, or None
    progress : callable (evaluations done, evaluations) or None
    """
    sampler, labels = Sampler.for_model(model), one_hot(label, model.architecture)
    order = evaluations(steps, sampler)
    kept = {min(order, key=lambda item, level=level: abs(math.log(item.sigma / level))).index
            for level in TYPICAL}
    observer, states = Observer(len(order), formats, policy, scattered(model.unet)), []

    def begin(evaluation, x):
        observer.begin(evaluation.index)
        if evaluation.index in kept:
            states.append((evaluation.sigma, x[:-(-images // KEPT)].float()))
        if progress is not None:
            progress(evaluation.index, len(order))

    with executing(model.unet, observer):
        sample(lambda x, sigma: model(x, sigma, labels),
               draw_noise(images, model.architecture, seed), steps, begin, sampler=sampler)
    clips = {name: ACTIVATION_CLIPS[int(errors.argmin())]
             for name, errors in observer.errors.items()}
    sigmas = torch.tensor([evaluation.sigma for evaluation in order], dtype=torch.float64)
    return Calibration(sigmas, observer.amax, observer.extremes, observer.sources, observer.gains,
                       observer.embeddings, observer.modulations, clips, states)


def round_weight(weight, format, policy):
    """`weight` (Cout, Cin, k, k) rounded to what codes and scales represent."""
    if format == "FP16":
        return weight.half().float()
    if format == "IN16":
        return mxint8.fake_quantize_input_weights(weight)
    if format == "MX8":
        return mxint8.fake_quantize(weight)
    bits, whole = FORMATS[format][0], policy.weight_taps == "whole"
    amax = weight.abs().amax((1, 2, 3)) if policy.weight_level == "channel" else weight.abs().max()
    n = (1 << bits - 1) - 1
    unit = amax / (n * largest_scale(policy.weight_scale))
    unit = torch.where(unit > 0, unit, 1.0)

    def rounded(clip):
        return w4.fake_quantize(
            weight, group=policy.weight_group, shared_taps=policy.weight_taps != "each",
            scale=policy.weight_scale, tensor_scale=unit, whole=whole, bits=bits, clip=clip)

    if not policy.clip:
        return rounded(1.0)
    errors = torch.stack([(rounded(clip) - weight).square().sum((1, 2, 3))
                          for clip in WEIGHT_CLIPS])              # (clips, Cout)
    errors = errors.sum(1, keepdim=True).expand_as(errors) if whole else errors
    return rounded(torch.tensor(WEIGHT_CLIPS, device=weight.device)[errors.argmin(0)])


def round_activation(x, format, policy, amax, clip=1.0):
    """The convolution's input `x` (N, C, H, W) rounded to what codes and scales represent.

    `amax` is what calibration found: (C,), largest over all evaluations; (N, C), at each image's
    own noise level, where the policy has static scales by step.
    """
    if format == "FP16":
        return x.half().float()
    if format == "MX8":
        return mxint8.fake_quantize(x)
    if format == "IN16":
        return mxint8.fake_quantize_input(x, mxint8.input_scale(amax.max().item() * HEADROOM))
    bits, signed = FORMATS[format]
    n = a4.largest(signed, bits)
    if policy.static:
        if policy.static != "channel":
            amax = amax.amax(-1)
            amax = amax[:, None, None, None] if amax.dim() else amax
        return a4.fake_quantize_static(x, signed, amax * clip / n, bits=bits)
    if policy.level == "image":
        found = x.abs().amax((1, 2, 3), keepdim=True)
    else:
        # Four bits of scale have no headroom to spare.
        found = amax.max() * (1.0 if policy.scale == "int4" else HEADROOM)
    unit = found / (n * largest_scale(policy.scale))
    unit = torch.where(unit > 0, unit, 1.0)
    return a4.fake_quantize(x, signed, unit, group=policy.group, block=policy.block,
                            scale=policy.scale, bits=bits, clip=clip)


class FakeQuantized:
    """The Precond `float_model` with rounded operands; call it like the Precond.

    Members
    -------
    float_model : Precond
    policy : Policy
    formats : of the layers, a dict by name in execution order
    sigmas : noise levels of the calibration, (E,) float64
    amax : largest magnitudes of the layers' inputs, (E, Cin) by layer
    clips : by layer, see `Calibration`
    record : JSON values about the origin of the model
    steps : Heun steps of the calibration
    label : class that is taken where none is given, or None
    orders : by layer, permutations (Cin,) int64 in which input channels form groups; none: natural
    """

    def __init__(self, float_model, policy, formats, sigmas, amax, clips, *, record=None,
                 steps=STEPS, label=None, orders=None):
        self.float_model, self.policy, self.formats = float_model, policy, formats
        self.sigmas, self.amax = sigmas, amax
        self.clips = {name: clips.get(name, 1.0) for name in formats}
        self.record, self.steps, self.label = record or {}, steps, label
        self.largest = {name: value.amax(0) for name, value in amax.items()}
        self.orders = orders or {}
        self.weights = {}
        self.nearest = None

    @classmethod
    def from_calibration(cls, float_model, policy, formats, calibration, **options):
        """The model whose static scales are those of `calibration`."""
        return cls(float_model, policy, formats, calibration.sigmas, calibration.amax,
                   calibration.clips, **options)

    @property
    def architecture(self):
        return self.float_model.architecture

    @property
    def sigma_min(self):
        return self.float_model.sigma_min

    @property
    def sigma_max(self):
        return self.float_model.sigma_max

    @torch.no_grad()
    def __call__(self, x, sigma, labels=None, augment=None, *, on_input=None):
        """Denoised images in float32 for a batch `x`, see Precond.

        `on_input` (name, x) is called with the rounded input (N, Cin, H, W) of every layer.
        """
        def run(layer, segments, embedding, residual, gain, modulation):
            return self.run_layer(layer, segments, embedding, residual, gain, modulation, on_input)

        self.set_levels(torch.as_tensor(sigma, dtype=torch.float64).expand(len(x)))
        if labels is None:
            labels = one_hot(self.label, self.architecture)
            labels = labels if labels is None else labels.to(x.device)
        with executing(self.float_model.unet, run):
            return self.float_model(x, sigma, labels, augment)

    def set_levels(self, sigma):
        """Take the noise levels `sigma` (N,) for what follows, where scales are by step."""
        distance = (sigma.cpu().double().log()[:, None] - self.sigmas.log()).abs()
        # (N, E): the nearest evaluations; Heun has most levels twice.
        self.nearest = distance == distance.amin(1, keepdim=True)

    def run_layer(self, layer, segments, embedding, residual, gain, modulation, on_input=None):
        """Execute `layer`, with the arguments of its `forward`, with rounded operands."""
        name, policy = layer.name, self.policy
        format = self.formats[name]
        x, constant = layer.prologue(segments, modulation), layer.bias[None, :, None, None]
        if takes_means(layer, format) and policy.skips != "plain":
            mean = x.mean((2, 3), keepdim=True)
            x, constant = x - mean, constant + functional.conv2d(mean, layer.weight)
        by_step = policy.static == "step" and format not in ("FP16", "IN16", "MX8")
        amax = self.largest[name]
        if by_step:
            amax = torch.where(self.nearest[:, :, None], self.amax[name].cpu(), 0.0).amax(1)
        order = self.orders.get(name, slice(None))
        back = order.argsort() if name in self.orders else order
        x = round_activation(x[:, order], format, policy, amax[..., order].to(x.device),
                             self.clips[name])[:, back]
        if on_input is not None:
            on_input(name, x)
        if name not in self.weights:
            self.weights[name] = round_weight(layer.weight[:, order], format, policy)[:, back]
        out = functional.conv2d(x, self.weights[name], padding=layer.kernel // 2)
        out += constant if embedding is None else constant + embedding[:, :, None, None]
        out = out if residual is None else out + residual
        return out if gain == 1.0 else out * gain


@torch.no_grad()
def layer_sqnr(model, states):
    """SQNR in dB of every layer's own result, a dict by name.

    Float and rounded layer get the same input: what the rounded network computes in the
    evaluations `states`, a list of (sigma, x).

    Parameters
    ----------
    model : FakeQuantized or QuantizedModel
    """
    signals, errors = {}, {}

    def run(layer, *arguments):
        right, out = layer(*arguments), model.run_layer(layer, *arguments)
        name = layer.name
        signals[name] = signals.get(name, 0.0) + right.double().square().sum().item()
        errors[name] = errors.get(name, 0.0) + (out - right).double().square().sum().item()
        return out

    for sigma, x in states:
        if isinstance(model, FakeQuantized):
            model.set_levels(torch.full((len(x),), sigma))
        with executing(model.float_model.unet, run):
            model.float_model(x, sigma, one_hot(model.label, model.architecture))
    return {name: math.inf if not errors[name] or not signals[name]
            else 10 * math.log10(signals[name] / errors[name]) for name in signals}
