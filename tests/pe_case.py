"""A random run of one side: its operands, what a PE's buffers hold, and what must come out."""

from hw.job import entry_layout, record_layout
from tests import naive
from tests.pe_model import (
    chunks_of_tile,
    groups,
    is_high,
    lanes_of,
    nibbles,
    octets,
    own_tile,
    packed,
    random_geometry,
    taps,
    units,
)


def scale_byte(code, mx):
    """A weight scale as the PEs' buffers hold it: factor in the low nibble, shift in the high."""
    if mx:
        return 1 | (code & 15) << 4
    exponent = code >> 3
    return code & 7 | 8 * (exponent > 0) | max(exponent - 1, 0) << 4


class Case:
    """Codes, weights and scales of a run with a random geometry.

    ``codes[place][position]``, ``scales[place]`` of the loaded input pixels;
    ``weights[output][tap][position]``, ``weight_scales[output][tap]``.

    Parameters
    ----------
    density : float
        Share of codes that are not zero.
    extreme : bool
        All operands are the largest.
    """

    def __init__(self, config, side, rng, *, density=0.5, extreme=False, words=None, **shape):
        self.config, self.side = config, side
        self.pes, self.lanes, self.units = lanes_of(config, side)
        self.geometry = geometry = random_geometry(config, side, rng, **shape)
        self.mx, vector = geometry["mx"], config.vector
        words = 32 // vector if self.mx else words or rng.randint(1, 2)
        positions = words * vector
        geometry["pitch"] = words if side == "dense" else positions
        if side == "dense":
            geometry["high"], geometry["low"] = words, rng.randint(0, words)
        else:
            geometry["high"] = rng.choice((0, vector - 5, positions, rng.randint(0, positions)))
        border = geometry["kernel3"]
        in_rows = min(geometry["height"], geometry["row"] + geometry["rows"] + border) \
            - geometry["row"] + geometry["above"]
        lowest, highest = (-127, 127) if self.mx else (
            (-7, 7) if geometry["signed_codes"] else (0, 15))
        limit, top_scale = (127, 15) if self.mx else (7, 126)

        def code():
            if extreme:
                return lowest or highest
            value = rng.choice((lowest, highest, rng.randint(lowest, highest)))
            return value if rng.random() < density else 0

        def weight():
            return -limit if extreme else rng.choice((-limit, limit, rng.randint(-limit, limit)))

        def scale():
            return top_scale if extreme else rng.randint(0, top_scale)

        self.places = in_rows * geometry["in_width"]
        self.codes = [[code() for _ in range(positions)] for _ in range(self.places)]
        if not extreme:
            for line in self.codes:
                if rng.random() < 0.25:      # an input pixel without anything
                    line[:] = [0] * positions
        self.scales = [scale() for _ in range(self.places)]
        outputs, taps = geometry["chunks"] * config.quad, 9 if border else 1
        self.weights = [[[weight() for _ in range(positions)] for _ in range(taps)]
                        for _ in range(outputs)]
        self.weight_scales = [[scale() for _ in range(taps)] for _ in range(outputs)]

    def __str__(self):
        return f"{self.side} {self.geometry}"

    def planes(self, value):
        """Value of a code or weight in each of its planes."""
        return [value & 15, value >> 4] if self.mx else [value]

    def nonzeros(self, place, plane):
        """(position, code) of the non-zeros of an input pixel's plane."""
        line = [self.planes(code)[plane] for code in self.codes[place]]
        return [(position, code) for position, code in enumerate(line) if code]

    def positions(self, pixel):
        """Positions that count for an output pixel: first one, and first one that does not."""
        geometry, everything = self.geometry, len(self.codes[0])
        if self.mx:
            return 0, everything
        high = is_high(geometry, pixel)
        if self.side == "dense":
            return 0, geometry["high" if high else "low"] * self.config.vector
        return geometry["high"] if high else 0, everything

    def record(self, number):
        """Words, or entries and those of them that count where the split is low alone."""
        if self.side == "dense":
            return len(self.codes[0]) // self.config.vector, 0
        rate, found = self.config.sparse_rate, self.record_nonzeros(number)
        count = -(-len(found) // rate)
        below = sum(position < self.geometry["high"] for position, _ in found)
        return count, count if below == len(found) else below // rate

    def record_nonzeros(self, number):
        return self.nonzeros(*divmod(number, 2)) if self.mx else self.nonzeros(number, 0)

    def issues(self, number, pixel):
        """First word or entry of a record that an output pixel takes, and how many."""
        count, skip = self.record(number)
        if self.side == "dense":
            return 0, self.positions(pixel)[1] // self.config.vector
        first = skip if is_high(self.geometry, pixel) else 0
        return first, count - first

    def loads(self, index):
        """(port, enable, address, data) of every write of the buffers of PE ``index``."""
        config, geometry, side = self.config, self.geometry, self.side
        vector, rate = config.vector, config.sparse_rate
        planes = 2 if self.mx else 1
        dense = side == "dense"
        record = record_layout(config, side)
        code_bits = dict(entry_layout(config))[0].shape if not dense else None
        start = (config.codes_depth if dense else config.entry_depth) // 2
        for place in range(self.places):
            for plane in range(planes):
                number = place * planes + plane
                count, skip = self.record(number)
                fields = {"start": start, "count": count, "scale": self.scales[place]}
                yield "load_records", 1, geometry["records"] + number, packed(
                    record, fields if dense else {**fields, "skip": skip})
                if dense:
                    line = [self.planes(code)[plane] for code in self.codes[place]]
                    for word in range(count):
                        yield ("load_codes", 1, start + word,
                               nibbles(line[word * vector:(word + 1) * vector]))
                else:
                    found = self.nonzeros(place, plane)
                    for entry in range(count):
                        data = 0
                        for number, (position, code) in enumerate(
                                found[entry * rate:(entry + 1) * rate]):
                            data |= packed(code_bits, {
                                "position": position, "code": code & 15}) \
                                << number * code_bits.size
                        yield "load_entries", 1, start + entry, data
                start += count
        tiles = [tile for tile in range(geometry["tiles"]) if dense or (
            tile % min(geometry["tiles"], self.pes) == index % min(geometry["tiles"], self.pes))]
        own = len(tiles)
        for tile in tiles:
            lanes = range(tile * self.lanes, (tile + 1) * self.lanes)
            for tap in range(len(self.weights[0])):
                yield from self.weight_rows(tap, tile, own, lanes)
                yield from self.scale_rows(tap, tile, own, lanes)

    def weight_rows(self, tap, tile, own, lanes):
        config, geometry, vector = self.config, self.geometry, self.config.vector
        planes = 2 if self.mx else 1
        pitch = geometry["pitch"]
        for plane in range(planes):
            first = geometry["weights"] + (
                (tap * planes + plane) * own + own_tile(config, self.side, tile)) * pitch

            def codes(position, outputs, plane=plane):
                return nibbles(
                    self.planes(self.weights[k][tap][position])[plane]
                    if k < len(self.weights) else 0 for k in outputs)

            if self.side == "dense":
                for word in range(pitch):
                    for channel in range(vector):
                        yield ("load_weights", 1 << channel, first + word,
                               codes(word * vector + channel, lanes))
            else:
                for position in range(pitch):
                    for column in range(self.lanes // vector):
                        yield ("load_weights", 1 << column, first + position,
                               codes(position, lanes[column * vector:(column + 1) * vector]))

    def scale_rows(self, tap, tile, own, lanes):
        config, size = self.config, self.config.port_width // 8
        steps = self.lanes // self.units
        first = self.geometry["weight_scales"] + (
            tap * own + own_tile(config, self.side, tile)) * steps
        for step in range(steps):
            row = [scale_byte(self.weight_scales[k][tap], self.mx)
                   if k < len(self.weight_scales) else 0
                   for k in lanes[step * self.units:(step + 1) * self.units]]
            for column in range(max(1, self.units // size)):
                yield ("load_weight_scales", 1 << column, first + step,
                       octets(row[column * size:(column + 1) * size]))

    def chunks(self, index):
        """Sums of V/4 outputs each that PE ``index`` hands out, in order, a list for a unit."""
        quad, lanes = self.config.quad, self.lanes
        for pixel, tile, null in units(self.config, self.side, self.geometry, index):
            if null:
                continue
            count = chunks_of_tile(self.config, self.side, self.geometry, tile)
            sums = [self.sum(pixel, tile * lanes + lane) for lane in range(count * quad)]
            yield [sums[first:first + quad] for first in range(0, len(sums), quad)]

    def sum(self, pixel, output):
        """Exact sum of an output, product by product."""
        total = 0
        for tap, y, x in taps(self.geometry, pixel):
            place = y * self.geometry["in_width"] + x
            both = self.scales[place], self.weight_scales[output][tap]
            factor = 1 << sum(both) if self.mx else naive.UNITS[both[0]] * naive.UNITS[both[1]]
            for position in range(*self.positions(pixel)):
                total += self.codes[place][position] * self.weights[output][tap][position] * factor
        return total

    def work(self, index):
        """Words (dense) or non-zeros (sparse) that PE ``index`` multiplies."""
        total = 0
        for pixel, _, null in units(self.config, self.side, self.geometry, index):
            for _, record, _ in () if null else groups(self.geometry, pixel):
                if self.side == "dense":
                    total += self.issues(record, pixel)[1]
                else:
                    total += sum(position >= self.positions(pixel)[0]
                                 for position, _ in self.record_nonzeros(record))
        return total

    def schedule(self, schedule, index, free=None):
        """Put the units of PE ``index`` into a `Schedule`; last issues of those with results."""
        ends = []
        for pixel, _, null in units(self.config, self.side, self.geometry, index):
            if null:
                schedule.null()
                continue
            inside = list(groups(self.geometry, pixel))
            for number, (_, record, _) in enumerate(inside):
                last = number == len(inside) - 1
                end = schedule.group(self.issues(record, pixel)[1], last, free)
            ends.append(end)
        return ends
