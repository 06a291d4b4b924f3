"""Fine-tuning: conversion, rounding in the loop, the count of zeros, exact resumption, refusals."""

import dataclasses
import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

import sqdm
from golden import a4, checkpoint, finetune, mxint8, quantize, recipes, w4
from golden import train as training
from golden.fake import executing
from golden.network import Architecture, Precond
from golden.presets import random_model
from golden.requantizer import Format

SILU = Architecture(resolution=8, model_channels=16, channel_mult=(1, 2), activation="silu",
                    dropout=0.1)
TINY = dataclasses.replace(
    recipes.mnist32, name="tiny", batch=4, steps=8, warmup=2, ema_images=16,
    architecture=dataclasses.replace(SILU, activation="relu"))


@pytest.fixture(scope="module")
def start():
    return finetune.Start(random_model(SILU), {"steps": 7}, "0" * 64)


def pixels(count=16):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def batch(count=16, seed=0):
    recipe = dataclasses.replace(TINY, batch=count)
    return training.draw_batch(pixels(), recipe, torch.Generator().manual_seed(seed))


def tuner(start, recipe=TINY, **changes):
    return finetune.FineTuner(recipes.changed(recipe, **changes), pixels(), 100,
                              torch.device("cpu"), start)


def zeros_of(model):
    """Share of zero codes of `model` on a batch, counted from what enters each layer."""
    rounding = finetune.Rounding(model.unet)
    with torch.no_grad(), executing(model.unet, rounding):
        training.edm_loss(model, *batch(seed=1))
    return rounding.zeros.item()


def test_conversion_keeps_what_it_does_not_fit(start):
    converted = finetune.convert(start.model, *batch(), zeros=0.6)
    assert converted.architecture == TINY.architecture
    before, after = start.model.state_dict(), converted.state_dict()
    different = {name for name in before if not torch.equal(before[name], after[name])}
    fitted = {layer.name for layer in start.model.unet.layers() if layer.activation is not None}
    # A bias of the norm stays 0 where the layer is not shifted.
    assert different >= {f"unet.{name}.{part}" for name in fitted
                         for part in ("norm.weight", "bias")}
    assert different <= {f"unet.{name}.{part}" for name in fitted
                         for part in ("norm.weight", "norm.bias", "bias")}
    relu = finetune.convert(converted, *batch(), zeros=0.6).state_dict()
    assert all(torch.equal(relu[name], after[name]) for name in after)


def test_conversion_is_nearer_than_a_swap_of_the_activation(start):
    swapped = Precond(TINY.architecture)
    swapped.load_state_dict(start.model.state_dict())
    converted = finetune.convert(start.model, *batch())
    images, sigma, noise = batch(64, seed=3)
    noisy = images + sigma[:, None, None, None] * noise
    with torch.no_grad():
        right = start.model(noisy, sigma)
        errors = [(model.eval()(noisy, sigma) - right).square().mean().item()
                  for model in (converted, swapped)]
    assert errors[0] < 0.7 * errors[1]


def test_fit_is_exact_for_what_relu_can_do():
    # SiLU of 100 z is nearly ReLU of 100 z: slope 1, level 0, no shift.
    torch.manual_seed(0)
    model = random_model(SILU)
    layer = model.unet.last
    twin = random_model(SILU).unet.last
    finetune.fit(layer, twin, 100 * torch.randn(4, layer.cin, 8, 8), None)
    torch.testing.assert_close(twin.norm.weight, layer.norm.weight, rtol=1e-2, atol=0)
    torch.testing.assert_close(twin.norm.bias, layer.norm.bias, rtol=0, atol=1e-2)


@pytest.mark.parametrize("zeros", [0.5, 0.8])
def test_shift_gives_the_zeros_asked_for(zeros):
    model = random_model(SILU)
    layer, twin = model.unet.last, random_model(SILU).unet.last
    x = torch.randn(8, layer.cin, 16, 16, generator=torch.Generator().manual_seed(0))
    finetune.fit(layer, twin, layer.norm(x), zeros)
    with torch.no_grad():
        # slopes differ by channel, and with them the pixel's largest: not exactly `zeros`
        codes = a4.fake_quantize(torch.relu(twin.norm(x)), False, 1.0)
    assert abs((codes == 0).float().mean().item() - zeros) < 0.03


def test_rounding_is_that_of_the_formats(start):
    # What enters every convolution, and its weights, against the definitions of the formats.
    model = finetune.convert(start.model, *batch()).eval()
    rounding = finetune.Rounding(model.unet)
    images, sigma, noise = batch()
    with torch.no_grad(), executing(model.unet, rounding):
        training.edm_loss(model, images, sigma, noise)
    rounding.following = False
    chosen = quantize.formats(model.unet)
    seen = dict.fromkeys(Format, 0)

    def run(layer, segments, embedding, residual, gain, modulation):
        format, x, weight = chosen[layer.name], layer.prologue(segments), layer.weight
        n = [other.name for other in model.unet.layers()].index(layer.name)
        amax, level = rounding.amax[n].item() * quantize.ACTIVATION_HEADROOM, 0.0
        if layer.kernel == 1 and layer.activation is None:
            mean = x.mean((2, 3), keepdim=True)
            x, level = x - mean, torch.nn.functional.conv2d(mean, weight)
        if format == Format.IN16:
            x = mxint8.fake_quantize_input(x, mxint8.input_scale(amax))
        elif format == Format.MX8:
            window = mxint8.window_of(mxint8.static_scale(amax))
            x = mxint8.fake_quantize(x, window=window)
        else:
            signed = format == Format.A4S
            x = a4.fake_quantize(x, signed, a4.static_scale(amax, signed))
            weight = w4.fake_quantize(weight)
        if format == Format.IN16:
            weight = mxint8.fake_quantize_input_weights(weight)
        elif format == Format.MX8:
            weight = mxint8.fake_quantize(weight)
        seen[format] += 1
        out = torch.nn.functional.conv2d(x, weight, padding=layer.kernel // 2)
        out = out + (layer.bias[None, :, None, None] + level)
        out = out if embedding is None else out + embedding[:, :, None, None]
        out = (out if residual is None else out + residual) * gain
        got = rounding(layer, segments, embedding, residual, gain, modulation)
        torch.testing.assert_close(got, out, rtol=0, atol=1e-5)
        return out

    with torch.no_grad(), executing(model.unet, run):
        training.edm_loss(model, images, sigma, noise)
    assert all(seen.values())


def test_zeros_are_the_share_of_the_macs(start):
    # Against the counts of the QuantizedModel at the same states.
    model = finetune.convert(start.model, *batch(), zeros=0.6).eval().requires_grad_(False)
    whole = quantize.quantize_model(model, {}, mxint8="paper", images=2, steps=2)
    model = whole.float_model
    rounding = finetune.Rounding(model.unet)
    images, sigma, noise = batch()
    noisy = images + sigma[:, None, None, None] * noise
    with torch.no_grad(), executing(model.unet, rounding):
        model(noisy, sigma)
    counts = {}
    whole(noisy, sigma, on_input=lambda name, x: counts.update(
        {name: (x == 0).double().mean().item()}))
    four = [item for item in whole.layers.values() if item.sparse_capable]
    share = (sum(item.macs * counts[item.name] for item in four)
             / sum(item.macs for item in four))
    assert abs(rounding.zeros.item() - share) < 0.01


def test_gradients_pass_the_rounding(start):
    trainer = tuner(start, zeros=0.95)
    trainer.model.train()
    objective, _ = trainer.objective(*batch())
    objective.backward()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("signed", [False, True])
def test_four_bits_are_those_of_the_format(signed):
    x = torch.randn(3, 20, 5, 5, generator=torch.Generator().manual_seed(0)) ** 3
    x[0, :, 2, 2] = 0
    x = x if signed else x.relu()
    for amax in (x.abs().max().item(), 1e-3, 1e6):     # as calibrated, saturating, far too coarse
        scale = a4.static_scale(amax, signed)
        rounded, zeros = finetune.FourBits.apply(x, signed, scale)
        expected = a4.fake_quantize(x, signed, scale)
        assert torch.equal(rounded, expected)
        assert zeros.item() == pytest.approx((expected == 0).double().mean().item())


@pytest.mark.parametrize("signed", [False, True])
def test_slope_of_the_zero_count(signed):
    sign, largest = (-1, 0.7) if signed else (1, 1.5)          # the step is 0.1
    x = torch.tensor([0.0, 0.1 * sign, 0.3, largest]).reshape(1, 4, 1, 1).requires_grad_()
    rounded, share = finetune.FourBits.apply(x, signed, 0.1 / 448 * 8)
    torch.testing.assert_close(rounded, x)
    assert share.item() == pytest.approx(0.25)
    share.backward()
    softness = finetune.SOFTNESS * 0.1
    expected = []
    for value in x.flatten()[1:].tolist():
        soft = 1 / (1 + math.exp(-(0.05 - abs(value)) / softness))
        expected.append(-math.copysign(soft * (1 - soft) / softness / 4, value))
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([0.0, *expected]))


def test_the_penalty_earns_zeros(start):
    found = {}
    for strength in (0.0, 10.0):
        trainer = tuner(start, zeros=0.8, strength=strength, learning_rate=5e-3)
        # from a conversion without zeros, so that training has to find them
        trainer.model.load_state_dict(
            finetune.convert(start.model, *batch()).state_dict())
        for _ in range(25):
            trainer.advance()
        found[strength] = zeros_of(trainer.model.eval())
    assert found[10.0] > 0.7 > found[0.0] + 0.05


def test_teacher_pulls_towards_the_start(start):
    def distance(model):
        images, sigma, noise = batch(32, seed=9)
        noisy = images + sigma[:, None, None, None] * noise
        with torch.no_grad():
            return (model.eval()(noisy, sigma) - start.model(noisy, sigma)).square().mean().item()

    found = []
    for teacher in (0.0, 100.0):
        trainer = tuner(start, quantized=False, teacher=teacher, learning_rate=2e-3)
        for _ in range(30):
            trainer.advance()
        found.append(distance(trainer.model))
    assert found[1] < 0.7 * found[0]


def test_silu_can_stay_in_float(start):
    trainer = tuner(start, activation="silu", quantized=False, teacher=0.0)
    assert trainer.recipe.finetune.zeros is None and trainer.rounding is None
    assert all(torch.equal(value, start.model.state_dict()[name])
               for name, value in trainer.model.state_dict().items())
    trainer.advance()
    assert trainer.measures == {}


def test_resumed_run_is_bit_identical(start, tmp_path, monkeypatch):
    options = {"pixels": pixels(), "device": "cpu", "start": start}
    whole = training.train(TINY, out=tmp_path / "whole", **options)
    advance, calls = finetune.FineTuner.advance, 0

    def interrupted(trainer):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return advance(trainer)

    monkeypatch.setattr(finetune.FineTuner, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(TINY, out=tmp_path / "halves", **options)
    monkeypatch.undo()
    halves = training.train(TINY, out=tmp_path / "halves", resume=True, **options)
    assert whole.read_bytes() == halves.read_bytes()
    states = [torch.load(path.parent / "state.pt", weights_only=True) for path in (whole, halves)]
    assert torch.equal(states[0]["own"]["amax"], states[1]["own"]["amax"])
    assert states[0]["own"]["amax"].min() > 0
    lines = [json.loads(line)
             for line in (halves.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [8]
    assert 0 < lines[0]["zeros"] < 1 and lines[0]["teacher_distance"] > 0


def test_record_says_where_it_came_from(start, tmp_path):
    path = training.train(TINY, out=tmp_path, pixels=pixels(), device="cpu", start=start, steps=1)
    model, record = checkpoint.load_model(path)
    assert model.architecture == TINY.architecture
    assert record["start"] == "0" * 64 and record["start_steps"] == 7
    assert record["finetune"] == dataclasses.asdict(TINY.finetune)


def test_start_is_known_by_its_bytes(start, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, start.model, {"steps": 3})
    read = finetune.Start.read(path)
    assert read.record["steps"] == 3 and re.fullmatch("[0-9a-f]{64}", read.digest)
    checkpoint.save_model(path, start.model, {"steps": 4})
    assert finetune.Start.read(path).digest != read.digest


def test_refusals(start, tmp_path):
    def expect(text, call, kind=training.TrainError):
        with pytest.raises(kind, match="^" + re.escape(text) + "$"):
            call()

    options = {"out": tmp_path, "pixels": pixels(), "device": "cpu"}
    expect("start must be a model for a recipe that fine-tunes, and for no other: tiny does",
           lambda: training.train(TINY, **options))
    scratch = dataclasses.replace(TINY, finetune=None)
    expect("start must be a model for a recipe that fine-tunes, and for no other: tiny does not",
           lambda: training.train(scratch, start=start, **options))
    expect("start must be of the architecture of mnist32 up to its activation",
           lambda: tuner(start, recipes.mnist32))
    relu = finetune.Start(finetune.convert(start.model, *batch()), {}, "")
    expect("start must not be a ReLU network where the activation is to be silu",
           lambda: tuner(relu, activation="silu"))
    expect("images must be of shape (1, 32, 32) for this network, not (1, 8, 8)",
           lambda: training.train(recipes.mnist32, start=start, **options))
    training.train(TINY, steps=1, start=start, **options)
    expect(f"{tmp_path}/tiny/state.pt: must be a state of the same recipe, data and start; "
           f"choose another folder or train without resuming",
           lambda: training.train(TINY, start=dataclasses.replace(start, digest="1" * 64),
                                  resume=True, **options))
    expect("zeros must be left out: mnist32-silu trains from random weights",
           lambda: recipes.changed(recipes.mnist32_silu, zeros=0.5), ValueError)
    expect("zeros must be in 0..1, both excluded, not 1.5",
           lambda: recipes.changed(recipes.mnist32, zeros=1.5), ValueError)
    expect("strength must be in 0..1000, not -1",
           lambda: recipes.changed(recipes.mnist32, strength=-1), ValueError)
    expect("zeros must be without a target where nothing is quantized",
           lambda: recipes.FineTune(start="x", quantized=False, zeros=0.5), ValueError)


def test_recipes_fit_each_other():
    for recipe in recipes.RECIPES.values():
        if recipe.finetune is not None:
            before = recipes.RECIPES[recipe.finetune.start]
            assert before.finetune is None and before.dataset == recipe.dataset
            silu = dataclasses.replace(recipe.architecture, activation="silu")
            assert silu == before.architecture


def test_changes_reach_the_field_they_belong_to():
    wide = dataclasses.replace(recipes.mnist32.architecture, model_channels=48, activation="silu")
    found = recipes.changed(recipes.mnist32, wide, zeros=0.0, strength=2.0, batch=8,
                            learning_rate=None)
    assert found.architecture == dataclasses.replace(wide, activation="relu")
    assert found.finetune == dataclasses.replace(recipes.mnist32.finetune, zeros=None, strength=2.0)
    assert found.batch == 8 and found.learning_rate == recipes.mnist32.learning_rate


def command(*arguments):
    result = CliRunner().invoke(sqdm.app, ["train", *map(str, arguments)])
    return result.exception or result.output


@pytest.mark.data
def test_command_fine_tunes_a_model_of_the_users(tmp_path):
    silu = dataclasses.replace(SILU, resolution=32)
    checkpoint.save_model(tmp_path / "mine.safetensors", random_model(silu), {"steps": 5})
    options = ("--start", tmp_path / "mine.safetensors", "--out", tmp_path, "--batch", 2,
               "--zeros", 0.6, "--device", "cpu")
    output = command("mnist32", *options, "--steps", 1)
    path = tmp_path / "mnist32/mnist32.safetensors"
    assert output.splitlines()[-1] == str(path)
    model, record = checkpoint.load_model(path)
    assert model.architecture == dataclasses.replace(silu, activation="relu")
    assert record["finetune"]["zeros"] == 0.6 and record["start_steps"] == 5
    assert command("mnist32", *options, "--steps", 2, "--resume").splitlines()[-1] == str(path)
    assert checkpoint.load_model(path)[1]["steps"] == 2


def test_command_refuses(tmp_path):
    assert str(command("cifar", "--out", tmp_path)) == (
        "recipe must be one of mnist32-silu, mnist32, cifar10-silu, cifar10, not 'cifar'")
    assert str(command("mnist32-silu", "--start", "mnist32", "--out", tmp_path)) == (
        "start must be left out: mnist32-silu trains from random weights")
    assert str(command("cifar10", "--out", tmp_path)).endswith(
        f"or an existing file or folder, not '{tmp_path}/cifar10-silu/cifar10-silu.safetensors'")
