"""Diffusion UNets under EDM preconditioning, cut into the layers that the accelerator executes.

Three families: SongUNet (DDPM++ and NCSN++), DhariwalUNet (ADM) and the UNet2DModel of diffusers
(DDPM). All are made of `Layer`s, which an executor runs; what lies between layers (embedding,
softmax, auxiliary images, decimation) is float.

Sources: Karras et al. 2022 (arXiv 2206.00364), tables 1 and 7, appendices C.6 and F.2, and the
architectures published with it; Song et al. 2021 (arXiv 2011.13456), appendix H, for DDPM++ and
NCSN++; Dhariwal and Nichol 2021 (arXiv 2105.05233), appendix A, for ADM; Ho et al. 2020 (arXiv
2006.11239), appendix B, for DDPM.
"""

import dataclasses
import json
import math

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Architecture", "Layer", "Block", "UNet", "SongUNet", "DhariwalUNet", "DiffusersUNet",
           "Precond", "LayerShape", "build", "resample", "attend", "execute", "layer_shapes",
           "macs", "block_of"]

SKIP_GAIN = math.sqrt(0.5)
ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu}
CHOICES = {
    "family": ("song", "dhariwal", "diffusers"),
    "embedding": ("positional", "fourier"),
    "encoder": ("standard", "skip", "residual"),
    "decoder": ("standard", "skip"),
    "resample_filter": ((1, 1), (1, 3, 3, 1)),
    "activation": tuple(ACTIVATIONS),
    "prediction": ("edm", "epsilon", "v"),
    "beta_schedule": ("linear", "scaled_linear", "cosine"),
}
INTEGERS = {"img_channels": (1, 64), "resolution": (1, 1024), "model_channels": (1, 1024),
            "num_blocks": (1, 32), "embedding_mult": (1, 16), "noise_mult": (1, 16),
            "label_dim": (0, 1 << 16), "augment_dim": (0, 1024), "norm_groups": (1, 1024),
            "norm_group_channels": (1, 1024), "embedding_shift": (0, 1),
            "downsample_padding": (0, 1), "timesteps": (2, 100_000)}
NUMBERS = {"dropout": (0, 0.9), "sigma_data": (1e-3, 1e3), "norm_eps": (1e-12, 1),
           "beta_start": (1e-8, 0.999), "beta_end": (1e-8, 0.999)}
FLAGS = ("middle_attention", "project_resampled", "adaptive_norm", "cosine_first")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What decides the tensors of a network and how they are used; goes to and from JSON.

    Raises
    ------
    TypeError, ValueError
        If a field has the wrong kind or is out of range; the text names the field.
    """

    family: str = "song"
    img_channels: int = 1
    resolution: int = 32
    model_channels: int = 32
    channel_mult: tuple = (1, 2, 2)       # channels of a level over model_channels
    num_blocks: int = 1                   # residual blocks of an encoder level; decoder: one more
    attention_resolutions: tuple = ()
    middle_attention: bool = False        # attention in the first block of the decoder
    channels_per_head: int | None = None  # of attention; None: one head
    activation: str = "relu"
    dropout: float = 0.0
    embedding: str = "positional"         # of the noise level: fixed or random frequencies
    embedding_mult: int = 4               # width of the embedding over model_channels
    noise_mult: int = 1                   # sines and cosines over model_channels
    embedding_shift: int = 1              # lowest frequency is 1e-4 at 1, just above it at 0
    cosine_first: bool = False
    label_dim: int = 0                    # classes
    augment_dim: int = 0                  # numbers that describe an augmentation, in training
    adaptive_norm: bool = False           # embedding scales and shifts conv1's norm
    norm_groups: int = 32                 # at most
    norm_group_channels: int = 4          # at least
    norm_eps: float = 1e-6
    encoder: str = "standard"             # how the encoder uses the image at lower resolutions
    decoder: str = "standard"             # "skip": each resolution adds to the image
    resample_filter: tuple = (1, 1)
    project_resampled: bool = False       # 1x1 skip where a block resamples and keeps its channels
    downsample_padding: int = 1           # of diffusers' stride-2 convolution; 0: below and right
    sigma_data: float = 0.5
    prediction: str = "edm"
    timesteps: int = 1000                 # of the schedule of "epsilon" and "v", as are the betas
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"

    def __post_init__(self):
        for name in ("channel_mult", "attention_resolutions", "resample_filter"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, limits in INTEGERS.items():
            check_number(name, getattr(self, name), *limits, kind=int)
        for name, limits in NUMBERS.items():
            check_number(name, getattr(self, name), *limits, kind=(int, float))
        for name, limit in (("channel_mult", 16), ("attention_resolutions", 1024)):
            value = getattr(self, name)
            if not isinstance(value, tuple) or len(value) > 8 or not all(
                    type(item) is int and 1 <= item <= limit for item in value):
                raise ValueError(f"{name} must be at most 8 integers in 1..{limit}, not {value!r}")
        if not self.channel_mult:
            raise ValueError("channel_mult must be at least one integer, not ()")
        if self.resolution % (1 << (len(self.channel_mult) - 1)):
            raise ValueError(f"resolution must be a multiple of 2 to the "
                             f"{len(self.channel_mult) - 1} (levels - 1), not {self.resolution!r}")
        if self.model_channels % 4:
            raise ValueError(f"model_channels must be a multiple of 4, not {self.model_channels!r}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, not {getattr(self, name)!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, "
                                 f"not {getattr(self, name)!r}")
        if self.channels_per_head is not None:
            check_number("channels_per_head", self.channels_per_head, 1, 16384, kind=int)
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start must be at most beta_end, {self.beta_end!r}, "
                             f"not {self.beta_start!r}")
        if self.family == "diffusers" and self.label_dim:
            raise ValueError(f"label_dim must be 0 in family diffusers, not {self.label_dim!r}")
        if self.family != "song" and (self.encoder, self.decoder) != ("standard", "standard"):
            raise ValueError(f"encoder and decoder must be standard in family {self.family}, "
                             f"not {self.encoder!r} and {self.decoder!r}")
        for mult in self.channel_mult:
            channels = self.model_channels * mult
            for name, size in (("channels_per_head", self.channels_per_head or 1),
                               ("norm_groups", self.group_count(channels))):
                if channels % size:
                    raise ValueError(f"{name} must divide the channels of a level, "
                                     f"{channels}, not {getattr(self, name)!r}")

    def group_count(self, channels):
        """Groups of a GroupNorm over `channels` channels."""
        return max(1, min(self.norm_groups, channels // self.norm_group_channels))

    @property
    def skip_gain(self):
        """What a block's sum with its skip is multiplied by."""
        return SKIP_GAIN if self.family == "song" else 1.0

    def to_json(self):
        """One line of JSON that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text):
        """The architecture written by `to_json`; ValueError or TypeError names what is wrong.

        Fields that are not there take their defaults.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError(f"architecture must be a JSON object, not {fields!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in names:
                raise ValueError(f"architecture must have known fields only, not {name!r}")
        return cls(**fields)


def check_number(name, value, low, high, *, kind):
    """Raise a TypeError or ValueError unless `value` is of `kind` and in `low`..`high`."""
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an integer' if kind is int else 'a number'}, "
                        f"not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, not {value!r}")


def resample(x, mode, taps=(1, 1), *, padding=True):
    """Filter `x` (N, C, H, W) with the separable `taps`, of sum 1, and change its size by 2.

    ``"down"`` filters and keeps every other pixel, ``"up"`` puts zeros between pixels and filters
    with a gain of 4, None keeps `x`. With the box (1, 1) these are the mean of 2x2 pixels and the
    repetition of a pixel. Outside the image `x` is 0; without `padding`, "down" stays inside it.
    """
    if mode is None:
        return x
    if mode not in ("up", "down"):
        raise ValueError(f'resample must be "up", "down" or None, not {mode!r}')
    if tuple(taps) == (1, 1):
        if mode == "down":
            return functional.avg_pool2d(x, 2)
        return functional.interpolate(x, scale_factor=2, mode="nearest")
    line = x.new_tensor(taps) / sum(taps)
    kernel = torch.outer(line, line).expand(x.shape[1], 1, -1, -1)
    reach = (len(taps) - 1) // 2
    if mode == "down":
        return functional.conv2d(x, kernel, stride=2, padding=reach if padding else 0,
                                 groups=x.shape[1])
    return functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=reach, groups=x.shape[1])


class Layer(nn.Module):
    """One convolution with its prologue and epilogue: what the accelerator executes as one unit.

    Prologue, over the channel concatenation of one or two segments: GroupNorm, scale and shift,
    activation, resampling, each optional. Then the convolution (stride 1, zero padding that keeps
    H and W), then ``(sum + bias + embedding + residual) * gain``.

    Members
    -------
    name : dotted path in the UNet, unique, set by the UNet
    cin, cout, kernel : input channels of all segments together, output channels, 1 or 3
    weight : (cout, cin, kernel, kernel)
    bias : (cout,)
    norm : ``nn.GroupNorm`` over cin, or None
    activation : "relu", "silu" or None
    relu : whether the activation is ReLU, so that what enters the convolution is not negative
    resample : None, "up" or "down"; changes H and W of the segments before the convolution
    resample_filter : taps of the filter, see `resample`
    dropout : probability, in training only, between activation and convolution
    """

    def __init__(self, cin, cout, kernel, *, norm=None, activation=None, resample=None,
                 resample_filter=(1, 1), dropout=0.0, scale=1.0):
        """`norm` is (groups, eps) or None; `scale` that of the first random weights."""
        super().__init__()
        if kernel not in (1, 3):
            raise ValueError(f"kernel must be 1 or 3, not {kernel!r}")
        self.name = ""
        self.cin, self.cout, self.kernel = cin, cout, kernel
        self.activation, self.resample, self.dropout = activation, resample, dropout
        self.resample_filter = tuple(resample_filter)
        self.norm = None if norm is None else nn.GroupNorm(norm[0], cin, eps=norm[1])
        self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(cout))
        nn.init.xavier_uniform_(self.weight)
        with torch.no_grad():
            self.weight.mul_(scale)

    @property
    def relu(self):
        return self.activation == "relu"

    def extra_repr(self):
        return f"{self.cin}, {self.cout}, kernel={self.kernel}, resample={self.resample!r}"

    def prologue(self, segments, modulation=None):
        """What enters the convolution: (N, cin, H', W'), H' and W' after resampling."""
        x = segments[0] if len(segments) == 1 else torch.cat(list(segments), 1)
        if self.norm is not None:
            x = self.norm(x)
        if modulation is not None:
            scale, shift = (part[:, :, None, None].to(x.dtype) for part in modulation)
            x = torch.addcmul(shift, x, 1 + scale)
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x)
        return resample(x, self.resample, self.resample_filter)

    def forward(self, segments, embedding=None, residual=None, gain=1.0, modulation=None):
        """Execute the layer in float.

        Parameters
        ----------
        segments : list of 1 or 2 tensors (N, C_s, H, W), the C_s summing to cin
        embedding : (N, cout) or None
        residual : (N, cout, H', W') or None
        gain : multiplier of the whole sum
        modulation : (scale, shift), each (N, cin), or None: the norm's result times 1 + scale,
            plus shift

        Returns (N, cout, H', W').
        """
        x = self.prologue(segments, modulation)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        x = functional.conv2d(x, self.weight, self.bias, padding=self.kernel // 2)
        if embedding is not None:
            x = x + embedding[:, :, None, None].to(x.dtype)
        if residual is not None:
            x = x + residual
        return x if gain == 1.0 else x * gain


class PositionalEmbedding(nn.Module):
    """Sines and cosines of c_noise (N,) at `channels` / 2 frequencies from 1 down to 1e-4.

    With `shift` 0 the last frequency is a step above 1e-4.
    """

    def __init__(self, channels, shift=1, cosine_first=False):
        super().__init__()
        self.cosine_first = cosine_first
        exponents = torch.arange(channels // 2) / (channels // 2 - shift)
        self.register_buffer("frequencies", 1e-4 ** exponents, persistent=False)

    def forward(self, c_noise):
        angles = torch.outer(c_noise, self.frequencies.to(c_noise.dtype))
        parts = [angles.sin(), angles.cos()]
        return torch.cat(parts[::-1] if self.cosine_first else parts, 1)


class FourierEmbedding(nn.Module):
    """Sines, then cosines, of 2 pi c_noise (N,) times `channels` / 2 random frequencies, kept."""

    def __init__(self, channels, scale=16):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(channels // 2) * scale)

    def forward(self, c_noise):
        angles = torch.outer(c_noise, 2 * math.pi * self.frequencies.to(c_noise.dtype))
        return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """Residual block: conv0, embedding, conv1, skip, optional attention.

    The embedding is added to conv0's result, or scales and shifts conv1's norm, as the
    architecture says. `run` in `forward` is the executor of the UNet.
    """

    def __init__(self, a, cin, cout, *, resample=None, attention=False):
        super().__init__()
        self.cin, self.cout, self.resample, self.taps = cin, cout, resample, a.resample_filter
        self.adaptive, self.gain = a.adaptive_norm, a.skip_gain
        self.heads = cout // (a.channels_per_head or cout)
        width = a.model_channels * a.embedding_mult
        filtered = {"resample": resample, "resample_filter": a.resample_filter}
        norms = {channels: (a.group_count(channels), a.norm_eps) for channels in (cin, cout)}
        self.conv0 = Layer(cin, cout, 3, norm=norms[cin], activation=a.activation, **filtered)
        self.affine = nn.Linear(width, 2 * cout if a.adaptive_norm else cout)
        self.conv1 = Layer(cout, cout, 3, norm=norms[cout], activation=a.activation,
                           dropout=a.dropout, scale=0.0)
        project = cin != cout or (resample is not None and a.project_resampled)
        self.skip = Layer(cin, cout, 1, **filtered) if project else None
        self.qkv = self.proj = None
        if attention:
            self.qkv = Layer(cout, 3 * cout, 1, norm=norms[cout], scale=math.sqrt(0.2))
            self.proj = Layer(cout, cout, 1, scale=0.0)

    def layers(self):
        """Layers in the order in which `forward` runs them."""
        order = (self.conv0, self.skip, self.conv1, self.qkv, self.proj)
        return [layer for layer in order if layer is not None]

    def forward(self, segments, embedding, run):
        embedding, modulation = self.affine(embedding), None
        if self.adaptive:
            embedding, modulation = None, embedding.chunk(2, 1)
        x = run(self.conv0, segments, embedding, None, 1.0, None)
        if self.skip is not None:
            residual = run(self.skip, segments, None, None, 1.0, None)
        else:
            residual = segments[0] if len(segments) == 1 else torch.cat(list(segments), 1)
            residual = resample(residual, self.resample, self.taps)
        x = run(self.conv1, [x], None, residual, self.gain, modulation)
        if self.qkv is not None:
            qkv = run(self.qkv, [x], None, None, 1.0, None)
            x = run(self.proj, [attend(qkv, self.heads)], None, x, self.gain, None)
        return x


def attend(qkv, heads=1):
    """Self-attention over the pixels, with the softmax in float32.

    `qkv` is (N, 3 C, H, W): head by head, channel by channel, query, key and value. Returns
    (N, C, H, W).
    """
    n, channels, height, width = qkv.shape
    size = channels // 3 // heads
    q, k, v = qkv.reshape(n * heads, size, 3, height * width).unbind(2)    # (N heads, C', pixels)
    scores = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(size))
    weights = scores.float().softmax(2).to(v.dtype)
    return torch.einsum("nqk,nck->ncq", weights, v).reshape(n, channels // 3, height, width)


def execute(layer, segments, embedding, residual, gain, modulation):
    """The default executor: the layer in float."""
    return layer(segments, embedding, residual, gain, modulation)


class UNet(nn.Module):
    """An encoder, a decoder with concatenated skips, and the embedding of noise and labels.

    What the families share; each says in a few methods where it differs. Names of the parts of
    `encoder` and `decoder` start with the size of their output and stand in execution order.

    Members
    -------
    executor : callable ``(layer, segments, embedding, residual, gain, modulation) -> tensor``
        Runs every Layer, with the arguments of `Layer.forward`. Replace it to observe or to
        quantize; ``execute`` is the float default.
    """

    def __init__(self, architecture):
        super().__init__()
        self.architecture = a = architecture
        self.executor = execute
        width, waves = a.model_channels * a.embedding_mult, a.model_channels * a.noise_mult
        self.positional = (
            FourierEmbedding(waves) if a.embedding == "fourier"
            else PositionalEmbedding(waves, a.embedding_shift, a.cosine_first))
        self.embed0 = nn.Linear(waves, width)
        self.embed1 = nn.Linear(width, width)
        if a.augment_dim:
            self.augment = nn.Linear(a.augment_dim, waves, bias=False)
        if a.label_dim:
            self.label = self.label_embedding(waves, width)

        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        channels = self.first_channels()
        self.first = Layer(a.img_channels, channels, 3)
        skips = [channels]
        sizes = [a.resolution >> level for level in range(len(a.channel_mult))]
        levels = list(zip(sizes, a.channel_mult))
        for size, mult in levels:
            if size != a.resolution:
                self.add_down(size, channels)
                skips.append(channels)
            for n in range(a.num_blocks):
                cin, channels = channels, a.model_channels * mult
                self.encoder[f"{size}x{size}_block{n}"] = Block(
                    a, cin, channels, attention=size in a.attention_resolutions)
                skips.append(channels)
        for size, mult in reversed(levels):
            if size == sizes[-1]:
                self.decoder[f"{size}x{size}_middle0"] = Block(a, channels, channels,
                                                               attention=a.middle_attention)
                self.decoder[f"{size}x{size}_middle1"] = Block(a, channels, channels)
            else:
                self.add_up(size, channels)
            for n in range(a.num_blocks + 1):
                cin, channels = channels + skips.pop(), a.model_channels * mult
                attention = size in a.attention_resolutions and self.attends(n)
                self.decoder[f"{size}x{size}_block{n}"] = Block(a, cin, channels,
                                                                attention=attention)
            if size != a.resolution and a.decoder == "skip":
                self.decoder[f"{size}x{size}_aux"] = self.image_layer(channels)
        self.last = self.image_layer(channels)
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                module.name = name

    def image_layer(self, channels):
        """A layer from `channels` channels to an image."""
        a = self.architecture
        return Layer(channels, a.img_channels, 3, activation=a.activation, scale=0.0,
                     norm=(a.group_count(channels), a.norm_eps))

    def first_channels(self):
        """Output channels of the first layer."""
        return self.architecture.model_channels

    def attends(self, n):
        """Whether the decoder's block `n` of a resolution with attention has it."""
        return True

    def add_down(self, size, channels):
        """Add to the encoder what leads down to `size`."""
        self.encoder[f"{size}x{size}_down"] = Block(self.architecture, channels, channels,
                                                    resample="down")

    def add_up(self, size, channels):
        """Add to the decoder what leads up to `size`."""
        self.decoder[f"{size}x{size}_up"] = Block(self.architecture, channels, channels,
                                                  resample="up")

    def layers(self):
        """Layers in the order in which an evaluation runs them."""
        order = [self.first]
        for part in (*self.encoder.values(), *self.decoder.values()):
            order += [part] if isinstance(part, Layer) else part.layers()
        return [*order, self.last]

    def blocks(self):
        """Names of the blocks in execution order, see `block_of`."""
        return list(dict.fromkeys(block_of(layer.name) for layer in self.layers()))

    def image_layers(self):
        """Names of the layers that read the network's input, not another layer's result."""
        return ["first"]

    def embed(self, c_noise, labels=None, augment=None):
        """Embedding of c_noise (N,), shared by all blocks: (N, model_channels * embedding_mult).

        `labels` is (N, label_dim), one-hot, or None for no class; `augment` (N, augment_dim) or
        None for no augmentation.
        """
        a, x = self.architecture, self.positional(c_noise)
        if a.augment_dim and augment is not None:
            x = x + self.augment(augment.to(x.dtype))
        if a.label_dim:
            labels = x.new_zeros(len(x), a.label_dim) if labels is None else labels.to(x.dtype)
            labels = labels.expand(len(x), -1)
        return self.embed_label(x, labels)

    def embed_label(self, x, labels):
        """The two layers after the sines and cosines `x`, and the labels where they belong."""
        return functional.silu(self.embed1(functional.silu(self.embed0(x))))

    def forward(self, x, c_noise, labels=None, augment=None):
        """Raw output F (N, img_channels, H, W) for the scaled input `x` and c_noise (N,)."""
        run, taps = self.executor, self.architecture.resample_filter
        embedding = self.embed(c_noise, labels, augment)
        image, x = x, run(self.first, [x], None, None, 1.0, None)
        skips = [x]
        for name, part in self.encoder.items():
            if name.endswith("_aux_skip"):
                image = resample(image, "down", taps)
                x = skips[-1] = run(part, [image], None, x, 1.0, None)
            elif name.endswith("_aux_residual"):
                # The convolution comes before the filter and reaches as far outside the image.
                image = functional.pad(image, ((len(taps) - 1) // 2,) * 4)
                image = run(part, [image], None, None, 1.0, None)
                x = image = (x + resample(image, "down", taps, padding=False)) * SKIP_GAIN
                skips[-1] = x
            elif isinstance(part, Layer):
                x = run(part, [x], None, None, 1.0, None)
                # Stride 2: every other result; without padding above, the ones between.
                start = 1 - self.architecture.downsample_padding
                x = x[:, :, start::2, start::2]
                skips.append(x)
            else:
                x = part([x], embedding, run)
                skips.append(x)
        image = None
        for name, part in self.decoder.items():
            if name.endswith("_aux"):
                image = run(part, [x], None, image, 1.0, None)
                image = resample(image, "up", taps)
            elif isinstance(part, Layer):
                x = run(part, [x], None, None, 1.0, None)
            else:
                # Blocks named "block" take a skip; middle and up blocks do not.
                segments = [x, skips.pop()] if "_block" in name else [x]
                x = part(segments, embedding, run)
        return run(self.last, [x], None, image, 1.0, None)


class SongUNet(UNet):
    """DDPM++ and NCSN++: blocks of gain sqrt(1/2), auxiliary images in encoder and decoder."""

    def label_embedding(self, waves, width):
        return nn.Linear(self.architecture.label_dim, waves)

    def embed_label(self, x, labels):
        if labels is not None:
            x = x + self.label(labels * math.sqrt(labels.shape[1]))
        return super().embed_label(x, None)

    def attends(self, n):
        return n == self.architecture.num_blocks

    def add_down(self, size, channels):
        super().add_down(size, channels)
        a = self.architecture
        if a.encoder == "skip":
            self.encoder[f"{size}x{size}_aux_skip"] = Layer(a.img_channels, channels, 1)
        elif a.encoder == "residual":
            inputs = [part.cout for name, part in self.encoder.items() if "_aux_" in name]
            self.encoder[f"{size}x{size}_aux_residual"] = Layer(
                inputs[-1] if inputs else a.img_channels, channels, 3)

    def image_layers(self):
        auxiliary = [f"encoder.{name}" for name in self.encoder if "_aux_" in name]
        return ["first", *auxiliary[:1 if self.architecture.encoder == "residual" else None]]


class DhariwalUNet(UNet):
    """ADM: the embedding scales and shifts norms, several heads, gain 1."""

    def first_channels(self):
        return self.architecture.model_channels * self.architecture.channel_mult[0]

    def label_embedding(self, waves, width):
        return nn.Linear(self.architecture.label_dim, width, bias=False)

    def embed_label(self, x, labels):
        x = self.embed1(functional.silu(self.embed0(x)))
        return functional.silu(x if labels is None else x + self.label(labels))


class DiffusersUNet(UNet):
    """UNet2DModel of diffusers: resampling by convolutions between the levels, gain 1."""

    def add_down(self, size, channels):
        self.encoder[f"{size}x{size}_down_conv"] = Layer(channels, channels, 3)

    def add_up(self, size, channels):
        self.decoder[f"{size}x{size}_up_conv"] = Layer(channels, channels, 3, resample="up")


FAMILIES = {"song": SongUNet, "dhariwal": DhariwalUNet, "diffusers": DiffusersUNet}


def build(architecture):
    """The UNet of `architecture`, with random weights."""
    return FAMILIES[architecture.family](architecture)


def block_of(name):
    """Name of the block that the layer `name` belongs to; a layer of no block is one by itself."""
    return name.rpartition(".")[0] if name.count(".") == 2 else name


class Precond(nn.Module):
    """Denoiser D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) around a UNet (EDM, table 1).

    Networks that predict the noise ("epsilon") or the velocity ("v") of a discrete schedule fit
    the same form (EDM, table 1, VP; Salimans and Ho 2022, arXiv 2202.00512, appendix D); their
    c_noise is the time step, interpolated in log sigma.

    Members
    -------
    sigma_min, sigma_max : range of noise levels that the network is trained for
    """

    def __init__(self, architecture):
        super().__init__()
        self.architecture = architecture
        self.sigma_data = architecture.sigma_data
        self.sigma_min, self.sigma_max = 0.002, 80.0
        self.log_sigmas = None
        if architecture.prediction != "edm":
            self.log_sigmas = log_sigmas(architecture)        # float64, on the CPU
            self.sigma_min, self.sigma_max = self.log_sigmas[[0, -1]].exp().tolist()
        self.unet = build(architecture)

    def coefficients(self, sigma):
        """(c_skip, c_out, c_in, c_noise) of `sigma`, each of its shape."""
        prediction = self.architecture.prediction
        if prediction == "edm":
            total = sigma ** 2 + self.sigma_data ** 2
            c_skip = self.sigma_data ** 2 / total
            return c_skip, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), sigma.log() / 4
        total = sigma ** 2 + 1
        c_noise = self.time_step(sigma)
        if prediction == "epsilon":
            return torch.ones_like(sigma), -sigma, total.rsqrt(), c_noise
        return 1 / total, -sigma * total.rsqrt(), total.rsqrt(), c_noise

    def time_step(self, sigma):
        """Time step, a fraction, at which the discrete schedule has the noise level `sigma`."""
        table = self.log_sigmas.to(sigma.device)
        wanted = sigma.double().log().clamp(table[0], table[-1])
        above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return (above - 1 + (wanted - low) / (high - low)).to(sigma.dtype)

    def forward(self, x, sigma, labels=None, augment=None):
        """Denoised image in float32 for `x` (N, C, H, W) = image + sigma * unit noise.

        `sigma` is a number, or a tensor of shape () or (N,), in units of pixels in [-1, 1].
        `labels` is (N, label_dim) or (1, label_dim), one-hot, or None for no class.
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
        raw = self.unet(c_in * x, c_noise, labels, augment)
        return c_skip * x + c_out * raw.float()


def log_sigmas(a):
    """Logarithms of the noise levels of a discrete schedule, ascending, (timesteps,) float64.

    sigma = sqrt((1 - p) / p), p the product of 1 - beta up to the step (Ho et al. 2020); "cosine"
    is that of Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.2.
    """
    if a.beta_schedule == "cosine":
        level = torch.arange(a.timesteps + 1, dtype=torch.float64) / a.timesteps
        bar = ((level + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    elif a.beta_schedule == "scaled_linear":
        betas = torch.linspace(a.beta_start ** 0.5, a.beta_end ** 0.5, a.timesteps,
                               dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(a.beta_start, a.beta_end, a.timesteps, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).log() / 2


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes of one Layer in one evaluation of one image."""

    name: str
    segments: tuple      # channels of each input segment
    cout: int
    height: int          # of the output, and of the convolution's input after resampling
    width: int
    kernel: int
    norm: bool
    activation: str
    resample: str

    @property
    def macs(self):
        return self.kernel ** 2 * sum(self.segments) * self.cout * self.height * self.width


def layer_shapes(unet):
    """A LayerShape for each Layer of `unet`, in execution order."""
    shapes = []

    def record(layer, segments, embedding, residual, gain, modulation):
        out = execute(layer, segments, embedding, residual, gain, modulation)
        shapes.append(LayerShape(layer.name, tuple(s.shape[1] for s in segments), layer.cout,
                                 *out.shape[2:], layer.kernel, layer.norm is not None,
                                 layer.activation, layer.resample))
        return out

    a = unet.architecture
    with torch.device("meta"), torch.no_grad():      # shapes alone: no weights, no arithmetic
        shadow = build(a).eval()
        shadow.executor = record
        shadow(torch.empty(1, a.img_channels, a.resolution, a.resolution), torch.empty(1))
    return shapes


def macs(unet):
    """Multiplications with an addition in one evaluation of one image, a dict by kind.

    ``convolution``: all Layers, stride-2 convolutions as executed, at stride 1; ``attention``:
    queries times keys and weights times values; ``linear``: the embedding; ``total``.
    """
    shapes = {shape.name: shape for shape in layer_shapes(unet)}
    found = {
        "convolution": sum(shape.macs for shape in shapes.values()),
        "attention": sum(2 * shape.cout * (shape.height * shape.width) ** 2
                         for shape in shapes.values() if shape.name.endswith(".proj")),
        "linear": sum(module.weight.numel() for module in unet.modules()
                      if isinstance(module, nn.Linear)),
    }
    return {**found, "total": sum(found.values())}
