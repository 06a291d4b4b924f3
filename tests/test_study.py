"""The granularity study: its rows on a tiny network, its table and its command."""

import dataclasses
import json

import pytest
import torch

from golden import checkpoint, study
from golden.network import Precond
from golden.recipes import mnist32
from golden.requantizer import Format

ARCHITECTURE = dataclasses.replace(mnist32.architecture, resolution=8, model_channels=32,
                                   channel_mult=(1,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Precond(ARCHITECTURE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.03)
    return model.half().float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_rows_differ_as_their_names_say():
    rows = {row.name: dataclasses.replace(row, name="") for row in study.ROWS}
    assert len(set(rows.values())) == len(study.ROWS) == 15
    finest, pixel = rows[study.FINEST], rows[study.PIXEL]
    assert finest == study.Row(name="")
    assert pixel == study.Row(name="", group=None, weight_group=None)


def test_study(model, images):
    table = study.study(model, images, calibration_images=1, steps=2)
    names = [row.name for row in study.ROWS]
    assert [row["name"] for row in table] == ["float", *names, study.SHIPPED]
    assert table[0]["edm_loss"] > 0
    for row in table[1:]:
        assert row["sqnr_db"] > 5 and abs(row["loss"]) < 1 and row["loss_error"] > 0
        assert 0 < row["zero_fraction"] < 1
    by_name = {row["name"]: row for row in table}
    # The stored 16-bit results change little beside 4 bits.
    assert by_name[study.SHIPPED]["sqnr_db"] == pytest.approx(
        by_name[study.PIXEL]["sqnr_db"], abs=1.5)
    again = study.study(model, images, rows=study.ROWS[:1], calibration_images=1, steps=2)
    assert again[:2] == table[:2]


def test_wide_layers_of_the_rows(model):
    amax = study.channel_amax(model, 1, 2)
    assert {name: tuple(value.shape) for name, value in amax.items()} == {
        layer.name: (layer.cin,) for layer in model.unet.layers()}
    for row, first_block in ((study.ROWS[0], Format.A4U), (study.ROWS[2], Format.MX8)):
        quantized = study.FakeQuantized(model, row, amax)
        assert quantized.formats["encoder.8x8_block0.conv0"] == first_block
        assert quantized.formats["last"] == Format.MX8
    # An 8-bit network input loses what a 16-bit one keeps.
    x, amax = torch.full((1, 1, 1, 1), 1.003), {**amax, "first": torch.tensor([4.0])}
    first = model.unet.first
    errors = [(study.FakeQuantized(model, row, amax).activation(first, x) - x).abs().item()
              for row in study.ROWS[:2]]
    assert errors[1] < 1e-3 < errors[0]


@pytest.mark.parametrize("pixel, words", [(0.025, "within the 2 allowed; pixel scale it is"),
                                          (0.035, "beyond the 2 allowed; take the finest")])
def test_decision(pixel, words):
    table = [{"name": study.FINEST, "loss": 0.01}, {"name": study.PIXEL, "loss": pixel}]
    assert study.decide(table) == (
        f"pixel scale costs {100 * pixel:+.1f} % of loss, the finest granularity +1.0 %: "
        f"{100 * pixel - 1:.1f} points more, {words}")


def test_markdown():
    table = [{"name": "float"}, {"name": "a", "sqnr_db": 30.123, "loss": 0.0141,
                                 "loss_error": 0.002, "zero_fraction": 0.61}]
    assert study.markdown(table).splitlines()[2:] == ["| a | 30.1 | +1.4 ± 0.2 % | 0.610 |"]


@pytest.mark.parametrize("arguments, text", [
    (["mnist33"], "model must be one of"),
    (["PATH", "--images", "1"], "images must be at least 2, not 1"),
    (["PATH", "--data", "no"], "data folder must be an existing folder, not 'no'"),
])
def test_mistakes_end_in_one_line(model, tmp_path, capsys, arguments, text):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model, {"data": "mnist"})
    assert study.main([str(path) if item == "PATH" else item for item in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"study: {text}") and error.count("\n") == 1


@pytest.mark.data
def test_command(tmp_path, data_folder, capsys):
    architecture = dataclasses.replace(ARCHITECTURE, resolution=32, model_channels=8)
    torch.manual_seed(0)
    path, out = tmp_path / "model.safetensors", tmp_path / "study.json"
    checkpoint.save_model(path, Precond(architecture), {"data": "mnist"})
    assert study.main([str(path), "--data", str(data_folder), "--images", "2",
                       "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["images"] == 2 and len(result["rows"]) == len(study.ROWS) + 2
    assert study.markdown(result["rows"]) in capsys.readouterr().out
