"""The cycle model against a simulation of the same contracts that steps through every cycle."""

import collections
import dataclasses

import numpy as np
import pytest

from hw.config import LARGE, MEDIUM, SMALL, TINY
from sim import cycles, tiler
from tests import naive

CONFIGS = [
    TINY, SMALL, MEDIUM,
    dataclasses.replace(SMALL, name="queues", result_depth=8, sparse_scale_units=8),
    dataclasses.replace(MEDIUM, name="pes", dense_pes=2, sparse_pes=4, sparse_scale_units=8,
                        dense_scale_units=4, result_depth=16),
    dataclasses.replace(SMALL, name="sparse", dense_pes=0, sparse_pes=2),
    dataclasses.replace(SMALL, name="dense", dense_pes=3, dense_lanes=16, sparse_pes=0),
    dataclasses.replace(LARGE, name="wide", sparse_pes=2),
]


class Pe:
    """One PE: what is at its issue, and the results that it has on their way."""

    def __init__(self, config, side, work):
        lanes = getattr(config, f"{side}_lanes")
        units = getattr(config, f"{side}_scale_units")
        pes = getattr(config, f"{side}_pes")
        self.steps = lanes // units
        self.distance = lanes // config.quad + (self.steps - 1 if units > config.quad else 0)
        self.capacity = config.result_depth // self.steps
        self.latency = self.steps + (9 if side == "dense" else 10)
        self.begins = pes + 7
        self.work = collections.deque(work)     # (issues, scaled, chunks of a unit that ends)
        self.left = None
        self.group_free = self.unit_free = 0
        self.flying = 0
        self.results = collections.deque()      # (cycle, last of its unit)
        self.last_cycle = 0
        self.starved = False
        self.spent = collections.Counter()

    def step(self, cycle, returned):
        """A cycle; ``returned``: units whose last chunk was taken in the cycle before."""
        self.starved = False
        self.flying -= returned
        if cycle < self.begins or not self.work:
            return
        issues, scaled, chunks = self.work[0]
        if self.left is None:
            self.left = max(1, issues)
        if self.left == 1 and scaled:
            ends = bool(chunks)
            self.starved = ends and self.flying == self.capacity
            held = cycle < self.group_free or (ends and cycle < self.unit_free)
            if held or self.starved:
                self.spent["scale" if held else "room"] += 1
                return
            self.group_free = cycle + self.steps
            if ends:
                self.unit_free = cycle + self.distance
                self.flying += 1
                self.results += [(cycle + self.latency + number, number + 1 == chunks)
                                 for number in range(chunks)]
        self.spent["issue" if issues else "empty"] += 1
        self.last_cycle = cycle
        self.left -= 1
        if not self.left:
            self.left = None
            self.work.popleft()


def simulate(config, kernel, job, run, counts, share):
    """Counters of a run, by stepping through its cycles."""
    mx = counts.mx
    quad, chunks = config.quad, -(-job.outputs // config.quad)
    pixels = [(y, x) for y in range(run[0], run[0] + run[1])
              for x in range(job.x, job.x + job.width)]
    height, width = counts.feed.shape
    work, order = {}, {}
    for side in ("dense", "sparse"):
        pes, lanes = getattr(config, f"{side}_pes"), getattr(config, f"{side}_lanes")
        most = counts.most_words if side == "dense" else counts.most_entries
        unused = {"dense": 0, "sparse": 1}[side]
        active = pes and (share != unused if mx else most > 0)
        tiles = -(-chunks // (lanes // quad))
        work[side], order[side] = [[] for _ in range(pes)], {}
        number = phase = 0
        for place, (y, x) in enumerate(pixels, 1) if active else ():
            phase += counts.cut
            split, phase = divmod(phase, 256)
            values = np.full((2, height, width), counts.words[split])
            if side == "sparse":
                values = counts.entries if mx else counts.entries[split:]
            given = bool(share) and place % share == 0
            mine = (given == (side == "dense") if mx else
                    side == "sparse" or counts.words[split] > 0)
            if not mine and side == "dense":
                if mx:
                    continue
                if pes == 1:      # one cycle for the whole pixel
                    work[side][0].append((0, False, 0))
                    continue
            for tile in range(tiles):
                size = min(lanes // quad, chunks - tile * (lanes // quad))
                pe, number = number % pes, number + 1
                if not mine:
                    work[side][pe].append((0, False, 0))
                    continue
                order[side].update({(place, tile * (lanes // quad) + n): pe for n in range(size)})
                groups = [int(values[plane, row, column])
                          for _, row, column in naive.taps(kernel, height, width, y, x)
                          for plane in ((0, 0, 1, 1) if mx else (0,))]
                work[side][pe] += [(count, count > 0, 0) for count in groups[:-1]]
                work[side][pe].append((groups[-1], True, size))
    pes = {side: [Pe(config, side, units) for units in lists] for side, lists in work.items()}
    wanted = collections.deque()
    for place in range(1, len(pixels) + 1):
        padding = 0 if job.keep_sums else -chunks % 4
        wanted += [(place, chunk) for chunk in range(chunks)] + [None] * padding
    every = pes["dense"] + pes["sparse"]
    returned = dict.fromkeys(every, 0)
    cycle = stall = 0
    while wanted:
        cycle += 1
        for pe in every:
            pe.step(cycle, returned[pe])
            returned[pe] = 0
        stall += any(pe.starved for pe in every)
        queues = [pes[side][order[side][wanted[0]]] for side in order if wanted[0] in order[side]]
        if all(pe.results and pe.results[0][0] <= cycle for pe in queues):
            assert queues or wanted[0] is None
            for pe in queues:
                returned[pe] += pe.results.popleft()[1]
            wanted.popleft()
    assert not any(pe.work or pe.results for pe in every)
    found = {"compute": cycle, "stall": stall}
    for side in pes:
        spent = sum((pe.spent for pe in pes[side]), collections.Counter())
        found |= {f"{side}_{cause}": spent[cause] for cause in ("issue", "scale", "empty", "room")}
        found[f"{side}_busy"] = max(pe.last_cycle for pe in pes[side]) if any(work[side]) else 0
    return found


def random_counts(rng, config, mx, height, width):
    """Counts of a tile with pixels that have no non-zeros among them."""
    vector, rate = config.vector, config.sparse_rate
    there = rng.random((height, width)) < rng.choice((0.3, 0.8, 1))
    if mx:
        return cycles.mx_counts(rng.integers(0, 33, (2, height, width)) * there, 32, config)
    channels = int(rng.integers(1, 3 * vector))
    words = -(-channels // vector)
    low = int(rng.integers(0, words + 1)) * vector if config.sparse_pes else channels
    low = min(low if config.dense_pes else 0, channels)
    cut = int(rng.integers(0, 256)) if low < channels and config.dense_pes else 0
    high = min(low + vector, channels) if cut else low
    rest = rng.integers(0, channels - high + 1, (height, width)) * there
    boundary = rng.integers(0, high - low + 1, (height, width)) * there
    counts = cycles.a4_counts(
        np.stack([rest + boundary, rest]), channels, low, high, cut, config)
    assert (counts.entries[1] * rate >= rest).all()
    return counts


def random_job(rng, config, mx):
    """Sizes of an image, a kernel, a job in it, and its share."""
    height, width = (int(size) for size in rng.integers(1, 9, 2))
    rows, columns = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    tiles = rng.choice([n for n in (1, 2, 3, 4) if n * config.sparse_lanes <= config.tile_outputs
                        and (not config.sparse_pes or not (config.sparse_pes % n
                                                           and n % config.sparse_pes))])
    most = int(tiles) * config.sparse_lanes
    job = tiler.Job(
        tile=0, slot=0, slots=32, output=0,
        outputs=int(rng.integers(most - config.sparse_lanes + 1, most + 1)),
        y=int(rng.integers(0, height - rows + 1)), x=int(rng.integers(0, width - columns + 1)),
        height=rows, width=columns, accumulate=False, keep_sums=bool(rng.integers(2)),
        keep_weights=False)
    share = int(rng.integers(0, columns + 1))
    if not (config.dense_pes and config.sparse_pes):
        share = int(config.sparse_pes == 0)
    return height, width, int(rng.choice((1, 3))), job, share


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx8"])
def test_cycles(config, mx):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        height, width, kernel, job, share = random_job(rng, config, mx)
        counts = random_counts(rng, config, mx, height, width)
        runs, _ = cycles.Layer(kernel, [job], share, config).runs([counts])
        for run in runs:
            expected = simulate(config, kernel, job, run, counts, share)
            found = {name: int(run[cycles.COLUMN[name]]) for name in expected}
            for side in ("dense", "sparse"):
                # The model counts from the first unit on, where a side has any.
                if not expected[f"{side}_busy"]:
                    del found[f"{side}_busy"], expected[f"{side}_busy"]
            assert found == expected, f"seed {seed}, share {share}, {job}"


def runs_of(config, kernel, job, counts):
    """(first row, rows) of each run of a job, by the loader's rule; None if it does not fit."""
    height, width = counts.feed.shape
    entries = counts.entries.sum(0) if counts.mx else counts.entries[0]
    reach = kernel // 2
    columns = range(max(0, job.x - reach), min(width, job.x + job.width + reach))
    end = job.y + job.height
    row, found = job.y, []
    while row < end:
        line = max(0, row - reach)
        records = used = words = 0
        while line < min(height, end + reach):
            size = len(columns)
            if records + size * (1 + counts.mx) > config.record_depth // 2:
                break
            if config.sparse_pes and used + size * counts.most_entries > config.entry_depth // 2:
                break
            if config.dense_pes and words + size * counts.most_words > config.codes_depth // 2:
                break
            records += size * (1 + counts.mx)
            used += int(sum(entries[line, x] for x in columns))
            words += size * counts.most_words
            line += 1
        stop = end if line == min(height, end + reach) else line - reach
        if stop <= row:
            return None
        found.append((row, stop - row))
        row = stop
    return found


@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx8"])
def test_runs(mx):
    several = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        config = dataclasses.replace(
            MEDIUM, record_depth=int(rng.choice((32, 64, 128))), entry_depth=256,
            codes_depth=256)
        height, width, kernel, job, share = random_job(rng, config, mx)
        counts = random_counts(rng, config, mx, height, width)
        layer = cycles.Layer(kernel, [job], share, config)
        expected = runs_of(config, kernel, job, counts)
        if expected is None:
            with pytest.raises(ValueError, match="^the rows that a row of output needs"):
                layer.runs([counts])
            continue
        runs, ends = layer.runs([counts])
        assert [tuple(run[:2]) for run in runs.tolist()] == expected, f"seed {seed}"
        assert ends.tolist() == [len(runs)]
        several += len(runs) > 1
        total, waited, loading = layer.total([counts], runs, ends)
        assert total > runs[:, cycles.COLUMN["compute"]].sum() + waited
        assert loading > 0
    assert several >= 3


def test_rows_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(MEDIUM, record_depth=8)
    counts = random_counts(rng, config, False, 8, 8)
    job = tiler.Job(tile=0, slot=0, slots=32, output=0, outputs=32, y=0, x=0, height=8, width=8,
                    accumulate=False, keep_sums=False, keep_weights=False)
    with pytest.raises(ValueError, match="^the rows that a row of output needs must fit half"):
        cycles.Layer(3, [job], 0, config).runs([counts])
