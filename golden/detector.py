"""The sparsity detector: zero counts kept per channel, and the lists of channels that follow.

Input channels are divided into tiles. Each tile has a list of its channels, split between both
sides of the array by labels (threshold mode) or by the work that the counts foretell (balanced).
"""

import dataclasses

import torch

from golden import checks, mxint8
from golden.requantizer import check_vector

__all__ = ["NEVER", "NO_CHANNEL", "Costs", "ChannelList", "labels", "natural_lists",
           "threshold_lists", "balanced_lists", "balance", "Detector"]

NEVER = (1 << 17) - 1      # a threshold that no channel reaches
NO_CHANNEL = 0xFFFF        # entry of a list for a position without a channel
BUCKET_BITS = 6            # of the zero counts that the balanced order looks at


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


@dataclasses.dataclass(frozen=True)
class Costs:
    """What work costs either side, for the balanced mode; any common unit, 0..65535 each.

    Members
    -------
    word : dense side, a word of V channels of a pixel
    nonzero : sparse side, a non-zero code
    group : sparse side, a pixel, besides
    floor : sparse side, the least of a pixel on average
    """

    word: int
    nonzero: int
    group: int
    floor: int

    def __post_init__(self):
        for name, value in vars(self).items():
            checks.integer(name, value, 0, 65535)


@dataclasses.dataclass(frozen=True)
class ChannelList:
    """Channels of a tile of input channels in the order of their codes, and where they are split.

    Members
    -------
    first, size : slots of the tile in the tensor
    slots : (n,) int64, slot of each position, counted from `first`; `NO_CHANNEL` where a position
        of MX8 or IN16 has none
    low, high, cut : of the split, see `split`
    """

    first: int
    size: int
    slots: torch.Tensor
    low: int
    high: int
    cut: int

    def positions(self, vector):
        """Slot of each position, `NO_CHANNEL` in the padding to a multiple of V."""
        check_vector(vector)
        pad = self.slots.new_full((-len(self.slots) % vector,), NO_CHANNEL)
        return torch.cat([self.slots, pad])

    def split(self, pixels):
        """First position of the sparse side at each of a run's output pixels 0.., (pixels,).

        Of any 256 pixels in succession `cut` give the positions from `low` to `high` to the dense
        side, as evenly as can be.
        """
        pixel = torch.arange(pixels)
        gives = ((pixel * self.cut) & 255) + self.cut >= 256
        return torch.where(gives, self.high, self.low)

    def gather(self, codes, vector):
        """Codes (positions, H, W) of the tile in order, from those of the tensor's slots."""
        order = self.positions(vector)
        there = order != NO_CHANNEL
        codes = codes[self.first + torch.where(there, order, 0)]
        return torch.where(there[:, None, None], codes, 0)


def natural_lists(valid):
    """ChannelLists of MX8 and IN16: tiles of 32 slots in place, without a split."""
    valid = check_slots(valid, mxint8.BLOCK)
    slots = torch.arange(mxint8.BLOCK)
    return [ChannelList(first, mxint8.BLOCK,
                        torch.where(valid[first:first + mxint8.BLOCK], slots, NO_CHANNEL),
                        mxint8.BLOCK, mxint8.BLOCK, 0)
            for first in range(0, len(valid), mxint8.BLOCK)]


def threshold_lists(labels, valid, vector, tile_channels, dense_limit=255, dense=True,
                    sparse=True):
    """ChannelLists by labels: dense slots ascending, then sparse slots ascending.

    Parameters
    ----------
    labels : (slots,) bool, true where the slot is sparse
    valid : (slots,) bool; a slot without a channel is in no list
    vector : V
    tile_channels : slots of a tile, a multiple of 32; the last tile may have fewer
    dense_limit : most words of V channels of a tile on the dense side, 0..255
    dense, sparse : bool, whether the core has the side. Where it lacks one, the slots are
        ascending, whatever the labels, and all of them belong to the other one.
    """
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.bool:
        raise TypeError(f"labels must be a tensor of bool, not {labels!r}")
    checks.check_shape("labels", labels, tuple(check_valid(valid).shape))

    def order(slots):
        chosen = labels[slots]
        boundary = min(int((~chosen).sum()), dense_limit * vector)
        return torch.cat([slots[~chosen], slots[chosen]]), boundary, boundary, 0

    return tile_lists(order, valid, vector, tile_channels, dense_limit, dense, sparse)


def balanced_lists(counts, pixels, costs, valid, vector, tile_channels, dense_limit=255,
                   dense=True, sparse=True):
    """ChannelLists with which both sides take as long, if the zeros are where they were.

    The emptiest channels go to the sparse side; at most one word of V channels goes to the one
    side at some pixels and to the other side at the rest.

    Parameters
    ----------
    counts : (slots,) zero counts, 0..65535
    pixels : H * W, 1..65535
    costs : Costs
    valid, vector, tile_channels, dense_limit, dense, sparse : as for `threshold_lists`
    """
    counts = checks.integers("counts", counts, 0, 65535, tuple(check_valid(valid).shape))
    checks.integer("pixels", pixels, 1, 65535)
    if not isinstance(costs, Costs):
        raise TypeError(f"costs must be of Costs, not {costs!r}")
    coarse = max(0, pixels.bit_length() - BUCKET_BITS)

    def order(slots):
        left = pixels - counts[slots].clamp(max=pixels)
        order = torch.argsort((pixels - left) >> coarse, stable=True)
        sums = [int(part.sum()) for part in left[order].split(vector)]
        words, cut = balance(sums, pixels, costs, dense_limit)
        low, high = (min(n * vector, len(slots)) for n in (words, words + (cut > 0)))
        return slots[order], low, high, cut

    return tile_lists(order, valid, vector, tile_channels, dense_limit, dense, sparse)


def balance(nonzeros, pixels, costs, limit):
    """Words of a tile on the dense side, and 256ths of the pixels at which it has one word more.

    Parameters
    ----------
    nonzeros : non-zero codes of each word, in order, of all pixels
    pixels : H * W
    costs : Costs
    limit : most words on the dense side
    """
    count = len(nonzeros)

    def dense(words):
        return words * costs.word * pixels

    def sparse(words):
        return (max(sum(nonzeros[words:]) * costs.nonzero + pixels * costs.group,
                    pixels * costs.floor) if words < count else 0)

    limit = min(count, limit)
    words = max(n for n in range(limit + 1) if dense(n) <= sparse(n))
    if words == limit:
        return words, 0
    # Where the line from dense(n) to dense(n + 1) crosses that from sparse(n) to sparse(n + 1).
    gap = sparse(words) - dense(words)
    closes = dense(words + 1) - dense(words) + sparse(words) - sparse(words + 1)
    return words, 256 * gap // closes


def tile_lists(order, valid, vector, tile_channels, dense_limit, dense, sparse):
    """ChannelLists of all tiles; `order` (slots) gives slots in order, low, high and cut."""
    check_vector(vector)
    valid = check_slots(valid, vector)
    checks.integer("tile_channels", tile_channels, 32, 256)
    if tile_channels % 32:
        raise ValueError(f"tile_channels must be a multiple of 32, not {tile_channels!r}")
    checks.integer("dense_limit", dense_limit, 0, 255)
    if not checks.boolean("dense", dense) | checks.boolean("sparse", sparse):
        raise ValueError("sparse must be True where dense is False, not False")
    lists = []
    for first in range(0, len(valid), tile_channels):
        part = slice(first, min(first + tile_channels, len(valid)))
        slots = torch.arange(first, part.stop)[valid[part]]
        if dense and sparse:
            slots, low, high, cut = order(slots)
        else:
            low = high = len(slots) if dense else 0
            cut = 0
        lists.append(ChannelList(first, part.stop - first, slots - first, low, high, cut))
    return lists


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


def check_slots(valid, multiple):
    """`valid` if it is a tensor of bool of a `multiple` of slots."""
    if len(check_valid(valid)) % multiple:
        raise ValueError(f"valid must be a multiple of {multiple} slots, not {len(valid)!r}")
    return valid
