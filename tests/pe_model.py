"""Naive forms of what the PEs and the dispatcher do, and the simulator calls that tests share.

They are written from the contracts of the units, one loop a sum or a step.
"""

import itertools

from amaranth.sim import Simulator

from tests import naive

STALLS = (0.0, 0.5, 0.9)


def simulate(dut, *benches):
    """Run the async functions ``benches`` on ``dut``, all from the first cycle on."""
    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    for bench in benches:
        simulator.add_testbench(bench)
    simulator.run()


def geometry(config, height, width, *, kernel=3, outputs=1, words=1, format=naive.A4U):
    """Fields of `hw.window.geometry_layout` for a side with ``words`` words of channels."""
    vector = config.vector
    mx = format in (naive.MX8, naive.IN16)
    return {
        "height": height, "width": width, "plane": height * width, "kernel3": int(kernel == 3),
        "mx": int(mx), "signed_codes": int(format == naive.A4S), "words": words,
        "group_words": 1 if format == naive.IN16 else 32 // vector,
        "groups": {naive.MX8: -(-words * vector // 32), naive.IN16: 2}.get(format, 1),
        "output_words": -(-outputs // vector), "chunks": -(-outputs // config.quad),
    }


def packed(layout, values):
    """Integer of a structure with these fields; the others are 0."""
    return sum(value << dict(layout)[name].offset for name, value in values.items())


def tile_sizes(config, outputs, lanes):
    """Chunks of each tile of lanes."""
    chunks, most = -(-outputs // config.quad), lanes // config.quad
    return [min(most, chunks - first) for first in range(0, chunks, most)]


def walk(config, lanes, height, width, *, kernel, outputs, first=0, step=1):
    """Every tap of `hw.window.Window` as a dictionary of its record's fields."""
    for pixel in range(first, height * width, step):
        row, column = divmod(pixel, width)
        for tile, chunks in enumerate(tile_sizes(config, outputs, lanes)):
            inside = list(naive.taps(kernel, height, width, row, column))
            for tap, y, x in inside:
                yield {"pixel": y * width + x, "tap": tap, "tile": tile, "chunks": chunks,
                       "last": int((tap, y, x) == inside[-1])}


def nibbles(values):
    """Integer whose nibbles, lowest first, are the low four bits of ``values``."""
    return sum((value & 15) << 4 * n for n, value in enumerate(values))


def octets(values):
    return sum((value & 255) << 8 * n for n, value in enumerate(values))


def port_bytes(config, values):
    """Port words that hold bytes, the last one filled up with zeros."""
    size = config.port_width // 8
    return [octets(values[n:n + size]) for n in range(0, len(values), size)]


def code_words(config, codes, mx):
    """Port words of ``codes[position][pixel]``."""
    vector, words = config.vector, []
    planes = (0, 4) if mx else (0,)
    for first in range(0, len(codes), vector):
        for pixel in range(len(codes[0])):
            column = [line[pixel] for line in codes[first:first + vector]]
            words += [nibbles(code >> shift for code in column) for shift in planes]
    return words


def padded_outputs(config, outputs):
    return -(-outputs // config.vector) * config.vector


def dense_weights(config, weights, mx):
    """Row and column of the dense weight buffer to its K nibbles.

    ``weights[position][tap][output]``; positions are whole words. Rows lie as
    ``[tap][plane][word][tile]``, a column for each channel of a word.
    """
    lanes, vector = config.dense_lanes, config.vector
    rows = {}
    words, taps, outputs = len(weights) // vector, len(weights[0]), len(weights[0][0])
    tiles = padded_outputs(config, outputs) // lanes
    planes = (0, 4) if mx else (0,)
    order = itertools.product(range(taps), planes, range(words), range(tiles))
    for row, (tap, shift, word, tile) in enumerate(order):
        for channel in range(vector):
            line = weights[word * vector + channel][tap]
            rows[row, channel] = nibbles(
                code >> shift for code in line[tile * lanes:(tile + 1) * lanes])
    return rows


def sparse_weights(config, weights):
    """The same for a sparse PE: rows lie as ``[position][tap][tile]``, a column for V outputs."""
    lanes, vector = config.sparse_lanes, config.vector
    rows, row = {}, 0
    for taps in weights:
        for line in taps:
            for tile in range(0, padded_outputs(config, len(line)), lanes):
                for column in range(lanes // vector):
                    first = tile + column * vector
                    if first < len(line):
                        rows[row, column] = nibbles(line[first:first + vector])
                row += 1
    return rows


def weight_scale_rows(config, scales, units):
    """Rows of ``units`` bytes of ``scales[output][tap][group]``, ``[tap][group][output]``."""
    outputs = padded_outputs(config, len(scales))
    flat = [scales[output][tap][group] if output < len(scales) else 0
            for tap in range(len(scales[0])) for group in range(len(scales[0][0]))
            for output in range(outputs)]
    return [octets(flat[n:n + units]) for n in range(0, len(flat), units)]


class ThrottleModel:
    """When the last product of a group may be issued, from absolute times.

    A group ends no earlier than the steps of the group before have begun one after the other; a
    tile no earlier than the flush before leaves room for its own; and it needs room for results.
    """

    def __init__(self, config, lanes, units):
        self.quad, self.units = config.quad, units
        self.chunk_cycles = config.quad // min(units, config.quad)
        self.room = config.result_depth
        self.group_free = self.flushed = 0

    def steps(self, chunks):
        """Steps of the scale units for a tile of this many chunks: one for ``units`` outputs."""
        return -(-chunks * self.quad // self.units)

    def starved(self, tile_last, chunks):
        return tile_last and self.room < chunks

    def allowed(self, cycle, group_last, tile_last, chunks):
        return not (group_last and cycle < self.group_free
                    or tile_last and cycle + self.steps(chunks) < self.flushed
                    or self.starved(tile_last, chunks))

    def issue(self, cycle, group_last, tile_last, chunks):
        if group_last:
            self.group_free = cycle + self.steps(chunks)
        if tile_last:
            self.flushed = cycle + self.steps(chunks) + chunks * self.chunk_cycles
            self.room -= chunks

    def pop(self):
        self.room += 1
