"""Sparsity traces: zero counts of every evaluation, layer and channel of a sampling run, in a file.

The file is described in ``docs/sparsity.md``.
"""

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import struct
import zipfile
import zlib

import numpy as np
import torch

from golden import detector
from golden.checkpoint import replace_file
from golden.quantized_network import evaluate, trajectory
from golden.requantizer import Format, check_vector, slots
from golden.sampler import Sampler, draw_noise, evaluations, sample

__all__ = ["KIND", "VERSION", "TraceError", "TraceLayer", "Trace", "fingerprint", "record",
           "rounds", "save", "load"]

KIND = "sqdm trace"
VERSION = 1
BATCH = 8                  # images that are sampled together, where not exact
FILE_LIMIT = 1 << 30       # bytes of all arrays of a file
HEADER_LIMIT = 1 << 22     # bytes of the header


class TraceError(ValueError):
    """A trace cannot be used; one line that names file, array and rule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceLayer:
    """Shape of a layer, and zeros of its input codes.

    Members
    -------
    name, format, segments, height, width, kernel : as in QuantizedLayer
    cout : output channels
    threshold : zeros / pixels, in units of 1/65536, from which a channel is sparse in the model
    zeros : (images, evaluations, Cin) uint16, pixels whose code is 0
    nonzeros : (evaluations, words, V + 1) uint32, how many pixels of all images have 0..V codes
        that are not 0, for each word of V slots in natural order
    calibration : (evaluations, Cin) uint16, the model's counts: a mean over calibration images

    The arrays are None for IN16, in which nothing is counted.
    """

    name: str
    format: Format
    segments: tuple
    cout: int
    height: int
    width: int
    kernel: int
    threshold: int
    zeros: np.ndarray = None
    nonzeros: np.ndarray = None
    calibration: np.ndarray = None

    @property
    def pixels(self):
        return self.height * self.width

    @property
    def channels(self):
        return sum(self.segments)

    @property
    def macs(self):
        """Of one image and evaluation, as in LayerShape: with the taps outside the image."""
        return self.kernel ** 2 * self.channels * self.cout * self.pixels

    @property
    def labelled(self):
        """Whether channels carry labels: A4, not MX8 or IN16."""
        return not self.format.mx

    @property
    def counted(self):
        """Whether the arrays are there."""
        return self.format != Format.IN16

    def fractions(self):
        """Share of zeros, (images, evaluations, Cin) float64."""
        return self.zeros / self.pixels

    def known(self, interval=1):
        """Counts that labels follow from, (images, evaluations, Cin) int64.

        Those of the last update before the evaluation; of evaluation 0, the calibration's.
        """
        count = self.zeros.shape[1]
        known = np.empty(self.zeros.shape, dtype=np.int64)
        known[:, 0] = self.calibration[0]
        updates = (np.arange(1, count) - 1) // interval * interval
        known[:, 1:] = self.zeros[:, updates]
        return known

    def labels(self, threshold=None, interval=1):
        """Which channels are sparse, (images, evaluations, Cin) bool; by default as in the model.

        `threshold` is in units of 1/65536, `interval` counts evaluations between updates.
        """
        threshold = self.threshold if threshold is None else threshold
        if not self.labelled:
            return np.zeros(self.zeros.shape, dtype=bool)
        return self.known(interval) * 65536 >= threshold * self.pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Zeros of the images of a sampling run.

    Members
    -------
    model : name or path of the model, for people
    fingerprint : of the model, see `fingerprint`
    seed : of the images, which are the first ones of it
    steps : Heun steps
    images : how many
    vector : V, of the words whose non-zeros are counted
    exact : whether the codes are those of the integer implementation at the states that the fast
        float definition leads to; else they are its own
    layers : dict of TraceLayer by name, in execution order
    """

    model: str
    fingerprint: str
    seed: int
    steps: int
    images: int
    vector: int
    exact: bool
    layers: dict

    @property
    def evaluations(self):
        return len(evaluations(self.steps))

    @property
    def labelled(self):
        """The layers whose channels carry labels, a list."""
        return [layer for layer in self.layers.values() if layer.labelled]

    def zero_fraction(self):
        """Share of the labelled layers' MACs whose activation code is 0."""
        total = sum(layer.macs for layer in self.labelled)
        return sum(layer.macs * float(layer.fractions().mean()) for layer in self.labelled) / total

    def check_model(self, model, *, seed=None, vector=None):
        """Raise TraceError unless the trace is of the QuantizedModel `model`, `seed` and V."""
        if self.fingerprint != fingerprint(model):
            raise TraceError(f"trace must be of this model, not of another one (its own was "
                             f"{self.model!r}): record it again")
        for name, wanted in (("seed", seed), ("vector", vector)):
            if wanted is not None and getattr(self, name) != wanted:
                raise TraceError(f"{name} of the trace must be {wanted}, "
                                 f"not {getattr(self, name)}: record it again")


def fingerprint(model):
    """SHA-256, in hexadecimal, of all that decides a QuantizedModel's codes: not thresholds.

    What is at its default or absent leaves no mark, so that new fields change nothing.
    """
    digest = hashlib.sha256(f"{KIND} {model.steps}".encode())
    for field in dataclasses.fields(model.architecture):
        value = getattr(model.architecture, field.name)
        if value != field.default:
            digest.update(f"{field.name} {value!r}".encode())
    for name, value in sorted(model.float_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().half().contiguous().numpy().tobytes())
    for name, item in model.layers.items():
        for field in dataclasses.fields(item):
            value = getattr(item, field.name)
            if field.name != "threshold" and value is not None:
                digest.update(f"{name} {field.name}".encode())
                digest.update(value.contiguous().numpy().tobytes()
                              if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


# Recording.

def record(model, *, label="model", images=1, seed=0, vector=16, exact=False, progress=None):
    """Trace of sampling `images` images of `seed` with the QuantizedModel `model`.

    Parameters
    ----------
    label : name of the model in the trace
    vector : V
    exact : replay every evaluation of every image in exact integers, 5 times slower or worse;
        images are then sampled one by one, as `sqdm simulate` does
    progress : callable, called without arguments after each evaluation of a batch (one image if
        exact), `rounds` times in all

    Raises TraceError if the model has no layer whose channels carry labels.
    """
    check_vector(vector)
    if not any(item.sparse_capable for item in model.layers.values()):
        raise TraceError(f"{label}: model must have layers in W4A4, whose zeros save work")
    noise = draw_noise(images, model.architecture, seed)
    layers = {}
    for name, item in model.layers.items():
        layer = TraceLayer(
            name=name, format=item.format, segments=tuple(item.segments),
            cout=len(item.weight_codes), height=item.height, width=item.width,
            kernel=item.kernel, threshold=item.threshold)
        if layer.counted:
            sizes = array_sizes(layer, images, model.steps, vector)
            layer = dataclasses.replace(
                layer, calibration=item.zeros.numpy().astype(np.uint16),
                zeros=np.zeros(*sizes["zeros"]), nonzeros=np.zeros(*sizes["nonzeros"]))
        layers[name] = layer
    def take(part, index, name, filled):
        layer = layers[name]
        order, size = slots(list(layer.segments), vector)
        layer.zeros[part, index] = layer.pixels - filled.sum((2, 3)).numpy()
        words = torch.zeros(len(filled), size, layer.pixels, dtype=torch.uint8)
        words[:, order] = filled.flatten(2).to(torch.uint8)
        counts = words.unflatten(1, (-1, vector)).sum(2)         # (N, words, pixels)
        for n, row in enumerate(counts.transpose(0, 1).flatten(1)):
            layer.nonzeros[index, n] += np.bincount(
                row.numpy(), minlength=vector + 1).astype(np.uint32)

    batch = 1 if exact else BATCH
    for first in range(0, images, batch):
        part = slice(first, first + batch)
        observe = replay if exact else watch
        observe(model, noise[part], vector, functools.partial(take, part), progress or (lambda: 0))
    return Trace(model=str(label), fingerprint=fingerprint(model), seed=seed, steps=model.steps,
                 images=images, vector=vector, exact=exact, layers=layers)


def rounds(model, images, exact=False):
    """How often `record` calls its `progress`."""
    return -(-images // (1 if exact else BATCH)) * len(evaluations(model.steps))


def watch(model, noise, vector, take, progress):
    """Sample from `noise`; `take` (evaluation, layer, (N, Cin, H, W) bool: is not 0)."""
    current = 0

    def begin(evaluation, x):
        nonlocal current
        current = evaluation.index

    def on_input(name, x):
        if model.layers[name].format != Format.IN16:
            take(current, name, x != 0)

    def evaluated(x, sigma):
        out = model(x, sigma, on_input=on_input)
        progress()
        return out

    sample(evaluated, noise, model.steps, begin, sampler=Sampler.for_model(model.float_model))


def replay(model, noise, vector, take, progress):
    """The same for one image, in exact integers at the states of the fast float definition."""
    _, states = trajectory(model, noise)
    state = model.detector(vector)

    def on_layer(call, result):
        item = model.layers[call.name]
        if item.format != Format.IN16:
            order, _ = slots(list(item.segments), vector)
            take(call.evaluation, call.name, result.codes.codes[order][None] != 0)

    for index, x in enumerate(states):
        evaluate(model, x, index, state, vector=vector, on_layer=on_layer)
        progress()


# Files.

FIELDS = {"name": str, "format": str, "segments": list, "cout": int, "height": int, "width": int,
          "kernel": int, "threshold": int}
HEAD = {"kind": str, "version": int, "model": str, "fingerprint": str, "seed": int, "steps": int,
        "images": int, "vector": int, "exact": bool, "layers": list}


def array_sizes(layer, images, steps, vector):
    """Shape and type of the arrays of a counted layer, a dict by member."""
    count = len(evaluations(steps))
    words = slots(list(layer.segments), vector)[1] // vector
    return {"zeros": ((images, count, layer.channels), np.uint16),
            "nonzeros": ((count, words, vector + 1), np.uint32),
            "calibration": ((count, layer.channels), np.uint16)}


def save(trace, path):
    """Write `trace` to the npz file `path`, whole or not at all; the same trace, the same bytes."""
    head = {"kind": KIND, "version": VERSION} | {
        name: getattr(trace, name) for name in HEAD if name not in ("kind", "version", "layers")}
    head["layers"] = [{name: getattr(layer, name) for name in FIELDS}
                      | {"format": layer.format.name, "segments": list(layer.segments)}
                      for layer in trace.layers.values()]
    arrays = {"header": np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)}
    for number, layer in enumerate(trace.layers.values()):
        if layer.counted:
            for name in array_sizes(layer, trace.images, trace.steps, trace.vector):
                arrays[f"{name}.{number}"] = getattr(layer, name)

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    replace_file(path, write)


def load(path):
    """Trace of a file that `save` wrote.

    Raises
    ------
    TraceError
        If the file is missing, damaged, of another kind or version, or too large, or if anything
        in it is missing, unknown, out of range, or contradicts the rest.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise TraceError(f"{path}: must be an existing trace file")

    def need(condition, text):
        if not condition:
            raise TraceError(f"{path}: {text}")

    try:
        with zipfile.ZipFile(path) as archive:
            need(len(archive.infolist()) <= 1 << 14, "must have at most 16384 arrays, "
                 f"not {len(archive.infolist())}")
            for info in archive.infolist():
                need(info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
                     f"array {info.filename!r} must be stored or deflated")
            return decode(need, archive)
    except TraceError:
        raise
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, OverflowError,
            RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TraceError(f"{path}: must be a whole npz file ({reason})") from None


def decode(need, archive):
    """The Trace in an open archive; `need` (condition, text) raises."""
    names = [info.filename for info in archive.infolist()]
    need(len(set(names)) == len(names), "must not have two arrays of one name")
    need("header.npy" in names, f'must be a "{KIND}", but it has no array header')
    info = archive.getinfo("header.npy")
    need(info.file_size <= HEADER_LIMIT, f"header must be at most {HEADER_LIMIT} bytes, "
         f"not {info.file_size}")
    text = read_array(need, archive, "header", (None,), np.uint8, HEADER_LIMIT)
    try:
        head = json.loads(str(text.tobytes(), "utf-8"))
    except (ValueError, RecursionError) as error:
        need(False, f"header must be JSON ({str(error).splitlines()[0]})")
    trace = decode_header(need, head)
    sizes = {f"{name}.{number}": size for number, layer in enumerate(trace.layers.values())
             if layer.counted
             for name, size in array_sizes(layer, trace.images, trace.steps, trace.vector).items()}
    total = sum(int(np.prod(shape, dtype=object)) * np.dtype(kind).itemsize
                for shape, kind in sizes.values())
    need(total <= FILE_LIMIT, f"arrays must be at most {FILE_LIMIT} bytes, not {total}")
    for name in names:
        need(name == "header.npy" or name.removesuffix(".npy") in sizes,
             f"array {name!r} must not be there")
    for number, layer in enumerate(trace.layers.values()):
        if layer.counted:
            arrays = {}
            for name in ("zeros", "nonzeros", "calibration"):
                shape, kind = sizes[f"{name}.{number}"]
                arrays[name] = read_array(need, archive, f"{name}.{number}", shape, kind)
            check_arrays(need, layer, trace, **arrays)
            trace.layers[layer.name] = dataclasses.replace(layer, **arrays)
    return trace


def read_array(need, archive, name, shape, kind, limit=None):
    """Array `name` of the archive, of exactly this shape and type; None stands for any size.

    Never reads more than `limit` bytes, by default what the shape takes.
    """
    need(f"{name}.npy" in archive.namelist(), f"array {name} is missing")
    kind = np.dtype(kind).newbyteorder("<")
    limit = limit or int(np.prod(shape)) * kind.itemsize
    with archive.open(f"{name}.npy") as file:
        data = io.BytesIO(file.read(limit + 4096))       # an npy header is 128 bytes here
        need(not file.read(1), f"array {name} must be at most {limit} bytes")
    try:
        need(np.lib.format.read_magic(data) == (1, 0), f"array {name} must be npy version 1.0")
        found, fortran, dtype = np.lib.format.read_array_header_1_0(data, max_header_size=4096)
    except TraceError:
        raise
    except Exception as error:   # of many types, by what numpy's parser meets
        need(False, f"array {name} must be in npy format ({(str(error).splitlines() or [''])[0]})")
    need(dtype == kind and not fortran, f"array {name} must be {kind.name} in C order, not {dtype}")
    need(len(found) == len(shape) and all(wanted in (None, size)
                                          for wanted, size in zip(shape, found)),
         f"array {name} must have shape {shape}, not {found}")
    rest = data.read()
    need(len(rest) == int(np.prod(found, dtype=object)) * kind.itemsize,
         f"array {name} must hold what its shape {found} says")
    return np.frombuffer(rest, dtype=kind).reshape(found)


def decode_header(need, head):
    """The Trace of a header, without arrays."""
    need(isinstance(head, dict) and head.get("kind") == KIND, f'header must be of a "{KIND}"')
    need(type(head.get("version")) is int and head["version"] == VERSION,
         f"version must be {VERSION}, not {head.get('version')!r}")
    check_fields(need, "header", head, HEAD)
    for name, low, high in (("seed", 0, (1 << 63) - 1), ("steps", 1, 1000), ("images", 1, 1 << 16)):
        need(low <= head[name] <= high, f"{name} must be in {low}..{high}, not {head[name]!r}")
    need(head["vector"] in (16, 32), f"vector must be 16 or 32, not {head['vector']!r}")
    need(len(head["fingerprint"]) == 64 and set(head["fingerprint"]) <= set("0123456789abcdef"),
         "fingerprint must be 64 hexadecimal digits")
    need(1 <= len(head["layers"]) <= 4096,
         f"layers must be 1 to 4096, not {len(head['layers'])}")
    layers = {}
    for number, table in enumerate(head["layers"]):
        where = f"layer {number}"
        need(isinstance(table, dict), f"{where} must be an object")
        check_fields(need, where, table, FIELDS)
        name = table["name"]
        need(1 <= len(name) <= 200 and name.isprintable() and name not in layers,
             f"name of {where} must be new, of 1 to 200 printable characters")
        need(table["format"] in Format.__members__, f"format of {where} must be one of "
             f"{', '.join(Format.__members__)}, not {table['format']!r}")
        need(1 <= len(table["segments"]) <= 2
             and all(type(size) is int and 1 <= size <= 1 << 15 for size in table["segments"]),
             f"segments of {where} must be one or two integers in 1..32768")
        for field, low, high in (("cout", 1, 1 << 15), ("height", 1, 65535), ("width", 1, 65535),
                                 ("threshold", 0, detector.NEVER)):
            need(low <= table[field] <= high,
                 f"{field} of {where} must be in {low}..{high}, not {table[field]!r}")
        need(table["height"] * table["width"] <= 65535,
             f"pixels of {where} must be at most 65535, "
             f"not {table['height'] * table['width']}")
        need(table["kernel"] in (1, 3), f"kernel of {where} must be 1 or 3, "
             f"not {table['kernel']!r}")
        layers[name] = TraceLayer(**table | {"format": Format[table["format"]],
                                             "segments": tuple(table["segments"])})
    fields = {name: head[name] for name in HEAD if name not in ("kind", "version", "layers")}
    return Trace(**fields, layers=layers)


def check_fields(need, where, table, fields):
    """Check that a dict has exactly these fields, of these types."""
    for name in table:
        need(name in fields, f"{where} must have known fields only, not {name!r}")
    for name, kind in fields.items():
        need(name in table, f"{where} must have the field {name!r}")
        need(type(table[name]) is kind,
             f"{name} of {where} must be of type {kind.__name__}, not {type(table[name]).__name__}")


def check_arrays(need, layer, trace, zeros, nonzeros, calibration):
    """Check that the arrays of a layer agree with each other."""
    name = layer.name
    for what, counts in (("zeros", zeros), ("calibration", calibration)):
        need(counts.max() <= layer.pixels,
             f"{what} of {name} must be at most {layer.pixels}, not {counts.max()}")
    need((nonzeros.sum(2, dtype=np.int64) == trace.images * layer.pixels).all(),
         f"nonzeros of {name} must count {trace.images * layer.pixels} pixels in every word")
    order, size = slots(list(layer.segments), trace.vector)
    left = np.zeros((trace.evaluations, size), dtype=np.int64)
    left[:, order.numpy()] = trace.images * layer.pixels - zeros.sum(0, dtype=np.int64)
    words = left.reshape(trace.evaluations, -1, trace.vector).sum(2)
    need((nonzeros.astype(np.int64) @ np.arange(trace.vector + 1) == words).all(),
         f"nonzeros of {name} must agree with its zeros")
