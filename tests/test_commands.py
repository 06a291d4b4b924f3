"""The subcommands of sqdm that take a model, run as a user runs them."""

import dataclasses
import json
import os
import re
import sys
from collections import Counter

import pytest
import safetensors.torch
from PIL import Image

import sqdm
from golden import trace
from golden.checkpoint import load_model, read_file, save_model
from sim import compare, demo, simulate


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process; returns its status and what it printed."""
    monkeypatch.delenv("SQDM_TRACEBACK", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sqdm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            sqdm.main()
        return end.value.code or 0, *capsys.readouterr()

    return run


def expect_refusal(done, line):
    """One line on stderr, exit status 2."""
    status, _, err = done
    assert status == 2
    assert re.fullmatch(rf"sqdm: {line}\n", err), err


def test_info(command, small_model_file, tmp_path):
    status, out, _ = command("info", small_model_file, "--json", tmp_path / "info.json")
    assert status == 0
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["macs"] == sum(layer["macs"] for layer in facts["layers"])
    for layer in facts["layers"]:
        assert re.search(rf"{re.escape(layer['name'])} .*{layer['format']} .*{layer['macs']:,} ",
                         out)


def test_quantize_and_sample(command, small_model_file, tmp_path):
    network, _ = load_model(small_model_file)
    save_model(tmp_path / "float.safetensors", network, {"recipe": "random"})
    status, _, _ = command(
        "quantize", tmp_path / "float.safetensors", "--out", tmp_path / "q.safetensors",
        "--images", 1, "--steps", 3, "--json", tmp_path / "q.json")
    assert status == 0
    formats = json.loads((tmp_path / "q.json").read_text())["formats"]
    assert formats["first"] == "IN16"
    assert {"MX8", "A4U"} <= set(formats.values())
    status, out, _ = command("sample", tmp_path / "q.safetensors", "--out", tmp_path / "images",
                             "--count", 2)
    assert status == 0
    with Image.open(tmp_path / "images" / "samples.png") as picture:
        assert picture.width > picture.height / 2
    results = json.loads((tmp_path / "images" / "samples.json").read_text())
    assert len(results["sqnr_db_of_evaluations"]) == 5
    assert f"SQNR {results['sqnr_db']:.1f} dB" in out


def test_sample_takes_other_solvers(small_model_file, tmp_path, command):
    found = {}
    for name, options in {"heun": (), "euler": ("--solver", "euler"),
                          "churned": ("--churn", 2), "again": ("--churn", 2)}.items():
        status, out, _ = command("sample", small_model_file, "--out", tmp_path / name,
                                 "--count", 1, *options)
        assert status == 0
        found[name] = json.loads((tmp_path / name / "samples.json").read_text())
        found[name]["picture"] = (tmp_path / name / "samples.png").read_bytes()
    assert len(found["heun"]["sqnr_db_of_evaluations"]) == 7
    assert len(found["euler"]["sqnr_db_of_evaluations"]) == 4
    assert (found["euler"]["solver"], found["churned"]["churn"]) == ("euler", 2.0)
    assert found["churned"] == found["again"]
    assert found["churned"]["picture"] != found["heun"]["picture"]
    expect_refusal(command("sample", small_model_file, "--out", tmp_path, "--solver", "rk4"),
                   "solver must be heun or euler, not 'rk4'")


@pytest.mark.parametrize(("content", "line"), [
    (lambda data: data[:1000], r".*must be a whole safetensors file \(.*\)"),
    (lambda data: b"\x80\x04K\x01.", r".*must be a whole safetensors file \(.*\)"),
], ids=["truncated", "pickle"])
@pytest.mark.parametrize("name", ["simulate", "sample"])
def test_damaged_model(command, name, content, line, small_model_file, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(content(small_model_file.read_bytes()))
    expect_refusal(command(name, tmp_path / "bad.safetensors"), line)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_info_of_what_is_no_model(command, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(b"\x80\x04K\x01.")
    expect_refusal(command("info", tmp_path / "bad.pkl"), rf"{tmp_path}/bad\.pkl: .*")


@pytest.mark.parametrize("quantized", [5, [], {}, {"version": 2}])
def test_info_of_a_hostile_record(command, quantized, small_model_file, tmp_path):
    tensors, record = read_file(small_model_file)
    data = safetensors.torch.save(tensors, {"sqdm": json.dumps(
        {**record, "origin": 5, "quantized": quantized})})
    (tmp_path / "bad.safetensors").write_bytes(data)
    expect_refusal(command("info", tmp_path / "bad.safetensors"),
                   r".*metadata of the quantized part must be whole \(.*\)")


def test_info_of_a_float_model(command, small_model_file, tmp_path):
    network, _ = load_model(small_model_file)
    save_model(tmp_path / "float.safetensors", network, {"recipe": "random"})
    status, out, _ = command("info", tmp_path / "float.safetensors", "--json", tmp_path / "i.json")
    assert status == 0
    facts = json.loads((tmp_path / "i.json").read_text())
    assert {layer["format"] for layer in facts["layers"]} == {None}
    assert f"{facts['parameters']:,} parameters; " in out and "; float\n" in out
    assert facts["macs_by_kind"]["convolution"] == facts["macs"]


def test_quantize_by_a_policy(command, small_model_file, tmp_path):
    """Every policy has a file; what needs integers refuses those that the accelerator lacks."""
    network, _ = load_model(small_model_file)
    save_model(tmp_path / "float.safetensors", network, {"recipe": "random"})
    quantize = ("quantize", tmp_path / "float.safetensors", "--out", tmp_path / "q.safetensors",
                "--images", 1, "--steps", 2, "--json", tmp_path / "q.json")
    status, out, _ = command(*quantize, "--policy", "int4-vsq", "--mxint8", "last")
    assert status == 0 and "policy int4-vsq" in out and "saved against FP16: " in out
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["formats"]["last"] == "MX8" and not found["executable"]
    assert {"seconds", "peak_memory_mib", "compute_saved", "memory_saved"} <= set(found)
    for layer in found["layers"]:
        assert re.search(rf"{re.escape(layer['name'])} .*{layer['format']} .*{layer['macs']:,} ",
                         out)
    status, out, _ = command("info", tmp_path / "q.safetensors")
    assert status == 0 and "quantized by policy int4-vsq" in out
    for name in ("simulate", "trace"):
        options = ("--out", tmp_path / "trace.npz") if name == "trace" else ()
        expect_refusal(command(name, tmp_path / "q.safetensors", *options),
                       r".*must be in formats that the accelerator has, not by policy int4-vsq")


def test_quantize_by_sensitivity(command, small_model_file, tmp_path):
    status, _, _ = command("quantize", small_model_file, "--out", tmp_path / "q.safetensors",
                           "--images", 1, "--steps", 2, "--json", tmp_path / "q.json",
                           "--mxint8", "auto", "--budget", 0.2, "--picture", tmp_path / "q.png")
    assert status == 0
    assert 0 < json.loads((tmp_path / "q.json").read_text())["mxint8"] <= 0.2
    with Image.open(tmp_path / "q.png") as picture:
        assert picture.width > 400


@pytest.mark.parametrize(("options", "line"), [
    (["--policy", "int5"], r"policy must be one of fp16, .*, not 'int5'"),
    (["--mxint8", "absent"], r"mxint8 must be paper, none, auto, or .*, not 'absent'"),
    (["--policy", "int8", "--mxint8", "paper"], r"mxint8 must be none for policy int8, .*"),
    (["--mxint8", "none", "--budget", "0.1"], r"budget must be given with mxint8 auto only, .*"),
    (["--mxint8", "none", "--picture", "p.png"],
     r"picture must be given with --mxint8 auto only, not 'none'"),
    (["--label", "1"], r"label must not be given: the network has no classes, not 1"),
])
def test_quantize_refuses(command, options, line, small_model_file, tmp_path):
    expect_refusal(command("quantize", small_model_file, "--out", tmp_path / "q.safetensors",
                           *options), line)
    assert not list(tmp_path.iterdir())


def test_model_with_nan(command, small_model_file, tmp_path):
    tensors, record = read_file(small_model_file)
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    data = safetensors.torch.save(tensors, {"sqdm": json.dumps(record)})
    (tmp_path / "nan.safetensors").write_bytes(data)
    expect_refusal(command("simulate", tmp_path / "nan.safetensors"),
                   rf".*tensor {re.escape(name)} must be finite, not NaN or infinite")


def test_float_model_must_be_quantized_first(command, small_model_file, tmp_path):
    network, _ = load_model(small_model_file)
    save_model(tmp_path / "float.safetensors", network, {})
    expect_refusal(command("simulate", tmp_path / "float.safetensors"),
                   r".*must be a quantized model, not a float one: quantize it first")


@pytest.mark.parametrize(("options", "line"), [
    (["--evaluations", "9"], r"evaluations must be in 0\.\.6, not '9'"),
    (["--layers", "absent"], r"layers must match some of first, .*, not 'absent'"),
    (["--preset", "absent"], r"preset must be one of tiny, .*, not 'absent'"),
    (["--threshold", "1.5"], r"threshold must be in 0\.\.1, not 1\.5"),
])
def test_simulate_refuses(command, options, line, small_model_file):
    expect_refusal(command("simulate", small_model_file, *options), line)


def test_simulate_refuses_a_layer_that_does_not_fit(command, small_model_file, tmp_path):
    (tmp_path / "narrow.toml").write_text('base = "tiny"\nrecord_depth = 8\n')
    expect_refusal(command("simulate", small_model_file, "--preset", tmp_path / "narrow.toml"),
                   r".*: records of \d rows must be at most 4 for narrow, not \d+: \d+ too many")


def test_fpga_refuses_an_unknown_board(command, tmp_path):
    expect_refusal(command("fpga", "--board", "absent", "--out", tmp_path / "out"),
                   r"board must be one of ulx3s-85f.*, not 'absent'")
    assert not (tmp_path / "out").exists()


def test_simulate_from_the_wheel(installed, small_model_file):
    """In an empty folder, outside make, with nothing of the source tree on the path."""
    done = installed("simulate", small_model_file, "--preset", "tiny", "--evaluations", "0,2",
                     "--layers", "first,*conv1", "--json", "simulate.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((installed.folder / "simulate.json").read_text())
    assert results["elements_compared"] > 0
    assert results["elements_different"] == 0
    assert results["evaluations"] == [0, 2]
    assert f"{results['elements_compared']:,} elements compared, 0 different" in done.stdout


def test_simulate_ends_with_the_first_difference(command, small_model_file, tmp_path,
                                                 monkeypatch):
    """Status 1, one line, and the JSON file all the same; tests/test_faults.py has real faults."""
    mismatch = compare.Mismatch(layer="first", evaluation=0, what="output", channel=3, pixel=(1, 2),
                                expected=7, actual=8)
    record = simulate.Record(**dict.fromkeys(
        (field.name for field in dataclasses.fields(simulate.Record)), 0) | {
            "layer": "first", "format": "IN16", "requantize": {}, "convolve": {"total_cycles": 5},
            "mismatches": [mismatch]})
    report = simulate.Report(records=[record], compared=Counter(output=10),
                             different=Counter(output=1))
    monkeypatch.setattr(demo, "run_layers", lambda calls, config, **options: report)
    status, out, err = command("simulate", small_model_file, "--json", tmp_path / "simulate.json")
    assert status == 1
    assert err == f"sqdm: the RTL differs: {mismatch}\n"
    assert "10 elements compared, 1 different" in out
    assert json.loads((tmp_path / "simulate.json").read_text())["mismatch"] == str(mismatch)


@pytest.mark.parametrize(("options", "mode"), [
    ([], "balanced"), (["--threshold", "0.3"], "threshold")])
def test_simulate_explains_and_names_its_mode(command, options, mode, small_model_file, tmp_path,
                                              monkeypatch):
    seen = []

    def run_layers(calls, config, *, plans, **rest):
        seen.extend((call, plans[call.name]) for call, _ in calls)
        return simulate.Report()

    monkeypatch.setattr(demo, "run_layers", run_layers)
    status, out, err = command("simulate", small_model_file, "--explain", *options,
                               "--json", tmp_path / "simulate.json")
    assert status == 0, err
    assert json.loads((tmp_path / "simulate.json").read_text())["mode"] == mode
    for call, plan in seen:
        assert f"{plan.explain(call.name)}\n" in out
        assert (call.balance is not None) == (mode == "balanced" and plan.shape.labelled)
        if plan.shape.labelled and mode == "threshold":
            assert call.threshold == round(0.3 * 65536)


def test_demo(small_model_file, tmp_path):
    """The whole demo on a small model and the smallest core."""
    results, reports = demo.demo(small_model_file, tmp_path, preset="tiny", yardstick="tiny",
                                 images=2, wanted=(1,), layers="first,*conv0")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.json", "samples.png", "sparsity.png", "sqdm_core.json", "sqdm_core.v"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert {"model", "preset", "zero_fraction", "elements_compared", "elements_different",
            "evaluations", "layers", "cycles", "cycles_dense", "sqnr_db"} <= set(written)
    assert written["elements_different"] == 0
    assert written["cycles"] == written["cycles_dense"] > 0
    parts = written["cycles_by_format"]["tiny"]
    assert parts["all"]["total"] == parts["W4A4"]["total"] + parts["MXINT8"]["total"]
    assert parts["all"]["layer_calls"] == len(written["layers"])
    assert 0 < parts["W4A4"]["compute"] < parts["W4A4"]["convolve"]
    for name in ("samples.png", "sparsity.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
    assert os.path.getsize(tmp_path / "sqdm_core.v") > 100_000


def test_trace(command, small_model_file, tmp_path):
    """A trace, its pictures and JSON; and the labels it gives to the RTL are those of a replay."""
    status, out, _ = command("trace", small_model_file, "--out", tmp_path / "t.npz", "--exact",
                             "--pictures", tmp_path / "pictures", "--json", tmp_path / "t.json",
                             "--threshold", 0.5, "--interval", 2)
    assert status == 0
    facts = json.loads((tmp_path / "t.json").read_text())
    found = trace.load(tmp_path / "t.npz")
    assert found.exact and found.model == small_model_file.stem
    assert facts["zero_fraction"] == pytest.approx(found.zero_fraction())
    assert facts["fingerprint"] == found.fingerprint and len(facts["flips"]) == 6
    assert f"{facts['zero_fraction']:.1%} zero activations" in out
    for row in facts["work"]:
        assert re.search(rf"{re.escape(row['name'])} +{row['speedup']['3:1']:.2f} ", out)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "channels_by_time.png", "expected_work.png", "sparsity.png", "zero_statistics.png"]
    for path in (tmp_path / "pictures").iterdir():
        with Image.open(path) as picture:
            picture.load()

    layer = "decoder.8x8_block1.conv0"
    options = ["--preset", "tiny", "--evaluations", "3,6", "--layers", layer, "--threshold", 0.4]
    reports = []
    for more in ([], ["--trace", tmp_path / "t.npz"]):
        status, _, err = command("simulate", small_model_file, *options, *more,
                                 "--json", tmp_path / "simulate.json")
        assert status == 0, err
        reports.append(json.loads((tmp_path / "simulate.json").read_text())["records"])
    assert len(reports[0]) == 2 and reports[0] == reports[1]
    assert all(record["elements_different"] == 0 for record in reports[1])
    assert any(record["sparse_channels"] for record in reports[1])

    expect_refusal(command("simulate", small_model_file, "--trace", tmp_path / "t.npz",
                           "--seed", 4), r"seed of the trace must be 4, not 0: record it again")
    expect_refusal(command("simulate", "mnist32", "--trace", tmp_path / "t.npz"),
                   r"trace must be of this model, not of another one .*: record it again")
    (tmp_path / "t.npz").write_bytes(b"PK")
    expect_refusal(command("simulate", small_model_file, "--trace", tmp_path / "t.npz"),
                   r".*t\.npz: must be a whole npz file \(.*\)")


@pytest.mark.parametrize(("options", "line"), [
    (["--threshold", "-0.5"], r"threshold must be in 0\.\.1, not -0\.5"),
    (["--vector", "8"], r"vector must be 16 or 32, not 8"),
    (["--seed", "4096"], r"seed must be in 0\.\.4095, not 4096"),
])
def test_trace_refuses(command, options, line, small_model_file, tmp_path):
    status, _, err = command("trace", small_model_file, "--out", tmp_path / "t.npz", *options)
    assert status == 2
    assert re.search(rf"^sqdm: {line}$", err, re.MULTILINE), err
    assert list(tmp_path.iterdir()) == []
