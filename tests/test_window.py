"""The walk over pixels, tiles, taps and groups against loops."""

import random
from dataclasses import replace

import pytest

from hw.config import TINY
from hw.window import SETUP_CYCLES, Window
from tests.pe_model import STALLS, random_geometry, simulate, window_steps

FEW = replace(TINY, name="few", record_depth=256, tile_outputs=64)


async def run(ctx, dut, geometry, index, stall, rng):
    """Start a walk, hold it up, compare every step and the cycle in which each one is there."""
    expected = list(window_steps(dut.config, dut.side, geometry, index))
    ctx.set(dut.geometry, geometry)
    ctx.set(dut.index, index)
    ctx.set(dut.start, 1)
    await ctx.tick()
    ctx.set(dut.start, 0)
    cycle, taken = 1, 0
    first = dut.pes + SETUP_CYCLES + 1
    while taken < len(expected) or cycle < first:
        ready = rng.random() >= stall
        ctx.set(dut.o.ready, ready)
        assert ctx.get(dut.o.valid) == (cycle >= first), (geometry, index, cycle)
        assert ctx.get(dut.busy)
        if ctx.get(dut.o.valid):
            payload = ctx.get(dut.o.payload)
            found = {name: payload[name] for name in expected[taken]}
            assert found == expected[taken], (geometry, index, taken)
            taken += ready
        await ctx.tick()
        cycle += 1
    for ready in (1, 0):
        ctx.set(dut.o.ready, ready)
        assert not ctx.get(dut.o.valid), f"{geometry} must end after {taken} steps"
        assert not ctx.get(dut.busy)
        await ctx.tick()


@pytest.mark.parametrize("side, pes", [
    ("dense", 1), ("dense", 2), ("dense", 3), ("sparse", 1), ("sparse", 2), ("sparse", 3),
    ("sparse", 12)])
def test_walks(side, pes):
    """Random runs one after the other: every step is there, one a cycle, after the set-up."""
    config = replace(FEW, sparse_pes=pes, dense_pes=pes)
    dut = Window(config, side=side)
    rng = random.Random(pes)

    async def bench(ctx):
        for number in range(25):
            geometry = random_geometry(config, side, rng)
            index = number % pes
            await run(ctx, dut, geometry, index, 0 if number % 4 else rng.choice(STALLS), rng)

    simulate(dut, bench)


def test_side_without_work():
    """An inactive side does not begin."""
    dut = Window(FEW, side="dense")

    async def bench(ctx):
        ctx.set(dut.geometry, {**random_geometry(FEW, "dense", random.Random(1)), "active": 0})
        ctx.set(dut.start, 1)
        ctx.set(dut.o.ready, 1)
        for _ in range(8):
            await ctx.tick()
            assert not ctx.get(dut.busy) and not ctx.get(dut.o.valid)

    simulate(dut, bench)


def test_last_rows_of_a_large_image():
    """Coordinates of 16 bits; the run is at the lower right corner."""
    rng = random.Random(3)
    dut = Window(FEW, side="dense")

    async def bench(ctx):
        for height, width in ((65535, 65535), (300, 65535), (65535, 257)):
            geometry = random_geometry(FEW, "dense", rng, size=(height, width), corner=True)
            await run(ctx, dut, geometry, 0, 0, rng)

    simulate(dut, bench)
