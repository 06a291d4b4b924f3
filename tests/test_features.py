"""golden/features.py: what its networks compute, and one line for weights that cannot be used."""

import hashlib
import json
import re

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from golden import data, features, quality

PART = 1000      # test images, of 10,000


def expect(call, text):
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        call()


# Digits.

def test_shipped_classifier():
    extractor = features.load("digits")
    path = features.classifier_path()
    assert path.stat().st_size < 500_000
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    pixels = torch.randint(256, (7, 1, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    calls = []
    found = extractor.features(pixels, 3, lambda: calls.append(1))
    assert found.shape == (7, 64) and found.dtype == torch.float64 and len(calls) == 3
    assert (found >= 0).all() and found.std(0).gt(0).any()
    torch.testing.assert_close(found[2:3], extractor.features(pixels[2:3]), rtol=0, atol=1e-5)
    assert extractor.features(pixels[:0]).shape == (0, 64)
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["sqdm"])
    assert record["accuracy"] > 0.985
    assert {"kind", "network", "data", "images", "epochs", "batch", "seed"} <= set(record)


@pytest.mark.parametrize(("pixels", "text"), [
    (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "torch.uint8 of shape (2, 3, 32, 32)"),
    (torch.zeros(2, 1, 32, 32), "torch.float32 of shape (2, 1, 32, 32)"),
    (torch.zeros(1, 32, 32, dtype=torch.uint8), "torch.uint8 of shape (1, 32, 32)")])
def test_pixels_of_another_kind(pixels, text):
    expect(lambda: features.load("digits").features(pixels),
           f"pixels must be uint8 of shape (N, 1, H, W) for digits, not {text}")


def test_files_that_are_no_classifier(tmp_path):
    path = tmp_path / "c.safetensors"
    expect(lambda: features.load("digits", path=path),
           f"{path}: classifier must be readable (No such file or directory)")
    content = features.classifier_path().read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(features.FeatureError,
                       match=f'^{path}: must be a whole "sqdm classifier" '):
        features.load("digits", path=path)
    tensors = safetensors.torch.load(content)
    metadata = {"sqdm": json.dumps({"kind": "sqdm classifier", "network": "digits"})}
    bias = tensors.pop("linear.bias")
    for change, text in (({}, "linear.bias is missing"),
                         ({"linear.bias": bias, "a": bias.clone()}, "a must not be there"),
                         ({"linear.bias": bias[:9]}, "linear.bias must have shape (10,), not (9,)"),
                         ({"linear.bias": bias / 0},
                          "linear.bias must be finite, not NaN or infinite")):
        safetensors.torch.save_file({**tensors, **change}, path, metadata)
        expect(lambda: features.load("digits", path=path), f"{path}: tensor {text}")
    safetensors.torch.save_file({"a": bias}, path)
    expect(lambda: features.load("digits", path=path),
           f'{path}: must be a "sqdm classifier" of digits')


def test_unknown_features():
    expect(lambda: features.load("fid"),
           "features must be one of digits, resnet56, inception, not 'fid'")


@pytest.mark.data
def test_shipped_classifier_on_real_digits(data_folder):
    """Accuracy, and distances that order what is done to the images."""
    extractor = features.load("digits")
    images = data.load("mnist", data_folder, "test")
    part = data.Images(images.pixels[-PART:], images.labels[-PART:])
    assert features.accuracy(extractor, part) > 0.98
    found = distances(extractor, images.pixels[:PART], part.pixels)
    assert found["half"] < found["5 bits"] < found["noise 16"]


@pytest.mark.data
def test_training_the_digit_classifier(data_folder, tmp_path, capsys):
    """A short training names more digits right than chance, and repeats itself."""
    out = tmp_path / "c.safetensors"
    steps = []
    record = features.train_digits(data_folder, out, images=1280, epochs=2, batch=32,
                                   progress=lambda *counts: steps.append(counts))
    assert record["accuracy"] > 0.5 and steps[-1] == (80, 80)
    first = out.read_bytes()
    features.train_digits(data_folder, out, images=1280, epochs=2, batch=32)
    assert out.read_bytes() == first
    assert features.main(["--data", str(tmp_path), "--out", str(out)]) == 2
    assert re.fullmatch(r"features: mnist: file train-images-idx3-ubyte is missing in .*\n",
                        capsys.readouterr().err)
    assert out.read_bytes() == first


# ResNet-56.

DAMAGES = ("half", "5 bits", "3 bits", "noise 4", "noise 16")


def distances(extractor, real, other, names=DAMAGES):
    """Fréchet distances to `real` of `other` as it is and damaged, uint8 pixels."""
    noise = torch.randn(other.shape, generator=torch.Generator().manual_seed(0))
    reference = quality.Reference(extractor.features(real))
    damaged = {"half": other, "5 bits": other // 8 * 8 + 4, "3 bits": other // 32 * 32 + 16,
               "noise 4": (other + 4 * noise).round().clamp(0, 255).to(torch.uint8),
               "noise 16": (other + 16 * noise).round().clamp(0, 255).to(torch.uint8)}
    return {name: reference.distance(extractor.features(damaged[name])) for name in names}


def test_option_a_shortcut():
    """Where the size changes, every second pixel, and zero channels on both sides."""
    block = features.ResidualBlock(2, 4, 2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_resnet_sizes():
    network = features.ResNet()
    assert sum(value.numel() for value in network.parameters()) == 853_018     # as published
    assert sum(isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
               for module in network.modules()) == 56


@pytest.mark.data
def test_resnet56(data_folder):
    """On a part: accuracy as published, and distances in the order of the damage."""
    extractor = features.load("resnet56", data_folder)
    images = data.load("cifar10", data_folder, "test")
    part = data.Images(images.pixels[:500], images.labels[:500])
    assert features.accuracy(extractor, part) == pytest.approx(0.9339, abs=0.025)
    found = distances(extractor, images.pixels[-500:], part.pixels,
                      ("half", "3 bits", "noise 16"))
    assert found["half"] < found["3 bits"] < found["noise 16"]


@pytest.mark.data
@pytest.mark.slow
def test_resnet56_on_all_test_images(data_folder):
    extractor = features.load("resnet56", data_folder)
    images = data.load("cifar10", data_folder, "test")
    assert features.accuracy(extractor, images) == 0.9339
    found = distances(extractor, images.pixels[:5000], images.pixels[5000:])
    assert found == pytest.approx({"half": 0.074, "5 bits": 0.219, "noise 4": 0.991,
                                   "3 bits": 2.679, "noise 16": 18.65}, rel=0.03)


def test_resnet56_files(tmp_path, monkeypatch):
    expect(lambda: features.load("resnet56", tmp_path),
           f"resnet56: file resnet56-4bfd9763.npz is missing in {tmp_path / 'resnet_cifar10'} "
           "(weights of akamaster/pytorch_resnet_cifar10 as npz with torch's names)")
    weights = {name: value.numpy() for name, value in features.ResNet().state_dict().items()
               if "num_batches" not in name}
    path = tmp_path / features.RESNET56
    np.savez(path, **weights)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    expect(lambda: features.load("resnet56", tmp_path),
           f"{path}: sha256 must be {features.RESNET56_SHA256}, not {digest}")
    monkeypatch.setattr(features, "RESNET56_SHA256", digest)
    assert features.load("resnet56", tmp_path).sha256 == digest
    del weights["linear.bias"]
    np.savez(path, **weights)
    monkeypatch.setattr(features, "RESNET56_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    expect(lambda: features.load("resnet56", tmp_path),
           f"{path}: array 'linear.bias is not a file in the archive' is missing")


# Inception.

def test_inception_sizes():
    """Those of the published file: torchvision's body, 1008 classes, and its length in bytes."""
    with torch.device("meta"):
        network = features.Inception()
    parameters = {name: value.numel() for name, value in network.named_parameters()}
    body = sum(size for name, size in parameters.items() if not name.startswith("fc."))
    assert body == 21_785_568       # torchvision's 27,161,264 less its two classifiers
    assert network.fc.weight.shape == (1008, 2048)
    stored = sum(value.numel() for name, value in network.state_dict().items()
                 if "num_batches" not in name)
    assert 0 < 95_628_359 - 4 * stored < 100_000           # names and headers


def test_inception_on_random_weights():
    """Shapes all along, and that borders are averaged over what is there."""
    torch.manual_seed(0)
    network = features.Inception().eval()
    shapes = []
    for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6a", "Mixed_6e", "Mixed_7a",
                 "Mixed_7b", "Mixed_7c"):
        getattr(network, name).register_forward_hook(
            lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = network(features.enlarge(pixels))
    assert shapes == [(64, 147, 147), (192, 71, 71), (288, 35, 35), (768, 17, 17), (768, 17, 17),
                      (1280, 8, 8), (2048, 8, 8), (2048, 8, 8)]
    assert found.shape == (1, 2048)
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(features.average(ones), ones) and torch.equal(features.largest(ones), ones)
    assert network.Mixed_7b.pool is features.average and network.Mixed_7c.pool is features.largest


def test_enlarge():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    found = features.enlarge(pixels)
    assert found.shape == (2, 3, 299, 299) and -1 <= found.min() and found.max() <= 1
    # The middle lies between four pixels, the corners outside all others' reach.
    middle = pixels[:, :, 3:5, 3:5].float().mean((2, 3)) / 127.5 - 1
    torch.testing.assert_close(found[:, :, 149, 149], middle)
    torch.testing.assert_close(found[:, :, 0, 298], pixels[:, :, 0, 7] / 127.5 - 1)
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    torch.testing.assert_close(features.enlarge(white), torch.ones(1, 3, 299, 299))


def test_inception_files(tmp_path, monkeypatch):
    expect(lambda: features.load("inception"),
           "inception: weights must be given by --weights FILE: "
           "pt_inception-2015-12-05-6726825d.pth, as pytorch-fid publishes it")
    path = tmp_path / "inception.pth"
    torch.save({"fc.bias": torch.zeros(1008)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    expect(lambda: features.load("inception", path=path),
           f"{path}: sha256 must be {features.INCEPTION_SHA256}, not {digest}")
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest)
    expect(lambda: features.load("inception", path=path),
           f"{path}: tensor Conv2d_1a_3x3.conv.weight is missing")
