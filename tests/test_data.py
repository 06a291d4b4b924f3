"""The data readers on files in the original formats, which the tests write."""

import gzip
import hashlib
import pickle
import re
import struct

import numpy as np
import pytest
import torch

from golden import data

RANDOM = np.random.default_rng(0)
DIGITS = RANDOM.integers(0, 256, (6, 28, 28), dtype=np.uint8)
DIGIT_LABELS = np.array([3, 1, 4, 1, 5, 9], np.uint8)
PHOTOS = RANDOM.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
PHOTO_LABELS = np.arange(10, dtype=np.uint8)[::-1].copy()


def idx(array):
    """`array` in the idx format: two zeros, type 8, dimensions, big-endian sizes, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 did, as in the published CIFAR-10 batches."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        text = value.encode("latin1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(text)) + text)

    dispatch[str] = dispatch[bytes] = save_string


def write_batch(path, photos, labels, python2):
    batch = {"data": photos.reshape(-1, 3072), "labels": [int(label) for label in labels],
             "batch_label": "training batch 1 of 5", "filenames": ["a.png"] * len(photos)}
    with open(path, "wb") as file:
        (Python2Pickler(file, 2) if python2 else pickle.Pickler(file, 2)).dump(batch)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray",
                                               b"numpy.core.multiarray"))


def check_mnist(images):
    assert images.pixels.dtype == torch.uint8 and images.pixels.shape == (6, 1, 32, 32)
    assert np.array_equal(images.pixels[:, 0, 2:30, 2:30], DIGITS)
    assert images.pixels.sum() == int(DIGITS.sum())       # the border is zero
    assert images.labels.tolist() == DIGIT_LABELS.tolist()
    assert len(images) == 6


def check_cifar10(images, slices=slice(None)):
    assert np.array_equal(images.pixels, PHOTOS[slices])
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == PHOTO_LABELS[slices].tolist()


@pytest.mark.parametrize("place", [".", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_idx(tmp_path, place, packed):
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for stem in ("train", "t10k"):
        for name, array in (("images-idx3", DIGITS), ("labels-idx1", DIGIT_LABELS)):
            content = idx(array)
            if packed:
                (folder / f"{stem}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{stem}-{name}-ubyte").write_bytes(content)
    check_mnist(data.load("mnist", tmp_path, "train"))
    check_mnist(data.load("mnist", tmp_path, "test"))


def test_mnist_npz_in_the_folder_of_the_environment(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    np.savez_compressed(tmp_path / "mnist/mnist.npz", x_train=DIGITS, y_train=DIGIT_LABELS,
                        x_test=DIGITS[:2], y_test=DIGIT_LABELS[:2])
    monkeypatch.setenv("SQDM_DATA", str(tmp_path))
    check_mnist(data.load("mnist"))
    assert len(data.load("mnist", split="test")) == 2


def test_cifar10_binary_version(tmp_path):
    for n in range(5):
        records = [bytes([label]) + photo.tobytes()
                   for photo, label in zip(PHOTOS[2 * n:], PHOTO_LABELS[2 * n:2 * n + 2])]
        (tmp_path / f"data_batch_{n + 1}.bin").write_bytes(b"".join(records))
    (tmp_path / "test_batch.bin").write_bytes(bytes([PHOTO_LABELS[0]]) + PHOTOS[0].tobytes())
    check_cifar10(data.load("cifar10", tmp_path))
    check_cifar10(data.load("cifar10", tmp_path, "test"), slice(1))


@pytest.mark.parametrize("python2", [False, True])
def test_cifar10_python_version(tmp_path, python2):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for n in range(5):
        write_batch(folder / f"data_batch_{n + 1}", PHOTOS[2 * n:2 * n + 2],
                    PHOTO_LABELS[2 * n:2 * n + 2], python2)
    check_cifar10(data.load("cifar10", tmp_path))


def test_cifar10_packed(tmp_path):
    # The encoder of the packed files: differences along H, then W, and from green.
    planes = PHOTOS.transpose(1, 0, 2, 3).copy()
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    residual = np.diff(np.diff(planes, axis=-2, prepend=np.uint8(0)), axis=-1,
                       prepend=np.uint8(0))
    (tmp_path / "cifar10").mkdir()
    for name, part in (("train_a", slice(0, 4)), ("train_b", slice(4, 10)), ("test", slice(3))):
        np.savez_compressed(tmp_path / f"cifar10/{name}.npz", residual=residual[:, part],
                            labels=PHOTO_LABELS[part])
    check_cifar10(data.load("cifar10", tmp_path))
    check_cifar10(data.load("cifar10", tmp_path, "test"), slice(3))


def test_float_range_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = data.to_float(pixels)
    assert images.dtype == torch.float32 and images[0] == -1 and images[255] == 1
    assert torch.equal(data.to_pixels(images), pixels)
    assert data.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


class Evil:
    """Would run a command when unpickled freely."""

    def __reduce__(self):
        import os
        return os.system, ("echo unpickled > escaped",)


def test_pickle_that_calls_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(1, 6):
        (tmp_path / f"data_batch_{n}").write_bytes(pickle.dumps({"data": Evil()}))
    expect(tmp_path, "cifar10", "{}/data_batch_1: must be a batch of the python version of "
           "CIFAR-10 (UnpicklingError: posix.system is not admitted)")
    assert not (tmp_path / "escaped").exists()


def expect(folder, dataset, text, split="train"):
    with pytest.raises(data.DataError, match="^" + re.escape(text.format(folder)) + "$"):
        data.load(dataset, folder, split)


def test_missing_file_is_named(tmp_path):
    expect(tmp_path, "mnist", "mnist: file train-images-idx3-ubyte is missing in {} (get "
           "train-images-idx3-ubyte.gz and its three companions (torchvision's MNIST))")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/t10k-images-idx3-ubyte").write_bytes(idx(DIGITS))
    expect(tmp_path, "mnist", "mnist: file t10k-labels-idx1-ubyte is missing in {}/mnist (get "
           "train-images-idx3-ubyte.gz and its three companions (torchvision's MNIST))", "test")
    for n in (1, 2, 3, 5):
        (tmp_path / f"data_batch_{n}.bin").write_bytes(bytes(3073))
    expect(tmp_path, "cifar10", "cifar10: file data_batch_4.bin is missing in {} (get and unpack "
           "cifar-10-binary.tar.gz or cifar-10-python.tar.gz)")


def test_no_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("SQDM_DATA", raising=False)
    expect(None, "mnist", "data folder must be given by --data DIR or SQDM_DATA")
    expect(tmp_path / "no", "mnist", "data folder must be an existing folder, not '{}'")


@pytest.mark.parametrize("content, text", [
    (b"\0\0\x09\x01", r"an idx file of unsigned bytes, not one that starts with b'\x00\x00\t\x01'"),
    (b"\0\0\x08\x03\0\0", "a whole idx header, not 6 bytes"),
    (idx(DIGITS)[:-1], "4704 bytes of data, not 4703"),
    (idx(DIGITS[:, :20]), "uint8 of 28x28, not uint8 of shape (6, 20, 28)"),
    (gzip.compress(idx(DIGITS))[:-9], "a whole gzip file (Compressed file ended before the "),
])
def test_damaged_mnist(tmp_path, content, text):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(DIGIT_LABELS))
    with pytest.raises(data.DataError, match="^" + re.escape(
            f"{tmp_path}/train-images-idx3-ubyte: ") + "(images )?must (be|hold) "
            + re.escape(text) + r"[^\n]*$"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("labels, text", [
    (DIGIT_LABELS[:5], "labels must be 6 integers, not uint8 of shape (5,)"),
    (DIGIT_LABELS + 5, "labels must be in 0..9, not 6..14"),
])
def test_damaged_labels(tmp_path, labels, text):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(DIGITS))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    expect(tmp_path, "mnist", "{}/train-images-idx3-ubyte: " + text)


def test_damaged_npz(tmp_path):
    unreadable = r"^.*/mnist\.npz: must be a readable npz file \(.*\)$"
    (tmp_path / "mnist.npz").write_bytes(b"PK nothing")
    with pytest.raises(data.DataError, match=unreadable):
        data.load("mnist", tmp_path)
    np.savez(tmp_path / "mnist.npz", x_train=DIGITS)
    expect(tmp_path, "mnist", "{}/mnist.npz: array 'y_train is not a file in the archive' "
           "is missing")
    np.savez(tmp_path / "mnist.npz", x_train=np.array([Evil()], object), y_train=DIGIT_LABELS)
    with pytest.raises(data.DataError, match=unreadable):
        data.load("mnist", tmp_path)


def test_damaged_cifar10(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(bytes(3000))
    expect(tmp_path, "cifar10", "{}/test_batch.bin: must be a multiple of 3073 bytes long, "
           "not 3000 bytes", "test")
    (tmp_path / "test_batch.bin").unlink()
    write_batch(tmp_path / "test_batch", PHOTOS.astype(np.int16), PHOTO_LABELS, False)
    expect(tmp_path, "cifar10", "{}/test_batch: data must be uint8 of shape (N, 3072)", "test")


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match=r"^dataset must be one of mnist, cifar10, not 'svhn'$"):
        data.load("svhn", tmp_path)
    with pytest.raises(ValueError, match=r"^split must be one of train, test, not 'valid'$"):
        data.load("mnist", tmp_path, "valid")


@pytest.mark.data
def test_published_images(data_folder):
    digits = data.load("mnist", data_folder, "test")
    assert digits.pixels.shape == (10_000, 1, 32, 32)
    assert digits.labels[:5].tolist() == [7, 2, 1, 0, 4]
    photos = data.load("cifar10", data_folder, "test")
    assert photos.labels.bincount().tolist() == [1000] * 10
    raw = photos.pixels.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert hashlib.sha256(raw).hexdigest() == (
        "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04")
