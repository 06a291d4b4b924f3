"""Write snapshots in the form of EDM's code, for the tests of their reader.

The classes here have the attributes of EDM's modules and no arithmetic. As there, an object
reduces to a call of torch_utils.persistence with the module's source text, the class name and the
attributes. `modules` puts stand-ins for the modules that such pickles name into sys.modules.
"""

import contextlib
import io
import math
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch

SOURCE = '''"""Stands where a snapshot has its network's source."""
raise SystemExit("source of a snapshot was executed")
'''


class EasyDict(dict):
    """A dict with attributes, as dnnlib has."""


def reconstruct(meta):
    raise AssertionError("a persistent object was reconstructed")


EasyDict.__module__ = "dnnlib.util"
EasyDict.__qualname__ = "EasyDict"
reconstruct.__module__ = "torch_utils.persistence"
reconstruct.__qualname__ = reconstruct.__name__ = "_reconstruct_persistent_obj"


def scalar(kind, data):
    raise AssertionError("a scalar was made")


@contextlib.contextmanager
def modules(numpy_name):
    """Give pickle the modules whose names the snapshot contains."""
    scalar.__module__ = numpy_name
    stand_ins = {"dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict}, "torch_utils": {},
                 "torch_utils.persistence": {"_reconstruct_persistent_obj": reconstruct},
                 numpy_name: {"scalar": scalar}}
    before = {name: sys.modules.get(name) for name in stand_ins}
    for name, members in stand_ins.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Persistent:
    """An object of a persistent class: a name, attributes, and perhaps a module's members."""

    source, version = SOURCE, 6

    def __init__(self, class_name, members=(), args=(), **kwargs):
        self.class_name, self.members = class_name, dict(members)
        self.args, self.kwargs = args, kwargs

    def state(self):
        return {**self.members, "_init_args": self.args, "_init_kwargs": self.kwargs}

    def __reduce__(self):
        meta = {"type": "class", "version": self.version, "module_src": self.source,
                "class_name": self.class_name, "state": self.state()}
        return reconstruct, (meta,), None


class Module(Persistent):
    """A persistent object that is a torch module too."""

    def __init__(self, class_name, args=(), **kwargs):
        super().__init__(class_name, (), args, **kwargs)
        self.parameters, self.buffers, self.children = OrderedDict(), OrderedDict(), OrderedDict()

    def state(self):
        return {
            "training": False, "_parameters": self.parameters, "_buffers": self.buffers,
            "_non_persistent_buffers_set": set(), "_backward_hooks": OrderedDict(),
            "_is_full_backward_hook": None, "_forward_hooks": OrderedDict(),
            "_forward_pre_hooks": OrderedDict(), "_state_dict_hooks": OrderedDict(),
            "_load_state_dict_pre_hooks": OrderedDict(), "_modules": self.children,
            **super().state()}


def tree(tensors, kwargs):
    """EDMPrecond with `tensors`, a dict by EDM's names, made with `kwargs`."""
    net = Module("EDMPrecond", **kwargs)
    for path, value in tensors.items():
        module, *names = net, *path.split(".")
        for depth, name in enumerate(names[:-1]):
            if name not in module_children(module):
                module_children(module)[name] = (
                    torch.nn.ModuleDict() if name in ("enc", "dec")
                    else Module(class_of(names, depth, kwargs), channels=np.sqrt(0.5)))
            module = module_children(module)[name]
        group = module.buffers if names[-1] in ("resample_filter", "freqs") else module.parameters
        group[names[-1]] = value if group is module.buffers else torch.nn.Parameter(
            value, requires_grad=False)
    return net


def module_children(module):
    return module.children if isinstance(module, Module) else module._modules


def class_of(names, depth, kwargs):
    name = names[depth]
    if depth == 0:
        return kwargs["model_type"]
    if name.startswith("map_"):
        return "Linear" if name != "map_noise" else "FourierEmbedding"
    if "norm" in name:
        return "GroupNorm"
    return "Conv2d" if depth + 2 == len(names) and name != "affine" else "UNetBlock"


class Pickler(pickle.Pickler):
    """Pickles tensors as plain pickles do, or with blobs in torch.save's newer format.

    Scalars are pickled as numpy does, under the name that `modules` was given.
    """

    def __init__(self, file, protocol, zipped):
        super().__init__(file, protocol)
        self.zipped = zipped

    def reducer_override(self, value):
        if self.zipped and isinstance(value, torch.storage.TypedStorage):
            blob = io.BytesIO()
            torch.save(value, blob)
            return torch.storage._load_from_bytes, (blob.getvalue(),)
        if isinstance(value, np.generic):
            return scalar, (value.dtype, value.tobytes())
        return NotImplemented


def snapshot(tensors, kwargs, *, protocol=4, zipped=False, numpy_name="numpy._core.multiarray",
             extra=()):
    """Bytes of a snapshot like those of EDM's training, with the network as ``ema``.

    `numpy_name` is the module that it names for numpy's scalars; numpy before 2 has
    ``numpy.core.multiarray``. `extra` are more entries.
    """
    loss = Persistent("EDMLoss", {"P_mean": -1.2, "P_std": np.float64(1.2), "sigma_data": 0.5})
    pipe = Module("AugmentPipe", p=0.12)
    pipe.buffers["wavelet"] = torch.arange(4.0)
    data = {"ema": tree(tensors, kwargs), "loss_fn": loss, "augment_pipe": pipe,
            "dataset_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset",
                                       path="cifar10.zip", limit=math.inf), **dict(extra)}
    file = io.BytesIO()
    with modules(numpy_name):
        Pickler(file, protocol, zipped).dump(data)
    return file.getvalue()
