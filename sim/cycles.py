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

import numba
import numpy as np

from golden.convolution import loads

__all__ = ["RUN", "COLUMN", "Counts", "Map", "count_maps", "exact_counts", "job_runs",
           "layer_cycles"]

# Cycles from the strobe that starts a run to the first issue of a PE, besides one for each PE of
# its side; from the last issue of a unit to its first chunk, besides its steps; and from a unit's
# last chunk to the issue that its room lets go.
FIRST_ISSUE = 7
DENSE_RESULT = 9
SPARSE_RESULT = 10
ROOM = 1

# What `job_runs` says of a run. Stalls are summed over the PEs of a side; ``stall`` counts the
# cycles in which any PE waits for room.
RUN = ("row", "rows", "input_row", "input_rows", "input_pixels", "words", "entries", "feed",
       "compute", "dense_busy", "sparse_busy", "stall", "chunks",
       "dense_issue", "dense_scale", "dense_empty", "dense_room",
       "sparse_issue", "sparse_scale", "sparse_empty", "sparse_room", "nonzeros")
COLUMN = {name: place for place, name in enumerate(RUN)}
(ROW, ROWS, INPUT_ROW, INPUT_ROWS, INPUT_PIXELS, WORDS, ENTRIES, FEED, COMPUTE, DENSE_BUSY,
 SPARSE_BUSY, STALL, CHUNKS, DENSE_ISSUE, DENSE_SCALE, DENSE_EMPTY, DENSE_ROOM, SPARSE_ISSUE,
 SPARSE_SCALE, SPARSE_EMPTY, SPARSE_ROOM, NONZEROS) = range(len(RUN))


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """What every input pixel of a channel tile gives both sides.

    Members
    -------
    words : (planes, H, W) int32, words of V codes for the dense side
    entries : (planes, H, W) int32, entries of M non-zeros for the sparse side
    nonzeros : (H, W) int32, non-zeros of the sparse side in all planes
    feed : (H, W) int32, cycles in which the compactor takes the pixel's codes
    worst_words, worst_entries : most that the loader reckons with for a pixel, all planes
    memory_words : port words of a pixel's codes in memory
    slots : of the tile
    dense_pitch, sparse_pitch : rows of weights of a (tap, plane, tile of lanes) on either side

    One plane for A4, two for MX8 and IN16.
    """

    words: np.ndarray
    entries: np.ndarray
    nonzeros: np.ndarray
    feed: np.ndarray
    worst_words: int
    worst_entries: int
    memory_words: int
    slots: int
    dense_pitch: int
    sparse_pitch: int

    @property
    def mx(self):
        """Whether there are two nibble planes."""
        return len(self.words) == 2


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """What a unit of each output pixel takes on one side, from `count_maps`; (H, W) int32 each.

    Members
    -------
    first : issues and empty groups up to the end of the first group that is scaled
    rest : cycles from there to the last issue
    wait : of these, those in which the last group alone waits for the scale units
    issue : issues
    empty : cycles of groups without products; an empty product is one of them, not an issue
    nonzeros : products of a lane
    """

    first: np.ndarray
    rest: np.ndarray
    wait: np.ndarray
    issue: np.ndarray
    empty: np.ndarray
    nonzeros: np.ndarray


@numba.njit(cache=True)
def unit_costs(counts, work, kernel, steps, first, rest, wait, issue, empty, total):
    """Fill the arrays of a `Map` from ``counts`` (planes, H, W) and ``work`` (H, W)."""
    planes, height, width = counts.shape
    reach = kernel // 2
    for row in range(height):
        top, bottom = max(0, row - reach), min(height - 1, row + reach)
        for column in range(width):
            left, right = max(0, column - reach), min(width - 1, column + reach)
            time = 0
            head = -1
            free = 0
            issues = 0
            empties = 0
            products = 0
            waited = 0
            for y in range(top, bottom + 1):
                for x in range(left, right + 1):
                    products += work[y, x]
                    for group in range(planes * planes):
                        count = counts[group // planes, y, x]
                        issues += count
                        if count == 0:
                            empties += 1
                            if y < bottom or x < right or group + 1 < planes * planes:
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
            first[row, column] = head
            rest[row, column] = time - head
            wait[row, column] = waited
            issue[row, column] = issues
            empty[row, column] = empties
            total[row, column] = products


def count_maps(counts, kernel, config):
    """(dense Map, sparse Map) of a channel tile's `Counts`; None for a side without PEs."""
    shape = counts.words.shape[1:]
    maps = []
    for side, values, work in (("dense", counts.words, counts.words[0]),
                               ("sparse", counts.entries, counts.nonzeros)):
        if not getattr(config, f"{side}_pes"):
            maps.append(None)
            continue
        found = [np.empty(shape, dtype=np.int32) for _ in range(6)]
        unit_costs(values, work, kernel, getattr(config, f"{side}_steps"), *found)
        maps.append(Map(*found))
    return tuple(maps)


@numba.njit(cache=True)
def form_runs(words, entries, feed, limits, worst, reach, tile, runs):
    """Divide a job into runs by the loader's rule; returns how many, columns ROW to FEED filled.

    ``limits``: halves of the record, entry and code buffers; ``worst``: records, entries and words
    that a pixel may take; ``tile``: first row, rows, first column, columns of the output. Limits of
    a side that is not there must be large enough.
    """
    planes, height, width = words.shape
    left, right = max(0, tile[2] - reach), min(width, tile[2] + tile[3] + reach)
    end = tile[0] + tile[1]
    needed = min(height, end + reach)
    size = right - left
    row = tile[0]
    number = 0
    while row < end:
        begin = max(0, row - reach)
        line = begin
        used_entries, used_words, fed = 0, 0, 0
        while line < needed:
            rows = line - begin + 1
            if line > begin and (rows * size * worst[0] > limits[0]
                                 or used_entries + size * worst[1] > limits[1]
                                 or used_words + size * worst[2] > limits[2]):
                break
            for plane in range(planes):
                for x in range(left, right):
                    used_entries += entries[plane, line, x]
                    used_words += words[plane, line, x]
            for x in range(left, right):
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
        runs[number, WORDS] = used_words
        runs[number, ENTRIES] = used_entries
        runs[number, FEED] = fed
        number += 1
        row = stop
    return number


@numba.njit(cache=True)
def unit_cycles(side, quad):
    """Least cycles from a unit's last issue to the next one's, so that its sums can leave."""
    lanes, units = max(side[1], 1), max(side[2], 1)
    return lanes // quad + (lanes // units - 1 if units > quad else 0)


@numba.njit(cache=True)
def walk_run(side_active, sides, first, rest, wait, issue, empty, row, rows, column, columns,
             share, chunks, pixel_chunks, quad, runs, number):
    """Cycles of one run: fill columns COMPUTE to NONZEROS of ``runs[number]``.

    ``sides`` (2, 5): PEs, lanes, scale units, units for whose results there is room, cycles from a
    last issue to the first chunk. ``share``: -1 for A4, else that of the descriptor.
    """
    lead = np.array([unit_cycles(sides[0], quad), unit_cycles(sides[1], quad)])
    pes_most = max(sides[0, 0], sides[1, 0], 1)
    room_most = max(sides[0, 3], sides[1, 3], 1)
    ended = np.zeros((2, pes_most), dtype=np.int64)      # cycle of the last issue or empty cycle
    scaled = np.full((2, pes_most), -(1 << 40))          # first cycle in which a group may end
    flushed = np.full((2, pes_most), -(1 << 40))         # first cycle in which a unit may end
    done = np.zeros((2, pes_most), dtype=np.int64)       # units
    taken = np.full((2, pes_most, room_most), -(1 << 40))
    counter = np.zeros(2, dtype=np.int64)                # units of the side, null ones too
    current = np.zeros(2, dtype=np.int64)                # PE of the side's unit that is merged
    arrival = np.zeros(2, dtype=np.int64)
    begin = np.empty(64, dtype=np.int64)                 # waits for room, grown as need be
    finish = np.empty(64, dtype=np.int64)
    waits = 0
    tile_chunks = np.array([max(1, sides[0, 1] // quad), max(1, sides[1, 1] // quad)])
    steps = np.array([max(1, sides[0, 1] // max(1, sides[0, 2])),
                      max(1, sides[1, 1] // max(1, sides[1, 2]))])
    for side in range(2):
        ended[side, :] = sides[side, 0] + FIRST_ISSUE - 1
    merged = 0
    place = 0
    sums = np.zeros((2, 4), dtype=np.int64)              # issue, scale, empty, room
    for y in range(row, row + rows):
        for x in range(column, column + columns):
            place += 1
            dense_pixel = share > 0 and place % share == 0
            for chunk in range(chunks):
                ready = merged + 1
                for side in range(2):
                    if not side_active[side]:
                        continue
                    mine = share < 0 or (side == 0) == dense_pixel
                    if not mine and side == 0:
                        continue
                    if chunk % tile_chunks[side] == 0:
                        pe = counter[side] % sides[side, 0]
                        counter[side] += 1
                        if not mine:
                            ended[side, pe] += 1
                            sums[side, 2] += 1
                            continue
                        current[side] = pe
                        head = ended[side, pe] + first[side, y, x]
                        last = max(head, scaled[side, pe]) + rest[side, y, x]
                        # The cycle from which its last issue would come if nothing held it.
                        came = last - wait[side, y, x] if rest[side, y, x] else head
                        last = max(last, flushed[side, pe])
                        issues, empties = issue[side, y, x], empty[side, y, x]
                        sums[side, 0] += issues
                        sums[side, 2] += empties
                        sums[side, 1] += (last - ended[side, pe]) - issues - empties
                        slot = done[side, pe] % sides[side, 3]
                        roomy = taken[side, pe, slot] + ROOM
                        sums[side, 3] += max(0, roomy - last)
                        if roomy > came:
                            if waits == len(begin):
                                begin = np.concatenate((begin, np.empty_like(begin)))
                                finish = np.concatenate((finish, np.empty_like(finish)))
                            begin[waits] = came
                            finish[waits] = roomy
                            waits += 1
                            last = max(last, roomy)
                        ended[side, pe] = last
                        scaled[side, pe] = last + steps[side]
                        flushed[side, pe] = last + lead[side]
                        arrival[side] = last + sides[side, 4]
                    if mine:
                        ready = max(ready, arrival[side] + chunk % tile_chunks[side])
                merged = ready
                for side in range(2):
                    if (side_active[side] and (share < 0 or (side == 0) == dense_pixel)
                            and (chunk + 1 == chunks
                                 or (chunk + 1) % tile_chunks[side] == 0)):
                        pe = current[side]
                        taken[side, pe, done[side, pe] % sides[side, 3]] = merged
                        done[side, pe] += 1
            merged += pixel_chunks - chunks
    runs[number, COMPUTE] = merged
    for side in range(2):
        busy = 0
        if side_active[side]:
            for pe in range(sides[side, 0]):
                busy = max(busy, ended[side, pe])
        runs[number, DENSE_BUSY + side] = busy
        for cause in range(4):
            runs[number, DENSE_ISSUE + 4 * side + cause] = sums[side, cause]
    union, until = 0, 0
    for place in np.argsort(begin[:waits]):
        union += max(0, finish[place] - max(begin[place], until))
        until = max(until, finish[place])
    runs[number, STALL] = union
    runs[number, CHUNKS] = rows * columns * chunks


@numba.njit(cache=True)
def walk_job(side_active, sides, first, rest, wait, issue, empty, products, column, columns,
             share, chunks, pixel_chunks, quad, runs):
    """`walk_run` for every run of a job, and the products of a sparse lane."""
    for number in range(len(runs)):
        row, rows = runs[number, ROW], runs[number, ROWS]
        walk_run(side_active, sides, first, rest, wait, issue, empty, row, rows, column, columns,
                 share, chunks, pixel_chunks, quad, runs, number)
        total, place = 0, 0
        for y in range(row, row + rows):
            for x in range(column, column + columns):
                place += 1
                if share <= 0 or place % share:
                    total += products[y, x]
        runs[number, NONZEROS] = total


def limits_of(config):
    """Halves of the record, entry and code buffers; no limit for a side that is not there."""
    none = 1 << 40
    return np.array([config.record_depth // 2,
                     config.entry_depth // 2 if config.sparse_pes else none,
                     config.codes_depth // 2 if config.dense_pes else none], dtype=np.int64)


def job_runs(shape, job, share, counts, maps, config):
    """Runs of a job, (runs, len(RUN)) int64.

    Parameters
    ----------
    shape : sim.shape.Shape of the layer
    job : sim.tiler.Job
    share : of the descriptor
    counts : Counts of its channel tile
    maps : of `count_maps`
    config : hw.config.Config

    Raises
    ------
    ValueError
        If the rows that a row of output needs do not fit the buffers.
    """
    runs = np.zeros((job.height, len(RUN)), dtype=np.int64)
    worst = np.array([2 if counts.mx else 1, counts.worst_entries, counts.worst_words],
                     dtype=np.int64)
    number = form_runs(counts.words, counts.entries, counts.feed, limits_of(config), worst,
                       shape.kernel // 2,
                       np.array([job.y, job.height, job.x, job.width], dtype=np.int64), runs)
    if number < 0:
        raise ValueError(f"rows of {job.width} columns must fit half of the buffers of"
                         f" {config.name}")
    runs = runs[:number]
    share = share if counts.mx else -1
    dense, sparse = maps
    active = np.array([
        dense is not None and (share > 0 if counts.mx else counts.worst_words > 0),
        sparse is not None and (share != 1 if counts.mx else counts.worst_entries > 0)])
    shown = dense or sparse
    both = [np.stack([getattr(side or shown, name) for side in maps])
            for name in ("first", "rest", "wait", "issue", "empty")]
    chunks = -(-job.outputs // config.quad)
    walk_job(active, sides_of(config), *both, (sparse or shown).nonzeros, job.x, job.width, share,
             chunks, chunks if job.keep_sums else -(-job.outputs // config.vector) * 4,
             config.quad, runs)
    if not active[1]:
        runs[:, NONZEROS] = 0
    return runs


def sides_of(config):
    """``sides`` of `walk_run`."""
    return np.array([
        [getattr(config, f"{side}_{name}") for name in ("pes", "lanes", "scale_units")]
        + [config.result_depth // steps, result + steps]
        for side, steps, result in (("dense", config.dense_steps, DENSE_RESULT),
                                    ("sparse", config.sparse_steps, SPARSE_RESULT))],
        dtype=np.int64)


def exact_counts(codes, channels, config):
    """Counts of a channel tile from its codes.

    Parameters
    ----------
    codes : golden.requantizer.Codes of the input
    channels : golden.detector.ChannelList of the tile
    config : hw.config.Config
    """
    words, nonzeros = (part.numpy() for part in loads(codes, channels))
    vector, rate = config.vector, config.sparse_rate
    positions = _ceil(len(channels.slots), vector)
    mx = len(words) == 2
    low = 0 if mx else channels.low // vector
    most = positions if mx else _ceil(channels.high, vector)
    entries = _ceil(nonzeros, rate)
    return Counts(
        words=words.astype(np.int32), entries=entries.astype(np.int32),
        nonzeros=nonzeros.sum(0).astype(np.int32),
        # A word takes a cycle, and so does an entry: whichever are more.
        feed=np.maximum(positions, entries).sum(0).astype(np.int32),
        worst_words=len(words) * most,
        worst_entries=len(words) * _ceil(len(channels.slots) - (0 if mx else channels.low), rate),
        memory_words=len(words) * positions, slots=positions * vector, dense_pitch=most,
        sparse_pitch=(positions - low) * vector)


def layer_cycles(plan, result, config):
    """What a convolution's counters show with a memory that never holds anything back.

    Parameters
    ----------
    plan : sim.tiler.Plan
    result : golden.layer.LayerResult
        Its codes and lists.
    config : hw.config.Config

    Returns
    -------
    dict
        ``compute_cycles``, ``dense_busy``, ``sparse_busy``, ``stall_cycles``: as the registers;
        ``runs``: for each job the output pixels of its runs, (row, rows, column, columns).
    """
    counts = [exact_counts(result.codes, channels, config) for channels in result.lists]
    maps = [count_maps(tile, plan.shape.kernel, config) for tile in counts]
    found = [job_runs(plan.shape, job, plan.share, counts[job.tile], maps[job.tile], config)
             for job in plan.jobs]
    total = np.concatenate(found).sum(0)
    return {
        "compute_cycles": int(total[COMPUTE]), "dense_busy": int(total[DENSE_BUSY]),
        "sparse_busy": int(total[SPARSE_BUSY]), "stall_cycles": int(total[STALL]),
        "runs": [[(int(row), int(rows), job.x, job.width) for row, rows in runs[:, :2]]
                 for job, runs in zip(plan.jobs, found)],
    }


def _ceil(value, step):
    return -(-value // step)
