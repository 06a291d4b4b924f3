"""One layer call: a requantization pass, then a convolution, as the core runs them."""

import dataclasses

import torch

from golden import detector
from golden.convolution import accumulate
from golden.epilogue import epilogue
from golden.requantizer import Codes, Format, requantize

__all__ = ["Requantization", "Convolution", "LayerCall", "LayerResult", "run"]


@dataclasses.dataclass(frozen=True)
class Requantization:
    """Operands of `golden.requantizer.requantize`."""

    segments: list
    gain: torch.Tensor
    offset: torch.Tensor
    shift: int
    relu: bool
    format: Format


@dataclasses.dataclass(frozen=True)
class Convolution:
    """Operands of `golden.convolution.accumulate` and `golden.epilogue.epilogue`."""

    weight_codes: torch.Tensor
    weight_scales: torch.Tensor
    kernel: int
    multiplier: torch.Tensor
    bias: torch.Tensor
    align_shift: int
    scale_shift: int
    residual: torch.Tensor = None
    residual_multiplier: int = 0


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A layer in one evaluation, all integers.

    Members
    -------
    name : of the layer
    evaluation : 0, 1, ... in sampling order
    requantization, convolution : the two passes
    detector_base : first entry of the layer in the detector
    threshold : zeros / pixels, in units of 1/65536, from which a channel is sparse
    interval : evaluations between updates of the detector's counts
    balance : Costs, to split channels so that both sides end together, or None: by `threshold`
    dense_limit : most words of V channels of a tile on the dense side, 0..255
    tile_channels : slots of a tile of input channels, a multiple of 32; MX8 and IN16 have 32
    """

    name: str
    evaluation: int
    requantization: Requantization
    convolution: Convolution
    detector_base: int = 0
    threshold: int = detector.NEVER
    interval: int = 1
    balance: detector.Costs = None
    dense_limit: int = 255
    tile_channels: int = 64


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What a layer call leaves behind.

    Members
    -------
    codes : Codes of the convolution's input
    lists : list of ChannelList, one for each tile of input channels
    accumulator : (Cout, H, W) exact sums
    output : (Cout, H, W) 16-bit results
    zero_counts : (slots,) of this call, for the lists of later ones
    saturations : groups clipped by the requantization
    """

    codes: Codes
    lists: list
    accumulator: torch.Tensor
    output: torch.Tensor
    zero_counts: torch.Tensor
    saturations: int


def run(call, counts, vector, dense=True, sparse=True):
    """LayerResult of `call`.

    Parameters
    ----------
    call : LayerCall
    counts : (slots,) the detector's zero counts before the call, or bool to give the labels
        themselves, in place of `call.balance` and `call.threshold`; not used for MX8 and IN16
    vector : V
    dense, sparse : bool, whether the core has the side

    Lists never change the output; they decide the order of the codes and who works on them.
    """
    r, c = call.requantization, call.convolution
    codes = requantize(r.segments, r.gain, r.offset, r.shift, r.relu, r.format, vector)
    sides = vector, call.tile_channels, call.dense_limit, dense, sparse
    pixels = codes.codes[0].numel()
    if codes.format.mx:
        lists = detector.natural_lists(codes.valid)
    elif isinstance(counts, torch.Tensor) and counts.dtype == torch.bool:
        lists = detector.threshold_lists(counts, codes.valid, *sides)
    elif call.balance is not None:
        lists = detector.balanced_lists(counts, pixels, call.balance, codes.valid, *sides)
    else:
        labels = detector.labels(counts, pixels, call.threshold, codes.valid)
        lists = detector.threshold_lists(labels, codes.valid, *sides)
    if tuple(c.weight_codes.shape[2:]) != (c.kernel, c.kernel):
        raise ValueError(f"kernel must be that of weight_codes, {c.weight_codes.shape[2]}, "
                         f"not {c.kernel!r}")
    acc = accumulate(codes, c.weight_codes, c.weight_scales)
    out = epilogue(acc, c.align_shift, c.multiplier, c.scale_shift, c.bias, c.residual,
                   c.residual_multiplier)
    return LayerResult(codes, lists, acc, out, codes.zero_counts, codes.saturations)
