"""Folders in which diffusers saved a UNet2DModel, alone or as part of a pipeline.

Sources: Hugging Face's documentation of UNet2DModel and its schedulers for the options; parameter
names are those that such folders contain. Ho et al. 2020 (arXiv 2006.11239) for the default
schedule.
"""

import hashlib
import json
import pathlib

import safetensors
import safetensors.torch
import torch

from golden import pickled
from golden.checkpoint import ModelError, assemble, check_finite, check_tensors, shapes
from golden.network import Architecture
from golden.pickled import short

__all__ = ["is_folder", "model", "read_json", "read_safetensors"]

JSON_BYTES = 1 << 20
PIPELINE, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# Options that must have one of these values; the first is what leaving the option out means.
ONLY = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
}
# Options that decide the Architecture, with diffusers' defaults.
OPTIONS = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "time_embedding_dim": None,
    "freq_shift": 0, "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "downsample_padding": 1,
    "dropout": 0.0, "attention_head_dim": 8, "norm_num_groups": 32, "attn_norm_num_groups": None,
    "norm_eps": 1e-5, "resnet_time_scale_shift": "default", "add_attention": True,
}
# Our fields for diffusers' options, where their names differ and one follows from the other.
FIELDS = {"sample_size": "resolution", "in_channels": "img_channels",
          "block_out_channels": "model_channels", "layers_per_block": "num_blocks",
          "attention_head_dim": "channels_per_head", "freq_shift": "embedding_shift",
          "flip_sin_to_cos": "cosine_first", "norm_num_groups": "norm_groups",
          "add_attention": "middle_attention", "num_train_timesteps": "timesteps"}
IGNORED = ("num_train_timesteps",)   # of a learned embedding of the time, which ONLY excludes
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
            "beta_schedule": "linear", "prediction_type": "epsilon"}
SCHEDULE_ONLY = {"trained_betas": (None,), "rescale_betas_zero_snr": (False,)}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler",
              "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
              "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
              "UniPCMultistepScheduler", "DEISMultistepScheduler")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
BLOCKS = {"DownBlock2D": False, "AttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "AttnUpBlock2D": True}

RESNET = {"conv0.norm": "norm1", "conv0": "conv1", "affine": "time_emb_proj",
          "conv1.norm": "norm2", "conv1": "conv2", "skip": "conv_shortcut"}
QKV = (("to_q", "to_k", "to_v"), ("query", "key", "value"))   # the second before diffusers 0.12
PROJ = ("to_out.0", "proj_attn")


def integer(digits):
    if len(digits) > 20:
        raise ValueError("integers must have at most 20 digits")
    return int(digits)


def read_json(path):
    """The object in the JSON file `path`, a dict; ModelError if it is none."""
    data = pickled.read(path)
    if len(data) > JSON_BYTES:
        raise ModelError(f"{path}: must be at most {JSON_BYTES} bytes of JSON")
    try:
        value = json.loads(str(data, "utf-8"), parse_int=integer)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: must be JSON ({pickled.first_line(error)})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must be a JSON object, not {short(value)}")
    return value


def read_safetensors(path, data):
    """Tensors by name in `data`, the bytes of the safetensors file `path`."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{path}: must be a whole safetensors file "
                         f"({pickled.first_line(error)})") from None


def is_folder(path):
    """Whether the folder `path` looks like one that diffusers saved."""
    return (path / CONFIG).is_file() or (path / PIPELINE).is_file()


def places(folder):
    """(config, scheduler's config or None, folder of the weights) in `folder`.

    A pipeline has its parts in subfolders, or, in the oldest ones, beside its index.
    """
    config, scheduler = folder / CONFIG, folder / SCHEDULER
    if (folder / PIPELINE).is_file():
        index = read_json(folder / PIPELINE)
        unet = index.get("unet")
        kind = unet[1] if isinstance(unet, list) and len(unet) == 2 else unet
        if kind != "UNet2DModel":
            raise ModelError(f'{folder / PIPELINE}: "unet" must be a UNet2DModel, '
                             f"not {short(kind)}")
        if (folder / "unet").is_dir():
            config = folder / "unet" / CONFIG
        if (folder / "scheduler").is_dir():
            scheduler = folder / "scheduler" / SCHEDULER
    return config, scheduler if scheduler.is_file() else None, config.parent


def check_options(path, given, only):
    for name, allowed in only.items():
        value = given.get(name, allowed[0])
        if isinstance(value, (list, dict)) or value not in allowed:
            raise ModelError(f"{path}: {name} must be "
                             f"{' or '.join(map(repr, allowed))}, not {short(value)}")


def schedule(path):
    """Fields of the Architecture from the scheduler's config `path`, None for the defaults."""
    given = {} if path is None else read_json(path)
    name = given.get("_class_name", SCHEDULERS[0])
    if name not in SCHEDULERS:
        raise ModelError(f"{path}: _class_name must be one of {', '.join(SCHEDULERS)}, "
                         f"not {short(name)}")
    check_options(path, given, SCHEDULE_ONLY)
    values = {name: given.get(name, default) for name, default in SCHEDULE.items()}
    for name, known in (("prediction_type", PREDICTIONS), ("beta_schedule", SCHEDULES)):
        if not isinstance(values[name], str) or values[name] not in known:
            raise ModelError(f"{path}: {name} must be one of {', '.join(known)}, "
                             f"not {short(values[name])}")
    for name in ("num_train_timesteps", "beta_start", "beta_end"):
        if not isinstance(values[name], (int, float)):
            raise ModelError(f"{path}: {name} must be a number, not {short(values[name])}")
    return {"prediction": PREDICTIONS[values["prediction_type"]],
            "timesteps": values["num_train_timesteps"], "beta_start": values["beta_start"],
            "beta_end": values["beta_end"], "beta_schedule": SCHEDULES[values["beta_schedule"]]}


def sequence(path, options, name, kind):
    value = options[name]
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 8 \
            or not all(type(item) is kind for item in value):
        raise ModelError(f"{path}: {name} must be a list of 1 to 8 items of type "
                         f"{kind.__name__}, not {short(value)}")
    return tuple(value)


def architecture(path, given, fields):
    """The Architecture of the UNet2DModel configuration `given`, read from `path`.

    `fields` are those of `schedule`. Raises ModelError for an option, or a value of one, that is
    not supported; it names the option.
    """
    if given.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ModelError(f"{path}: _class_name must be UNet2DModel, "
                         f"not {short(given['_class_name'])}")
    for name in given:
        if not name.startswith("_") and name not in (*ONLY, *OPTIONS, *IGNORED):
            raise ModelError(f"{path}: option {short(name)} must not be there: "
                             f"UNet2DModel has no such one that is supported")
    check_options(path, given, ONLY)
    options = {**OPTIONS, **{name: given[name] for name in OPTIONS if name in given}}

    def refuse(name, rule):
        raise ModelError(f"{path}: {name} must be {rule}, not {short(options[name])}")

    for name in ("sample_size", "in_channels", "out_channels", "layers_per_block",
                 "norm_num_groups"):
        if type(options[name]) is not int:
            refuse(name, "an integer")
    widths = sequence(path, options, "block_out_channels", int)
    downs = sequence(path, options, "down_block_types", str)
    ups = sequence(path, options, "up_block_types", str)
    for name, kinds, known in (("down_block_types", downs, BLOCKS),
                               ("up_block_types", ups, UP_BLOCKS)):
        for kind in kinds:
            if kind not in known:
                raise ModelError(f"{path}: {name} must be of {' and '.join(known)}, "
                                 f"not {short(kind)}")
        if len(kinds) != len(widths):
            raise ModelError(f"{path}: {name} must be as many as block_out_channels, "
                             f"{len(widths)}, not {len(kinds)}")
    attends = [BLOCKS[kind] for kind in downs]
    if [UP_BLOCKS[kind] for kind in reversed(ups)] != attends:
        raise ModelError(f"{path}: up_block_types must have attention where down_block_types do, "
                         f"not elsewhere")
    if options["out_channels"] != options["in_channels"]:
        refuse("out_channels", f"in_channels, {options['in_channels']}")
    if widths[0] < 1 or any(width < 1 or width % widths[0] for width in widths):
        raise ModelError(f"{path}: block_out_channels must be multiples of the first, "
                         f"not {list(widths)}")
    embedding = options["time_embedding_dim"]
    if embedding is None:
        embedding = 4 * widths[0]
    if type(embedding) is not int or embedding < 1 or embedding % widths[0]:
        refuse("time_embedding_dim", f"a multiple of {widths[0]}, the first of block_out_channels")
    if options["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        refuse("resnet_time_scale_shift", "default or scale_shift")
    adaptive = options["resnet_time_scale_shift"] == "scale_shift"
    groups = options["attn_norm_num_groups"]
    if options["add_attention"] and groups != options["norm_num_groups"] \
            and (adaptive or groups is not None):
        refuse("attn_norm_num_groups", f"norm_num_groups, {options['norm_num_groups']}")
    levels = range(len(widths))
    try:
        return Architecture(
            family="diffusers", activation="silu", resolution=options["sample_size"],
            img_channels=options["in_channels"], model_channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_blocks=options["layers_per_block"],
            attention_resolutions=tuple(options["sample_size"] >> level for level in levels
                                        if attends[level]),
            middle_attention=options["add_attention"],
            channels_per_head=options["attention_head_dim"],
            embedding_mult=embedding // widths[0], embedding_shift=options["freq_shift"],
            cosine_first=options["flip_sin_to_cos"], adaptive_norm=adaptive,
            norm_groups=options["norm_num_groups"], norm_group_channels=1,
            norm_eps=options["norm_eps"], dropout=options["dropout"],
            downsample_padding=options["downsample_padding"], **fields)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {pickled.renamed(error, FIELDS)}") from None


def parameter_names(a):
    """Module of diffusers for each of our modules with parameters, a dict by our name."""
    found = {"unet.embed0": "time_embedding.linear_1", "unet.embed1": "time_embedding.linear_2",
             "unet.first": "conv_in", "unet.last.norm": "conv_norm_out", "unet.last": "conv_out"}

    def block(ours, resnet, attention=None):
        for name, theirs in RESNET.items():
            found[f"unet.{ours}.{name}"] = f"{resnet}.{theirs}"
        if attention:
            found[f"unet.{ours}.qkv.norm"] = f"{attention}.group_norm"
            found[f"unet.{ours}.qkv"] = f"{attention}.qkv"
            found[f"unet.{ours}.proj"] = f"{attention}.proj"

    count = len(a.channel_mult)
    for level in range(count):
        size, up = a.resolution >> level, count - 1 - level
        for ours, blocks, total in ((f"encoder.{size}x{size}", f"down_blocks.{level}",
                                     a.num_blocks),
                                    (f"decoder.{size}x{size}", f"up_blocks.{up}",
                                     a.num_blocks + 1)):
            for n in range(total):
                block(f"{ours}_block{n}", f"{blocks}.resnets.{n}", f"{blocks}.attentions.{n}")
        if level:
            found[f"unet.encoder.{size}x{size}_down_conv"] = \
                f"down_blocks.{level - 1}.downsamplers.0.conv"
            found[f"unet.decoder.{2 * size}x{2 * size}_up_conv"] = \
                f"up_blocks.{up}.upsamplers.0.conv"
    block(f"decoder.{size}x{size}_middle0", "mid_block.resnets.0", "mid_block.attentions.0")
    block(f"decoder.{size}x{size}_middle1", "mid_block.resnets.1")
    return found


class Weights:
    """The tensors of a folder by our names, made one at a time.

    Attention's queries, keys and values, three linear layers there, are one convolution here,
    whose output channels are in the order of `golden.network.attend`.
    """

    def __init__(self, path, tensors, expected, a):
        self.path, self.tensors, self.sources, modules = path, tensors, {}, parameter_names(a)
        theirs = {}
        for name, shape in expected.items():
            module, _, part = name.rpartition(".")
            place = modules[module]
            if place.endswith((".qkv", ".proj")):
                stem, _, kind = place.rpartition(".")
                older = f"{stem}.{PROJ[1]}.weight" in tensors
                parts = QKV[older] if kind == "qkv" else (PROJ[older],)
                self.sources[name] = [f"{stem}.{each}.{part}" for each in parts]
                # Linear layers: (outputs, inputs), without the two sizes of the kernel.
                shape = (shape[0] // len(parts), *shape[1:2])
            else:
                self.sources[name] = [f"{place}.{part}"]
            theirs.update(dict.fromkeys(self.sources[name], shape))
        self.shapes = expected
        check_tensors(path, theirs, tensors)

    def __getitem__(self, name):
        parts = []
        for source in self.sources[name]:
            parts.append(pickled.value_of(self.tensors[source]))
            check_finite(self.path, source, parts[-1])
        if len(parts) == 1:
            return parts[0].reshape(self.shapes[name])
        # (channels, 3, ...): of each channel, which are in order of heads, the three.
        return torch.stack(parts, 1).reshape(self.shapes[name])


def model(folder):
    """(Precond, origin) of the UNet2DModel in `folder`.

    The origin is a dict of JSON values: the files that were read, the SHA-256 of the one with the
    weights, and whether the folder says which schedule the network was trained with.

    Raises ModelError if a file is missing or damaged, an option is not supported, or the tensors
    do not fit.
    """
    folder = pathlib.Path(folder)
    config, scheduler, weights = places(folder)
    a = architecture(config, read_json(config), schedule(scheduler))
    path = next((weights / name for name in WEIGHTS if (weights / name).is_file()), None)
    if path is None:
        raise ModelError(f"{weights}: must contain {' or '.join(WEIGHTS)}")
    data = pickled.read(path)
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path, data)
    else:
        tensors = pickled.state_dict(path, data)
    network = assemble(path, a, Weights(path, tensors, shapes(path, a), a))
    files = [str(each.relative_to(folder)) for each in (config, scheduler, path) if each]
    return network, {"kind": "diffusers folder", "path": folder.name, "files": files,
                     "classes": ["UNet2DModel"], "sha256": hashlib.sha256(data).hexdigest(),
                     "schedule": "scheduler's" if scheduler else "DDPM's, for want of one"}
