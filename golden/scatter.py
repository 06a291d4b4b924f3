"""A 3x3 convolution as a 1x1 convolution: the host adds the products of the taps, each shifted.

The layer that makes the network's output has few output channels, which would leave most output
lanes of the array without work. As a 1x1 convolution it has nine planes of each: plane t * C + k
holds, at every input pixel, its product with the weights of output k at tap t = 3 * ky + kx.
"""

import torch
from torch.nn import functional

__all__ = ["PLANES", "plane_weights", "plane_scales", "plane_bias", "add_planes"]

PLANES = 32                # of a scattered layer, at most
CENTRE = 4                 # the tap that all output pixels have


def plane_weights(w):
    """Weights `w` (C, Cin, 3, 3) as those of the planes, (9 C, Cin, 1, 1)."""
    return w.permute(2, 3, 0, 1).flatten(0, 2)[:, :, None, None].contiguous()


def plane_scales(scales):
    """Scales (C, 9, groups) of weights as those of the planes, (9 C, 1, groups)."""
    return scales.transpose(0, 1).flatten(0, 1)[:, None].contiguous()


def plane_bias(bias):
    """`bias` (..., C) as that of the planes, (..., 9 C): all of it in those of the centre tap."""
    count = bias.shape[-1]
    return functional.pad(bias, (CENTRE * count, (8 - CENTRE) * count))


def add_planes(planes):
    """The sums (..., C, H, W) of `planes` (..., 9 C, H, W), each moved to the pixels that it is of.

    Output pixel (y, x) takes tap (ky, kx) from the input pixel (y + ky - 1, x + kx - 1), and
    nothing where that lies outside the image.
    """
    height, width = planes.shape[-2:]
    taps = functional.pad(planes.unflatten(-3, (9, -1)), (1, 1, 1, 1)).unbind(-4)
    return torch.stack([taps[3 * row + column][..., row:row + height, column:column + width]
                        for row in range(3) for column in range(3)]).sum(0)
