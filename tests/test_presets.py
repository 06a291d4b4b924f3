"""Preset architectures, and files of them with random weights."""

import pytest
import torch

from golden import presets
from golden.checkpoint import load_model


def test_command_writes_a_model_that_loads(tmp_path, capsys):
    path = tmp_path / "random.safetensors"
    arguments = ["mnist32", "--activation", "relu", "--seed", "3", "--out", str(path)]
    assert presets.main(arguments) == 0
    assert capsys.readouterr().out == f"{path}\n"
    model, record = load_model(path)
    assert model.architecture.activation == "relu"
    assert (record["preset"], record["weights"], record["seed"]) == ("mnist32", "random", 3)
    again = presets.random_model(model.architecture, seed=3)
    for name, value in again.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.half().float()), name


def test_no_layer_is_zero_and_the_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = presets.random_model(presets.PRESETS["mnist32"])
    assert torch.equal(torch.rand(1), expected)
    assert all(layer.weight.std() > 0.01 for layer in model.unet.layers())


def test_command_rejects(tmp_path, capsys):
    missing = tmp_path / "none" / "random.safetensors"
    assert presets.main(["mnist32", "--out", str(missing)]) == 2
    assert capsys.readouterr().err.startswith("presets: ")
    with pytest.raises(SystemExit) as stop:
        presets.main(["imagenet", "--out", str(missing)])
    assert stop.value.code == 2
