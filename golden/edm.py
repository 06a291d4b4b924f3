"""Networks of EDM's code: its names and constructor arguments for ours, and its snapshots.

A snapshot is the pickle of a dict whose entry ``ema`` is the network. Its modules are persistent
objects: source text, class name and attributes. The text is never compiled; class names and
attributes are data (see `pickled`).

Sources: Karras et al. 2022 (arXiv 2206.00364), table 7, and for names, arguments and the form of
snapshots the code published with it (github.com/NVlabs/edm: training/networks.py,
torch_utils/persistence.py), from which nothing is copied.
"""

import math

import torch

from golden import pickled
from golden.checkpoint import FLOATS, ModelError, assemble, check_finite, check_tensors, shapes
from golden.network import Architecture
from golden.pickled import Module, short

__all__ = ["architecture", "arguments", "export", "model", "model_type", "names",
           "read_snapshot"]

CLASS = "EDMPrecond"
VERSION = 6                  # of persistent objects
HEAD = 64                    # channels a head of DhariwalUNet's attention
DEPTH, MODULES = 16, 20_000  # of a network in a snapshot; the largest published has 1,200 modules

REQUIRED = ("img_resolution", "img_channels")
PRECOND = {"label_dim": 0, "use_fp16": False, "sigma_min": 0, "sigma_max": math.inf,
           "sigma_data": 0.5, "model_type": "DhariwalUNet"}
COMMON = {"augment_dim": 0, "channel_mult_emb": 4, "dropout": 0.1, "label_dropout": 0}
MODELS = {
    "SongUNet": {
        **COMMON, "model_channels": 128, "channel_mult": (1, 2, 2, 2), "num_blocks": 4,
        "attn_resolutions": (16,), "embedding_type": "positional", "channel_mult_noise": 1,
        "encoder_type": "standard", "decoder_type": "standard", "resample_filter": (1, 1)},
    "DhariwalUNet": {
        **COMMON, "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3,
        "attn_resolutions": (32, 16, 8)},
}
# Our fields for EDM's arguments; the other names agree.
FIELDS = {"img_resolution": "resolution", "attn_resolutions": "attention_resolutions",
          "channel_mult_emb": "embedding_mult", "channel_mult_noise": "noise_mult",
          "embedding_type": "embedding", "encoder_type": "encoder", "decoder_type": "decoder"}
# What EDM's classes fix.
FIXED = {
    "SongUNet": {"family": "song", "project_resampled": True},
    "DhariwalUNet": {"family": "dhariwal", "adaptive_norm": True, "channels_per_head": HEAD,
                     "norm_eps": 1e-5, "embedding_shift": 0, "cosine_first": True},
}
LAYERS = {"conv0": ("norm0", "conv0"), "conv1": ("norm1", "conv1"), "skip": (None, "skip"),
          "qkv": ("norm2", "qkv"), "proj": (None, "proj")}
OUTER = {"embed0": "map_layer0", "embed1": "map_layer1", "label": "map_label",
         "augment": "map_augment"}


def plain(name, value):
    """`value` of an argument, if it is a number, a text or a short list of numbers."""
    def simple(item):
        return isinstance(item, float) or isinstance(item, int) and abs(item) < 1 << 63

    if value is None or simple(value) or isinstance(value, str) and len(value) <= 64:
        return value
    if isinstance(value, (list, tuple)) and len(value) <= 64 and all(map(simple, value)):
        return tuple(value)
    raise TypeError(f"{name} must be a number, a text or a list of numbers, not {short(value)}")


def architecture(given):
    """The Architecture of EDMPrecond's constructor arguments `given`, a dict.

    Arguments that are left out have EDM's defaults. ``use_fp16`` and ``label_dropout`` do not
    matter to a network that is not trained further.

    Raises
    ------
    TypeError, ValueError
        If an argument is missing, unknown or has a value that is not supported; names it.
    """
    kind = given.get("model_type", PRECOND["model_type"])
    if not isinstance(kind, str) or kind not in MODELS:
        raise ValueError(f"model_type must be one of {', '.join(MODELS)}, not {short(kind)}")
    for name in given:
        if name not in (*REQUIRED, *PRECOND, *MODELS[kind]):
            raise ValueError(f"argument {short(name)} must not be there: {kind} has no such one")
    for name in REQUIRED:
        if name not in given:
            raise ValueError(f"argument {name} is missing")
    values = {**PRECOND, **MODELS[kind],
              **{name: plain(name, value) for name, value in given.items()}}
    if not isinstance(values["use_fp16"], bool):
        raise TypeError(f"use_fp16 must be a bool, not {values['use_fp16']!r}")
    for name, low, high in (("sigma_min", 0, 0.002), ("sigma_max", 80, math.inf),
                            ("label_dropout", 0, 1)):
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) \
                or not low <= value <= high:
            raise ValueError(f"{name} must be in {low}..{high}, not {value!r}")
    fields = {FIELDS.get(name, name): value for name, value in values.items()
              if name not in ("use_fp16", "sigma_min", "sigma_max", "label_dropout", "model_type")}
    try:
        return Architecture(activation="silu", middle_attention=True, **FIXED[kind], **fields)
    except (TypeError, ValueError) as error:
        raise pickled.renamed(error, FIELDS) from None


def arguments(a):
    """EDMPrecond's constructor arguments for the Architecture `a`, all of them, a dict.

    Raises ValueError if EDM's classes have no such network.
    """
    kinds = {fixed["family"]: kind for kind, fixed in FIXED.items()}
    if a.family not in kinds or a.prediction != "edm":
        raise ValueError(f"architecture must be one of EDM's, not of family {a.family} and "
                         f"prediction {a.prediction}")
    kind = kinds[a.family]
    found = {"img_resolution": a.resolution, "img_channels": a.img_channels,
             "label_dim": a.label_dim, "sigma_data": a.sigma_data, "model_type": kind}
    for name in MODELS[kind]:
        if name != "label_dropout":
            value = getattr(a, FIELDS.get(name, name))
            found[name] = list(value) if isinstance(value, tuple) else value
    for name, value in vars(architecture(found)).items():
        if getattr(a, name) != value:
            raise ValueError(f"{name} must be {value!r} in a {kind} of EDM, "
                             f"not {getattr(a, name)!r}")
    return found


def edm_name(a, name):
    """EDM's name, less "model.", of the tensor `name` of our UNet of Architecture `a`."""
    size = f"{a.resolution}x{a.resolution}"
    part, _, rest = name.partition(".")
    if part == "positional":
        return "map_noise.freqs"
    if part in OUTER:
        return f"{OUTER[part]}.{rest}"
    if part == "first":
        return f"enc.{size}_conv.{rest}"
    if part == "last":
        ends = (f"dec.{size}_aux_norm", f"dec.{size}_aux_conv") if a.family == "song" \
            else ("out_norm", "out_conv")
        return joined(ends, rest)
    block, _, rest = rest.partition(".")
    block = block.replace("_middle", "_in")
    stem = f"{'enc' if part == 'encoder' else 'dec'}.{block}"
    if block.endswith("_aux"):
        return joined((f"{stem}_norm", f"{stem}_conv"), rest)
    layer, _, tensor = rest.partition(".")
    if layer in LAYERS:
        norm, convolution = LAYERS[layer]
        return joined((f"{stem}.{norm}", f"{stem}.{convolution}"), tensor)
    return f"{stem}.{rest}"


def joined(places, tensor):
    """Name of a Layer's `tensor` in EDM, where norm and convolution are two modules, `places`."""
    if tensor.startswith("norm."):
        return f"{places[0]}.{tensor[len('norm.'):]}"
    return f"{places[1]}.{tensor}"


def names(unet):
    """EDM's name, less "model.", of each tensor of `unet`: a dict by our name."""
    return {name: edm_name(unet.architecture, name) for name in unet.state_dict()}


def filters(a):
    """Names, less "model.", of EDM's buffers with the resampling filter, and their value."""
    found = []
    for level in range(1, len(a.channel_mult)):
        low, high = a.resolution >> level, a.resolution >> level - 1
        for block in (f"enc.{low}x{low}_down", f"dec.{high}x{high}_up"):
            found += [f"{block}.conv0.resample_filter", f"{block}.skip.resample_filter"]
        if a.encoder != "standard":
            name = "down" if a.encoder == "skip" else "residual"
            found.append(f"enc.{low}x{low}_aux_{name}.resample_filter")
        if a.decoder == "skip":
            found.append(f"dec.{high}x{high}_aux_up.resample_filter")
    line = torch.tensor(a.resample_filter, dtype=torch.float32)
    return found, (torch.outer(line, line) / line.sum() ** 2)[None, None]


def export(precond):
    """State dict of the Precond `precond` under the names of EDMPrecond's."""
    found = {f"model.{edm_name(precond.architecture, name)}": value.detach().clone()
             for name, value in precond.unet.state_dict().items()}
    buffers, value = filters(precond.architecture)
    return {**found, **{f"model.{name}": value.clone() for name in buffers}}


class Weights:
    """Tensors of a file by our names, made one at a time; errors have the file's names."""

    def __init__(self, path, tensors, table):
        self.path, self.tensors, self.table = path, tensors, table

    def __getitem__(self, name):
        value = pickled.value_of(self.tensors[self.table[name]])
        check_finite(self.path, self.table[name], value)
        return value


def model(path, tensors, given):
    """The Precond with constructor arguments `given` and `tensors` under EDM's names.

    All names begin with "model.", as those of EDMPrecond do, or none, as those of its UNet.

    Raises ModelError if arguments or tensors do not fit.
    """
    try:
        a = architecture(given)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    expected = shapes(path, a)
    table = {name: prefix + edm_name(a, name.removeprefix("unet.")) for name in expected}
    buffers, taps = filters(a)
    rest = dict(tensors)
    for name in buffers:
        value = rest.pop(prefix + name, None)
        if value is None:
            continue
        if tuple(value.shape) != tuple(taps.shape):
            raise ModelError(f"{path}: tensor {prefix + name} must have shape "
                             f"{tuple(taps.shape)}, not {tuple(value.shape)}")
        if value.dtype not in FLOATS or not torch.allclose(
                pickled.value_of(value).float(), taps, rtol=1e-3):
            raise ModelError(f"{path}: tensor {prefix + name} must be that of resample_filter "
                             f"{list(a.resample_filter)}")
    check_tensors(path, {table[name]: shape for name, shape in expected.items()}, rest)
    return assemble(path, a, Weights(path, rest, table))


def model_type(network):
    """EDM's class name of the UNet in the Precond `network`."""
    return arguments(network.architecture)["model_type"]


def persistent(meta):
    """An object that torch_utils.persistence stored; its source text is dropped unread."""
    if not isinstance(meta, dict) or meta.get("type") != "class" \
            or not isinstance(meta.get("class_name"), str) \
            or not isinstance(meta.get("state"), dict):
        raise TypeError("a persistent object has a class name and a state")
    if meta.get("version") != VERSION:
        raise pickled.Refused(f"version of a persistent object must be {VERSION}, "
                              f"not {short(meta.get('version'))}")
    return Module(meta["class_name"], meta["state"])


# Names in a snapshot: persistent objects, containers, tensors and numpy's scalars.
SNAPSHOT = {
    **pickled.TENSORS,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
    ("dnnlib.util", "EasyDict"): pickled.mapping,
    ("torch.nn.modules.container", "ModuleDict"): lambda: Module("ModuleDict"),
    ("torch.nn.modules.container", "ModuleList"): lambda: Module("ModuleList"),
    ("torch.storage", "_load_from_bytes"): pickled.tensor_blob,
    ("numpy", "dtype"): pickled.number,
    ("numpy.core.multiarray", "scalar"): pickled.scalar,
    ("numpy._core.multiarray", "scalar"): pickled.scalar,
    ("builtins", "set"): pickled.items,
    ("__builtin__", "set"): pickled.items,
}


def read_snapshot(path, data):
    """(constructor arguments, tensors by EDM's names, class names) of the network ``ema``.

    `data` are the bytes of the file `path`. Raises ModelError if it is not a snapshot of an
    EDMPrecond, or names anything that a snapshot does not need.
    """
    snapshot = pickled.load(path, data, SNAPSHOT)
    net = snapshot.get("ema") if isinstance(snapshot, dict) else None
    if not isinstance(net, Module):
        raise ModelError(f'{path}: snapshot must be a dict with the network "ema"')
    if net.class_name != CLASS:
        raise ModelError(f"{path}: class of the network must be {CLASS}, "
                         f"not {short(net.class_name)}")
    given = net.get("_init_kwargs")
    positional = net.get("_init_args")
    if not isinstance(given, dict) or not isinstance(positional, (tuple, list)):
        raise ModelError(f"{path}: snapshot must have the arguments that made its {CLASS}")
    order = (*REQUIRED, *PRECOND)
    if len(positional) > len(order):
        raise ModelError(f"{path}: arguments by position must be at most {len(order)}, "
                         f"not {len(positional)}")
    tensors, classes = {}, set()
    collect(path, net, "", tensors, classes, [0])
    pickled.check_total(path, tensors, data)
    return {**dict(zip(order, positional)), **given}, tensors, sorted(classes)


def collect(path, module, prefix, tensors, classes, count):
    """Put parameters and buffers of `module` and the modules in it into `tensors` by name."""
    count[0] += 1
    if count[0] > MODULES or prefix.count(".") > DEPTH:
        raise ModelError(f"{path}: network must have at most {MODULES} modules, {DEPTH} deep")
    classes.add(short(module.class_name)[1:-1])
    for kind, member in (("_parameters", pickled.Tensor), ("_buffers", pickled.Tensor),
                         ("_modules", Module)):
        group = module.get(kind, {})
        if not isinstance(group, dict):
            raise ModelError(f"{path}: {kind} of a module must be a dict, not {short(group)}")
        for name, value in group.items():
            if value is None:
                continue
            if not isinstance(name, str) or not name.isprintable() or len(name) > 80:
                raise ModelError(f"{path}: name in {kind} must be a text, not {short(name)}")
            if not isinstance(value, member):
                raise ModelError(f"{path}: {prefix}{name} must be a "
                                 f"{member.__name__.lower()}, not {short(value)}")
            if member is Module:
                collect(path, value, f"{prefix}{name}.", tensors, classes, count)
            else:
                tensors[prefix + name] = value
