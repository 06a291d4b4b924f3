"""The cycle model: compute cycles of a convolution, equal to the RTL's to the cycle.

It follows one layer that fits the buffers, from the cycle in which everything is loaded to the
last result, with a memory that never holds back a residual or a result. Times are cycles after
the start strobe; a chunk is V/4 outputs of one pixel.
"""

import heapq

import numpy as np

from golden.requantizer import Format
from hw.walker import WORD_QUEUE_DEPTH

__all__ = ["conv_cycles"]

FETCH = 3             # a fetch to its word at the compactor
DENSE_FLUSH = 12      # last issue of a tile to its first chunk at the post-processor, plus steps
SPARSE_FLUSH = 13


def conv_cycles(codes, labels, kernel, outputs, config):
    """Cycles of one convolution.

    Parameters
    ----------
    codes : golden.requantizer.Codes
        Activations, slots in natural order.
    labels : (slots,) bool
        True for the slots that the sparse PEs take.
    kernel : int
        3 or 1.
    outputs : int
        Output channels.
    config : hw.config.Config

    Returns
    -------
    dict
        ``compute``: until the last chunk is merged. ``dense_busy``, ``sparse_busy``: until the
        last issue of that side. ``stall``: cycles in which a side waits for room for results.
    """
    vector, quad = config.vector, config.quad
    values = np.asarray(codes.codes)
    valid, labels = np.asarray(codes.valid), np.asarray(labels).astype(bool)
    height, width = values.shape[1:]
    mx = codes.format in (Format.MX8, Format.IN16)
    dense_words = len(valid) // vector if mx else -(-int((valid & ~labels).sum()) // vector)
    sparse_values = values[np.flatnonzero(valid & labels)] if not mx else values[:0]
    sparse_words = -(-len(sparse_values) // vector)
    padded = np.zeros((sparse_words * vector, height * width), dtype=bool)
    padded[:len(sparse_values)] = sparse_values.reshape(len(sparse_values), height * width) != 0
    # (pixels, words) non-zeros, as nested lists for the walk below
    filled = padded.reshape(sparse_words, vector, height * width).sum(1).T.tolist()

    taps = taps_of_pixels(height, width, kernel)
    chunks, pixel_chunks = -(-outputs // quad), -(-outputs // vector) * 4
    dense = Side(config, config.dense_lanes, config.dense_scale_units, chunks, DENSE_FLUSH)
    sparse = [SparseSide(config, chunks) for _ in range(config.sparse_pes if sparse_words else 0)]
    if mx:
        group_words = 1 if codes.format == Format.IN16 else 32 // vector
        groups = [4 * min(group_words, dense_words - first)
                  for first in range(0, dense_words, group_words)]
    else:
        groups = [dense_words]

    merged = 0
    for pixel, inputs in enumerate(taps):
        sides = []
        if dense_words:
            sides.append((dense, dense.pixel(len(inputs), groups)))
        if sparse_words:
            pe = sparse[pixel % len(sparse)]
            sides.append((pe, pe.pixel([filled[place] for place in inputs])))
        for chunk in range(pixel_chunks):
            merged += 1
            if chunk < chunks:
                for _, arrivals in sides:
                    merged = max(merged, arrivals[chunk])
                for side, _ in sides:
                    side.pops.append(merged)
    stalls = sorted(interval for side in [dense, *sparse] for interval in side.stalls)
    return {
        "compute": merged,
        "dense_busy": dense.issued,
        "sparse_busy": max((pe.issued for pe in sparse), default=0),
        "stall": length_of_union(stalls),
    }


def taps_of_pixels(height, width, kernel):
    """For each output pixel, the input pixels under its taps that lie inside the image."""
    reach = range(-(kernel // 2), kernel // 2 + 1)
    return [
        [(y + dy) * width + x + dx for dy in reach for dx in reach
         if 0 <= y + dy < height and 0 <= x + dx < width]
        for y in range(height) for x in range(width)]


def length_of_union(intervals):
    """Number of integers in sorted half-open intervals."""
    total, end = 0, 0
    for first, last in intervals:
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


class Side:
    """When one PE issues its products and its chunks reach the post-processor."""

    def __init__(self, config, lanes, units, chunks, flush_latency):
        self.room, self.flush_latency = config.result_depth, flush_latency
        tile = lanes // config.quad
        self.tiles = [min(tile, chunks - first) for first in range(0, chunks, tile)]
        self.chunk_cycles = config.quad // min(units, config.quad)
        self.steps = [-(-size * config.quad // units) for size in self.tiles]
        self.issued = 0                  # cycle of the last issue
        self.group_free = 1              # first cycle in which a group may end
        self.flushed = -(1 << 40)        # last issue of the tile before, plus its steps and flush
        self.reserved = 0
        self.pops = []                   # cycle in which each chunk left
        self.stalls = []                 # half-open intervals

    def end_group(self, cycle, tile):
        """Cycle in which the last product of a group is issued that is ready at ``cycle``."""
        cycle = max(cycle, self.group_free)
        self.group_free = cycle + self.steps[tile]
        return cycle

    def end_tile(self, cycle, tile):
        """The same for the last product of a tile, and the cycles in which its chunks arrive."""
        size, steps = self.tiles[tile], self.steps[tile]
        self.reserved += size
        needed = self.reserved - self.room
        if needed > 0:
            roomy = self.pops[needed - 1] + 1
            if roomy > cycle:
                self.stalls.append((cycle, roomy))
        else:
            roomy = cycle
        cycle = max(cycle, roomy, self.group_free, self.flushed - steps)
        self.group_free = cycle + steps
        self.flushed = cycle + steps + size * self.chunk_cycles
        first = cycle + self.flush_latency + steps
        return cycle, [first + (chunk + 1) * self.chunk_cycles for chunk in range(size)]

    def pixel(self, taps, groups):
        """Arrival of the chunks of a pixel whose groups take these many issues, tap by tap."""
        arrivals = []
        for tile in range(len(self.tiles)):
            for tap in range(taps):
                for number, issues in enumerate(groups):
                    ready = self.issued + issues
                    if tap + 1 == taps and number + 1 == len(groups):
                        self.issued, arrived = self.end_tile(ready, tile)
                        arrivals += arrived
                    else:
                        self.issued = self.end_group(ready, tile)
        return arrivals


class SparseSide(Side):
    """A sparse PE: words are fetched, words without non-zeros dropped, the others walked."""

    def __init__(self, config, chunks):
        super().__init__(
            config, config.sparse_lanes, config.sparse_scale_units, chunks, SPARSE_FLUSH)
        self.fetched = 0
        self.credits = [-1] * WORD_QUEUE_DEPTH

    def pixel(self, taps):
        """Arrival of the chunks of a pixel with these non-zeros in the words of each tap."""
        arrivals = []
        for tile in range(len(self.tiles)):
            held = None                   # (cycle, non-zeros, ends its group) of the word held
            for number, words in enumerate(taps):
                tile_last = number + 1 == len(taps)
                for place, nonzeros in enumerate(words):
                    self.fetched = max(self.fetched, heapq.heappop(self.credits)) + 1
                    cycle = self.fetched + FETCH
                    group_last = place + 1 == len(words)
                    if nonzeros:
                        if held:
                            self.walk(cycle, held[0], held[1], tile)
                        held = [nonzeros, group_last]
                        entered = cycle
                    else:
                        if held and group_last:
                            held[1] = True
                        if tile_last and group_last and not held:
                            held, entered = [0, True], cycle
                        else:
                            heapq.heappush(self.credits, cycle)
            # A word that ends its tile by itself leaves the cycle after it came, else with the
            # empty word that ends the tile.
            ends_itself = entered == cycle
            arrivals += self.walk(cycle + 1 if ends_itself else cycle, held[0], True, tile,
                                  tile_last=True)
        return arrivals

    def walk(self, pushed, nonzeros, group_last, tile, *, tile_last=False):
        """A word that enters the queue; the chunks that it completes."""
        taken = max(pushed + 1, self.issued)
        heapq.heappush(self.credits, taken)
        ready = taken + max(nonzeros, 1)
        arrivals = []
        if tile_last:
            self.issued, arrivals = self.end_tile(ready, tile)
        elif group_last:
            self.issued = self.end_group(ready, tile)
        else:
            self.issued = ready
        return arrivals
