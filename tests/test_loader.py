# amaranth: UnusedElaboratable=no
"""The loader: every operand where the PEs look for it, as long as they do, and in time."""

import random
from dataclasses import replace

import pytest

from hw.config import TINY
from hw.loader import Loader
from tests.load_model import (
    PORTS,
    Job,
    Memory,
    Monitor,
    Weights,
    geometries,
    layer_fields,
    layer_sizes,
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


def random_job(config, rng, before=None):
    """A job that fits the core; one that keeps the weights of ``before`` if that is given."""
    while True:
        mx = rng.random() < 0.3
        slots = 32 if mx else rng.choice((32, 64))
        n = rng.randrange(slots - config.vector + 1, slots + 1)
        low, high, cut = rng.randrange(n + 1), None, 0
        if config.sparse_pes == 0:
            low = n
        elif config.dense_pes == 0:
            low = 0
        elif rng.random() < 0.6:
            low = low // config.vector * config.vector
            high, cut = min(n, low + config.vector), rng.randrange(256)
        height, width = rng.randrange(1, 9), rng.randrange(1, 6)
        y, x = rng.randrange((height + 1) // 2), rng.randrange(width)
        sides = (config.dense_pes > 0, config.sparse_pes > 0)
        options = {
            "mx": mx, "slots": slots, "n": n, "low": low, "high": high, "cut": cut,
            "kernel": rng.choice((1, 3)), "outputs": rng.randrange(1, config.tile_outputs + 1),
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
    for _ in range(5):
        keep = jobs and rng.random() < 0.3
        jobs.append(random_job(config, rng, jobs[-1] if keep else None))
    play(config, jobs, rng, 3000, latency=rng.choice((1, 5, 40)), stalls=(0.1, 0.1))
