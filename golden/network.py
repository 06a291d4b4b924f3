"""DDPM++ UNet under EDM preconditioning, cut into the layers that the accelerator executes.

Sources: Karras et al. 2022 (arXiv 2206.00364), table 1 and appendices C.6 and F.2, for
preconditioning and architecture; Song et al. 2021 (arXiv 2011.13456), appendix H, for DDPM++.
"""

import dataclasses
import json
import math

import torch
from torch import nn
from torch.nn import functional

SKIP_GAIN = math.sqrt(0.5)
ACTIVATIONS = {"relu": functional.relu, "silu": functional.silu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What decides the tensors of a network and how they are used; goes to and from JSON.

    Raises
    ------
    TypeError, ValueError
        If a field has the wrong kind or is out of range; the text names the field.
    """

    img_channels: int = 1
    resolution: int = 32
    model_channels: int = 32
    channel_mult: tuple = (1, 2, 2)       # channels of a level over model_channels
    num_blocks: int = 1                   # residual blocks of an encoder level; decoder: one more
    attention_resolutions: tuple = ()
    middle_attention: bool = False        # attention in the first block of the decoder
    embedding_mult: int = 4               # width of the embedding over model_channels
    activation: str = "relu"
    dropout: float = 0.0
    sigma_data: float = 0.5

    def __post_init__(self):
        limits = {"img_channels": 64, "resolution": 1024, "model_channels": 1024, "num_blocks": 32,
                  "embedding_mult": 16}
        for name, limit in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, not {value!r}")
            if not 1 <= value <= limit:
                raise ValueError(f"{name} must be in 1..{limit}, not {value!r}")
        for name, limit in (("channel_mult", 16), ("attention_resolutions", 1024)):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) > 8 or not all(
                    isinstance(item, int) and 1 <= item <= limit for item in value):
                raise ValueError(f"{name} must be at most 8 integers in 1..{limit}, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not self.channel_mult:
            raise ValueError("channel_mult must be at least one integer, not ()")
        if self.resolution % (1 << (len(self.channel_mult) - 1)):
            raise ValueError(f"resolution must be a multiple of 2 to the "
                             f"{len(self.channel_mult) - 1} (levels - 1), not {self.resolution!r}")
        if self.model_channels % 4:
            raise ValueError(f"model_channels must be a multiple of 4, not {self.model_channels!r}")
        if not isinstance(self.middle_attention, bool):
            raise TypeError(f"middle_attention must be a bool, not {self.middle_attention!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, "
                             f"not {self.activation!r}")
        for name, low, high in (("dropout", 0, 0.9), ("sigma_data", 1e-3, 1e3)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be in {low}..{high}, not {value!r}")

    def to_json(self):
        """One line of JSON that `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text):
        """The architecture written by `to_json`; ValueError or TypeError names what is wrong."""
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise TypeError(f"architecture must be a JSON object, not {fields!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in names:
                raise ValueError(f"architecture must have known fields only, not {name!r}")
        for name in sorted(names):
            if name not in fields:
                raise ValueError(f"architecture must have the field {name!r}")
        return cls(**fields)


def resample(x, mode):
    """Filter `x` (N, C, H, W) with the box [1, 1] and change its size by 2.

    ``"down"`` averages blocks of 2x2 pixels, ``"up"`` repeats each pixel 2x2 times, None keeps `x`.
    """
    if mode == "down":
        return functional.avg_pool2d(x, 2)
    if mode == "up":
        return functional.interpolate(x, scale_factor=2, mode="nearest")
    if mode is not None:
        raise ValueError(f'resample must be "up", "down" or None, not {mode!r}')
    return x


def group_count(channels):
    """Groups of a GroupNorm over `channels` channels: 4 channels a group, at most 32 groups."""
    return max(1, min(32, channels // 4))


class Layer(nn.Module):
    """One convolution with its prologue and epilogue: what the accelerator executes as one unit.

    Prologue, over the channel concatenation of one or two segments: GroupNorm, activation,
    resampling, each optional. Then the convolution (stride 1, zero padding that keeps H and W),
    then ``(sum + bias + embedding + residual) * gain``.

    Members
    -------
    name : dotted path in the UNet, unique, set by the UNet
    cin, cout, kernel : input channels of all segments together, output channels, 1 or 3
    weight : (cout, cin, kernel, kernel)
    bias : (cout,)
    norm : ``nn.GroupNorm(eps=1e-6)`` over cin, or None
    activation : "relu", "silu" or None
    relu : whether the activation is ReLU, so that what enters the convolution is not negative
    resample : None, "up" or "down"; changes H and W of the segments before the convolution
    dropout : probability, in training only, between activation and convolution
    """

    def __init__(self, cin, cout, kernel, *, norm=False, activation=None, resample=None,
                 dropout=0.0, scale=1.0):
        super().__init__()
        if kernel not in (1, 3):
            raise ValueError(f"kernel must be 1 or 3, not {kernel!r}")
        self.name = ""
        self.cin, self.cout, self.kernel = cin, cout, kernel
        self.activation, self.resample, self.dropout = activation, resample, dropout
        self.norm = nn.GroupNorm(group_count(cin), cin, eps=1e-6) if norm else None
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

    def prologue(self, segments):
        """What enters the convolution: (N, cin, H', W'), H' and W' after resampling."""
        x = segments[0] if len(segments) == 1 else torch.cat(list(segments), 1)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = ACTIVATIONS[self.activation](x)
        return resample(x, self.resample)

    def forward(self, segments, embedding=None, residual=None, gain=1.0):
        """Execute the layer in float.

        Parameters
        ----------
        segments : list of 1 or 2 tensors (N, C_s, H, W), the C_s summing to cin
        embedding : (N, cout) or None
        residual : (N, cout, H', W') or None
        gain : multiplier of the whole sum

        Returns (N, cout, H', W').
        """
        x = self.prologue(segments)
        if self.dropout:
            x = functional.dropout(x, self.dropout, self.training)
        x = functional.conv2d(x, self.weight, self.bias, padding=self.kernel // 2)
        if embedding is not None:
            x = x + embedding[:, :, None, None].to(x.dtype)
        if residual is not None:
            x = x + residual
        return x if gain == 1.0 else x * gain


class PositionalEmbedding(nn.Module):
    """Sines, then cosines, of c_noise (N,) at `channels` / 2 frequencies from 1 to 1e-4."""

    def __init__(self, channels):
        super().__init__()
        exponents = torch.arange(channels // 2) / (channels // 2 - 1)
        self.register_buffer("frequencies", 1e-4 ** exponents, persistent=False)

    def forward(self, c_noise):
        angles = torch.outer(c_noise, self.frequencies.to(c_noise.dtype))
        return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """Residual block of DDPM++: conv0, embedding, conv1, skip, optional attention.

    `run` in `forward` is the executor of the UNet.
    """

    def __init__(self, cin, cout, embedding_channels, *, activation, resample=None,
                 attention=False, dropout=0.0):
        super().__init__()
        self.cin, self.cout, self.resample = cin, cout, resample
        self.conv0 = Layer(cin, cout, 3, norm=True, activation=activation, resample=resample)
        self.affine = nn.Linear(embedding_channels, cout)
        self.conv1 = Layer(cout, cout, 3, norm=True, activation=activation, dropout=dropout,
                           scale=0.0)
        self.skip = Layer(cin, cout, 1, resample=resample) if cin != cout else None
        self.qkv = Layer(cout, 3 * cout, 1, norm=True, scale=math.sqrt(0.2)) if attention else None
        self.proj = Layer(cout, cout, 1, scale=0.0) if attention else None

    def layers(self):
        """Layers in the order in which `forward` runs them."""
        order = (self.conv0, self.skip, self.conv1, self.qkv, self.proj)
        return [layer for layer in order if layer is not None]

    def forward(self, segments, embedding, run):
        x = run(self.conv0, segments, self.affine(embedding), None, 1.0)
        if self.skip is not None:
            residual = run(self.skip, segments, None, None, 1.0)
        else:
            residual = segments[0] if len(segments) == 1 else torch.cat(list(segments), 1)
            residual = resample(residual, self.resample)
        x = run(self.conv1, [x], None, residual, SKIP_GAIN)
        if self.qkv is not None:
            qkv = run(self.qkv, [x], None, None, 1.0)
            x = run(self.proj, [attend(qkv)], None, x, SKIP_GAIN)
        return x


def attend(qkv):
    """Self-attention of one head over the pixels, with the softmax in float32.

    `qkv` is (N, 3 C, H, W): queries, keys and values one after the other. Returns (N, C, H, W).
    """
    n, channels, height, width = qkv.shape
    q, k, v = qkv.reshape(n, 3, channels // 3, height * width).unbind(1)      # (N, C, pixels)
    scores = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(channels // 3))
    weights = scores.float().softmax(2).to(v.dtype)
    return torch.einsum("nqk,nck->ncq", weights, v).reshape(n, channels // 3, height, width)


def execute(layer, segments, embedding, residual, gain):
    """The default executor: the layer in float."""
    return layer(segments, embedding, residual, gain)


class UNet(nn.Module):
    """DDPM++ UNet: an encoder, a decoder with concatenated skips, and the embedding of the noise.

    Members
    -------
    executor : callable ``(layer, segments, embedding, residual, gain) -> tensor``
        Runs every Layer, with the arguments of `Layer.forward`. Replace it to observe or to
        quantize; ``execute`` is the float default.
    """

    def __init__(self, architecture):
        super().__init__()
        self.architecture = a = architecture
        self.executor = execute
        width = a.model_channels * a.embedding_mult
        self.positional = PositionalEmbedding(a.model_channels)
        self.embed0 = nn.Linear(a.model_channels, width)
        self.embed1 = nn.Linear(width, width)

        def block(cin, cout, **options):
            return Block(cin, cout, width, activation=a.activation, dropout=a.dropout, **options)

        self.encoder = nn.ModuleDict()
        self.decoder = nn.ModuleDict()
        self.first = Layer(a.img_channels, a.model_channels, 3)
        channels, skips = a.model_channels, [a.model_channels]
        sizes = [a.resolution >> level for level in range(len(a.channel_mult))]
        for level, (size, mult) in enumerate(zip(sizes, a.channel_mult)):
            if level:
                self.encoder[f"{size}x{size}_down"] = block(channels, channels, resample="down")
                skips.append(channels)
            for n in range(a.num_blocks):
                cin, channels = channels, a.model_channels * mult
                self.encoder[f"{size}x{size}_block{n}"] = block(
                    cin, channels, attention=size in a.attention_resolutions)
                skips.append(channels)
        for level, (size, mult) in reversed(list(enumerate(zip(sizes, a.channel_mult)))):
            if level == len(sizes) - 1:
                self.decoder[f"{size}x{size}_middle0"] = block(channels, channels,
                                                               attention=a.middle_attention)
                self.decoder[f"{size}x{size}_middle1"] = block(channels, channels)
            else:
                self.decoder[f"{size}x{size}_up"] = block(channels, channels, resample="up")
            for n in range(a.num_blocks + 1):
                cin, channels = channels + skips.pop(), a.model_channels * mult
                attention = n == a.num_blocks and size in a.attention_resolutions
                self.decoder[f"{size}x{size}_block{n}"] = block(cin, channels, attention=attention)
        self.last = Layer(channels, a.img_channels, 3, norm=True, activation=a.activation,
                          scale=0.0)
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                module.name = name

    def layers(self):
        """Layers in the order in which an evaluation runs them."""
        order = [self.first]
        for block in (*self.encoder.values(), *self.decoder.values()):
            order += block.layers()
        return [*order, self.last]

    def embed(self, c_noise):
        """Embedding of c_noise (N,), shared by all blocks: (N, model_channels * embedding_mult)."""
        x = functional.silu(self.embed0(self.positional(c_noise)))
        return functional.silu(self.embed1(x))

    def forward(self, x, c_noise):
        """Raw output F (N, img_channels, H, W) for the scaled input `x` and c_noise (N,)."""
        run = self.executor
        embedding = self.embed(c_noise)
        x = run(self.first, [x], None, None, 1.0)
        skips = [x]
        for block in self.encoder.values():
            x = block([x], embedding, run)
            skips.append(x)
        for name, block in self.decoder.items():
            # Blocks named "block" take a skip; middle and up blocks do not.
            segments = [x, skips.pop()] if "_block" in name else [x]
            x = block(segments, embedding, run)
        return run(self.last, [x], None, None, 1.0)


class Precond(nn.Module):
    """Denoiser D(x, sigma) = c_skip x + c_out F(c_in x, c_noise) around a UNet (EDM, table 1).

    Defined for sigma in `sigma_min`..`sigma_max`, the range that it is trained and sampled in.
    """

    sigma_min = 0.002
    sigma_max = 80.0

    def __init__(self, architecture):
        super().__init__()
        self.architecture = architecture
        self.sigma_data = architecture.sigma_data
        self.unet = UNet(architecture)

    def coefficients(self, sigma):
        """(c_skip, c_out, c_in, c_noise) of `sigma`, each of its shape."""
        total = sigma ** 2 + self.sigma_data ** 2
        c_skip = self.sigma_data ** 2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        return c_skip, c_out, total.rsqrt(), sigma.log() / 4

    def forward(self, x, sigma):
        """Denoised image in float32 for `x` (N, C, H, W) = image + sigma * unit noise.

        `sigma` is a number, or a tensor of shape () or (N,), in units of pixels in [-1, 1].
        """
        x = x.float()
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
        return c_skip * x + c_out * self.unet(c_in * x, c_noise).float()


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
    """A LayerShape for each Layer of `unet`, in execution order (found by a run on zeros)."""
    shapes, a = [], unet.architecture

    def record(layer, segments, embedding, residual, gain):
        out = execute(layer, segments, embedding, residual, gain)
        shapes.append(LayerShape(layer.name, tuple(s.shape[1] for s in segments), layer.cout,
                                 *out.shape[2:], layer.kernel, layer.norm is not None,
                                 layer.activation, layer.resample))
        return out

    before, unet.executor = unet.executor, record
    like = unet.embed0.weight
    try:
        with torch.no_grad():
            unet(like.new_zeros(1, a.img_channels, a.resolution, a.resolution), like.new_zeros(1))
    finally:
        unet.executor = before
    return shapes
