"""Training: the loss, its schedules, exact resumption, and refusals."""

import dataclasses
import json
import math
import os
import re

import pytest
import torch

from golden import checkpoint, finetune, recipes
from golden import train as training
from golden.network import Architecture, Precond

TINY = dataclasses.replace(
    recipes.mnist32_silu, name="tiny", batch=4, steps=8, warmup=2, ema_images=16, flip=True,
    architecture=Architecture(resolution=8, model_channels=8, channel_mult=(1, 2), dropout=0.2))


def stripes(count=16):
    """Images (N, 1, 8, 8) uint8 of vertical bars."""
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    for n in range(count):
        pixels[n, 0, :, n % 8] = 255
    return pixels


def run(out, **options):
    options = {"pixels": stripes(), "device": "cpu", "out": out, **options}
    return training.train(options.pop("recipe", TINY), **options)


def test_loss_is_edm_loss():
    torch.manual_seed(0)
    model = Precond(TINY.architecture)
    with torch.no_grad():
        model.unet.last.weight.normal_()
    model.eval()
    images, noise = torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    sigmas = [0.05, 3.0]
    got = training.edm_loss(model, images, torch.tensor(sigmas), noise)
    for n, sigma in enumerate(sigmas):
        noisy = images[n:n + 1] + sigma * noise[n:n + 1]
        error = model(noisy, sigma) - images[n:n + 1]
        weight = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
        torch.testing.assert_close(got[n], weight * (error ** 2).sum() / 64)


def test_weight_makes_the_loss_of_a_silent_network_one():
    # With F = 0 and data of deviation sigma_data, E[loss] is 1 at every noise level.
    generator = torch.Generator().manual_seed(0)
    model = Precond(TINY.architecture)
    images = torch.randn(400, 1, 8, 8, generator=generator) * 0.5
    noise = torch.randn(400, 1, 8, 8, generator=generator)
    for sigma in (0.01, 0.5, 20.0):
        loss = training.edm_loss(model, images, torch.full((400,), sigma), noise).mean()
        assert abs(loss.item() - 1) < 0.05


def test_noise_levels_are_lognormal():
    recipe = dataclasses.replace(TINY, batch=20_000)
    images, sigma, noise = training.draw_batch(stripes(), recipe, torch.Generator().manual_seed(0))
    assert abs(sigma.log().mean() + 1.2) < 0.05 and abs(sigma.log().std() - 1.2) < 0.05
    assert images.min() == -1 and images.max() == 1 and abs(noise.std() - 1) < 0.01


def test_flip_mirrors_half():
    recipe = dataclasses.replace(TINY, batch=1000)
    left = stripes(1)
    images, _, _ = training.draw_batch(left, recipe, torch.Generator().manual_seed(0))
    share = (images[:, 0, 0, 7] == 1).float().mean()
    assert 0.4 < share < 0.6 and ((images[:, 0, 0, 0] == 1) ^ (images[:, 0, 0, 7] == 1)).all()


def test_learning_rate():
    recipe = dataclasses.replace(TINY, learning_rate=1.0, warmup=10, decay=0.5)
    rates = [training.learning_rate(recipe, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:50] == [1.0] * 40
    assert rates[50:] == pytest.approx([n / 50 for n in range(50, 0, -1)])
    assert rates[:30] == [training.learning_rate(recipe, step, 80) for step in range(30)]


def test_average_follows_its_half_life(tmp_path):
    recipe = dataclasses.replace(TINY, batch=10, ema_images=1000, ema_ramp=0.05)
    kept = [training.ema_weight(recipe, step) for step in range(1999, 2099)]
    assert math.isclose(math.prod(kept), 0.5)                           # 100 steps of 10 images
    assert math.isclose(training.ema_weight(recipe, 39), 0.5 ** (10 / 20))   # ramp: 5 % of 400

    trainer = training.Trainer(TINY, stripes(), 8, torch.device("cpu"))
    mean = [parameter.clone() for parameter in trainer.model.parameters()]
    for step in range(3):
        trainer.advance()
        keep = training.ema_weight(TINY, step)
        mean = [keep * m + (1 - keep) * p for m, p in zip(mean, trainer.model.parameters())]
    for got, expected in zip(trainer.ema.parameters(), mean):
        torch.testing.assert_close(got, expected)


def test_resumed_run_is_bit_identical(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    rounds = iter(range(100))
    advance = training.Trainer.advance

    def interrupted(trainer):
        if next(rounds) == 5:
            raise KeyboardInterrupt
        return advance(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    assert not (tmp_path / "parts/tiny/tiny.safetensors").exists()
    torch.manual_seed(1234)      # what ran in between must not matter
    parts = run(tmp_path / "parts", resume=True)
    states = [torch.load(path.with_name("state.pt"), weights_only=True)
              for path in (whole, parts)]
    for part in ("model", "ema"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    assert whole.read_bytes() == parts.read_bytes()
    lines = [json.loads(line) for line in whole.with_name("metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 8 and math.isfinite(lines[-1]["mean_loss"])


def test_result_and_record(tmp_path):
    path = run(tmp_path, steps=3)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "ema.safetensors", "metrics.jsonl", "state.pt", "tiny.safetensors"]
    model, record = checkpoint.load_model(path)
    assert model.architecture == TINY.architecture
    assert (record["recipe"], record["data"], record["steps"], record["seed"]) == (
        "tiny", "mnist", 3, 0)
    assert 0 < record["loss"] < 100
    assert record["commit"] is None or re.fullmatch("[0-9a-f]{40}", record["commit"])


def test_it_learns(tmp_path):
    recipe = dataclasses.replace(TINY, batch=32, learning_rate=4e-3, flip=False, architecture=(
        dataclasses.replace(TINY.architecture, dropout=0.0)))
    trainer = training.Trainer(recipe, stripes(), 1000, torch.device("cpu"))
    losses = [trainer.advance()[0] for _ in range(150)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_bad_steps_change_nothing_and_end_the_run(monkeypatch):
    trainer = training.Trainer(TINY, stripes(), 100, torch.device("cpu"))
    trainer.advance()
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    loss = training.edm_loss
    monkeypatch.setattr(training, "edm_loss", lambda *arguments: loss(*arguments) * math.nan)
    for _ in range(training.BAD_STEPS - 1):
        trainer.advance()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    with pytest.raises(training.TrainError,
                       match=r"^loss must be finite, not nan for 20 steps up to step 20$"):
        trainer.advance()
    monkeypatch.undo()
    trainer.advance()
    assert not all(map(torch.equal, before, trainer.model.parameters()))


def test_refusals(tmp_path):
    def expect(text, **options):
        with pytest.raises(training.TrainError, match="^" + re.escape(text) + "$"):
            run(tmp_path, **options)

    state = tmp_path / "tiny/state.pt"
    expect(f"{state}: must exist to resume from", resume=True)
    expect("steps must be positive, not 0", steps=0)
    if not torch.cuda.is_available():
        expect("device must be cpu: torch finds no GPU here", device="cuda")
    assert not (tmp_path / "tiny").exists()
    (tmp_path / "file").touch()
    with pytest.raises(training.TrainError,
                       match=r"^.*/file/tiny: must be a folder to write into \(Not a directory\)$"):
        run(tmp_path / "file")
    run(tmp_path, steps=2)
    expect(f"{state}: is there already; resume, or choose another folder")
    expect("steps must be at least 2, those already done, not 1", resume=True, steps=1)
    expect(f"{state}: must be a state of the same recipe, data and start; choose another folder "
           f"or train without resuming", resume=True, recipe=dataclasses.replace(TINY, batch=5))
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(training.TrainError,
                       match="^" + re.escape(str(state)) + r": must be a training state \(\w+\)$"):
        run(tmp_path, resume=True)


class Evil:
    """Would make a folder when unpickled freely."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_state_that_calls_is_refused(tmp_path):
    run(tmp_path, steps=1)
    torch.save({"identity": Evil(tmp_path / "escaped")}, tmp_path / "tiny/state.pt")
    with pytest.raises(training.TrainError,
                       match=r"^.*/state\.pt: must be a training state \(UnpicklingError\)$"):
        run(tmp_path, resume=True)
    assert not (tmp_path / "escaped").exists()


def cifar_like(count=4):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("width", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_cifar10_recipes_run(tmp_path, width):
    # Baseline and fine-tune, at reduced width and, slowly, at the recipes' own.
    baseline, tuned = recipes.cifar10_silu, recipes.cifar10
    if width is not None:
        baseline, tuned = (dataclasses.replace(recipe, architecture=dataclasses.replace(
            recipe.architecture, model_channels=width)) for recipe in (baseline, tuned))
    path = run(tmp_path, recipe=dataclasses.replace(baseline, batch=2), steps=1,
               pixels=cifar_like())
    start = finetune.Start.read(path)
    names = [layer.name for layer in start.model.unet.layers()]
    assert "encoder.16x16_block3.qkv" in names and "decoder.8x8_middle0.proj" in names
    path = run(tmp_path, recipe=dataclasses.replace(tuned, batch=2), steps=1, pixels=cifar_like(),
               start=start)
    model, record = checkpoint.load_model(path)
    assert model.architecture == tuned.architecture and record["steps"] == 1


@pytest.mark.parametrize("change, text", [
    ({"batch": 0}, "batch must be positive, not 0"),
    ({"decay": 0}, "decay must be in 0..1 and not 0, not 0"),
])
def test_recipe_rejects(change, text):
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        dataclasses.replace(TINY, **change)
