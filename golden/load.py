"""Load a float model from whatever it is: shipped name, model file, EDM's files, diffusers' folder.

What a file is, its content decides, not its name. Other people's files are untrusted input: see
`pickled`.
"""

import hashlib
import json
import pathlib

from golden import diffusers_folder, edm, pickled
from golden.checkpoint import ModelError, load_model

__all__ = ["load", "models", "resolve", "shipped"]

ACCEPTED = ("a model file of sqdm, an EDM snapshot, a state dict (.safetensors or .pt) or a folder "
            "that diffusers saved")
HEADER_BYTES = 8 << 20       # of a safetensors file; a tensor takes some 100


def models():
    """Folder of the models that come with the package."""
    return pathlib.Path(__file__).parent / "models"


def shipped():
    """Names of the models that come with the package."""
    return sorted(path.stem for path in models().glob("*.safetensors"))


def resolve(source):
    """Path of a shipped name, or of an existing file or folder.

    Raises ModelError if there is neither.
    """
    if str(source) in shipped():
        return models() / f"{source}.safetensors"
    path = pathlib.Path(source)
    try:
        found = path.is_file() or path.is_dir()
    except (OSError, ValueError):     # a name too long, or with a null byte
        found = False
    if not found:
        raise ModelError(f"model must be one of {', '.join(shipped()) or '(none shipped)'} "
                         f"or an existing file or folder, not {str(source)!r}")
    return path


def load(source):
    """(Precond, record) of a shipped name, a file or a folder; float32, in eval mode.

    The record is a dict of JSON values. Its ``origin`` says what kind of thing the weights were
    read from, its name, its SHA-256 and the classes that it names.

    Raises
    ------
    ModelError
        If there is no such model, or it is damaged, hostile or not supported; one line that says
        what and where.
    """
    path = resolve(source)
    if path.is_dir():
        if not diffusers_folder.is_folder(path):
            raise ModelError(f"{path}: folder must have been saved by diffusers, with a "
                             f"{diffusers_folder.CONFIG} or {diffusers_folder.PIPELINE}")
        model, origin = diffusers_folder.model(path)
        return model, {"origin": origin}
    data = pickled.read(path)
    origin = {"path": path.name, "sha256": hashlib.sha256(data).hexdigest()}
    header = safetensors_header(data)
    if header is not None and "sqdm" in header:
        model, record = load_model(path)
        return model, {"origin": {"kind": "sqdm model file", **origin}, **record}
    if header is not None:
        tensors = diffusers_folder.read_safetensors(path, data)
    elif pickled.is_torch_file(data):
        tensors = pickled.state_dict(path, data)
    elif pickled.is_pickle(data):
        given, tensors, classes = edm.read_snapshot(path, data)
        model = edm.model(path, tensors, given)
        return model, {"origin": {"kind": "EDM snapshot", **origin, "classes": classes}}
    else:
        raise ModelError(f"{path}: must be {ACCEPTED}")
    model = edm.model(path, tensors, arguments(path))
    return model, {"origin": {"kind": "EDM state dict", **origin,
                              "classes": [edm.CLASS, edm.model_type(model)]}}


def safetensors_header(data):
    """The texts in the header of a safetensors file, a dict, or None if `data` is no such file."""
    length = int.from_bytes(data[:8], "little")
    if data[8:9] != b"{" or not 2 <= length <= min(len(data) - 8, HEADER_BYTES):
        return None
    try:
        header = json.loads(str(data[8:8 + length], "utf-8"))
    except (ValueError, RecursionError):
        return None
    metadata = header.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def arguments(path):
    """EDM's constructor arguments in the JSON file beside the state dict `path`."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise ModelError(f"{path}: state dict must have its network's constructor arguments beside "
                         f"it, in {beside.name}")
    given = diffusers_folder.read_json(beside)
    name = given.pop("class_name", edm.CLASS)
    if name != edm.CLASS:
        raise ModelError(f"{beside}: class_name must be {edm.CLASS}, not {pickled.short(name)}")
    try:
        edm.architecture(given)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{beside}: {error}") from None
    return given
