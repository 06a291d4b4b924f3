"""The quantized model: policy, agreement of its two executions, labels, files and their damage."""

import dataclasses
import itertools
import json
import re

import pytest
import safetensors.torch
import torch

from golden import checkpoint, convolution, detector, layer, mxint8, quantize
from golden.checkpoint import ModelError
from golden.fake import one_hot
from golden.gather import gather, scatter_weights
from golden.network import Precond, layer_shapes
from golden.policy import POLICIES
from golden.quantized_network import (
    centred, evaluate, executing, layer_calls, prepare, trajectory)
from golden.recipes import mnist32
from golden.requantizer import Format, slots
from golden.sampler import draw_noise, evaluations, sample
from golden.scatter import add_planes
from tests import networks

# Both resampling directions, concatenated skips that end inside a word, and attention.
ARCHITECTURE = dataclasses.replace(mnist32.architecture, resolution=8, model_channels=12,
                                   channel_mult=(1, 2), attention_resolutions=(4,))
STEPS = 3


def make(architecture=ARCHITECTURE, seed=0):
    torch.manual_seed(seed)
    model = Precond(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.03)
    return model.half().float().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def float_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    checkpoint.save_model(path, make(), {"recipe": "tiny", "steps": 5})
    return path


@pytest.fixture(scope="module")
def model(float_path):
    return quantize.quantize(float_path, mxint8="paper", images=2, steps=STEPS)


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "quantized.safetensors"
    quantize.save(model, path)
    return path


def equal_calls(one, other):
    """Whether two LayerCalls, ChannelLists, or their parts, hold the same integers."""
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(a):
            same = equal_calls(a, b)
        elif isinstance(a, list):
            same = len(a) == len(b) and all(map(torch.equal, a, b))
        elif isinstance(a, torch.Tensor):
            same = torch.equal(a, b)
        else:
            same = a == b
        if not same:
            return False
    return True


def test_policy_of_mnist32():
    with torch.device("meta"):
        formats = quantize.formats(Precond(mnist32.architecture).unet)
    assert list(formats)[0] == "first" and formats.pop("first") == Format.IN16
    assert [name for name, format in formats.items() if format == Format.MX8] == [
        "encoder.32x32_block0.conv0", "encoder.32x32_block0.conv1",
        "decoder.32x32_block1.conv1", "last"]
    signed = [name for name, format in formats.items() if format == Format.A4S]
    assert signed and all(name.endswith(".skip") for name in signed)


def test_policy_with_attention(model):
    assert {name: item.format.name for name, item in model.layers.items()
            if not name.endswith(("conv0", "conv1"))} == {
        "first": "IN16", "encoder.4x4_block0.skip": "A4S", "encoder.4x4_block0.qkv": "A4S",
        "encoder.4x4_block0.proj": "A4S", "decoder.4x4_block0.skip": "A4S",
        "decoder.4x4_block1.skip": "A4S", "decoder.4x4_block1.qkv": "A4S",
        "decoder.4x4_block1.proj": "A4S", "decoder.8x8_block0.skip": "A4S",
        "decoder.8x8_block1.skip": "A4S", "last": "MX8"}


@pytest.mark.parametrize("vector", [16, 32])
def test_executions_agree_layer_by_layer(model, vector):
    """On the same input, a layer's integers are its fake quantization within 40 dB.

    The difference is a code at a rounding tie now and then: at most 1 % of the codes that are 0
    in one are not in the other.
    """
    noise = draw_noise(1, model.architecture, 7)
    inputs = {}

    def run(network_layer, segments, embedding, residual, gain, modulation):
        item = model.layers[network_layer.name]
        right = model.run_layer(network_layer, segments, embedding, residual, gain,
                                modulation, inputs.__setitem__)
        call = layer.LayerCall(
            item.name, 0, *prepare(item, network_layer, segments, residual, gain, 0, vector))
        result = layer.run(call, torch.zeros(item.slots(vector), dtype=torch.bool), vector)
        out = item.network_output(result.output)
        assert quantize.sqnr(right, out) > 40, item.name
        assert result.saturations == 0 and result.output.abs().max() < 32767, item.name
        if item.format != Format.IN16:
            codes = result.codes.codes[slots(list(item.segments), vector)[0]]
            differ = (codes == 0) != (inputs[item.name][0] == 0)
            assert differ.double().mean() < 0.01, item.name
        return out

    with executing(model.float_model.unet, run):
        model.float_model(noise * 80, 80.0)
    assert list(inputs) == list(model.layers)


def test_integer_evaluation_is_as_good_as_the_float_one(model):
    _, states = trajectory(model, draw_noise(1, model.architecture, 3))
    for evaluation, x in zip(evaluations(STEPS), states, strict=True):
        right = model.float_model(x, evaluation.sigma)
        integer = quantize.sqnr(right, evaluate(model, x, evaluation.index).denoised)
        fake = quantize.sqnr(right, model(x, evaluation.sigma))
        assert min(integer, fake) > 10
        assert abs(integer - fake) < 3


def test_layer_calls_run_alone(model):
    """What a bench gets are the calls of the integer execution, and they stand on their own."""
    x = draw_noise(1, model.architecture, 3) * 80
    done = evaluate(model, x, 1)
    calls = layer_calls(model, x, 1)
    assert [call.name for call in calls] == list(model.layers)
    for call, same, result in zip(calls, done.calls, done.results, strict=True):
        assert equal_calls(call, same)
        item = model.layers[call.name]
        counts = (model.detector().read(call.detector_base, item.slots(16))
                  if item.sparse_capable else None)
        again = layer.run(call, counts, 16)
        assert torch.equal(again.output, result.output)
        assert all(map(equal_calls, again.lists, result.lists))
        assert torch.equal(again.codes.scales, result.codes.scales)


def test_resampling_layers_get_an_identity(model):
    calls = {call.name: call.requantization for call in
             layer_calls(model, draw_noise(1, model.architecture) * 80, 0)}
    for name in ("encoder.4x4_down.conv0", "decoder.8x8_up.conv0"):
        item = model.layers[name]
        assert set(calls[name].gain.tolist()) == {0, 128} and not calls[name].offset.any()
        assert calls[name].shift == 0 and calls[name].relu
        assert item.tensor_scale == 2.0 ** (item.prologue_exponent + 3)
        assert calls[name].segments[0].shape == (sum(item.segments), item.height, item.width)


@pytest.mark.parametrize(("name", "gathered"), [
    ("relu", {"first": 1}), ("residual", {"first": 3, "encoder.4x4_aux_residual": 3}),
    ("skip", {"first": 3})])
def test_input_layers_are_gathered(name, gathered):
    """3x3 layers of IN16 run as 1x1 layers of 9 times as many channels; their MACs stay."""
    model = quantize.quantize_model(networks.make(name), {}, policy="mxint8", images=1, steps=2)
    shapes = {shape.name: shape for shape in layer_shapes(model.float_model.unet)}
    assert {item.name: len(item.zeros[0]) for item in model.layers.values()
            if item.gathered} == gathered
    found = {call.name: call for call in layer_calls(
        model, draw_noise(1, model.architecture) * 80, 0)}
    for item in model.layers.values():
        assert item.macs == shapes[item.name].macs
        channels, kernel = sum(shapes[item.name].segments), shapes[item.name].kernel
        r, c = found[item.name].requantization, found[item.name].convolution
        assert item.kernel == c.kernel == (
            1 if item.name in gathered or item.scattered else kernel)
        if item.name in gathered:
            assert kernel == 3 and item.format == Format.IN16
            assert item.segments == (9 * channels,) and len(r.segments) == 1
            image = r.segments[0][4 * channels:5 * channels]
            assert image.any() and r.segments[0].equal(gather(image))
            weights = scatter_weights(item.weight(), 3)
            layer = model.float_model.unet.get_submodule(item.name)
            assert weights.equal(mxint8.fake_quantize_input_weights(layer.weight))


@pytest.mark.parametrize(("name", "scattered"), [
    ("relu", ["last"]), ("residual", ["last"]), ("skip", []), ("diffusers", ["last"])])
@pytest.mark.parametrize("policy", ["mxint8", "mixed"])
def test_output_layer_is_scattered(name, scattered, policy):
    """The 3x3 layer of the output runs as a 1x1 layer with the same codes, scales and MACs."""
    model = quantize.quantize_model(networks.make(name), {}, policy=policy, images=1, steps=2,
                                    mxint8="none")
    assert [item.name for item in model.layers.values() if item.scattered] == scattered
    item, network_layer = model.layers["last"], model.float_model.unet.last
    shape = layer_shapes(model.float_model.unet)[-1]
    count = network_layer.cout
    assert item.macs == shape.macs and item.segments == shape.segments
    done = evaluate(model, draw_noise(1, model.architecture) * 80, 0)
    call, result = done.calls[-1], done.results[-1]
    if not scattered:
        assert item.kernel == 3 and result.output.shape[0] == count
        return
    assert item.kernel == call.convolution.kernel == 1 and call.convolution.residual is None
    assert len(result.output) == 9 * count
    codes, scales, unit = quantize.encode_weights(item.format, network_layer.weight)
    assert unit == item.weight_unit
    for tap, k in itertools.product(range(9), range(count)):
        plane = tap * count + k
        assert item.weight_codes[plane, :, 0, 0].equal(codes[k, :, tap // 3, tap % 3])
        assert item.weight_scales[plane, 0].equal(scales[k, tap])
        right = network_layer.bias[k] * 2.0 ** (16 - item.exponent) if tap == 4 else 0
        assert abs(item.bias[0, plane] - right) <= 0.5


@pytest.mark.parametrize("name", ["relu", "residual"])
def test_planes_round_once_each(name):
    """Beside the exact sum of the 3x3 layer: half a step of a plane for every tap in the image."""
    model = quantize.quantize_model(networks.make(name), {}, policy="mxint8", images=1, steps=2)
    item, unet = model.layers["last"], model.float_model.unet
    segments = [torch.randn(1, sum(item.segments), 8, 8, generator=torch.manual_seed(5))]
    passes = prepare(item, unet.last, segments, None, 1.0, 0)
    result = layer.run(layer.LayerCall("last", 0, *passes), None, 16)
    c, count = passes[1], unet.last.cout
    assert result.output.abs().max() < 32767
    weights, scales, _ = quantize.encode_weights(item.format, unet.last.weight)
    weights = item.spread(weights.long(), 16, dim=1)
    acc = convolution.accumulate(result.codes, weights, scales.long()).double()
    # In units of 2^exponent. The multiplier is a power of two: its only error is in the bias.
    right = acc * c.multiplier[:count, None, None] * 2.0 ** -(c.align_shift + c.scale_shift + 16)
    right += c.bias[4 * count:5 * count, None, None] / 65536
    taps = torch.tensor([2, 3, 3, 3, 3, 3, 3, 2])
    error = (add_planes(result.output) - right).abs()
    # And half a unit of 2^-16, or of the alignment, in each.
    assert (error <= taps[:, None] * taps * (0.5 + 2.0 ** -12)).all()
    assert error.max() > 0.5                                 # more than one rounding makes


def test_means_leave_the_input_of_1x1_layers(model):
    """Signed codes are of the difference to each channel's mean; the result stays what it was."""
    layers = {item.name: item for item in model.float_model.unet.layers()}
    assert {name for name, item in layers.items() if centred(item)} == {
        name for name, item in model.layers.items() if item.format == Format.A4S}
    name = "decoder.8x8_block0.skip"
    network_layer, item = layers[name], model.layers[name]
    x = [100 + torch.randn(1, channels, 8, 8) for channels in item.segments]
    exponents = tuple(-8 for _ in x)
    item = dataclasses.replace(item, segment_exponents=exponents, exponent=0,
                               bias=(network_layer.bias * 65536).int()[None])
    requantization, convolution = prepare(item, network_layer, x, None, 1.0, 0)
    gain, offset = requantization.gain, requantization.offset
    y = torch.cat(requantization.segments)
    used = slots(list(item.segments), 16)[0]
    y = y * gain[used][:, None, None] / 2 ** requantization.shift + offset[used][:, None, None]
    assert y.mean((1, 2)).abs().max() < 1e-3 * y.abs().mean()
    constant = network_layer(x).mean((0, 2, 3))
    torch.testing.assert_close(convolution.bias / 65536, constant.double(), atol=1e-2, rtol=0,
                               check_dtype=False)


def test_bias_holds_the_embedding_of_its_evaluation(model):
    unet = model.float_model.unet
    block, item = unet.encoder["8x8_block0"], model.layers["encoder.8x8_block0.conv0"]
    for evaluation in evaluations(STEPS):
        c_noise = torch.tensor([evaluation.sigma]).log() / 4
        right = block.affine(unet.embed(c_noise))[0] + block.conv0.bias
        found = item.bias[evaluation.index] * 2.0 ** (item.exponent - 16)
        torch.testing.assert_close(found.float(), right, atol=1e-5, rtol=1e-4)
    assert len(model.layers["encoder.8x8_block0.conv1"].bias) == 1


def test_lists_follow_the_detector(model):
    """Lists come from the counts before the evaluation: at 0, those of the calibration."""
    _, states = trajectory(model, draw_noise(1, model.architecture, 5))
    counts = model.detector()
    thresholds = quantize.fixed(model)
    before = counts.counts.clone()
    for evaluation in (0, 1):
        done = evaluate(model, states[evaluation], evaluation, counts, thresholds=thresholds)
        kept = before.clone()
        for call, result in zip(done.calls, done.results, strict=True):
            item = model.layers[call.name]
            if not item.sparse_capable:
                assert call.threshold == detector.NEVER
                assert all(map(equal_calls, result.lists,
                               detector.natural_lists(result.codes.valid)))
                continue
            assert call.threshold == 19661
            window = slice(call.detector_base, call.detector_base + item.slots(16))
            labels = detector.labels(before[window], item.height * item.width, 19661,
                                     result.codes.valid)
            lists = detector.threshold_lists(labels, result.codes.valid, 16, 64)
            assert all(map(equal_calls, result.lists, lists))
            kept[window] = result.zero_counts
        assert torch.equal(counts.counts, kept)
        before = kept
    evaluate(model, states[1], 1, counts, interval=2)
    assert torch.equal(counts.counts, before)


def test_calls_are_adjusted_before_they_run(model):
    """Costs and tiles of a core change the lists and nothing else."""
    x = draw_noise(1, model.architecture, 5) * 80
    costs = detector.Costs(16, 4, 8, 16)
    right = evaluate(model, x, 0)
    done = evaluate(model, x, 0, adjust=lambda call: dataclasses.replace(
        call, balance=costs, tile_channels=32))
    alone = evaluate(model, x, 0, dense=False)
    balanced = 0
    for call, *results in zip(done.calls, done.results, alone.results, right.results, strict=True):
        item = model.layers[call.name]
        assert (call.balance, call.tile_channels) == (costs, 32)
        for result in results[:2]:
            assert torch.equal(result.output, results[2].output)
        if item.sparse_capable:
            counts = item.spread(item.zeros[0].long(), 16)
            lists = detector.balanced_lists(counts, item.height * item.width, costs,
                                            results[0].codes.valid, 16, 32)
            assert all(map(equal_calls, results[0].lists, lists))
            assert not any(entry.low or entry.high for entry in results[1].lists)
            balanced += any(entry.cut for entry in results[0].lists)
    assert torch.equal(done.denoised, right.denoised) and balanced


def test_detector_entries_follow_each_other(model):
    bases = model.bases()
    four = [name for name, item in model.layers.items() if item.sparse_capable]
    ends = [bases[name] + model.layers[name].slots(16) for name in four]
    assert [bases[name] for name in four] == [0, *ends[:-1]]
    assert len(model.detector().counts) == ends[-1]


def test_balance_beats_both_extremes(model):
    assert set(quantize.balance(model, 128, 0).values()) == {detector.NEVER}
    sparse = quantize.balance(model, 1, 1 << 20)
    assert all((sparse[name] == 0) == item.sparse_capable for name, item in model.layers.items())
    item = next(item for item in model.layers.values() if item.sparse_capable)
    pixels, cin, outputs = item.height * item.width, sum(item.segments), len(item.weight_codes)
    # Half of the channels are all zeros: only they go to a side that is a quarter as fast.
    zeros = torch.zeros_like(item.zeros)
    zeros[:, :cin // 2] = pixels
    changed = dataclasses.replace(item, zeros=zeros)
    stand = type(model)(model.float_model, {item.name: changed}, {}, STEPS)
    threshold = quantize.balance(stand, 4 * outputs, outputs)[item.name]
    assert 0 < threshold <= 65536


def test_zero_fractions(model):
    noise = draw_noise(2, model.architecture)
    counts = quantize.zero_counts(model, noise)
    for name, item in model.layers.items():
        assert torch.equal((counts[name].double() / 2).round().int(), item.zeros), name
    assert 0.2 < quantize.zero_fraction(model) < 0.9


def test_sqnr():
    assert quantize.sqnr(torch.tensor([3.0]), torch.tensor([3.3])) == pytest.approx(20, abs=1e-4)
    assert quantize.sqnr(torch.ones(2), torch.ones(2)) == float("inf")


def test_denoiser_sqnr(model):
    found = quantize.denoiser_sqnr(model, draw_noise(2, model.architecture, 9))
    assert len(found) == len(evaluations(STEPS)) and min(found) > 10


def test_round_trip(model, path):
    loaded = quantize.load(path)
    assert loaded.steps == STEPS and loaded.record == model.record
    assert {name: loaded.record[name] for name in ("recipe", "steps")} == {
        "recipe": "tiny", "steps": 5}
    assert list(loaded.layers) == list(model.layers)
    for name, item in model.layers.items():
        assert equal_calls(loaded.layers[name], item), name
    x = draw_noise(1, model.architecture, 3) * 80
    for one, other in zip(layer_calls(model, x, 2), layer_calls(loaded, x, 2), strict=True):
        assert equal_calls(one, other)
    again = path.with_name("again.safetensors")
    quantize.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()
    noise = draw_noise(1, model.architecture, 3)
    assert torch.equal(sample(model, noise, 2), sample(loaded, noise, 2))


def test_quantizing_a_quantized_file_starts_from_its_floats(model, path):
    again = quantize.quantize(path, mxint8="paper", images=2, steps=STEPS)
    assert all(equal_calls(again.layers[name], item) for name, item in model.layers.items())


def expect(path, text):
    with pytest.raises(ModelError, match="^" + re.escape(f"{path}: {text}") + "$"):
        quantize.load(path)


def damage(path, change):
    """Rewrite the file after `change` (tensors, quantized part of the record)."""
    tensors, record = checkpoint.read_file(path)
    change(tensors, record["quantized"])
    safetensors.torch.save_file(tensors, path, {"sqdm": json.dumps(record)})


def test_float_file_is_not_quantized(float_path):
    expect(float_path, "must be a quantized model, not a float one: quantize it first")


def test_unknown_model():
    with pytest.raises(ModelError, match=r"^model must be one of .* or an existing file or folder, "
                                         r"not 'mnist33'$"):
        quantize.load("mnist33")


def test_truncated_file(path):
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="^" + re.escape(str(path))
                       + r": must be a whole safetensors file \([^\n]+\)$"):
        quantize.load(path)


def test_wrong_kind(path):
    tensors, record = checkpoint.read_file(path)
    safetensors.torch.save_file(tensors, path, {"sqdm": json.dumps({**record, "kind": "other"})})
    expect(path, "must be a \"sqdm float model\", not 'other'")


def test_nan_weight(path):
    damage(path, lambda tensors, record: tensors["unet.first.weight"].fill_(float("nan")))
    expect(path, "tensor unet.first.weight must be finite, not NaN or infinite")


CONV1 = "encoder.4x4_down.conv1"


@pytest.mark.parametrize("field, change, text", [
    ("weight_codes", lambda value: None, "is missing"),
    ("weight_codes", lambda value: value[:1].contiguous(),
     "must have shape (12, 12, 3, 3), not (1, 12, 3, 3)"),
    ("weight_codes", lambda value: value.int(), "must be torch.int8, not torch.int32"),
    ("weight_codes", lambda value: torch.full_like(value, 8), "must be in -7..7, not 8..8"),
    ("weight_scales", lambda value: torch.full_like(value, 127), "must be in 0..126, not 127..127"),
    ("multiplier", lambda value: torch.full_like(value, -1), "must be in 0..32767, not -1..-1"),
    ("zeros", lambda value: torch.full_like(value, 17), "must be in 0..16, not 17..17"),
    ("more", lambda value: torch.zeros(1), "must not be there: the network has no such layer"),
])
def test_damaged_tensor(path, field, change, text):
    key = f"quantized.{CONV1}.{field}"

    def edit(tensors, record):
        value = change(tensors.pop(key, None))
        if value is not None:
            tensors[key] = value

    damage(path, edit)
    expect(path, f"tensor {key} {text}")


@pytest.mark.parametrize("field, value, text", [
    ("format", "A4S", f"format of {CONV1} must be A4U or MX8, not 'A4S'"),
    ("tensor_scale", 0, f"tensor_scale of {CONV1} must be a positive number, not 0"),
    ("tensor_scale", None, f"tensor_scale of {CONV1} must be a positive number, not None"),
    ("align_shift", 32, f"align_shift of {CONV1} must be an integer in 0..31, not 32"),
    ("align_shift", 1.5, f"align_shift of {CONV1} must be an integer in 0..31, not 1.5"),
    ("segment_exponents", 3, f"segment_exponents of {CONV1} must be integers in -120..100, not 3"),
    ("segment_exponents", [1, 2],
     f"segment_exponents of {CONV1} must be 1 integers, not [1, 2]"),
    ("prologue_exponent", -9,
     (f"prologue_exponent of {CONV1} must be there if the host makes its input, "
      "and only then")),
])
def test_damaged_number(path, field, value, text):
    damage(path, lambda tensors, record: record["layers"][CONV1].update({field: value}))
    expect(path, text)


def ungather(tensors, record):
    """The layer `first` as in files of versions 1 and 2: 3x3, with an exponent for each tap."""
    record["version"] = 2
    codes, scales, unit = mxint8.quantize_weights(tensors["unet.first.weight"].float())
    assert unit == record["layers"]["first"]["weight_unit"]
    tensors["quantized.first.weight_codes"] = codes.to(torch.int8)
    tensors["quantized.first.weight_scales"] = scales.to(torch.uint8)
    collect(tensors, record)


def collect(tensors, record):
    """The layer `last` as in those files: 3x3, in other units than its planes have."""
    table = record["layers"]["last"]
    codes, scales, bias = (tensors[f"quantized.last.{field}"] for field in (
        "weight_codes", "weight_scales", "bias"))
    tensors["quantized.last.weight_codes"] = codes.reshape(3, 3, 1, -1).permute(
        2, 3, 0, 1).contiguous()
    tensors["quantized.last.weight_scales"] = scales.reshape(9, 1, -1).transpose(0, 1).contiguous()
    tensors["quantized.last.bias"] = 4 * bias[:, 4:5].contiguous()
    tensors["quantized.last.multiplier"] = torch.tensor([20000], dtype=torch.int16)
    table.update(exponent=table["exponent"] - 2, align_shift=3, scale_shift=5)


def test_version_2(path, model):
    """Input layers are gathered again from the float weights; the output layer is scattered."""
    damage(path, ungather)
    loaded = quantize.load(path)
    assert all(equal_calls(loaded.layers[name], item) for name, item in model.layers.items()
               if name != "last")
    found, item = loaded.layers["last"], model.layers["last"]
    assert found.scattered and found.kernel == 1 and found.weight_unit == item.weight_unit
    assert found.weight_codes.equal(item.weight_codes)
    assert found.weight_scales.equal(item.weight_scales)
    for evaluation, x in enumerate(trajectory(model, draw_noise(1, model.architecture, 3))[1]):
        right, other = (evaluate(m, x, evaluation).denoised for m in (model, loaded))
        assert quantize.sqnr(right, other) > 50
    damage(path, lambda tensors, record: record["layers"]["last"].update(tensor_scale=2.0 ** 120))
    with pytest.raises(ModelError, match=r"^.*: scales of last must leave its results below "
                                         r"2\^100, not \d\.\d+e\+3\d$"):
        quantize.load(path)


def test_weights_of_version_2_belong_to_the_floats(path):
    damage(path, ungather)
    damage(path, lambda tensors, record: record["layers"]["first"].update(weight_unit=2.0 ** -40))
    with pytest.raises(ModelError, match=r"^.*: weight_unit of first must be that of its float "
                                         r"weights, [^ ]+, not 9\.\d+e-13$"):
        quantize.load(path)


def test_version_1(path, model):
    """Files from before there were policies: those of the policy mixed."""
    def edit(tensors, record):
        ungather(tensors, record)
        record["version"] = 1
        del record["policy"], record["label"]

    damage(path, edit)
    loaded = quantize.load(path)
    assert loaded.policy == POLICIES["mixed"] and loaded.label is None
    assert all(equal_calls(loaded.layers[name], item) for name, item in model.layers.items()
               if name != "last")


@pytest.mark.parametrize(("field", "value", "text"), [
    ("policy", {}, r"policy must be an object with the fields name, .*"),
    ("label", 0, r"label must not be given: the network has no classes, not 0"),
])
def test_damaged_policy(path, field, value, text):
    damage(path, lambda tensors, record: record.update({field: value}))
    with pytest.raises(ModelError, match=f"^{re.escape(str(path))}: {text}$"):
        quantize.load(path)


def test_damaged_head(path):
    damage(path, lambda tensors, record: record.update(steps=0))
    expect(path, "steps must be an integer in 1..1000, not 0")
    damage(path, lambda tensors, record: record.update(steps=STEPS, version=4))
    expect(path, "version of the quantized part must be in 1..3, not 4")
    damage(path, lambda tensors, record: record.update(version=3, layers={}))
    expect(path, "quantized layers must be those of the network")


def test_power_of_two_scales_are_checked(path):
    damage(path, lambda tensors, record: record["layers"]["last"].update(tensor_scale=0.3))
    expect(path, "tensor_scale of last must be a power of two, not 0.3")


def test_missing_number(path):
    damage(path, lambda tensors, record: record["layers"]["last"].pop("exponent"))
    with pytest.raises(ModelError, match=r"^.*: metadata of the quantized part must be whole "
                                         r"\(KeyError: 'exponent'\)$"):
        quantize.load(path)


@pytest.mark.parametrize("name", ["silu", "residual", "skip", "adm", "diffusers"])
def test_families(name, tmp_path):
    """Both executions of every family, from the file: equally far from float."""
    label = 2 if name == "adm" else None
    model = quantize.quantize_model(networks.make(name), {}, policy="mxint8", images=1, steps=2,
                                    label=label)
    path = tmp_path / "model.safetensors"
    quantize.save(model, path)
    loaded = quantize.load(path)
    assert loaded.label == label and loaded.policy == model.policy
    for one, other in zip(loaded.layers.values(), model.layers.values(), strict=True):
        assert equal_calls(one, other)
    assert {item.name for item in loaded.layers.values() if item.modulation is not None} == {
        layer for layer in model.layers if name == "adm" and layer.endswith(".conv1")}
    _, states = trajectory(loaded, draw_noise(1, model.architecture, 3))
    labels = one_hot(label, model.architecture)
    for evaluation, x in zip(loaded.schedule, states, strict=True):
        right = loaded.float_model(x, evaluation.sigma, labels)
        integer = quantize.sqnr(right, evaluate(loaded, x, evaluation.index).denoised)
        fake = quantize.sqnr(right, loaded(x, evaluation.sigma))
        assert min(integer, fake) > 20 and abs(integer - fake) < 3


@pytest.mark.parametrize("policy", ["int4-vsq", "int8", "int4"])
def test_policies_without_integers(policy, tmp_path):
    model = quantize.quantize_model(make(), {"recipe": "tiny"}, policy=policy, images=1, steps=2,
                                    mxint8="last" if policy == "int4-vsq" else None)
    assert (model.formats["last"] == "MX8") == (policy == "int4-vsq")
    path = tmp_path / "model.safetensors"
    quantize.save(model, path)
    loaded = quantize.load(path)
    assert loaded.formats == model.formats and loaded.policy == model.policy
    assert loaded.record == model.record and loaded.clips == model.clips
    x = draw_noise(1, model.architecture, 3)
    assert quantize.sqnr(model(x, 1.0), loaded(x, 1.0)) > 60
    for name, amax in model.amax.items():
        assert torch.equal(loaded.amax[name], amax)
    with pytest.raises(ModelError, match=rf"^{re.escape(str(path))}: must be in formats that the "
                                         rf"accelerator has, not by policy {policy}$"):
        quantize.load_executable(path)
    damage(path, lambda tensors, record: record["layers"]["last"].update(clip=2.0))
    expect(path, "clip of last must be a number above 0 and at most 1, not 2.0")
    damage(path, lambda tensors, record: (
        record["layers"]["last"].update(clip=1.0),
        tensors["quantized.last.amax"].fill_(float("nan"))))
    with pytest.raises(ModelError, match=r"tensor quantized.last.amax must be in 0\.\.1e\+30, "):
        quantize.load(path)


@pytest.mark.parametrize(("options", "text"), [
    ({"policy": "int5"}, r"policy must be one of fp16, .*, not 'int5'"),
    ({"policy": "int8", "mxint8": "paper"}, r"mxint8 must be none for policy int8, not 'paper'"),
    ({"mxint8": "absent"}, r"mxint8 must be paper, none, auto, or .*, not 'absent'"),
    ({"mxint8": "paper", "budget": 0.1},
     r"budget must be given with mxint8 auto only, not with 'paper'"),
    ({"mxint8": "auto", "budget": 2}, r"budget must be in 0\.\.1, not 2"),
    ({"label": 1}, r"label must not be given: the network has no classes, not 1"),
])
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        quantize.quantize_model(make(), {}, images=1, steps=2, **options)


def test_summary(model):
    found = quantize.summary(model)
    assert found["policy"] == "mixed" and found["executable"]
    by_name = {layer["name"]: layer for layer in found["layers"]}
    assert {name: layer["format"] for name, layer in by_name.items()} == model.formats
    assert found["macs"] == sum(item.macs for item in model.layers.values())
    assert by_name["encoder.4x4_down.conv1"]["activation_bits"] == pytest.approx(4.6667)
    four, eight, sixteen = (sum(
        item.macs for item in model.layers.values() if item.format in group) / found["macs"]
        for group in ((Format.A4U, Format.A4S), (Format.MX8,), (Format.IN16,)))
    assert found["compute_saved"] == pytest.approx(1 - four / 4 - eight / 2 - sixteen, abs=1e-4)
    assert found["mxint8"] == pytest.approx(eight, abs=1e-5)
    assert 0.5 < found["memory_saved"] < 0.75
    assert all(layer["sqnr_db"] > 5 for layer in found["layers"])


def test_bad_evaluation(model):
    x = draw_noise(2, model.architecture)
    with pytest.raises(ValueError, match=r"^evaluation must be in 0\.\.4, not 5$"):
        evaluate(model, x[:1], 5)
    with pytest.raises(ValueError, match=r"^x must be one image, not 2$"):
        evaluate(model, x, 0)


def test_shipped_model():
    """It loads, is small, and its calibration says what docs/quantization.md says."""
    path = quantize.resolve("mnist32")
    assert path.stat().st_size < 8_000_000
    model = quantize.load("mnist32")
    assert model.architecture == mnist32.architecture and model.steps == 18
    assert quantize.shipped() == ["mnist32", "mnist32-silu"]
    assert quantize.zero_fraction(model) == pytest.approx(0.655, abs=5e-4)
    wide = {name: item.format.name for name, item in model.layers.items()
            if not item.sparse_capable}
    assert wide == {"first": "IN16", "encoder.32x32_block0.conv0": "MX8", "last": "MX8"}
    assert quantize.summary(model)["mxint8"] < 0.034
