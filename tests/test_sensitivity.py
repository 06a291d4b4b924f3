"""Sensitivity of layers to 4 bits, and the choice of those in MXINT8."""

import pytest
import torch

from golden import policy, quantize, sensitivity
from golden.fake import calibrate
from golden.policy import POLICIES
from tests.networks import make

RIGGED = "decoder.8x8_block0.conv1"


@pytest.fixture(scope="module")
def rigged():
    """A network one of whose layers has an outlier in its input that leaves no codes for the rest.

    The outlier's channel has no weight, so that it is nothing but harm.
    """
    model = make("relu")
    layer = next(layer for layer in model.unet.layers() if layer.name == RIGGED)
    with torch.no_grad():
        layer.norm.bias[0] = 300
        layer.weight[:, 0] = 0
    return model


@pytest.fixture(scope="module")
def found(rigged):
    mixed = POLICIES["mixed"]
    calibration = calibrate(rigged, policy.formats(rigged.unet, mixed), mixed, images=1, steps=3)
    done = []
    result = sensitivity.measure(rigged, mixed, calibration,
                                 progress=lambda count, total: done.append((count, total)))
    assert done == [(n + 1, len(done)) for n in range(len(done))]
    return result


def test_the_rigged_layer_is_found(rigged, found):
    assert [item["name"] for item in found] == [
        layer.name for layer in rigged.unet.layers() if layer.name != "first"]
    worst = max(found, key=lambda item: item["error"])
    assert worst["name"] == RIGGED
    others = sorted(item["error"] for item in found)
    assert worst["error"] > 3 * others[-2]
    share = worst["macs"] / sum(item["macs"] for item in found)
    assert RIGGED in sensitivity.pick(found, 1.01 * share)


@pytest.mark.parametrize("budget", [0, 0.01, 0.034, 0.1, 0.5, 1])
def test_budget_is_respected(found, budget):
    chosen = sensitivity.pick(found, budget)
    total = sum(item["macs"] for item in found)
    spent = sum(item["macs"] for item in found if item["name"] in chosen)
    assert spent <= budget * total
    # Nothing that would still fit is left out, but for the units that sizes are rounded up to.
    rest = budget * total * (1 - len(found) / sensitivity.UNITS) - spent
    assert all(item["macs"] > rest for item in found if item["name"] not in chosen)


def test_the_best_choice_within_the_budget():
    """Not the greedy one: the two cheaper layers together are worth more than the best alone."""
    found = [{"name": "best", "error": 6.0, "macs": 12}, {"name": "one", "error": 4.0, "macs": 10},
             {"name": "two", "error": 4.0, "macs": 10}, {"name": "idle", "error": 0.0, "macs": 1},
             {"name": "rest", "error": 9.0, "macs": 67}]
    assert sensitivity.pick(found, 0.1) == {"one"} or sensitivity.pick(found, 0.1) == {"two"}
    assert sensitivity.pick(found, 0.12) == {"best"}
    assert sensitivity.pick(found, 0.2) == {"one", "two"}
    assert sensitivity.pick(found, 0.325) == {"best", "one", "two"}


@pytest.mark.parametrize("budget", [-0.1, 1.1, "0.1", True])
def test_bad_budget(budget):
    with pytest.raises(ValueError, match=r"^budget must be in 0\.\.1, not "):
        sensitivity.pick([], budget)


def test_auto_is_recorded(rigged, tmp_path):
    model = quantize.quantize_model(rigged, {}, mxint8="auto", budget=0.2, images=1, steps=2)
    recorded = model.record["mxint8"]
    assert recorded["rule"] == "auto" and recorded["budget"] == 0.2
    wide = {name for name, format in model.formats.items() if format == "MX8"}
    assert RIGGED in wide and wide == sensitivity.pick(recorded["sensitivity"], 0.2)
    quantize.save(model, tmp_path / "model.safetensors")
    assert quantize.load(tmp_path / "model.safetensors").formats == model.formats
