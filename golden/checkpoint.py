"""Float models as safetensors files: weights in half precision and a JSON record of origin."""

import json
import math
import os
import pathlib

import safetensors
import safetensors.torch
import torch

from golden.network import Architecture, Precond, build

KIND = "sqdm float model"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUANTIZED = "quantized."   # tensors of this prefix belong to golden's quantizer, not to the network


class ModelError(ValueError):
    """A model file cannot be used; one line that names file, tensor and rule."""


def save_model(path, model, record, tensors=None):
    """Write the weights of the Precond `model` in half precision, atomically.

    `record` is a dict of JSON values (recipe, data, steps, seed, loss, commit) and may not name
    ``kind`` or ``architecture``. `tensors` are further tensors, named with the prefix
    ``quantized.``, kept in their own types.

    Raises ModelError if a weight is not finite in half precision.
    """
    record = {"kind": KIND, **record,
              "architecture": json.loads(model.architecture.to_json())}
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = value.detach().to("cpu", torch.float16).contiguous()
        check_finite(path, name, weights[name])
    for name, value in (tensors or {}).items():
        if not name.startswith(QUANTIZED):
            raise ValueError(f'tensors must have names that start with "{QUANTIZED}", not {name!r}')
        weights[name] = value.contiguous()
    data = safetensors.torch.save(weights, {"sqdm": json.dumps(record)})
    replace_file(path, lambda temporary: temporary.write_bytes(data))


def replace_file(path, write):
    """Have `write` fill a temporary file beside `path`, then put it in the place of `path`."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write `text` in UTF-8, atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, value):
    """Write `value` as indented JSON with a final newline, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_finite(path, name, value):
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise ModelError(f"{path}: tensor {name} must be finite, not NaN or infinite")


def read_file(path):
    """(tensors, record) of a model file: all its tensors, and its JSON record as a dict.

    Raises ModelError if the file is missing, damaged or of another kind.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: must be an existing model file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: must be a whole safetensors file ({reason})") from None
    try:
        record = json.loads(metadata["sqdm"])
    except KeyError:
        raise ModelError(f'{path}: must be a "{KIND}", but its metadata has no record "sqdm"'
                         ) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f'{path}: metadata "sqdm" must be JSON ({error})') from None
    kind = record.get("kind") if isinstance(record, dict) else record
    if kind != KIND:
        raise ModelError(f'{path}: must be a "{KIND}", not {kind!r}')
    return tensors, record


def load_model(path):
    """(model, record) of a file written by `save_model`; the Precond is float32, in eval mode.

    Tensors with the prefix ``quantized.`` are left to their reader (`read_file`).

    Raises
    ------
    ModelError
        If the file is missing, damaged or of another kind, or if a tensor is missing, unknown, of
        the wrong shape or type, or not finite.
    """
    tensors, record = read_file(path)
    try:
        architecture = Architecture.from_json(json.dumps(record.get("architecture")))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None
    weights = {name: value for name, value in tensors.items() if not name.startswith(QUANTIZED)}
    check_tensors(path, shapes(path, architecture), weights)
    return assemble(path, architecture, weights), record


def shapes(path, architecture):
    """Shape of each tensor of a Precond of `architecture`, a dict by name, for the file `path`.

    Raises ModelError if there is no such network.
    """
    try:
        with torch.device("meta"):   # so that a hostile record costs no memory
            unet = build(architecture)
    except ValueError as error:
        raise ModelError(f"{path}: architecture must be that of a network ({error})") from None
    return {f"unet.{name}": tuple(value.shape) for name, value in unet.state_dict().items()}


def check_tensors(path, expected, tensors):
    """Raise ModelError unless `tensors`, by name, has floats in the shapes of `expected` alone."""
    for name, shape in expected.items():
        if name not in tensors:
            raise ModelError(f"{path}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shape:
            raise ModelError(f"{path}: tensor {name} must have shape {shape}, "
                             f"not {tuple(tensors[name].shape)}")
        if tensors[name].dtype not in FLOATS:
            raise ModelError(f"{path}: tensor {name} must be floating point, "
                             f"not {tensors[name].dtype}")
    for name in tensors:
        if name not in expected:
            shown = name[:120] if name.isprintable() else ascii(name[:120])
            raise ModelError(f"{path}: tensor {shown} must not be there: "
                             f"the architecture has no such tensor")


def assemble(path, architecture, weights):
    """The Precond of `architecture` with `weights`, tensors of its shapes, float32, in eval mode.

    `weights` may make each tensor when it is asked for. Raises ModelError if one is not finite,
    or if the noise levels are not.
    """
    model = Precond(architecture)
    if not 0 < model.sigma_min < model.sigma_max < math.inf:
        raise ModelError(f"{path}: noise levels of the schedule must rise from above 0 and stay "
                         f"finite, not {model.sigma_min!r} to {model.sigma_max!r}")
    for name, place in model.state_dict().items():
        value = weights[name].float()
        check_finite(path, name, value)
        place.copy_(value)
    return model.eval().requires_grad_(False)
