"""golden/quality.py: figures against closed forms, intervals that cover, rows that are paired."""

import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sqdm
from golden import data, features, pictures, quality, quantize
from golden.checkpoint import save_model
from golden.network import Architecture, Precond
from golden.quantized_network import evaluate
from golden.sampler import Sampler, draw_noise, evaluations, sample

ARCHITECTURE = Architecture(resolution=8, model_channels=16, channel_mult=(1, 1), num_blocks=1)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(size, seed):
    """A random positive definite matrix."""
    factor = normals(size, size, seed=seed)
    return factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def distribution(size, seed):
    return normals(size, seed=seed + 100), covariance(size, seed)


# The Fréchet distance.

def test_frechet_of_commuting_covariances():
    """For diagonal covariances it is the squared difference of means and of deviations."""
    mean1, mean2 = normals(5), normals(5, seed=1)
    first, second = normals(5, seed=2).abs() + 0.1, normals(5, seed=3).abs() + 0.1
    expected = (mean1 - mean2).square().sum() + (first - second).square().sum()
    found = quality.frechet(mean1, first.square().diag(), mean2, second.square().diag())
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_against_the_eigenvalues_of_the_product():
    """The trace is the sum of roots of the eigenvalues of C1 C2, which is not symmetric."""
    (mean1, first), (mean2, second) = distribution(20, 0), distribution(20, 1)
    roots = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    expected = (mean1 - mean2).square().sum() + first.trace() + second.trace() - 2 * roots
    found = quality.frechet(mean1, first, mean2, second)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    reverse = quality.frechet(mean2, second, mean1, first)
    assert reverse.item() == pytest.approx(found.item(), rel=1e-10)


def test_frechet_does_not_change_under_rotation_and_shift():
    (mean1, first), (mean2, second) = distribution(12, 0), distribution(12, 1)
    turn = torch.linalg.qr(normals(12, 12, seed=7))[0]
    shift = normals(12, seed=8)
    moved = quality.frechet(turn @ mean1 + shift, turn @ first @ turn.T,
                            turn @ mean2 + shift, turn @ second @ turn.T)
    assert moved.item() == pytest.approx(
        quality.frechet(mean1, first, mean2, second).item(), rel=1e-10)


def test_frechet_of_singular_covariances():
    """Features that are always 0, as dead units give, make no NaN and no negative root."""
    mean, matrix = distribution(8, 0)
    flat = matrix.clone()
    flat[5:], flat[:, 5:] = 0, 0
    assert quality.frechet(mean, flat, mean, flat).item() == pytest.approx(0, abs=1e-6)
    zero = torch.zeros_like(matrix)
    assert quality.frechet(mean, zero, mean, matrix).item() == pytest.approx(matrix.trace().item())


def test_distance_of_samples_of_known_gaussians():
    """Large samples come close to the closed form; the smaller the sample the larger the bias."""
    mean, deviations = normals(6), normals(6, seed=1).abs() + 0.5
    real = normals(200_000, 6, seed=2)
    other = normals(100_000, 6, seed=3) * deviations + mean
    expected = (mean.square().sum() + (deviations - 1).square().sum()).item()
    reference = quality.Reference(real)
    assert reference.distance(other) == pytest.approx(expected, rel=0.01)
    same = [reference.distance(normals(count, 6, seed=4)) for count in (20, 200, 2000, 20_000)]
    assert same == sorted(same, reverse=True) and same[-1] < 1e-3
    assert reference.distance(other[torch.randperm(len(other))]) == pytest.approx(
        reference.distance(other), rel=1e-9)


def test_replicates_are_distances_of_resamples():
    """The vectorized resampling against features that are really repeated."""
    reference, own = quality.Reference(normals(500, 4)), normals(40, 4, seed=1) * 2 + 3
    weights = quality.resamples(40, 12, seed=5)
    expected = [reference.distance(own.repeat_interleave(row.long(), 0)) for row in weights]
    assert reference.replicates(own, weights).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_samples(count):
    text = f"^samples must be more than 4, the features of an image, not {count}$"
    with pytest.raises(ValueError, match=text):
        quality.moments(normals(count, 4))
    with pytest.raises(ValueError, match=text):
        quality.Reference(normals(50, 4)).replicates(normals(count, 4), torch.ones(10, count))


# Intervals.

def test_resamples():
    weights = quality.resamples(30, 2000, seed=1)
    assert weights.shape == (2000, 30) and set(weights.sum(1).tolist()) == {30.0}
    assert weights.mean(0).sub(1).abs().max() < 0.1
    assert weights.var(0).mean().item() == pytest.approx(1 - 1 / 30, abs=0.03)
    assert torch.equal(weights, quality.resamples(30, 2000, seed=1))
    assert not torch.equal(weights, quality.resamples(30, 2000, seed=2))
    with pytest.raises(ValueError, match="^images of an interval must be at least 2, not 1$"):
        quality.resamples(1)
    with pytest.raises(ValueError, match="^resamples must be at least 10, not 9$"):
        quality.resamples(5, 9)


def coverage(estimates, truth):
    return sum(item.low <= truth <= item.high for item in estimates) / len(estimates)


def test_intervals_of_means_cover():
    weights = [quality.resamples(60, 400, seed=n) for n in range(200)]
    values = [normals(60, seed=n).exp() for n in range(200)]
    assert 0.87 <= coverage(map_all(quality.mean, values, weights), math.exp(0.5)) <= 0.98


def map_all(function, *arguments):
    return [function(*items) for items in zip(*arguments)]


def test_intervals_of_paired_ratios_cover_and_are_narrow():
    """Pairing takes out what image and noise contribute to both."""
    values = [normals(80, seed=n).exp() for n in range(200)]
    others = [value * (1.1 + 0.05 * normals(80, seed=1000 + n)) for n, value in enumerate(values)]
    weights = [quality.resamples(80, 400, seed=n) for n in range(200)]
    found = map_all(quality.relative, others, values, weights)
    assert 0.88 <= coverage(found, 0.1) <= 0.99
    paired = sum(item.high - item.low for item in found) / len(found)
    alone = quality.mean(values[0], weights[0])
    assert paired < 0.2 * (alone.high - alone.low) / alone.value


def test_intervals_of_distances_cover():
    """They are intervals of the distance at that number of samples: bias moves both alike."""
    reference = quality.Reference(normals(5000, 4, seed=99))
    draws = [normals(60, 4, seed=n) * 1.3 for n in range(300)]
    values = [reference.distance(draw) for draw in draws]
    truth = sum(values) / len(values)
    found = [quality.interval(value, reference.replicates(
        draw, quality.resamples(60, 200, seed=n))) for n, (draw, value) in
        enumerate(zip(draws[:120], values))]
    assert 0.85 <= coverage(found, truth) <= 0.99
    assert all(item.low <= item.value <= item.high for item in found)


def test_sqnr_and_psnr():
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = images + 0.02
    weights = quality.resamples(20, 100)
    found = quality.sqnr(images, other, weights)
    assert found.value == pytest.approx(quantize.sqnr(images, other), abs=1e-6)
    assert found.low < found.value < found.high
    found = quality.psnr(images, other, weights)
    assert found.value == pytest.approx(10 * math.log10(4 / 0.02 ** 2), abs=1e-3)
    assert found.high - found.low < 1e-3                   # every image has the same error
    assert quality.sqnr(images, images, weights).as_list() == [None, None, None]
    gain = quality.sqnr_gain(images, other, images + 0.01, weights)
    assert gain.value == pytest.approx(20 * math.log10(2), abs=1e-3)


# Loss and samples.

def test_losses_of_a_denoiser_that_is_known():
    """A denoiser that returns its input is wrong by the noise alone."""
    images = torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    held = quality.hold(images, 0.002, 80.0, (0.2, 3.0), seed=1)
    seen = []
    found = quality.losses(lambda x, sigma: x, held, 0.5, progress=lambda:
                           seen.append(1))
    assert list(found) == ["lognormal", "0.2", "3"] and len(seen) == 3 * 4
    for level in (0.2, 3.0):
        weight = (level ** 2 + 0.25) / (0.5 * level) ** 2
        assert found[f"{level:g}"].mean().item() == pytest.approx(weight * level ** 2, rel=0.03)
    logs = held.sigmas["lognormal"].log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.25)
    assert logs.std().item() == pytest.approx(1.2, abs=0.25)
    again = quality.hold(images, 0.002, 80.0, (0.2, 3.0), seed=1)
    assert torch.equal(held.noises["3"], again.noises["3"])
    assert not torch.equal(held.noises["3"], held.noises["0.2"])


def test_samples_are_kept_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "BATCH", 4)
    calls = []

    def denoise(x, sigma, factor=0.5):
        calls.append(len(x))
        return factor * x / (1 + torch.as_tensor(sigma))

    def draw(count, **options):
        before = len(calls)
        images = quality.samples(denoise, ARCHITECTURE, count, **{
            "steps": 3, "folder": tmp_path, **options})
        return images, len(calls) - before

    class Stop(Exception):
        pass

    def interrupt():
        if len(calls) > 5 + 2:
            raise Stop

    with pytest.raises(Stop):
        draw(10, progress=interrupt)
    images, work = draw(10)
    assert work == 10                       # two of three batches, five evaluations each
    expected = sample(denoise, draw_noise(10, ARCHITECTURE), 3)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    steps = []
    again, work = draw(10, progress=lambda: steps.append(1))
    assert work == 0 and torch.equal(again, images) and len(steps) == 15
    assert draw(9)[1] == 5                  # the last batch is shorter
    assert draw(10, seed=1)[1] == draw(10, sampler=Sampler(sigma_max=70.0))[1] == 15
    assert draw(10, folder=None)[1] == 15
    damaged, *others = sorted(tmp_path.glob("*-000000-000004.safetensors"))
    assert len(others) == 2
    for path in (damaged, *others):
        path.write_bytes(path.read_bytes()[:100])
    again, work = draw(10)
    assert work == 5 and torch.equal(again, images)


def test_losses_are_kept(tmp_path):
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    calls = []

    def denoise(x, sigma):
        calls.append(len(x))
        return x

    def measure(seed=0, levels=(0.2,)):
        before = len(calls)
        held = quality.hold(images, 0.002, 80.0, levels, seed=seed)
        return quality.losses(denoise, held, 0.5, folder=tmp_path), len(calls) - before

    first, work = measure()
    again, none = measure()
    assert (work, none) == (2, 0) and all(map(torch.equal, first.values(), again.values()))
    assert measure(levels=(0.2, 0.5))[1] == 1
    assert measure(seed=1)[1] == 2


def test_fingerprints(small_model):
    """They tell a model from itself in another format, and from its float network."""
    found = {quality.fingerprint(denoise, small_model.architecture) for denoise in
             (small_model, small_model, small_model.float_model)}
    assert len(found) == 2


def test_compare(small_model):
    noise = draw_noise(2, small_model.architecture, 3)
    calls = []
    floats, quantized, ratios = quality.compare(small_model, noise, progress=lambda:
                                                calls.append(1))
    assert torch.equal(floats, sample(small_model.float_model, noise, small_model.steps))
    assert torch.equal(quantized, sample(small_model, noise, small_model.steps))
    assert ratios == quantize.denoiser_sqnr(small_model, noise)
    assert len(calls) == 2 * len(ratios) == 14


# Integers.

def held_on_schedule(model, count, index, seed=0):
    """Held at the noise level of evaluation `index` alone."""
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    sigma = evaluations(model.steps)[index].sigma
    return quality.hold(images, sigma, sigma, (), seed)


def test_integers_give_the_figures_of_fake_quantization(small_model):
    """Samples and loss through the exact integers, within the intervals of the fast definition."""
    model, steps, count = small_model, small_model.steps, 8
    noise = draw_noise(count, model.architecture)
    floats, fast, _ = quality.compare(model, noise)
    exact = sample(quality.in_integers(model), noise, steps)
    assert not torch.equal(exact, fast)                     # else nothing is compared
    weights = quality.resamples(count, 400)
    gain = quality.sqnr_gain(floats, fast, exact, weights)
    assert gain.low <= 0 <= gain.high
    for index in (1, 3, 5):
        held = held_on_schedule(model, count, index)
        lost = [quality.losses(denoise, held, 0.5)["lognormal"] for denoise in
                (model.float_model, model, quality.in_integers(model))]
        expected, found = (quality.relative(values, lost[0], weights) for values in lost[1:])
        assert expected.low <= found.value <= expected.high


def test_in_integers(small_model):
    denoise = quality.in_integers(small_model)
    sigma = evaluations(small_model.steps)[3].sigma
    x = sigma * draw_noise(2, small_model.architecture)
    found = denoise(x, sigma)
    assert torch.equal(found[1:], evaluate(small_model, x[1:], 3).denoised)
    assert torch.equal(found, denoise(x, torch.tensor([sigma, sigma])))
    with pytest.raises(ValueError, match=r"^sigma must be a noise level of the schedule of 4 steps,"
                                         r" not 0\.123\d*$"):
        denoise(x, 0.123)


@pytest.mark.slow
def test_integers_of_the_shipped_model():
    """Whole samples through all evaluations in exact integers, and the loss at three levels."""
    model, count = quantize.load("mnist32"), 8
    noise = draw_noise(count, model.architecture)
    floats, fast, _ = quality.compare(model, noise)
    exact = sample(quality.in_integers(model), noise, model.steps)
    weights = quality.resamples(count, 400)
    for images in (fast, exact):
        print(f"\nSQNR dB {quality.sqnr(floats, images, weights)}")
    gain = quality.sqnr_gain(floats, fast, exact, weights)
    print(f"difference dB {gain}")
    assert gain.low <= 0 <= gain.high and exact.sub(fast).abs().max() > 0
    for index in (9, 17, 25):
        sigma = evaluations(model.steps)[index].sigma
        held = quality.hold(floats, sigma, sigma, ())
        lost = [quality.losses(denoise, held, 0.5)["lognormal"] for denoise in
                (model.float_model, model, quality.in_integers(model))]
        expected, found = (quality.relative(values, lost[0], weights) for values in lost[1:])
        print(f"loss to float at sigma {sigma:.3g}: {expected}, in integers {found}")
        assert expected.low <= found.value <= expected.high


# The table.

class Averages(nn.Module):
    """Features: means of four quarters of the image."""

    def forward(self, x):
        return nn.functional.avg_pool2d(x, 4).flatten(1)


@pytest.fixture
def extractor():
    return features.Extractor(name="averages", sha256="0", channels=1, size=4, network=Averages(),
                              preprocess=data.to_float, distance="Fréchet distance on averages")


def rows_of(small_model, **options):
    architecture = small_model.architecture
    return [quality.Row(name="float", denoise=small_model.float_model, architecture=architecture,
                        count=30),
            quality.Row(name="quantized", denoise=small_model, architecture=architecture,
                        base="float", count=20, facts={"zero_fraction": 0.5},
                        after=lambda: {"mxint8_share": 0.1}, **options)]


def test_measure(small_model, extractor, tmp_path):
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    real = torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8)
    reference = quality.Reference(extractor.features(real))
    held = quality.hold(images, 0.002, 80.0, (0.5,))

    def measure(rows):
        return quality.measure(rows, held, extractor, reference, steps=3, number=50,
                               folder=tmp_path)

    rows = rows_of(small_model)
    results, found = measure(rows)
    assert json.loads(json.dumps(results)) == results
    assert [item["name"] for item in results] == ["float", "quantized"]
    first, second = results
    assert first["loss_relative"] == {"lognormal": [0, 0, 0], "0.5": [0, 0, 0]}
    assert first["frechet_relative"] == [0, 0, 0] and "sqnr_db" not in first
    assert (second["zero_fraction"], second["mxint8_share"]) == (0.5, 0.1)
    assert second["sqnr_db"][0] == pytest.approx(quantize.sqnr(
        found["float"][:20], found["quantized"]), rel=1e-4)
    distances = [reference.distance(extractor.features(data.to_pixels(found[name][:20])))
                 for name in ("float", "quantized")]
    assert second["frechet"][0] == pytest.approx(distances[1], rel=1e-4)
    # Both at 20 samples, although the reference has 30.
    assert second["frechet_relative"][0] == pytest.approx(
        distances[1] / distances[0] - 1, abs=1e-4)
    for name in ("frechet", "sqnr_db", "psnr_db"):
        assert second[name][1] < second[name][0] < second[name][2]
    assert measure(rows)[0] == results
    report = {"rows": results, "distance": "distance on averages",
              "training_images": {"samples": 30, "frechet": [0.25, 0.125, 0.5]}}
    lines = quality.markdown(report).splitlines()
    assert lines[2].startswith("| float | 30 |  |  |  | ")
    assert lines[3].startswith("| quantized | 20 | 50.0% | 10.0% | ")
    assert lines[4] == "| training images | 30 |  |  |  |  |  | 0.250 (0.125 to 0.500) |  |"
    assert lines[-1].startswith("| quantized | ") and lines[-1].count("|") == 3
    table = quality.table(report)
    assert table.row_count == 3 and table.title == "distance on averages"


def test_rows_that_cannot_be_measured_together(small_model):
    rows = rows_of(small_model)
    for wrong, text in (
            ([*rows, rows[1]], "rows must have different names, not two 'quantized'"),
            (rows[::-1], "base of quantized must be an earlier row, not 'float'"),
            ([rows[0], dataclasses.replace(rows[1], count=31)],
             "samples of quantized must be at most those of float, 30, not 31"),
            ([rows[0], dataclasses.replace(rows[1], architecture=Architecture())],
             (r"images of quantized must be like those of float, 1 channels of 8 pixels, "
              r"not \(1, 32\)"))):
        with pytest.raises(ValueError, match=f"^{text}$"):
            quality.check(wrong)


def test_pictures_of_all_rows(small_model, tmp_path):
    noise = draw_noise(3, small_model.architecture)
    floats, quantized, _ = quality.compare(small_model, noise)
    pictures.samples(tmp_path / "a.png", {"float": floats, "quantized": quantized}, "seed 0")
    assert (tmp_path / "a.png").stat().st_size > 1000


# The command.

@pytest.fixture
def digits(tmp_path):
    """A folder with random images in MNIST's files."""
    folder, generator = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    arrays = {}
    for part, count in (("train", 90), ("test", 80)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"y_{part}"] = generator.integers(0, 10, count)
    np.savez(folder / "mnist.npz", **arrays)
    return folder


@pytest.fixture
def model_file(tmp_path):
    """A float network of 32x32 pixels with random weights."""
    torch.manual_seed(0)
    network = Precond(Architecture(model_channels=8, channel_mult=(1,)))
    for value in network.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.1)
    path = tmp_path / "m.safetensors"
    save_model(path, network, {"recipe": "random", "data": "mnist"})
    return path


def run(monkeypatch, *arguments):
    """Status of the command."""
    monkeypatch.delenv("SQDM_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["sqdm", "quality", *map(str, arguments)])
    try:
        sqdm.main()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_command(model_file, digits, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = (model_file, "--reference", model_file, "--policies", "uint4-fp8+paper",
                 "--reference-policies", "int8", "--data", digits, "--out", out, "--samples", 66,
                 "--others", 65, "--steps", 1, "--images", 10, "--resamples", 20)
    assert run(monkeypatch, *arguments, "--json", tmp_path / "q.json") == 0
    report = json.loads((tmp_path / "q.json").read_text())
    assert report == json.loads((out / "quality.json").read_text())
    assert [(row["name"], row["base"], row["samples"]) for row in report["rows"]] == [
        ("float", None, 66), ("int8", "float", 65), ("float relu", None, 66),
        ("uint4-fp8+paper", "float relu", 65)]
    by_name = {row["name"]: row for row in report["rows"]}
    narrow = by_name["uint4-fp8+paper"]
    assert 0 < narrow["zero_fraction"] < 1 and 0 < narrow["mxint8_share"] < 1
    assert by_name["int8"]["zero_fraction"] is None and by_name["int8"]["mxint8_share"] == 0
    assert by_name["int8"]["sqnr_db"][0] > narrow["sqnr_db"][0]
    # The same network twice: the second float row equals the reference.
    assert by_name["float relu"]["loss_relative"]["lognormal"] == [0, 0, 0]
    assert by_name["float relu"]["frechet_relative"] == [0, 0, 0]
    assert report["features"]["name"] == "digits" and report["features"]["real_images"] == 80
    assert report["training_images"]["samples"] == 66
    with Image.open(out / "quality.png") as picture:
        assert picture.size[0] > picture.size[1]
    text = (out / "quality.md").read_text()
    assert text == quality.markdown(report) and text.count("\n| ") == 9
    assert "uint4-fp8" in capsys.readouterr().out
    assert run(monkeypatch, *arguments) == 0
    again = json.loads((out / "quality.json").read_text())
    assert again == report


@pytest.mark.parametrize(("arguments", "text"), [
    (["none"], "model must be one of .*, not 'none'"),
    (["MODEL", "--policies", "int5"], "policy must be one of fp16, .*, not 'int5'"),
    (["MODEL", "--policies", "int8,int8"], "rows must have different names, not two 'int8'"),
    (["MODEL", "--images", "81"], r"images must be in 2\.\.80, not 81"),
    (["MODEL", "--samples", "64"],
     "samples must be more than 64, the features of an image, not 64"),
    (["MODEL", "--samples", "91"], r"samples must be in 2\.\.90, not 91"),
    (["MODEL", "--features", "fid"],
     "features must be one of digits, resnet56, inception, not 'fid'"),
    (["MODEL", "--features", "inception"],
     "inception: weights must be given by --weights FILE: .*"),
    (["MODEL", "--features", "resnet56", "--weights", "MODEL"], ".*: sha256 must be abef.*"),
    (["MODEL", "--data", "nowhere"],
     "data folder must be an existing folder, not 'nowhere'"),
])
def test_mistakes_end_in_one_line(arguments, text, model_file, digits, tmp_path, monkeypatch,
                                  capsys):
    arguments = [model_file if item == "MODEL" else item for item in arguments]
    if "--data" not in arguments:
        arguments += ["--data", digits]
    if "--images" not in arguments:
        arguments += ["--images", 10]
    if "--samples" not in arguments:
        arguments += ["--samples", 65]
    assert run(monkeypatch, *arguments, "--steps", 1, "--out", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch("sqdm: " + text, lines[-1])
    assert not (tmp_path / "out" / "quality.json").exists()


def test_models_of_unknown_data(model_file):
    network = quality.Network.read(model_file)
    assert network.dataset == "mnist"
    for record, architecture, text in (
            ({}, Architecture(resolution=64), "None"), ({"data": "faces"}, None, "'faces'")):
        model = Precond(architecture) if architecture else network.model
        wrong = dataclasses.replace(network, record=record, model=model)
        with pytest.raises(ValueError, match=f"^data of .* must be one of mnist, cifar10, "
                                             f"not {text}$"):
            assert wrong.dataset


def test_zero_share(small_model):
    """It agrees with the calibration's counts where noise and schedule are the same."""
    noise = draw_noise(1, small_model.architecture)
    found = quality.zero_share(small_model, noise, small_model.steps, Sampler())
    assert found == pytest.approx(quantize.zero_fraction(small_model), abs=1e-6)


def test_rows_of_a_quantized_file(small_model_file):
    network = quality.Network.read(small_model_file)
    assert network.stored == ["mixed"]
    rows = quality.rows_of(network, "float", ["int4-fp8+none"], (30, 20), steps=2)
    assert [(row.name, row.base, row.count) for row in rows] == [
        ("float", None, 30), ("mixed", "float", 30), ("int4-fp8+none", "float", 20)]
    assert rows[1].denoise is network.quantized
    assert rows[1].facts["formats"] == network.quantized.formats
    assert rows[2].facts["mxint8_share"] == 0 < rows[1].facts["mxint8_share"]
