"""Training images: MNIST padded to 32x32, and CIFAR-10, from the files that people have of them."""

import dataclasses
import gzip
import io
import os
import pathlib
import pickle
import struct
import zipfile
import zlib

import numpy as np
import torch

DATASETS = ("mnist", "cifar10")
SPLITS = ("train", "test")
SOURCES = {
    "mnist": "get train-images-idx3-ubyte.gz and its three companions (torchvision's MNIST)",
    "cifar10": "get and unpack cifar-10-binary.tar.gz or cifar-10-python.tar.gz",
}


class DataError(ValueError):
    """A data file is missing or is not what its name says; one line, with what to do."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of one split.

    Members
    -------
    pixels : (N, C, 32, 32) uint8
    labels : (N,) int64, class numbers 0..9
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.pixels)


def to_float(pixels):
    """Pixels 0..255 (uint8) as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images):
    """Images in [-1, 1] as uint8, rounded to nearest and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def data_folder(folder=None):
    """`folder`, or else the folder named by the environment variable SQDM_DATA.

    Raises DataError if neither is given or it is no folder.
    """
    folder = folder or os.environ.get("SQDM_DATA")
    if not folder:
        raise DataError("data folder must be given by --data DIR or SQDM_DATA")
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise DataError(f"data folder must be an existing folder, not {str(path)!r}")
    return path


def load(dataset, folder=None, split="train"):
    """Images of `dataset` ("mnist" or "cifar10"), `split` "train" or "test".

    Looks in `folder` (or SQDM_DATA) and its usual subfolders for the original files (MNIST: idx,
    plain or .gz; CIFAR-10: the binary or the python version) and for the packed ``mnist.npz``,
    ``train_a.npz``, ``train_b.npz`` and ``test.npz``.

    Raises
    ------
    ValueError
        For an unknown data set or split.
    DataError
        If no complete set of files is there, or a file is damaged.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, not {dataset!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    folder = data_folder(folder)
    read = read_mnist if dataset == "mnist" else read_cifar10
    pixels, labels = read(folder, split)
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)),
                  torch.from_numpy(labels.astype(np.int64)))


def find(folder, subfolders, names):
    """The first subfolder of `folder` that holds all of `names`, as a list of paths, or None.

    Each entry of `names` is one name, or a tuple of alternatives.
    """
    for subfolder in subfolders:
        paths = []
        for choice in names:
            choices = (choice,) if isinstance(choice, str) else choice
            paths += [path for path in (folder / subfolder / name for name in choices)
                      if path.is_file()][:1]
        if len(paths) == len(names):
            return paths
    return None


def missing(dataset, folder, sets):
    """A DataError that names the first file that is not in `folder`, by the closest of `sets`."""
    def absent(subfolders, names):
        counts = []
        for subfolder in subfolders:
            gone = [name if isinstance(name, str) else name[0] for name in names
                    if find(folder, [subfolder], [name]) is None]
            counts.append((len(gone) / len(names), folder / subfolder, gone))
        return min(counts, key=lambda count: count[0])

    share, place, gone = min((absent(*item) for item in sets), key=lambda item: item[0])
    return DataError(f"{dataset}: file {gone[0]} is missing in {place} ({SOURCES[dataset]})")


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: must be readable ({error.strerror})") from None


# MNIST

def read_mnist(folder, split):
    """Pixels (N, 1, 32, 32) uint8, the border of 2 pixels zero, and labels (N,)."""
    subfolders = (".", "mnist", "MNIST/raw", "MNIST", "raw")
    stem = "train" if split == "train" else "t10k"
    idx = [(name, name + ".gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz")
           for name in (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")]
    packed = find(folder, subfolders, ["mnist.npz"])
    original = find(folder, subfolders, idx)
    if packed:
        suffix = "train" if split == "train" else "test"
        arrays = read_npz(packed[0], (f"x_{suffix}", f"y_{suffix}"))
        images, labels = arrays[f"x_{suffix}"], arrays[f"y_{suffix}"]
        path = packed[0]
    elif original:
        images, labels = read_idx(original[0]), read_idx(original[1])
        path = original[0]
    else:
        raise missing("mnist", folder, [(subfolders, idx)])
    if images.dtype != np.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{path}: images must be uint8 of 28x28, not {images.dtype} "
                        f"of shape {images.shape}")
    check_labels(path, labels, len(images))
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))[:, None], labels


def read_idx(path):
    """The array of an idx file of unsigned bytes, plain or gzip-compressed."""
    data = read_bytes(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: must be a whole gzip file ({error})") from None
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 4:
        raise DataError(f"{path}: must be an idx file of unsigned bytes, not one that starts "
                        f"with {data[:4]!r}")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise DataError(f"{path}: must hold a whole idx header, not {len(data)} bytes")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    count = int(np.prod(shape, dtype=object))
    if len(data) - header != count:
        raise DataError(f"{path}: must hold {count} bytes of data, not {len(data) - header}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_npz(path, names):
    """Arrays `names` of an npz file, never unpickling."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except KeyError as error:
        raise DataError(f"{path}: array {error} is missing") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: must be a readable npz file ({error})") from None


def check_labels(path, labels, count):
    if labels.ndim != 1 or len(labels) != count or labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be {count} integers, not {labels.dtype} "
                        f"of shape {labels.shape}")
    if count and not (0 <= labels.min() and labels.max() <= 9):
        raise DataError(f"{path}: labels must be in 0..9, not {labels.min()}..{labels.max()}")


# CIFAR-10

def read_cifar10(folder, split):
    """Pixels (N, 3, 32, 32) uint8 and labels (N,)."""
    train = split == "train"
    versions = (
        (("train_a.npz", "train_b.npz") if train else ("test.npz",), read_planes),
        (tuple(f"data_batch_{n}.bin" for n in range(1, 6)) if train else ("test_batch.bin",),
         read_records),
        (tuple(f"data_batch_{n}" for n in range(1, 6)) if train else ("test_batch",),
         read_batch),
    )
    subfolders = (".", "cifar10", "cifar-10-batches-bin", "cifar-10-batches-py",
                  "cifar10/cifar-10-batches-bin", "cifar10/cifar-10-batches-py")
    for names, read in versions:
        paths = find(folder, subfolders, names)
        if paths:
            parts = [read(path) for path in paths]
            for path, (pixels, labels) in zip(paths, parts):
                check_labels(path, labels, len(pixels))
            return tuple(np.concatenate(arrays) for arrays in zip(*parts))
    raise missing("cifar10", folder, [(subfolders, names) for names, _ in versions[1:]])


def read_planes(path):
    """Pixels and labels of a packed npz file.

    Its ``residual`` (3, N, 32, 32) holds differences along W and H, and red and blue less green,
    all modulo 256.
    """
    arrays = read_npz(path, ("residual", "labels"))
    residual = arrays["residual"]
    if residual.dtype != np.uint8 or residual.ndim != 4 or (
            residual.shape[0], *residual.shape[2:]) != (3, 32, 32):
        raise DataError(f"{path}: residual must be uint8 of shape (3, N, 32, 32), not "
                        f"{residual.dtype} of shape {residual.shape}")
    planes = np.cumsum(np.cumsum(residual, -1, dtype=np.uint8), -2, dtype=np.uint8)
    planes[0] += planes[1]
    planes[2] += planes[1]
    return planes.transpose(1, 0, 2, 3), arrays["labels"]


def read_records(path):
    """The binary version: records of a label byte and 3 planes of 32x32 bytes."""
    data = np.frombuffer(read_bytes(path), np.uint8)
    if not len(data) or len(data) % 3073:
        raise DataError(f"{path}: must be a multiple of 3073 bytes long, not {len(data)} bytes")
    records = data.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


class BatchUnpickler(pickle.Unpickler):
    """Admits what a CIFAR-10 batch needs: plain containers and the rebuilding of numpy arrays."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"),
                              ("numpy._core.multiarray", "_reconstruct")):
            return empty_array
        if (module, name) == ("_codecs", "encode"):   # bytes in pickle protocol 2
            return encode_latin1
        raise pickle.UnpicklingError(f"{module}.{name} is not admitted")


def empty_array(kind, shape, code):
    """The array that a pickle makes before it fills in shape, type and data."""
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError(f"an array of kind {kind!r} is not admitted")
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def encode_latin1(text, encoding="latin1"):
    """``codecs.encode`` for the one encoding that protocol 2 uses for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not admitted")
    return text.encode("latin1")


def read_batch(path):
    """The python version: a pickled dict with ``data`` (N, 3072) uint8 and ``labels``."""
    file = io.BytesIO(read_bytes(path))
    try:
        batch = BatchUnpickler(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value
                 for key, value in batch.items()}
        data, labels = batch["data"], np.array(batch["labels"])
    except Exception as error:    # a damaged pickle can raise anything
        raise DataError(f"{path}: must be a batch of the python version of CIFAR-10 "
                        f"({type(error).__name__}: {error})") from None
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or (
            data.shape[1] != 3072):
        raise DataError(f"{path}: data must be uint8 of shape (N, 3072)")
    return data.reshape(-1, 3, 32, 32), labels
