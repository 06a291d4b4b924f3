"""The curve of zeros against quality: what is measured, the table, the picture, refusals."""

import dataclasses
import json

import pytest
import torch

from golden import checkpoint, finetune, recipes, tradeoff
from golden import train as training
from golden.network import Architecture
from golden.presets import random_model

SILU = Architecture(resolution=8, model_channels=8, channel_mult=(1, 2), activation="silu")
POINTS = [
    {"name": "0.6", "quantized": True, "zeros": 0.61, "edm_loss": 0.2, "steps": 5,
     "loss": [0.05, 0.04, 0.06], "target": 0.6, "strength": 3.0},
    {"name": "control", "quantized": False, "zeros": None, "edm_loss": 0.1, "steps": 5,
     "loss": [-0.02, -0.03, -0.01], "target": None, "strength": None},
]


def test_measure():
    baseline = random_model(SILU)
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    recipe = dataclasses.replace(recipes.mnist32, architecture=SILU)
    batch = training.draw_batch(((images + 1) * 127.5).to(torch.uint8), recipe,
                                torch.Generator().manual_seed(1))
    models = {f"{zeros}": (finetune.convert(baseline, *batch, zeros),
                           {"steps": 3, "finetune": {"zeros": zeros, "strength": 2.0}})
              for zeros in (0.5, 0.9)}
    models["same"] = baseline, {}
    few, many, same = tradeoff.measure(baseline, models, images, calibration_images=2, steps=2)
    assert (few["name"], few["steps"], few["target"], few["strength"]) == ("0.5", 3, 0.5, 2.0)
    assert few["quantized"] and 0 < few["zeros"] < many["zeros"] < 1
    for point in (few, many):
        value, low, high = point["loss"]
        assert low < value < high
    assert not same["quantized"] and same["zeros"] is None and same["loss"] == [0, 0, 0]


def test_table():
    assert tradeoff.markdown(POINTS).splitlines()[2:] == [
        "| 0.6 | 0.600 | 0.610 | +5.0 % (+4.0 to +6.0) | 5 |",
        "| control | - | - | -2.0 % (-3.0 to -1.0) | 5 |"]


def test_picture_shows_every_point(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tradeoff.pictures, "save", lambda figure, path: drawn.append(figure))
    tradeoff.pictures.tradeoff(tmp_path / "a.png", POINTS, 0.1)
    axis, = drawn[0].axes
    assert [text.get_text() for text in axis.texts] == ["0.6"]
    labels = axis.get_legend_handles_labels()[1]
    assert "control, 5 steps" in labels and "ReLU, 4 bits, fine-tuned for 5 steps" in labels
    assert "limit, +10%" in labels
    points = axis.containers[0].lines[0]
    assert points.get_xdata().tolist() == pytest.approx([61])
    assert points.get_ydata().tolist() == pytest.approx([5])


def test_command_refuses(tmp_path, capsys):
    assert tradeoff.main([str(tmp_path / "none"), str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("tradeoff: model must be one of ")


@pytest.mark.data
def test_command(tmp_path, capsys):
    silu = dataclasses.replace(SILU, resolution=32)
    checkpoint.save_model(tmp_path / "silu.safetensors", random_model(silu), {"data": "mnist"})
    checkpoint.save_model(tmp_path / "relu.safetensors",
                          random_model(dataclasses.replace(silu, activation="relu")), {"steps": 9})
    status = tradeoff.main([
        str(tmp_path / "silu.safetensors"), f"mine={tmp_path / 'relu.safetensors'}",
        "--images", "4", "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")])
    assert status == 0 and "| mine | - | " in capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["images"] == 4 and result["points"][0]["steps"] == 9
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
