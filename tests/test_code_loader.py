# amaranth: UnusedElaboratable=no
"""The code loader: records, words and entries of runs against the plain model, and its pace."""

import random
from dataclasses import replace

import pytest

from hw.code_loader import CodeLoader
from hw.config import TINY
from tests.load_model import Job, Memory, Monitor, random_operands
from tests.pe_model import simulate

SMALL = replace(TINY, name="short", codes_depth=64, entry_depth=256, record_depth=64,
                sparse_rate=4)
DENSE = replace(SMALL, name="dense", sparse_pes=0)
SPARSE = replace(SMALL, name="sparse", dense_pes=0, sparse_rate=2)
WIDE = replace(SMALL, name="wide", vector=32, dense_lanes=8, dense_scale_units=8,
               sparse_lanes=32, sparse_scale_units=8)
CONFIGS = [SMALL, DENSE, SPARSE, WIDE]


def random_job(config, rng):
    """A job of a core: any split that the core's sides allow."""
    operands = random_operands(config, rng, 0.5)
    while True:
        height, width = rng.randrange(1, 14), rng.randrange(1, 9)
        y, x = rng.randrange((height + 1) // 2), rng.randrange(width)
        tile = (y, x, rng.randrange(1, height - y + 1), rng.randrange(1, width - x + 1))
        job = Job(config, rng, height=height, width=width, tile=tile, outputs=1,
                  density=rng.choice((0, 0.2, 0.5, 1)), **operands)
        if job.fits and (rng.random() < 0.02 or len(job.runs()) > 1):
            return job


def run_fields(run, fields):
    """The input ``run`` of the unit for a `Run`."""
    job, config = run.job, run.job.config
    left, right = job.input_columns
    pixel, width = run.begin * job.width + left, right - left
    words = job.words * job.planes
    return {
        "half": run.parity, "mx": int(job.mx), "words": job.words,
        "low": job.low_used, "high": job.high,
        "row_pixels": job.width, "in_width": width, "rows": job.input_rows[1] - run.begin,
        "address": fields["source"] + pixel * words,
        "row_pitch": job.width * words, "row_words": width * words,
        "scales": fields["scales"], "scale_byte": fields["scale_byte"] + pixel,
        "group_codes": job.dense_pitch, "group_entries": job.group_entries,
        "row_codes": width * job.planes * job.dense_pitch,
        "row_entries": width * job.planes * job.group_entries if config.sparse_pes else 0,
    }


def load(config, jobs, rng, latency=1, stalls=(0, 0)):
    """Load every run of the jobs; the cycles of each."""
    dut = CodeLoader(config)
    cycles = []

    async def bench(ctx):
        memory, monitor = Memory(rng, latency, stalls), Monitor(dut)
        for job in jobs:
            fields = job.store(memory, rng, weights=False)
            for run in job.runs(rng.randrange(2)):
                ctx.set(dut.run, run_fields(run, fields))
                ctx.set(dut.start, 1)
                begin, done = memory.cycle, False
                while not done:
                    memory.before(ctx, dut.read)
                    monitor.look(ctx)
                    done = ctx.get(dut.done)
                    memory.after(ctx, dut.read)
                    if done:
                        assert ctx.get(dut.rows) == run.end - run.begin
                        assert memory.idle, "every response must be taken"
                    await ctx.tick()
                    ctx.set(dut.start, 0)
                    assert memory.cycle < begin + 100_000, "a run must end"
                cycles.append((run, fields, memory.cycle - begin))
                seen = monitor.take(config)
                for name, expected in run.buffers.items():
                    assert seen[name] == expected, name

    simulate(dut, bench)
    return cycles


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("seed", range(2))
def test_random_runs(config, seed):
    rng = random.Random(seed)
    runs = load(config, [random_job(config, rng) for _ in range(3)], rng,
                rng.choice((1, 5, 40)), (0.2, 0.2))
    assert len(runs) > 3, "some jobs must have several runs"


@pytest.mark.parametrize("stalls", [(0, 0.9), (0.9, 0), (0.5, 0.5)])
def test_stalls(stalls):
    rng = random.Random(5)
    load(SMALL, [random_job(SMALL, rng) for _ in range(3)], rng, 7, stalls)


def test_rows_on_their_way_count_as_the_worst():
    """Rows that only fit because those before are sparse wait for them, and are loaded."""
    rng = random.Random(2)
    job = Job(SMALL, rng, height=12, width=5, kernel=1, low=0, high=0, slots=32, density=0.1)
    (run, _, _), *_ = load(SMALL, [job], rng, 60)
    assert run.rows > SMALL.entry_depth // 2 // (5 * 8)


@pytest.mark.parametrize("density", [0.1, 0.5, 1])
@pytest.mark.parametrize("latency", [1, 60])
def test_pace(density, latency):
    """The cycles of a run are those of the docstring, with any latency."""
    config = replace(SMALL, entry_depth=4096, codes_depth=2048, record_depth=512)
    rng = random.Random(3)
    job = Job(config, rng, height=8, width=12, slots=64, low=20, density=density, outputs=1)
    for run, fields, cycles in load(config, [job], rng, latency):
        bytes_of_word = config.port_width // 8
        taken = moved = free = latency + 2
        for pixel, words in run.sizes:
            byte = fields["scale_byte"] + pixel
            taken += (byte % bytes_of_word + job.width - 1) // bytes_of_word + 2
            for occupied in words:
                taken = max(taken + 1, moved)
                moved = max(taken + 1, free)
                free = moved + occupied
        assert abs(cycles - free) <= 3, (cycles, free)
