"""Image features for the Fréchet distance, each network with the sha256 of its weights.

``resnet56`` is a CIFAR-10 classifier from a file in the data folder, ``digits`` a classifier of
our own for MNIST, shipped with the package, and ``inception`` the network of the published FID,
from a file that the user supplies. ``python -m golden.features --data DIR`` trains ``digits``.

Sources: He et al. 2016 (arXiv 1512.03385), section 4.2, for ResNet-56; Szegedy et al. 2016 (arXiv
1512.00567) and the Inception of Heusel et al. 2017 (arXiv 1706.08500) for FID.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import sys

import rich.progress
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from golden import data
from golden.checkpoint import replace_file

__all__ = ["FeatureError", "Extractor", "EXTRACTORS", "load", "classifier_path", "accuracy",
           "train_digits"]

BATCH = 100
KIND = "sqdm classifier"
RESNET56 = "resnet56-4bfd9763.npz"
# Published by pytorch-fid and torch-fidelity: the TensorFlow graph of 2015-12-05 in torch's names.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RESNET56_SHA256 = "abef877fda074a20ba288b4e7ec4fe11bd385b585c4d25e01c7fb580b0dae725"


class FeatureError(ValueError):
    """Weights of a feature extractor cannot be used; one line, with what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network that turns images into vectors.

    Members
    -------
    name : "resnet56", "digits" or "inception"
    sha256 : of the file of its weights
    channels : of its images
    size : D, features of an image
    distance : what the Fréchet distance on these features is called
    network : module; (N, channels, H, W) as `preprocess` makes it to features (N, D)
    preprocess : callable, pixels (N, channels, H, W) uint8 to the network's input
    """

    name: str
    sha256: str
    channels: int
    size: int
    distance: str
    network: nn.Module
    preprocess: object

    @torch.no_grad()
    def features(self, pixels, batch=BATCH, progress=None):
        """Features (N, D) in float64 of `pixels` (N, channels, H, W) uint8.

        `progress` () is called after every batch. Raises ValueError for pixels of another kind.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != self.channels:
            raise ValueError(f"pixels must be uint8 of shape (N, {self.channels}, H, W) for "
                             f"{self.name}, not {pixels.dtype} of shape {tuple(pixels.shape)}")
        found = [torch.zeros(0, self.size, dtype=torch.float64)]
        for part in pixels.split(batch):
            found.append(self.network(self.preprocess(part)).double())
            if progress is not None:
                progress()
        return torch.cat(found)


@torch.no_grad()
def accuracy(extractor, images):
    """Share of `images` (golden.data.Images) that a classifier names right."""
    right = 0
    for pixels, labels in zip(images.pixels.split(BATCH), images.labels.split(BATCH)):
        scores = extractor.network.classify(extractor.features(pixels).float())
        right += (scores.argmax(1) == labels).sum().item()
    return right / len(images)


def read_weights(path, what):
    """The bytes of a file and their sha256."""
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise FeatureError(f"{path}: {what} must be readable ({error.strerror})") from None
    return content, hashlib.sha256(content).hexdigest()


def fill(network, weights, path):
    """Put `weights`, a dict of tensors, into `network`, which becomes constant.

    Counters of batches may be missing. Raises FeatureError unless names and shapes agree.
    """
    weights = {name: value.float() if value.is_floating_point() else value
               for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    expected = {name: value for name, value in network.state_dict().items()
                if not name.endswith("num_batches_tracked")}
    for name in {**expected, **weights}:
        if name not in weights or name not in expected:
            missing = "is missing" if name not in weights else "must not be there"
            raise FeatureError(f"{path}: tensor {name} {missing}")
        if weights[name].shape != expected[name].shape:
            raise FeatureError(f"{path}: tensor {name} must have shape "
                               f"{tuple(expected[name].shape)}, not {tuple(weights[name].shape)}")
        if not torch.isfinite(weights[name]).all():
            raise FeatureError(f"{path}: tensor {name} must be finite, not NaN or infinite")
    network.load_state_dict(weights, strict=False)
    return network.eval().requires_grad_(False)


# Digits: MNIST at 32x32.

class Digits(nn.Module):
    """A small convolutional classifier of (N, 1, 32, 32) in [-1, 1] with 64 features."""

    size = 64

    def __init__(self):
        super().__init__()
        widths, layers = ((1, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)), []
        for cin, cout, stride in widths:
            layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout),
                       nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.linear = nn.Linear(self.size, 10)

    def forward(self, x):
        """Features (N, 64): the means over the image of the last ReLU."""
        return self.body(x).mean((2, 3))

    def classify(self, features):
        return self.linear(features)


def classifier_path(name="mnist32"):
    """Path of a shipped classifier."""
    return pathlib.Path(__file__).parent / "classifiers" / f"{name}.safetensors"


def load_digits(folder=None, path=None):
    path = classifier_path() if path is None else path
    content, digest = read_weights(path, "classifier")
    try:
        weights = safetensors.torch.load(content)
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("sqdm", "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FeatureError(f'{path}: must be a whole "{KIND}" ({reason})') from None
    if not isinstance(record, dict) or record.get("network") != "digits":
        raise FeatureError(f'{path}: must be a "{KIND}" of digits')
    return Extractor(
        name="digits", sha256=digest, channels=1, size=Digits.size, network=fill(
            Digits(), weights, path), preprocess=data.to_float,
        distance="Fréchet distance on features of the digit classifier")


def train_digits(folder, out, *, seed=0, epochs=3, batch=128, images=None, progress=None):
    """Train the digit classifier on MNIST's training images and write it to the file `out`.

    Adam, one cosine from 2e-3 to 0, images moved by up to 2 pixels each way. On the same machine
    and number of threads, the same `seed` gives the same weights.

    Parameters
    ----------
    images : of the training set, from its start; None: all
    progress : callable (steps done, steps) or None

    Returns the record of the file; its ``accuracy`` is that of the stored weights on the test set.
    """
    training = data.load("mnist", folder, "train")
    pixels, labels = training.pixels[:images], training.labels[:images]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Digits().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * (len(pixels) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % (steps // epochs) == 0:
            order = torch.randperm(len(pixels), generator=generator).split(batch)
        chosen = order[step % (steps // epochs)]
        x = functional.pad(data.to_float(pixels[chosen]), (2, 2, 2, 2), value=-1.0)
        down, right = torch.randint(5, (2,), generator=generator).tolist()
        x = x[:, :, down:down + 32, right:right + 32].contiguous(memory_format=torch.channels_last)
        loss = functional.cross_entropy(network.classify(network(x)), labels[chosen],
                                        label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    weights = {name: value.detach().half().contiguous() if value.is_floating_point() else value
               for name, value in network.state_dict().items()
               if not name.endswith("num_batches_tracked")}
    record = {"kind": KIND, "network": "digits", "data": "mnist", "images": len(pixels),
              "epochs": epochs, "batch": batch, "seed": seed}

    def write(record):
        content = safetensors.torch.save(weights, {"sqdm": json.dumps(record)})
        replace_file(out, lambda temporary: temporary.write_bytes(content))

    write(record)
    record["accuracy"] = accuracy(load_digits(path=out), data.load("mnist", folder, "test"))
    write(record)
    return record


# ResNet-56: CIFAR-10.

class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; where the size changes, the shortcut drops pixels and pads channels."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.stride, self.padding = stride, (cout - cin) // 2

    def forward(self, x):
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(out + x)


class ResNet(nn.Module):
    """ResNet of 6 `blocks` + 2 layers for (N, 3, 32, 32) with 64 features and 10 classes."""

    size = 64

    def __init__(self, blocks=9):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for n, (cin, cout) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            stride = 1 if n == 1 else 2
            setattr(self, f"layer{n}", nn.Sequential(
                ResidualBlock(cin, cout, stride),
                *(ResidualBlock(cout, cout, 1) for _ in range(blocks - 1))))
        self.linear = nn.Linear(self.size, 10)

    def forward(self, x):
        """Features (N, 64): the means over the image before the classifier."""
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def classify(self, features):
        return self.linear(features)


def normalize(pixels):
    """Pixels (N, 3, H, W) uint8 as the classifier was trained on them."""
    mean, deviation = (torch.tensor(values)[:, None, None] for values in
                       ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((pixels.float() / 255 - mean) / deviation).contiguous(
        memory_format=torch.channels_last)


def load_resnet56(folder=None, path=None):
    if path is None:
        folder = data.data_folder(folder)
        paths = data.find(folder, (".", "resnet_cifar10"), [RESNET56])
        if paths is None:
            raise FeatureError(
                f"resnet56: file {RESNET56} is missing in {folder / 'resnet_cifar10'} (weights of "
                f"akamaster/pytorch_resnet_cifar10 as npz with torch's names)")
        path = paths[0]
    digest = read_weights(path, "weights")[1]
    check_digest(path, digest, RESNET56_SHA256)
    arrays = data.read_npz(path, [name for name in ResNet().state_dict()
                                  if not name.endswith("num_batches_tracked")])
    weights = {name: torch.from_numpy(value) for name, value in arrays.items()}
    network = fill(ResNet(), weights, path).to(memory_format=torch.channels_last)
    return Extractor(name="resnet56", sha256=digest, channels=3, size=ResNet.size,
                     network=network, preprocess=normalize,
                     distance="Fréchet distance on ResNet-56 features")


def check_digest(path, digest, expected):
    if digest != expected:
        raise FeatureError(f"{path}: sha256 must be {expected}, not {digest}")


# Inception: FID.

class Unit(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, cin, cout, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return functional.relu(self.bn(self.conv(x)))


def average(x):
    """Mean of 3x3 pixels; a border pixel is the mean of those that are there, as in TensorFlow."""
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Mixed35(nn.Module):
    """Branches at 35x35 pixels."""

    def __init__(self, cin, pooled):
        super().__init__()
        self.branch1x1 = Unit(cin, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(cin, 48, 1), Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(cin, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(cin, pooled, 1)

    def forward(self, x):
        return torch.cat([
            self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average(x))], 1)


class Reduce35(nn.Module):
    """From 35x35 pixels to 17x17."""

    def __init__(self, cin):
        super().__init__()
        self.branch3x3 = Unit(cin, 384, 3, 2)
        self.branch3x3dbl_1 = Unit(cin, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, 2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, 2)], 1)


class Mixed17(nn.Module):
    """Branches at 17x17 pixels, of 7x7 convolutions cut into 1x7 and 7x1."""

    def __init__(self, width):
        super().__init__()
        row = {"kernel": (1, 7), "padding": (0, 3)}
        column = {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, width, 1)
        self.branch7x7_2, self.branch7x7_3 = Unit(width, width, **row), Unit(width, 192, **column)
        self.branch7x7dbl_1 = Unit(768, width, 1)
        self.branch7x7dbl_2 = Unit(width, width, **column)
        self.branch7x7dbl_3 = Unit(width, width, **row)
        self.branch7x7dbl_4 = Unit(width, width, **column)
        self.branch7x7dbl_5 = Unit(width, 192, **row)
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(average(x))], 1)


class Reduce17(nn.Module):
    """From 17x17 pixels to 8x8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(768, 192, 1), Unit(192, 320, 3, 2)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, 3, 2)

    def forward(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven),
                          functional.max_pool2d(x, 3, 2)], 1)


class Mixed8(nn.Module):
    """Branches at 8x8 pixels; `pool` is what the last branch starts with."""

    def __init__(self, cin, pool):
        super().__init__()
        row = {"kernel": (1, 3), "padding": (0, 1)}
        column = {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Unit(cin, 320, 1)
        self.branch3x3_1 = Unit(cin, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit(384, 384, **row), Unit(384, 384, **column)
        self.branch3x3dbl_1 = Unit(cin, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, **row), Unit(384, 384, **column)
        self.branch_pool = Unit(cin, 192, 1)
        self.pool = pool

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([
            self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x))], 1)


def largest(x):
    """Largest of 3x3 pixels: what the last block of the TensorFlow graph pools by."""
    return functional.max_pool2d(x, 3, 1, 1)


class Inception(nn.Module):
    """The Inception of FID for (N, 3, 299, 299) in [-1, 1], with 2048 features and 1008 classes.

    Names of tensors are torchvision's.
    """

    size = 2048

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = Mixed35(192, 32), Mixed35(256, 64)
        self.Mixed_5d, self.Mixed_6a = Mixed35(288, 64), Reduce35(288)
        self.Mixed_6b, self.Mixed_6c = Mixed17(128), Mixed17(160)
        self.Mixed_6d, self.Mixed_6e = Mixed17(160), Mixed17(192)
        self.Mixed_7a = Reduce17()
        self.Mixed_7b, self.Mixed_7c = Mixed8(1280, average), Mixed8(2048, largest)
        self.fc = nn.Linear(self.size, 1008)

    def forward(self, x):
        """Features (N, 2048): the means over the image before the classifier."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = functional.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = functional.max_pool2d(x, 3, 2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    def classify(self, features):
        return self.fc(features)


def enlarge(pixels):
    """Pixels (N, 3, H, W) uint8 as (N, 3, 299, 299) in [-1, 1], bilinear."""
    return functional.interpolate(pixels.float() / 255, (299, 299), mode="bilinear",
                                  align_corners=False) * 2 - 1


def load_inception(folder=None, path=None):
    if path is None:
        raise FeatureError(
            "inception: weights must be given by --weights FILE: "
            f"pt_inception-2015-12-05-{INCEPTION_SHA256[:8]}.pth, as pytorch-fid publishes it")
    digest = read_weights(path, "weights")[1]
    check_digest(path, digest, INCEPTION_SHA256)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return Extractor(name="inception", sha256=digest, channels=3, size=Inception.size,
                     network=fill(Inception(), weights, path), preprocess=enlarge, distance="FID")


EXTRACTORS = {"digits": load_digits, "resnet56": load_resnet56, "inception": load_inception}


def load(name, folder=None, path=None):
    """The Extractor `name`, one of `EXTRACTORS`.

    Parameters
    ----------
    folder : of the data, where ``resnet56`` looks for its weights, or None for SQDM_DATA
    path : of a file of weights; ``inception`` has no other

    Raises
    ------
    FeatureError
        If the weights are missing, damaged or not those whose sha256 is known.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"features must be one of {', '.join(EXTRACTORS)}, not {name!r}")
    return EXTRACTORS[name](folder, path)


def main(arguments=None):
    """The command: train the digit classifier, and say how many test images it names right."""
    parser = argparse.ArgumentParser(prog="python -m golden.features",
                                     description="Train the digit classifier.")
    parser.add_argument("--data", help="folder of MNIST (or SQDM_DATA)")
    parser.add_argument("--out", default=classifier_path(), help="file for the weights")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        with rich.progress.Progress() as bar:
            task = bar.add_task("digit classifier", total=1)
            record = train_digits(
                options.data, options.out, seed=options.seed, epochs=options.epochs,
                progress=lambda done, total: bar.update(task, completed=done / total))
    except (ValueError, OSError) as error:
        print(f"features: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {record['accuracy']:.2%} of the test images right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
