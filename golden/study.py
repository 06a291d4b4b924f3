"""What formats cost in quality: post-training quantization of one model, row by row.

``python -m golden.study MODEL --data DIR --json FILE`` measures the tables of
``docs/quantization.md`` on held-out images: granularity of scales, choice of the layers in MXINT8,
and policies.
"""

import argparse
import dataclasses
import math
import sys

import rich.progress
import torch

from golden import data, policy, sensitivity
from golden.checkpoint import write_json
from golden.fake import FakeQuantized, calibrate, sqnr
from golden.load import load
from golden.network import layer_shapes
from golden.policy import POLICIES, Policy
from golden.quantize import quantize_model
from golden.sampler import STEPS
from golden.train import P_MEAN, P_STD, edm_loss

__all__ = ["Row", "TABLES", "FINEST", "PIXEL", "EXECUTED", "study", "decide", "markdown"]

BATCH = 64
CALIBRATION_IMAGES = 8
TOLERANCE = 0.02           # of loss, that pixel scale may cost over the finest granularity
BUDGETS = (0.01, 0.02, 0.034, 0.058, 0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration.

    Members
    -------
    name : what it is
    policy : Policy
    mxint8 : layers in MXINT8: "none", "paper", or a share of the MACs for those that need it most
    executed : whether the accelerator's whole arithmetic runs, not only its operands
    """

    name: str
    policy: Policy
    mxint8: object = sensitivity.BUDGET
    executed: bool = False


def scales(name, **options):
    """A row whose 4-bit layers have these scales."""
    return Row(name=name, policy=Policy(name="", **options))


FINE = {"group": 16, "weight_group": 16}
INTEGER = {"scale": "int4", "level": "image", "weight_scale": "int4", "weight_level": "channel"}
FINEST = "16 ch x 1 px, weights (k, tap, 16)"
PIXEL = "all ch x 1 px, weights (k, tap, all): pixel scale"
EXECUTED = "pixel scale as executed: 16-bit results and window of exponents too"
GRANULARITY = (
    scales(FINEST, **FINE),
    scales("16 ch x 1 px, weights (k, 16), shared by taps", weight_taps="shared", **FINE),
    scales("16 ch x 1 px, 4-bit integer scales of both: VS-Quant", **FINE, **INTEGER),
    scales("16 ch x 4x4 px, weights (k, tap, 16)", block=4, **FINE),
    scales("16 ch x 4x4 px, weights (k, 16), shared by taps", block=4, weight_taps="shared",
           **FINE),
    scales("32 ch x 1 px, weights (k, tap, 32)", group=32, weight_group=32),
    scales("64 ch x 1 px, weights (k, tap, 64)", group=64, weight_group=64),
    scales(PIXEL),
    scales("pixel scale, network input in 8 bits", input_bits=8),
    scales("pixel scale, 1x1 layers without taking out channel means", skips="plain"),
    scales("pixel scale, weights (k): one scale an output channel", weight_taps="shared"),
    scales("pixel scale, power-of-two activation scales", scale="power_of_two"),
    scales("pixel scale, power-of-two scales of both", scale="power_of_two",
           weight_scale="power_of_two"),
    scales("pixel scale, 4-bit integer scales of both", **INTEGER),
    scales("all ch x 2x2 px, weights (k, tap, all)", block=2),
    scales("all ch x 4x4 px, weights (k), shared by taps", block=4, weight_taps="shared"),
    scales("one dynamic scale an image, weights (k, tap, all)", block=None),
    scales("one static scale a time step, weights (k, tap, all)", static="step"),
    scales("one static scale a channel, weights (k, tap, all)", static="channel"),
    scales("one static scale, weights (k, tap, all)", static="tensor"),
    Row(name=EXECUTED, policy=POLICIES["mixed"], executed=True),
)
SKIPS = dataclasses.replace(POLICIES["mixed"], skips="mxint8")
CHOICE = (
    Row(name="none", policy=POLICIES["mixed"], mxint8="none"),
    Row(name="the paper's rule: first block, last two 3x3 convolutions", policy=POLICIES["mixed"],
        mxint8="paper"),
    Row(name="all 1x1 layers without activation", policy=SKIPS, mxint8="none"),
    Row(name="the paper's rule and these", policy=SKIPS, mxint8="paper"),
    *(Row(name=f"by sensitivity, budget {budget:.1%}", policy=POLICIES["mixed"], mxint8=budget)
      for budget in BUDGETS),
)
FOUR = ("int4", "int4-channel", "int4-vsq", "int4-fp8", "uint4-fp8")
COMPARED = (
    *(Row(name=name, policy=POLICIES[name], mxint8="none") for name in POLICIES if name != "mixed"),
    Row(name="int4-vsq, upper activation scale calibrated",
        policy=dataclasses.replace(POLICIES["int4-vsq"], level="tensor"), mxint8="none"),
    *(Row(name=f"{name}, most sensitive layers MXINT8", policy=POLICIES[name],
          mxint8=sensitivity.BUDGET) for name in FOUR),
)
TABLES = {"granularity": GRANULARITY, "mxint8": CHOICE, "policies": COMPARED}


class Study:
    """A model, what its calibrations found, and the images that it is measured on."""

    def __init__(self, model, images, *, seed=0, calibration_images=CALIBRATION_IMAGES,
                 steps=STEPS):
        self.model = model.half().float().eval().requires_grad_(False)
        self.options = {"images": calibration_images, "steps": steps}
        self.shapes = layer_shapes(model.unet)
        self.calibrations, self.found = {}, None
        generator = torch.Generator().manual_seed(seed)
        sigma = (torch.randn(len(images), generator=generator) * P_STD + P_MEAN).exp()
        sigma = sigma.clamp(model.sigma_min, model.sigma_max)
        noise = torch.randn(images.shape, generator=generator)
        self.batches = list(zip(images.split(BATCH), sigma.split(BATCH), noise.split(BATCH)))
        self.right, self.reference = self.losses(self.model)

    def losses(self, denoise):
        """EDM's losses (N,) and denoised images of all batches; `denoise` is like the Precond."""
        outputs, losses = [], []

        class Stand:
            sigma_data = self.model.sigma_data

            def __call__(self, x, sigma):
                outputs.append(denoise(x, sigma))
                return outputs[-1]

        with torch.no_grad():
            for images, sigma, noise in self.batches:
                losses.append(edm_loss(Stand(), images, sigma, noise))
        return torch.cat(losses).double(), torch.cat(outputs)

    def calibration(self, wanted):
        """Calibration for a policy: policies share one where they look at the same numbers."""
        key = (wanted.skips == "plain", wanted.clip and (wanted.codes, wanted.unsigned))
        if key not in self.calibrations:
            self.calibrations[key] = calibrate(
                self.model, policy.formats(self.model.unet, wanted), wanted, **self.options)
        return self.calibrations[key]

    def wide(self, mxint8):
        """Names of a row's layers in MXINT8."""
        if mxint8 == "paper":
            return policy.paper(self.model.unet)
        if mxint8 == "none":
            return set()
        if self.found is None:
            mixed = POLICIES["mixed"]
            self.found = sensitivity.measure(self.model, mixed, self.calibration(mixed))
        return sensitivity.pick(self.found, mxint8)

    def measure(self, row):
        """What the row costs, a dict; see `study`."""
        names = policy.formats(self.model.unet, row.policy, self.wide(row.mxint8))
        if row.executed:
            wide = ",".join(self.wide(row.mxint8)) or "none"
            quantized = quantize_model(self.model, {}, policy=row.policy.name, mxint8=wide,
                                       **self.options)
        else:
            quantized = FakeQuantized.from_calibration(
                self.model, row.policy, names, self.calibration(row.policy))
        zeros, seen = {}, {}

        def observe(name, x):
            zeros[name] = zeros.get(name, 0) + int((x == 0).sum())
            seen[name] = seen.get(name, 0) + x.numel()

        losses, outputs = self.losses(lambda x, sigma: quantized(x, sigma, on_input=observe))
        narrow = [shape for shape in self.shapes if names[shape.name][:2] == "A4"]
        macs = sum(shape.macs for shape in narrow)
        bits, half = policy.memory(row.policy, names, self.shapes)
        return {
            "name": row.name, "sqnr_db": round(sqnr(self.reference, outputs), 3),
            "loss": round((losses.mean() / self.right.mean() - 1).item(), 5),
            "loss_error": round(((losses - self.right).std() / math.sqrt(len(losses))
                                 / self.right.mean()).item(), 5),
            "zero_fraction": round(sum(shape.macs * zeros[shape.name] / seen[shape.name]
                                       for shape in narrow) / macs, 4) if macs else None,
            "mxint8": round(policy.macs_share(names, self.shapes), 5),
            "scale_operations": round(policy.scale_operations(row.policy, names, self.shapes), 3),
            "compute_saved": round(1 - policy.cost(names, self.shapes), 4),
            "memory_saved": round(1 - bits / half, 4)}


def study(model, images, *, rows=GRANULARITY, seed=0, calibration_images=CALIBRATION_IMAGES,
          steps=STEPS, progress=None):
    """Measure all `rows` on `images` at random noise levels.

    Parameters
    ----------
    model : Precond; its weights are first rounded to half precision, in place
    images : (N, C, H, W) in [-1, 1], held out from training
    seed : of noise levels (EDM's lognormal ones) and noise
    progress : callable (rows done, rows) or None

    Returns a list of dicts with ``name``; ``sqnr_db`` of the denoiser's output; ``loss`` (EDM's
    loss over float's, less 1) and ``loss_error`` (its standard error); ``zero_fraction`` of the
    4-bit layers' activations, weighted by MACs; ``mxint8``, share of the MACs; and
    ``scale_operations``, ``compute_saved`` and ``memory_saved`` of `golden.policy`. Float comes
    first, with its own EDM loss as ``edm_loss``.
    """
    bench = Study(model, images, seed=seed, calibration_images=calibration_images, steps=steps)
    table = [{"name": "float", "edm_loss": bench.right.mean().item()}]
    for row in rows:
        table.append(bench.measure(row))
        if progress is not None:
            progress(len(table) - 1, len(rows))
    return table


def fitting(rows, unet):
    """The rows that the network can have: unsigned codes need ReLU."""
    relu = any(layer.relu for layer in unet.layers())
    return tuple(row for row in rows if relu or row.policy.name != "uint4-fp8")


def decide(table):
    """The granularity that the table of `study` justifies, as one sentence."""
    losses = {row["name"]: row["loss"] for row in table if "loss" in row}
    excess = losses[PIXEL] - losses[FINEST]
    kept = excess <= TOLERANCE
    return (f"pixel scale costs {100 * losses[PIXEL]:+.1f} % of loss, the finest granularity "
            f"{100 * losses[FINEST]:+.1f} %: {100 * excess:.1f} points more, "
            f"{'within' if kept else 'beyond'} the {100 * TOLERANCE:.0f} allowed; "
            f"{'pixel scale it is' if kept else 'take the finest'}")


def markdown(table):
    """The table of `study` as Markdown."""
    heads = ("", "SQNR dB", "loss", "zero codes", "MXINT8", "scale operations", "compute saved",
             "memory saved")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in table[1:]:
        zeros = "-" if row["zero_fraction"] is None else f"{row['zero_fraction']:.3f}"
        lines.append(f"| {row['name']} | {row['sqnr_db']:.1f} "
                     f"| {100 * row['loss']:+.1f} ± {100 * row['loss_error']:.1f} % "
                     f"| {zeros} | {100 * row['mxint8']:.1f} % | {row['scale_operations']:.1f} "
                     f"| {100 * row['compute_saved']:.1f} % | {100 * row['memory_saved']:.1f} % |")
    return "\n".join(lines)


def main(arguments=None):
    """The command: measure, print the tables and the decision, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m golden.study", description=__doc__)
    parser.add_argument("model", help="shipped name or path of a model file")
    parser.add_argument("--data", help="folder of the data set (or SQDM_DATA)")
    parser.add_argument("--json", help="file to write the measurements to")
    parser.add_argument("--images", type=int, default=512, help="held-out images")
    parser.add_argument("--table", choices=TABLES, help="only this table")
    options = parser.parse_args(arguments)
    try:
        model, record = load(options.model)
        if options.images < 2:
            raise ValueError(f"images must be at least 2, not {options.images!r}")
        pixels = data.load(record.get("data"), options.data, "test").pixels[:options.images]
        wanted = {name: fitting(rows, model.unet) for name, rows in TABLES.items()
                  if options.table in (None, name)}
        with rich.progress.Progress() as bar:
            task = bar.add_task("study", total=1)
            measured = study(model, data.to_float(pixels),
                             rows=[row for rows in wanted.values() for row in rows],
                             progress=lambda done, total: bar.update(task, completed=done / total))
        first, following = measured[0], iter(measured[1:])
        tables = {name: [first, *(next(following) for _ in rows)]
                  for name, rows in wanted.items()}
        result = {"model": str(options.model), "images": len(pixels), "tables": tables}
        for name, table in tables.items():
            print(f"\n{name}: EDM loss of float {first['edm_loss']:.5f}\n\n{markdown(table)}")
            if name == "granularity":
                result["decision"] = decide(table)
                print(f"\n{result['decision']}")
        if options.json:
            write_json(options.json, result)
    except (ValueError, OSError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
