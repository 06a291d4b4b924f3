"""sim/estimate.py: cycles from counts alone, beside the exact model on the codes."""

import json

import numpy as np
import pytest

from golden import quantize, trace
from hw import config
from sim import estimate


@pytest.fixture(scope="module")
def counted(small_model):
    return trace.record(small_model, exact=True)


@pytest.mark.parametrize("preset", ["tiny", "small", "small-dense"])
def test_small_layers(preset, small_model, counted):
    """Layers of 16 channels and random weights; the dense side alone is a matter of counting."""
    core = config.load(preset)
    for row in estimate.compare(small_model, counted, core, [0, 3], threshold=0.4):
        assert row["exact"] > 0 and len(row["errors"]) == 2
        counting = preset == "small-dense" or row["format"] in ("MX8", "IN16")
        assert abs(row["worst"]) < (0.06 if counting else 0.12), row


@pytest.fixture(scope="module")
def shipped():
    model = quantize.load("mnist32")
    return model, trace.record(model, label="mnist32", exact=False)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_layers_of_the_shipped_model(threshold, shipped):
    """Every layer call within 12 %, all together within 3 %; 8x8 and 16x16 pixels, both kernels."""
    model, found = shipped
    names = [name for name, item in model.layers.items() if 8 <= item.height <= 16][::3]
    rows = estimate.compare(model, found, config.SMALL, [20], layers=names, threshold=threshold)
    assert len(rows) == len(names) > 5
    for row in rows:
        assert abs(row["worst"]) < 0.12, row
    exact, guess = (sum(row[kind] for row in rows) for kind in ("exact", "estimate"))
    assert abs(guess / exact - 1) < 0.03


def test_all_images_and_evaluations_at_once(shipped):
    model, found = shipped
    layer = found.labelled[0]
    labels = layer.labels()
    cycles = estimate.layer_cycles(layer, labels, config.SMALL)
    assert {value.shape for value in cycles.values()} == {labels.shape[:2]}
    assert (cycles["compute"] >= np.maximum(cycles["dense_busy"], cycles["sparse_busy"])).all()
    none = estimate.layer_cycles(layer, np.zeros_like(labels), config.SMALL)
    assert not none["sparse_busy"].any() and (none["dense_busy"] == none["dense_busy"][0, 0]).all()
    every = estimate.layer_cycles(layer, np.ones_like(labels), config.SMALL)
    assert not every["dense_busy"].any() and (every["sparse_busy"] > 0).all()
    with pytest.raises(ValueError, match=r"^vector must be that of the trace, 32, not 16$"):
        estimate.layer_cycles(layer, labels, config.SMALL, 32)


def test_command(small_model_file, counted, tmp_path, capsys):
    trace.save(counted, tmp_path / "t.npz")
    status = estimate.main([str(small_model_file), str(tmp_path / "t.npz"), "--preset", "tiny",
                            "--evaluations", "2", "--json", str(tmp_path / "e.json")])
    assert status == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert [row["layer"] for row in found["layers"]] == list(counted.layers)
    assert "all" in capsys.readouterr().out
    assert estimate.main([str(small_model_file), str(small_model_file)]) == 2
    assert "must be a whole npz file" in capsys.readouterr().err
