"""The sparsity detector: zero counts kept per channel, labels by threshold, and their order."""

import torch

from golden import checks
from golden.requantizer import check_vector

__all__ = ["NEVER", "NO_CHANNEL", "labels", "permutation", "positions", "Detector"]

NEVER = (1 << 17) - 1      # a threshold that no channel reaches
NO_CHANNEL = 0xFFFF        # entry of the permutation for a position without a channel


def labels(counts, pixels, threshold, valid):
    """Whether each slot is sparse: its zeros are at least `threshold` / 65536 of its pixels.

    Parameters
    ----------
    counts : (slots,) zero counts, 0..65535
    pixels : H * W, 1..65535
    threshold : 0..2^17-1; 65536 is reached by all-zero channels only, more by none
    valid : (slots,) bool; a slot without a channel is never sparse

    Returns (slots,) bool.
    """
    valid = check_valid(valid)
    counts = checks.integers("counts", counts, 0, 65535, tuple(valid.shape))
    checks.integer("pixels", pixels, 1, 65535)
    checks.integer("threshold", threshold, 0, NEVER)
    return (counts * 65536 >= threshold * pixels) & valid


def permutation(labels, valid, vector, natural=False):
    """Lists of dense and of sparse slots in ascending order, as int64 tensors.

    With `natural` (MX8 and IN16) all slots stay in place: the dense list has an entry for every
    slot, `NO_CHANNEL` where there is no channel, and the sparse list is empty.
    """
    valid = check_valid(valid)
    check_vector(vector)
    if len(valid) % vector:
        raise ValueError(f"valid must be a multiple of {vector} slots, not {len(valid)!r}")
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.bool:
        raise TypeError(f"labels must be a tensor of bool, not {labels!r}")
    checks.check_shape("labels", labels, tuple(valid.shape))
    every = torch.arange(len(valid))
    if natural:
        return torch.where(valid, every, NO_CHANNEL), every[:0]
    return every[valid & ~labels], every[valid & labels]


def positions(dense, sparse, vector):
    """Slot at each position: both lists, each padded with `NO_CHANNEL` to a multiple of V."""
    check_vector(vector)
    padded = [torch.cat([part, part.new_full((-len(part) % vector,), NO_CHANNEL)])
              for part in (dense, sparse)]
    return torch.cat(padded)                                     # ((Wd + Ws) * V,)


class Detector:
    """Zero counts of all layers, from one evaluation to the next.

    Members
    -------
    counts : (entries,) int64; entry base + slot belongs to a slot of the layer at `base`
    """

    def __init__(self, entries):
        self.counts = torch.zeros(checks.integer("entries", entries, 1, 1 << 16),
                                  dtype=torch.int64)

    def read(self, base, slots):
        """Counts of the layer at `base`, (slots,)."""
        return self.counts[self.window(base, slots)].clone()

    def load(self, base, counts):
        """Overwrite the counts of the layer at `base`, as the host does before evaluation 0."""
        counts = checks.integers("counts", counts, 0, 65535, (None,))
        self.counts[self.window(base, len(counts))] = counts

    def update(self, base, counts, evaluation, interval):
        """Store a pass's new counts at its end if `interval` divides `evaluation`."""
        checks.integer("evaluation", evaluation, 0, 65535)
        checks.integer("interval", interval, 1, 65535)
        if evaluation % interval == 0:
            self.load(base, counts)

    def window(self, base, slots):
        """Slice of the layer at `base`."""
        checks.integer("base", base, 0, len(self.counts) - 1)
        if base + slots > len(self.counts):
            raise ValueError(f"base must leave room for {slots} entries of {len(self.counts)}, "
                             f"not {base!r}")
        return slice(base, base + slots)


def check_valid(valid):
    """`valid` if it is a (slots,) tensor of bool."""
    if not isinstance(valid, torch.Tensor) or valid.dtype != torch.bool:
        raise TypeError(f"valid must be a tensor of bool, not {valid!r}")
    checks.check_shape("valid", valid, (None,))
    return valid
