"""The cycle model of convolutions: compute cycles equal to the RTL's, and loading beside them.

A convolution is a chain of jobs; each is a tile of rows, columns, outputs and input channels, which
the loader divides into runs (see `hw.job`). What decides the cycles of a run is how many words and
entries each input pixel has. So everything here works on integer arrays of counts, wherever they
come from: codes give them exactly, a trace's statistics draw them (`sim.profile`).

Inside a run nothing depends on memory, and the model is a recurrence:

- A PE works off units, each an output pixel and a tile of lanes. A unit's groups take as many
  issues as they have words or entries, and no group with products ends sooner than ``steps``
  cycles after the one before. So what a unit takes follows from its pixel alone (`unit_costs`).
- Its last issue waits until there is room for its results, which the post-processor makes by
  taking chunks, one a cycle, pixel after pixel (`walk_run`).

Times are cycles after the strobe that starts the run. The constants are those of the RTL.
"""

import dataclasses
import functools

import numba
import numpy as np

from golden.detector import NO_CHANNEL

__all__ = ["RUN", "COLUMN", "Counts", "Layer", "a4_counts", "exact_counts", "layer_cycles",
           "mx_counts"]

# Cycles from the strobe that starts a run to the first issue of a PE, besides one for each PE of
# its side; from the last issue of a unit to its first chunk, besides its steps; and from a unit's
# last chunk to the issue that its room lets go.
FIRST_ISSUE = 7
DENSE_RESULT = 9
SPARSE_RESULT = 10
ROOM = 1

# Cycles from one run to the next where it is loaded: from the last chunk taken to the strobe.
HANDOVER = 2

# Loading, see `hw.loader` and `hw.code_loader`: sizes of a job's first run; a run besides the
# latency of memory; a row that waits until it is known what those before it take; the next run.
JOB_SIZES = 10
RUN_LOAD = 5
ROW_WAIT = 8
HIDDEN = 12     # the most of it and of latency that is hidden by pixels that are still taken
NEXT_LOAD = 9
TABLE_LEAST = 6
QUEUE = 32      # words that the loader asks for in advance, see `hw.read_queue`
# The sequencer: a descriptor besides its words and latency; from a run offered to the next job;
# from the last chunk taken to the end of the chain, besides the latency of memory.
DESCRIPTOR = 12
NEXT_JOB = 12
FINISH = 4

# What `Layer.runs` says of a run. Issues, stalls and what else cycles go to are summed over the PEs
# of a side; ``stall`` counts the cycles in which any PE waits for room; products are those of one
# output, of two nibbles each for MX8, on the sparse side without zeros.
RUN = ("row", "rows", "input_row", "input_rows", "input_pixels", "words", "entries", "feed",
       "row_waits", "hidden_waits", "compute", "first_chunk", "dense_busy", "sparse_busy", "stall",
       "chunks", "dense_issue", "dense_scale", "dense_empty", "dense_room",
       "sparse_issue", "sparse_scale", "sparse_empty", "sparse_room",
       "dense_products", "sparse_products")
COLUMN = {name: place for place, name in enumerate(RUN)}
(ROW, ROWS, INPUT_ROW, INPUT_ROWS, INPUT_PIXELS, WORDS, ENTRIES, FEED, ROW_WAITS, HIDDEN_WAITS,
 COMPUTE, FIRST_CHUNK, DENSE_BUSY, SPARSE_BUSY, STALL, CHUNKS, DENSE_ISSUE, DENSE_SCALE,
 DENSE_EMPTY, DENSE_ROOM, SPARSE_ISSUE, SPARSE_SCALE, SPARSE_EMPTY, SPARSE_ROOM, DENSE_PRODUCTS,
 SPARSE_PRODUCTS) = range(len(RUN))


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """What every input pixel of a channel tile gives both sides.

    Arrays are (2, H, W): for A4 with the low and with the high split, for MX8 and IN16 of the low
    and of the high nibbles.

    Members
    -------
    mx : MX8 or IN16
    words, positions : pairs, words of V codes for the dense side and positions of its own in
        them, the same at every pixel
    entries : int32, entries of M non-zeros for the sparse side
    nonzeros : int32, non-zeros of the sparse side
    feed : (H, W) int32, cycles in which the compactor takes the pixel's codes
    cut : 256ths of the output pixels that have the high split
    most_words, most_entries : that the loader reckons with for a pixel; 0: the side has no work
    memory_words : port words of a pixel's codes in memory
    channels : of the tile's list
    dense_pitch, sparse_pitch : rows of weights of a (tap, plane, tile of lanes) on either side
    """

    mx: bool
    words: tuple
    positions: tuple
    entries: np.ndarray
    nonzeros: np.ndarray
    feed: np.ndarray
    cut: int
    most_words: int
    most_entries: int
    memory_words: int
    channels: int
    dense_pitch: int
    sparse_pitch: int


MAP = ("first", "rest", "wait", "issue", "empty", "products")
"""What a unit of each output pixel takes on one side, arrays (2, H, W) for either split.

``first``: issues and empty groups up to the end of the first group that is scaled; ``rest``: cycles
from there to the last issue; ``wait``: of these, those in which the last group alone waits for the
scale units; ``issue``: issues; ``empty``: cycles of groups without products, an empty product among
them; ``products``: of a lane.
"""
(FIRST, REST, WAIT, ISSUE, EMPTY, PRODUCTS) = range(len(MAP))


@numba.njit(cache=True)
def unit_costs(counts, work, kernel, steps, found):
    """Fill ``found`` (len(MAP), H, W) from ``counts`` (planes, H, W) and ``work`` (H, W)."""
    planes, height, width = counts.shape
    reach = kernel // 2
    groups = planes * planes
    for row in range(height):
        top, bottom = max(0, row - reach), min(height - 1, row + reach)
        for column in range(width):
            left, right = max(0, column - reach), min(width - 1, column + reach)
            time, head, free, waited = 0, -1, 0, 0
            issues, empties, products = 0, 0, 0
            for y in range(top, bottom + 1):
                for x in range(left, right + 1):
                    products += work[y, x]
                    for group in range(groups):
                        count = counts[group // planes, y, x]
                        issues += count
                        if count == 0:
                            empties += 1
                            if y < bottom or x < right or group + 1 < groups:
                                time += 1
                                continue
                            count = 1
                        if head < 0:
                            head = time + count
                            time = head
                        else:
                            waited = max(0, free - time - count)
                            time += count + waited
                        free = time + steps
            found[FIRST, row, column] = head
            found[REST, row, column] = time - head
            found[WAIT, row, column] = waited
            found[ISSUE, row, column] = issues
            found[EMPTY, row, column] = empties
            found[PRODUCTS, row, column] = products


@functools.lru_cache(1024)
def dense_map(words, positions, planes, height, width, kernel, steps):
    """`unit_costs` where all input pixels have as many words."""
    found = np.empty((len(MAP), height, width), dtype=np.int32)
    unit_costs(np.full((planes, height, width), words, dtype=np.int32),
               np.full((height, width), positions, dtype=np.int32), kernel, steps, found)
    return found


def count_maps(counts, kernel, config):
    """What units take, (2 sides, len(MAP), 2, H, W) int32, for a channel tile's `Counts`.

    A split that no pixel has is left out, and a side that the core has no PEs of.
    """
    height, width = counts.feed.shape
    found = np.zeros((2, len(MAP), 2, height, width), dtype=np.int32)
    planes = 1 + counts.mx
    for split in range(2 if counts.cut else 1):
        if config.dense_pes:
            # A nibble meets both planes of the weights.
            found[0, :, split] = dense_map(
                counts.words[split], counts.positions[split] * planes ** 2, planes, height, width,
                kernel, config.dense_steps)
        if config.sparse_pes:
            entries, work = counts.entries[split:split + 1], counts.nonzeros[split]
            if counts.mx:
                entries, work = counts.entries, 2 * counts.nonzeros.sum(0, dtype=np.int32)
            unit_costs(entries, work, kernel, config.sparse_steps, found[1, :, split])
    return found


@numba.njit(cache=True)
def last_pixels(entries, feed, left, right, line, most, spare):
    """Cycles for which the pixels before ``line`` are still taken when a row that waits may come.

    It may when what they could take at ``most`` and do not take is within ``spare`` entries.
    """
    cycles = 0
    while cycles < HIDDEN and line > 0:
        line -= 1
        for x in range(right - 1, left - 1, -1):
            spare -= most - entries[line, x]
            if spare < 0:
                return cycles
            cycles += feed[line, x]
            if cycles >= HIDDEN:
                return HIDDEN
    return cycles


@numba.njit(cache=True)
def form_runs(entries, feed, words, limits, most, reach, tile, runs):
    """Divide a job into runs by the loader's rule: how many; ROW to HIDDEN_WAITS are filled.

    ``entries``, ``feed``: (H, W); ``words``: of a pixel; ``limits``: halves of the record, entry
    and code buffers; ``most``: records, entries and words that a pixel may take; ``tile``: first
    row, rows, first column, columns of the output. -1 if a row of output does not fit.
    """
    height, width = entries.shape
    left, right = max(0, tile[2] - reach), min(width, tile[2] + tile[3] + reach)
    end = tile[0] + tile[1]
    needed = min(height, end + reach)
    size = right - left
    row = tile[0]
    number = 0
    while row < end:
        begin = max(0, row - reach)
        line = begin
        used, fed = 0, 0
        # What is known when the last row that waited was asked for, and rows since then.
        sure, pending, waits, hidden = 0, 0, 0, 0
        while line < needed:
            if ((line - begin + 1) * size * most[0] > limits[0]
                    or used + size * most[1] > limits[1]
                    or (line - begin) * size * words + size * most[2] > limits[2]):
                break
            if sure + (pending + 1) * size * most[1] > limits[1]:
                sure, pending = used, 0
                waits += 1
                hidden += last_pixels(entries, feed, left, right, line, most[1],
                                      limits[1] - used - size * most[1])
            pending += 1
            for x in range(left, right):
                used += entries[line, x]
                fed += feed[line, x]
            line += 1
        stop = end if line == needed else line - reach
        if stop <= row:
            return -1
        runs[number, ROW] = row
        runs[number, ROWS] = stop - row
        runs[number, INPUT_ROW] = begin
        runs[number, INPUT_ROWS] = line - begin
        runs[number, INPUT_PIXELS] = (line - begin) * size
        runs[number, WORDS] = (line - begin) * size * words
        runs[number, ENTRIES] = used
        runs[number, FEED] = fed
        runs[number, ROW_WAITS] = waits
        runs[number, HIDDEN_WAITS] = hidden
        number += 1
        row = stop
    return number


@numba.njit(cache=True)
def unit_cycles(side, quad):
    """Least cycles from a unit's last issue to the next one's, so that its sums can leave."""
    lanes, units = max(side[1], 1), max(side[2], 1)
    return lanes // quad + (lanes // units - 1 if units > quad else 0)


@numba.njit(cache=True)
def walk_run(active, sides, maps, cut, words, share, column, columns, chunks, pixel_chunks, quad,
             run):
    """Cycles of one run: fill columns COMPUTE to SPARSE_PRODUCTS of its row of `Layer.runs`.

    Parameters
    ----------
    active : (2,) bool, of the dense and of the sparse side
    sides : (2, 5): PEs, lanes, scale units, units for whose results there is room, cycles from a
        last issue to the first chunk
    maps : of `count_maps`
    cut : of the split
    words : (2,) of the dense side with the low and the high split
    share : of the descriptor; -1 for A4
    column, columns : of the output
    chunks : V/4 outputs each that the job has
    pixel_chunks : of a pixel with those that fill its last word
    """
    lead = np.array([unit_cycles(sides[0], quad), unit_cycles(sides[1], quad)])
    most_pes = max(sides[0, 0], sides[1, 0])
    before = -(1 << 40)
    ended = np.zeros((2, most_pes), dtype=np.int64)      # cycle of the last issue or empty cycle
    group_free = np.full((2, most_pes), before)          # first cycle in which a group may end
    unit_free = np.full((2, most_pes), before)           # first cycle in which a unit may end
    oldest = np.zeros((2, most_pes), dtype=np.int64)     # of the units whose results have room
    taken = np.full((2, most_pes, max(sides[0, 3], sides[1, 3])), before)
    counter = np.zeros(2, dtype=np.int64)                # units of the side, null ones too
    current = np.zeros(2, dtype=np.int64)                # PE of the unit that is merged
    arrival = np.zeros(2, dtype=np.int64)
    mine = np.zeros(2, dtype=np.bool_)
    unit = np.zeros((2, len(MAP)), dtype=np.int64)       # what the pixel's units take
    sums = np.zeros((2, 4), dtype=np.int64)              # issue, scale, empty, room
    begin = np.empty(64, dtype=np.int64)                 # waits for room, grown as need be
    finish = np.empty(64, dtype=np.int64)
    waits = 0
    tile_chunks = (max(1, sides[0, 1] // quad), max(1, sides[1, 1] // quad))
    steps = (sides[0, 1] // sides[0, 2], sides[1, 1] // sides[1, 2])
    for side in range(2):
        ended[side, :] = sides[side, 0] + FIRST_ISSUE - 1
    products = np.zeros(2, dtype=np.int64)
    merged, place, phase = 0, 0, 0
    for y in range(run[ROW], run[ROW] + run[ROWS]):
        for x in range(column, column + columns):
            place += 1
            phase += cut
            split = 1 if phase >= 256 else 0
            phase &= 255
            if share < 0:
                mine[0], mine[1] = active[0] and words[split] > 0, active[1]
                if active[0] and not mine[0]:
                    if sides[0, 0] == 1:
                        ended[0, 0] += 1
                        sums[0, 2] += 1
                    else:
                        for _ in range(0, chunks, tile_chunks[0]):
                            ended[0, counter[0] % sides[0, 0]] += 1
                            counter[0] += 1
                            sums[0, 2] += 1
            else:
                mine[0] = active[0] and share > 0 and place % share == 0
                mine[1] = active[1] and not mine[0]
                if active[1] and not mine[1]:
                    for _ in range(0, chunks, tile_chunks[1]):
                        ended[1, counter[1] % sides[1, 0]] += 1
                        counter[1] += 1
                        sums[1, 2] += 1
            for side in range(2):
                if mine[side]:
                    for name in range(len(MAP)):
                        unit[side, name] = maps[side, name, split, y, x]
                    products[side] += unit[side, PRODUCTS]
            chunk = 0
            while chunk < chunks:
                # Chunks up to the next end of a unit come one a cycle.
                ready, size = merged + 1, chunks - chunk
                for side in range(2):
                    if not mine[side]:
                        continue
                    within = chunk % tile_chunks[side]
                    if within == 0:
                        pe = counter[side] % sides[side, 0]
                        counter[side] += 1
                        current[side] = pe
                        head = ended[side, pe] + unit[side, FIRST]
                        last = max(head, group_free[side, pe]) + unit[side, REST]
                        # The cycle in which its last issue would come if nothing held it.
                        came = last - unit[side, WAIT] if unit[side, REST] else head
                        last = max(last, unit_free[side, pe])
                        sums[side, 0] += unit[side, ISSUE]
                        sums[side, 1] += (last - ended[side, pe] - unit[side, ISSUE]
                                          - unit[side, EMPTY])
                        sums[side, 2] += unit[side, EMPTY]
                        roomy = taken[side, pe, oldest[side, pe]] + ROOM
                        if roomy > came:
                            if waits == len(begin):
                                begin = np.concatenate((begin, np.empty_like(begin)))
                                finish = np.concatenate((finish, np.empty_like(finish)))
                            begin[waits] = came
                            finish[waits] = roomy
                            waits += 1
                            sums[side, 3] += max(0, roomy - last)
                            last = max(last, roomy)
                        ended[side, pe] = last
                        group_free[side, pe] = last + steps[side]
                        unit_free[side, pe] = last + lead[side]
                        arrival[side] = last + sides[side, 4]
                    ready = max(ready, arrival[side] + within)
                    size = min(size, tile_chunks[side] - within)
                if place == 1 and chunk == 0:
                    run[FIRST_CHUNK] = ready
                chunk += size
                merged = ready + size - 1
                for side in range(2):
                    if mine[side] and (chunk == chunks or chunk % tile_chunks[side] == 0):
                        pe = current[side]
                        taken[side, pe, oldest[side, pe]] = merged
                        oldest[side, pe] += 1
                        if oldest[side, pe] == sides[side, 3]:
                            oldest[side, pe] = 0
            merged += pixel_chunks - chunks
    run[COMPUTE] = merged
    run[CHUNKS] = place * pixel_chunks
    run[DENSE_PRODUCTS], run[SPARSE_PRODUCTS] = products
    for side in range(2):
        run[DENSE_BUSY + side] = ended[side, :sides[side, 0]].max() if active[side] else 0
        run[DENSE_ISSUE + 4 * side:DENSE_ISSUE + 4 * side + 4] = sums[side]
    union, until = 0, 0
    for wait in np.argsort(begin[:waits]):
        union += max(0, finish[wait] - max(begin[wait], until))
        until = max(until, finish[wait])
    run[STALL] = union


@numba.njit(cache=True)
def walk_jobs(jobs, active, tiles, entries, feed, maps, limits, sides, reach, share, quad, runs,
              ends):
    """Runs of jobs, one after the other; returns how many, or -1 if one does not fit.

    Parameters
    ----------
    jobs : (jobs, 7): tile of channels, row, rows, column, columns, chunks, chunks of a pixel with
        those that fill its last word
    active : (tiles, 2) bool
    tiles : (tiles, 6): cut, low and high words, records, entries and words a pixel may take
    entries, feed : (tiles, H, W)
    maps : (tiles, 2, len(MAP), 2, H, W)
    ends : (jobs,), filled: number of the first run after each job
    """
    number = 0
    for job in range(len(jobs)):
        tile = jobs[job, 0]
        count = form_runs(entries[tile], feed[tile], tiles[tile, 5], limits, tiles[tile, 3:6],
                          reach, jobs[job, 1:5], runs[number:])
        if count < 0:
            return -1
        for _ in range(count):
            walk_run(active[tile], sides, maps[tile], tiles[tile, 0], tiles[tile, 1:3], share,
                     jobs[job, 3], jobs[job, 4], jobs[job, 5], jobs[job, 6], quad, runs[number])
            number += 1
        ends[job] = number
    return number


class Layer:
    """What a layer's jobs need on a core, but not the counts: made once, used for any evaluation.

    Parameters
    ----------
    kernel : int
    jobs : sequence of sim.tiler.Job
    share : int
        Of the descriptor.
    config : hw.config.Config
    residual : bool
        Whether a tensor is added to the output.

    Attributes
    ----------
    place : (jobs,)
        Which of the jobs that differ each job is, for cycles: outputs with others before them and
        the same sizes take as long.
    """

    def __init__(self, kernel, jobs, share, config, residual=False):
        self.kernel, self.share, self.config, self.residual = kernel, share, config, residual
        rows = []
        for job in jobs:
            chunks = _ceil(job.outputs, config.quad)
            rows.append((job.tile, job.y, job.height, job.x, job.width, chunks, chunks
                         if job.keep_sums else _ceil(job.outputs, config.vector) * 4))
        table, self.place = np.unique(np.array(rows, dtype=np.int64), axis=0, return_inverse=True)
        self.jobs = np.ascontiguousarray(table)
        self.tile = np.array([job.tile for job in jobs])
        self.outputs = np.array([job.outputs for job in jobs])
        self.keeps_weights = np.array([job.keep_weights for job in jobs])
        self.gives_results = np.array([not job.keep_sums for job in jobs])
        self.sides = np.array([
            [getattr(config, f"{side}_{name}") for name in ("pes", "lanes", "scale_units")]
            + [config.result_depth // steps, result + steps]
            for side, steps, result in (("dense", config.dense_steps, DENSE_RESULT),
                                        ("sparse", config.sparse_steps, SPARSE_RESULT))],
            dtype=np.int64)
        # There is no limit for a side that is not there.
        none = 1 << 40
        self.limits = np.array([config.record_depth // 2,
                                config.entry_depth // 2 if config.sparse_pes else none,
                                config.codes_depth // 2 if config.dense_pes else none])

    def runs(self, counts):
        """Runs of the jobs that differ, and the number of the first one after each of them.

        Parameters
        ----------
        counts : list of Counts, of each tile of channels

        Returns
        -------
        runs : (runs, len(RUN)) int64
        ends : (jobs that differ,) int64

        Raises
        ------
        ValueError
            If the rows that a row of output needs do not fit the buffers.
        """
        config, mx = self.config, counts[0].mx
        if mx:
            active = [(self.share != 0, self.share != 1)] * len(counts)
        else:
            active = [(tile.most_words > 0, tile.most_entries > 0) for tile in counts]
        active = np.array(active) & (config.dense_pes > 0, config.sparse_pes > 0)
        tiles = np.array([(tile.cut, *tile.words, 1 + mx, tile.most_entries, tile.most_words)
                          for tile in counts], dtype=np.int64)
        maps = np.stack([count_maps(tile, self.kernel, config) for tile in counts])
        runs = np.zeros((int(self.jobs[:, 2].sum()), len(RUN)), dtype=np.int64)
        ends = np.empty(len(self.jobs), dtype=np.int64)
        number = walk_jobs(
            self.jobs, active, tiles,
            np.stack([tile.entries.sum(0, dtype=np.int32) if mx else tile.entries[0]
                      for tile in counts]),
            np.stack([tile.feed for tile in counts]), maps, self.limits, self.sides,
            self.kernel // 2, self.share if mx else -1, config.quad, runs, ends)
        if number < 0:
            raise ValueError(f"the rows that a row of output needs must fit half of the buffers of"
                             f" {config.name}")
        return runs[:number], ends

    def total(self, counts, runs, ends, latency=4):
        """Cycles of the whole chain, those in which it only waits for operands, those of loading.

        Parameters
        ----------
        counts, runs, ends : of `runs`
        latency : of memory, cycles from a request to its response
        """
        config, taps = self.config, self.kernel ** 2
        vector, planes = config.vector, 1 + counts[0].mx
        channels, dense, pitch, sparse_pitch, slots = (
            np.array(values)[self.tile] for values in zip(*(
                (tile.channels, tile.positions[1], tile.dense_pitch, tile.sparse_pitch,
                 32 if tile.mx else tile.memory_words * vector) for tile in counts)))
        dense = dense * (config.dense_pes > 0)
        words = _ceil(self.outputs, vector)
        tiles = _ceil(self.outputs, config.dense_lanes)
        own = np.maximum(1, _ceil(self.outputs, config.sparse_lanes) // max(1, config.sparse_pes))
        # Two cycles for a word of scales if a side's row takes half of one.
        halves = 1 + any(
            getattr(config, f"{side}_pes") and getattr(config, f"{side}_scale_units") < vector // 2
            for side in ("dense", "sparse"))
        taken = taps * planes * channels * words      # port words of weights
        weights = taps * planes * (dense * np.maximum(tiles, words) + (channels - dense) * words)
        # A position of MX8 without a channel takes a cycle.
        pads = np.where(planes == 2, 32 - channels, 0)
        scales = 2 * taps * words
        # What is taken later than it was asked for hides the sizes and the way to the first code.
        late = scales * (halves - 1) + weights - taken
        # List and table have a place of their own.
        head = np.where(
            self.keeps_weights, 0,
            latency + 1 + slots // config.quad + np.maximum(16 * words, TABLE_LEAST + latency))
        setup = JOB_SIZES + np.where(
            self.keeps_weights, 0, head + scales + taken + late + pads
            - np.minimum(JOB_SIZES + latency + 2, late))
        setup_words = np.where(
            self.keeps_weights, 0, slots // config.quad + 16 * words + scales + taken)
        rows = np.stack([
            taps * planes * tiles * pitch * (config.dense_pes > 0),
            taps * planes * own * sparse_pitch * (config.sparse_pes > 0),
            taps * tiles * config.dense_steps * (config.dense_pes > 0),
            taps * own * config.sparse_steps * (config.sparse_pes > 0)], axis=1)
        depths = np.array([config.weight_depth, config.sparse_weight_depth,
                           config.weight_scale_depth, config.sparse_weight_scale_depth])
        width = runs[:, INPUT_PIXELS] // runs[:, INPUT_ROWS]
        row_scales = _ceil(width, vector // 2)
        words = np.array([tile.memory_words for tile in counts])[self.jobs[:, 0]]
        words = runs[:, INPUT_PIXELS] * np.repeat(words, np.diff(ends, prepend=0))
        # While a row's scales come in, the compactor works off the last two words before them.
        idle = np.maximum(0, row_scales + 3 - 2 * runs[:, FEED] // words)
        waits = runs[:, ROW_WAITS] * (latency + ROW_WAIT)
        loads = (row_scales + 1 + (runs[:, INPUT_ROWS] - 1) * idle + runs[:, FEED] + latency
                 + RUN_LOAD + waits - np.minimum(runs[:, HIDDEN_WAITS], waits))
        load_words = runs[:, INPUT_ROWS] * row_scales + words
        residuals = runs[:, CHUNKS] * self.residual
        descriptor = DESCRIPTOR + 256 // vector + latency
        cycles, waited, loading = timeline(
            self.place, ends, runs[:, COMPUTE].copy(), runs[:, FIRST_CHUNK].copy(), loads,
            load_words, residuals, self.gives_results, setup, setup_words, head,
            self.keeps_weights, rows, depths, descriptor)
        return cycles + FINISH + latency, waited, loading


@numba.njit(cache=True)
def timeline(place, ends, compute, first_chunk, loads, load_words, residuals, gives_results, setup,
             setup_words, head, keeps, rows, depths, descriptor):
    """(cycles, cycles without computing, cycles of loading) of a chain of jobs.

    Parameters
    ----------
    place : (jobs,), which of the jobs that differ each one is
    ends : (jobs that differ,), number of the first run after each of them
    compute, first_chunk, loads, load_words, residuals : (runs,), cycles, of them those up to the
        first chunk, cycles of loading, words of the port that it takes, residual words
    gives_results, keeps, setup, setup_words, head : (jobs,), what a job does, its cycles before its
        first run, the words that it takes in them, and those of the cycles before its weights
    rows : (jobs, 4), of the weight memories; ``depths``: theirs
    descriptor : cycles to fetch and check a descriptor
    """
    start = descriptor                # strobe that gives a job to the loader
    offered, opened = 0, 0            # of the last job: all of it loaded; its first run taken
    released, before = 0, 0           # last chunk of the last run, and of the run before it, taken
    reading, rate = 0, 0.0            # from when on the last run takes residuals, words a cycle
    old = np.zeros(4, dtype=np.int64)
    waited, loading = 0, 0
    for job in range(len(place)):
        if job:
            start = max(offered + NEXT_JOB, opened + NEXT_JOB, start + descriptor)
        free = start
        first = ends[place[job] - 1] if place[job] else 0
        if not keeps[job]:
            full = False
            for memory in range(4):
                full |= old[memory] + rows[job, memory] > depths[memory]
                old[memory] = rows[job, memory]
            if full:
                free = max(free, released - head[job])
        free = delayed(free, setup[job], setup_words[job], reading, released, rate)
        loading += setup[job]
        for number in range(first, ends[place[job]]):
            if number > first:
                free += NEXT_LOAD
            free = delayed(max(free, before), loads[number], load_words[number], reading,
                           released, rate)
            loading += loads[number]
            taken = max(free, released)
            waited += taken - released
            if number == first:
                opened = taken
            begun = taken + HANDOVER - 1
            before = released
            released = begun + compute[number] + 1
            reading = begun + first_chunk[number]
            rate = residuals[number] / (released - reading) if gives_results[job] else 0.0
        offered = free
    return released, waited, loading


@numba.njit(cache=True)
def delayed(begin, cycles, words, reading, released, rate):
    """When a load ends that shares the port with the residuals of the run that is computed.

    From ``reading`` to ``released`` residuals take ``rate`` of the port and go first. A load of
    ``words`` in ``cycles`` has as many words waiting by then as it could ask for in advance. When
    they are used up it goes as fast as the rest of the port lets it.
    """
    end = begin + cycles
    pace, rest = words / cycles, 1 - min(1.0, rate)     # words a cycle: wanted, and to be had
    now = max(begin, reading)
    left, shared = end - now, released - now            # cycles of the load, and with residuals
    if rest >= pace or left <= 0 or shared <= 0:
        return end
    ahead = min(min(QUEUE, (1 - pace) * (now - begin)) / (pace - rest), left, shared)
    left, shared = left - ahead, shared - ahead
    if left * pace <= shared * rest:
        return int(now + ahead + (left * pace / rest if left else 0))
    return int(released + left - shared * rest / pace)


def exact_counts(codes, channels, config):
    """Counts of a channel tile from its codes.

    Parameters
    ----------
    codes : golden.requantizer.Codes of the input
    channels : golden.detector.ChannelList of the tile
    config : hw.config.Config
    """
    ordered = channels.gather(codes.codes, config.vector).numpy()     # (positions, H, W)
    if codes.format.mx:
        nonzero = np.stack([ordered & 15, ordered >> 4]) != 0
        there = int((channels.slots != NO_CHANNEL).sum())
        return mx_counts(nonzero.sum(1), there, config,
                         sum(feed_cycles(plane, config) for plane in nonzero))
    low, high = channels.low, channels.high
    kept = ordered != 0
    kept[:low] = False
    return a4_counts(np.stack([kept.sum(0), kept[high:].sum(0)]), len(channels.slots), low, high,
                     channels.cut, config, feed_cycles(kept, config))


def feed_cycles(nonzero, config):
    """Cycles in which a group's words are taken, (H, W), from (positions, H, W) bool.

    A word takes the compactor of sparse PEs a cycle for each entry that becomes full with it, the
    last one of the group being full, and at least one.
    """
    vector, rate = config.vector, config.sparse_rate
    if not config.sparse_pes:
        return np.full(nonzero.shape[1:], _ceil(len(nonzero), vector), dtype=np.int32)
    words = np.add.reduceat(nonzero, range(0, len(nonzero), vector), axis=0, dtype=np.int32)
    full = np.cumsum(words, axis=0)
    full[:-1] //= rate
    full[-1] = _ceil(full[-1], rate)
    return np.maximum(1, np.diff(full, axis=0, prepend=0)).sum(0, dtype=np.int32)


def a4_counts(nonzeros, channels, low, high, cut, config, feed=None):
    """Counts of a channel tile of A4.

    Parameters
    ----------
    nonzeros : (2, H, W), non-zeros at positions from ``low`` and from ``high`` on
    channels : of the tile's list
    low, high, cut : of the list
    config : hw.config.Config
    feed : as in `Counts`; None: non-zeros are spread evenly over the words of the sparse side
    """
    vector, rate = config.vector, config.sparse_rate
    nonzeros = nonzeros.astype(np.int32)
    entries = _ceil(nonzeros, rate)
    # With the high split the entries before the first one that counts are left out.
    skipped = np.where(nonzeros[1] > 0, (nonzeros[0] - nonzeros[1]) // rate, entries[0])
    positions = _ceil(channels, vector)
    if feed is None:
        before = low // vector
        feed = before + np.maximum(positions - before, entries[0])
    return Counts(
        mx=False, words=(_ceil(low, vector), _ceil(high, vector)), positions=(low, high),
        entries=np.stack([entries[0], entries[0] - skipped]), nonzeros=nonzeros,
        feed=feed, cut=cut, most_words=_ceil(high, vector),
        most_entries=_ceil(channels - low, rate), memory_words=positions, channels=channels,
        dense_pitch=_ceil(high, vector),
        sparse_pitch=(positions - low // vector) * vector)


def mx_counts(nonzeros, channels, config, feed=None):
    """Counts of a block of 32 slots of MX8 or IN16.

    ``nonzeros`` (2, H, W): of its nibbles; ``channels``: slots that have one; ``feed``: as in
    `Counts`; None: non-zeros are spread evenly.
    """
    nonzeros = nonzeros.astype(np.int32)
    entries = _ceil(nonzeros, config.sparse_rate)
    words, entries_most = 32 // config.vector, 32 // config.sparse_rate
    if feed is None:
        least = entries if config.sparse_pes else 0 * entries
        feed = np.maximum(words, least).sum(0, dtype=np.int32)
    return Counts(
        mx=True, words=(words, words), positions=(channels, channels), entries=entries,
        nonzeros=nonzeros, feed=feed, cut=0,
        most_words=2 * words, most_entries=2 * entries_most, memory_words=2 * words,
        channels=channels, dense_pitch=words, sparse_pitch=32)


def layer_cycles(plan, result, config, latency=4):
    """What a convolution's counters show with a memory that never holds anything back.

    Parameters
    ----------
    plan : sim.tiler.Plan
    result : golden.layer.LayerResult
        Its codes and lists.
    config : hw.config.Config
    latency : of memory, cycles from a request to its response

    Returns
    -------
    dict
        ``compute_cycles``, ``dense_busy``, ``sparse_busy``, ``stall_cycles``: as the registers;
        ``total_cycles``: close to the register; ``runs``: for each job the output pixels of its
        runs, (row, rows, column, columns).
    """
    layer = Layer(plan.shape.kernel, plan.jobs, plan.share, config, plan.shape.residual)
    counts = [exact_counts(result.codes, channels, config) for channels in result.lists]
    runs, ends = layer.runs(counts)
    foreseen, _, _ = layer.total(counts, runs, ends, latency)
    parts = np.split(runs, ends[:-1])
    parts = [parts[place] for place in layer.place]
    total = np.concatenate(parts).sum(0)
    return {
        "compute_cycles": int(total[COMPUTE]), "dense_busy": int(total[DENSE_BUSY]),
        "sparse_busy": int(total[SPARSE_BUSY]), "stall_cycles": int(total[STALL]),
        "total_cycles": int(foreseen),
        "runs": [[(int(row), int(rows), job.x, job.width) for row, rows in part[:, :2]]
                 for job, part in zip(plan.jobs, parts)],
    }


def _ceil(value, step):
    return -(-value // step)
