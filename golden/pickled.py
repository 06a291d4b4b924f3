"""Pickles and torch files read as data: nothing they name is imported, called or executed.

A pickle is a program for a small stack machine. This reader runs the part of it that only builds
values (protocols 2 to 5; Python's pickletools describes the opcodes) and hands every call that a
pickle asks for to a function of ours, chosen from a table by the name that the pickle gives.
A name that the table lacks ends the reading. Tensors are views of the file's bytes until
`Tensor.value` is called, so that sizes can be checked before memory is spent.

Sources: CPython's Lib/pickletools.py; torch/serialization.py for both file formats of torch.save;
torch/_utils.py and torch/storage.py for what a pickled tensor consists of.
"""

import dataclasses
import io
import math
import pickle
import struct
import zipfile
import zlib

import torch

from golden.checkpoint import ModelError

__all__ = ["Module", "Tensor", "TENSORS", "is_torch_file", "is_pickle", "load", "read", "renamed",
           "short", "state_dict", "value_of"]

# The largest published EDM network (imagenet64) takes 1.2 GB in float32.
FILE_BYTES = 4 << 30
TEXT_BYTES = 16 << 20       # of all texts of a pickle; embedded source is the longest
OPCODES = 500_000           # of one pickle, each at most some 200 bytes of memory; that network
                            # takes 50,000
ENTRIES = 100_000           # of a zip archive
MAGIC = 0x1950a86a20f9469cfc6c        # first pickle of torch's older file format
LEGACY = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."
LEGACY_VERSION = 1001
ZIP = b"PK\x03\x04"
DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16,
          "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
          "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
          "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q",
           "u1": "B", "u2": "H", "u4": "I", "u8": "Q", "b1": "?"}   # numpy's codes to struct's


class Refused(Exception):
    """What is wrong, without the file's name, which `guarded` puts in front."""


def short(value):
    """`value` for an error message: one line of at most 60 characters, whatever it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value) if not isinstance(value, str) else repr(value[:60])
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"a {type(value).__name__}"


def renamed(error, names):
    """`error`, whose text begins with the name of a field, with the file's name for that field.

    `names` maps the file's names to the fields.
    """
    text = str(error)
    for name, field in names.items():
        if text.startswith(f"{field} "):
            return type(error)(name + text[len(field):])
    return error


@dataclasses.dataclass(frozen=True)
class Name:
    """A module and a name in it, as the pickle gives them; it stands for no Python object."""

    module: str
    name: str

    def __str__(self):
        return short(f"{self.module}.{self.name}")[1:-1]


class Mapping(dict):
    """A dict of one of the classes that a table admits as such."""


class Module(dict):
    """The attributes of an object of a class that is known by name only.

    Members
    -------
    class_name : as the pickle gives it
    """

    def __init__(self, class_name, state=()):
        super().__init__(state)
        self.class_name = class_name


class Number:
    """numpy's description of a scalar."""

    def __init__(self, code):
        self.format, self.order = NUMBERS[code], "="


class Storage:
    """A run of numbers in the file: `data` is a buffer of `count` elements of `dtype`."""

    def __init__(self, dtype, count, data=None):
        self.dtype, self.count, self.data = dtype, count, data


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that still lies in the file."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple

    @property
    def dtype(self):
        return self.storage.dtype

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def value(self):
        """A torch tensor of its own memory."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        size = self.dtype.itemsize
        reach = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        data = self.storage.data[self.offset * size:(self.offset + reach) * size]
        flat = torch.frombuffer(bytearray(data), dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


def is_count(value):
    return type(value) is int and 0 <= value < 1 << 48


class Machine:
    """The stack machine over `data`, from byte `at` on.

    Parameters
    ----------
    calls : dict from (module, name) to a function of the arguments, for REDUCE and NEWOBJ
    storage : function of a persistent id (a tuple), or None where there can be none
    """

    def __init__(self, data, at, calls, storage):
        self.data, self.at, self.calls, self.storage = data, at, calls, storage
        self.stack, self.marks, self.memo, self.text_bytes = [], [], {}, 0

    def take(self, count):
        if count > len(self.data) - self.at:
            raise Refused(f"the file must not end inside a pickle (at byte {len(self.data)})")
        piece = self.data[self.at:self.at + count]
        self.at += count
        return piece

    def size(self, count):
        return int.from_bytes(self.take(count), "little")

    def text(self, length):
        self.text_bytes += length
        if self.text_bytes > TEXT_BYTES:
            raise Refused(f"texts of a pickle must be at most {TEXT_BYTES} bytes in all")
        return str(self.take(length), "utf-8")

    def line(self):
        """ASCII up to a line feed, which only names use."""
        window = bytes(self.data[self.at:self.at + 200])
        end = window.find(b"\n")
        if end < 0:
            raise Refused("a name must be at most 200 bytes")
        self.at += end + 1
        return str(window[:end], "ascii")

    def pop(self):
        if not self.stack or self.marks and len(self.stack) <= self.marks[-1]:
            raise Refused("the stack of a pickle must not be empty")
        return self.stack.pop()

    def top(self, kind):
        if not self.stack or not isinstance(self.stack[-1], kind):
            what = short(self.stack[-1]) if self.stack else "an empty stack"
            raise Refused(f"a pickle must not extend {what}")
        return self.stack[-1]

    def since_mark(self):
        if not self.marks:
            raise Refused("a mark of a pickle must be there")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def remember(self, index):
        if not self.stack:
            raise Refused("the stack of a pickle must not be empty")
        self.memo[index] = self.stack[-1]

    def recall(self, index):
        if index not in self.memo:
            raise Refused(f"a pickle must not recall what it has not kept ({index})")
        self.stack.append(self.memo[index])

    def update(self, items):
        if len(items) % 2:
            raise Refused("keys and values of a pickle must be in pairs")
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2]):
            # Tuples may share parts, so that hashing one can take for ever.
            if not isinstance(key, (str, int, float, bool)) and key is not None:
                raise Refused(f"a key must be text or a number, not {short(key)}")
            target[key] = value

    def collect(self, kind, items):
        for item in items:
            if not isinstance(item, (str, int, float, bool)) and item is not None:
                raise Refused(f"an element of a set must be text or a number, not {short(item)}")
        return kind(items)

    def name(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("a name must be text")
        if (module, name) not in self.calls:
            raise Refused(f"the pickle must not name {Name(module, name)}, "
                          f"which this reader does not know")
        self.stack.append(Name(module, name))

    def call(self):
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Refused("a pickle must call known names only")
        try:
            self.stack.append(self.calls[function.module, function.name](*arguments))
        except (TypeError, KeyError, ValueError, OverflowError, struct.error):
            raise Refused(f"{function} must have the usual arguments") from None

    def build(self):
        state = self.pop()
        target = self.top((Module, Mapping, Number))
        if isinstance(target, Number):
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
                raise Refused("numpy.dtype must be little-endian")
            target.order = "<"
        elif not isinstance(state, dict):
            raise Refused(f"the state of an object must be a dict, not {short(state)}")
        elif isinstance(target, Module):
            target.update(state)

    def run(self):
        """The value on the stack when the pickle stops; `at` is then the byte after it."""
        push = self.stack.append
        for _ in range(OPCODES):
            where = self.at
            op = bytes(self.take(1))
            if op == pickle.STOP:
                return self.pop()
            elif op in (pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT):
                self.remember(len(self.memo) if op == pickle.MEMOIZE
                              else self.size(1 if op == pickle.BINPUT else 4))
            elif op in (pickle.BINGET, pickle.LONG_BINGET):
                self.recall(self.size(1 if op == pickle.BINGET else 4))
            elif op in WIDTHS:
                kind, width = WIDTHS[op]
                push(self.text(self.size(width)) if kind is str else self.take(self.size(width)))
            elif op in VALUES:
                push(VALUES[op])
            elif op in INTEGERS:
                width, signed = INTEGERS[op]
                push(int.from_bytes(self.take(width), "little", signed=signed))
            elif op == pickle.LONG1:
                push(int.from_bytes(self.take(self.size(1)), "little", signed=True))
            elif op == pickle.BINFLOAT:
                push(struct.unpack(">d", self.take(8))[0])
            elif op == pickle.PROTO:
                version = self.size(1)
                if version not in range(2, 6):
                    raise Refused(f"protocol of a pickle must be in 2..5, not {version}")
            elif op == pickle.FRAME:
                self.take(8)
            elif op == pickle.MARK:
                self.marks.append(len(self.stack))
            elif op == pickle.EMPTY_DICT:
                push({})
            elif op == pickle.EMPTY_LIST:
                push([])
            elif op == pickle.EMPTY_SET:
                push(set())
            elif op == pickle.TUPLE:
                push(tuple(self.since_mark()))
            elif op in TUPLES:
                push(tuple(reversed([self.pop() for _ in range(TUPLES[op])])))
            elif op == pickle.APPEND:
                item = self.pop()
                self.top(list).append(item)
            elif op == pickle.APPENDS:
                items = self.since_mark()
                self.top(list).extend(items)
            elif op == pickle.SETITEM:
                value, key = self.pop(), self.pop()
                self.update([key, value])
            elif op == pickle.SETITEMS:
                self.update(self.since_mark())
            elif op == pickle.ADDITEMS:
                items = self.collect(set, self.since_mark())
                self.top(set).update(items)
            elif op == pickle.FROZENSET:
                push(self.collect(frozenset, self.since_mark()))
            elif op == pickle.GLOBAL:
                self.name(self.line(), self.line())
            elif op == pickle.STACK_GLOBAL:
                name, module = self.pop(), self.pop()
                self.name(module, name)
            elif op in (pickle.REDUCE, pickle.NEWOBJ):
                self.call()
            elif op == pickle.BUILD:
                self.build()
            elif op == pickle.BINPERSID and self.storage is not None:
                push(self.storage(self.pop()))
            else:
                raise Refused(f"a pickle must not have opcode 0x{op.hex()} (at byte {where})")
        raise Refused(f"a pickle must have at most {OPCODES} opcodes")


WIDTHS = {pickle.SHORT_BINUNICODE: (str, 1), pickle.BINUNICODE: (str, 4),
          pickle.BINUNICODE8: (str, 8), pickle.SHORT_BINBYTES: (bytes, 1),
          pickle.BINBYTES: (bytes, 4), pickle.BINBYTES8: (bytes, 8)}
VALUES = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False, pickle.EMPTY_TUPLE: ()}
INTEGERS = {pickle.BININT: (4, True), pickle.BININT1: (1, False), pickle.BININT2: (2, False)}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


def mapping():
    return Mapping()


def items(values=()):
    if not isinstance(values, list):
        raise TypeError("a set is made from a list")
    if any(not isinstance(value, (str, int, float, bool)) for value in values):
        raise TypeError("a set has texts and numbers")
    return set(values)


def number(code, align, copy):
    return Number(code)


def scalar(kind, data):
    if not isinstance(kind, Number):
        raise TypeError("a scalar has a type")
    return struct.unpack(kind.order + kind.format, data)[0]


def tensor(storage, offset, shape, stride, requires_grad, hooks, metadata=None):
    if not isinstance(storage, Storage) or not is_count(offset):
        raise TypeError("a tensor needs a storage")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride) \
            or len(shape) > 8 or not all(map(is_count, shape + stride)):
        raise TypeError("shape and stride are tuples of sizes")
    count = math.prod(shape)
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(shape, stride))
    if count > storage.count or count and reach > storage.count:
        raise Refused(f"a tensor must lie in its storage of {storage.count} elements")
    return Tensor(storage, offset, shape, stride)


def parameter(data, requires_grad, hooks):
    if not isinstance(data, Tensor):
        raise TypeError("a parameter is a tensor")
    return data


# Names in a state dict that torch.save wrote.
TENSORS = {
    ("collections", "OrderedDict"): mapping,
    ("torch._utils", "_rebuild_tensor_v2"): tensor,
    ("torch._utils", "_rebuild_parameter"): parameter,
}


def storage_names():
    """Names of torch's storage types; a persistent id contains one, and nothing may call it."""

    def refuse(*arguments):
        raise TypeError("a storage is not made by a call")

    return {("torch", name): refuse for name in DTYPES}


def stored(identity, older):
    """(dtype, key, element count) of a persistent id of torch's files."""
    fields = 6 if older else 5
    if not isinstance(identity, tuple) or len(identity) != fields or identity[0] != "storage":
        raise Refused("a persistent id must be that of a storage")
    _, kind, key, _, count = identity[:5]
    if not isinstance(kind, Name) or kind.name not in DTYPES:
        raise Refused(f"the type of a storage must be one of {', '.join(DTYPES)}")
    if not isinstance(key, str) or not is_count(count) or older and identity[5] is not None:
        raise Refused("a storage must have a key and a size")
    return DTYPES[kind.name], key, count


def legacy(data):
    """The value in the older format of torch.save: pickles one after the other, then numbers."""
    found = {}

    def storage(identity):
        dtype, key, count = stored(identity, older=True)
        known = found.setdefault(key, Storage(dtype, count))
        if known.dtype != dtype or known.count != count:
            raise Refused(f"storage {short(key)} must be of one type and size")
        return known

    at, values = 0, []
    for n in range(5):
        machine = Machine(data, at, TENSORS | storage_names() if n == 3 else {},
                          storage if n == 3 else None)
        values.append(machine.run())
        at = machine.at
        if n == 0 and values[0] != MAGIC or n == 1 and values[1] != LEGACY_VERSION:
            raise Refused(f"a torch file must be of version {LEGACY_VERSION}, "
                          f"not {short(values[-1])}")
        if n == 2 and (not isinstance(values[2], dict)
                       or values[2].get("little_endian") is not True):
            raise Refused("a torch file must be little-endian")
    keys = values[4]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) \
            or sorted(keys) != sorted(found):
        raise Refused("a torch file must list its storages")
    for key in keys:
        item = found[key]
        if int.from_bytes(data[at:at + 8], "little") != item.count:
            raise Refused(f"storage {short(key)} must have {item.count} elements")
        at += 8
        end = at + item.count * item.dtype.itemsize
        if end > len(data):
            raise Refused(f"storage {short(key)} must not end after the file")
        item.data, at = data[at:end], end
    return values[3]


def zipped(data):
    """The value in the format that torch.save writes since 1.6: a zip archive, uncompressed."""
    data = bytes(data)
    if data.count(b"PK\x01\x02") > ENTRIES:     # signature of an entry in the archive's directory
        raise Refused(f"a torch file must have at most {ENTRIES} parts")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise Refused("a torch file must not be compressed")
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise Refused("the parts of a torch file must not be larger than the file")
        roots = [name[:-len("data.pkl")] for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused("a torch file must have one data.pkl")
        root, found = roots[0], {}
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise Refused("a torch file must be little-endian")

        def storage(identity):
            dtype, key, count = stored(identity, older=False)
            name = f"{root}data/{key}"
            if name not in entries:
                raise Refused(f"storage {short(key)} must be in the file")
            if entries[name].file_size != count * dtype.itemsize:
                raise Refused(f"storage {short(key)} must have {count} elements of {dtype}")
            if key not in found:
                found[key] = Storage(dtype, count, memoryview(archive.read(name)))
            if found[key].dtype != dtype:
                raise Refused(f"storage {short(key)} must be of one type and size")
            return found[key]

        return Machine(memoryview(archive.read(f"{root}data.pkl")), 0, TENSORS | storage_names(),
                       storage).run()
    except (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError,
            EOFError, OSError, IndexError, KeyError, ValueError, OverflowError) as error:
        raise Refused(f"a torch file must be a whole zip archive ({first_line(error)})") from None


def first_line(error):
    lines = str(error).splitlines()
    return lines[0][:120] if lines else type(error).__name__


def torch_stream(data):
    """The value that torch.save wrote to `data`, in either format, as data."""
    data = memoryview(data)
    if data[:len(LEGACY)] == LEGACY:
        return legacy(data)
    if data[:len(ZIP)] == ZIP:
        return zipped(data)
    raise Refused("a torch file must begin with torch's magic number or as a zip archive")


def tensor_blob(data):
    """The storage or tensor in bytes that `torch.storage._load_from_bytes` would load."""
    if not isinstance(data, memoryview):
        raise TypeError("a blob is bytes")
    value = torch_stream(data)
    if not isinstance(value, (Storage, Tensor)):
        raise Refused(f"a blob of numbers must be a storage or a tensor, not {short(value)}")
    return value


def guarded(path, function):
    """`function()`, with what is wrong as a ModelError that begins with `path`."""
    try:
        return function()
    except Refused as error:
        raise ModelError(f"{path}: {error}") from None
    except (UnicodeDecodeError, RecursionError, MemoryError) as error:
        raise ModelError(f"{path}: must be a whole file ({type(error).__name__})") from None


def is_torch_file(data):
    """Whether `data` begins as files of torch.save do."""
    return data[:len(LEGACY)] == LEGACY or data[:len(ZIP)] == ZIP


def is_pickle(data):
    """Whether `data` begins as pickles of protocol 2 and later do."""
    return data[:1] == pickle.PROTO


def value_of(tensor):
    """`tensor`, of a file or of torch, as a torch tensor."""
    return tensor.value() if isinstance(tensor, Tensor) else tensor


def check_total(path, tensors, data):
    """Raise ModelError if `tensors` need more memory than the bytes of their file.

    A file may show one run of numbers as many tensors.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > len(data):
        raise ModelError(f"{path}: tensors must be at most as large as their file, "
                         f"{len(data)} bytes, not {total}")


def state_dict(path, data):
    """Tensors by name in `data`, the bytes of a file by torch.save.

    Raises ModelError if the file is damaged or holds anything but a dict of tensors.
    """
    tensors = guarded(path, lambda: torch_stream(data))
    if not isinstance(tensors, dict) or not tensors:
        raise ModelError(f"{path}: must hold a dict of tensors, not {short(tensors)}")
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(f"{path}: {short(name)} must be a tensor with a name, "
                             f"not {short(value)}")
    check_total(path, tensors, data)
    return tensors


def load(path, data, calls):
    """The value of the pickle in `data`, the bytes of the file `path`.

    `calls` maps (module, name) to the function that stands for it. Raises ModelError if the pickle
    is damaged, names anything else, or leaves bytes after its end.
    """

    def run():
        machine = Machine(memoryview(data), 0, calls, None)
        value = machine.run()
        if machine.at != len(data):
            raise Refused(f"the file must end after its pickle, not {len(data) - machine.at} "
                          f"bytes later")
        return value

    return guarded(path, run)


def read(path):
    """The bytes of the regular file `path`; ModelError if it is missing or too large."""
    try:
        if not path.is_file():
            raise ModelError(f"{path}: must be an existing file")
        with path.open("rb") as file:
            data = file.read(FILE_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: must be readable ({error.strerror})") from None
    if len(data) > FILE_BYTES:
        raise ModelError(f"{path}: must be at most {FILE_BYTES} bytes")
    return data
