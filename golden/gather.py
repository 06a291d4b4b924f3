"""A 3x3 convolution as a 1x1 convolution: the host gathers each pixel's neighbourhood.

The layers that read the network's input have few channels, so that tap by tap their groups would
be nearly empty. Channel t * C + c of the gathered image is channel c at tap t = 3 * ky + kx.
"""

import torch
from torch.nn import functional

__all__ = ["gather", "gather_weights", "scatter_weights"]


def gather(x):
    """`x` (..., C, H, W) as (..., 9 C, H, W), 0 where a tap lies outside the image."""
    height, width = x.shape[-2:]
    padded = functional.pad(x, (1, 1, 1, 1))
    return torch.cat([padded[..., row:row + height, column:column + width]
                      for row in range(3) for column in range(3)], -3)


def gather_weights(w):
    """Weights `w` (Cout, C, k, k) as those of the 1x1 convolution, (Cout, k * k * C, 1, 1)."""
    return w.permute(0, 2, 3, 1).flatten(1)[:, :, None, None].contiguous()


def scatter_weights(w, kernel):
    """The inverse of `gather_weights`: (Cout, C, `kernel`, `kernel`)."""
    return w.unflatten(1, (kernel, kernel, -1))[..., 0, 0].permute(0, 3, 1, 2).contiguous()
