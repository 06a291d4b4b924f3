"""The study of formats: its rows on a tiny network, its table and its command."""

import dataclasses
import json

import pytest
import torch

from golden import checkpoint, policy, study
from golden.fake import round_activation
from golden.network import Precond
from golden.policy import Policy
from golden.recipes import mnist32

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
    for rows in study.TABLES.values():
        assert len({row.name for row in rows}) == len(rows)
        assert len({dataclasses.replace(row, name="") for row in rows}) == len(rows)
    rows = {row.name: row for row in study.GRANULARITY}
    assert rows[study.PIXEL].policy == Policy(name="")
    assert rows[study.FINEST].policy == Policy(name="", group=16, weight_group=16)


def test_study(model, images):
    rows = [*study.GRANULARITY, *study.CHOICE[:1], *study.CHOICE[-2:], *study.COMPARED[-5:]]
    table = study.study(model, images, rows=rows, calibration_images=1, steps=2)
    assert [row["name"] for row in table] == ["float", *(row.name for row in rows)]
    assert table[0]["edm_loss"] > 0
    for row in table[1:]:
        assert row["sqnr_db"] > 2 and abs(row["loss"]) < 2 and row["loss_error"] > 0
        assert 0 < row["zero_fraction"] < 1 and row["mxint8"] < 0.6
        assert 0.4 < row["memory_saved"] < row["compute_saved"] + 0.1 < 0.9
    by_name = {row["name"]: row for row in table}
    # The stored 16-bit results change little beside 4 bits.
    assert by_name[study.EXECUTED]["sqnr_db"] == pytest.approx(
        by_name[study.PIXEL]["sqnr_db"], abs=1.5)
    none, *budgets = (by_name[row.name] for row in (study.CHOICE[0], *study.CHOICE[-2:]))
    assert none["mxint8"] == 0
    assert all(row["mxint8"] <= limit for row, limit in zip(budgets, study.BUDGETS[-2:]))
    again = study.study(model, images, rows=rows[:1], calibration_images=1, steps=2)
    assert again[:2] == table[:2]


def test_input_of_8_bits_loses_what_16_keep(model):
    x = torch.full((1, 1, 1, 1), 1.003)
    rows = {row.name: row.policy for row in study.GRANULARITY}
    errors = []
    for name in (study.PIXEL, "pixel scale, network input in 8 bits"):
        format = policy.formats(model.unet, rows[name])["first"]
        rounded = round_activation(x, format, rows[name], torch.tensor([4.0]))
        errors.append((rounded - x).abs().item())
    assert errors[0] < 1e-3 < errors[1]


def test_networks_without_relu():
    silu = Precond(dataclasses.replace(ARCHITECTURE, activation="silu"))
    names = [row.policy.name for row in study.fitting(study.COMPARED, silu.unet)]
    assert "uint4-fp8" not in names and "int4-fp8" in names


@pytest.mark.parametrize("pixel, words", [(0.025, "within the 2 allowed; pixel scale it is"),
                                          (0.035, "beyond the 2 allowed; take the finest")])
def test_decision(pixel, words):
    table = [{"name": "float"}, {"name": study.FINEST, "loss": 0.01},
             {"name": study.PIXEL, "loss": pixel}]
    assert study.decide(table) == (
        f"pixel scale costs {100 * pixel:+.1f} % of loss, the finest granularity +1.0 %: "
        f"{100 * pixel - 1:.1f} points more, {words}")


def test_markdown():
    table = [{"name": "float"},
             {"name": "a", "sqnr_db": 30.123, "loss": 0.0141, "loss_error": 0.002,
              "zero_fraction": 0.61, "mxint8": 0.031, "scale_operations": 9.0,
              "compute_saved": 0.74, "memory_saved": 0.72}]
    assert study.markdown(table).splitlines()[2:] == [
        "| a | 30.1 | +1.4 ± 0.2 % | 0.610 | 3.1 % | 9.0 | 74.0 % | 72.0 % |"]


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
                       "--json", str(out), "--table", "mxint8"]) == 0
    result = json.loads(out.read_text())
    assert result["images"] == 2 and len(result["tables"]["mxint8"]) == len(study.CHOICE) + 1
    assert study.markdown(result["tables"]["mxint8"]) in capsys.readouterr().out
