# amaranth: UnusedElaboratable=no
"""The loader: every operand where the PEs look for it, as long as they do, and in time."""

import random
from dataclasses import replace

import pytest

from hw.config import TINY
from hw.loader import Loader
from tests.load_model import (
    PADDING,
    PORTS,
    Job,
    Memory,
    Monitor,
    Weights,
    geometries,
    layer_fields,
    layer_sizes,
    random_operands,
)
from tests.pe_model import simulate

SHORT = replace(TINY, name="short", codes_depth=64, entry_depth=256, record_depth=64,
                sparse_rate=4, weight_depth=256, address_width=18)
THREE = replace(SHORT, name="three", dense_pes=2, sparse_pes=3, dense_lanes=16,
                dense_scale_units=16, sparse_scale_units=16, tile_outputs=96, sparse_rate=2,
                weight_depth=512)
DENSE = replace(SHORT, name="dense", sparse_pes=0, dense_lanes=8, dense_scale_units=8)
SPARSE = replace(SHORT, name="sparse", dense_pes=0, sparse_lanes=32, sparse_scale_units=8)
WIDE = replace(SHORT, name="wide", vector=32, dense_lanes=16, dense_scale_units=8,
               sparse_lanes=32, sparse_scale_units=16)
CONFIGS = [SHORT, THREE, DENSE, SPARSE, WIDE]
SHARED = ("table", "dense_weights", "dense_weight_scales", "sparse_weights",
          "sparse_weight_scales")


def random_job(config, rng, before=None, most=96):
    """A job that fits the core; one that keeps the weights of ``before`` if that is given."""
    while True:
        height, width = rng.randrange(1, 9), rng.randrange(1, 6)
        y, x = rng.randrange((height + 1) // 2), rng.randrange(width)
        sides = (config.dense_pes > 0, config.sparse_pes > 0)
        options = {
            **random_operands(config, rng, 0.6),
            "outputs": rng.randrange(1, min(most, config.tile_outputs) + 1),
            "signed": rng.random() < 0.5,
            "share": {(1, 1): rng.randrange(4), (1, 0): 1, (0, 1): 0}[sides]}
        if before:
            options |= {name: getattr(before, name) for name in (
                "mx", "slots", "n", "low", "high", "cut", "kernel", "outputs", "signed")}
        job = Job(config, rng, height=height, width=width, keep_weights=bool(before),
                  tile=(y, x, rng.randrange(1, height - y + 1), rng.randrange(1, width - x + 1)),
                  density=rng.choice((0.1, 0.5, 1)), **options)
        tiles = layer_sizes(job)["sparse_tiles"]
        pes = max(1, config.sparse_pes)
        if not job.fits or (tiles % pes and pes % tiles):
            continue
        if before:
            job.list, job.weights = before.list, before.weights
            job.table, job.weight_scales = before.table, before.weight_scales
            return job
        if Weights(job, 0, 0).fits:
            return job


class Bench:
    """Starts jobs, takes runs and ends them; looks at the buffers at both times."""

    def __init__(self, ctx, dut, rng, latency=1, stalls=(0, 0)):
        self.ctx, self.dut, self.rng, self.config = ctx, dut, rng, dut.config
        self.memory, self.monitor = Memory(rng, latency, stalls), Monitor(dut)
        self.state = {name: {} for name in SHARED}          # all that has been written
        self.fresh = {name: {} for name in SHARED}          # by the job that is loaded
        self.activations = {name: {} for name in PORTS}
        self.loads = self.runs = self.cycles = 0
        self.valid, self.ready, self.payload = 0, 1, None

    def write(self, name):
        port = getattr(self.dut, name)
        ctx = self.ctx
        enable = ctx.get(port.enable)
        if not enable:
            return
        pes = [()]
        if name.startswith("sparse"):
            mask = ctx.get(port.pes)
            pes = [(pe,) for pe in range(self.config.sparse_pes) if mask >> pe & 1]
            assert pes, f"{name} written to no PE"
            turns = min(self.config.sparse_pes, self.tiles)
            tile = ctx.get(port.tile)
            assert all(pe % turns == tile % turns for pe, in pes)
        for column in range(len(port.enable)):
            if enable >> column & 1:
                for pe in pes:
                    place = (*pe, ctx.get(port.address), column)
                    assert place not in self.fresh[name], f"{name} {place} written twice"
                    self.fresh[name][place] = self.state[name][place] = ctx.get(port.data)

    async def cycle(self, start=False, take=False, released=False):
        """One cycle; whether the job was refused."""
        ctx, dut = self.ctx, self.dut
        ctx.set(dut.start, start)
        ctx.set(dut.run.ready, take)
        ctx.set(dut.released, released)
        self.memory.before(ctx, dut.read)
        self.monitor.look(ctx)
        for name in SHARED:
            self.write(name)
        self.valid, self.ready = ctx.get(dut.run.valid), ctx.get(dut.ready)
        self.payload = ctx.get(dut.run.payload) if self.valid else None
        assert self.ready or not start
        refused = ctx.get(dut.refused)
        self.memory.after(ctx, dut.read)
        self.cycles += 1
        await ctx.tick()
        self.ready = ctx.get(dut.ready)
        return refused

    def prepare(self, job):
        """Put a job into memory and on the port; the runs that it must give."""
        if job.keep_weights:
            fields = job.store(self.memory, self.rng, weights=False)
            self.weights = Weights(job, *self.turn)
            fields |= {"weight_pitch": 1}
        else:
            fields = job.store(self.memory, self.rng)
            self.turn = (self.loads % 2, self.loads % 2)
            self.weights = Weights(job, *self.turn)
            self.loads += 1
        self.tiles = layer_sizes(job)["sparse_tiles"]
        self.ctx.set(self.dut.layer, layer_fields(job, fields))
        for name in SHARED:
            self.fresh[name] = {}
        runs = job.runs(self.runs % 2)
        self.runs += len(runs)
        return [(run, self.weights) for run in runs]

    def check_offered(self, run, weights):
        """Everything that the run needs has been written, and nothing else."""
        payload, job = self.payload, run.job
        seen = self.monitor.take(self.config)
        for name, expected in run.buffers.items():
            assert seen[name] == expected, name
            self.activations[name] |= expected
        first = run.row == job.y
        if first:
            for name in SHARED:
                expected = {} if job.keep_weights else weights.buffers.get(name, {})
                assert self.fresh[name] == expected, name
        assert (payload.first, payload.last) == (first, run.last)
        assert payload.bank == weights.bank
        for side, expected in geometries(run, weights).items():
            found = payload[side]
            assert {name: found[name] for name in expected} == expected, side

    def check_intact(self, run, weights):
        """Nothing that the run uses has been overwritten meanwhile."""
        for name, expected in weights.buffers.items():
            for place, word in expected.items():
                assert self.state[name][place] == word, (name, place)
        for name, expected in run.buffers.items():
            assert not self.monitor.buffers[name].keys() & expected.keys(), name
            for place, word in expected.items():
                assert self.activations[name][place] == word, (name, place)

    async def play(self, jobs, patience):
        """Load the jobs, while runs are computed for up to ``patience`` cycles each."""
        rng, jobs, expected = self.rng, list(jobs), []
        offered = computing = None
        left = 0
        while jobs or expected or offered or computing:
            start = bool(jobs) and self.ready and rng.random() < 0.5
            if start:
                expected += self.prepare(jobs.pop(0))
            take = computing is None and rng.random() < 0.5
            released = computing is not None and left <= 0
            if released:
                self.check_intact(*computing)
                computing = None
            assert not await self.cycle(start, take, released)
            left -= 1
            if self.valid and offered is None:
                offered = expected.pop(0)
                self.check_offered(*offered)
            if self.valid and take:
                computing, offered, left = offered, None, rng.randrange(patience)
            assert self.cycles < 300_000, "loading must end"
        assert self.memory.idle


def play(config, jobs, rng, patience=200, **options):
    dut = Loader(config)

    async def testbench(ctx):
        await Bench(ctx, dut, rng, **options).play(jobs, patience)

    simulate(dut, testbench)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_random_jobs(config):
    """Jobs of all kinds, some that keep the weights, while others are computed."""
    rng = random.Random(config.sparse_rate + config.vector)
    jobs = []
    for number in range(3):
        jobs.append(random_job(config, rng, jobs[-1] if number == 1 else None, most=20))
    play(config, jobs, rng, 1000, latency=rng.choice((1, 5, 40)), stalls=(0.1, 0.1))


def test_tiles_of_lanes():
    """As many tiles as there are sparse PEs, and twice as many."""
    rng = random.Random(11)
    jobs = [Job(THREE, rng, height=2, width=2, slots=32, low=16, outputs=outputs, kernel=1)
            for outputs in (96, 48, 90, 16)]
    play(THREE, jobs, rng, 200)


@pytest.mark.parametrize("stalls", [(0, 0.9), (0.9, 0), (0.5, 0.5)])
def test_stalls(stalls):
    rng = random.Random(8)
    jobs = [small_job(rng, mx=True, outputs=5), small_job(rng, kernel=3, outputs=8)]
    assert all(job.fits for job in jobs)
    play(SHORT, jobs, rng, 20, latency=20, stalls=stalls)


def small_job(rng, **options):
    """A job of few weights; 32 of 128 rows of weight scales."""
    return Job(SHORT, rng, **{"height": 3, "width": 3, "kernel": 1, "slots": 32, "n": 30,
                              "low": 16, "outputs": 30, **options})


def drive(config, body, **options):
    """Run ``body`` with a `Bench` of its own."""
    dut = Loader(config)

    async def testbench(ctx):
        await body(Bench(ctx, dut, random.Random(1), **options))

    simulate(dut, testbench)


async def offered(bench, jobs, limit=2000, **step):
    """Cycles until the run of the job is offered, or None."""
    (run, weights), *_ = bench.prepare(jobs)
    for cycle in range(limit):
        assert not await bench.cycle(start=cycle == 0, **(step if cycle == 0 else {}))
        if bench.valid:
            bench.check_offered(run, weights)
            return cycle
    return None


@pytest.mark.parametrize("kernel, waits", [(1, False), (3, True)])
def test_weights_beside_those_in_use(kernel, waits):
    """A job is loaded while the one before is computed, if the weights of both have room."""
    async def body(bench):
        rng = random.Random(4)
        jobs = [small_job(rng, kernel=kernel, height=1) for _ in range(2)]
        assert Weights(jobs[0], 0, 0).beside(Weights(jobs[1], 1, 1)) != waits
        assert await offered(bench, jobs[0]) is not None
        await bench.cycle(take=True)
        found = await offered(bench, jobs[1])
        assert (found is None) == waits
        if waits:
            run, weights = jobs[1].runs(1)[0], bench.weights
            await bench.cycle(released=True)
            while not bench.valid:
                await bench.cycle()
            bench.check_offered(run, weights)

    drive(SHORT, body)


def test_no_third_run():
    """Of a job's runs two are loaded, the third one when the first is released."""
    async def body(bench):
        rng = random.Random(4)
        job = small_job(rng, height=40, density=1)
        runs = bench.prepare(job)
        assert len(runs) > 3
        await bench.cycle(start=True)
        for number, (run, weights) in enumerate(runs[:3]):
            while not bench.valid:
                await bench.cycle()
            bench.check_offered(run, weights)
            if number < 2:
                await bench.cycle(take=number == 0)
                for _ in range(300):
                    await bench.cycle()
                assert not any(bench.monitor.buffers.values()) or number == 0
                bench.check_intact(runs[0][0], weights)
                await bench.cycle(take=number == 1, released=number == 1)
                await bench.cycle()

    drive(SHORT, body)


def headers(job):
    """Headers that no permutation of the tile has."""
    good = {"n": job.n, "low": job.low, "high": job.high, "cut": job.cut}
    bad = [{"n": 0}, {"n": job.slots + 1}, {"n": 0xFFFF}]
    if job.mx:
        bad += [{"n": job.slots - 1}]
    else:
        bad += [{"high": job.n + 1}, {"low": job.high + 1}, {"cut": 257}, {"cut": 0x8000},
                {"low": 1, "high": 16}, {"high": 16 * job.dense_limit + 1}]
        if not job.config.sparse_pes:
            bad += [{"low": job.n - 1, "high": job.n - 1}, {"low": 16}]
        if not job.config.dense_pes:
            bad += [{"high": 16}, {"low": 1, "high": 1}]
    for change in bad:
        values = good | change
        yield values["n"] | values["low"] << 16 | values["high"] << 32 | values["cut"] << 48


async def refuse(bench, job, word, value):
    """The job with another word in its permutation is refused and leaves nothing."""
    fields = job.store(bench.memory, bench.rng)
    bench.memory.words[fields["permutation"] + word] = value
    bench.tiles = 1
    bench.ctx.set(bench.dut.layer, layer_fields(job, fields))
    refused = cycle = 0
    while not refused:
        assert cycle < 1000
        refused = await bench.cycle(start=cycle == 0)
        cycle += 1
        assert not (bench.ready and refused and cycle == 1)
    await bench.cycle()
    assert bench.ready and bench.memory.idle and not bench.valid
    assert not any(bench.fresh[name] for name in SHARED if name != "table")
    bench.fresh["table"] = {}
    assert not any(bench.monitor.buffers.values())


@pytest.mark.parametrize("config", [SHORT, DENSE, SPARSE], ids=lambda config: config.name)
@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx8"])
def test_wrong_headers(config, mx):
    """They are refused; the next job is loaded."""
    async def body(bench):
        rng = random.Random(5)
        low = {"short": 16, "dense": 30, "sparse": 0}[config.name]
        job = Job(config, rng, mx=mx, n=30, low=low, outputs=5, height=2, width=3)
        job.dense_limit = 2 if config.dense_pes else 0
        for header in headers(job):
            await refuse(bench, job, 0, header)
        bench.loads = 0
        assert await offered(bench, job) is not None

    drive(config, body, latency=9)


def test_slots_that_do_not_exist():
    async def body(bench):
        rng = random.Random(6)
        job = small_job(rng)
        for position, slot in ((0, 32), (5, 0xFFFE), (29, 40), (16, 0x8000)):
            entries = job.list[position // 4 * 4:position // 4 * 4 + 4]
            entries[position % 4] = slot
            await refuse(bench, job, 1 + position // 4,
                         sum(entry << 16 * n for n, entry in enumerate(entries)))
        assert await offered(bench, job) is not None

    drive(SHORT, body, latency=30)


@pytest.mark.parametrize("latency", [1, 60])
@pytest.mark.parametrize("options", [
    {"kernel": 3, "outputs": 16, "low": 0}, {"kernel": 3, "outputs": 8, "low": 30},
    {"kernel": 1, "low": 0}, {"mx": True, "outputs": 8}])
def test_pace(latency, options):
    """The cycles from the start to the first run are those of the docstring, but for a few."""
    async def body(bench):
        rng = random.Random(7)
        job = small_job(rng, **{"high": options.get("low"), "height": 2, **options})
        assert job.fits and len(job.runs()) == 1
        cycles = await offered(bench, job)
        sizes = layer_sizes(job)
        words, tiles = sizes["output_words"], sizes["dense_tiles"]
        expected = latency + 1 + job.slots // 4 + max(len(job.table), 6 + latency)
        expected += 2 * words * job.taps * 2
        for position, slot in enumerate(job.list):
            if slot != PADDING:
                expected += job.taps * job.planes * (tiles if position < job.high else words)
        expected += 12
        for _, row in job.runs()[0].sizes:
            expected += 3 + sum(row)
        assert abs(cycles - expected) <= 0.02 * expected + 12, (cycles, expected)

    drive(SHORT, body, latency=latency)
