"""Folders that diffusers itself saves: the same network, the same denoiser, what is refused."""

import json
import re
import sys
import warnings

import pytest
import safetensors.torch
import torch

import sqdm
from golden import diffusers_folder, load, quantize
from golden.checkpoint import ModelError
from golden.quantized_network import QuantizedModel, evaluate
from golden.sampler import draw_noise

LEVELS = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
SMALL = {"sample_size": 16, "block_out_channels": (8, 16, 16), "layers_per_block": 1,
         "norm_num_groups": 4, **LEVELS}
NETWORKS = {
    # The options of google/ddpm-cifar10-32, and of ddpm-celebahq-256 but for its levels.
    "ddpm": {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False,
             "freq_shift": 1, "norm_eps": 1e-6},
    "defaults": {},
    "heads": {"attention_head_dim": 4, "layers_per_block": 2, "in_channels": 1, "out_channels": 1},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4,
                    "time_embedding_dim": 16, "act_fn": "swish"},
    "no_attention": {"add_attention": False, "down_block_types": ("DownBlock2D",) * 3,
                     "up_block_types": ("UpBlock2D",) * 3},
}
SCHEDULES = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01,
               "num_train_timesteps": 100},
}


@pytest.fixture(scope="module")
def diffusers():
    """The library, imported without the warnings of what it imports, and kept off the network."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        import diffusers
        from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

        assert DDIMScheduler and DDPMPipeline and DDPMScheduler and UNet2DModel  # lazy imports
        yield diffusers


@pytest.fixture(scope="module")
def networks(diffusers):
    """A UNet2DModel with random weights for each of NETWORKS."""
    found = {}
    for name, options in NETWORKS.items():
        torch.manual_seed(0)
        found[name] = diffusers.UNet2DModel(**{**SMALL, **options}).eval().requires_grad_(False)
        for value in found[name].parameters():
            torch.nn.init.normal_(value, std=0.15)
    return found


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_raw_network(networks, tmp_path, name):
    theirs = networks[name]
    theirs.save_pretrained(tmp_path)
    model, record = load.load(tmp_path)
    a = model.architecture
    x = torch.randn(2, a.img_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([3.0, 700.0])
    assert error(model.unet(x, steps), theirs(x, steps).sample) < 1e-5
    assert a.prediction == "epsilon"
    assert record["origin"]["files"] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert record["origin"]["schedule"] == "DDPM's, for want of one"
    assert sum(value.numel() for value in model.parameters()) == theirs.num_parameters()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pipeline(diffusers, networks, tmp_path, schedule):
    """The denoiser is the scheduler's estimate of the clean image, at its own noise levels."""
    scheduler = diffusers.DDPMScheduler(clip_sample=False, **SCHEDULES[schedule])
    theirs = networks["ddpm"]
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path)
    model, record = load.load(tmp_path)
    assert record["origin"]["files"][:2] == ["unet/config.json",
                                             "scheduler/scheduler_config.json"]
    steps = len(scheduler.alphas_cumprod)
    generator = torch.Generator().manual_seed(1)
    for step in (0, steps // 50, steps // 2, steps - 1):
        kept = scheduler.alphas_cumprod[step].double()
        sigma = ((1 - kept) / kept).sqrt().float()
        x = torch.randn(1, 3, 16, 16, generator=generator) * (1 + sigma)
        scaled = x * kept.sqrt().float()
        raw = theirs(scaled, step).sample
        expected = scheduler.step(raw, step, scaled).pred_original_sample
        assert error(model(x, sigma), expected) < 1e-4, (schedule, step)
    assert model.sigma_max == pytest.approx(sigma.item(), rel=1e-3)


def test_quantize_command(diffusers, networks, tmp_path, monkeypatch, capsys):
    """`sqdm quantize FOLDER` gives integers that evaluate over the schedule's noise levels."""
    diffusers.DDPMPipeline(networks["ddpm"], diffusers.DDPMScheduler()).save_pretrained(
        tmp_path / "ddpm")
    path = tmp_path / "quantized.safetensors"
    monkeypatch.setattr(sys, "argv", ["sqdm", "quantize", str(tmp_path / "ddpm"), "--out",
                                      str(path), "--images", "1", "--steps", "2"])
    with pytest.raises(SystemExit) as end:
        sqdm.main()
    assert not end.value.code
    assert f"{path}: policy mixed" in " ".join(capsys.readouterr().out.split())
    model = quantize.load(path)
    assert isinstance(model, QuantizedModel)
    assert model.schedule[0].sigma == pytest.approx(model.sigma_max) and model.sigma_max > 100
    x = draw_noise(1, model.architecture) * model.sigma_max
    denoised = evaluate(model, x, 0).denoised
    assert error(denoised, model(x, model.sigma_max)) < 0.1


def test_older_files(diffusers, networks, tmp_path):
    """Attention's older names, torch's files, and a pipeline without subfolders."""
    theirs = networks["ddpm"]
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "new")
    expected = load.load(tmp_path / "new")[0]
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, value in theirs.state_dict().items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = value
    assert any(".proj_attn." in name for name in weights)
    for n, form in enumerate(({}, {"_use_new_zipfile_serialization": False})):
        folder = tmp_path / f"old{n}"
        folder.mkdir()
        for path in (tmp_path / "new").rglob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        torch.save(weights, folder / "diffusion_pytorch_model.bin", **form)
        found, record = load.load(folder)
        assert found.architecture == expected.architecture
        assert found.architecture.prediction == "v"
        assert record["origin"]["files"] == ["config.json", "scheduler_config.json",
                                             "diffusion_pytorch_model.bin"]
        for name, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)


@pytest.fixture
def folder(networks, tmp_path):
    """A saved network, and a function that changes options in its configuration."""
    networks["ddpm"].save_pretrained(tmp_path)

    def change(name="config.json", **options):
        path = tmp_path / name
        path.write_text(json.dumps(
            {**(json.loads(path.read_text()) if path.exists() else {}), **options}))

    change.path = tmp_path
    return change


def refused(path, message):
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        load.load(path)


@pytest.mark.parametrize("options, message", [
    ({"_class_name": "UNet2DConditionModel"},
     "_class_name must be UNet2DModel, not 'UNet2DConditionModel'"),
    ({"act_fn": "gelu"}, "act_fn must be 'silu' or 'swish', not 'gelu'"),
    ({"time_embedding_type": "fourier"},
     "time_embedding_type must be 'positional', not 'fourier'"),
    ({"class_embed_type": "timestep"}, "class_embed_type must be None, not 'timestep'"),
    ({"num_class_embeds": 10}, "num_class_embeds must be None, not 10"),
    ({"center_input_sample": True}, "center_input_sample must be False, not True"),
    ({"downsample_type": "resnet"}, "downsample_type must be 'conv', not 'resnet'"),
    ({"upsample_type": "resnet"}, "upsample_type must be 'conv', not 'resnet'"),
    ({"mid_block_type": None}, "mid_block_type must be 'UNetMidBlock2D', not None"),
    ({"mid_block_scale_factor": 1.4}, "mid_block_scale_factor must be 1, not 1.4"),
    ({"mid_block_scale_factor": [1]}, "mid_block_scale_factor must be 1, not a list"),
    ({"out_channels": 6}, "out_channels must be in_channels, 3, not 6"),
    ({"sample_size": [16, 16]}, "sample_size must be an integer, not a list"),
    ({"sample_size": 18}, "sample_size must be a multiple of 2 to the 2 (levels - 1), not 18"),
    ({"block_out_channels": [8, 12, 16]},
     "block_out_channels must be multiples of the first, not [8, 12, 16]"),
    ({"block_out_channels": "8"}, ("block_out_channels must be a list of 1 to 8 items of type int, "
                                  "not '8'")),
    ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]},
     "down_block_types must be of DownBlock2D and AttnDownBlock2D, not 'SkipDownBlock2D'"),
    ({"up_block_types": ["UpBlock2D"] * 3},
     "up_block_types must have attention where down_block_types do, not elsewhere"),
    ({"up_block_types": ["UpBlock2D"] * 2},
     "up_block_types must be as many as block_out_channels, 3, not 2"),
    ({"time_embedding_dim": 20},
     "time_embedding_dim must be a multiple of 8, the first of block_out_channels, not 20"),
    ({"resnet_time_scale_shift": "spatial"},
     "resnet_time_scale_shift must be default or scale_shift, not 'spatial'"),
    ({"resnet_time_scale_shift": "scale_shift"},
     "attn_norm_num_groups must be norm_num_groups, 4, not None"),
    ({"attn_norm_num_groups": 2}, "attn_norm_num_groups must be norm_num_groups, 4, not 2"),
    ({"attention_head_dim": 3}, "attention_head_dim must divide the channels of a level, 8, not 3"),
    ({"norm_num_groups": None}, "norm_num_groups must be an integer, not None"),
    ({"freq_shift": 2}, "freq_shift must be in 0..1, not 2"),
    ({"cross_attention_dim": 768}, ("option 'cross_attention_dim' must not be there: UNet2DModel "
                                   "has no such one that is supported")),
])
def test_unsupported_option(folder, options, message):
    folder(**options)
    refused(folder.path, f"{folder.path / 'config.json'}: {message}")


@pytest.mark.parametrize("options, message", [
    ({"_class_name": "ScoreSdeVeScheduler"}, ("_class_name must be one of "
     f"{', '.join(diffusers_folder.SCHEDULERS)}, not 'ScoreSdeVeScheduler'")),
    ({"prediction_type": "sample"},
     "prediction_type must be one of epsilon, v_prediction, not 'sample'"),
    ({"beta_schedule": "sigmoid"},
     "beta_schedule must be one of linear, scaled_linear, squaredcos_cap_v2, not 'sigmoid'"),
    ({"trained_betas": [0.1]}, "trained_betas must be None, not a list"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False, not True"),
    ({"beta_start": "low"}, "beta_start must be a number, not 'low'"),
])
def test_unsupported_schedule(folder, options, message):
    folder("scheduler_config.json", **options)
    refused(folder.path, f"{folder.path / 'scheduler_config.json'}: {message}")


def test_unusable_folders(folder, tmp_path_factory):
    path = folder.path
    refused(tmp_path_factory.mktemp("empty"), f"{tmp_path_factory.getbasetemp() / 'empty0'}: "
            "folder must have been saved by diffusers, with a config.json or model_index.json")
    weights = path / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = "mid_block.attentions.0.to_k.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name][:3].contiguous()}, weights)
    refused(path, f"{weights}: tensor {name} must have shape (16, 16), not (3, 16)")
    safetensors.torch.save_file({**tensors, name: tensors[name] / 0}, weights)
    refused(path, f"{weights}: tensor {name} must be finite, not NaN or infinite")
    weights.write_bytes(b"{}")
    with pytest.raises(ModelError, match=f"^{weights}: must be a whole safetensors file "):
        load.load(path)
    weights.unlink()
    refused(path, f"{path}: must contain diffusion_pytorch_model.safetensors or "
                  f"diffusion_pytorch_model.bin")
    folder("model_index.json", unet=["diffusers", "UNet2DConditionModel"])
    refused(path, f"{path / 'model_index.json'}: \"unet\" must be a UNet2DModel, "
                  f"not 'UNet2DConditionModel'")
    (path / "config.json").write_text("[" * 100_000)
    (path / "model_index.json").unlink()
    with pytest.raises(ModelError, match=f"^{path / 'config.json'}: must be JSON "):
        load.load(path)
    (path / "config.json").write_text("[]")
    refused(path, f"{path / 'config.json'}: must be a JSON object, not a list")
    (path / "config.json").write_text(" " * (diffusers_folder.JSON_BYTES + 1))
    refused(path, f"{path / 'config.json'}: must be at most 1048576 bytes of JSON")
