"""Quality of quantized denoisers: paired errors, denoising loss, Fréchet distance, with intervals.

Every figure is an `Estimate`: a value and a bootstrap interval over images. Rows that are compared
share noise, held-out images and resamples, so that their differences are paired. What each figure
means is in ``docs/quality.md``.
"""

import contextlib
import dataclasses
import hashlib
import math
import pathlib

import safetensors
import safetensors.torch
import torch
from rich.table import Table

from golden import data, features, pictures, quantize
from golden.checkpoint import replace_file, write_text
from golden.fake import one_hot
from golden.load import load as load_model
from golden.network import layer_shapes
from golden.policy import get, macs_share
from golden.quantized_network import evaluate
from golden.sampler import HEUN, STEPS, Sampler, draw_noise, evaluations, sample
from golden.train import P_MEAN, P_STD, edm_loss

__all__ = ["LEVELS", "Estimate", "Row", "Reference", "Held", "resamples", "interval", "sqnr",
           "sqnr_gain", "psnr", "relative", "frechet", "moments", "hold", "losses", "samples",
           "compare", "in_integers", "measure", "assess", "table", "markdown"]

BATCH = 50                  # images sampled, or denoised, at once
LEVELS = (0.05, 0.2, 0.5, 1.0, 3.0, 10.0)    # noise levels of the loss
CONFIDENCE = 0.95
RESAMPLES = 1000
SHOWN = 10                  # images a row of the picture
LOGNORMAL = "lognormal"     # EDM's distribution of noise levels in training


# Intervals.

@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    def as_list(self):
        """[value, low, high], each with 6 significant digits; None in place of infinity."""
        return [float(f"{number:.6g}") if math.isfinite(number) else None
                for number in (self.value, self.low, self.high)]


def resamples(count, number=RESAMPLES, seed=0):
    """How often each of `count` images is in each bootstrap resample: (number, count) float64.

    Rows of the same `count`, `number` and `seed` get the same resamples.
    """
    if count < 2:
        raise ValueError(f"images of an interval must be at least 2, not {count!r}")
    if number < 10:
        raise ValueError(f"resamples must be at least 10, not {number!r}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(count, (number, count), generator=generator)
    return torch.zeros(number, count, dtype=torch.float64).scatter_add_(
        1, chosen, torch.ones(number, count, dtype=torch.float64))


def interval(value, replicates, confidence=CONFIDENCE):
    """Estimate of `value` from its bootstrap `replicates` (R,).

    The bounds are the percentiles of the replicates, moved by value - mean: a resample has fewer
    distinct images than the sample, which shifts a Fréchet distance up and leaves means alone.
    """
    if not math.isfinite(value):
        return Estimate(value, value, value)
    tail = (1 - confidence) / 2
    bounds = torch.quantile(replicates.double(), torch.tensor([tail, 1 - tail],
                                                              dtype=torch.float64))
    low, high = (bounds - replicates.double().mean() + value).tolist()
    return Estimate(value, low, high)


def decibels(signal, error):
    """10 log10(signal / error), infinite without error."""
    return 10 * (signal / error).log10()


def sqnr(reference, other, weights):
    """Estimate of the SQNR in dB of images `other` (N, ...), paired with `reference`.

    Signal and error are sums over all images; `weights` are `resamples`.
    """
    signal, error = squares(reference), squares(reference - other)
    return interval(decibels(signal.sum(), error.sum()).item(),
                    decibels(weights @ signal, weights @ error))


def sqnr_gain(reference, other, another, weights):
    """Estimate of the SQNR in dB of `another` less that of `other`, paired."""
    errors = squares(reference - other), squares(reference - another)
    return interval(decibels(errors[0].sum(), errors[1].sum()).item(),
                    decibels(weights @ errors[0], weights @ errors[1]))


def psnr(reference, other, weights):
    """Estimate of the PSNR in dB of images in [-1, 1], from the mean error of all images."""
    error = squares(reference - other) / reference[0].numel()
    count = weights.new_tensor(len(error))
    return interval(decibels(4 * count, error.sum()).item(),
                    decibels(4 * count, weights @ error))


def squares(images):
    """Sum of squares of each image (N, ...), float64."""
    return images.double().flatten(1).square().sum(1)


def mean(values, weights):
    """Estimate of the mean of `values` (N,)."""
    return interval(values.double().mean().item(), weights @ values.double() / len(values))


def relative(values, reference, weights):
    """Estimate of mean(values) / mean(reference) - 1 of paired (N,)."""
    values, reference = values.double(), reference.double()
    return interval((values.sum() / reference.sum()).item() - 1,
                    (weights @ values) / (weights @ reference) - 1)


# Fréchet distance.

def moments(features):
    """Mean (D,) and covariance (D, D) of `features` (N, D), float64, over N - 1.

    Raises ValueError unless N is larger than D.
    """
    count, size = features.shape
    check_count(count, size)
    features = features.double()
    average = features.mean(0)
    centred = features - average
    return average, centred.T @ centred / (count - 1)


def check_count(count, size):
    """Raise ValueError unless `count` samples are more than `size`, the features of one."""
    if count <= size:
        raise ValueError(f"samples must be more than {size}, the features of an image, "
                         f"not {count!r}")


def square_root(matrix):
    """Symmetric square root of a symmetric positive semidefinite matrix, by eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def frechet(mean1, covariance1, mean2, covariance2, root1=None):
    """Fréchet distance of two Gaussians, |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2), in float64.

    The trace of the root is that of (C1^1/2 C2 C1^1/2)^1/2, which is symmetric: its eigenvalues
    are real, and those that rounding makes negative count as 0. `mean2` (..., D) and `covariance2`
    (..., D, D) may have leading dimensions; `root1` is `square_root` of `covariance1`.
    """
    root1 = square_root(covariance1) if root1 is None else root1
    inner = root1 @ covariance2 @ root1
    roots = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(-1)
    traces = (covariance1.diagonal().sum()
              + covariance2.diagonal(dim1=-2, dim2=-1).sum(-1))
    return (mean1 - mean2).square().sum(-1) + traces - 2 * roots


class Reference:
    """Features of real images, to which Fréchet distances are taken.

    Their own sampling error is no part of any interval: all rows share it.
    """

    def __init__(self, features):
        self.mean, self.covariance = moments(features)
        self.root = square_root(self.covariance)

    def distance(self, features):
        """Fréchet distance of `features` (N, D) to the reference."""
        return frechet(self.mean, self.covariance, *moments(features), self.root).item()

    def replicates(self, features, weights):
        """Distances (R,) of the resamples `weights` (R, N) of `features`."""
        moments(features)          # checks their number
        origin = features.mean(0)
        centred, count = features - origin, len(features)
        found = []
        for part in weights.split(max(1, (1 << 24) // centred.numel())):
            averages = part @ centred / count                                    # (r, D)
            products = (part[:, :, None] * centred).mT @ centred                 # (r, D, D)
            products -= count * averages[:, :, None] * averages[:, None, :]
            found.append(frechet(self.mean, self.covariance, origin + averages,
                                 products / (count - 1), self.root))
        return torch.cat(found)


# Denoising loss.

@dataclasses.dataclass(frozen=True)
class Held:
    """Held-out images with the noise that every row gets to remove.

    Members
    -------
    images : (N, C, H, W) in [-1, 1]
    sigmas, noises : by noise level, "lognormal" first, (N,) and (N, C, H, W)
    """

    images: torch.Tensor
    sigmas: dict
    noises: dict


def hold(images, low, high, levels=LEVELS, seed=0):
    """Held for `images` (N, C, H, W): EDM's lognormal levels within `low`..`high`, and `levels`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(len(images), generator=generator) * P_STD + P_MEAN).exp()
    sigmas = {LOGNORMAL: drawn.clamp(low, high)}
    sigmas |= {f"{level:g}": torch.full((len(images),), float(level)) for level in levels}
    noises = {name: torch.randn(images.shape, generator=generator) for name in sigmas}
    return Held(images, sigmas, noises)


@torch.no_grad()
def losses(denoise, held, sigma_data, *, folder=None, progress=None):
    """EDM's loss of every image, (N,) float64 by noise level; `progress` () once a batch.

    With `folder`, which is for this denoiser alone, they are kept there and found again.
    """
    class Stand:
        def __call__(self, x, sigma):
            return denoise(x, sigma)

    stand, found = Stand(), {}
    stand.sigma_data = sigma_data
    for name, sigma in held.sigmas.items():
        rest = held.images, sigma, held.noises[name]
        path = folder and pathlib.Path(folder) / f"loss-{digest(*rest)}.safetensors"
        values = kept(path, "losses", (len(held.images),), torch.float64)
        if values is None:
            parts = []
            for batch in zip(*(value.split(BATCH) for value in rest)):
                parts.append(edm_loss(stand, *batch).double())
                if progress is not None:
                    progress()
            values = torch.cat(parts)
            keep(path, "losses", values)
        elif progress is not None:
            for _ in range(-(-len(values) // BATCH)):
                progress()
        found[name] = values
    return found


def digest(*tensors):
    """Digest of the elements of tensors, 16 hexadecimal digits."""
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(tensor.contiguous().numpy().tobytes())
    return made.hexdigest()[:16]


def keep(path, name, value):
    """Write a tensor to the file `path`, if it is not None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = safetensors.torch.save({name: value})
        replace_file(path, lambda temporary: temporary.write_bytes(content))


def kept(path, name, shape, dtype):
    """The tensor that `keep` wrote, or None if there is no whole one of that shape and type."""
    if path is None:
        return None
    try:
        value = safetensors.torch.load_file(path)[name]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
    return value if value.shape == shape and value.dtype == dtype else None


# Samples.

@torch.no_grad()
def fingerprint(denoise, architecture):
    """A digest of what `denoise` does to one noise at two noise levels.

    It changes with weights, formats and code, and may change with the machine.
    """
    noise = draw_noise(1, architecture, 0)
    return digest(*(denoise(sigma * noise, sigma) for sigma in (5.0, 0.3)))


def samples(denoise, architecture, count, *, seed=0, steps=STEPS, sampler=HEUN, folder=None,
            progress=None):
    """Images (count, C, H, W) from the first `count` noises of `seed`, in batches.

    With `folder`, which is for this denoiser alone, each batch is kept there and found again by a
    later call with the same seed, steps and sampler, so that an interrupted run goes on.
    `progress` () is called once an evaluation of a batch.
    """
    total = len(evaluations(steps, sampler))
    run = hashlib.sha256(f"{seed} {steps} {sampler}".encode()).hexdigest()[:8]
    noise, found = draw_noise(count, architecture, seed), []
    for first in range(0, count, BATCH):
        part = noise[first:first + BATCH]
        path = folder and (pathlib.Path(folder)
                           / f"{run}-{first:06d}-{first + len(part):06d}.safetensors")
        images = kept(path, "images", part.shape, torch.float32)
        if images is None:
            images = sample(denoise, part, steps, lambda *_: progress and progress(),
                            sampler=sampler)
            keep(path, "images", images)
        elif progress is not None:
            for _ in range(total):
                progress()
        found.append(images)
    return torch.cat(found)


def compare(model, noise, steps=None, progress=None, *, sampler=None, seed=0):
    """Float images, quantized images from the same noise, and the SQNR of every evaluation in dB.

    The SQNR is that of the quantized denoiser at the states of the float run. `progress` () is
    called before each evaluation of both runs. `sampler` is Heun over the model's noise levels by
    default; `seed` that of its churn.
    """
    steps = steps or model.steps
    sampler = sampler or Sampler.for_model(model)
    labels = one_hot(model.label, model.architecture)
    ratios = []

    def denoise(x, sigma):
        right = model.float_model(x, sigma, labels)
        ratios.append(quantize.sqnr(right, model(x, sigma)))
        return right

    def advance(*_):
        if progress is not None:
            progress()

    floats = sample(denoise, noise, steps, advance, sampler=sampler, seed=seed)
    return floats, sample(model, noise, steps, advance, sampler=sampler, seed=seed), ratios


def in_integers(model):
    """A denoiser that runs the QuantizedModel `model` in exact integers, image by image.

    It takes the noise levels of the model's schedule only, and sigma for all images or for each.
    """
    numbers = {}
    for evaluation in model.schedule:
        numbers.setdefault(torch.tensor(evaluation.sigma, dtype=torch.float32).item(),
                           evaluation.index)

    def denoise(x, sigma):
        sigmas = torch.as_tensor(sigma, dtype=torch.float32).expand(len(x)).tolist()
        for value in sigmas:
            if value not in numbers:
                raise ValueError(f"sigma must be a noise level of the schedule of {model.steps} "
                                 f"steps, not {value!r}")
        return torch.cat([evaluate(model, image[None], numbers[value]).denoised
                          for image, value in zip(x, sigmas)])

    return denoise


# The table.

@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A denoiser to measure.

    Members
    -------
    name : what it is, unique among the rows
    denoise : callable (x, sigma) -> image, like the Precond that it stands for
    architecture : of its network
    base : name of the row of the same network in float, for paired errors; None for that itself
    count : samples
    facts : JSON values that go into the results; after the samples, those of `after`
    after : callable () -> dict, called when the row's samples and losses are done, or None
    """

    name: str
    denoise: object
    architecture: object
    base: str = None
    count: int = 1000
    facts: dict = dataclasses.field(default_factory=dict)
    after: object = None


@contextlib.contextmanager
def silent(text, total=None):
    """What `measure` shows its progress by, if nothing else is given."""
    yield lambda *_: None


def measure(rows, held, extractor, reference, *, seed=0, steps=STEPS, sampler=HEUN, folder=None,
            number=RESAMPLES, task=silent):
    """Measure `rows`, of which the first is the reference; returns results and images.

    Parameters
    ----------
    rows : list of Row; a base comes before the rows that name it
    held : Held
    extractor : golden.features.Extractor
    reference : Reference of features of real images
    seed, steps, sampler : of the samples
    folder : keeps samples and losses, so that an interrupted run goes on
    number : of bootstrap resamples
    task : context manager like `sim.progress.task`

    Returns a list of dicts of JSON values, one a row, and the samples by row. Figures are
    [value, low, high]. ``frechet_relative`` compares the same number of samples, from the same
    seeds, of row and reference; `Reference` is the same for all.
    """
    check(rows)
    loss_weights = resamples(len(held.images), number, seed)
    weights = {count: resamples(count, number, seed) for count in {row.count for row in rows}}
    images, vectors, lost, replicates, results = {}, {}, {}, {}, []
    for row in rows:
        place = folder and pathlib.Path(folder) / fingerprint(row.denoise, row.architecture)
        evaluated = -(-row.count // BATCH) * len(evaluations(steps, sampler))
        with task(f"{row.count} samples of {row.name}", evaluated) as advance:
            images[row.name] = samples(row.denoise, row.architecture, row.count, seed=seed,
                                       steps=steps, sampler=sampler, folder=place,
                                       progress=advance)
        batches = -(-len(held.images) // BATCH) * len(held.sigmas)
        with task(f"loss of {row.name}", batches) as advance:
            lost[row.name] = losses(row.denoise, held, row.architecture.sigma_data, folder=place,
                                    progress=advance)
        vectors[row.name] = extractor.features(data.to_pixels(images[row.name]), BATCH)
        first = rows[0].name
        result = {"name": row.name, "base": row.base, "samples": row.count, **row.facts,
                  **(row.after() if row.after else {})}
        for name, other in (("", row.base), ("reference_", first)):
            if other is not None and other != row.name:
                count = min(row.count, len(images[other]))
                pair = images[other][:count], images[row.name][:count]
                if count not in weights:
                    weights[count] = resamples(count, number, seed)
                result[f"{name}sqnr_db"] = sqnr(*pair, weights[count]).as_list()
                result[f"{name}psnr_db"] = psnr(*pair, weights[count]).as_list()
        result["loss"] = {name: mean(value, loss_weights).as_list()
                          for name, value in lost[row.name].items()}
        result["loss_relative"] = {
            name: relative(value, lost[first][name], loss_weights).as_list()
            for name, value in lost[row.name].items()}
        result |= distances(row, first, reference, vectors, weights, replicates)
        results.append(result)
    return results, images


def distances(row, first, reference, vectors, weights, replicates):
    """``frechet`` and ``frechet_relative`` of a row; `replicates` keeps those of the first."""
    count = row.count
    own = vectors[row.name]
    value, found = reference.distance(own), reference.replicates(own, weights[count])
    if row.name == first:
        replicates[count] = value, found
    if count not in replicates:
        other = vectors[first][:count]
        replicates[count] = (reference.distance(other),
                             reference.replicates(other, weights[count]))
    other, others = replicates[count]
    return {"frechet": interval(value, found).as_list(),
            "frechet_relative": interval(value / other - 1, found / others - 1).as_list()}


def different(names):
    """Raise ValueError unless all `names` of rows differ."""
    for n, name in enumerate(names):
        if name in names[:n]:
            raise ValueError(f"rows must have different names, not two {name!r}")


def check(rows):
    """Raise ValueError unless `rows` can be measured together."""
    names = [row.name for row in rows]
    different(names)
    for n, row in enumerate(rows):
        if row.base is not None and row.base not in names[:n]:
            raise ValueError(f"base of {row.name} must be an earlier row, not {row.base!r}")
        shape, first = ((item.architecture.img_channels, item.architecture.resolution)
                        for item in (row, rows[0]))
        if shape != first:
            raise ValueError(f"images of {row.name} must be like those of {rows[0].name}, "
                             f"{first[0]} channels of {first[1]} pixels, not {shape}")
        if row.count > rows[0].count:
            raise ValueError(f"samples of {row.name} must be at most those of {rows[0].name}, "
                             f"{rows[0].count}, not {row.count!r}")


def show(figure, digits=1, scale=1.0, sign=""):
    """A figure of the results as text: value and interval; empty without one."""
    if figure is None:
        return ""
    if figure[0] is None:
        return "inf"
    value, low, high = (f"{round(scale * number, digits) + 0.0:{sign}.{digits}f}"   # no -0.0
                        for number in figure)
    return f"{value} ({low} to {high})"


def percent(figure):
    """A share less 1 as text; empty for the reference itself."""
    return show(figure, 1, 100, "+") if any(figure) else ""


HEAD = ("format", "samples", "zeros", "MXINT8 MACs", "SQNR dB", "loss", "to reference %",
        "Fréchet", "to reference %")


def cells(result):
    """Cells of the table's row of a result of `measure`, under `HEAD`."""
    shares = [f"{result[name]:.1%}" if result.get(name) is not None else ""
              for name in ("zero_fraction", "mxint8_share")]
    loss, excess = result["loss"][LOGNORMAL], result["loss_relative"][LOGNORMAL]
    return [result["name"], str(result["samples"]), *shares, show(result.get("sqnr_db")),
            show(loss, 4), percent(excess), show(result["frechet"], 3),
            percent(result["frechet_relative"])]


def table(report):
    """The figures of a report of `assess`, for rich; intervals below the figures."""
    made = Table(*HEAD, title=report["distance"], box=None, padding=(0, 1), pad_edge=False)
    for column in made.columns[1:]:
        column.justify = "right"
    floor = report["training_images"]
    for row in (*map(cells, report["rows"]),
                ("training images", str(floor["samples"]), *[""] * 5, show(floor["frechet"], 3))):
        made.add_row(*(cell.replace(" (", "\n").replace(" to ", "..").removesuffix(")")
                       for cell in row))
    return made


def markdown(report):
    """Two Markdown tables of a report: the figures, and the relative loss by noise level."""
    results, floor = report["rows"], report["training_images"]
    lines = [line(HEAD), "|" + "---|" * len(HEAD), *(line(cells(item)) for item in results),
             line(("training images", str(floor["samples"]), *[""] * 5,
                   show(floor["frechet"], 3), ""))]
    levels = [name for name in results[0]["loss"] if name != LOGNORMAL]
    lines += ["", line(("loss to reference %, at sigma", *levels)),
              "|" + "---|" * (len(levels) + 1)]
    lines += [line((item["name"], *(percent(item["loss_relative"][level]) for level in levels)))
              for item in results[1:]]
    return "\n".join(lines) + "\n"


def line(texts):
    return "| " + " | ".join(texts) + " |"


# A user's models.

DATASETS = {1: "mnist", 3: "cifar10"}                     # by channels, where the file names none
FEATURES = {"mnist": "digits", "cifar10": "resnet56"}
# Samples of the rows that matter, and of the others; one count for all where it is small.
COUNTS = {"mnist": (500, 500), "cifar10": (10_000, 2000)}
MAIN = ("float", "float relu", "int4-vsq", "uint4-fp8", "mixed")
NARROW = ("A4U", "A4S")
ZERO_IMAGES = 8             # whose zero codes are counted


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A model of the user's.

    Members
    -------
    source : as the user gave it
    model : Precond
    quantized : QuantizedModel or FakeQuantized, or None where the file holds none
    record : of the file, with its ``origin``
    """

    source: str
    model: object
    quantized: object
    record: dict

    @classmethod
    def read(cls, source):
        """The Network of all that `golden.load.load` opens; ModelError says what is wrong."""
        model, record = load_model(source)
        quantized = quantize.load(source) if record.get("quantized") else None
        kept = {name: value for name, value in record.items()
                if name not in ("kind", "architecture", "quantized", "mxint8", "sqnr_db")}
        return cls(str(source), model if quantized is None else quantized.float_model, quantized,
                   kept)

    @property
    def stored(self):
        """Names of the policies in whose formats the file is: one or none."""
        return [] if self.quantized is None else [self.quantized.policy.name]

    @property
    def dataset(self):
        """Name of the data set it was trained on, as its file says, or else by its channels."""
        named = self.record.get("data")
        if named is None and self.model.architecture.resolution == 32:
            named = DATASETS.get(self.model.architecture.img_channels)
        if named not in FEATURES:
            raise ValueError(f"data of {self.source} must be one of {', '.join(FEATURES)}, "
                             f"not {named!r}")
        return named


def split(text):
    """Names between commas, as a list."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def chosen(name, images, count, seed):
    """`count` of `images` (N, ...) by `seed`: files are sorted by where the digits came from.

    Raises ValueError if there are fewer, with the `name` of the count.
    """
    if not 2 <= count <= len(images):
        raise ValueError(f"{name} must be in 2..{len(images)}, not {count!r}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[:count]]


def zero_share(model, noise, steps, sampler, progress=None):
    """Share of the MACs of the 4-bit layers whose activation code is 0, in samples from `noise`.

    The mean over evaluations and images; None where the model has no 4-bit layers.
    """
    macs = {shape.name: shape.macs for shape in layer_shapes(model.float_model.unet)
            if model.formats[shape.name] in NARROW}
    counts = {name: [0, 0] for name in macs}

    def observe(name, x):
        if name in counts:
            counts[name][0] += (x == 0).sum().item()
            counts[name][1] += x.numel()

    if not macs:
        return None
    sample(lambda x, sigma: model(x, sigma, on_input=observe), noise, steps,
           lambda *_: progress and progress(), sampler=sampler)
    return sum(macs[name] * zeros / total for name, (zeros, total) in counts.items()) / sum(
        macs.values())


def rows_of(network, name, policies, counts, *, seed=0, steps=STEPS, sampler=HEUN, task=silent):
    """Rows of a Network: in float under `name`, as its file is quantized, and by `policies`.

    The file's constants, and not a new calibration's, stand under the name of its policy.

    Parameters
    ----------
    policies : names of `golden.policy.POLICIES`, each with a rule for MXINT8 layers after a plus
        sign, where it is not the usual one: "int4-fp8+paper"
    counts : samples of the rows of `MAIN`, and of the others
    """
    model, a = network.model, network.model.architecture
    rows = [Row(name=name, denoise=model, architecture=a, count=counts[0])]
    noise = draw_noise(ZERO_IMAGES, a, seed)

    def add(title, quantized):
        with task(f"zeros of {title}", len(evaluations(steps, sampler))) as advance:
            zeros = zero_share(quantized, noise, steps, sampler, advance)
        share = macs_share(quantized.formats, layer_shapes(model.unet))
        rows.append(Row(
            name=title, denoise=quantized, architecture=a, base=name,
            count=counts[title not in MAIN],
            facts={"policy": dataclasses.asdict(quantized.policy), "formats": quantized.formats,
                   "zero_fraction": zeros, "mxint8_share": share}))

    if network.quantized is not None:
        add(network.quantized.policy.name, network.quantized)
    for title in policies:
        policy, _, rule = title.partition("+")
        with task(f"calibrating {title}", 100) as advance:
            quantized = quantize.quantize_model(
                model, network.record, policy=policy, mxint8=rule or None, seed=seed, steps=steps,
                progress=steadily(advance))
        add(title, quantized)
    return rows


def steadily(advance, total=100):
    """A function that takes fractions of the work done and calls `advance` () `total` times."""
    done = 0

    def progress(fraction):
        nonlocal done
        while done < int(total * fraction):
            advance()
            done += 1

    return progress


def assess(source, reference=None, *, policies=(), reference_policies=(), folder=None, out,
           count=None, others=None, images=512, seed=0, steps=STEPS, number=RESAMPLES,
           extractor=None, weights=None, task=silent):
    """Measure a model in several formats on the data set that it was trained on.

    Leaves ``quality.png``, ``quality.md`` and ``samples/`` in the folder `out`; returns JSON
    values.

    Parameters
    ----------
    source, reference : shipped names or model files; the float network of `reference`, or else of
        `source`, is what every row is compared with
    policies, reference_policies : formats to measure the network of each in, see `golden.policy`
    folder : of the data; the loss is taken on test images, the distance to all of them (FID: to
        all training images, as published)
    count, others : samples of the rows named in `MAIN`, and of the others
    images : held out for the loss
    extractor, weights : name of the features, and a file of weights, see `golden.features.load`
    """
    network = Network.read(source)
    first = network if reference is None else Network.read(reference)
    dataset = first.dataset
    extractor = features.load(extractor or FEATURES[dataset], folder, weights)
    test = data.load(dataset, folder, "test").pixels
    sampler = Sampler.for_model(first.model)
    held = hold(data.to_float(chosen("images", test, images, seed)), sampler.sigma_min,
                sampler.sigma_max, seed=seed)
    count, others = (given or usual for given, usual in zip((count, others), COUNTS[dataset]))
    counts = count, min(count, others)
    options = {"seed": seed, "steps": steps, "sampler": sampler, "task": task}
    check_count(counts[1], extractor.size)
    training = chosen("samples", data.load(dataset, folder, "train").pixels, count, seed)
    plans = [(first, "float", reference_policies if reference else policies)]
    if reference is not None:
        plans.append((network, f"float {network.model.architecture.activation}", policies))
    titles = [title for item, name, given in plans
              for title in (name, *item.stored, *given)]
    different(titles)
    for item, _, given in plans:
        for title in given:
            get(title.partition("+")[0], item.model.unet)
    rows = [row for plan in plans for row in rows_of(*plan, counts, **options)]
    check(rows)
    real, split_name = test, "test"
    if extractor.name == "inception":
        real, split_name = data.load(dataset, folder, "train").pixels, "train"
    batches = -(-len(real) // BATCH) + -(-count // BATCH)
    with task(f"features of {len(real) + count} real images", batches) as advance:
        real_features = Reference(extractor.features(real, BATCH, advance))
        own = extractor.features(training, BATCH, advance)
    floor = interval(real_features.distance(own),
                     real_features.replicates(own, resamples(count, number, seed)))
    results, found = measure(rows, held, extractor, real_features, seed=seed, steps=steps,
                             sampler=sampler, folder=pathlib.Path(out) / "samples", number=number,
                             task=task)
    pictures.samples(pathlib.Path(out) / "quality.png",
                     {name: samples[:SHOWN] for name, samples in found.items()},
                     f"Images of the same noise, seed {seed}, {steps} steps")
    report = {
        "models": [{"name": item.source, **item.record}
                   for item in dict.fromkeys((first, network))],
        "dataset": dataset, "held_out_images": images, "levels": list(LEVELS), "seed": seed,
        "steps": steps, "resamples": number, "confidence": CONFIDENCE,
        "distance": extractor.distance,
        "features": {"name": extractor.name, "sha256": extractor.sha256,
                     "real_images": len(real), "split": split_name},
        "rows": results,
        "training_images": {"samples": count, "frechet": floor.as_list()},
    }
    text = markdown(report)
    write_text(pathlib.Path(out) / "quality.md", text)
    return report
