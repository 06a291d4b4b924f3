"""Model files: exact round trip in half precision, and one clear line for each kind of damage."""

import dataclasses
import json
import re

import pytest
import safetensors.torch
import torch

from golden import checkpoint
from golden.network import Precond
from golden.recipes import mnist32

ARCHITECTURE = dataclasses.replace(mnist32.architecture, resolution=8, model_channels=8,
                                   channel_mult=(1, 2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Precond(ARCHITECTURE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model, {"recipe": "tiny", "steps": 3, "loss": None})
    return path


def damage(path, change):
    """Rewrite the file after `change` (tensors, record)."""
    tensors, record = checkpoint.read_file(path)
    change(tensors, record)
    safetensors.torch.save_file(tensors, path, {"sqdm": json.dumps(record)})


def expect(path, text):
    with pytest.raises(checkpoint.ModelError, match="^" + re.escape(f"{path}: {text}") + "$"):
        checkpoint.load_model(path)


def test_round_trip(path, model):
    loaded, record = checkpoint.load_model(path)
    assert loaded.architecture == ARCHITECTURE and not loaded.training
    assert {name: record[name] for name in ("recipe", "steps", "loss")} == {
        "recipe": "tiny", "steps": 3, "loss": None}
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].half().float())
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(loaded(x, 0.5), model.half().float()(x, 0.5))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_quantized_tensors_ride_along(path, model):
    codes = torch.arange(-7, 8, dtype=torch.int8)
    checkpoint.save_model(path, model, {}, {"quantized.first.codes": codes})
    checkpoint.load_model(path)
    assert torch.equal(checkpoint.read_file(path)[0]["quantized.first.codes"], codes)
    with pytest.raises(ValueError, match=r'^tensors must have names that start with "quantized\."'
                                         r", not 'first\.codes'$"):
        checkpoint.save_model(path, model, {}, {"first.codes": codes})


def test_failed_write_leaves_the_old_file(path, model):
    before = path.read_bytes()
    with torch.no_grad():
        model.unet.last.bias.fill_(1e6)      # infinite in half precision
    with pytest.raises(checkpoint.ModelError, match=r"^.*model\.safetensors: tensor "
                       r"unet\.last\.bias must be finite, not NaN or infinite$"):
        checkpoint.save_model(path, model, {})

    def fail(temporary):
        temporary.write_bytes(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="^full$"):
        checkpoint.replace_file(path, fail)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_missing_and_damaged_files(path):
    expect(path.with_name("no.safetensors"), "must be an existing model file")
    expect(path.parent, "must be an existing model file")
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:200], whole[:-1], whole + b"0", b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(checkpoint.ModelError, match="^" + re.escape(str(path))
                           + r": must be a whole safetensors file \([^\n]+\)$"):
            checkpoint.load_model(path)


def test_foreign_metadata(path):
    tensors, record = checkpoint.read_file(path)
    safetensors.torch.save_file(tensors, path)
    expect(path, 'must be a "sqdm float model", but its metadata has no record "sqdm"')
    safetensors.torch.save_file(tensors, path, {"sqdm": "{"})
    with pytest.raises(checkpoint.ModelError, match=r'^.*: metadata "sqdm" must be JSON \(.*\)$'):
        checkpoint.load_model(path)
    for kind, text in (({"kind": "other"}, "'other'"), ({}, "None"), ([1], "[1]")):
        safetensors.torch.save_file(tensors, path, {"sqdm": json.dumps(kind)})
        expect(path, f'must be a "sqdm float model", not {text}')


@pytest.mark.parametrize("value, text", [
    (None, "architecture must be a JSON object, not None"),
    ({"depth": 8}, "architecture must have known fields only, not 'depth'"),
])
def test_damaged_architecture(path, value, text):
    damage(path, lambda tensors, record: record.update(architecture=value))
    expect(path, text)


def test_hostile_architecture_is_refused_by_shape(path):
    damage(path, lambda tensors, record: record["architecture"].update(
        model_channels=1024, channel_mult=[16] * 4, num_blocks=32))
    expect(path, "tensor unet.embed0.weight must have shape (4096, 1024), not (32, 8)")


@pytest.mark.parametrize("name, change, text", [
    ("unet.last.weight", lambda value: None, "is missing"),
    ("unet.last.weight", lambda value: value[:, :4].contiguous(),
     "must have shape (1, 8, 3, 3), not (1, 4, 3, 3)"),
    ("unet.first.bias", lambda value: value * float("nan"),
     "must be finite, not NaN or infinite"),
    ("unet.first.bias", lambda value: value + float("inf"),
     "must be finite, not NaN or infinite"),
    ("unet.first.bias", lambda value: value.int(), "must be floating point, not torch.int32"),
    ("unet.more", lambda value: torch.zeros(1),
     "must not be there: the architecture has no such tensor"),
])
def test_damaged_tensor_is_named(path, name, change, text):
    def edit(tensors, record):
        value = change(tensors.pop(name, None))
        if value is not None:
            tensors[name] = value

    damage(path, edit)
    expect(path, f"tensor {name} {text}")
