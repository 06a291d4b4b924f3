"""Naive forms of what the PEs do, the operands of random runs, and the simulator call of the tests.

They are written from the contracts of the units, one loop a sum or a step.
"""

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


def packed(layout, values):
    """Integer of a structure with these fields; the others are 0."""
    return sum(value << dict(layout)[name].offset for name, value in values.items())


def nibbles(values):
    """Integer whose nibbles, lowest first, are the low four bits of ``values``."""
    return sum((value & 15) << 4 * n for n, value in enumerate(values))


def octets(values):
    return sum((value & 255) << 8 * n for n, value in enumerate(values))


def port_bytes(config, values):
    """Port words that hold bytes, the last one filled up with zeros."""
    size = config.port_width // 8
    return [octets(values[n:n + size]) for n in range(0, len(values), size)]


def tile_sizes(config, outputs, lanes):
    """Chunks of each tile of lanes."""
    chunks, most = -(-outputs // config.quad), lanes // config.quad
    return [min(most, chunks - first) for first in range(0, chunks, most)]


def lanes_of(config, side):
    """PEs, lanes and scale units of a side."""
    return tuple(getattr(config, f"{side}_{name}") for name in ("pes", "lanes", "scale_units"))


def random_geometry(config, side, rng, *, size=None, corner=False, mx=None, kernel3=None,
                    outputs=None):
    """Fields of `hw.job.geometry_layout` of a random run that keeps the rules.

    ``size`` is that of the image (the run has up to 4 x 6 pixels of it);
    ``corner``: the run ends with the image's last row and column.
    """
    pes, lanes, _ = lanes_of(config, side)
    height, width = size or (rng.randint(1, 6), rng.randint(1, 6))
    kernel3 = rng.random() < 0.6 if kernel3 is None else kernel3
    mx = rng.random() < 0.4 if mx is None else mx
    columns = min(width, rng.randint(1, 5) if size is None else 6)
    rows = min(height, rng.randint(1, 3) if size is None else 4)
    column = width - columns if corner else rng.choice((0, rng.randint(0, width - columns)))
    row = height - rows if corner else rng.randint(0, height - rows)
    first_column, first_row = max(0, column - kernel3), max(0, row - kernel3)
    tiles = rng.choice([
        n for n in range(1, min(4, -(-config.tile_outputs // lanes)) + 1)
        if side == "dense" or pes % n == 0 or n % pes == 0])
    tile_chunks = lanes // config.quad
    chunks = (tiles - 1) * tile_chunks + rng.randint(1, tile_chunks)
    if outputs is not None:
        sizes = tile_sizes(config, outputs, lanes)
        tiles, chunks = len(sizes), sum(sizes)
    return {
        "active": 1, "kernel3": int(kernel3), "mx": int(mx),
        "signed_codes": int(not mx and rng.random() < 0.5),
        "height": height, "width": width, "row": row, "column": column, "rows": rows,
        "columns": columns, "above": row - first_row, "before": column - first_column,
        "in_width": min(width, column + columns + kernel3) - first_column,
        "records": rng.choice((0, config.record_depth // 2)), "tiles": tiles, "chunks": chunks,
        "stride": rng.randint(1, columns) if side == "dense" and mx else 1,
        "skip": rng.choice((0, 0, 1, 2, 3, 5)) if side == "sparse" and mx else 0,
        "cut": 0 if mx else rng.choice((0, 256, rng.randint(0, 255))), "low": 0, "high": 1,
        "weights": rng.choice((0, 3)), "pitch": 1, "weight_scales": rng.choice((0, 5)),
    }


def is_high(geometry, pixel):
    """Whether an output pixel of the run has the high split: eight bits carry."""
    return not geometry["mx"] and pixel * geometry["cut"] % 256 + geometry["cut"] >= 256


def is_null(side, geometry, pixel):
    """Whether an output pixel is the other side's alone."""
    if geometry["mx"]:
        return bool(geometry["skip"]) and (pixel + 1) % geometry["skip"] == 0
    return side == "dense" and not geometry["high" if is_high(geometry, pixel) else "low"]


def units(config, side, geometry, index):
    """(output pixel, tile, null) of each unit of work of PE ``index``.

    One dense PE alone takes all units of a null pixel as one.
    """
    pes = lanes_of(config, side)[0]
    number = 0
    for pixel in range(geometry["rows"] * geometry["columns"]):
        if (pixel + 1) % geometry["stride"]:
            continue
        null = is_null(side, geometry, pixel)
        for tile in range(geometry["tiles"]):
            if number % pes == index and not (null and side == "dense" and pes == 1 and tile):
                yield pixel, tile, null
            number += 1


def taps(geometry, pixel):
    """(tap, row, column) of the inputs of an output pixel; rows and columns of what is loaded."""
    row, column = divmod(pixel, geometry["columns"])
    for tap, y, x in naive.taps(
            3 if geometry["kernel3"] else 1, geometry["height"], geometry["width"],
            geometry["row"] + row, geometry["column"] + column):
        yield (tap, y - geometry["row"] + geometry["above"],
               x - geometry["column"] + geometry["before"])


def groups(geometry, pixel):
    """(tap, record without the first one, planes) of each scaled group of a unit."""
    for tap, y, x in taps(geometry, pixel):
        place = y * geometry["in_width"] + x
        if not geometry["mx"]:
            yield tap, place, 0
            continue
        for plane in range(4):      # (ap, wp) = (0, 0), (0, 1), (1, 0), (1, 1)
            yield tap, 2 * place + plane // 2, plane


def chunks_of_tile(config, side, geometry, tile):
    most = lanes_of(config, side)[1] // config.quad
    return min(most, geometry["chunks"] - tile * most)


def own_tile(config, side, tile):
    """Number of a tile among those of the PE that has it."""
    return tile if side == "dense" else tile // config.sparse_pes


def window_steps(config, side, geometry, index):
    """Every step of `hw.window.Window` as a dictionary of its record's fields."""
    for pixel, tile, null in units(config, side, geometry, index):
        if null:
            yield {"null": 1}
            continue
        inside = list(groups(geometry, pixel))
        for number, (tap, record, plane) in enumerate(inside):
            yield {
                "null": 0, "high": int(is_high(geometry, pixel)),
                "record": geometry["records"] + record, "tap": tap, "plane": plane,
                "tile": own_tile(config, side, tile),
                "chunks": chunks_of_tile(config, side, geometry, tile),
                "last": int(number == len(inside) - 1),
            }


class Schedule:
    """When a PE issues what, from the counts alone; cycle 0 is that of ``start``.

    A group takes ``count`` issues, one a cycle; an empty one takes a cycle without an issue, but
    at the end of a unit it is issued as one empty product; a null unit takes a cycle. The last
    issue of a scaled group comes at least ``steps`` cycles after that of the scaled group before,
    the last issue of a unit at least ``unit_cycles`` after that of the unit before. The latter
    also waits while ``capacity`` units are in flight: a unit is from its last issue until its last
    chunk has been taken.

    Parameters
    ----------
    first : int
        Cycle of the first issue.
    steps, unit_cycles, capacity : int

    Attributes
    ----------
    issues : list
        (cycle, first of the group, last of the group, last of the unit, empty) of each issue.
    starved : int
        Cycles in which the last issue of a unit waited while there was no room.
    end : int
        Last cycle in which a group or null unit was at the issue; ``first`` - 1 without any.
    """

    def __init__(self, first, steps, unit_cycles, capacity):
        self.steps, self.unit_cycles, self.capacity = steps, unit_cycles, capacity
        self.cycle, self.end, self.starved = first, first - 1, 0
        self.group_free = self.unit_free = 0
        self.issues, self.units = [], 0

    def null(self):
        self.end = self.cycle
        self.cycle += 1

    def group(self, count, last, free=None):
        """A group of ``count`` issues; its last issue's cycle, or None.

        With ``last``, ``free(unit)`` is the cycle in which the last chunk of this unit was taken.
        """
        if not count and not last:
            self.null()
            return None
        for number in range(max(1, count)):
            ends = number == max(1, count) - 1
            if ends:
                self.wait(last, free)
            self.issues.append((self.cycle, number == 0, ends, ends and last, not count))
            self.end = self.cycle
            self.cycle += 1
        return self.end

    def wait(self, last, free):
        arrived = self.cycle
        self.cycle = max(arrived, self.group_free)
        if last:
            self.cycle = max(self.cycle, self.unit_free)
            if self.units >= self.capacity:
                room = free(self.units - self.capacity) + 1
                self.starved += max(0, room - arrived)
                self.cycle = max(self.cycle, room)
            self.unit_free = self.cycle + self.unit_cycles
            self.units += 1
        self.group_free = self.cycle + self.steps
