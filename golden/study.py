"""What the granularity of scales costs: post-training quantization of one model in many formats.

``python -m golden.study MODEL --data DIR --json FILE`` measures every row of `ROWS` on held-out
images and prints the table of ``docs/quantization.md``.
"""

import argparse
import dataclasses
import json
import math
import sys

import rich.progress
import torch
from torch.nn import functional

from golden import a4, data, mxint8, w4
from golden.checkpoint import load_model, replace_file
from golden.network import layer_shapes
from golden.quantize import ACTIVATION_HEADROOM, formats, quantize_model, resolve, sqnr
from golden.quantized_network import centred, executing
from golden.requantizer import Format
from golden.sampler import STEPS, draw_noise, sample
from golden.train import P_MEAN, P_STD, edm_loss

__all__ = ["Row", "ROWS", "PIXEL", "FINEST", "study", "decide", "markdown"]

BATCH = 64
CALIBRATION_IMAGES = 8
TOLERANCE = 0.02           # of loss, that pixel scale may cost over the finest granularity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration: formats of the wide layers, granularity of the 4-bit ones.

    Members
    -------
    name : what it is
    input_bits : 16 or 8, of the network input in the first convolution
    first_block : whether the first block is MXINT8
    group, block : channels (None: all) and side of the pixel block (None: image) of an activation
        scale
    activation_scale : how activation scales are rounded, one of `golden.granularity.SCALES`
    weight_group, shared_taps : channels of a weight scale, and whether taps share it
    static : one fixed activation scale per channel, in place of scales found on the fly
    skips : 1x1 convolutions without ReLU: "centred" (4 bits, channel means taken out), "plain"
        (4 bits) or "mxint8"
    """

    name: str
    input_bits: int = 16
    first_block: bool = True
    group: int = 16
    block: int = 1
    activation_scale: str = "e4m3"
    weight_group: int = 16
    shared_taps: bool = False
    static: bool = False
    skips: str = "centred"


FINEST = "A: the same, first block MXINT8"
PIXEL = "A, all channels x 1 px, weights (k, tap, all channels): pixel scale"
PIXEL_SCALE = {"group": None, "weight_group": None}
ROWS = (
    Row(name="first and last two convs MXINT8, input 8 bits; 16 ch x 1 px, weights (k, tap, 16)",
        input_bits=8, first_block=False),
    Row(name="the same, input 16 bits", first_block=False),
    Row(name=FINEST),
    Row(name="A, weights (k, 16), shared by taps", shared_taps=True),
    Row(name="A, 16 ch x 4x4 px", block=4),
    Row(name=PIXEL, **PIXEL_SCALE),
    Row(name="pixel scale, power-of-two activation scales", activation_scale="power_of_two",
        **PIXEL_SCALE),
    Row(name="pixel scale, weights (k): one scale an output channel", shared_taps=True,
        **PIXEL_SCALE),
    Row(name="A, all channels x 2x2 px, weights (k, tap, all channels)", block=2, **PIXEL_SCALE),
    Row(name="A, 1x1 layers 4 bits without taking out channel means", skips="plain"),
    Row(name="pixel scale, 1x1 layers 4 bits without taking out channel means", skips="plain",
        **PIXEL_SCALE),
    Row(name="A, 1x1 layers MXINT8", skips="mxint8"),
    Row(name="pixel scale, 1x1 layers MXINT8", skips="mxint8", **PIXEL_SCALE),
    Row(name="A, one static scale a channel", static=True),
    Row(name="A, one dynamic scale a tensor", group=None, block=None),
)
SHIPPED = "pixel scale as executed: 16-bit results and window of exponents too"


class FakeQuantized:
    """The Precond `model` with the layers' operands rounded as `row` says.

    `amax` is a dict by layer of the largest magnitude of each input channel, (Cin,).
    """

    def __init__(self, model, row, amax):
        self.model, self.row = model, row
        self.amax = amax
        self.formats = formats(model.unet)
        if not row.first_block:
            first = f"encoder.{next(iter(model.unet.encoder))}."
            for layer in model.unet.layers():
                if layer.name.startswith(first):
                    self.formats[layer.name] = Format.A4U if layer.relu else Format.A4S
        if row.skips == "mxint8":
            self.formats |= {layer.name: Format.MX8 for layer in model.unet.layers()
                             if centred(layer)}
        self.weights = {layer.name: self.weight(layer) for layer in model.unet.layers()}
        self.zeros = {}        # by layer: zero codes and codes seen

    def wide(self, layer):
        return self.formats[layer.name] in (Format.MX8, Format.IN16)

    def weight(self, layer):
        if self.wide(layer):
            return mxint8.fake_quantize(layer.weight)
        return w4.fake_quantize(layer.weight, group=self.row.weight_group,
                                shared_taps=self.row.shared_taps)

    def activation(self, layer, x):
        row, amax = self.row, self.amax[layer.name]
        if self.formats[layer.name] == Format.IN16 and row.input_bits == 16:
            return mxint8.fake_quantize_input(
                x, mxint8.input_scale(amax.max().item() * ACTIVATION_HEADROOM))
        if self.wide(layer):
            return mxint8.fake_quantize(x)
        signed = self.formats[layer.name] == Format.A4S
        if row.static:
            x = a4.fake_quantize_static(x, signed, amax / a4.largest(signed))
        else:
            scale = a4.static_scale(amax.max().item() * ACTIVATION_HEADROOM, signed)
            x = a4.fake_quantize(x, signed, scale, group=row.group, block=row.block,
                                 scale=row.activation_scale)
        zeros, total = self.zeros.get(layer.name, (0, 0))
        self.zeros[layer.name] = zeros + int((x == 0).sum()), total + x.numel()
        return x

    def __call__(self, x, sigma):
        def run(layer, segments, embedding, residual, gain, modulation):
            x, constant = layer.prologue(segments, modulation), layer.bias[None, :, None, None]
            if centred(layer) and self.row.skips == "centred":
                mean = x.mean((2, 3), keepdim=True)
                x, constant = x - mean, constant + functional.conv2d(mean, layer.weight)
            x = self.activation(layer, x)
            out = functional.conv2d(x, self.weights[layer.name], padding=layer.kernel // 2)
            out = out + constant
            out = out if embedding is None else out + embedding[:, :, None, None]
            return (out if residual is None else out + residual) * gain

        with executing(self.model.unet, run):
            return self.model(x, sigma)

    def zero_fraction(self):
        """Share of the 4-bit layers' MACs whose activation code is 0."""
        macs = {shape.name: shape.macs for shape in layer_shapes(self.model.unet)}
        zero = sum(macs[name] * zeros / total for name, (zeros, total) in self.zeros.items())
        return zero / sum(macs[name] for name in self.zeros)


def channel_amax(model, images=CALIBRATION_IMAGES, steps=STEPS):
    """Largest magnitude of each input channel in a sampling run: (Cin,) by layer.

    Channel means are taken out where the layer may have it so.
    """
    amax = {}

    def run(layer, segments, embedding, residual, gain, modulation):
        x = layer.prologue(segments, modulation)
        if centred(layer):
            x = x - x.mean((2, 3), keepdim=True)
        found = x.abs().amax((0, 2, 3))
        amax[layer.name] = torch.maximum(amax.get(layer.name, found), found)
        return layer(segments, embedding, residual, gain, modulation)

    with executing(model.unet, run):
        sample(model, draw_noise(images, model.architecture), steps)
    return amax


@torch.no_grad()
def measure(model, denoise, batches):
    """Losses (N,) and denoised images of all `batches` [(images, sigma, noise)].

    `denoise` is called like the Precond `model` that it stands for.
    """
    class Stand:
        sigma_data = model.sigma_data

        def __call__(self, x, sigma):
            outputs.append(denoise(x, sigma))
            return outputs[-1]

    outputs, losses = [], []
    for images, sigma, noise in batches:
        losses.append(edm_loss(Stand(), images, sigma, noise))
    return torch.cat(losses).double(), torch.cat(outputs)


def study(model, images, *, rows=ROWS, seed=0, calibration_images=CALIBRATION_IMAGES,
          steps=STEPS, progress=None):
    """Measure all `rows`, and the QuantizedModel itself, on `images` at random noise levels.

    Parameters
    ----------
    model : Precond
    images : (N, C, H, W) in [-1, 1], held out from training
    seed : of noise levels (EDM's lognormal ones) and noise
    progress : callable (rows done, rows) or None

    Returns a list of dicts with ``name``, ``sqnr_db`` of the denoiser's output, ``loss`` (EDM's
    loss over float's, less 1), ``loss_error`` (its standard error) and ``zero_fraction``; float
    comes first, with its own EDM loss as ``edm_loss``.
    """
    model = model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    sigma = (torch.randn(len(images), generator=generator) * P_STD + P_MEAN).exp()
    sigma = sigma.clamp(model.sigma_min, model.sigma_max)
    noise = torch.randn(images.shape, generator=generator)
    batches = list(zip(images.split(BATCH), sigma.split(BATCH), noise.split(BATCH)))
    amax = channel_amax(model, calibration_images, steps)
    right, reference = measure(model, model, batches)
    table = [{"name": "float", "sqnr_db": None, "loss": 0.0, "loss_error": 0.0,
              "zero_fraction": None, "edm_loss": right.mean().item()}]

    def add(name, denoise, zero_fraction):
        losses, outputs = measure(model, denoise, batches)
        table.append({
            "name": name, "sqnr_db": round(sqnr(reference, outputs), 3),
            "loss": round((losses.mean() / right.mean() - 1).item(), 5),
            "loss_error": round(((losses - right).std() / math.sqrt(len(losses))
                                 / right.mean()).item(), 5),
            "zero_fraction": round(zero_fraction(), 4)})
        if progress is not None:
            progress(len(table) - 1, len(rows) + 1)

    for row in rows:
        quantized = FakeQuantized(model, row, amax)
        add(row.name, quantized, quantized.zero_fraction)
    whole = quantize_model(model, {}, images=calibration_images, steps=steps)
    seen = {}

    def observe(name, x):
        zeros, total = seen.get(name, (0, 0))
        seen[name] = zeros + int((x == 0).sum()), total + x.numel()

    def zero_fraction():
        four = [item for item in whole.layers.values() if item.sparse_capable]
        return (sum(item.macs * seen[item.name][0] / seen[item.name][1] for item in four)
                / sum(item.macs for item in four))

    add(SHIPPED, lambda x, sigma: whole(x, sigma, observe), zero_fraction)
    return table


def decide(table):
    """The granularity that the table of `study` justifies, as one sentence."""
    losses = {row["name"]: row["loss"] for row in table}
    excess = losses[PIXEL] - losses[FINEST]
    kept = excess <= TOLERANCE
    return (f"pixel scale costs {100 * losses[PIXEL]:+.1f} % of loss, the finest granularity "
            f"{100 * losses[FINEST]:+.1f} %: {100 * excess:.1f} points more, "
            f"{'within' if kept else 'beyond'} the {100 * TOLERANCE:.0f} allowed; "
            f"{'pixel scale it is' if kept else 'take the finest'}")


def markdown(table):
    """The table of `study` as Markdown."""
    lines = ["| W4A4 in the other layers | SQNR dB | loss | zero codes |", "|---|---|---|---|"]
    for row in table[1:]:
        lines.append(f"| {row['name']} | {row['sqnr_db']:.1f} "
                     f"| {100 * row['loss']:+.1f} ± {100 * row['loss_error']:.1f} % "
                     f"| {row['zero_fraction']:.3f} |")
    return "\n".join(lines)


def main(arguments=None):
    """The command: measure, print the table and the decision, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m golden.study", description=__doc__)
    parser.add_argument("model", help="shipped name or path of a model file")
    parser.add_argument("--data", help="folder of the data set (or SQDM_DATA)")
    parser.add_argument("--json", help="file to write the measurements to")
    parser.add_argument("--images", type=int, default=512, help="held-out images")
    options = parser.parse_args(arguments)
    try:
        path = resolve(options.model)
        model, record = load_model(path)
        if options.images < 2:
            raise ValueError(f"images must be at least 2, not {options.images!r}")
        pixels = data.load(record.get("data"), options.data, "test").pixels[:options.images]
        with rich.progress.Progress() as bar:
            task = bar.add_task("study", total=1)
            table = study(model, data.to_float(pixels),
                          progress=lambda done, total: bar.update(task, completed=done / total))
        print(markdown(table))
        print(decide(table))
        if options.json:
            result = {"model": str(options.model), "record": record, "images": len(pixels),
                      "rows": table, "decision": decide(table)}
            replace_file(options.json, lambda temporary: temporary.write_text(
                json.dumps(result, indent=2) + "\n"))
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
