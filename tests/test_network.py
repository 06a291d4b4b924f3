"""The network against naive forms of EDM's equations, and against the buffers of the hardware."""

import dataclasses
import math
import re

import pytest
import torch
from torch.nn import functional

from golden import network, recipes
from golden.network import Architecture, Layer, Precond

TINY = Architecture(img_channels=2, resolution=8, model_channels=16, channel_mult=(1, 2),
                    num_blocks=1, attention_resolutions=(4,), middle_attention=True)


def randomize(module, seed=0):
    """Give every weight a value, the ones that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def naive_layer(layer, segments, embedding, residual, gain):
    """`Layer.forward` in float64, written out: a loop over groups, slices, a loop over taps."""
    x = torch.cat(segments, 1).double()
    n, channels, height, width = x.shape
    if layer.norm is not None:
        size = channels // layer.norm.num_groups
        for first in range(0, channels, size):
            group = x[:, first:first + size]
            mean = group.mean((1, 2, 3), keepdim=True)
            variance = ((group - mean) ** 2).mean((1, 2, 3), keepdim=True)
            x[:, first:first + size] = (group - mean) / torch.sqrt(variance + 1e-6)
        x = x * layer.norm.weight.double()[:, None, None] + layer.norm.bias.double()[:, None, None]
    if layer.activation == "relu":
        x = x.clamp(min=0)
    elif layer.activation == "silu":
        x = x / (1 + torch.exp(-x))
    if layer.resample == "down":
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    elif layer.resample == "up":
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    height, width = x.shape[2:]
    reach = layer.kernel // 2
    padded = functional.pad(x, (reach,) * 4)
    total = torch.zeros(n, layer.cout, height, width, dtype=torch.float64)
    for dy in range(layer.kernel):
        for dx in range(layer.kernel):
            window = padded[:, :, dy:dy + height, dx:dx + width]
            total += torch.einsum("nchw,kc->nkhw", window, layer.weight[:, :, dy, dx].double())
    total += layer.bias.double()[:, None, None]
    if embedding is not None:
        total += embedding.double()[:, :, None, None]
    if residual is not None:
        total += residual.double()
    return total * gain


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("mode", [None, "up", "down"])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("split", [(48,), (32, 16)])
def test_layer_equals_naive_form(activation, mode, kernel, split):
    layer = randomize(Layer(48, 20, kernel, norm=activation is not None, activation=activation,
                            resample=mode))
    generator = torch.Generator().manual_seed(1)
    segments = [torch.randn(2, channels, 6, 4, generator=generator) for channels in split]
    size = {None: (6, 4), "up": (12, 8), "down": (3, 2)}[mode]
    residual = torch.randn(2, 20, *size, generator=generator)
    embedding = torch.randn(2, 20, generator=generator)
    for extra in ((None, None, 1.0), (embedding, None, 1.0), (None, residual, math.sqrt(0.5))):
        got = layer(segments, *extra)
        torch.testing.assert_close(got.double(), naive_layer(layer, segments, *extra),
                                   rtol=1e-4, atol=1e-4)


def test_precond_equals_table_1_of_edm():
    model = randomize(Precond(TINY))
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    sigmas, data = [0.002, 0.6, 80.0], 0.5
    got = model(x, torch.tensor(sigmas))
    for n, sigma in enumerate(sigmas):
        raw = model.unet(x[n:n + 1] / math.sqrt(sigma ** 2 + data ** 2),
                         torch.tensor([math.log(sigma) / 4]))
        expected = (data ** 2 / (sigma ** 2 + data ** 2) * x[n]
                    + sigma * data / math.sqrt(data ** 2 + sigma ** 2) * raw[0])
        torch.testing.assert_close(got[n], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x[n:n + 1], sigma)[0], got[n], rtol=1e-4, atol=1e-4)


def test_unet_equals_naive_layers_and_blocks():
    unet = randomize(network.UNet(TINY)).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    c_noise = torch.tensor([-0.7, 0.4], dtype=torch.float64)

    frequencies = [1e-4 ** (n / 7) for n in range(8)]
    vector = torch.stack([torch.tensor([math.sin(c * f) for f in frequencies]
                                       + [math.cos(c * f) for f in frequencies],
                                       dtype=torch.float64) for c in c_noise.tolist()])
    for linear in (unet.embed0, unet.embed1):
        vector = vector @ linear.weight.T + linear.bias
        vector = vector / (1 + torch.exp(-vector))

    def block(block, *segments):
        half = math.sqrt(0.5)
        embedding = vector @ block.affine.weight.T + block.affine.bias
        h = naive_layer(block.conv0, list(segments), embedding, None, 1)
        if block.skip is not None:
            residual = naive_layer(block.skip, list(segments), None, None, 1)
        else:
            residual = network.resample(torch.cat(segments, 1), block.resample)
        h = naive_layer(block.conv1, [h], None, residual, half)
        if block.qkv is not None:
            q, k, v = naive_layer(block.qkv, [h], None, None, 1).chunk(3, 1)
            n, c, height, width = q.shape
            out = torch.zeros(n, c, height * width, dtype=torch.float64)
            for image in range(n):
                rows = q[image].reshape(c, -1).T @ k[image].reshape(c, -1) / math.sqrt(c)
                weights = torch.exp(rows) / torch.exp(rows).sum(1, keepdim=True)
                out[image] = (weights @ v[image].reshape(c, -1).T).T
            h = naive_layer(block.proj, [out.reshape(n, c, height, width)], None, h, half)
        return h

    e, d = unet.encoder, unet.decoder
    first = naive_layer(unet.first, [x], None, None, 1)
    skip0 = block(e["8x8_block0"], first)
    down = block(e["4x4_down"], skip0)
    skip1 = block(e["4x4_block0"], down)
    h = block(d["4x4_middle1"], block(d["4x4_middle0"], skip1))
    h = block(d["4x4_block1"], block(d["4x4_block0"], h, skip1), down)
    h = block(d["8x8_up"], h)
    h = block(d["8x8_block1"], block(d["8x8_block0"], h, skip0), first)
    expected = naive_layer(unet.last, [h], None, None, 1)
    # Softmax and the sines run in float32 inside the network.
    torch.testing.assert_close(unet(x, c_noise), expected, rtol=1e-4, atol=1e-4)


def test_executor_runs_every_layer_in_order():
    unet = randomize(network.UNet(TINY))
    x, c_noise = torch.randn(1, 2, 8, 8), torch.zeros(1)
    expected, seen = unet(x, c_noise), []

    def executor(layer, segments, embedding, residual, gain):
        assert sum(segment.shape[1] for segment in segments) == layer.cin
        seen.append(layer)
        return layer(segments, embedding, residual, gain)

    unet.executor = executor
    assert torch.equal(unet(x, c_noise), expected)
    assert seen == unet.layers()
    assert set(seen) == {m for m in unet.modules() if isinstance(m, Layer)}
    assert len({layer.name for layer in seen}) == len(seen)
    assert all(unet.get_submodule(layer.name) is layer for layer in seen)


def test_starts_as_the_skip_path_alone():
    model = Precond(TINY)
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(model.unet(x, torch.zeros(1)), torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("channels, groups", [(16, 4), (96, 24), (128, 32), (256, 32)])
def test_groups(channels, groups):
    norm = Layer(channels, 4, 3, norm=True).norm
    assert norm.num_groups == groups and norm.eps == 1e-6


def test_mnist32_fits_the_hardware_and_exercises_it():
    unet = network.UNet(recipes.mnist32.architecture)
    shapes = network.layer_shapes(unet)
    assert [shape.name for shape in shapes] == [layer.name for layer in unet.layers()]
    total = sum(shape.macs for shape in shapes)
    wide = sum(s.macs for s in shapes if sum(s.segments) >= 64 and s.cout >= 64)
    print(f"{total / 1e6:.1f} million MACs an evaluation, {wide / total:.1%} in wide layers")
    assert 250e6 < total < 350e6
    assert wide >= 0.5 * total
    for shape in shapes:
        channels = [c for c in (*shape.segments, shape.cout) if c != 1]
        assert all(c % 16 == 0 for c in channels), shape.name
        assert sum(shape.segments) <= 128, shape.name
        assert shape.cout <= 64 or shape.height < 32, shape.name
        assert (1 in shape.segments) == (shape.name == "first")
        assert (shape.cout == 1) == (shape.name == "last")
        assert shape.activation in (None, "relu")


def test_shapes_of_parameters():
    unet = network.UNet(recipes.mnist32.architecture)
    shapes = {name: tuple(value.shape) for name, value in unet.named_parameters()}
    assert shapes["first.weight"] == (32, 1, 3, 3)
    assert shapes["embed0.weight"] == (128, 32) and shapes["embed1.weight"] == (128, 128)
    assert shapes["encoder.16x16_block0.skip.weight"] == (64, 32, 1, 1)
    assert shapes["decoder.32x32_block0.conv0.weight"] == (32, 96, 3, 3)
    assert shapes["decoder.32x32_block0.conv0.norm.weight"] == (96,)
    assert shapes["decoder.32x32_block0.affine.weight"] == (32, 128)
    assert shapes["last.weight"] == (1, 32, 3, 3)
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_195_553


def test_architecture_survives_json():
    for recipe in recipes.RECIPES.values():
        assert Architecture.from_json(recipe.architecture.to_json()) == recipe.architecture


@pytest.mark.parametrize("change, error, text", [
    ({"resolution": 30}, ValueError,
     r"^resolution must be a multiple of 2 to the 2 \(levels - 1\), not 30$"),
    ({"model_channels": 2.5}, TypeError, r"^model_channels must be an integer, not 2\.5$"),
    ({"model_channels": 30}, ValueError, r"^model_channels must be a multiple of 4, not 30$"),
    ({"num_blocks": 0}, ValueError, r"^num_blocks must be in 1\.\.32, not 0$"),
    ({"channel_mult": ()}, ValueError, r"^channel_mult must be at least one integer, not \(\)$"),
    ({"channel_mult": 3}, ValueError,
     r"^channel_mult must be at most 8 integers in 1\.\.16, not 3$"),
    ({"activation": "tanh"}, ValueError, r"^activation must be one of relu, silu, not 'tanh'$"),
    ({"dropout": 1.5}, ValueError, r"^dropout must be in 0\.\.0\.9, not 1\.5$"),
    ({"middle_attention": 1}, TypeError, r"^middle_attention must be a bool, not 1$"),
])
def test_architecture_rejects(change, error, text):
    with pytest.raises(error, match=text):
        dataclasses.replace(recipes.mnist32.architecture, **change)


@pytest.mark.parametrize("text, message", [
    ('{"depth": 3}', "architecture must have known fields only, not 'depth'"),
    ("{}", "architecture must have the field 'activation'"),
    ("[]", "architecture must be a JSON object, not []"),
])
def test_architecture_rejects_json(text, message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        Architecture.from_json(text)


def test_layer_and_resample_reject():
    with pytest.raises(ValueError, match=r"^kernel must be 1 or 3, not 5$"):
        Layer(4, 4, 5)
    with pytest.raises(ValueError, match=r'^resample must be "up", "down" or None, not \'left\'$'):
        network.resample(torch.zeros(1, 1, 2, 2), "left")
