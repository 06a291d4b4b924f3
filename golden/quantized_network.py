"""A network in the formats of the accelerator, run as fake quantization and as exact integers.

Both executions share the constants that `golden.quantize` found. Between layers there are 16-bit
tensors with an exponent each; they travel through the UNet as floats, which hold them exactly.
"""

import dataclasses
import math

import torch
from torch.nn import functional

from golden import a4, detector, e4m3, epilogue, layer, mxint8, network
from golden.fake import executing, levels, one_hot
from golden.gather import gather
from golden.layer import Convolution, LayerCall, Requantization
from golden.policy import POLICIES, centred
from golden.requantizer import Format, slots, spread
from golden.sampler import Sampler, sample
from golden.scatter import add_planes, plane_bias

__all__ = ["QuantizedLayer", "QuantizedModel", "Evaluated", "centred", "executing", "to_integers",
           "prepare", "layer_calls", "evaluate", "trajectory"]

Y_UNIT = -10               # the requantizer counts units of 2^-10 * sA
RESIZED_GAIN = 1 << 7      # of the identity affine: 16-bit values fill the 23 bits of y
VECTOR = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """Constants of a quantized layer as the accelerator executes it, independent of V.

    Members
    -------
    name : of the layer
    format : Format of its input
    gathered : whether the host gathers the input, see `golden.gather`: a 3x3 layer of IN16 in the
        network, here a 1x1 layer with 9 times as many channels
    scattered : whether the host adds up nine planes of each output, see `golden.scatter`: a 3x3
        layer in the network, here a 1x1 layer with 9 times as many outputs
    segments : channels of each input segment
    height, width : of the convolution's input and output
    kernel : 1 or 3
    tensor_scale : sA; a power of two for MX8, IN16 and where the host makes the input
    segment_exponents : of each 16-bit input segment
    prologue_exponent : of the 16-bit tensor that the host makes by GroupNorm, activation and
        filter; None where the requantizer applies GroupNorm and ReLU
    residual_exponent : of the 16-bit residual, or None
    exponent : of the 16-bit output; of a scattered layer, of all its planes
    weight_codes : (Cout, Cin, k, k) int8
    weight_scales : (Cout, k * k, groups) uint8; a group is all channels (A4) or 32 (MX8, IN16)
    weight_unit : sW, or the power of two uW
    align_shift, scale_shift, residual_multiplier : of the epilogue
    multiplier : (Cout,) int16
    bias : (evaluations or 1, Cout) int32; includes the embedding of each evaluation
    threshold : zeros / pixels, in units of 1/65536, from which a channel is sparse
    zeros : (evaluations, Cin) int32, zero codes in an image, mean of the calibration images; of a
        gathered layer, those of the channels before
    modulation : (evaluations, 2, Cin) float32, scale and shift after the norm, or None
    """

    name: str
    format: Format
    gathered: bool
    scattered: bool
    segments: tuple
    height: int
    width: int
    kernel: int
    tensor_scale: float
    segment_exponents: tuple
    prologue_exponent: int
    residual_exponent: int
    exponent: int
    weight_codes: torch.Tensor
    weight_scales: torch.Tensor
    weight_unit: float
    align_shift: int
    scale_shift: int
    residual_multiplier: int
    multiplier: torch.Tensor
    bias: torch.Tensor
    threshold: int
    zeros: torch.Tensor
    modulation: torch.Tensor = None

    @property
    def macs(self):
        return self.weight_codes.numel() * self.height * self.width

    @property
    def sparse_capable(self):
        """Whether its input channels carry labels: A4, not MX8 or IN16."""
        return not self.format.mx

    def weight(self):
        """The weights that codes and scales represent, (Cout, Cin, k, k) float32."""
        return decode_weights(self.format, self.weight_codes, self.weight_scales, self.weight_unit)

    def slots(self, vector):
        """Number of slots of the input: of its codes, or half as many for IN16."""
        return slots(list(self.segments), vector, self.format.mx)[1]

    def spread(self, x, vector, dim=0):
        """`x` with its dimension `dim` of input channels moved to slots; other slots hold 0."""
        return spread(x, self.segments, vector, dim, self.format.mx)

    def network_output(self, output):
        """Output (1, Cout, H, W) of the layer in the network, float32 and exact.

        `output` (Cout, H, W) are the 16-bit results of the layer as executed.
        """
        output = add_planes(output) if self.scattered else output
        return output[None].float() * 2.0 ** self.exponent

    def requantization(self, x, gain, centre, level, relu, vector):
        """Requantization of the 16-bit integers `x`, as (x - centre) gain + level.

        `x` is a list of segments (C, H, W). `gain`, `centre` and `level` are (Cin,) real numbers in
        float64; None for IN16, and where the host made `x`, so that the affine only shifts.
        """
        if self.format == Format.IN16:
            return Requantization(x, None, None, 0, False, self.format)
        if self.prologue_exponent is not None:
            gain = self.spread(torch.full((sum(self.segments),), RESIZED_GAIN), vector)
            return Requantization(x, gain, torch.zeros_like(gain), 0, relu, self.format)
        unit = self.tensor_scale * 2.0 ** Y_UNIT
        steps = torch.cat([torch.full((len(segment),), 2.0 ** exponent, dtype=torch.float64)
                           for segment, exponent in zip(x, self.segment_exponents, strict=True)])
        gain = gain * steps / unit
        shift = exponent_below(32767, gain.abs().max().item(), 31)
        gain = (gain * 2.0 ** shift).round().clamp(-32768, 32767)
        # From the rounded gain, so that its error vanishes at the centre.
        offset = level / unit - gain * 2.0 ** -shift * (centre / steps)
        offset = offset.round().clamp(-1 << 31, (1 << 31) - 1).long()
        return Requantization(x, self.spread(gain.long(), vector), self.spread(offset, vector),
                              shift, relu, self.format)

    def convolution(self, evaluation, residual, vector, correction=None):
        """Convolution with the 16-bit integer `residual` (Cout, H, W) or None.

        `correction` (Cout,) is a real number to add to the result, or None.
        """
        codes = self.spread(self.weight_codes.long(), vector, dim=1)
        scales = self.weight_scales.long()
        if self.format == Format.IN16:       # for the high and for the low halves
            codes, scales = codes.repeat(1, 2, 1, 1), scales.repeat(1, 1, 2)
        bias = self.bias[evaluation if len(self.bias) > 1 else 0].long()
        if correction is not None:
            unit = 2.0 ** self.exponent / (1 << epilogue.FRACTION)
            bias = (bias + (correction / unit).round().long()).clamp(-1 << 31, (1 << 31) - 1)
        return Convolution(codes, scales, self.kernel, self.multiplier.long(), bias,
                           self.align_shift, self.scale_shift, residual, self.residual_multiplier)


def decode_weights(format, codes, scales, unit):
    """Weights (Cout, Cin, k, k) in float32 from their codes, scales (Cout, k * k, groups), unit."""
    scales = scales.long().transpose(1, 2)                       # (Cout, groups, k * k)
    if format.mx:
        steps = torch.exp2(scales.float()) * unit
        steps = steps.repeat_interleave(mxint8.BLOCK, 1)[:, :codes.shape[1]]
    else:
        steps = e4m3.value(scales) * torch.tensor(unit, dtype=torch.float32)
    return codes.float() * steps.unflatten(2, codes.shape[2:])


def to_integers(x, exponent):
    """`x` in units of 2^`exponent` as 16-bit integers, ties to even, saturating."""
    return (x.double() * 2.0 ** -exponent).round().clamp(-32768, 32767).long()


def exponent_below(limit, amax, most):
    """Largest n in 0..`most` with amax * 2^n <= limit."""
    if not amax > 0:
        return most
    return max(0, min(most, math.floor(math.log2(limit / amax))))


def real_values(x, exponents):
    """The integer segments `x` as one float64 tensor (Cin, H, W), exactly."""
    return torch.cat([segment.double() * 2.0 ** exponent
                      for segment, exponent in zip(x, exponents, strict=True)])


def affine(norm, values, modulation=None):
    """Gain, centre and level (Cin,) of the GroupNorm `norm` over `values` (Cin, H, W), in float64.

    It is (values - centre) gain + level; without `norm`, 1, 0 and 0. Statistics are sums of
    integers times powers of two: exact, whatever the order. `modulation` (2, Cin) scales the
    norm's result by 1 + modulation[0] and shifts it by modulation[1].
    """
    if norm is None:
        zero = values.new_zeros(len(values))
        return zero + 1, zero, zero
    grouped = values.unflatten(0, (norm.num_groups, -1)).flatten(1)     # (groups, members)
    mean = grouped.mean(1)
    variance = (grouped.square().mean(1) - mean.square()).clamp(min=0)
    deviation = (variance + norm.eps).sqrt()
    repeats = len(values) // norm.num_groups
    gain, level = norm.weight.double() / deviation.repeat_interleave(repeats), norm.bias.double()
    if modulation is not None:
        scale, shift = modulation.double()
        gain, level = gain * (1 + scale), level * (1 + scale) + shift
    return gain, mean.repeat_interleave(repeats), level


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """An evaluation in exact integers.

    Members
    -------
    denoised : (1, C, H, W) float32, the denoiser's output
    calls : LayerCalls in execution order
    results : LayerResult of each call
    """

    denoised: torch.Tensor
    calls: list
    results: list


class QuantizedModel:
    """A denoiser in the accelerator's formats; call it like the Precond that it wraps.

    Members
    -------
    float_model : Precond
    layers : dict of QuantizedLayer by name, in execution order
    record : JSON values about the origin of the model
    steps : Heun steps of the schedule whose evaluations have biases and calibration counts
    policy : Policy that named the formats
    label : class that biases and modulations are for, or None
    """

    def __init__(self, float_model, layers, record, steps, policy=POLICIES["mixed"], label=None):
        self.float_model, self.layers = float_model, layers
        self.record, self.steps, self.policy, self.label = record, steps, policy, label
        self.weights = {}

    @property
    def architecture(self):
        return self.float_model.architecture

    @property
    def formats(self):
        """Format of each layer's input, a dict of strings by name."""
        return {name: item.format.name for name, item in self.layers.items()}

    @property
    def sigma_min(self):
        return self.float_model.sigma_min

    @property
    def sigma_max(self):
        return self.float_model.sigma_max

    @property
    def schedule(self):
        """The evaluations that have biases and counts."""
        return levels(self.float_model, self.steps)

    @torch.no_grad()
    def __call__(self, x, sigma, labels=None, augment=None, *, on_input=None):
        """Denoised images in float32 for a batch `x`, by fake quantization.

        `on_input` (name, x) is called with the quantized input (N, Cin, H, W) of every layer.
        """
        def run(layer, segments, embedding, residual, gain, modulation):
            return self.run_layer(layer, segments, embedding, residual, gain, modulation, on_input)

        if labels is None and self.label is not None:
            labels = one_hot(self.label, self.architecture).to(x.device)
        with executing(self.float_model.unet, run):
            return self.float_model(x, sigma, labels, augment)

    def run_layer(self, layer, segments, embedding, residual, gain, modulation=None,
                  on_input=None):
        """Execute `layer`, with the arguments of its `forward`, by fake quantization."""
        item = self.layers[layer.name]
        x, mean = self.quantize_input(item, layer, segments, modulation)
        if on_input is not None:
            on_input(layer.name, x)
        if layer.name not in self.weights:
            self.weights[layer.name] = item.weight().to(x.device)
        out = functional.conv2d(gather(x) if item.gathered else x, self.weights[layer.name],
                                plane_bias(layer.bias) if item.scattered else layer.bias,
                                padding=item.kernel // 2)
        if mean is not None:
            out = out + functional.conv2d(mean, layer.weight)
        if embedding is not None:
            out = out + embedding[:, :, None, None]
        if residual is not None:
            out = out + epilogue.fake_quantize(residual, item.residual_exponent)
        out = epilogue.fake_quantize(out * gain, item.exponent)
        return add_planes(out) if item.scattered else out

    @staticmethod
    def quantize_input(item, layer, segments, modulation=None):
        """What codes and scales of the input of `layer` represent, (N, Cin, H, W).

        And the means (N, Cin, 1, 1) that were taken from it before, or None.
        """
        if item.format == Format.IN16:
            return mxint8.fake_quantize_input(segments[0], item.tensor_scale), None
        x = layer.prologue([epilogue.fake_quantize(segment, exponent) for segment, exponent
                            in zip(segments, item.segment_exponents, strict=True)], modulation)
        if item.prologue_exponent is not None:
            x = epilogue.fake_quantize(x, item.prologue_exponent)
        mean = x.mean((2, 3), keepdim=True) if centred(layer) else None
        x = x if mean is None else x - mean
        if item.format == Format.MX8:
            return mxint8.fake_quantize(x, window=mxint8.window_of(item.tensor_scale)), mean
        return a4.fake_quantize(x, item.format == Format.A4S, item.tensor_scale), mean

    def bases(self, vector=VECTOR):
        """First detector entry of each layer, one after the other; dict by name.

        MX8 and IN16 layers have no counts: theirs is the next layer's.
        """
        bases, total = {}, 0
        for name, item in self.layers.items():
            bases[name] = total
            total += item.slots(vector) if item.sparse_capable else 0
        return bases

    def detector(self, vector=VECTOR):
        """A Detector that holds the calibration counts of evaluation 0."""
        found = [(base, self.layers[name]) for name, base in self.bases(vector).items()
                 if self.layers[name].sparse_capable]
        made = detector.Detector(max(1, sum(item.slots(vector) for _, item in found)))
        for base, item in found:
            made.load(base, item.spread(item.zeros[0].long(), vector))
        return made


@torch.no_grad()
def evaluate(model, x, evaluation, detector=None, *, vector=VECTOR, interval=1, thresholds=None,
             adjust=None, dense=True, sparse=True, on_layer=None):
    """Run one evaluation of one image in exact integers.

    Parameters
    ----------
    model : QuantizedModel
    x : (1, C, H, W), the sampler's state before the evaluation
    evaluation : number in the schedule of `model.steps`
    detector : Detector that gives and takes the counts; None: a fresh one with the
        calibration's counts, which are right before evaluation 0
    vector : V
    interval : evaluations between updates of the detector
    thresholds : dict by layer name, in place of the model's
    adjust : callable that gives the LayerCall to run in place of a LayerCall, or None
    dense, sparse : bool, whether the core has the side
    on_layer : callable (LayerCall, LayerResult) or None

    Returns Evaluated.
    """
    schedule = model.schedule
    if not 0 <= evaluation < len(schedule):
        raise ValueError(f"evaluation must be in 0..{len(schedule) - 1}, not {evaluation!r}")
    if len(x) != 1:
        raise ValueError(f"x must be one image, not {len(x)!r}")
    bases = model.bases(vector)
    detector = model.detector(vector) if detector is None else detector
    calls, results = [], []

    def run(network_layer, segments, embedding, residual, gain, modulation):
        item = model.layers[network_layer.name]
        call = LayerCall(
            item.name, evaluation,
            *prepare(item, network_layer, segments, residual, gain, evaluation, vector),
            bases[item.name], (thresholds or {}).get(item.name, item.threshold), interval)
        if adjust is not None:
            call = adjust(call)
        base, size = bases[item.name], item.slots(vector)
        if item.sparse_capable:
            result = layer.run(call, detector.read(base, size), vector, dense, sparse)
            detector.update(base, result.zero_counts, evaluation, interval)
        else:
            result = layer.run(call, None, vector, dense, sparse)
        calls.append(call)
        results.append(result)
        if on_layer is not None:
            on_layer(call, result)
        return item.network_output(result.output)

    with executing(model.float_model.unet, run):
        denoised = model.float_model(x, schedule[evaluation].sigma,
                                     one_hot(model.label, model.architecture))
    return Evaluated(denoised, calls, results)


def prepare(item, network_layer, segments, residual, gain, evaluation, vector=VECTOR):
    """Requantization and Convolution of a layer, from the arguments of its `forward`.

    Bias, embedding and modulation are those stored for the `evaluation`. Segments and residual are
    float tensors (1, C, H, W) that hold 16-bit values, or that the host made, and are rounded here.
    """
    x = [to_integers(segment[0], exponent)
         for segment, exponent in zip(segments, item.segment_exponents, strict=True)]
    factor = centre = level = correction = None
    if item.gathered:
        x = [gather(segment) for segment in x]
    if item.format != Format.IN16:
        values = real_values(x, item.segment_exponents)
        modulation = None if item.modulation is None else item.modulation[evaluation]
        factor, centre, level = affine(network_layer.norm, values, modulation)
        if item.prologue_exponent is not None:
            x = host_made(item, network_layer, values, factor, centre, level)
        elif centred(network_layer):
            mean = values.mean((1, 2))
            level = (mean - centre) * factor + level
            correction = gain * (network_layer.weight[:, :, 0, 0].double() @ level)
            centre, level = mean, torch.zeros_like(level)
    stored = None if residual is None else to_integers(residual[0], item.residual_exponent)
    return (item.requantization(x, factor, centre, level, network_layer.relu, vector),
            item.convolution(evaluation, stored, vector, correction))


def host_made(item, network_layer, values, gain, centre, level):
    """What the host makes of `values` (Cin, H, W) before a layer that is `hosted`: 16-bit segments.

    GroupNorm's affine, activation and filter in float64.
    """
    values = (values - centre[:, None, None]) * gain[:, None, None] + level[:, None, None]
    if network_layer.activation is not None:
        values = network.ACTIVATIONS[network_layer.activation](values)
    values = network.resample(values[None], network_layer.resample,
                              network_layer.resample_filter)[0]
    return list(to_integers(values, item.prologue_exponent).split(list(item.segments)))


def layer_calls(model, x, evaluation, *, vector=VECTOR, interval=1, thresholds=None):
    """LayerCalls of an evaluation of one image with its real activations, in execution order."""
    return evaluate(model, x, evaluation, vector=vector, interval=interval,
                    thresholds=thresholds).calls


def trajectory(model, noise):
    """(images, states) of a sampling run of `model` from unit `noise` by fake quantization.

    ``states[n]`` is the sampler's state (N, C, H, W) before evaluation n, float32.
    """
    states = []
    images = sample(model, noise, model.steps,
                    lambda evaluation, x: states.append(x.float()),
                    sampler=Sampler.for_model(model))
    return images, states
