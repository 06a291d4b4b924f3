"""Profiles: statistics against codes, lists against golden's, and the command."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from golden import quantize
from golden.detector import balanced_lists, threshold_lists
from golden.requantizer import slots
from hw.config import MEDIUM, MEDIUM_DENSE, SMALL
from hw.descriptor import Format
from sim import profile
from sim.shape import Shape


@pytest.fixture(scope="module")
def model():
    return quantize.load_executable("mnist32")


def subject(seed=0, *, format=Format.A4U, channels=(40, 24), outputs=64, size=8, evaluations=3):
    rng = np.random.default_rng(seed)
    shape = Shape(format=format, kernel=3, height=size, width=size, channels=channels,
                  outputs=outputs, vector=16, residual=False)
    nonzero = rng.random((evaluations, sum(channels)))
    known = np.concatenate([1 - nonzero[:1], 1 - nonzero[:-1]])
    macs = profile.inside(9 * sum(channels) * outputs * size ** 2, 3, size, size)
    return profile.Subject("layer", shape, macs, nonzero, known, np.zeros(evaluations))


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_lists_are_those_of_golden(threshold):
    for seed in range(5):
        layer = subject(seed)
        run = profile.Run(layer, MEDIUM, threshold)
        plan, pixels = run.plan, layer.shape.pixels
        order, size = slots(list(layer.shape.channels), 16)
        valid = torch.zeros(size, dtype=torch.bool)
        valid[order] = True
        counts = torch.full((size,), pixels)
        counts[order] = torch.from_numpy(np.rint(layer.known[1] * pixels).astype(np.int64))
        if threshold is None:
            lists = balanced_lists(counts, pixels, plan.costs, valid, 16, plan.tile_channels,
                                   plan.dense_limit)
        else:
            known = torch.zeros(size, dtype=torch.float64)
            known[order] = torch.from_numpy(layer.known[1])
            lists = threshold_lists((known >= threshold) & valid, valid, 16, plan.tile_channels,
                                    plan.dense_limit)
        for channels, found in zip(run.channels, lists, strict=True):
            places, low, high, cut = run.split(layer.known[1, channels])
            assert (low, high, cut) == (found.low, found.high, found.cut), f"seed {seed}"
            assert order[channels[places]].tolist() == (found.first + found.slots).tolist()


def test_draws_have_the_statistics():
    shares, together = np.array([0.2] * 30 + [0.7] * 30), 0.02
    run = profile.Run(subject(size=32), MEDIUM)
    drawn = run.pixels(shares, together, np.random.default_rng(0))
    assert drawn.shape == (32, 32)
    assert abs(drawn.mean() - 27) < 0.6
    expected = 60 * 0.185 + 60 * 59 * together
    assert abs(drawn.var() / expected - 1) < 0.2
    assert not run.pixels(np.zeros(5), 0.0, np.random.default_rng(0)).any()


def test_zeros_are_shifted_to_a_mean():
    layers = [subject(1), subject(2, outputs=32), subject(3, format=Format.MX8)]
    moved = profile.shifted(layers, 0.8)
    weights = [layer.macs for layer in moved[:2]]
    means = [1 - layer.nonzero.mean() for layer in moved[:2]]
    assert np.average(means, weights=weights) == pytest.approx(0.8, abs=1e-6)
    assert (moved[2].nonzero == layers[2].nonzero).all()
    odds = [np.log(1 / layer.nonzero - 1) for layer in (layers[0], moved[0])]
    inside = (layers[0].nonzero > 1e-3) & (layers[0].nonzero < 0.999)
    assert np.ptp((odds[1] - odds[0])[inside]) < 1e-6
    with pytest.raises(ValueError, match="^zeros must be between 0 and 1, not 1.0$"):
        profile.shifted(layers, 1.0)


def test_macs_are_those_inside_the_image():
    assert subject(size=8).macs == (3 * 8 - 2) ** 2 * 64 * 64
    assert profile.inside(5 * 4 * 3, 1, 4, 3) == 60
    assert profile.inside(9 * 7, 3, 1, 1) == 7


def test_sums_hold_together():
    layer = subject(size=16)
    rows = profile.profile([layer], SMALL, range(3))
    assert rows == profile.profile([layer], SMALL, range(3))
    for row in rows:
        for side in ("dense", "sparse"):
            spent = sum(row[f"{side}_{cause}"] for cause in ("issue", "scale", "empty", "room"))
            assert spent <= row[f"{side}_busy"] <= row["compute"] < row["total"]
        done = row["dense_macs"] + row["sparse_macs"]
        assert row["nonzero_macs"] * 0.95 < done < row["macs"]
        assert row["total"] - row["load"] >= row["compute"]
    late = sum(row["compute"] for row in rows)
    oracle = sum(row["compute"] for row in profile.profile([layer], SMALL, range(3), oracle=True))
    assert oracle < late


def test_all_dense_takes_every_mac():
    layer = subject(size=16)
    [row] = profile.profile([layer], MEDIUM_DENSE, [0])
    assert row["dense_macs"] == row["macs"]
    assert row["sparse_macs"] == row["sparse_busy"] == 0
    assert row["macs"] / (row["compute"] * MEDIUM_DENSE.multipliers) > 0.9
    assert profile.all_dense(MEDIUM) is MEDIUM_DENSE
    odd = dataclasses.replace(MEDIUM, name="odd", sparse_pes=2)
    assert profile.all_dense(odd).multipliers == odd.multipliers == 384
    with pytest.raises(ValueError, match="^multipliers must be a multiple of 64 for an all-dense"):
        profile.all_dense(dataclasses.replace(
            MEDIUM, name="bad", dense_pes=0, sparse_pes=1, sparse_lanes=16, sparse_rate=2,
            sparse_scale_units=4))


def test_statistics_come_near_the_codes(model):
    """Layers of a real image: from its zero fractions alone, and from its codes."""
    subjects, exact = profile.exact(model, MEDIUM, [17])
    fractions = {row["layer"]: row["nonzero_macs"] / row["macs"] for row in exact}
    drawn = [dataclasses.replace(item, nonzero=item.nonzero * min(1.0, (
        fractions[item.name] / max(1e-9, item.nonzero[17].mean()))))
        if item.labelled else item for item in subjects]
    rows = profile.profile(drawn, MEDIUM, [17])
    labelled = {item.name for item in subjects if item.labelled}
    totals = [sum(row["compute"] for row in found if row["layer"] in labelled)
              for found in (exact, rows)]
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


def test_networks_by_name():
    subjects = profile.from_network("cifar10-ddpmpp", MEDIUM, 0.5)
    assert len(subjects) == 100
    first, last = subjects[0], subjects[-1]
    assert first.shape.format == Format.IN16 and first.shape.kernel == 1
    assert first.shape.channels == (27,)
    assert last.shape.format == Format.MX8 and last.shape.kernel == 1
    assert last.shape.outputs == 27 and last.macs == 94 ** 2 * 256 * 3
    assert sum(item.macs for item in subjects) == pytest.approx(19.9e9, rel=0.01)
    found = [item for item in subjects if item.labelled]
    assert all((item.nonzero == 0.5).all() for item in found)


def test_report_keys(model, tmp_path):
    from sqdm import app
    from typer.testing import CliRunner

    file = tmp_path / "profile.json"
    result = CliRunner().invoke(app, [
        "profile", "mnist32", "--preset", "small", "--evaluations", "3,4", "--zeros", "0.65",
        "--json", str(file)])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["source"] == "calibration" and found["zeros"] == 0.65
    assert [row["evaluation"] for row in found["evaluations"]] == [3, 4]
    assert [layer["name"] for layer in found["layers"]] == list(model.layers)
    assert {"macs", "nonzero_macs", "compute", "total", "load", "stall", "utilization",
            "dense_utilization", "sparse_utilization", "sparse_efficiency", "balance",
            "speedup_dense", "speedup_fp16"} <= set(found["totals"]["w4a4"])
    assert {"bound", "evaluations", "format"} <= set(found["layers"][0])
    assert {"bound", "dense_room", "sparse_scale", "nonzero_macs"} <= set(
        found["layers"][0]["evaluations"][0])


def test_wrong_input():
    from sqdm import app
    from typer.testing import CliRunner

    for arguments, text in (
            (["mnist32", "--threshold", "2"], "threshold must be in 0..1"),
            (["mnist32", "--exact", "--oracle"], "exact must be without trace"),
            (["cifar10-ddpmpp", "--exact"], "trace and exact must be of a quantized model"),
            (["mnist32", "--zeros", "1"], "zeros must be between 0 and 1")):
        result = CliRunner().invoke(app, ["profile", *arguments])
        assert isinstance(result.exception, ValueError)
        assert text in str(result.exception)
