"""MXINT8 (OCP Microscaling Formats 1.0): 8-bit integers in blocks of 32 with a shared exponent.

e = floor(log2 amax) from the exponent bits, step 2^(e-6), codes -127..127. In hardware the
exponents of a tensor lie in a window of `WINDOW` and are stored above its bottom. The 16-bit
network input runs on the same multipliers as two 8-bit halves.
"""

import torch
from torch.nn import functional

from golden import checks
from golden.gather import gather_weights, scatter_weights
from golden.granularity import floor_log2, power_of_two
from golden.rounding import round_half_even

__all__ = ["BLOCK", "WINDOW", "LARGEST", "SPLIT_LIMIT", "static_scale", "input_scale", "window_of",
           "fake_quantize", "fake_quantize_input", "fake_quantize_input_weights",
           "quantize_weights", "quantize_input_weights", "quantize", "split", "blocks"]

BLOCK = 32
WINDOW = 16
LARGEST = 127              # codes are symmetric: -128 appears only in the halves of `split`
BOTTOM = 7                 # position of the leading one at the bottom of the integer window
SPLIT_LIMIT = 32639        # 127 * 256 + 127: both halves fit 8 bits
SPLIT_SCALES = (8, 0)      # of high and low halves: a factor of 256 between them
UNIT = -10                 # the integer implementation counts units of 2^-10 * sA


def exponent_of(amax):
    """floor(log2 `amax`) of a positive number."""
    return int(floor_log2(torch.tensor(float(amax), dtype=torch.float64)))


def static_scale(amax):
    """Power of two sA that puts the magnitude `amax` into the window's top; 1 if it is 0."""
    return 2.0 ** (exponent_of(amax) - (BOTTOM + WINDOW - 1 + UNIT)) if amax > 0 else 1.0


def input_scale(amax):
    """Power of two sA of a network input: `SPLIT_LIMIT` units of 2^-9 * sA reach `amax`, least."""
    if not amax > 0:
        return 1.0
    exponent = exponent_of(amax / SPLIT_LIMIT)
    return 2.0 ** (exponent + (2.0 ** exponent * SPLIT_LIMIT < amax) + 9)


def window_of(tensor_scale):
    """Exponent at the bottom of the window of activations with the power of two sA."""
    return exponent_of(tensor_scale) + BOTTOM + UNIT


def blocks(x, block=BLOCK, dim=0):
    """`x` with axis `dim` (C) as (ceil(C / block), block), the last block padded with zeros."""
    pad = [0, 0] * (x.dim() - 1 - dim) + [0, -x.shape[dim] % block]
    return functional.pad(x, pad).unflatten(dim, (-1, block))


def encode(x, block, window):
    """Codes (N, groups, block, ...), exponents e (N, groups, 1, ...) of float `x` (N, C, ...)."""
    grouped = blocks(checks.floats("x", x).float(), checks.integer("block", block, 1, 1 << 15), 1)
    amax = grouped.abs().amax(2, keepdim=True)
    exponent = floor_log2(amax).clamp(min=-120)
    zero = amax == 0
    if window is not None:
        checks.integer("window", window, -120, 112)
        zero |= exponent < window
        exponent = exponent.clamp(window, window + WINDOW - 1)
    codes = (grouped / power_of_two(exponent - 6)).round_().clamp_(-LARGEST, LARGEST)
    return codes.masked_fill_(zero, 0), exponent


def fake_quantize(x, *, block=BLOCK, window=None):
    """The float definition of MXINT8: `x` (N, C, ...) in blocks of channels.

    Activations are (N, C, H, W), weights (Cout, Cin, k, k). Elements are rounded with the step
    2^(e-6) and clipped to 127 steps.

    Parameters
    ----------
    block : channels that share an exponent
    window : lowest of the `WINDOW` exponents that hardware keeps; blocks below it become 0, those
        above it keep its top exponent, with elements clipped. None: any exponent from -120 on,
        the lowest whose step float32 holds as a normal number.
    """
    codes, exponent = encode(x, block, window)
    return (codes * power_of_two(exponent - 6)).flatten(1, 2)[:, :x.shape[1]].to(x.dtype)


def fake_quantize_input(x, tensor_scale):
    """The float definition of IN16: `x` rounded to `SPLIT_LIMIT` units of 2^-9 * sA either way."""
    unit = tensor_scale * 2.0 ** -9
    codes = (checks.floats("x", x).float() / unit).round_().clamp_(-SPLIT_LIMIT, SPLIT_LIMIT)
    return (codes * unit).to(x.dtype)


def fake_quantize_input_weights(w):
    """The float definition of the weights of IN16: `fake_quantize` of the gathered `w`.

    `w` is (Cout, C, k, k); elements of all taps share the blocks, see `golden.gather`.
    """
    return scatter_weights(fake_quantize(gather_weights(w)), w.shape[-1])


def quantize_weights(w):
    """Codes, exponents and unit of the weights `w` (Cout, slots, k, k).

    The window's top is the exponent of the largest magnitude. Returns the codes, -127..127, in the
    shape of `w`; scales (Cout, k * k, groups), 0..15 above the window's bottom; and the power of
    two uW: a weight is code * 2^scale * uW. Together they are `fake_quantize` of `w` with that
    window, bit for bit.
    """
    checks.floats("w", w, (None, None, None, None))
    amax = w.float().abs().max().item()
    bottom = (exponent_of(amax) if amax > 0 else 0) - (WINDOW - 1)
    codes, exponent = encode(w, BLOCK, bottom)
    scales = torch.where((codes == 0).all(2, keepdim=True), 0, exponent - bottom)
    return (codes.flatten(1, 2)[:, :w.shape[1]].to(torch.int64),
            scales.squeeze(2).flatten(2).transpose(1, 2).to(torch.int64), 2.0 ** (bottom - 6))


def quantize_input_weights(w):
    """`quantize_weights` of the gathered `w` (Cout, C, k, k) for the two halves of the input.

    With B = ceil(k * k * C / 32): codes (Cout, 64 B, 1, 1) and scales (Cout, 1, 2 B), both halves
    alike, and uW.
    """
    codes, scales, unit = quantize_weights(gather_weights(w))
    return blocks(codes, dim=1).flatten(1, 2).repeat(1, 2, 1, 1), scales.repeat(1, 1, 2), unit


def quantize(y):
    """The integer implementation of MXINT8, in blocks of 32 slots, the last padded with zeros.

    Parameters
    ----------
    y : (C, H, W) integers below 2^23 in magnitude, in units of 2^-10 * sA, sA a power of two

    Returns the codes (C, H, W), -127..127, and scales (ceil(C / 32), H, W), 0..15. An element is
    code * 2^(scale + 1) units. A block below the window, with no magnitude of 128 or more, has
    scale 0 and codes 0. Equal to `fake_quantize` of y * 2^-10 with `window_of(1)`, bit for bit.
    """
    limit = (1 << 23) - 1
    y = checks.integers("y", y, -limit, limit, (None, None, None))
    grouped = blocks(y)                                          # (groups, 32, H, W)
    # Exact: integers below 2^53 are float64.
    lead = floor_log2(grouped.abs().amax(1, keepdim=True).double()).to(torch.int64)
    below = lead < BOTTOM
    magnitude = round_half_even(grouped.abs(), (lead - 6).clamp(min=0)).clamp(max=LARGEST)
    codes = torch.where(below, 0, grouped.sign() * magnitude)
    return codes.flatten(0, 1)[:len(y)], torch.where(below, 0, lead - BOTTOM).squeeze(1)


def split(x):
    """High and low halves of the 16-bit `x` (C, H, W): x = 256 * high + low, both of 8 bits.

    With B = ceil(C / 32) blocks, the last one padded with zeros: codes (64 B, H, W), high halves
    first; scales (2 B, H, W); and where x was clipped to `SPLIT_LIMIT`, (C, H, W). Low halves may
    be -128.
    """
    x = checks.integers("x", x, -1 << 15, (1 << 15) - 1, (None, None, None))
    clipped = x.abs() > SPLIT_LIMIT
    x = blocks(x.clamp(-SPLIT_LIMIT, SPLIT_LIMIT))               # (B, 32, H, W)
    low = ((x + 128) & 255) - 128
    scales = torch.tensor(SPLIT_SCALES).repeat_interleave(len(x))[:, None, None]
    return (torch.cat([(x - low) >> 8, low]).flatten(0, 1),
            scales.expand(-1, *x.shape[2:]).clone(), clipped)
