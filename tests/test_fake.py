"""Fake quantization: every policy on tiny networks, and calibration."""

import dataclasses
import itertools

import pytest
import torch

from golden import fake, policy
from golden.fake import FakeQuantized, calibrate, one_hot, round_activation, round_weight, sqnr
from golden.policy import POLICIES, Policy
from golden.sampler import draw_noise
from tests.networks import make


@pytest.fixture(scope="module")
def model():
    return make("relu")


@pytest.fixture(scope="module")
def calibration(model):
    mixed = POLICIES["mixed"]
    return calibrate(model, policy.formats(model.unet, mixed), mixed, images=2, steps=3)


def build(model, chosen, calibration=None):
    names = policy.formats(model.unet, chosen)
    if calibration is None:
        calibration = calibrate(model, names, chosen, images=2, steps=3)
    return FakeQuantized.from_calibration(model, chosen, names, calibration, steps=3)


def test_policies_in_order_of_their_error(model):
    """More bits and finer scales are nearer to float; nothing changes the float network."""
    x, found = draw_noise(4, model.architecture, 1) * 5, {}
    right = model(x, 5.0)
    for name in ("fp16", "int8", "mxint8", "int4", "int4-channel", "int4-vsq", "uint4-fp8"):
        quantized = build(model, POLICIES[name])
        found[name] = sqnr(right, quantized(x, 5.0))
        assert quantized.architecture == model.architecture
    assert torch.equal(model(x, 5.0), right)
    assert found["fp16"] > 50 > found["int8"] > 25
    assert found["mxint8"] > 25 > found["int4-vsq"]
    assert min(found["int4-vsq"], found["uint4-fp8"]) > max(found["int4"], 5)
    assert found["int4-channel"] > 5


@pytest.mark.parametrize("name", ["silu", "residual", "skip", "adm", "diffusers"])
def test_families(name):
    model = make(name)
    x = draw_noise(1, model.architecture, 1) * 5
    quantized = build(model, POLICIES["int8"])
    assert sqnr(model(x, 5.0), quantized(x, 5.0)) > 20


def test_labels_change_the_output():
    model = make("adm")
    quantized = build(model, POLICIES["int8"])
    x = draw_noise(1, model.architecture, 1) * 5
    outputs = [quantized(x, 5.0, one_hot(label, model.architecture)) for label in (None, 0, 1)]
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.equal(one, other)
    quantized.label = 1
    assert torch.equal(quantized(x, 5.0), outputs[2])


@pytest.mark.parametrize(("label", "text"), [
    (5, r"^label must be in 0\.\.4, not 5$"), (True, r"^label must be in 0\.\.4, not True$")])
def test_bad_label(label, text):
    with pytest.raises(ValueError, match=text):
        one_hot(label, make("adm").architecture)


def test_label_without_classes(model):
    with pytest.raises(ValueError, match=r"^label must not be given: the network has no classes, "
                                         r"not 1$"):
        one_hot(1, model.architecture)


def test_calibration_sees_each_noise_level(model, calibration):
    assert calibration.sigmas.tolist() == [
        evaluation.sigma for evaluation in fake.levels(model, 3)]
    for layer in model.unet.layers():
        amax, extremes = calibration.amax[layer.name], calibration.extremes[layer.name]
        assert amax.shape == (5, layer.cin)
        assert amax.max().item() == extremes["input"]
        assert (layer.name in calibration.embeddings) == layer.name.endswith(".conv0")
    assert not calibration.modulations
    # The nearest to EDM's typical levels that the short run has, of one image in four.
    assert {sigma for sigma, _ in calibration.states} <= set(calibration.sigmas.tolist())
    assert {x.shape for _, x in calibration.states} == {(1, 1, 8, 8)}


@pytest.mark.parametrize("scattered", [set(), {"last"}])
def test_calibration_sees_planes(model, scattered):
    """Results of a scattered layer are those of its taps, which may well exceed their sum."""
    seen, mixed = {}, POLICIES["mixed"]
    observer = fake.Observer(1, policy.formats(model.unet, mixed), mixed, scattered)
    observer.begin(0)

    def run(layer, segments, *rest):
        seen[layer.name] = layer, layer.prologue(segments, None), observer(layer, segments, *rest)
        return seen[layer.name][2]

    with fake.executing(model.unet, run):
        model(draw_noise(2, model.architecture, 3) * 5, 5.0)
    layer, x, out = seen["last"]
    planes = out - layer.bias[:, None, None], out
    if scattered:
        planes = [], []
        for tap in range(9):
            weight = layer.weight.flatten(2)[:, :, tap, None, None]
            planes[0].append(torch.nn.functional.conv2d(x, weight))
            planes[1].append(planes[0][-1] + (layer.bias[:, None, None] if tap == 4 else 0))
    for place, found in zip(("sum", "output"), planes, strict=True):
        right = max(plane.abs().max().item() for plane in found)
        assert observer.extremes["last"][place] == pytest.approx(right, rel=1e-5)


def test_typical_noise_levels(model):
    mixed = POLICIES["mixed"]
    found = calibrate(model, policy.formats(model.unet, mixed), mixed, images=5, steps=18)
    assert [round(sigma, 2) for sigma, _ in found.states] == [1.09, 0.59, 0.3, 0.14, 0.06]
    assert {x.shape for _, x in found.states} == {(2, 1, 8, 8)}


def test_static_scales_by_step_follow_the_noise_level(model, calibration):
    chosen = Policy(name="", static="step", codes="A8")
    changed = dataclasses.replace(calibration, amax={
        name: value * torch.tensor([1, 1, 1, 1e3, 1])[:, None]
        for name, value in calibration.amax.items()})
    quantized, x = build(model, chosen, changed), draw_noise(2, model.architecture, 1)
    clean, coarse = (torch.full((2,), sigma) for sigma in (80.0, 0.002))
    outputs = {}
    for sigma in (clean, coarse, torch.stack([clean[0], coarse[1]])):
        seen = {}
        quantized(x * sigma[:, None, None, None], sigma, on_input=seen.__setitem__)
        outputs[tuple(sigma.tolist())] = seen["last"]
    one, other, both = outputs.values()
    # With a scale 1000 times too large every code is 0.
    assert one.any() and not other.any() and both[0].any() and not both[1].any()


@pytest.mark.parametrize("format", ["A8U", "A8S", "A4U", "A4S"])
@pytest.mark.parametrize("options", [
    {}, {"group": 16}, {"block": 2}, {"block": None, "scale": "fp32"}, {"static": "tensor"},
    {"static": "channel"}, {"scale": "power_of_two"}, {"scale": "int4", "level": "image"}])
def test_activations_are_codes_times_few_steps(format, options):
    chosen = Policy(name="", codes=format[:2], **options)
    x = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x.clamp(min=0) if format.endswith("U") else x
    rounded = round_activation(x, format, chosen, x.abs().amax((0, 2, 3)))
    assert sqnr(x, rounded) > (20 if format.startswith("A8") else 8)
    # An element's group: what shares a scale has few values.
    one = rounded[0, :, 0, 0] if options.get("static") != "channel" else rounded[:, 0].flatten()
    bits = 8 if format.startswith("A8") else 4
    assert len(one.unique()) <= (1 << bits) * (2 if options.get("group") else 1)


def test_weights_share_steps():
    weight = torch.randn(8, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[0] *= 10
    ratios = {}
    for name in ("int4", "int4-channel", "int4-vsq", "mixed", "mxint8", "int8", "fp16"):
        format = {"mxint8": "MX8", "int8": "A8S", "fp16": "FP16"}.get(name, "A4S")
        rounded = round_weight(weight, format, POLICIES[name])
        ratios[name] = sqnr(weight[1:], rounded[1:])
        if name == "int4":
            assert len(rounded.unique()) <= 15
        if name == "int4-channel":
            assert all(len(part.unique()) <= 15 for part in rounded)
    assert sorted(ratios, key=ratios.get) == [
        "int4", "int4-channel", "mixed", "int4-vsq", "mxint8", "int8", "fp16"]


def test_clips_lower_the_error():
    """One outlier among many: the scale with the least squared error clips it."""
    weight = torch.randn(1, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[0, 0, 0, 0] = 8
    clipped = round_weight(weight, "A4S", POLICIES["int4-channel"])
    plain = round_weight(weight, "A4S", dataclasses.replace(POLICIES["int4-channel"], clip=False))
    assert sqnr(weight, clipped) > sqnr(weight, plain) + 1


def test_layer_sqnr(model, calibration):
    """A layer's own error: float layers have none, fewer bits more."""
    ratios = {name: fake.layer_sqnr(build(model, POLICIES[name]), calibration.states)
              for name in ("int8", "mixed")}
    for layer in model.unet.layers():
        assert ratios["int8"][layer.name] > 25
        if layer.name != "first":
            assert ratios["int8"][layer.name] > ratios["mixed"][layer.name] + 10
