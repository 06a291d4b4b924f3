"""The reader of pickles and torch files against pickle and torch themselves, and hostile files."""

import collections
import io
import math
import os
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

from golden import edm, pickled
from golden.checkpoint import ModelError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "half": torch.randn(4, generator=torch.Generator().manual_seed(0)).half(),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "double": torch.tensor(math.pi, dtype=torch.float64),
    "int": torch.tensor([[-1, 2]]),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "part": torch.arange(100.0)[3:50:5],
    "none": torch.empty(0, 4),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


def saved(value, **form):
    file = io.BytesIO()
    torch.save(value, file, **form)
    return file.getvalue()


FORMS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_state_dict_as_torch_reads_it(form):
    data = saved(collections.OrderedDict(TENSORS), **form)
    expected = torch.load(io.BytesIO(data), weights_only=True)
    found = pickled.state_dict("x", data)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == tuple(value.shape)
        assert torch.equal(found[name].value(), value.detach()), name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_module_state(form):
    """What torch attaches to a module's state dict is dropped."""
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm2d(3)).state_dict()
    found = pickled.state_dict("x", saved(state, **form))
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: value.shape for name, value in found.items()}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_values_as_pickle_reads_them(protocol):
    shared = [1, 2.5]
    value = {"n": [0, 1, 255, 256, 65535, 65536, -1, -(1 << 31), 1 << 40, -(1 << 200)],
             "t": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "f": [math.inf, -0.0, 1e300],
             "s": ["", "a" * 300, "\u00e9\U0001f600"], "b": [True, False, None],
             "l": [shared, shared], "d": {2: 2, None: 3, True: 4, 0.5: 5}, "set": {1, "x"},
             "o": collections.OrderedDict(a=1)}
    if protocol >= 4:
        value["f2"] = frozenset({2})
    data = pickle.dumps(value, protocol)
    assert pickled.load("x", data, edm.SNAPSHOT) == pickle.loads(data)


@pytest.mark.parametrize("value", [
    np.float64(0.5), np.float32(-3), np.float16(2), np.int8(-1), np.int64(1 << 40), np.uint16(9),
    np.bool_(True)], ids=str)
@pytest.mark.parametrize("protocol", range(3, 6))
def test_numpy_scalars(value, protocol):
    found = pickled.load("x", pickle.dumps(value, protocol), edm.SNAPSHOT)
    assert found == value.item() and type(found) is type(value.item())


def refuses(data, message, calls=None):
    with pytest.raises(ModelError, match=f"^x: {message}$"):
        pickled.load("x", data, edm.SNAPSHOT if calls is None else calls)


def name(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


P = pickle.PROTO + b"\x04"
CALLABLES = ("os system", "posix system", "builtins eval", "builtins exec", "builtins getattr",
             "subprocess Popen", "torch load", "torch.hub load", "numpy load",
             "numpy.core.multiarray _reconstruct", "functools partial", "operator attrgetter",
             "pickle loads", "importlib import_module", "torch.storage UntypedStorage",
             "torch_utils.persistence exec", "golden.pickled short", "collections deque")


@pytest.mark.parametrize("callable", CALLABLES)
def test_unknown_name(callable):
    module, attribute = callable.split()
    text = re.escape(f"{module}.{attribute}")
    for data in (P + name(module, attribute) + pickle.STOP,
                 P + b"".join(pickle.SHORT_BINUNICODE + bytes([len(part)]) + part.encode()
                              for part in (module, attribute)) + pickle.STACK_GLOBAL):
        refuses(data, f"the pickle must not name {text}, which this reader does not know")


@pytest.mark.parametrize("data, message", [
    (b"", "the file must not end inside a pickle \\(at byte 0\\)"),
    (P + pickle.NONE, "the file must not end inside a pickle \\(at byte 3\\)"),
    (P + pickle.NONE + pickle.STOP + b"more",
     "the file must end after its pickle, not 4 bytes later"),
    (P + pickle.STOP, "the stack of a pickle must not be empty"),
    (P + pickle.MARK + pickle.STOP, "the stack of a pickle must not be empty"),
    (pickle.PROTO + b"\x00" + pickle.NONE + pickle.STOP,
     "protocol of a pickle must be in 2..5, not 0"),
    (P + pickle.INT + b"1\n.", "a pickle must not have opcode 0x49 \\(at byte 2\\)"),
    (P + pickle.NONE + pickle.PERSID + b"1\n.",
     "a pickle must not have opcode 0x50 \\(at byte 3\\)"),
    (P + pickle.NONE + pickle.BINPERSID, "a pickle must not have opcode 0x51 \\(at byte 3\\)"),
    (P + pickle.EXT1 + b"\x01", "a pickle must not have opcode 0x82 \\(at byte 2\\)"),
    (P + pickle.INST + b"os\nsystem\n", "a pickle must not have opcode 0x69 \\(at byte 2\\)"),
    (P + pickle.BINGET + b"\x05", "a pickle must not recall what it has not kept \\(5\\)"),
    (P + pickle.TUPLE, "a mark of a pickle must be there"),
    (P + pickle.NONE + pickle.APPENDS, "a mark of a pickle must be there"),
    (P + pickle.NONE + pickle.NONE + pickle.APPEND, "a pickle must not extend None"),
    (P + pickle.NONE + pickle.APPEND, "a pickle must not extend an empty stack"),
    (P + pickle.EMPTY_DICT + pickle.MARK + pickle.NONE + pickle.SETITEMS,
     "keys and values of a pickle must be in pairs"),
    (P + pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.NONE + pickle.SETITEM,
     "a key must be text or a number, not a tuple"),
    (P + pickle.EMPTY_SET + pickle.MARK + pickle.EMPTY_TUPLE + pickle.ADDITEMS,
     "an element of a set must be text or a number, not a tuple"),
    (P + pickle.NONE + pickle.EMPTY_TUPLE + pickle.REDUCE, "a pickle must call known names only"),
    (P + name("collections", "OrderedDict") + pickle.NONE + pickle.REDUCE,
     "a pickle must call known names only"),
    (P + name("collections", "OrderedDict") + pickle.NONE + pickle.TUPLE1 + pickle.REDUCE,
     "collections.OrderedDict must have the usual arguments"),
    (P + name("numpy._core.multiarray", "scalar") + pickle.NONE + pickle.NONE + pickle.TUPLE2
     + pickle.REDUCE, "numpy._core.multiarray.scalar must have the usual arguments"),
    (P + pickle.EMPTY_LIST + pickle.EMPTY_DICT + pickle.BUILD, "a pickle must not extend a list"),
    (P + name("dnnlib.util", "EasyDict") + pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.NONE
     + pickle.BUILD, "the state of an object must be a dict, not None"),
    (P + pickle.GLOBAL + b"a" * 300, "a name must be at most 200 bytes"),
    (P + pickle.NONE + pickle.NONE + pickle.STACK_GLOBAL, "a name must be text"),
    (P + pickle.SHORT_BINUNICODE + b"\x01\xff", "must be a whole file \\(UnicodeDecodeError\\)"),
])
def test_damaged_pickle(data, message):
    refuses(data, message)


def test_large_sizes_cost_nothing():
    """Sizes and indexes that would fill the memory if they were believed."""
    huge = struct.pack("<Q", 1 << 62)
    for opcode in (pickle.BINUNICODE8, pickle.BINBYTES8):
        with pytest.raises(ModelError):
            pickled.load("x", P + opcode + huge, {})
    value = pickled.load("x", P + pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff"
                         + pickle.STOP, {})
    assert value is None


def test_many_opcodes(monkeypatch):
    monkeypatch.setattr(pickled, "OPCODES", 1000)
    refuses(P + pickle.EMPTY_LIST * 1000, "a pickle must have at most 1000 opcodes")


def test_long_texts():
    text = b"a" * (6 << 20)
    piece = pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    refuses(P + 3 * piece, "texts of a pickle must be at most 16777216 bytes in all")


def doubled(levels):
    """A tuple of two times the same, nested: of 2 to the power of `levels` parts when walked."""
    return P + pickle.EMPTY_TUPLE + b"".join(
        pickle.BINPUT + bytes([n]) + pickle.BINGET + bytes([n]) + pickle.TUPLE2
        for n in range(levels))


def test_shared_parts():
    """Neither hashed nor printed, either of which would take for ever."""
    data = doubled(100)
    assert pickled.load("x", data + pickle.STOP, {})
    refuses(P + pickle.EMPTY_DICT + data[2:] + pickle.NONE + pickle.SETITEM,
            "a key must be text or a number, not a tuple")
    refuses(data + pickle.NONE + pickle.APPEND, "a pickle must not extend a tuple")
    with pytest.raises(ModelError, match="^x: must hold a dict of tensors, not a tuple$"):
        pickled.state_dict("x", zipped(data + pickle.STOP))


def zipped(program, storages=(), compression=zipfile.ZIP_STORED, **parts):
    """A file of torch's newer format with the pickle `program`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        for key, data in dict(storages).items():
            archive.writestr(f"archive/data/{key}", data)
        for key, data in parts.items():
            archive.writestr(f"archive/{key}", data)
    return file.getvalue()


def tensor_program(*, kind="FloatStorage", key="0", count=4, offset=0, shape=(4,), stride=(1,)):
    """A pickle of one tensor, {"w": tensor}, as torch.save writes it but with any numbers."""
    def number(value):
        width = (value.bit_length() + 8) // 8
        return pickle.LONG1 + bytes([width]) + value.to_bytes(width, "little", signed=True)

    def text(value):
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    def numbers(values):
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    identity = (pickle.MARK + text("storage") + name("torch", kind) + text(key) + text("cpu")
                + number(count) + pickle.TUPLE + pickle.BINPERSID)
    return (pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + text("w")
            + name("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + identity + number(offset)
            + numbers(shape) + numbers(stride) + pickle.NEWFALSE + name("collections",
                                                                        "OrderedDict")
            + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE + pickle.SETITEM
            + pickle.STOP)


def test_written_by_hand():
    data = zipped(tensor_program(), {"0": np.arange(4, dtype="f4").tobytes()}, version=b"3\n")
    assert pickled.state_dict("x", data)["w"].value().tolist() == [0, 1, 2, 3]
    assert torch.load(io.BytesIO(data), weights_only=True)["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("change, message", [
    ({"kind": "QInt8Storage"}, ("the pickle must not name torch.QInt8Storage, which this reader "
                               "does not know")),
    ({"key": "1"}, "storage '1' must be in the file"),
    ({"key": "../data.pkl"}, "storage '../data.pkl' must be in the file"),
    ({"count": 5}, "storage '0' must have 5 elements of torch.float32"),
    ({"count": -1}, "a storage must have a key and a size"),
    ({"kind": "DoubleStorage"}, "storage '0' must have 4 elements of torch.float64"),
    ({"offset": 1}, "a tensor must lie in its storage of 4 elements"),
    ({"offset": -1}, "torch._utils._rebuild_tensor_v2 must have the usual arguments"),
    ({"shape": (5,)}, "a tensor must lie in its storage of 4 elements"),
    ({"shape": (1 << 40,), "stride": (0,)}, "a tensor must lie in its storage of 4 elements"),
    ({"shape": (4, 4), "stride": (0, 0)}, "a tensor must lie in its storage of 4 elements"),
    ({"shape": (2,), "stride": (4,)}, "a tensor must lie in its storage of 4 elements"),
    ({"stride": (-1,)}, "torch._utils._rebuild_tensor_v2 must have the usual arguments"),
    ({"stride": (1, 1)}, "torch._utils._rebuild_tensor_v2 must have the usual arguments"),
    ({"shape": (1,) * 9, "stride": (1,) * 9},
     "torch._utils._rebuild_tensor_v2 must have the usual arguments"),
])
def test_hostile_tensor(change, message):
    data = zipped(tensor_program(**change), {"0": bytes(16)})
    with pytest.raises(ModelError, match=f"^x: {re.escape(message)}$"):
        pickled.state_dict("x", data)


@pytest.mark.parametrize("data, message", [
    (zipped(pickle.dumps({"w": 1}, 2)), "'w' must be a tensor with a name, not 1"),
    (zipped(pickle.dumps({}, 2)), "must hold a dict of tensors, not a dict"),
    (zipped(pickle.dumps([1], 2)), "must hold a dict of tensors, not a list"),
    (zipped(tensor_program(), {"0": bytes(16)}, compression=zipfile.ZIP_DEFLATED),
     "a torch file must not be compressed"),
    (zipped(tensor_program(), {"0": bytes(16)}, byteorder=b"big"),
     "a torch file must be little-endian"),
    (zipped(tensor_program(), {"0": bytes(16), "x/data.pkl": b""}),
     "a torch file must have one data.pkl"),
    (zipped(pickle.PROTO + b"\x02" + name("os", "system") + pickle.STOP),
     "the pickle must not name os.system, which this reader does not know"),
    (zipped(pickle.PROTO + b"\x02" + name("torch", "FloatStorage") + pickle.EMPTY_TUPLE
            + pickle.REDUCE + pickle.STOP), "torch.FloatStorage must have the usual arguments"),
    (pickled.LEGACY, f"the file must not end inside a pickle (at byte {len(pickled.LEGACY)})"),
    (pickled.LEGACY + pickle.dumps(1000, 2), "a torch file must be of version 1001, not 1000"),
    (pickled.LEGACY + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": False}, 2)
     + 2 * pickle.dumps([], 2), "a torch file must be little-endian"),
    (b"PK\x05\x06", "a torch file must begin with torch's magic number or as a zip archive"),
])
def test_damaged_torch_file(data, message):
    with pytest.raises(ModelError, match=f"^x: {re.escape(message)}$"):
        pickled.state_dict("x", data)


def test_flipped_bit_in_a_zip_archive_is_noticed():
    data = zipped(tensor_program(), {"0": b"numbers, sixteen"})
    damaged = data.replace(b"numbers, sixteen", b"numbers, seventy")
    with pytest.raises(ModelError, match=r"^x: a torch file must be a whole zip archive \(Bad CRC"):
        pickled.state_dict("x", damaged)


def test_overlapping_parts():
    """Many entries of one archive over the same bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
        archive.filelist += archive.filelist * 99
    with pytest.raises(ModelError, match="^x: the parts of a torch file must not be larger"):
        pickled.state_dict("x", file.getvalue())


def test_file_size(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(bytes(11))
    assert pickled.read(path) == bytes(11)
    monkeypatch.setattr(pickled, "FILE_BYTES", 10)
    with pytest.raises(ModelError, match=f"^{path}: must be at most 10 bytes$"):
        pickled.read(path)
    with pytest.raises(ModelError, match=f"^{tmp_path}: must be an existing file$"):
        pickled.read(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ModelError, match="fifo: must be an existing file$"):
        pickled.read(tmp_path / "fifo")
