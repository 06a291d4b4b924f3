"""The tiler: divides a layer into jobs of a core, so that it takes few cycles and fits its buffers.

A job is a tile of rows, columns, outputs and input channels. Where there is more than one tile of
channels, the exact partial sums of a job stay in the core until the next tile is added, so all
tiles of channels follow each other before anything else changes. They run to and fro: the last one
of a place in the image is the first one of the next place, whose weights are there already.

Cycles are estimated from rates alone: what the slower side needs for an average pixel, and what the
memory port needs for operands. `sim.cycles` has the exact number for given activations.
"""

import collections
import dataclasses
import functools
import itertools
import math
from fractions import Fraction

from golden.detector import Costs
from hw.config import ConfigError
from hw.descriptor import Error, Format
from sim.shape import BLOCK, FitError, Shape

__all__ = ["Job", "Plan", "plan", "plan_for", "density", "choices", "adjusted", "job_demands",
           "refuse"]

SETUP = 40       # cycles of a run besides its products: from its start to the first, and at its end
LATENCY = 30     # cycles of a load besides its words
NARROW = 8       # columns of a tile, if wider ones fit at all
DENSITY = {      # of non-zero codes; of MX8 and IN16, non-zero low and high nibbles
    Format.A4U: (0.5,), Format.A4S: (0.7,), Format.MX8: (0.55, 0.45), Format.IN16: (0.95, 0.95)}
FILLED = (15 / 16, 0.8)   # of non-zero MX8 codes, those with a non-zero low or high nibble
OBJECTIVES = ("total", "compute")
BUFFERS = ("codes_depth", "entry_depth", "record_depth", "weight_depth", "sparse_weight_depth",
           "weight_scale_depth", "sparse_weight_scale_depth", "partial_depth", "tile_channels",
           "tile_outputs")
FIELDS = {"records": "record_depth", "entries": "entry_depth", "words of codes": "codes_depth"}
COST_LIMIT = 4095   # of a balance cost; larger ones are rounded
CLOSE = 1.02     # plans whose cycles are so close to the best are judged by computing alone


def _ceil(value, step):
    return -(-value // step)


@dataclasses.dataclass(frozen=True)
class Job:
    """What one convolve descriptor asks for.

    Members
    -------
    tile : number of the tile of input channels
    slot, slots : its first slot, and how many
    output, outputs : first output channel, a multiple of 32, and how many
    y, x, height, width : of the tile in the image
    accumulate : add to the partial sums that the job before has kept
    keep_sums : keep partial sums, write no results
    keep_weights : lists, weights and tables are those of the job before
    """

    tile: int
    slot: int
    slots: int
    output: int
    outputs: int
    y: int
    x: int
    height: int
    width: int
    accumulate: bool
    keep_sums: bool
    keep_weights: bool


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to divide a layer, and its estimate.

    Members
    -------
    tile_channels, dense_limit, share : as of the descriptor
    outputs, columns, rows : sizes of the tiles, each a tuple that adds up to the layer's
    cycles : estimate of all jobs
    compute : of these, if memory took no time
    reads : if only the port's read channel took time, by operand
    head : rows of the first job, cut off so that computing begins early, or 0
    jobs : how many
    run_rows : rows of output of a run, and the buffer that limits them
    limits : what keeps tiles from being larger: {what: buffer or rule}
    """

    tile_channels: int
    dense_limit: int
    share: int
    outputs: tuple
    columns: tuple
    rows: tuple
    cycles: float
    compute: float
    reads: dict = dataclasses.field(compare=False)
    head: int
    jobs: int
    run_rows: tuple
    limits: dict = dataclasses.field(compare=False)

    @property
    def bound(self):
        """What takes longer by itself: "compute" or "port"."""
        return "compute" if self.compute >= sum(self.reads.values()) else "port"

    def __str__(self):
        sizes = (f"{self.tile_channels} slots x {self.outputs[0]} outputs x {self.rows[0]} rows"
                 f" x {self.columns[0]} columns")
        return (f"{sizes}: {self.cycles:,.0f} cycles in {self.jobs} jobs, {self.bound}-bound"
                f" (compute {self.compute:,.0f}, port {sum(self.reads.values()):,.0f})")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a layer runs on a core.

    Members
    -------
    shape : sim.shape.Shape
    config : hw.config.Config
    density : of non-zero codes (A4), or of low and of high nibbles (MX8), as was supposed
    chosen : Candidate
    candidates : all that fit, the chosen one included
    costs : golden.detector.Costs of the balanced mode
    """

    shape: Shape
    config: object
    density: tuple
    chosen: Candidate
    candidates: tuple
    costs: Costs

    @property
    def tile_channels(self):
        return self.chosen.tile_channels

    @property
    def dense_limit(self):
        return self.chosen.dense_limit

    @property
    def share(self):
        return self.chosen.share

    @property
    def cycles(self):
        """Estimated cycles."""
        return round(self.chosen.cycles)

    @property
    def bound(self):
        """What takes longer: "compute" or "port"."""
        return self.chosen.bound

    @functools.cached_property
    def jobs(self):
        """Tuple of Job, in the order of their descriptors."""
        tiles = list(enumerate(self.shape.tiles(self.tile_channels)))
        found, before = [], None
        places = list(itertools.product(*(_starts(getattr(self.chosen, name))
                                          for name in ("outputs", "columns", "rows"))))
        if self.chosen.head:
            first, *rest = places
            parts = _starts((self.chosen.head, self.chosen.rows[0] - self.chosen.head))
            places = [(*first[:2], part) for part in parts] + rest
        for (output, outputs), (x, width), (y, height) in places:
            for number, (tile, (slot, slots, _)) in enumerate(tiles):
                found.append(Job(
                    tile=tile, slot=slot, slots=slots, output=output, outputs=outputs, y=y, x=x,
                    height=height, width=width, accumulate=number > 0,
                    keep_sums=number + 1 < len(tiles), keep_weights=before == (tile, output)))
                before = tile, output
            tiles.reverse()
        return tuple(found)

    def explain(self, name="layer"):
        """Text: the plan, what limits it, every candidate, and which buffer would help."""
        shape, chosen = self.shape, self.chosen
        reads = ", ".join(f"{what} {words:,.0f}" for what, words in chosen.reads.items() if words)
        lines = [
            (f"{name}: {shape.format.name} {shape.kernel}x{shape.kernel},"
             f" {shape.height}x{shape.width}, {'+'.join(map(str, shape.channels))}->"
             f"{shape.outputs}{' + residual' * shape.residual} on {self.config.name}"),
            f"  {chosen}",
            (f"  channel tiles {_sizes(t[1] for t in shape.tiles(chosen.tile_channels))}; outputs"
             f" {_sizes(chosen.outputs)}; columns {_sizes(chosen.columns)}; rows"
             f" {_sizes(chosen.rows)}"),
            (f"  a run: {chosen.run_rows[0]} rows of output, limited by {chosen.run_rows[1]}"
             + f"; the first one {chosen.head}, to begin early" * (chosen.head > 0)),
            f"  port words: {reads}",
        ]
        if shape.labelled and self.config.sparse_pes and self.config.dense_pes:
            costs = dataclasses.astuple(self.costs)
            lines.append(f"  balance at {self.density[0]:.0%} non-zero codes: word {costs[0]},"
                         f" non-zero {costs[1]}, pixel {costs[2]}, at least {costs[3]};"
                         f" dense side up to {chosen.dense_limit} words of a tile")
        elif shape.mx:
            whose = {0: "all pixels sparse", 1: "all pixels dense"}.get(
                chosen.share, f"every {chosen.share}. pixel dense")
            lines.append(f"  {whose}, at {self.density[0]:.0%} and {self.density[1]:.0%} non-zero"
                         " low and high nibbles")
        lines += [f"  {what}: limited by {limit}" for what, limit in chosen.limits.items()]
        lines.append("  candidates, best first:")
        lines += [f"    {'*' if other is chosen else ' '} {other}"
                  for other in sorted(self.candidates, key=lambda other: other.cycles)]
        lines.append("  with twice as much of:")
        lines += [f"    {field}: {cycles:,.0f} cycles ({cycles / chosen.cycles - 1:+.1%})"
                  for field, cycles in self.what_if().items()]
        return "\n".join(lines)

    def what_if(self):
        """Estimated cycles with twice as much of one buffer, {field of the configuration: cycles}.

        A field that cannot be doubled, because of another one's rule, is left out.
        """
        found = {}
        for field in BUFFERS:
            try:
                config = dataclasses.replace(
                    self.config, **{field: 2 * getattr(self.config, field)})
            except ConfigError:
                continue
            found[field] = plan(self.shape, config, self.density).chosen.cycles
        return found


def _starts(sizes):
    """(first, size) of tiles that follow each other."""
    return list(zip(itertools.accumulate((0, *sizes[:-1])), sizes, strict=True))


def _sizes(sizes):
    """Sizes as text: equal ones once, with their number."""
    runs = [(size, len(list(group))) for size, group in itertools.groupby(sizes)]
    return " + ".join(f"{count} x {size}" for size, count in runs)


def _parts(total, count):
    """``count`` sizes that add up to ``total`` and differ by one at most, large ones first."""
    size, rest = divmod(total, count)
    return (size + 1,) * rest + (size,) * (count - rest)


def sparse_tiles_fit(outputs, config):
    """Whether the sparse PEs can share the tiles of lanes of this many outputs evenly."""
    tiles = _ceil(outputs, config.sparse_lanes)
    return not config.sparse_pes or not (config.sparse_pes % tiles and tiles % config.sparse_pes)


def dense_words(shape, config, slots, dense_limit):
    """Words of V channels of a tile that the dense side may have to take."""
    words = slots // config.vector
    return words if shape.mx or not config.sparse_pes else min(words, dense_limit)


def _weight_rows(shape, config, slots, outputs, dense_limit):
    """Rows of a job's weights and scales: {buffer: (rows, depth)}, whatever the list."""
    taps, planes = shape.taps, shape.planes
    found = {}
    if config.dense_pes:
        tiles = _ceil(outputs, config.dense_lanes)
        found["words of dense weights"] = (
            taps * planes * tiles * dense_words(shape, config, slots, dense_limit),
            config.weight_depth)
        found["words of dense weight scales"] = (
            taps * tiles * config.dense_steps, config.weight_scale_depth)
    if config.sparse_pes:
        own = max(1, _ceil(outputs, config.sparse_lanes) // config.sparse_pes)
        found["words of sparse weights"] = (
            taps * planes * own * slots, config.sparse_weight_depth)
        found["words of sparse weight scales"] = (
            taps * own * config.sparse_steps, config.sparse_weight_scale_depth)
    return found


def _pixel_sizes(shape, config, slots, dense_limit):
    """What an input pixel takes of the activation buffers: {what: (most, half a buffer)}."""
    found = {"records": (shape.planes, config.record_depth // 2)}
    if config.sparse_pes:
        found["entries"] = (
            shape.planes * _ceil(slots, config.sparse_rate), config.entry_depth // 2)
    if config.dense_pes:
        found["words of codes"] = (
            shape.planes * dense_words(shape, config, slots, dense_limit),
            config.codes_depth // 2)
    return found


def _needed(first, size, limit, border):
    """First row or column of input that a tile needs, and how many."""
    begin, end = max(0, first - border), min(limit, first + size + border)
    return begin, end - begin


def job_demands(shape, config, job, dense_limit):
    """What a job needs of a core, in the order of its checks: (error, what, need, have).

    A job for which no need is larger than what there is runs, whatever the list of channels.
    """
    _, rows = _needed(job.y, job.height, shape.height, shape.border)
    _, width = _needed(job.x, job.width, shape.width, shape.border)
    rows = min(rows, shape.kernel)
    yield Error.CHANNELS, "outputs of a job", job.outputs, config.tile_outputs
    yield (Error.CHANNELS, "input slots of a job", job.slots,
           BLOCK if shape.mx else config.tile_channels)
    for what, (pixel, have) in _pixel_sizes(shape, config, job.slots, dense_limit).items():
        yield Error.ACTIVATIONS, f"{what} of {rows} rows", rows * width * pixel, have
    for what, (need, have) in _weight_rows(
            shape, config, job.slots, job.outputs, dense_limit).items():
        yield Error.SCALES if "scales" in what else Error.WEIGHTS, what, need, have
    if job.accumulate or job.keep_sums:
        yield (Error.PARTIALS, "words of partial sums",
               job.height * job.width * _ceil(job.outputs, config.quad), config.partial_depth)


def refuse(error, what, need, have, config):
    """Raise the FitError of something of which a layer needs more than there is."""
    raise FitError(error, f"{what} must be at most {have} for {config.name}, not {need}:"
                          f" {need - have} too many")


def _taps_inside(first, size, limit, border):
    """Taps of a row of outputs that lie inside the image, summed over the outputs."""
    return sum(min(limit, n + border + 1) - max(0, n - border) for n in range(first, first + size))


def nonzeros_left(taken, density):
    """Non-zeros of an average channel's pixel left when a share ``taken`` of the channels is gone.

    Channels are supposed to be as unlike as a line from most to none allows, the fullest go first.
    """
    if density <= 0.5:
        return density * (1 - taken) ** 2
    return (1 - taken) - (1 - density) * (1 - taken ** 2)


class Estimate:
    """Cycles of the jobs of a layer, with tiles of some number of input slots.

    Parameters
    ----------
    shape, config, density, tile_channels, dense_limit : as of `plan`
    """

    def __init__(self, shape, config, density, tile_channels, dense_limit):
        self.shape, self.config, self.density = shape, config, density
        self.tiles, self.dense_limit = shape.tiles(tile_channels), dense_limit
        self.mean = sum(density) / len(density)
        self.taps = {}
        self.split = {}      # whole words of the dense side
        self.room = {}

    def rates(self, outputs):
        """Cycles of the dense and of the sparse side for an issue of each tile of lanes.

        Infinite where there is no such side.
        """
        return [_ceil(outputs, lanes) / pes if pes else math.inf for lanes, pes in (
            (self.config.dense_lanes, self.config.dense_pes),
            (self.config.sparse_lanes, self.config.sparse_pes))]

    def group(self, nonzeros):
        """Cycles of a sparse group with about this many non-zeros."""
        rate = self.config.sparse_rate
        return max(1, nonzeros / rate + (rate - 1) / (2 * rate), self.config.sparse_steps)

    def tap(self, positions, outputs, share):
        """Cycles of the slower side for a pixel and a tap."""
        key = positions, outputs, share
        if key not in self.taps:
            self.taps[key] = (self.mx_tap if self.shape.mx else self.a4_tap)(*key)
        return self.taps[key]

    def a4_tap(self, positions, outputs, _):
        dense, sparse = self.rates(outputs)
        words = _ceil(positions, self.config.vector)
        limit = dense_words(self.shape, self.config, words * self.config.vector, self.dense_limit)
        best = math.inf
        # So many words are the dense side's; a boundary word is so at some of the output pixels.
        for low, part in ((step // 16, step % 16 / 16) for step in range(16 * limit + 1)):
            cost = 0.0
            if low or part:
                cost = dense * ((1 - part) * self.words(low) + part * self.words(low + 1))
            if low < words:
                left = [self.group(positions * nonzeros_left(taken / words, self.density[0]))
                        for taken in (low, min(low + 1, words))]
                cost = max(cost, sparse * ((1 - part) * left[0] + part * left[1]))
            if cost < best:
                best, self.split[positions, outputs] = cost, low
        return best

    def words(self, count):
        """Cycles of a dense group of this many words."""
        return max(count, self.config.dense_steps) if count else 0

    def mx_tap(self, positions, outputs, share):
        dense, sparse = self.rates(outputs)
        cost = 0.0
        if share:
            words = _ceil(positions, self.config.vector)
            cost = 4 * max(words, self.config.dense_steps) * dense / share
        if share != 1:
            filled = min(positions, sum(self.shape.channels))
            groups = 2 * sum(self.group(filled * density) for density in self.density)
            cost = max(cost, groups * sparse * self.sparse_load(share, outputs))
        return cost

    def sparse_load(self, share, outputs):
        """Share of its pixels that the busiest sparse PE has to compute."""
        if not share:
            return 1.0
        tiles = min(_ceil(outputs, self.config.sparse_lanes), self.config.sparse_pes)
        # Pixels of the dense side that always fall to the same sparse PEs relieve no other.
        return 1.0 if math.gcd(share, self.config.sparse_pes // tiles) > 1 else 1 - 1 / share

    def rows(self, width):
        """Rows of input of this width that a run is expected to hold, and what limits them."""
        if width in self.room:
            return self.room[width]
        found = []
        for what, (pixel, have) in _pixel_sizes(
                self.shape, self.config, self.tiles[0][1], self.dense_limit).items():
            if what == "entries":
                pixel = min(pixel, max(1, pixel * self.mean + self.shape.planes / 2))
            found.append((int(have / (width * pixel)) if pixel else math.inf, FIELDS[what]))
        rows, limit = min(found)
        self.room[width] = max(rows, self.shape.kernel), limit
        return self.room[width]

    def pixel_load(self, positions):
        """Cycles to load an input pixel's codes of a tile: port words, or the compactor's."""
        config = self.config
        words = _ceil(positions, config.vector) * self.shape.planes
        filled = config.vector * self.mean / config.sparse_rate if config.sparse_pes else 0
        return words * max(1, filled)

    def weight_load(self, positions, outputs):
        """Cycles to load a job's list, weights, scales and epilogue table."""
        config, vector = self.config, self.config.vector
        words = _ceil(outputs, vector)
        # A position of the dense side takes a cycle for each tile of its lanes.
        dense = 0
        if config.dense_pes:
            dense = positions if self.shape.mx or not config.sparse_pes else min(
                positions, (self.split.get((positions, outputs), 0) + 1) * vector)
        slow = max(words, _ceil(outputs, config.dense_lanes)) if dense else words
        return ((dense * slow + (positions - dense) * words) * self.shape.taps * self.shape.planes
                + 2 * words * self.shape.taps + 16 * words + 1 + 4 * _ceil(positions, vector))

    def job(self, rows, columns, outputs, tile, loaded, last, share):
        """(cycles of computing, reads by operand, cycles of both together) of one job.

        Parameters
        ----------
        rows, columns : (outputs, inputs needed, taps inside the image)
        outputs : number of them
        tile : (slots, positions)
        loaded, last : whether it loads weights, whether it writes results
        share : of MX8
        """
        shape, config = self.shape, self.config
        (height, in_height, taps_down), (width, in_width, taps_across) = rows, columns
        slots, positions = tile
        words = _ceil(outputs, config.vector)
        room, _ = self.rows(in_width)
        runs = 1
        if room < in_height:
            runs = _ceil(height, room - 2 * shape.border)
            in_height += (runs - 1) * 2 * shape.border
        results = height * width * 4 * words
        compute = max(taps_down * taps_across * self.tap(positions, outputs, share), results)
        compute += runs * SETUP
        weights = self.weight_load(positions, outputs) if loaded else 0
        reads = {
            "weights": weights,
            "codes": in_height * (in_width * self.pixel_load(positions)
                                  + _ceil(in_width * shape.planes, config.vector // 2)),
            "residual": results if last and shape.residual else 0,
            "descriptors and latency": 256 // config.vector + (1 + runs) * LATENCY,
        }
        cycles = max(compute, sum(reads.values()))
        if loaded and self.crowded(slots, positions, outputs):
            # Loading stops before the weights until nothing is computed, so the first run waits.
            first = reads["codes"] / runs
            cycles = weights + first + LATENCY + max(compute, sum(reads.values()) - weights - first)
        return compute, reads, cycles

    def crowded(self, slots, positions, outputs):
        """Whether a job's weights are expected to find no place beside those of the job before."""
        config, limit = self.config, self.dense_limit
        # The sparse side has no weights of words that the dense side takes whole, the dense side
        # has those and the one that both share.
        whole = self.split.get((positions, outputs), 0)
        if config.sparse_pes and not self.shape.mx:
            limit = min(limit, whole + 1)
        for what, (need, have) in _weight_rows(
                self.shape, config, slots, outputs, limit).items():
            if what == "words of sparse weights":
                need -= need * whole * config.vector // slots
            if 2 * need > have:
                return True
        return False


def density(shape, nonzero):
    """What `plan` takes as density, from the share of non-zero codes; in whole percent."""
    if shape.format == Format.IN16:
        return None
    shares = [nonzero] if shape.labelled else [nonzero * share for share in FILLED]
    return tuple(round(share, 2) for share in shares)


def choices(call, config):
    """Keywords of `plan` that a layer call has decided: channel tiles, limit of the dense side."""
    if Shape.of(call, config).mx:
        return {}
    words = call.tile_channels // config.vector
    return {"tile_channels": call.tile_channels,
            "dense_limit": min(call.dense_limit, words) if config.sparse_pes else words}


def plan_for(call, config, density=None):
    """Plan of a layer call, with the channel tiles and the limit of the dense side that it has."""
    return plan(Shape.of(call, config), config, density, **choices(call, config))


def adjusted(call, plan, *, balanced=True):
    """The layer call with the channel tiles, the dense side's limit and the costs of a plan.

    Without ``balanced`` it has no costs, so that its threshold counts.
    """
    return dataclasses.replace(
        call, tile_channels=plan.tile_channels, dense_limit=plan.dense_limit,
        balance=plan.costs if balanced and plan.shape.labelled else None)


@functools.lru_cache(4096)
def plan(shape, config, density=None, tile_channels=None, dense_limit=None, objective="total"):
    """The best way to run a layer on a core.

    Parameters
    ----------
    shape : sim.shape.Shape
    config : hw.config.Config
    density : tuple
        Expected share of non-zero codes (A4, one number) or of non-zero low and high nibbles (MX8,
        IN16, two numbers); by default that of usual networks.
    tile_channels, dense_limit : int
        Where they are given and not the tiler's choice.
    objective : str
        What is to be small: "total" cycles, or those of "compute" alone.

    Returns
    -------
    Plan

    Raises
    ------
    FitError
        If no division fits the core; the text has the rule that even the smallest tiles break.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be {' or '.join(OBJECTIVES)}, not {objective!r}")
    if density is None:
        density = DENSITY[shape.format]
    if shape.kernel not in (1, 3):
        raise FitError(Error.SHAPE, f"kernel must be 1 or 3, not {shape.kernel!r}")
    for error, what, need, have in (
            (Error.SHAPE, "pixels", shape.pixels, 65535),
            (Error.CHANNELS, "input channel slots", shape.slots, config.max_channels),
            (Error.CHANNELS, "output channels", shape.outputs, config.max_outputs),
            (Error.CHANNELS, "slots of a tile of channels", tile_channels or 0,
             config.tile_channels)):
        if need > have:
            refuse(error, what, need, have, config)
    candidates, refusals = [], []
    estimate = functools.cache(functools.partial(Estimate, shape, config, density))
    for narrow in (False, True):
        refusals.clear()
        for chosen in _choices(shape, config, tile_channels, dense_limit, narrow):
            try:
                candidates.append(_candidate(estimate(*chosen[:2]), *chosen))
            except FitError as error:
                refusals.append(error)
        if candidates:
            break
    if not candidates:
        raise refusals[0]   # of the smallest tiles
    limit = math.inf
    if objective == "total":
        limit = CLOSE * min(candidate.cycles for candidate in candidates)
    best = min((candidate for candidate in candidates if candidate.cycles <= limit),
               key=lambda candidate: (candidate.compute, candidate.cycles))
    return Plan(shape=shape, config=config, density=density, chosen=best,
                candidates=tuple(dict.fromkeys(candidates)), costs=_costs(best.outputs, config))


def _choices(shape, config, tile_channels, dense_limit, narrow):
    """(tile_channels, dense_limit, outputs of a tile, number of column tiles) to try.

    Tiles of less than `NARROW` columns, which load much besides their outputs, are left out
    unless ``narrow``.
    """
    if shape.mx:
        channels = [BLOCK]
    elif tile_channels is not None:
        channels = [tile_channels]
    else:
        channels = range(BLOCK, min(config.tile_channels, _ceil(shape.slots, BLOCK) * BLOCK) + 1,
                         BLOCK)
    most = min(config.tile_outputs, _ceil(shape.outputs, BLOCK) * BLOCK)
    columns = {_ceil(shape.width, width) for width in range(1, shape.width + 1)}
    if not narrow:
        columns = {count for count in columns if shape.width // count >= NARROW} or {1}
    for tile, size, count in itertools.product(
            channels, range(BLOCK, most + 1, BLOCK), sorted(columns, reverse=True)):
        for limit in ([dense_limit] if dense_limit is not None else
                      _limits(shape, config, tile, min(size, shape.outputs))):
            yield tile, limit, size, count


def _limits(shape, config, tile, outputs):
    """Limits of the dense side, in words: all, or as many as have weights that fit.

    Of those, the largest of which one job's weights fit, and the largest of which two jobs' do.
    """
    words = tile // config.vector
    if shape.mx or not config.sparse_pes or not config.dense_pes:
        return [words]
    rows = [_weight_rows(shape, config, tile, outputs, limit)["words of dense weights"][0]
            for limit in range(words + 1)]
    return sorted({max(limit for limit in range(words + 1)
                       if count * rows[limit] <= config.weight_depth) for count in (1, 2)})


def _output_tiles(outputs, size, config):
    """Sizes of output tiles: ``size`` as long as possible, each so that the sparse PEs share it.

    Raises
    ------
    FitError
        If the sparse PEs cannot share what is left.
    """
    found = []
    while outputs:
        part = min(size, outputs)
        while part > 0 and not sparse_tiles_fit(part, config):
            part -= part % BLOCK or BLOCK
        if part <= 0:
            raise FitError(Error.TILES,
                           f"tiles of {config.sparse_lanes} outputs must divide the"
                           f" {config.sparse_pes} sparse PEs of {config.name} or be a multiple of"
                           f" them, not {_ceil(min(size, outputs), config.sparse_lanes)}")
        found.append(part)
        outputs -= part
    return tuple(found)


def _candidate(estimate, tile_channels, dense_limit, size, columns):
    """The Candidate of a choice.

    Raises
    ------
    FitError
        If one of its jobs does not fit.
    """
    shape, config, tiles = estimate.shape, estimate.config, estimate.tiles
    outputs = _output_tiles(shape.outputs, size, config)
    widths = _parts(shape.width, columns)
    heights, limits = (shape.height,), {}
    if len(tiles) > 1:
        row = widths[0] * _ceil(max(outputs), config.quad)
        most = max(1, config.partial_depth // row)
        if most < shape.height:
            heights = _parts(shape.height, _ceil(shape.height, most))
            limits["rows of a job"] = (f"partial_depth, {config.partial_depth} words, for {most}"
                                       f" rows of {row}")
    _check(shape, config, tiles, outputs, widths, heights, dense_limit)
    share = _share(estimate, outputs, widths)
    compute, cycles, reads = 0.0, 0.0, {}
    jobs = _classes(shape, outputs, widths, heights, tiles)
    for arguments, count in jobs.items():
        one, words, together = estimate.job(*arguments, share)
        compute, cycles = compute + count * one, cycles + count * together
        for what, number in words.items():
            reads[what] = reads.get(what, 0) + count * number
    # Nothing is computed before the first run is loaded.
    _, in_width = _needed(0, widths[0], shape.width, shape.border)
    room, limit = estimate.rows(in_width)
    head, wait = _head(estimate, heights[0], widths[0], min(room, shape.height), outputs[0], share)
    cycles += estimate.weight_load(tiles[0][2], outputs[0]) + wait
    # So the first job, which has just been counted as one that is loaded beside others, was not.
    *first, _, last = next(iter(jobs))
    cycles -= (estimate.job(*first, True, last, share)[2]
               - estimate.job(*first, False, last, share)[2])
    if len(tiles) > 1:
        limits["slots of a job"] = (
            f"blocks of {BLOCK} that share a scale" if shape.mx else
            f"tile_channels, {config.tile_channels}"
            if tile_channels + BLOCK > config.tile_channels else "what larger tiles would cost")
    if len(outputs) > 1:
        limits["outputs of a job"] = (
            f"tile_outputs, {config.tile_outputs}" if size + BLOCK > config.tile_outputs
            else "what larger tiles would cost, or their weights")
    if len(widths) > 1:
        limits["columns of a job"] = "what broader tiles would cost, or their activations"
    whole = room >= min(shape.height, heights[0] + 2 * shape.border)
    rows = heights[0] if whole else min(heights[0], room - 2 * shape.border)
    return Candidate(
        tile_channels=tile_channels, dense_limit=dense_limit, share=share, outputs=outputs,
        columns=widths, rows=heights, cycles=cycles, compute=compute, reads=reads, head=head,
        jobs=len(outputs) * len(widths) * len(heights) * len(tiles) + (head > 0),
        run_rows=(rows, "the job" if whole else limit), limits=limits)


def _head(estimate, height, width, room, outputs, share):
    """Rows to cut off the first job, or 0, and cycles in which nothing is computed before it ends.

    A job's first run would be as large as the buffers, and nothing is computed while it is loaded.
    Only where its weights stay for the second one: with one tile of channels.
    """
    shape, (_, _, positions) = estimate.shape, estimate.tiles[0]
    line = (width + 2 * shape.border) * estimate.pixel_load(positions)
    row = width * shape.taps * estimate.tap(positions, outputs, share)
    room = min(room, height + shape.border)
    waits = {0: room * line}
    if len(estimate.tiles) == 1:
        for head in range(1, min(room, height)):
            waits[head] = ((head + shape.border) * line + SETUP + LATENCY
                           + max(0, room * line - head * row))
    head = min(waits, key=waits.get)
    return head, waits[head]


def _check(shape, config, tiles, outputs, widths, heights, dense_limit):
    """Raise a FitError if a job breaks a rule of the core."""
    partial = len(tiles) > 1
    # Widest and highest tiles come first, those in the middle of the image need most.
    places = [(x, width, shape.height // 2 if len(heights) > 2 else 0)
              for x, width in _starts(widths)]
    for output, slots, (x, width, y) in itertools.product(
            set(outputs), {slots for _, slots, _ in tiles}, places):
        job = Job(tile=0, slot=0, slots=slots, output=0, outputs=output,
                  y=min(y, shape.height - heights[0]), x=x, height=heights[0], width=width,
                  accumulate=False, keep_sums=partial, keep_weights=False)
        for demand in job_demands(shape, config, job, dense_limit):
            if demand[2] > demand[3]:
                refuse(*demand, config)


def _classes(shape, outputs, widths, heights, tiles):
    """How many jobs of each kind there are: {arguments of `Estimate.job`: count}."""
    def spans(sizes, limit):
        found = collections.Counter()
        for first, size in _starts(sizes):
            _, needed = _needed(first, size, limit, shape.border)
            found[size, needed, _taps_inside(first, size, limit, shape.border)] += 1
        return found

    rows, columns = spans(heights, shape.height), spans(widths, shape.width)
    places = len(widths) * len(heights)
    kinds = collections.Counter((slots, positions, number in (0, len(tiles) - 1))
                                for number, (_, slots, positions) in enumerate(tiles))
    found = collections.Counter()
    for (output, outputs_count), ((slots, positions, end), tiles_count) in itertools.product(
            collections.Counter(outputs).items(), kinds.items()):
        # Sums end with the last tile of channels, and the order turns: either end has its half.
        ends = end / min(2, len(tiles))
        kept = ends * (places - 1) / places
        for (down, rows_count), (across, columns_count), (loaded, weights), (last, results) in (
                itertools.product(rows.items(), columns.items(),
                                  ((True, 1 - kept), (False, kept)),
                                  ((True, ends), (False, 1 - ends)))):
            count = (outputs_count * tiles_count * rows_count * columns_count * weights * results)
            if count:
                found[down, across, output, (slots, positions), loaded, last] += count
    return found


def _share(estimate, outputs, widths):
    """Which pixels of MX8 are the dense side's: every share-th one, as of the descriptor."""
    config = estimate.config
    if not estimate.shape.mx or not config.sparse_pes:
        return 1
    if not config.dense_pes:
        return 0
    positions = estimate.tiles[0][2]
    # A PE's step from one of its pixels to the next wraps once at most.
    return min(range(min(255, *widths) + 1), key=lambda share: (
        sum(estimate.tap(positions, size, share) for size in outputs), share))


def _costs(outputs, config):
    """Balance costs: cycles of each side for a pixel and a tap, in a common unit."""
    dense, sparse = (
        sum((Fraction(_ceil(size, lanes), pes) for size in outputs), Fraction(0)) if pes
        else Fraction(0) for lanes, pes in ((config.dense_lanes, config.dense_pes),
                                            (config.sparse_lanes, config.sparse_pes)))
    rate = config.sparse_rate
    # An entry is half empty on average; groups below the scale units' steps are few.
    costs = (dense, sparse / rate, sparse * (rate - 1) / (2 * rate), Fraction(0))
    values = [int(cost * math.lcm(*(cost.denominator for cost in costs))) for cost in costs]
    values = [value // math.gcd(*values) for value in values]
    if max(values) > COST_LIMIT:
        values = [round(value * COST_LIMIT / max(values)) for value in values]
    return Costs(*values)
