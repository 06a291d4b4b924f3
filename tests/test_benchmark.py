"""The report of figures: its keys, its sense, and what it says of areas."""

import dataclasses
import json

import pytest

from hw.config import MEDIUM, SMALL
from sim import benchmark, profile

KEYS = {"dense_utilization", "sparse_efficiency", "balance", "whole_run_utilization",
        "sparsity_speedup", "sparsity_speedup_real_zeros", "sparsity_speedup_by_zeros",
        "equal_area_speedup", "all_sparse", "all_dense", "mxint8_mac_share", "total_speedup"}


@pytest.fixture(scope="module")
def areas(tmp_path_factory):
    path = tmp_path_factory.mktemp("areas") / "areas.json"
    path.write_text(json.dumps({
        "small": {"ecp5": 200, "ihp": 3e6}, "small-dense": {"ecp5": 160, "ihp": 3e6},
        "small-sparse": {"ecp5": 320, "ihp": 3e6}}))
    return path


@pytest.fixture(scope="module")
def report(areas):
    return benchmark.measure("mnist32", SMALL, "3", areas)


def test_figures(report):
    assert KEYS <= set(report)
    assert json.loads(json.dumps(report)) == report
    assert report["zeros"] == pytest.approx(0.65, abs=0.05)
    for key in ("dense_utilization", "sparse_efficiency", "balance", "whole_run_utilization"):
        assert 0.5 < report[key] < 1
    assert report["dense_utilization"] > 0.95
    assert 1.5 < report["sparsity_speedup"] < 1 / (1 - report["zeros"])
    assert report["with_bus"]["sparsity_speedup"] < report["sparsity_speedup"]
    assert report["all_dense"]["total_speedup"] < 4
    assert report["total_speedup"] > report["all_dense"]["total_speedup"]
    assert report["threshold_over_balanced"] > 1
    assert 0.99 < report["oracle_over_late"] < 1.1


def test_more_zeros_are_faster(report):
    assert list(report["sparsity_speedup_by_zeros"]) == ["0.3", "0.5", "0.65", "0.8"]
    for name in (*benchmark.SHAPES, "model"):
        speeds = [found[name] for found in report["sparsity_speedup_by_zeros"].values()]
        assert speeds == sorted(speeds) and speeds[0] > 1


def test_areas(report, tmp_path):
    speedup = report["equal_area_speedup"]
    assert speedup["ecp5"] == pytest.approx(report["sparsity_speedup"] * 0.8)
    assert speedup["ihp"] == report["sparsity_speedup"]
    assert speedup["asap7"] is None
    assert report["all_sparse"]["equal_area_speedup"]["ecp5"] == pytest.approx(
        report["all_sparse"]["sparsity_speedup"] / 2)
    path = tmp_path / "areas.json"
    path.write_text('{"small": {"ecp5": 1}}')
    cores = SMALL, profile.all_dense(SMALL), benchmark.all_sparse(SMALL)
    with pytest.raises(ValueError, match="must have areas of small, small-dense, small-sparse"):
        benchmark.add_areas({}, path, cores)


def test_all_sparse_has_as_many_multipliers():
    assert benchmark.all_sparse(MEDIUM).multipliers == MEDIUM.multipliers
    assert benchmark.all_sparse(dataclasses.replace(
        MEDIUM, dense_lanes=4, dense_scale_units=4)) is None


def test_text(report):
    lines = benchmark.markdown(report).splitlines()
    assert lines[0] == "# small on mnist32"
    rows = [line for line in lines if line.startswith("|")]
    assert any("over dense FP16" in row and f"{report['total_speedup']:.2f}" in row
               for row in rows)
    assert any(row.startswith("| 256->256 8x8 | ") and "(4.24)" in row for row in rows)
