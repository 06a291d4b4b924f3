"""The network against naive forms of EDM's equations, and against the buffers of the hardware."""

import dataclasses
import math
import re

import pytest
import torch
from torch.nn import functional

from golden import network, presets, recipes
from golden.network import Architecture, Layer, Precond

TINY = Architecture(img_channels=2, resolution=8, model_channels=16, channel_mult=(1, 2),
                    num_blocks=1, attention_resolutions=(4,), middle_attention=True)
HALF = math.sqrt(0.5)


def randomize(module, seed=0):
    """Give every weight a value, the ones that start at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def naive_resample(x, mode, taps):
    """`network.resample` in loops over pixels and taps, of x (N, C, H, W)."""
    n, channels, height, width = x.shape
    weights = [tap / sum(taps) for tap in taps]
    reach = len(taps) // 2 - 1
    if mode == "down":
        out = torch.zeros(n, channels, height // 2, width // 2, dtype=x.dtype)
        for y in range(height // 2):
            for c in range(width // 2):
                for dy, first in enumerate(weights):
                    for dx, second in enumerate(weights):
                        row, column = 2 * y + dy - reach, 2 * c + dx - reach
                        if 0 <= row < height and 0 <= column < width:
                            out[:, :, y, c] += first * second * x[:, :, row, column]
        return out
    out = torch.zeros(n, channels, 2 * height, 2 * width, dtype=x.dtype)
    for y in range(height):
        for c in range(width):
            for dy, first in enumerate(weights):
                for dx, second in enumerate(weights):
                    row, column = 2 * y + dy - reach, 2 * c + dx - reach
                    if 0 <= row < 2 * height and 0 <= column < 2 * width:
                        out[:, :, row, column] += 4 * first * second * x[:, :, y, c]
    return out


def naive_layer(layer, segments, embedding, residual, gain, modulation=None):
    """`Layer.forward` in float64, written out: a loop over groups, slices, a loop over taps."""
    x = torch.cat(segments, 1).double()
    n, channels, height, width = x.shape
    if layer.norm is not None:
        size = channels // layer.norm.num_groups
        for first in range(0, channels, size):
            group = x[:, first:first + size]
            mean = group.mean((1, 2, 3), keepdim=True)
            variance = ((group - mean) ** 2).mean((1, 2, 3), keepdim=True)
            x[:, first:first + size] = (group - mean) / torch.sqrt(
                variance + layer.norm.eps)
        x = x * layer.norm.weight.double()[:, None, None] + layer.norm.bias.double()[:, None, None]
    if modulation is not None:
        scale, shift = (part.double()[:, :, None, None] for part in modulation)
        x = x * (1 + scale) + shift
    if layer.activation == "relu":
        x = x.clamp(min=0)
    elif layer.activation == "silu":
        x = x / (1 + torch.exp(-x))
    if layer.resample:
        x = naive_resample(x, layer.resample, layer.resample_filter)
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
@pytest.mark.parametrize("split, taps", [((48,), (1, 1)), ((32, 16), (1, 3, 3, 1))])
def test_layer_equals_naive_form(activation, mode, kernel, split, taps):
    layer = randomize(Layer(48, 20, kernel, norm=(12, 1e-3) if activation else None,
                            activation=activation, resample=mode, resample_filter=taps))
    generator = torch.Generator().manual_seed(1)
    segments = [torch.randn(2, channels, 6, 4, generator=generator) for channels in split]
    size = {None: (6, 4), "up": (12, 8), "down": (3, 2)}[mode]
    residual = torch.randn(2, 20, *size, generator=generator)
    embedding = torch.randn(2, 20, generator=generator)
    modulation = torch.randn(2, 2, 48, generator=generator)
    for extra in ((None, None, 1.0), (embedding, None, 1.0), (None, residual, HALF),
                  (None, residual, 1.0, modulation)):
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


def naive_embedding(unet, c_noise, labels, augment):
    """The families' embeddings as their papers write them, in float64."""
    a = unet.architecture
    if a.embedding == "fourier":
        frequencies = (2 * math.pi * unet.positional.frequencies).tolist()
    else:
        half = a.model_channels // 2
        frequencies = [1e-4 ** (n / (half - a.embedding_shift)) for n in range(half)]
    sines = torch.tensor([[math.sin(c * f) for f in frequencies] for c in c_noise.tolist()])
    cosines = torch.tensor([[math.cos(c * f) for f in frequencies] for c in c_noise.tolist()])
    x = torch.cat([cosines, sines] if a.cosine_first else [sines, cosines], 1).double()
    if augment is not None:
        x = x + augment @ unet.augment.weight.T
    if labels is not None and a.family == "song":
        x = x + math.sqrt(a.label_dim) * labels @ unet.label.weight.T + unet.label.bias
    x = x @ unet.embed0.weight.T + unet.embed0.bias
    x = x / (1 + torch.exp(-x)) @ unet.embed1.weight.T + unet.embed1.bias
    if labels is not None and a.family == "dhariwal":
        x = x + labels @ unet.label.weight.T
    return x / (1 + torch.exp(-x))


def naive_block(block, vector, *segments):
    """A residual block with attention, a loop over images and heads."""
    embedding, modulation = vector @ block.affine.weight.T + block.affine.bias, None
    if embedding.shape[1] == 2 * block.cout:
        embedding, modulation = None, (embedding[:, :block.cout], embedding[:, block.cout:])
    h = naive_layer(block.conv0, list(segments), embedding, None, 1)
    if block.skip is not None:
        residual = naive_layer(block.skip, list(segments), None, None, 1)
    else:
        residual = torch.cat(segments, 1)
        if block.resample:
            residual = naive_resample(residual, block.resample, block.taps)
    h = naive_layer(block.conv1, [h], None, residual, block.gain, modulation)
    if block.qkv is not None:
        qkv = naive_layer(block.qkv, [h], None, None, 1)
        n, channels, height, width = h.shape
        size = channels // block.heads
        out = torch.zeros(n, channels, height * width, dtype=torch.float64)
        for image in range(n):
            for head in range(block.heads):
                # Query, key and value of a channel lie next to each other.
                rows = qkv[image, 3 * size * head:3 * size * (head + 1)].flatten(1)
                q, k, v = rows[0::3], rows[1::3], rows[2::3]
                scores = torch.exp(q.T @ k / math.sqrt(size))
                weights = scores / scores.sum(1, keepdim=True)
                out[image, size * head:size * (head + 1)] = (weights @ v.T).T
        h = naive_layer(block.proj, [out.reshape(n, channels, height, width)], None, h, block.gain)
    return h


NCSNPP = dataclasses.replace(
    TINY, embedding="fourier", noise_mult=2, resample_filter=(1, 3, 3, 1), augment_dim=3,
    project_resampled=True, activation="silu")
FORMS = {
    "ddpmpp": TINY,
    "ddpmpp-labels": dataclasses.replace(TINY, label_dim=5, project_resampled=True),
    "ncsnpp": dataclasses.replace(NCSNPP, encoder="residual"),
    "skip": dataclasses.replace(NCSNPP, encoder="skip", decoder="skip"),
    "box": dataclasses.replace(NCSNPP, encoder="residual", resample_filter=(1, 1)),
    "adm": dataclasses.replace(
        TINY, family="dhariwal", channels_per_head=8, adaptive_norm=True, norm_eps=1e-5,
        embedding_shift=0, cosine_first=True, label_dim=5, activation="silu"),
    "ddpm": dataclasses.replace(TINY, family="diffusers", norm_groups=4, norm_group_channels=1),
    "ddpm-below": dataclasses.replace(TINY, family="diffusers", downsample_padding=0),
}


@pytest.mark.parametrize("form", FORMS)
def test_unet_equals_naive_layers_and_blocks(form):
    a = FORMS[form]
    unet = randomize(network.build(a)).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, generator=generator)
    c_noise = torch.tensor([-0.7, 0.4], dtype=torch.float64)
    labels = torch.eye(5, dtype=torch.float64)[:2] if a.label_dim else None
    augment = torch.ones(2, 3, dtype=torch.float64) if a.augment_dim else None
    vector = naive_embedding(unet, c_noise, labels, augment)
    e, d = unet.encoder, unet.decoder

    def block(part, *segments):
        return naive_block(part, vector, *segments)

    first = naive_layer(unet.first, [x], None, None, 1)
    skip0 = block(e["8x8_block0"], first)
    if a.family == "diffusers":
        wide = naive_layer(e["4x4_down_conv"], [skip0], None, None, 1)
        down = wide[:, :, 0::2, 0::2] if a.downsample_padding else wide[:, :, 1::2, 1::2]
    else:
        down = block(e["4x4_down"], skip0)
    if a.encoder == "skip":
        image = naive_resample(x, "down", a.resample_filter)
        down = down + naive_layer(e["4x4_aux_skip"], [image], None, None, 1)
    elif a.encoder == "residual":
        # The convolution of the image padded without end, then the filter.
        wide = naive_layer(e["4x4_aux_residual"], [functional.pad(x, (2,) * 4)], None, None, 1)
        image = naive_resample(wide, "down", a.resample_filter)[:, :, 1:5, 1:5]
        down = (down + image) * HALF
    skip1 = block(e["4x4_block0"], down)
    h = block(d["4x4_middle1"], block(d["4x4_middle0"], skip1))
    h = block(d["4x4_block1"], block(d["4x4_block0"], h, skip1), down)
    image = None
    if a.decoder == "skip":
        image = naive_layer(d["4x4_aux"], [h], None, None, 1)
        image = naive_resample(image, "up", a.resample_filter)
    if a.family == "diffusers":
        h = naive_layer(d["8x8_up_conv"], [h], None, None, 1)
    else:
        h = block(d["8x8_up"], h)
    h = block(d["8x8_block1"], block(d["8x8_block0"], h, skip0), first)
    expected = naive_layer(unet.last, [h], None, image, 1)
    # Softmax and the sines run in float32 inside the network.
    torch.testing.assert_close(unet(x, c_noise, labels, augment), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, parameters, gmacs", [
    ("cifar10-ddpmpp", 55_733_891, 21.190), ("cifar10-ncsnpp", 56_397_827, 21.389),
    ("ffhq64-ddpmpp", 61_805_571, 41.861), ("afhqv2-64", 61_805_571, 41.861),
    ("imagenet64-adm", 295_899_267, 109.658)])
def test_presets_have_the_published_size(name, parameters, gmacs):
    with torch.device("meta"):
        unet = network.build(presets.PRESETS[name])
    assert sum(value.numel() for value in unet.parameters()) == parameters
    work = network.macs(unet)
    assert round(work["total"] / 1e9, 3) == gmacs
    assert work["total"] == work["convolution"] + work["attention"] + work["linear"]


def test_where_attention_is():
    def attending(unet):
        return {network.block_of(layer.name) for layer in unet.layers()
                if layer.name.endswith(".qkv")}

    with torch.device("meta"):
        song = network.build(presets.PRESETS["cifar10-ddpmpp"])
        adm = network.build(presets.PRESETS["imagenet64-adm"])
    assert attending(song) == {*(f"encoder.16x16_block{n}" for n in range(4)),
                               "decoder.8x8_middle0", "decoder.16x16_block4"}
    assert len(attending(adm)) == 9 + 1 + 12
    assert {block.heads for block in adm.decoder.values() if block.qkv} == {6, 9, 12}


@pytest.mark.parametrize("form", ["ncsnpp", "skip", "adm"])
def test_layers_of_the_image(form):
    unet = network.build(FORMS[form])
    images = {name for name in (layer.name for layer in unet.layers())
              if name == "first" or "_aux_" in name}
    assert set(unet.image_layers()) == images


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_denoiser_of_a_discrete_schedule(prediction):
    a = dataclasses.replace(FORMS["ddpm"], prediction=prediction, timesteps=50)
    model = randomize(Precond(a))
    kept, product = [], 1.0
    for step in range(50):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * step / 49)
        kept.append(product)
    assert math.isclose(model.sigma_max, math.sqrt((1 - kept[49]) / kept[49]))
    assert math.isclose(model.sigma_min, math.sqrt((1 - kept[0]) / kept[0]))
    generator = torch.Generator().manual_seed(4)
    for step in (0, 17, 49):
        noisy = torch.randn(1, 2, 8, 8, generator=generator)      # of unit variance, as in DDPM
        out = model.unet(noisy, torch.tensor([float(step)]))
        root, rest = math.sqrt(kept[step]), math.sqrt(1 - kept[step])
        image = {"epsilon": (noisy - rest * out) / root, "v": root * noisy - rest * out}[prediction]
        torch.testing.assert_close(model(noisy / root, rest / root), image, rtol=1e-3, atol=1e-3)


def test_executor_runs_every_layer_in_order():
    unet = randomize(network.build(TINY))
    x, c_noise = torch.randn(1, 2, 8, 8), torch.zeros(1)
    expected, seen = unet(x, c_noise), []

    def executor(layer, segments, embedding, residual, gain, modulation):
        assert sum(segment.shape[1] for segment in segments) == layer.cin
        seen.append(layer)
        return layer(segments, embedding, residual, gain, modulation)

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
    assert Architecture().group_count(channels) == groups


def test_mnist32_fits_the_hardware_and_exercises_it():
    unet = network.build(recipes.mnist32.architecture)
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
    unet = network.build(recipes.mnist32.architecture)
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
    for architecture in (*presets.PRESETS.values(), *FORMS.values(),
                         *(recipe.architecture for recipe in recipes.RECIPES.values())):
        assert Architecture.from_json(architecture.to_json()) == architecture


def test_architecture_of_an_older_file_takes_defaults():
    assert Architecture.from_json('{"activation": "silu"}') == Architecture(activation="silu")


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
    ({"family": "vit"}, ValueError,
     r"^family must be one of song, dhariwal, diffusers, not 'vit'$"),
    ({"resample_filter": (1, 2, 1)}, ValueError,
     r"^resample_filter must be one of \(1, 1\), \(1, 3, 3, 1\), not \(1, 2, 1\)$"),
    ({"channels_per_head": 48}, ValueError,
     r"^channels_per_head must divide the channels of a level, 32, not 48$"),
    ({"norm_groups": 12, "norm_group_channels": 1}, ValueError,
     r"^norm_groups must divide the channels of a level, 32, not 12$"),
    ({"family": "dhariwal", "encoder": "skip"}, ValueError,
     r"^encoder and decoder must be standard in family dhariwal, not 'skip' and 'standard'$"),
    ({"family": "diffusers", "label_dim": 3}, ValueError,
     r"^label_dim must be 0 in family diffusers, not 3$"),
    ({"beta_start": 0.5}, ValueError, r"^beta_start must be at most beta_end, 0\.02, not 0\.5$"),
    ({"label_dim": -1}, ValueError, r"^label_dim must be in 0\.\.65536, not -1$"),
])
def test_architecture_rejects(change, error, text):
    with pytest.raises(error, match=text):
        dataclasses.replace(recipes.mnist32.architecture, **change)


@pytest.mark.parametrize("text, message", [
    ('{"depth": 3}', "architecture must have known fields only, not 'depth'"),
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
