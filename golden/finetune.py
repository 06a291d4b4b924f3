"""From a SiLU network to a ReLU network in the accelerator's formats, with zeros to skip.

Two steps. `convert` replaces SiLU by a shifted ReLU, layer by layer. `FineTuner` then repairs what
that cost, with the layers' operands rounded in the forward pass and gradients that pass the
rounding as if it were not there (Bengio et al. 2013, arXiv 1308.3432).
"""

import copy
import dataclasses

import torch
from torch.nn import functional

from golden import a4, mxint8, w4
from golden.fake import executing
from golden.granularity import round_scale
from golden.load import load
from golden.network import Precond, layer_shapes
from golden.policy import takes_means
from golden.quantize import ACTIVATION_HEADROOM, formats
from golden.requantizer import Format
from golden.train import Trainer, TrainError, draw_batch

__all__ = ["Start", "convert", "Rounding", "FineTuner"]

CONVERSION_IMAGES = 32     # noisy training images that the conversion observes
SAMPLES = 1 << 18          # elements of a layer that its shift is found from
SOFTNESS = 3.0             # steps of a code over which the zero count's slope reaches
MEMORY = 0.99              # share of the largest magnitude so far that a step keeps


@dataclasses.dataclass(frozen=True)
class Start:
    """The trained network that fine-tuning starts from.

    Members
    -------
    model : Precond
    record : JSON values about its origin
    digest : SHA-256 of its weights' file, in hexadecimal
    """

    model: Precond
    record: dict
    digest: str

    @classmethod
    def read(cls, source):
        """The start that `golden.load.load` finds in `source`; ModelError if there is none."""
        model, record = load(source)
        return cls(model, record, record["origin"]["sha256"])


# Conversion.

@torch.no_grad()
def convert(model, images, sigma, noise, zeros=None):
    """A ReLU copy of the SiLU network `model`: a new Precond, `model` is left as it is.

    Every weight is kept but those that fit the new activation to the old one: SiLU(z) is replaced
    by a * relu(z - d) + b, with a and b of each channel by least squares on the noisy images. a and
    d go into the weight and bias of the GroupNorm before, b through the convolution into its bias,
    which is exact but at the borders. Layers with an adaptive norm keep all weights. A ReLU network
    is copied.

    Parameters
    ----------
    images, sigma, noise : as in `golden.train.edm_loss`; what the layers are observed on
    zeros : share of zero codes in every 4-bit layer that d is chosen for; None: d is 0
    """
    a = model.architecture
    converted = Precond(dataclasses.replace(a, activation="relu"))
    converted.load_state_dict(model.state_dict())
    converted.train(model.training)
    if a.activation == "relu":
        return converted
    found = {layer.name: layer for layer in converted.unet.layers()}
    chosen = formats(converted.unet)

    def run(layer, segments, embedding, residual, gain, modulation):
        if layer.activation is not None and layer.norm is not None and modulation is None:
            bare = copy.copy(layer)
            bare.activation = bare.resample = None
            share = zeros if chosen[layer.name] == Format.A4U else None
            fit(layer, found[layer.name], bare.prologue(segments), share)
        return layer(segments, embedding, residual, gain, modulation)

    with executing(model.unet, run):
        model(images + sigma[:, None, None, None] * noise, sigma)
    return converted


def fit(layer, twin, z, zeros):
    """Fit the ReLU of `twin` to the SiLU of `layer`, whose GroupNorm gives `z` (N, C, H, W)."""
    shift = 0.0
    if zeros is not None:
        # Code 0: z - d <= (amax - d) / 30, half a step, solved for d.
        half = 2 * a4.largest(False)
        limits = ((z - z.amax(1, keepdim=True) / half) * (half / (half - 1))).flatten()
        limits = limits[::max(1, limits.numel() // SAMPLES)]
        shift = limits.kthvalue(max(1, round(zeros * len(limits)))).values
    target, other = functional.silu(z), functional.relu(z - shift)
    means = target.mean((0, 2, 3)), other.mean((0, 2, 3))
    deviations = [x - mean[:, None, None] for x, mean in zip((target, other), means)]
    variance = deviations[1].square().mean((0, 2, 3))
    slope = (deviations[0] * deviations[1]).mean((0, 2, 3)) / variance.clamp(min=1e-12)
    # A channel that is never or hardly on tells no slope.
    slope = torch.where(variance > 1e-6, slope.clamp(0.25, 4), 1.0)
    level = means[0] - slope * means[1]
    twin.norm.weight.mul_(slope)
    twin.norm.bias.copy_((layer.norm.bias - shift) * slope)
    twin.bias.add_(layer.weight.sum((2, 3)) @ level)


# The accelerator's formats in the forward pass.

class Through(torch.autograd.Function):
    """The second argument forward, the first one's gradient backward."""

    @staticmethod
    def forward(context, x, rounded):
        return rounded

    @staticmethod
    def backward(context, gradient):
        return gradient, None


class FourBits(torch.autograd.Function):
    """`x` (N, C, H, W) in 4 bits with pixel scale, and the share of its codes that are 0.

    Forward it is `golden.a4.fake_quantize`. Backward, the rounding passes gradients through; the
    share has the slope of sigmoid((1 / 2 - |x| / step) / SOFTNESS), the step being that of the
    pixel's codes. ReLU keeps that slope from what is zero already.
    """

    @staticmethod
    def forward(context, x, signed, tensor_scale):
        amax = (x.abs() if signed else x).float().amax(1, keepdim=True)
        fixed = torch.as_tensor(tensor_scale, dtype=torch.float32, device=x.device)
        step = round_scale(amax / (a4.largest(signed) * fixed), "e4m3") * fixed
        codes = a4.codes_of(x.float(), step, signed)
        context.save_for_backward(x, step)
        context.signed = signed
        zeros = 1 - codes.count_nonzero() / codes.numel()
        return codes.mul_(step).to(x.dtype), zeros

    @staticmethod
    def backward(context, gradient, slope):
        x, step = context.saved_tensors
        if not context.needs_input_grad[0]:
            return None, None, None
        ratio = x / (step * SOFTNESS).clamp(min=1e-30)
        soft = torch.sigmoid_((ratio.abs() if context.signed else ratio).neg_().add_(
            0.5 / SOFTNESS))
        soft = soft.mul_(1 - soft).div_((step * SOFTNESS).clamp(min=1e-30))
        soft = soft * x.sign() if context.signed else soft.masked_fill_(x == 0, 0)
        return gradient - soft * (slope / x.numel()), None, None


class Rounding:
    """An executor that runs the layers of `unet` with operands rounded to their formats.

    Static scales follow the largest magnitude that the training forward passes have shown, with
    the calibration's headroom. 16-bit results are left in float.

    Members
    -------
    amax : (layers,) largest magnitude of each layer's input, 0 before the first pass
    zeros : share of zero codes of the last pass over the 4-bit layers, weighted by MACs, a scalar;
        its gradient is that of a soft count, see `FourBits`
    """

    def __init__(self, unet):
        self.layers = unet.layers()
        self.formats = formats(unet)
        macs = {shape.name: shape.macs for shape in layer_shapes(unet)}
        four = {name for name, format in self.formats.items()
                if format in (Format.A4U, Format.A4S)}
        total = sum(macs[name] for name in four)
        self.shares = {name: macs[name] / total for name in four}
        self.index = {layer.name: n for n, layer in enumerate(self.layers)}
        self.amax = torch.zeros(len(self.layers), device=unet.first.weight.device)
        self.following = True      # whether `amax` follows what passes
        self.zeros = None

    def __call__(self, layer, segments, embedding, residual, gain, modulation):
        if layer is self.layers[0]:
            self.zeros = 0.0
        x = layer.prologue(segments, modulation)
        constant = layer.bias[None, :, None, None]
        if takes_means(layer, self.formats[layer.name].name):
            mean = x.mean((2, 3), keepdim=True)
            x, constant = x - mean, constant + functional.conv2d(mean, layer.weight)
        x = self.round_input(layer, x)
        if layer.dropout and layer.training:
            x = functional.dropout(x, layer.dropout)
        x = functional.conv2d(x, self.round_weight(layer), padding=layer.kernel // 2) + constant
        if embedding is not None:
            x = x + embedding[:, :, None, None].to(x.dtype)
        if residual is not None:
            x = x + residual
        return x if gain == 1.0 else x * gain

    def round_weight(self, layer):
        with torch.no_grad():
            weight = layer.weight.detach()
            if layer.name in self.shares:
                rounded = w4.fake_quantize(weight)
            elif self.formats[layer.name] == Format.IN16:
                rounded = mxint8.fake_quantize_input_weights(weight)
            else:
                rounded = mxint8.fake_quantize(weight)
        return Through.apply(layer.weight, rounded)

    def round_input(self, layer, x):
        format, n = self.formats[layer.name], self.index[layer.name]
        if self.following:
            self.amax[n] = torch.maximum(MEMORY * self.amax[n], largest(x.detach()))
        amax = self.amax[n].item() * ACTIVATION_HEADROOM
        if format == Format.IN16:
            return Through.apply(x, mxint8.fake_quantize_input(
                x.detach(), mxint8.input_scale(amax)))
        if format == Format.MX8:
            return Through.apply(x, mxint8.fake_quantize(
                x.detach(), window=mxint8.window_of(mxint8.static_scale(amax))))
        signed = format == Format.A4S
        x, zeros = FourBits.apply(x, signed, a4.static_scale(amax, signed))
        self.zeros = self.zeros + self.shares[layer.name] * zeros
        return x


def largest(x):
    """Largest magnitude in `x`, a scalar."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


class FineTuner(Trainer):
    """A Trainer that starts from a trained network, with the recipe's `FineTune`."""

    def __init__(self, recipe, pixels, steps, device, start):
        super().__init__(recipe, pixels, steps, device)
        how, wanted = recipe.finetune, recipe.architecture
        if dataclasses.replace(start.model.architecture, activation=wanted.activation) != wanted:
            raise TrainError(f"start must be of the architecture of {recipe.name} up to its "
                             f"activation")
        if start.model.architecture.activation == "relu" and wanted.activation != "relu":
            raise TrainError("start must not be a ReLU network where the activation is to be "
                             f"{wanted.activation}")
        model = start.model
        if wanted.activation == "relu":
            batch = dataclasses.replace(recipe, batch=CONVERSION_IMAGES)
            generator = torch.Generator().manual_seed(recipe.seed)
            model = convert(model, *draw_batch(pixels, batch, generator), how.zeros)
        self.model.load_state_dict(model.state_dict())
        self.ema.load_state_dict(model.state_dict())
        self.teacher = None
        if how.teacher:
            self.teacher = start.model.to(device, memory_format=torch.channels_last)
            self.teacher.eval().requires_grad_(False)
        self.rounding = Rounding(self.model.unet) if how.quantized else None
        self.origin = {"start": start.digest, "finetune": dataclasses.asdict(how),
                       "start_steps": start.record.get("steps")}

    def objective(self, images, sigma, noise):
        how = self.recipe.finetune
        noisy = images + sigma[:, None, None, None] * noise
        s = self.model.sigma_data
        weight = (sigma ** 2 + s ** 2) / (sigma * s) ** 2

        def loss_to(target):
            return (weight * (denoised - target).square().mean((1, 2, 3))).mean()

        if self.rounding is None:
            denoised = self.model(noisy, sigma)
        else:
            with executing(self.model.unet, self.rounding):
                denoised = self.model(noisy, sigma)
        objective = loss = loss_to(images)
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(noisy, sigma)
            distance = loss_to(target)
            objective = objective + how.teacher * distance
            self.measures["teacher_distance"] = distance.item()
        if self.rounding is not None:
            self.measures["zeros"] = self.rounding.zeros.item()
            if how.zeros is not None:
                missing = (how.zeros - self.rounding.zeros).clamp(min=0)
                objective = objective + how.strength * missing
        return objective, loss

    def own_state(self):
        return {} if self.rounding is None else {"amax": self.rounding.amax}

    def load_own_state(self, state):
        if self.rounding is not None:
            self.rounding.amax.copy_(state["amax"])
