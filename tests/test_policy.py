"""Policies: formats of layers, and what they cost on paper."""

import dataclasses

import pytest
import torch

from golden import policy
from golden.network import LayerShape, layer_shapes
from golden.policy import POLICIES, Policy
from golden.presets import PRESETS
from tests.networks import ARCHITECTURES, make


@pytest.fixture(scope="module")
def relu():
    return make("relu").unet


def shape(channels=64, cout=32, size=8, kernel=3, name="layer"):
    return LayerShape(name, (channels,), cout, size, size, kernel, True, "relu", None)


def test_codes_of_the_policies(relu):
    """Codes after ReLU, codes elsewhere, and the network's input."""
    expected = {"fp16": ("FP16", "FP16", "FP16"), "int8": ("A8U", "A8S", "IN16"),
                "mxint8": ("MX8", "MX8", "IN16"), "int4": ("A4U", "A4S", "IN16"),
                "int4-channel": ("A4U", "A4S", "IN16"), "int4-vsq": ("A4U", "A4S", "IN16"),
                "int4-fp8": ("A4S", "A4S", "IN16"), "uint4-fp8": ("A4U", "A4S", "IN16"),
                "mixed": ("A4U", "A4S", "IN16")}
    assert list(expected) == list(POLICIES)
    for name, codes in expected.items():
        found = policy.formats(relu, POLICIES[name])
        assert list(found) == [layer.name for layer in relu.layers()]
        assert codes == (found["encoder.8x8_block0.conv0"], found["encoder.4x4_block0.skip"],
                         found["first"])


def test_what_the_accelerator_has():
    assert [name for name, item in POLICIES.items() if item.executable] == [
        "mxint8", "int4-fp8", "uint4-fp8", "mixed"]


def test_every_image_keeps_16_bits():
    found = policy.formats(make("skip").unet, POLICIES["mixed"])
    assert [name for name, format in found.items() if format == "IN16"] == [
        "first", "encoder.4x4_aux_skip"]


def test_mxint8_of_the_paper(relu):
    assert policy.paper(relu) == {
        "encoder.8x8_block0.conv0", "encoder.8x8_block0.conv1", "decoder.8x8_block1.conv1", "last"}
    found = policy.formats(relu, POLICIES["int4-vsq"], policy.paper(relu))
    assert {name for name, format in found.items() if format == "MX8"} == policy.paper(relu)


def test_choice_by_name(relu):
    assert policy.choose(relu, "last, encoder.8x8_block0") == {
        "last", "encoder.8x8_block0.conv0", "encoder.8x8_block0.conv1"}
    assert policy.choose(relu, "*.skip") == {
        layer.name for layer in relu.layers() if layer.name.endswith(".skip")}
    for text in ("absent", "last,encoder.9x9*", "first"):
        with pytest.raises(ValueError, match=r"^mxint8 must be paper, none, auto, or names or "
                                             rf"globs of layers or blocks between commas, not "
                                             rf"'{text.split(',')[-1].replace('*', '[*]')}'$"):
            policy.choose(relu, text)


def test_unsigned_codes_need_relu():
    unet = make("silu").unet
    with pytest.raises(ValueError, match=r"^policy must be one for signed activations .* the "
                                         r"network has no ReLU, so not 'uint4-fp8'$"):
        policy.get("uint4-fp8", unet)
    assert set(policy.formats(unet, policy.get("mixed", unet)).values()) == {"IN16", "A4S"}
    with pytest.raises(ValueError, match=r"^policy must be one of fp16, .*, mixed, not 'int5'$"):
        policy.get("int5", unet)


@pytest.mark.parametrize(("options", "text"), [
    ({"codes": "A5"}, r"^codes must be one of FP16, MX8, A8, A4, not 'A5'$"),
    ({"scale": "e5m2"}, r"^scale must be one of e4m3, power_of_two, int4, fp32, not 'e5m2'$"),
    ({"static": "image"}, r"^static must be one of None, tensor, step, channel, not 'image'$"),
    ({"group": 0}, r"^group must be an integer in 1\.\.32768 or None, not 0$"),
    ({"clip": 1}, r"^clip must be one of True, False, not 1$"),
])
def test_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        Policy(name="", **options)


def test_policy_from_json():
    fields = dataclasses.asdict(POLICIES["int4-vsq"])
    assert Policy.from_json(fields) == POLICIES["int4-vsq"]
    for bad in ({**fields, "more": 1}, {}, None):
        with pytest.raises(ValueError, match=r"^policy must be an object with the fields name, "):
            Policy.from_json(bad)


@pytest.mark.parametrize(("name", "format", "activation", "weight"), [
    ("fp16", "FP16", 16, 16),
    ("mixed", "IN16", 16, 8 + 8 * 2 / 64),
    ("mixed", "MX8", 8 + 8 / 32, 8 + 8 * 2 / 64),
    ("mixed", "A4U", 4 + 8 / 64, 4 + 8 / 64),
    ("int4-vsq", "A4U", 4 + 4 / 16, 4 + 4 / 16 + 32 / (64 * 9)),
    ("int4", "A4S", 4 + 32 / (64 * 64), 4 + 32 / (64 * 9 * 32)),
    ("int8", "A8U", 8 + 32 / (64 * 64), 8 + 32 / (64 * 9)),
])
def test_bits_of_an_element(name, format, activation, weight):
    assert policy.bits_of(format, POLICIES[name], shape()) == pytest.approx((activation, weight))


@pytest.mark.parametrize(("channels", "kernel", "exponents"), [(1, 3, 1), (4, 3, 2), (3, 1, 1)])
def test_weights_of_an_input_layer_share_exponents_between_taps(channels, kernel, exponents):
    bits = policy.bits_of("IN16", POLICIES["mixed"], shape(channels, kernel=kernel))
    assert bits == pytest.approx((16, 8 + 8 * exponents / (channels * kernel ** 2)))


@pytest.mark.parametrize(("options", "operations"), [
    ({}, 9),                                          # a scale for every pixel and tap
    ({"group": 16, "weight_group": 16}, 9 * 4),
    ({"block": 4, "weight_taps": "shared"}, 2.25),    # blocks that a window of 3x3 touches
    ({"block": None}, 9),
    ({"block": None, "weight_taps": "shared"}, 0),    # all in the epilogue
    ({"static": "channel", "weight_taps": "shared"}, 64),
    ({"static": "step", "group": 16}, 9),
])
def test_scale_operations(options, operations):
    found = policy.scale_operations(Policy(name="", **options), {"layer": "A4U"}, [shape()])
    assert found == pytest.approx(operations)


def test_totals():
    """The paper's 3.78: 5.8 % of the MACs in MXINT8, cost linear in bits."""
    shapes = [shape(name="a", cout=942), shape(name="b", cout=58)]
    formats = {"a": "A4U", "b": "MX8"}
    assert policy.macs_share(formats, shapes) == pytest.approx(0.058)
    assert 1 / policy.cost(formats, shapes) == pytest.approx(3.78, abs=0.005)
    bits, half = policy.memory(POLICIES["fp16"], dict.fromkeys("ab", "FP16"), shapes)
    assert bits == half == 16 * (2 * 64 * 64 + 64 * 9 * 1000)


def test_presets_have_formats():
    """Names of the large networks' layers lead to formats too, without their weights."""
    from golden.network import build

    for architecture in (*PRESETS.values(), *ARCHITECTURES.values()):
        with torch.device("meta"):
            unet = build(architecture)
        found = policy.formats(unet, POLICIES["mixed"], policy.paper(unet))
        shapes = layer_shapes(unet)
        assert 0 < policy.macs_share(found, shapes) < 0.3
        assert policy.macs_share(found, shapes, ("A4U", "A4S")) > 0.7
