"""golden/trace.py: counts are those of the executions, and only whole, true files are read."""

import dataclasses
import io
import json
import random
import re
import zipfile

import numpy as np
import pytest
import torch

from golden import quantize, trace
from golden.quantized_network import evaluate, trajectory
from golden.requantizer import Format, slots
from golden.sampler import draw_noise


@pytest.fixture(scope="module")
def fast(small_model):
    return trace.record(small_model, images=2, seed=3)


@pytest.fixture(scope="module")
def exact(small_model):
    return trace.record(small_model, images=2, seed=3, exact=True)


@pytest.fixture(scope="module")
def written(fast, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "fast.npz"
    trace.save(fast, path)
    return path


def same(one, other):
    """Whether two traces are equal in everything."""
    for name, layer in one.layers.items():
        for field in dataclasses.fields(layer):
            a, b = getattr(layer, field.name), getattr(other.layers[name], field.name)
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype and np.array_equal(a, b), (name, field.name)
            else:
                assert a == b
    assert dataclasses.replace(one, layers={}) == dataclasses.replace(other, layers={})
    return list(one.layers) == list(other.layers)


def test_exact_counts_are_those_of_evaluate(small_model, exact):
    """Zero counts and words of calls of both images, counted here again from the codes."""
    noise = draw_noise(2, small_model.architecture, 3)
    states = [trajectory(small_model, noise[image:image + 1])[1] for image in range(2)]
    for index in (0, 5):
        results = [evaluate(small_model, states[image][index], index).results for image in range(2)]
        for layer, *pair in zip(exact.layers.values(), *results, strict=True):
            if layer.format == Format.IN16:
                assert layer.zeros is None
                continue
            order, size = slots(list(layer.segments), 16)
            for zeros, result in zip(layer.zeros, pair, strict=True):
                assert np.array_equal(zeros[index], result.zero_counts[order])
            codes = torch.stack([result.codes.codes[:size] for result in pair], 1)
            for word, found in zip(codes.split(16), layer.nonzeros[index], strict=True):
                assert np.array_equal(np.bincount((word != 0).sum(0).flatten(), minlength=17),
                                      found)


def test_fast_counts_are_those_of_the_fast_definition(small_model):
    counts = quantize.zero_counts(small_model, draw_noise(2, small_model.architecture, 3))
    found = trace.record(small_model, images=2, seed=3)
    for layer in found.layers.values():
        if layer.counted:
            assert np.array_equal(layer.zeros.sum(0, dtype=int), counts[layer.name])
            assert np.array_equal(layer.calibration, small_model.layers[layer.name].zeros)


def test_progress_is_called_once_a_round(small_model):
    calls = []
    trace.record(small_model, images=9, progress=lambda: calls.append(0))
    assert len(calls) == trace.rounds(small_model, 9) == 14
    calls.clear()
    trace.record(small_model, images=1, exact=True, progress=lambda: calls.append(0))
    assert len(calls) == trace.rounds(small_model, 1, True) == 7


def test_wider_words(small_model):
    """Words of 32 slots; the zeros do not depend on V."""
    wide = trace.record(small_model, images=2, seed=3, vector=32)
    narrow = trace.record(small_model, images=2, seed=3)
    for layer in wide.labelled:
        assert layer.nonzeros.shape[1:] == (len(layer.segments), 33)
        assert np.array_equal(layer.zeros, narrow.layers[layer.name].zeros)


def test_labels_follow_the_last_update(fast):
    layer = fast.labelled[0]
    for interval in (1, 2, 3):
        labels = layer.labels(20000, interval)
        for index in range(fast.evaluations):
            known = (layer.calibration[0] if index == 0 else
                     layer.zeros[:, (index - 1) // interval * interval]).astype(int)
            assert np.array_equal(labels[:, index] | np.zeros_like(labels[:, index]),
                                  np.broadcast_to(known * 65536 >= 20000 * layer.pixels,
                                                  labels[:, index].shape))
    assert layer.labels(0).all() and not layer.labels((1 << 17) - 1).any()
    wide = next(layer for layer in fast.layers.values() if layer.format == Format.MX8)
    assert not wide.labels(0).any()


def test_round_trip(fast, exact, written, tmp_path):
    assert same(trace.load(written), fast)
    trace.save(exact, tmp_path / "exact.npz")
    assert same(trace.load(tmp_path / "exact.npz"), exact)
    trace.save(trace.load(written), tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == written.read_bytes()


def test_another_model_is_noticed(small_model, fast):
    fast.check_model(small_model, seed=3, vector=16)
    with pytest.raises(trace.TraceError, match=r"^seed of the trace must be 0, not 3: record it a"):
        fast.check_model(small_model, seed=0)
    with pytest.raises(trace.TraceError, match=r"^vector of the trace must be 32, not 16: record"):
        fast.check_model(small_model, vector=32)
    name = fast.labelled[0].name
    item = small_model.layers[name]
    changes = {"threshold": item.threshold ^ 1, "bias": item.bias + 1}
    for field, value in changes.items():
        layers = small_model.layers | {name: dataclasses.replace(item, **{field: value})}
        other = type(small_model)(small_model.float_model, layers, {}, small_model.steps)
        if field == "threshold":
            fast.check_model(other)
        else:
            with pytest.raises(trace.TraceError, match=r"^trace must be of this model, not of a"):
                fast.check_model(other)


# Files.

def parts(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def changed_header(change):
    def edit(members):
        head = json.loads(np.load(io.BytesIO(members["header.npy"])).tobytes())
        change(head)
        members["header.npy"] = npy(np.frombuffer(json.dumps(head).encode(), np.uint8))
    return edit


def changed_array(name, change):
    def edit(members):
        array = np.load(io.BytesIO(members[f"{name}.npy"])).copy()
        members[f"{name}.npy"] = npy(change(array))
    return edit


def bumped(array):
    array[0, 0, 0] += 1
    return array


@pytest.mark.parametrize(("edit", "text"), [
    (lambda m: m.pop("header.npy"), 'must be a "sqdm trace", but it has no array header'),
    (lambda m: m.update({"header.npy": npy(np.frombuffer(b"[" * 5000, np.uint8))}),
     r"header must be JSON \(.*\)"),
    (lambda m: m.update({"header.npy": npy(np.array([{}], dtype=object))}),
     "array header must be uint8 in C order, not object"),
    (lambda m: m.update({"header.npy": b"\x93NUMPY\x01\x00\x10\x00{__import__('os')}"}),
     r"array header must be in npy format \(.*\)"),
    (changed_header(lambda h: h.update(kind="other")), 'header must be of a "sqdm trace"'),
    (changed_header(lambda h: h.update(version=2)), "version must be 1, not 2"),
    (changed_header(lambda h: h.update(version=True)), "version must be 1, not True"),
    (changed_header(lambda h: h.pop("seed")), "header must have the field 'seed'"),
    (changed_header(lambda h: h.update(more=1)), "header must have known fields only, not 'more'"),
    (changed_header(lambda h: h.update(images=0)), r"images must be in 1\.\.65536, not 0"),
    (changed_header(lambda h: h.update(images=True)),
     "images of header must be of type int, not bool"),
    (changed_header(lambda h: h.update(images=50000, steps=1000)),
     r"arrays must be at most \d+ bytes, not \d+"),
    (changed_header(lambda h: h.update(vector=8)), "vector must be 16 or 32, not 8"),
    (changed_header(lambda h: h.update(fingerprint="x" * 64)),
     "fingerprint must be 64 hexadecimal digits"),
    (changed_header(lambda h: h["layers"][1].update(name="first")),
     "name of layer 1 must be new, of 1 to 200 printable characters"),
    (changed_header(lambda h: h["layers"][1].update(format="A8")),
     "format of layer 1 must be one of A4U, A4S, MX8, IN16, not 'A8'"),
    (changed_header(lambda h: h["layers"][1].update(kernel=5)),
     "kernel of layer 1 must be 1 or 3, not 5"),
    (changed_header(lambda h: h["layers"][1].update(height=60000)),
     "pixels of layer 1 must be at most 65535, not 480000"),
    (changed_header(lambda h: h["layers"][1].update(segments=[])),
     r"segments of layer 1 must be one or two integers in 1\.\.32768"),
    (changed_header(lambda h: h["layers"][1].update(segments=[17])),
     r"array zeros\.1 must have shape \(2, 7, 17\), not \(2, 7, 16\)"),
    (changed_header(lambda h: h["layers"][1].update(width=4)),
     r"zeros of \S+ must be at most 32, not \d+|nonzeros of \S+ must count 64 pixels in every .*"),
    (lambda m: m.pop("zeros.3.npy"), r"array zeros\.3 is missing"),
    (lambda m: m.update({"zeros.0.npy": m["zeros.1.npy"]}),
     r"array 'zeros\.0\.npy' must not be there"),
    (changed_array("zeros.3", lambda x: x.astype(np.uint32)),
     r"array zeros\.3 must be uint16 in C order, not uint32"),
    (changed_array("zeros.3", lambda x: np.asfortranarray(x)),
     r"array zeros\.3 must be uint16 in C order, not uint16"),
    (changed_array("zeros.3", lambda x: x + np.uint16(1000)),
     r"zeros of \S+ must be at most \d+, not \d+"),
    (changed_array("calibration.3", lambda x: x + np.uint16(1000)),
     r"calibration of \S+ must be at most \d+, not \d+"),
    (changed_array("nonzeros.3", bumped), r"nonzeros of \S+ must count \d+ pixels in every word"),
    (changed_array("nonzeros.3", lambda x: x[:, :, ::-1].copy()),
     r"nonzeros of \S+ must agree with its zeros"),
    (lambda m: m.update({"zeros.3.npy": m["zeros.3.npy"][:-1]}),
     r"array zeros\.3 must hold what its shape .* says"),
])
def test_wrong_files_are_refused(edit, text, written, tmp_path):
    members = parts(written)
    edit(members)
    path = write(tmp_path / "bad.npz", members)
    with pytest.raises(trace.TraceError, match=rf"^{re.escape(str(path))}: {text}$"):
        trace.load(path)


def test_missing_and_foreign_files(tmp_path, small_model_file):
    with pytest.raises(trace.TraceError, match=r"absent: must be an existing trace file$"):
        trace.load(tmp_path / "absent")
    with pytest.raises(trace.TraceError, match=r": must be a whole npz file \(.*\)$"):
        trace.load(small_model_file)


def test_other_compressions_are_refused(written, tmp_path):
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        for name, data in parts(written).items():
            archive.writestr(name, data)
    with pytest.raises(trace.TraceError, match=r": array 'header\.npy' must be stored or defl"):
        trace.load(tmp_path / "lzma.npz")


def test_a_model_without_labels_is_refused(small_model):
    layers = {name: item for name, item in small_model.layers.items() if not item.sparse_capable}
    other = type(small_model)(small_model.float_model, layers, {}, small_model.steps)
    with pytest.raises(trace.TraceError, match=r"^x: model must have layers in W4A4, whose zeros"):
        trace.record(other, label="x")


def test_large_members_are_not_unpacked(written, tmp_path):
    """A member of many zeros, and one whose header claims more than memory holds."""
    members = parts(written)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + bytes(1 << 22) if name == "zeros.3.npy" else data)
    with pytest.raises(trace.TraceError, match=r": array zeros\.3 must be at most \d+ bytes$"):
        trace.load(tmp_path / "bomb.npz")
    head = members["header.npy"].index(b"(")
    end = members["header.npy"].index(b",", head)
    members["header.npy"] = (members["header.npy"][:head + 1] + b"9" * 12
                             + members["header.npy"][end:])
    with pytest.raises(trace.TraceError, match=r": array header must .*$"):
        trace.load(write(tmp_path / "claim.npz", members))


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_files_give_one_line(seed, written, tmp_path):
    """Bytes changed, cut or repeated anywhere: a TraceError of one line, or an equal trace."""
    rng, data, path = random.Random(seed), written.read_bytes(), tmp_path / "fuzzed.npz"
    refused = 0
    for _ in range(40):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(broken))
            kind = rng.randrange(4)
            if kind == 0:
                broken[place] = rng.randrange(256)
            elif kind == 1:
                broken[place] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del broken[place:place + rng.randint(1, 64)]
            else:
                broken[place:place] = broken[place:place + rng.randint(1, 64)]
        path.write_bytes(broken)
        try:
            trace.load(path)
        except trace.TraceError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused >= 30


@pytest.mark.parametrize("seed", range(2))
def test_fuzzed_members_give_one_line(seed, written, tmp_path):
    """The same inside the archive, where no checksum protects them."""
    rng, members = random.Random(seed), parts(written)
    for _ in range(40):
        name = rng.choice(["header.npy", "header.npy", "zeros.3.npy", "nonzeros.4.npy"])
        broken = bytearray(members[name])
        place = rng.randrange(min(len(broken), 4000))
        broken[place] = rng.choice(b"0123456789{}[]\",:\x00\xff")
        try:
            trace.load(write(tmp_path / "fuzzed.npz", members | {name: bytes(broken)}))
        except trace.TraceError as error:
            assert "\n" not in str(error)


def test_nothing_half_written(fast, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace.save(fast, tmp_path / "out.npz")
    assert list(tmp_path.iterdir()) == []


def test_zero_fraction_is_weighted_by_macs(fast):
    zero = sum(layer.macs * layer.zeros.mean() / layer.pixels for layer in fast.labelled)
    assert fast.zero_fraction() == pytest.approx(
        zero / sum(layer.macs for layer in fast.labelled))
    assert torch.tensor(fast.zero_fraction()) > 0
