"""cocotb tests of hw/post_processor.py; run by tests/test_post_processor.py."""

import collections
import itertools
import os
import random

import cocotb
from cocotb.triggers import Timer

from hw.config import load
from hw.job import geometry_layout, load_layout, run_layout, table_depth
from hw.layer import layer_layout
from hw.post_processor import EpilogueLane, PostProcessor
from tests import naive, pe_model

CONFIG = load(os.environ.get("PE_CONFIG", "tiny"))
V, Q = CONFIG.vector, CONFIG.quad
PES = {"dense": CONFIG.dense_pes, "sparse": CONFIG.sparse_pes}
LANES = {"dense": CONFIG.dense_lanes, "sparse": CONFIG.sparse_lanes}
NAMES = [(side, number) for side, pes in PES.items() for number in range(pes)]
ENTRIES = CONFIG.port_width // 64
TABLE = load_layout(1, table_depth(CONFIG), CONFIG.port_width)
MASK = (1 << CONFIG.address_width) - 1
WIDTH = CONFIG.accumulator_width


def seed():
    return cocotb.RANDOM_SEED


class Source:
    """A stream of chunks; one that is offered stays until it is taken."""

    def __init__(self, dut, name, rng):
        self.valid, self.ready, self.payload = (
            getattr(dut, f"{name}__{part}") for part in ("valid", "ready", "payload"))
        self.rng, self.stall, self.chunks, self.offered = rng, 0, collections.deque(), False

    def drive(self):
        if self.chunks and not self.offered:
            self.offered = self.rng.random() >= self.stall
        self.valid.value = self.offered
        chunk = self.chunks[0] if self.offered else [self.rng.getrandbits(WIDTH)] * Q
        self.payload.value = sum((value % (1 << WIDTH)) << n * WIDTH
                                 for n, value in enumerate(chunk))

    def sample(self):
        if int(self.ready.value):
            # a PE whose turn it is not, or that has no chunk, must not be asked for one
            assert self.offered, "ready without a chunk"
            self.chunks.popleft()
            self.offered = False


class Job:
    """A tile: its runs, sums, table and residual, and what must be read and written.

    ``kept``: sums of the job before by chunk, if they are to be added. ``split`` is (low, high,
    cut) of W4A4, ``share`` is that of MX8. ``runs`` are the rows of each run.
    """

    def __init__(self, rng, outputs, runs, columns, *, sides=("dense", "sparse"), residual=False,
                 keep=False, kept=None, extreme=False, split=(1, 1, 0), share=None, at=(0, 0),
                 more=(0, 0), bank=0, window=None):
        self.rng, self.outputs, self.runs, self.columns = rng, outputs, runs, columns
        self.keep, self.kept, self.extreme, self.bank = keep, kept, extreme, bank
        self.words, self.chunks = -(-outputs // V), -(-outputs // Q)
        self.rows = sum(runs)
        height, self.width = self.rows + at[0] + more[0], columns + at[1] + more[1]
        self.plane = height * self.width
        self.layer = {
            "plane": self.plane, "output_words": self.words, "chunks": self.chunks,
            "outputs": outputs, "width": self.width, "height": height,
            "tile_y": at[0], "tile_x": at[1], "tile_height": self.rows, "tile_width": columns,
            "origin": at[0] * self.width + at[1], "mx": int(share is not None),
            "share": share or 0, "keep_sums": int(keep), "accumulate": int(kept is not None),
            "residual": int(residual), "residual_source": rng.getrandbits(CONFIG.address_width),
            "destination": rng.getrandbits(CONFIG.address_width),
            "align_shift": rng.choice((0, 31, rng.randrange(32), rng.randrange(8, 24))),
            "shift": rng.choice((0, 31, rng.randrange(32))),
            "residual_multiplier": rng.choice((0, 65535, rng.getrandbits(16))),
            "write_base": 0, "write_limit": 1 << CONFIG.address_width,
        }
        if window:
            self.layer |= {"write_base": window[0], "write_limit": window[1]}
        self.sides = {"dense", "sparse"} & set(sides) & {side for side, pes in PES.items() if pes}
        if share is not None:
            self.sides -= {"dense"} if share == 0 else {"sparse"} if share == 1 else set()
        self.split, self.share = split, share
        limit = 32767
        self.multiplier = [rng.choice((limit, -limit - 1, rng.randint(-limit, limit)))
                           for _ in range(self.words * V)]
        self.bias = [rng.choice((-1 << 31, (1 << 31) - 1, rng.randint(-1 << 24, 1 << 24)))
                     for _ in range(self.words * V)]
        self.residual = {}
        self.sums = {}      # by row, column and output, of all sides and what was kept
        self.feeds = [self.feed(first, rows) for first, rows in
                      zip(itertools.accumulate(runs, initial=0), runs)]

    def __str__(self):
        return (f"{self.outputs} outputs, runs {self.runs} of {self.columns} columns, {self.sides},"
                f" split {self.split}, {self.layer}")

    def total(self):
        top = 1 << WIDTH - 3
        if self.extreme:
            near = min(top, 1 << 31 + self.layer["align_shift"])    # where `align` saturates
            return self.rng.choice((top - 1, -top, near - 1, -near, 0))
        return self.rng.randint(-1 << 40, 1 << 40)

    def feed(self, first, rows):
        """Chunks of each PE in a run from row ``first`` on."""
        feed = {name: [] for name in NAMES}
        units = dict.fromkeys(PES, 0)
        low, high, cut = self.split
        for pixel, (row, column) in enumerate(
                itertools.product(range(first, first + rows), range(self.columns))):
            carried = (pixel * cut & 255) + cut >= 256
            turn = self.share and (pixel + 1) % self.share == 0
            for side in PES:
                if self.share is not None:
                    here, counts = turn == (side == "dense"), turn or side == "sparse"
                else:
                    here, counts = side == "sparse" or (high if carried else low), True
                here = here and side in self.sides
                first_output = 0
                for chunks in pe_model.tile_sizes(CONFIG, self.outputs, LANES[side]):
                    for _ in range(chunks if here else 0):
                        chunk = [self.total() for _ in range(Q)]
                        feed[side, units[side] % PES[side]].append(chunk)
                        for n, value in enumerate(chunk):
                            place = row, column, first_output + n
                            self.sums[place] = self.sums.get(place, 0) + value
                        first_output += Q
                    units[side] += bool(counts)
        return feed

    def places(self):
        """Row, column, chunk and distance in memory of each port word."""
        for row, column, word, sub in itertools.product(
                range(self.rows), range(self.columns), range(self.words), range(4)):
            pixel = self.layer["origin"] + row * self.width + column
            yield row, column, 4 * word + sub, (word * self.plane + pixel) * 4 + sub

    def table(self):
        entries = [bias & 0xFFFFFFFF | (multiplier & 0xFFFF) << 32
                   for multiplier, bias in zip(self.multiplier, self.bias)]
        return [sum(entry << 64 * n for n, entry in enumerate(entries[first:first + ENTRIES]))
                for first in range(0, len(entries), ENTRIES)]

    def sum(self, row, column, output):
        total = self.sums.get((row, column, output), 0)
        if self.kept is not None:
            total += self.kept[row, column, output]
        return total

    def result(self, row, column, output):
        if output >= self.outputs:
            return 0
        residual = None
        if self.layer["residual"]:
            residual = [[[self.residual[row, column, output]]]]
        return naive.epilogue(
            [[[self.sum(row, column, output)]]], self.layer["align_shift"],
            [self.multiplier[output]], self.layer["shift"], [self.bias[output]], residual,
            self.layer["residual_multiplier"])[0][0][0]

    def keeps(self):
        """Every sum that the job leaves."""
        return {place: self.sum(*place) for place in itertools.product(
            range(self.rows), range(self.columns), range(self.chunks * Q))}

    def writes(self):
        """(address, data, inside) in order."""
        base, limit = self.layer["write_base"], self.layer["write_limit"]
        for row, column, chunk, distance in [] if self.keep else self.places():
            data = sum((self.result(row, column, chunk * Q + n) & 0xFFFF) << 16 * n
                       for n in range(Q))
            address = self.layer["destination"] + distance & MASK
            yield address, data, base <= address < limit

    def reads(self):
        """(address, word) in order."""
        if self.layer["residual"] and not self.keep:
            for row, column, chunk, distance in self.places():
                values = [self.rng.choice((32767, -32768, self.rng.randint(-32768, 32767)))
                          for _ in range(Q)]
                self.residual |= {(row, column, chunk * Q + n): value
                                  for n, value in enumerate(values)}
                yield (self.layer["residual_source"] + distance & MASK,
                       sum((value & 0xFFFF) << 16 * n for n, value in enumerate(values)))

    def run(self, number):
        """The bits of a run."""
        low, high, cut = self.split
        shared = {"rows": self.runs[number], "columns": self.columns}
        dense, sparse = (pe_model.packed(geometry_layout(CONFIG), shared | fields) for fields in (
            {"active": int("dense" in self.sides), "low": low, "high": high, "cut": cut},
            {"active": int("sparse" in self.sides)}))
        return pe_model.packed(run_layout(CONFIG), {
            "dense": dense, "sparse": sparse, "first": int(number == 0), "bank": self.bank,
            "last": int(number == len(self.runs) - 1)})


class Bench:
    """Clock, sources, memory and checks."""

    def __init__(self, dut):
        self.dut, self.rng = dut, random.Random(seed())
        self.sources = {
            name: Source(dut, "i_{}_{}".format(*name), self.rng) for name in NAMES}

    async def reset(self):
        for handle in ("start", "layer", "run", "load_table", "settled",
                       "write__done", "write__request__ready", "read__request__ready",
                       "read__response__valid", "read__response__payload",
                       *("i_{}_{}__valid".format(*name) for name in NAMES)):
            getattr(self.dut, handle).value = 0
        self.dut.rst.value = 1
        await self.settle()
        await self.rise()
        self.dut.rst.value = 0

    async def settle(self):
        self.dut.clk.value = 0
        await Timer(5, "ns")

    async def rise(self):
        self.dut.clk.value = 1
        await Timer(5, "ns")

    async def tick(self):
        await self.settle()
        await self.rise()

    async def run(self, jobs, *, stalls=(0, 0, 0, 0, 0), latency=1, wait=0):
        """Run jobs, each run two cycles after the last chunk of the one before, as in a core.

        ``stalls`` are those of dense and sparse chunks, reads, responses and writes; nothing is
        written in the first ``wait`` cycles. Tables are loaded while the job before is under way.
        Returns merging cycles, cycle of the first write, cycles until the end, and blocked cycles.
        """
        dut, rng = self.dut, self.rng
        for (side, _), source in self.sources.items():
            source.stall = stalls[side == "sparse"]
        loads = collections.deque()

        def load_table(job):
            bank = job.bank * table_depth(CONFIG) // 2
            loads.extend((bank + n, word) for n, word in enumerate(job.table()))

        def drive_table():
            address, word = loads.popleft() if loads else (None, 0)
            dut.load_table.value = pe_model.packed(TABLE, {
                "enable": int(address is not None), "address": address or 0, "data": word})

        load_table(jobs[0])
        while loads:
            drive_table()
            await self.tick()
        reads, writes = collections.deque(), collections.deque()
        waiting, offered = collections.deque(), None
        answers = collections.deque()   # cycles in which writes are in memory
        todo = [(job, number) for job in jobs for number in range(len(job.runs))]
        todo.reverse()
        cycle = merging = first_write = idle = blocked = 0
        begin, held, last_job = 0, None, None
        while idle < 25:
            dut.start.value = 0
            started = bool(todo) and begin is not None and begin <= cycle and not (
                loads and todo[-1][1] == 0)
            if started:
                job, number = todo.pop()
                begin = None
                dut.start.value = 1
                dut.layer.value = pe_model.packed(layer_layout(CONFIG), job.layer)
                dut.run.value = job.run(number)
                for name, chunks in job.feeds[number].items():
                    assert not self.sources[name].chunks, f"{job}: {name} has chunks left"
                    self.sources[name].chunks.extend(chunks)
                if number == 0:
                    assert not reads
                    old = len(writes)       # written by the jobs before
                    reads.extend(job.reads())
                    writes.extend(job.writes())
                    later = jobs[jobs.index(job) + 1:]
                    if later:
                        load_table(later[0])
                last_job = job
            drive_table()
            for source in self.sources.values():
                source.drive()
            if offered is None and waiting and waiting[0][0] <= cycle:
                if rng.random() >= stalls[3]:
                    offered = waiting.popleft()[1]
            dut.read__response__valid.value = offered is not None
            dut.read__response__payload.value = rng.getrandbits(64) if offered is None else offered
            dut.read__request__ready.value = rng.random() >= stalls[2]
            dut.write__request__ready.value = cycle >= wait and rng.random() >= stalls[4]
            while answers and answers[0] <= cycle:
                answers.popleft()
            dut.settled.value = not answers
            await self.settle()
            cycle += 1
            merging += int(dut.merging.value)
            blocked += int(dut.blocked.value)
            for source in self.sources.values():
                source.sample()
            if offered is not None and int(dut.read__response__ready.value):
                offered = None
            if int(dut.read__request__valid.value) and int(dut.read__request__ready.value):
                address, word = reads.popleft() if reads else (None, None)
                assert int(dut.read__request__payload.value) == address, str(last_job)
                assert old <= 0 and len(answers) <= -old, (
                    "a residual is read when everything before is in memory")
                waiting.append((cycle + latency - 1, word))
            valid = int(dut.write__request__valid.value)
            assert valid or held is None, "a write must stay until it is taken"
            if valid:
                first_write = first_write or cycle
                payload = int(dut.write__request__payload.value)
                assert held is None or payload == held, "a write must not change"
                held = payload
                if int(dut.write__request__ready.value):
                    held = None
                    assert writes, f"{last_job}: a write too many"
                    data = payload >> CONFIG.address_width & (1 << CONFIG.port_width) - 1
                    strobe = payload >> CONFIG.address_width + CONFIG.port_width
                    expected = writes.popleft()
                    old -= 1
                    found = payload & MASK, data, bool(int(dut.write_inside.value))
                    assert found == expected, (
                        f"{last_job} seed {seed()}: {len(writes)} before the end {found} must be"
                        f" {expected}")
                    assert strobe == (1 << CONFIG.port_width // 8) - 1
                    answers.append(cycle + latency)
            busy = int(dut.busy.value)
            assert busy or not writes or started, f"{last_job}: busy must last until the last write"
            idle = 0 if busy or todo else idle + 1
            ended = int(dut.ended.value)
            await self.rise()
            assert cycle < 50_000, f"{last_job} must end"
            if ended:
                begin = cycle + 1
        assert not todo and not reads and not writes and not waiting and offered is None
        assert not any(source.chunks for source in self.sources.values())
        return merging, first_write, cycle - idle, blocked


async def start(dut):
    bench = Bench(dut)
    await bench.reset()
    return bench


SIDES = [("dense",), ("dense", "sparse"), ("sparse",)]


@cocotb.test()
async def test_edges(dut):
    """One pixel and several, partial chunks and tiles, padding, every kind of sides, residual."""
    bench = await start(dut)
    outputs = [1, Q, Q + 1, V - 1, V, V + 1, CONFIG.tile_outputs - 1, CONFIG.tile_outputs]
    jobs = [Job(bench.rng, outputs[number % 8], *(([1], 1), ([1, 1], 2), ([2], 3))[number // 2 % 3],
                sides=sides, residual=residual, extreme=number % 5 == 4, bank=number % 2,
                at=(number % 2, number % 3), more=(number % 3, number // 2 % 2))
            for number, (sides, residual) in enumerate(itertools.product(SIDES * 4, (False, True)))]
    await bench.run(jobs)


@cocotb.test()
async def test_split(dut):
    """Pixels without words for the dense side have sums of the sparse side alone."""
    bench = await start(dut)
    for outputs in (Q, V + 1, CONFIG.tile_outputs):
        await bench.run([
            Job(bench.rng, outputs, [2, 1], 5, split=split, residual=number % 2 == 1,
                bank=number % 2)
            for number, split in enumerate(
                [(0, 1, 128), (0, 1, 77), (0, 1, 1), (0, 1, 255), (1, 2, 100), (0, 0, 0)])])


@cocotb.test()
async def test_share(dut):
    """MX8: each pixel has sums of one side."""
    bench = await start(dut)
    for outputs in (1, V + 1, CONFIG.tile_outputs):
        await bench.run([
            Job(bench.rng, outputs, [2, 3, 1], 4, share=share, residual=number % 2 == 1,
                bank=number % 2)
            for number, share in enumerate(range(0, 5))])


@cocotb.test()
async def test_partial_sums(dut):
    """Tiles of input channels add up over all runs; only the last one gives results."""
    bench = await start(dut)
    for outputs, residual in ((1, False), (V + Q + 1, True), (CONFIG.tile_outputs, False)):
        jobs, kept = [], None
        for tile in range(4):
            jobs.append(Job(bench.rng, outputs, ([3], [1, 2], [2, 1])[tile % 3], 2,
                            keep=tile < 3, kept=kept, residual=residual and tile % 2 == 1,
                            at=(1, 1), more=(0, 2), bank=tile % 2))
            kept = jobs[-1].keeps()
        # and a job of its own behind them
        jobs.append(Job(bench.rng, outputs, [1], 3))
        merging, *_ = await bench.run(jobs, stalls=(0, 0, 0, 0, 0.5))
        chunks = -(-outputs // Q)
        assert merging >= 6 * chunks * 3 + (6 + 3) * -(-outputs // V) * 4


@cocotb.test()
async def test_all_partial_sums(dut):
    """The memory of partial sums, to its last word."""
    bench = await start(dut)
    chunks = CONFIG.tile_outputs // Q
    pixels = CONFIG.partial_depth // chunks
    keep = Job(bench.rng, CONFIG.tile_outputs, [pixels // 4], 4, keep=True)
    await bench.run([keep, Job(bench.rng, CONFIG.tile_outputs, [pixels // 4], 4,
                               kept=keep.keeps())])


@cocotb.test()
async def test_stalls(dut):
    """Every stream held up by its own fraction, asymmetrically."""
    bench = await start(dut)
    for stalls in ((0, 0, 0, 0, 0.9), (0.9, 0, 0, 0, 0), (0, 0.9, 0, 0, 0.5), (0, 0, 0.9, 0, 0),
                   (0, 0, 0, 0.9, 0), (0.5, 0.9, 0.5, 0, 0.5), (0, 0.5, 0, 0.5, 0.9)):
        jobs = [Job(bench.rng, V + Q + 1, runs, 2, residual=True, bank=bank)
                for bank, runs in enumerate(([1], [1, 1]))]
        await bench.run(jobs, stalls=stalls, latency=bench.rng.choice((1, 2, 30)))


@cocotb.test()
async def test_results_wait(dut):
    """Writes that wait for long hold back chunks and residuals, and lose none."""
    bench = await start(dut)
    for sides in SIDES:
        *_, blocked = await bench.run(
            [Job(bench.rng, CONFIG.tile_outputs, [2], 3, sides=sides, residual=True, bank=bank)
             for bank in range(2)], wait=100, latency=3)
        assert blocked > 40


@cocotb.test()
async def test_windows(dut):
    """Each result is judged by the window of its own job, even behind the next one's start."""
    bench = await start(dut)
    for wait in (0, 60):
        jobs = []
        for number in range(6):
            job = Job(bench.rng, V, [1], 1, bank=number % 2)
            middle = job.layer["destination"]
            base, limit = ((0, middle), (middle, middle + 4), (middle + 1, middle + 2),
                           (middle, middle), (0, MASK + 1), (middle + 4, MASK))[number]
            job.layer |= {"write_base": base, "write_limit": limit}
            jobs.append(job)
        await bench.run(jobs, wait=wait)


@cocotb.test()
async def test_pace(dut):
    """A chunk a cycle; its result `latency` cycles and two of the queue later."""
    bench = await start(dut)
    assert PostProcessor.queue_depth > EpilogueLane.latency + 2
    for sides in SIDES:
        job = Job(bench.rng, CONFIG.tile_outputs, [5], 3, sides=sides)
        merging, first_write, cycles, blocked = await bench.run([job])
        chunks = 15 * job.words * 4
        assert merging == chunks and blocked == 0
        assert first_write == 2 + EpilogueLane.latency + 2
        assert cycles == first_write + chunks - 1
