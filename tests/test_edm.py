"""EDM's names, arguments and snapshots, on files made by tests/edm_pickle.py."""

import dataclasses
import math
import os
import re
import sys

import pytest
import torch

from golden import edm, load, pickled
from golden.checkpoint import ModelError
from golden.network import Architecture
from golden.presets import PRESETS, random_model
from tests import edm_pickle

SONG = dataclasses.replace(
    PRESETS["cifar10-ddpmpp"], resolution=8, model_channels=16, channel_mult=(1, 2),
    num_blocks=1, attention_resolutions=(4,))
NETWORKS = {
    "ddpmpp": dataclasses.replace(SONG, label_dim=4),
    "ncsnpp": dataclasses.replace(SONG, embedding="fourier", noise_mult=2, encoder="residual",
                                  resample_filter=(1, 3, 3, 1), augment_dim=0),
    "ncsnpp-skip": dataclasses.replace(SONG, encoder="skip", decoder="skip", label_dim=4),
    "adm": dataclasses.replace(PRESETS["imagenet64-adm"], resolution=8, model_channels=64,
                               channel_mult=(1, 1), num_blocks=1, attention_resolutions=(4,),
                               label_dim=4),
}


@pytest.fixture(scope="module")
def networks():
    """A Precond with random weights for each of NETWORKS."""
    return {name: random_model(architecture) for name, architecture in NETWORKS.items()}


def same(model, other):
    state = other.state_dict()
    return model.architecture == other.architecture and all(
        torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "mnist32"])
def test_arguments_of_presets(name):
    given = edm.arguments(PRESETS[name])
    assert edm.architecture(given) == PRESETS[name]
    assert given["model_type"] == ("DhariwalUNet" if "adm" in name else "SongUNet")


def test_arguments_that_are_left_out_have_edm_defaults():
    found = edm.architecture({"img_resolution": 64, "img_channels": 3, "label_dim": 1000})
    assert found == PRESETS["imagenet64-adm"]
    found = edm.architecture({"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet"})
    assert (found.channel_mult, found.num_blocks, found.dropout) == ((1, 2, 2, 2), 4, 0.1)


def test_arguments_refuse_another_architecture():
    for changes, field in (({"activation": "relu"}, "activation"),
                           ({"project_resampled": False}, "project_resampled"),
                           ({"norm_eps": 1e-5}, "norm_eps")):
        with pytest.raises(ValueError, match=f"^{field} must be "):
            edm.arguments(dataclasses.replace(SONG, **changes))
    with pytest.raises(ValueError, match="^architecture must be one of EDM's, not of family "
                                         "diffusers and prediction epsilon$"):
        edm.arguments(Architecture(family="diffusers", prediction="epsilon"))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "DiTNet"}, "model_type must be one of SongUNet, DhariwalUNet, not 'DiTNet'"),
    ({"img_channels": None}, "img_channels must be an integer, not None"),
    ({"img_resolution": 33}, ("img_resolution must be a multiple of 2 to the 1 (levels - 1), "
                             "not 33")),
    ({"embedding_type": "learned"}, ("embedding_type must be one of positional, fourier, "
                                    "not 'learned'")),
    ({"encoder_type": "residue"}, ("encoder_type must be one of standard, skip, residual, "
                                  "not 'residue'")),
    ({"resample_filter": [1, 2, 1]}, ("resample_filter must be one of (1, 1), (1, 3, 3, 1), "
                                     "not (1, 2, 1)")),
    ({"sigma_min": 0.02}, "sigma_min must be in 0..0.002, not 0.02"),
    ({"sigma_max": 50}, "sigma_max must be in 80..inf, not 50"),
    ({"label_dropout": 2}, "label_dropout must be in 0..1, not 2"),
    ({"use_fp16": 1}, "use_fp16 must be a bool, not 1"),
    ({"beta_d": 19.9}, "argument 'beta_d' must not be there: SongUNet has no such one"),
    ({"attn_resolutions": [[16]]}, ("attn_resolutions must be a number, a text or a list of "
                                   "numbers, not a list")),
    ({"channel_mult": [1.5]}, "channel_mult must be at most 8 integers in 1..16, not (1.5,)"),
])
def test_unsupported_argument(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        edm.architecture({**edm.arguments(SONG), **changes})


def test_missing_argument():
    with pytest.raises(ValueError, match="^argument img_channels is missing$"):
        edm.architecture({"img_resolution": 32})


def test_names():
    """A few names of the published networks, from their state dicts."""
    names = edm.names(random_model(NETWORKS["ncsnpp"]).unet)
    for ours, theirs in {
            "positional.frequencies": "map_noise.freqs", "embed0.weight": "map_layer0.weight",
            "embed1.bias": "map_layer1.bias", "first.weight": "enc.8x8_conv.weight",
            "encoder.8x8_block0.conv0.norm.weight": "enc.8x8_block0.norm0.weight",
            "encoder.8x8_block0.affine.bias": "enc.8x8_block0.affine.bias",
            "encoder.4x4_down.skip.weight": "enc.4x4_down.skip.weight",
            "encoder.4x4_aux_residual.weight": "enc.4x4_aux_residual.weight",
            "encoder.4x4_block0.qkv.norm.bias": "enc.4x4_block0.norm2.bias",
            "decoder.4x4_middle0.proj.weight": "dec.4x4_in0.proj.weight",
            "decoder.4x4_middle1.conv1.norm.weight": "dec.4x4_in1.norm1.weight",
            "decoder.8x8_up.conv1.weight": "dec.8x8_up.conv1.weight",
            "last.norm.weight": "dec.8x8_aux_norm.weight",
            "last.weight": "dec.8x8_aux_conv.weight"}.items():
        assert names[ours] == theirs
    names = edm.names(random_model(NETWORKS["ncsnpp-skip"]).unet)
    assert names["encoder.4x4_aux_skip.weight"] == "enc.4x4_aux_skip.weight"
    assert names["decoder.4x4_aux.norm.weight"] == "dec.4x4_aux_norm.weight"
    assert names["label.bias"] == "map_label.bias"
    assert names["augment.weight"] == "map_augment.weight"
    names = edm.names(random_model(NETWORKS["adm"]).unet)
    assert names["last.norm.weight"] == "out_norm.weight"
    assert names["last.bias"] == "out_conv.bias"


def test_filters_are_exported(networks):
    found = {name: value for name, value in edm.export(networks["ncsnpp"]).items()
             if name.endswith("resample_filter")}
    assert set(found) == {f"model.{name}.resample_filter" for name in (
        "enc.4x4_down.conv0", "enc.4x4_down.skip", "enc.4x4_aux_residual", "dec.8x8_up.conv0",
        "dec.8x8_up.skip")}
    value = found["model.enc.4x4_down.skip.resample_filter"]
    assert value.shape == (1, 1, 4, 4) and value[0, 0, 1, 1] == 9 / 64
    # Blocks of ADM have a filter in their skip even where it has no weight.
    assert "model.dec.8x8_up.skip.resample_filter" in edm.export(networks["adm"])
    skip = {name for name in edm.export(networks["ncsnpp-skip"]) if "_aux_" in name}
    assert {"model.enc.4x4_aux_down.resample_filter",
            "model.dec.8x8_aux_up.resample_filter"} <= skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", [
    {}, {"zipped": True, "protocol": 5}, {"numpy_name": "numpy.core.multiarray", "protocol": 3}])
def test_snapshot(networks, tmp_path, name, form):
    path, model = tmp_path / "network-snapshot.pkl", networks[name]
    path.write_bytes(edm_pickle.snapshot(edm.export(model), edm.arguments(model.architecture),
                                         **form))
    found, record = load.load(path)
    assert same(found, model)
    assert record["origin"]["kind"] == "EDM snapshot"
    assert {"EDMPrecond", "Conv2d", edm.model_type(model)} <= set(record["origin"]["classes"])
    assert not any(value.requires_grad for value in found.parameters())


def test_arguments_by_position(networks):
    model = networks["ddpmpp"]
    kwargs = edm.arguments(model.architecture)
    data = edm_pickle.snapshot(edm.export(model), kwargs)
    first = edm.read_snapshot("x", data)[0]
    assert edm.architecture(first) == model.architecture

    class Positional(edm_pickle.Module):
        def state(self):
            return {**super().state(), "_init_args": (8, 3, 4), "_init_kwargs": {
                name: value for name, value in kwargs.items()
                if name not in ("img_resolution", "img_channels", "label_dim")}}

    data = edm_pickle.snapshot({}, kwargs, extra={"ema": Positional("EDMPrecond")}.items())
    assert edm.architecture(edm.read_snapshot("x", data)[0]) == model.architecture


def snapshot_of(net, **form):
    return edm_pickle.snapshot({}, edm.arguments(SONG), extra={"ema": net}.items(), **form)


class Named(edm_pickle.Module):
    """A module with its own state entries."""

    def __init__(self, entries, class_name="EDMPrecond"):
        super().__init__(class_name, **edm.arguments(SONG))
        self.entries = entries

    def state(self):
        return {**super().state(), **self.entries}


class Old(edm_pickle.Module):
    version = 5


def nest(depth):
    module = edm_pickle.Module("Inner")
    for _ in range(depth):
        outer = edm_pickle.Module("Inner")
        outer.children["inner"] = module
        module = outer
    return module


def bush(levels):
    """A module whose tree has 100 to the power of `levels` leaves, of few objects."""
    module = edm_pickle.Module("Inner")
    for _ in range(levels):
        outer = edm_pickle.Module("Inner")
        outer.children.update({f"child{n}": module for n in range(100)})
        module = outer
    return module


@pytest.mark.parametrize("net, message", [
    (edm_pickle.Module("VPPrecond"), "class of the network must be EDMPrecond, not 'VPPrecond'"),
    ({}, 'snapshot must be a dict with the network "ema"'),
    (Named({"_init_kwargs": None}), "snapshot must have the arguments that made its EDMPrecond"),
    (Named({"_init_args": [1] * 9}), "arguments by position must be at most 8, not 9"),
    (Named({"_parameters": [1]}), "_parameters of a module must be a dict, not a list"),
    (Named({"_parameters": {3: 4}}), "name in _parameters must be a text, not 3"),
    (Named({"_parameters": {"a\nb": 4}}), r"name in _parameters must be a text, not 'a\nb'"),
    (Named({"_parameters": {"weight": 4}}), "weight must be a tensor, not 4"),
    (Named({"_modules": {"model": {}}}), "model must be a module, not a dict"),
    (Named({"_modules": {"model": nest(20)}}),
     "network must have at most 20000 modules, 16 deep"),
    (Named({"_modules": {"model": bush(3)}}),
     "network must have at most 20000 modules, 16 deep"),
    (Old("EDMPrecond"), "version of a persistent object must be 6, not 5"),
])
def test_refused_snapshot(net, message):
    with pytest.raises(ModelError, match=f"^x.pkl: {re.escape(message)}$"):
        edm.read_snapshot("x.pkl", snapshot_of(net))


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("payload, name", [
    (Call(os.system, "touch owned"), f"{os.system.__module__}.system"),
    (Call(eval, "__import__('pathlib').Path('owned').touch()"), "builtins.eval"),
    (Call(exec, "open('owned', 'w')"), "builtins.exec"),
    (Call(getattr, "", "join"), "builtins.getattr"),
    (Call(sys.exit, 1), "sys.exit"),
    (Call(torch.load, "owned"), "torch.serialization.load"),
    (Call(torch.hub.load, "owned", "x"), "torch.hub.load"),
    (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    (math.sqrt, "math.sqrt"),
    (os.PathLike, "os.PathLike"),
])
def test_nothing_is_executed(payload, name, tmp_path, monkeypatch):
    """Neither as an entry of the snapshot nor as a member of the network."""
    monkeypatch.chdir(tmp_path)
    for data in (edm_pickle.snapshot({}, edm.arguments(SONG), extra={"other": payload}.items()),
                 snapshot_of(Named({"_parameters": {"weight": payload}}))):
        with pytest.raises(ModelError, match=f"^x: the pickle must not name {re.escape(name)}, "
                                             f"which this reader does not know$"):
            edm.read_snapshot("x", data)
    assert not list(tmp_path.iterdir())


def test_source_is_not_executed(networks, tmp_path, monkeypatch):
    """The text that EDM would compile has effects, in each module of the snapshot."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edm_pickle.Persistent, "source", "open('owned', 'w')\n1 / 0\n")
    model = networks["ddpmpp"]
    data = edm_pickle.snapshot(edm.export(model), edm.arguments(model.architecture))
    assert b"open('owned', 'w')" in data
    given, tensors, _ = edm.read_snapshot("x", data)
    assert same(edm.model("x", tensors, given), model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.map_layer0.weight"), "tensor model.map_layer0.weight is missing"),
    (lambda t: t.update({"model.more": torch.zeros(1)}),
     "tensor model.more must not be there: the architecture has no such tensor"),
    (lambda t: t.update({"model.map_layer0.bias": torch.zeros(3)}),
     "tensor model.map_layer0.bias must have shape (64,), not (3,)"),
    (lambda t: t.update({"model.map_layer0.bias": torch.zeros(64, dtype=torch.int64)}),
     "tensor model.map_layer0.bias must be floating point, not torch.int64"),
    (lambda t: t["model.map_layer0.bias"].fill_(math.nan),
     "tensor model.map_layer0.bias must be finite, not NaN or infinite"),
    (lambda t: t["model.enc.4x4_down.skip.resample_filter"].mul_(2),
     "tensor model.enc.4x4_down.skip.resample_filter must be that of resample_filter [1, 1]"),
    (lambda t: t.update({"model.enc.4x4_down.skip.resample_filter": torch.ones(1, 1, 4, 4)}),
     ("tensor model.enc.4x4_down.skip.resample_filter must have shape (1, 1, 2, 2), "
     "not (1, 1, 4, 4)")),
])
def test_mismatched_tensors(networks, change, message):
    model = networks["ddpmpp"]
    tensors = edm.export(model)
    change(tensors)
    with pytest.raises(ModelError, match=f"^x.pkl: {re.escape(message)}$"):
        edm.model("x.pkl", tensors, edm.arguments(model.architecture))


def test_tensors_share_no_memory(networks):
    """One large tensor under all names must not cost the memory of all."""
    shared = torch.zeros(1000)
    net = Named({"_parameters": {f"p{n}": shared for n in range(100)}})
    data = snapshot_of(net)
    assert len(data) < 100_000
    with pytest.raises(ModelError, match="^x: tensors must be at most as large as their file, "
                                         f"{len(data)} bytes, not 400000$"):
        edm.read_snapshot("x", data)


def test_names_of_the_reader():
    """Exactly these; whoever adds one says why here."""
    assert {f"{module}.{name}" for module, name in edm.SNAPSHOT} == {
        "collections.OrderedDict", "dnnlib.util.EasyDict",
        "torch_utils.persistence._reconstruct_persistent_obj",
        "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter",
        "torch.storage._load_from_bytes", "torch.nn.modules.container.ModuleDict",
        "torch.nn.modules.container.ModuleList", "numpy.dtype", "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar", "builtins.set", "__builtin__.set"}
    assert all(call.__module__ in ("golden.edm", "golden.pickled")
               for call in edm.SNAPSHOT.values())
    assert not {name for name in vars(pickled) if name in ("eval", "exec", "importlib")}
