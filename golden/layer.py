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
    """

    name: str
    evaluation: int
    requantization: Requantization
    convolution: Convolution
    detector_base: int = 0
    threshold: int = detector.NEVER
    interval: int = 1


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What a layer call leaves behind.

    Members
    -------
    codes : Codes of the convolution's input
    labels : (slots,) bool, true where the slot went to the sparse side
    accumulator : (Cout, H, W) exact sums
    output : (Cout, H, W) 16-bit results
    zero_counts : (slots,) of this call, for the labels of later ones
    saturations : groups clipped by the requantization
    """

    codes: Codes
    labels: torch.Tensor
    accumulator: torch.Tensor
    output: torch.Tensor
    zero_counts: torch.Tensor
    saturations: int


def run(call, counts, vector):
    """LayerResult of `call`.

    Parameters
    ----------
    call : LayerCall
    counts : (slots,) the detector's zero counts before the call, or bool to give the labels
        themselves (all False: no sparse side)
    vector : V

    Labels never change the output; they decide the order of the codes and who works on them. MX8
    and IN16 have none.
    """
    r, c = call.requantization, call.convolution
    codes = requantize(r.segments, r.gain, r.offset, r.shift, r.relu, r.format, vector)
    if codes.format in (Format.MX8, Format.IN16):
        labels = torch.zeros_like(codes.valid)
    elif isinstance(counts, torch.Tensor) and counts.dtype == torch.bool:
        labels = counts & codes.valid
    else:
        labels = detector.labels(counts, codes.codes[0].numel(), call.threshold, codes.valid)
    if tuple(c.weight_codes.shape[2:]) != (c.kernel, c.kernel):
        raise ValueError(f"kernel must be that of weight_codes, {c.weight_codes.shape[2]}, "
                         f"not {c.kernel!r}")
    acc = accumulate(codes, c.weight_codes, c.weight_scales, vector)
    out = epilogue(acc, c.align_shift, c.multiplier, c.scale_shift, c.bias, c.residual,
                   c.residual_multiplier)
    return LayerResult(codes, labels, acc, out, codes.zero_counts, codes.saturations)
