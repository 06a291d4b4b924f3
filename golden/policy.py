"""Policies: the formats of every layer's operands, under a name.

A policy says what codes most layers take and who shares their scales. A set of layers beside it
takes MXINT8. Formats of layers are strings: "IN16", "MX8", "A4U", "A4S" are those of the
accelerator, "FP16", "A8U" and "A8S" exist as float definitions only.
"""

import dataclasses
import fnmatch

from golden import granularity, mxint8
from golden.network import block_of
from golden.scatter import PLANES

__all__ = ["FORMATS", "POLICIES", "Policy", "centred", "takes_means", "hosted", "get", "formats",
           "paper", "choose", "bits_of", "cost_of", "cost", "macs_share", "scale_operations",
           "memory"]

# Bits of a code, and whether it is signed.
FORMATS = {"FP16": (16, True), "IN16": (16, True), "MX8": (8, True), "A8U": (8, False),
           "A8S": (8, True), "A4U": (4, False), "A4S": (4, True)}
SCALE_BITS = {"e4m3": 8, "power_of_two": 8, "int4": 4, "fp32": 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Codes of most layers, and who shares a scale.

    Members
    -------
    name : of the policy
    codes : "FP16", "MX8", "A8" or "A4"
    unsigned : whether codes after ReLU use all their levels for positive values
    group, block : channels (None: all) and side of the pixel block (None: image) of an activation
        scale
    scale : kind of activation scale, one of `golden.granularity.SCALES`
    level : what the scale above the groups' is: "tensor", calibrated, or "image", found on the fly
    static : None: scales found on the fly; or calibrated ones for each "tensor", "step" (noise
        level) or "channel"
    weight_group : channels of a weight scale (None: all)
    weight_taps : "each": a scale for every tap; "shared": one; "whole": one for the whole tensor
    weight_scale : kind of weight scale
    weight_level : whether the FP32 scale above is the "tensor"'s or of each output "channel"
    clip : whether the largest code stands for the part of the largest magnitude that gives the
        least squared error, in place of all of it
    skips : 1x1 convolutions without activation: "centred" (channel means taken out), "plain" or
        "mxint8"
    input_bits : 16 or 8, of the network's input
    """

    name: str
    codes: str = "A4"
    unsigned: bool = True
    group: int = None
    block: int = 1
    scale: str = "e4m3"
    level: str = "tensor"
    static: str = None
    weight_group: int = None
    weight_taps: str = "each"
    weight_scale: str = "e4m3"
    weight_level: str = "tensor"
    clip: bool = False
    skips: str = "centred"
    input_bits: int = 16

    def __post_init__(self):
        allowed = {
            "codes": ("FP16", "MX8", "A8", "A4"), "unsigned": (True, False),
            "scale": granularity.SCALES, "level": ("tensor", "image"),
            "static": (None, "tensor", "step", "channel"),
            "weight_taps": ("each", "shared", "whole"), "weight_scale": granularity.SCALES,
            "weight_level": ("tensor", "channel"), "clip": (True, False),
            "skips": ("centred", "plain", "mxint8"), "input_bits": (16, 8)}
        for name, values in allowed.items():
            value = getattr(self, name)
            if not any(value is item or (type(value) is type(item) and value == item)
                       for item in values):
                raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, "
                                 f"not {value!r}")
        for name in ("group", "block", "weight_group"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= 1 << 15):
                raise ValueError(f"{name} must be an integer in 1..32768 or None, not {value!r}")
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, not {self.name!r}")

    @property
    def bits(self):
        """Bits of a code."""
        return {"FP16": 16, "MX8": 8, "A8": 8, "A4": 4}[self.codes]

    @property
    def executable(self):
        """Whether the accelerator has these formats."""
        plain = dataclasses.replace(self, name="", unsigned=True)
        return plain in (Policy(name=""), Policy(name="", codes="MX8"))

    @classmethod
    def from_json(cls, fields):
        """The policy whose fields `dataclasses.asdict` wrote; ValueError names what is wrong."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or sorted(fields) != sorted(names):
            raise ValueError(f"policy must be an object with the fields {', '.join(names)}")
        return cls(**fields)


IMAGE = {"block": None, "scale": "fp32", "weight_scale": "fp32", "clip": True}
POLICIES = {policy.name: policy for policy in (
    Policy(name="fp16", codes="FP16"),
    Policy(name="int8", codes="A8", weight_taps="shared", **IMAGE),
    Policy(name="mxint8", codes="MX8"),
    Policy(name="int4", weight_taps="whole", **IMAGE),
    Policy(name="int4-channel", weight_taps="shared", **IMAGE),
    Policy(name="int4-vsq", group=16, scale="int4", level="image", weight_group=16,
           weight_scale="int4", weight_level="channel"),
    Policy(name="int4-fp8", unsigned=False),
    Policy(name="uint4-fp8"),
    Policy(name="mixed"),
)}


def get(name, unet):
    """The policy of that name; ValueError if there is none, or if `unet` cannot have it."""
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {name!r}")
    if name == "uint4-fp8" and not any(layer.relu for layer in unet.layers()):
        raise ValueError("policy must be one for signed activations (int4-fp8 or mixed): "
                         "the network has no ReLU, so not 'uint4-fp8'")
    return POLICIES[name]


def centred(layer):
    """Whether the requantizer takes each channel's mean over the image from a layer's input.

    A 1x1 convolution without activation has signed codes of what may lie far from 0. What the
    means contribute to the result is one number an output channel: the host adds it to the bias.
    """
    return layer.kernel == 1 and layer.activation is None and layer.resample is None


def takes_means(layer, format):
    """Whether a layer whose input has that format is `centred` in fact."""
    return centred(layer) and format not in ("FP16", "IN16")


def hosted(layer):
    """Whether the host applies GroupNorm, activation and filter, in place of the requantizer."""
    return layer.resample is not None or layer.activation not in (None, "relu")


def scattered(unet):
    """Names of the layers that run as the 1x1 layers of `golden.scatter`.

    They are 3x3 layers with few outputs whose result is the network's, with nothing added.
    """
    last = unet.last
    return {last.name} if (unet.architecture.decoder == "standard" and last.kernel == 3
                           and 9 * last.cout <= PLANES) else set()


def formats(unet, policy, wide=()):
    """Format of each layer's input, a dict by name in execution order.

    `wide` are the names of the layers in MXINT8. What reads the network's input, or an image made
    of it, has 16 bits: at low noise the noise itself is about one step of an 8-bit pixel.
    """
    found, images = {}, unet.image_layers()
    for layer in unet.layers():
        if policy.codes == "FP16":
            found[layer.name] = "FP16"
        elif layer.name in images:
            found[layer.name] = "IN16" if policy.input_bits == 16 else "MX8"
        elif (policy.codes == "MX8" or layer.name in wide
              or (policy.skips == "mxint8" and centred(layer))):
            found[layer.name] = "MX8"
        else:
            found[layer.name] = policy.codes + ("U" if policy.unsigned and layer.relu else "S")
    return found


def paper(unet):
    """Names of the layers that the paper's rule puts in MXINT8.

    They are those of the first block and the last two 3x3 convolutions.
    """
    layers = [layer for layer in unet.layers() if layer.name not in unet.image_layers()]
    first = block_of(layers[0].name)
    last = [layer.name for layer in layers if layer.kernel == 3][-2:]
    return {layer.name for layer in layers if block_of(layer.name) == first} | set(last)


def choose(unet, text):
    """Names of the layers that `text` lists: names or globs of layers or blocks between commas.

    ValueError if a part of it matches nothing.
    """
    names = [layer.name for layer in unet.layers() if layer.name not in unet.image_layers()]
    found = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        matching = {name for name in names if fnmatch.fnmatchcase(name, part)
                    or fnmatch.fnmatchcase(block_of(name), part)}
        if not matching:
            raise ValueError("mxint8 must be paper, none, auto, or names or globs of layers or "
                             f"blocks between commas, not {part!r}")
        found |= matching
    return found


def bits_of(format, policy, shape):
    """Bits of an activation and of a weight, with their share of the scales that groups have.

    `shape` is the layer's LayerShape. MXINT8 has 8 bits of exponent for 32 elements.
    """
    channels, taps = sum(shape.segments), shape.kernel ** 2
    weights = channels * taps * shape.cout
    bits = FORMATS[format][0]
    if format == "FP16":
        return 16.0, 16.0
    if format == "IN16":      # whose weights are gathered: all taps in the same blocks
        count = channels * taps
        return 16.0, 8 + 8 * -(-count // mxint8.BLOCK) / count
    if format == "MX8":
        return 8 + 8 / mxint8.BLOCK, 8 + 8 * -(-channels // mxint8.BLOCK) / channels
    pixels = shape.height * shape.width
    if policy.static:
        scales = 0.0
    else:
        blocks = 1 if policy.block is None else (-(-shape.height // policy.block)
                                                 * -(-shape.width // policy.block))
        groups = -(-channels // (policy.group or channels)) * blocks
        scales = SCALE_BITS[policy.scale] * groups / (channels * pixels)
    groups = {"each": shape.cout * taps, "shared": shape.cout, "whole": 1}[policy.weight_taps]
    if policy.weight_taps != "whole":
        groups *= -(-channels // (policy.weight_group or channels))
    above = 32 * shape.cout if policy.weight_level == "channel" else 0
    return bits + scales, bits + (SCALE_BITS[policy.weight_scale] * groups + above) / weights


def cost_of(format):
    """Cost of a multiplication in that format over one of FP16: linear in the bits of a code.

    The paper's measure: the area of n 4-bit multipliers holds n / 4 FP16 ones.
    """
    return FORMATS[format][0] / 16


def cost(formats, shapes):
    """Cost of all layers' MACs over that of FP16, see `cost_of`."""
    total = sum(shape.macs for shape in shapes)
    return sum(cost_of(formats[shape.name]) * shape.macs for shape in shapes) / total


def macs_share(formats, shapes, chosen=("MX8",)):
    """Share of the MACs of all layers that run in the formats `chosen`."""
    total = sum(shape.macs for shape in shapes)
    return sum(shape.macs for shape in shapes if formats[shape.name] in chosen) / total


def scale_operations(policy, formats, shapes):
    """Multiplications of integer sums by scales, an output element, mean of the narrow layers.

    One for each group of products that share both scales; the one of the epilogue is not counted.
    The mean is over output elements.
    """
    operations = outputs = 0
    for shape in shapes:
        if formats[shape.name] not in ("A4U", "A4S", "A8U", "A8S"):
            continue
        channels, taps = sum(shape.segments), shape.kernel ** 2
        count = shape.cout * shape.height * shape.width
        group = channels if policy.static in ("tensor", "step") else policy.group or channels
        group = 1 if policy.static == "channel" else group
        group = min(group, policy.weight_group or channels)
        weights = taps if policy.weight_taps == "each" else 1
        if policy.static or policy.block is None:
            places = 1
        else:
            # Blocks that a window of `kernel` pixels touches, on the average over its position.
            side = min(policy.block, shape.height)
            places = ((shape.kernel - 1 + side) / side) ** 2
        groups = -(-channels // group) * max(weights, min(places, taps))
        whole = group == channels and weights == 1 and places == 1
        operations += count * (0 if whole else groups)
        outputs += count
    return operations / outputs if outputs else 0.0


def memory(policy, formats, shapes):
    """Bits of all weights and of all layers' inputs of one image, and those of FP16."""
    bits = half = 0
    for shape in shapes:
        activation, weight = bits_of(formats[shape.name], policy, shape)
        inputs = sum(shape.segments) * shape.height * shape.width
        weights = sum(shape.segments) * shape.kernel ** 2 * shape.cout
        bits += inputs * activation + weights * weight
        half += 16 * (inputs + weights)
    return bits, half
