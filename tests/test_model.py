"""Layers of whole models on the RTL, and what the reports about them say."""

import json
import re
import sys

import pytest

import sqdm
from golden import pictures, quantize, trace
from hw import verilog
from hw.config import PRESETS, SMALL, TINY
from sim import demo, measure, sampling, simulate
from tests import faults

EVALUATIONS = [0, 11, 23, 34]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "threshold"), [
    *[(config, None) for config in PRESETS.values()], (SMALL, 0.3)],
    ids=[*PRESETS, "small_fixed"])
def test_every_layer_of_the_shipped_model(config, threshold):
    """Every element that the RTL leaves behind, at evaluations spread over the run.

    Compute cycles are those of the model; all cycles of a layer are within 2 % of it, and in sum
    those without computing.
    """
    model = quantize.load("mnist32")
    names = sampling.select_layers("*", model)
    limits = None if threshold is None else sampling.thresholds_for(model, config, threshold)
    calls = sampling.layer_calls(model, config, EVALUATIONS, names, thresholds=limits)
    report = simulate.simulate(calls, config, plans=sampling.plans(model, config, names))
    assert report.mismatch is None, str(report.mismatch)
    assert report.different.total() == 0
    assert [(record.evaluation, record.layer) for record in report.records] == [
        (index, name) for index in EVALUATIONS for name in names]
    assert {record.format for record in report.records} == {"A4U", "A4S", "MX8", "IN16"}
    assert report.compared["output"] == len(EVALUATIONS) * sum(
        len(item.weight_codes) * item.height * item.width for item in model.layers.values())
    totals = {kind: report.total("convolve", f"{kind}_cycles") for kind in ("total", "compute")}
    foreseen = sum(record.foreseen for record in report.records)
    assert foreseen - totals["compute"] == pytest.approx(
        totals["total"] - totals["compute"], rel=0.02)
    for record in report.records:
        assert record.foreseen == pytest.approx(record.convolve["total_cycles"], rel=0.02), record
    calls = len(EVALUATIONS) * len(names)
    assert {report.compared[kind] for kind in ("compute_cycles", "dense_work", "sparse_work")} == {
        calls}


def test_simulate_on_a_faulty_core(small_model_file, tmp_path, monkeypatch, capsys):
    """Status 1, and one line with layer, evaluation, channel, pixel, expected and actual value."""
    honest = simulate.tempfile.mkdtemp

    def folder(*arguments, prefix="", **options):
        made = honest(*arguments, prefix=prefix, **options)
        if prefix == "sqdm-simulate-":
            faults.choose("weights_of_the_next_position", simulate.Path(made))
        return made

    monkeypatch.setattr(simulate.tempfile, "mkdtemp", folder)
    monkeypatch.setattr(verilog, "generate", lambda config: (faults.verilog(config), {}))
    monkeypatch.delenv("SQDM_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", [
        "sqdm", "simulate", str(small_model_file), "--preset", "tiny", "--evaluations", "2",
        "--json", str(tmp_path / "simulate.json")])
    with pytest.raises(SystemExit) as end:
        sqdm.main()
    assert end.value.code == 1
    found = json.loads((tmp_path / "simulate.json").read_text())
    assert found["elements_different"] > 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"sqdm: the RTL differs: {found['mismatch']}"
    assert re.fullmatch(
        r"sqdm: the RTL differs: first, evaluation 2, channel \d+, pixel \(y \d+, x \d+\): output"
        r" must be -?\d+, not -?\d+ \(\d+ of \d+ differ\)", line)


def record(**fields):
    """A record of a layer of 8 x 8 pixels."""
    return simulate.Record(**{
        "layer": "a", "evaluation": 0, "format": "A4U", "height": 8, "width": 8, "kernel": 3,
        "channels": 16, "outputs": 16, "macs": 9600, "zero_fraction": 0.25,
        "elements_compared": 7, "elements_different": 0, "dense_channels": 10,
        "shared_channels": 2, "sparse_channels": 4, "requantize": {"total_cycles": 100},
        "convolve": {"total_cycles": 300, "compute_cycles": 200}, "mismatches": [], **fields})


def report():
    return simulate.Report(records=[
        record(), record(evaluation=1, zero_fraction=0.75),
        record(layer="b", format="MX8", dense_channels=0, shared_channels=16,
               sparse_channels=0),
        record(layer="c", format="A4S", convolve={})])


def printed(table, capsys):
    sqdm._print_table(table)
    return capsys.readouterr().out


def test_cycles_by_format():
    found = demo.cycles_by_format(report())
    assert found["W4A4"] == {"layer_calls": 3, "macs": 28800, "requantize": 300, "convolve": 600,
                             "compute": 400, "total": 900}
    assert found["MXINT8"]["total"] == 400
    assert {key: found["W4A4"][key] + found["MXINT8"][key] for key in found["all"]} == found["all"]


def test_layer_table(capsys):
    """An MX8 product counts four times; zeros are averaged, cycles are added."""
    lines = printed(demo.layer_table(report(), TINY), capsys).splitlines()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.split()}
    assert rows["a"] == "A4U 8x8 16->16 50% 10+2+4 200 600 400 50% 14 0"
    assert rows["b"] == "MX8 8x8 16->16 25% 0+16+0 100 300 200 200% 7 0"
    assert rows["c"] == "A4S 8x8 16->16 25% 10+2+4 100 0 0 0% 7 0"
    assert rows["all"] == "400 900 600 100% 28 0"


def test_cycles_table(capsys):
    dense = simulate.Report(records=[record(convolve={"total_cycles": 600, "compute_cycles": 400})])
    text = printed(demo.cycles_table({"small": demo.cycles_by_format(report()),
                                      "small-dense": demo.cycles_by_format(dense)}), capsys)
    assert re.search(r"W4A4 +│ compute +│ +400 │ +400 │ +1\.00 ", text)
    assert "Convolve includes compute and the memory port." in " ".join(text.split())


def test_measure(small_model_file, monkeypatch, capsys):
    """The benchmark on a small model and the smallest core, with a simulator from the cache."""
    honest = simulate.simulate
    monkeypatch.setattr(simulate, "simulate", lambda calls, config, *, cache_dir, **options:
                        honest(calls, config, **options))
    results = measure.measure(small_model_file, names=["tiny"], evaluation=3, layers="*.conv0")
    found = results["presets"]["tiny"]
    assert found["elements_compared"] > 0
    assert found["elements_different"] == 0
    assert found["mismatch"] is None
    assert found["cycles_per_second"] > 0
    assert found["cycles_by_format"]["all"]["layer_calls"] == len(results["layers"])
    assert f" {found['verilog_lines']:,} " in printed(measure.measure_table(results), capsys)


def test_pictures_are_the_same_on_every_run(small_model, tmp_path):
    counts = trace.record(small_model)
    limits = sampling.thresholds_for(small_model, SMALL)
    for name in ("a.png", "b.png"):
        pictures.sparsity(tmp_path / name, counts, limits)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
