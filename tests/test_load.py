"""What `load` accepts, and files of all kinds with faults in them: one line, nothing executed."""

import contextlib
import io
import json
import pickle
import random
import re
import resource
import struct
import sys
import time

import pytest
import safetensors.torch
import torch

from golden import edm, load
from golden.checkpoint import ModelError, save_model
from golden.network import Architecture, Precond
from golden.presets import random_model
from tests import edm_pickle

# As small as its form allows, so that faults meet structure more often than weights.
TINY = edm.architecture({
    "img_resolution": 2, "img_channels": 1, "model_type": "SongUNet", "model_channels": 4,
    "channel_mult": [1], "channel_mult_emb": 1, "num_blocks": 1, "attn_resolutions": [],
    "dropout": 0, "embedding_type": "fourier"})
ARGUMENTS = edm.arguments(TINY)
DDPM = Architecture(
    family="diffusers", img_channels=1, resolution=4, model_channels=4, channel_mult=(1, 2),
    attention_resolutions=(2,), middle_attention=True, activation="silu", prediction="epsilon",
    norm_groups=2, norm_group_channels=1, channels_per_head=4)
CONFIG = {
    "_class_name": "UNet2DModel", "sample_size": 4, "in_channels": 1, "out_channels": 1,
    "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2,
    "attention_head_dim": 4, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_end": 0.02,
             "num_train_timesteps": 1000, "prediction_type": "epsilon", "trained_betas": None}


def saved(value, **form):
    file = io.BytesIO()
    torch.save(value, file, **form)
    return file.getvalue()


def diffusers_weights(model):
    """State dict of `model`, a Precond of family diffusers, under diffusers' names."""
    from golden.diffusers_folder import Weights

    class Any(dict):
        """Has every tensor that is asked for, so that `Weights` says which it wants."""

        def __contains__(self, name):
            return "proj_attn" not in name

    names, found = {}, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("golden.diffusers_folder.check_tensors", lambda *arguments: None)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        names = Weights("x", Any(), expected, model.architecture).sources
    for name, sources in names.items():
        value = model.state_dict()[name]
        if len(sources) == 3:
            parts = value.reshape(-1, 3, *value.shape[1:2]).unbind(1)
        else:
            parts = [value.squeeze((2, 3)) if "to_out" in sources[0] and value.ndim == 4
                     else value]
        found.update({source: part.reshape(part.shape).contiguous().clone()
                      for source, part in zip(sources, parts)})
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Valid files of each kind: a dict of what to load and the files, by name, it consists of."""
    model, ddpm = random_model(TINY), random_model(DDPM)
    exported, beside = edm.export(model), json.dumps(ARGUMENTS).encode()
    own = tmp_path_factory.mktemp("own") / "x"
    save_model(own, model, {"recipe": "random"})
    weights = diffusers_weights(ddpm)
    folder = {"model_index.json": json.dumps({"unet": ["diffusers", "UNet2DModel"]}).encode(),
              "unet/config.json": json.dumps(CONFIG).encode(),
              "scheduler/scheduler_config.json": json.dumps(SCHEDULER).encode()}
    older = {"_use_new_zipfile_serialization": False}
    return {
        "own": ("m.safetensors", {"m.safetensors": own.read_bytes()}),
        "snapshot": ("m.pkl", {"m.pkl": edm_pickle.snapshot(exported, ARGUMENTS)}),
        "snapshot-zip": ("m.pkl", {"m.pkl": edm_pickle.snapshot(
            exported, ARGUMENTS, zipped=True, protocol=3, numpy_name="numpy.core.multiarray")}),
        "pt": ("m.pt", {"m.pt": saved(exported), "m.json": beside}),
        "pt-legacy": ("m.pt", {"m.pt": saved(exported, **older), "m.json": beside}),
        "safetensors": ("m.safetensors", {"m.safetensors": safetensors.torch.save(exported),
                                          "m.json": beside}),
        "folder": ("", {**folder, "unet/diffusion_pytorch_model.safetensors":
                        safetensors.torch.save(weights)}),
        "folder-bin": ("", {**folder, "unet/diffusion_pytorch_model.bin": saved(weights)}),
    }


KINDS = ("own", "snapshot", "snapshot-zip", "pt", "pt-legacy", "safetensors", "folder",
         "folder-bin")


def write(folder, contents):
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_kind(files, tmp_path, kind):
    source, contents = files[kind]
    write(tmp_path, contents)
    model, record = load.load(tmp_path / source)
    expected = random_model(DDPM if kind.startswith("folder") else TINY)
    assert isinstance(model, Precond) and not model.training
    state = model.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value.half().float() if kind == "own" else value), name
    origin = record["origin"]
    assert re.fullmatch("[0-9a-f]{64}", origin["sha256"])
    assert origin["kind"] == {
        "own": "sqdm model file", "snapshot": "EDM snapshot", "snapshot-zip": "EDM snapshot",
        "folder": "diffusers folder", "folder-bin": "diffusers folder"}.get(
            kind, "EDM state dict")
    assert json.loads(json.dumps(record)) == record


def test_content_decides(files, tmp_path):
    """Not the name of a file."""
    for kind, suffix in (("snapshot", ".safetensors"), ("own", ".pkl"), ("pt", ".bin")):
        source, contents = files[kind]
        path = tmp_path / f"{kind}{suffix}"
        path.write_bytes(contents[source])
        path.with_suffix(".json").write_text(json.dumps(ARGUMENTS))
        assert load.load(path)[0].architecture == TINY


def test_names_without_model(files, tmp_path):
    """The state dict of the UNet alone."""
    tensors = {name.removeprefix("model."): value
               for name, value in edm.export(random_model(TINY)).items()}
    write(tmp_path, {"m.pt": saved(tensors), "m.json": json.dumps(
        {**ARGUMENTS, "class_name": "EDMPrecond"}).encode()})
    assert load.load(tmp_path / "m.pt")[0].architecture == TINY


def test_shipped_names():
    assert "mnist32" in load.shipped()
    assert load.resolve("mnist32") == load.models() / "mnist32.safetensors"


def refuses(path, message):
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        load.load(path)


def test_refused(files, tmp_path):
    for absent in ("none", "a\0b", "x" * 5000):
        refuses(absent, f"model must be one of {', '.join(load.shipped())} or an existing file or "
                        f"folder, not {absent!r}")
    path = tmp_path / "m.pt"
    write(tmp_path, {"m.pt": b"GGUF and more", "e.pt": b""})
    refuses(path, f"{path}: must be {load.ACCEPTED}")
    refuses(tmp_path / "e.pt", f"{tmp_path / 'e.pt'}: must be {load.ACCEPTED}")
    path.write_bytes(files["pt"][1]["m.pt"])
    refuses(path, f"{path}: state dict must have its network's constructor arguments beside it, "
                  f"in m.json")
    beside = tmp_path / "m.json"
    beside.write_text(json.dumps({**ARGUMENTS, "class_name": "VPPrecond"}))
    refuses(path, f"{beside}: class_name must be EDMPrecond, not 'VPPrecond'")
    beside.write_text(json.dumps({**ARGUMENTS, "depth": 3}))
    refuses(path, f"{beside}: argument 'depth' must not be there: SongUNet has no such one")
    beside.write_text(json.dumps({**ARGUMENTS, "num_blocks": 10**30}))
    refuses(path, f"{beside}: must be JSON (integers must have at most 20 digits)")
    beside.write_text(json.dumps({**ARGUMENTS, "num_blocks": 2}))
    refuses(path, f"{path}: tensor model.enc.2x2_block1.conv0.weight is missing")


class Watch:
    """Notes, through Python's audit events, what a reader must not do."""

    FORBIDDEN = ("exec", "compile", "pickle.find_class", "os.system", "os.exec", "os.fork",
                 "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen",
                 "marshal.loads", "code.__new__", "import", "os.remove", "os.rename")

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.note)

    def note(self, event, arguments):
        if self.on and (event in self.FORBIDDEN or event == "open" and (
                isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"))):
            self.seen.append((event, arguments))

    @contextlib.contextmanager
    def watching(self):
        self.on = True
        try:
            yield
        finally:
            self.on = False


@pytest.fixture(scope="module")
def watch():
    """One for all tests: an audit hook stays."""
    return Watch()


def test_watch_sees(watch):
    watch.seen.clear()
    with watch.watching():
        pickle.loads(pickle.dumps(Architecture))
        eval("1 + 1")
    assert {event for event, _ in watch.seen} >= {"pickle.find_class", "exec"}
    watch.seen.clear()


EXTREMES = [struct.pack(form, value) for form, values in (
    ("<B", (0, 1, 0x7f, 0x80, 0xff)), ("<I", (0, 1 << 31, (1 << 32) - 1, 1 << 24)),
    ("<Q", (0, 1 << 63, (1 << 64) - 1, 1 << 40, 1 << 32))) for value in values]
PAYLOADS = [
    b"cos\nsystem\n(X\x0b\x00\x00\x00touch owned\x85R",
    b"cbuiltins\neval\n(X\x10\x00\x00\x00open('owned','w')tR",
    b"\x8c\x08builtins\x8c\x04exec\x93", b"c__builtin__\nexec\n", b"R", b"b", b"\x81", b"\x92",
    b"Q", b"(", b"t", b"u", b"e", b"\x90", b"\x94", b"h\x00", b"j\xff\xff\xff\x7f", b"0", b"2",
    b"ctorch.storage\n_load_from_bytes\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"cnumpy.core.multiarray\nscalar\n", b"K\x00", b"N", b"}", b"]", b")", b"."]
VALUE = re.compile(rb"(?<=[:,\[ ])(?:[\d.]+|\"[^\"]*\"|null|true|false)(?=[,\]} ])")   # in JSON
TOKENS = [b"null", b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"[]", b"{}", b'""', b"true",
          b"1e30", b"99999999999", b'"\\u0000"', b"[[[[", b"16", b"3", b"0.5"]


def mutate(data, generator, others):
    """`data` with one to three faults."""
    data = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        at = generator.randrange(len(data) + 1)
        kind = generator.randrange(9)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << generator.randrange(8)
        elif kind == 2 and at < len(data):
            data[at] = generator.randrange(256)
        elif kind == 3:
            piece = generator.choice(EXTREMES)
            data[at:at + len(piece)] = piece
        elif kind == 4:
            del data[at:at + generator.choice((1, 2, 4, 8, 100))]
        elif kind == 5:
            data[at:at] = generator.choice(PAYLOADS)
        elif kind == 6:
            start = generator.randrange(len(data) + 1)
            data[at:at] = data[start:start + generator.choice((1, 4, 32, 500))]
        elif kind == 7:
            other = generator.choice(others)
            start = generator.randrange(len(other) + 1)
            data[at:at + 64] = other[start:start + generator.choice((8, 64, 1000))]
        else:
            values = list(VALUE.finditer(bytes(data[:4000])))
            if values:
                start, end = generator.choice(values).span()
                data[start:end] = generator.choice(TOKENS)
    return bytes(data)


def program(generator):
    """A pickle of random opcodes that this reader knows, with operands that often exist."""
    names = [f"{module}\n{name}\n".encode() for module, name in edm.SNAPSHOT]
    pieces = [b"\x80\x04"]
    for n in range(generator.randrange(3, 60)):
        pieces.append(generator.choice((
            b"N", b"K\x01", b"J\xff\xff\xff\xff", b"\x88", b"}", b"]", b")", b"(", b"t", b"\x85",
            b"\x86", b"\x87", b"s", b"u", b"a", b"e", b"R", b"b", b"\x81", b"\x94", b"\x8f",
            b"\x90", b"h%c" % generator.randrange(n + 1), b"C\x02xy", b"C\x08" + bytes(8),
            b"\x8c\x02f8", b"\x8c\x03ema", b"\x8c\x05state", b"\x8c\x04type\x8c\x05classs",
            b"G\x3f\xf0\0\0\0\0\0\0", b"Cnumber"[:2] + b"abcdefghij" * 7,
            b"c" + generator.choice(names), b"c" + generator.choice(names) + b")R",
            b"c" + generator.choice(names) + b"(")))
    return b"".join(pieces) + b"."


def fuzz(files, watch, folder, count, seed):
    """Load `count` faulty files of every kind; a dict of outcomes.

    Fails at anything but a network or a ModelError of one line.
    """
    outcomes = {"cases": 0, "loaded": 0, "refused": 0, "messages": set(), "slowest_s": 0.0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = [data for _, contents in files.values() for data in contents.values()]
    "".encode("cp437")      # zipfile's codec for names, imported at first use
    for kind in (*KINDS, "program"):
        generator = random.Random(f"{seed} {kind}")
        source, contents = files["snapshot" if kind == "program" else kind]
        here = folder / kind
        write(here, contents)
        load.load(here / source)     # what torch imports at first use, it imports now
        for n in range(count):
            name = generator.choice(list(contents))
            broken = program(generator) if kind == "program" else \
                mutate(contents[name], generator, parts)
            (here / name).write_bytes(broken)
            where = f"seed {seed}, kind {kind}, case {n}, file {name}"
            start = time.perf_counter()
            try:
                with watch.watching():
                    model, record = load.load(here / source)
                outcomes["loaded"] += 1
                assert isinstance(model, Precond) and isinstance(record, dict), where
            except ModelError as error:
                text = str(error)
                assert "\n" not in text and len(text) < 5000, where
                assert "MemoryError" not in text, where
                outcomes["refused"] += 1
                outcomes["messages"].add(re.sub(r"'[^']*'|\d+", "#", text)[:120])
            except Exception as error:
                raise AssertionError(f"{where}: {error!r}") from error
            outcomes["slowest_s"] = max(outcomes["slowest_s"], time.perf_counter() - start)
            outcomes["cases"] += 1
            assert not watch.seen, f"{where}: {watch.seen[0][0]} {str(watch.seen[0][1])[:200]}"
            (here / name).write_bytes(contents[name])
    assert not list(folder.rglob("owned"))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes["memory_mib"] = (after - before) / 1024
    assert outcomes["memory_mib"] < 400
    return outcomes


def test_faulty_files(files, watch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = fuzz(files, watch, tmp_path, 30, seed=0)
    assert outcomes["cases"] == 30 * 9
    assert outcomes["refused"] > 30 * 4 and len(outcomes["messages"]) > 50


@pytest.mark.slow
def test_many_faulty_files(files, watch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    outcomes = fuzz(files, watch, tmp_path, 2500, seed=1)
    with capsys.disabled():
        print(f"\n{outcomes['cases']} faulty files: {outcomes['refused']} refused with "
              f"{len(outcomes['messages'])} kinds of message, {outcomes['loaded']} loaded; "
              f"slowest {outcomes['slowest_s']:.2f} s, memory +{outcomes['memory_mib']:.0f} MiB")
