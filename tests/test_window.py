"""The walk over pixels, tiles and taps against loops."""

import random
from dataclasses import replace

import pytest

from hw.config import SMALL, TINY
from hw.window import Window
from tests.pe_model import STALLS, geometry, simulate, walk

SIZES = [(1, 1), (1, 2), (2, 1), (1, 5), (5, 1), (2, 2), (3, 3), (2, 4), (4, 3)]
WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8)


async def run(ctx, dut, config, first, case, rng, stall):
    """Start a walk, hold it up, compare every step; what it took in cycles."""
    height, width, kernel, outputs = case
    expected = list(walk(config, dut.lanes, height, width, kernel=kernel, outputs=outputs,
                         first=first, step=dut.step))
    ctx.set(dut.geometry, geometry(config, height, width, kernel=kernel, outputs=outputs))
    ctx.set(dut.first, first)
    ctx.set(dut.start, 1)
    await ctx.tick()
    ctx.set(dut.start, 0)
    cycles = taken = 0
    while taken < len(expected):
        ready = rng.random() >= stall
        ctx.set(dut.o.ready, ready)
        assert ctx.get(dut.o.valid), (case, taken)
        payload = ctx.get(dut.o.payload)
        assert {name: payload[name] for name in expected[taken]} == expected[taken], (case, taken)
        await ctx.tick()
        cycles += 1
        taken += ready
    for ready in (1, 0):
        ctx.set(dut.o.ready, ready)
        assert not ctx.get(dut.o.valid), f"{case} must end after {taken} steps"
        await ctx.tick()
    return cycles, len(expected)


@pytest.mark.parametrize("config, lanes, step", [
    (TINY, 4, 1), (TINY, 32, 1), (SMALL, 8, 1), (SMALL, 64, 2), (WIDE, 32, 4)],
    ids=lambda value: getattr(value, "name", str(value)))
def test_walks(config, lanes, step):
    """Sizes and kernels one after the other, every first pixel, one tap a cycle."""
    dut = Window(config, lanes=lanes, step=step)
    rng = random.Random(lanes)

    async def bench(ctx):
        outputs = [1, config.quad + 1, lanes, lanes + 1, 2 * lanes - 1, config.max_outputs]
        for number, (height, width) in enumerate(SIZES):
            for kernel in (1, 3):
                case = height, width, kernel, min(outputs[number % 6], config.max_outputs)
                cycles, steps = await run(ctx, dut, config, (number + kernel) % step, case, rng, 0)
                assert cycles == steps

    simulate(dut, bench)


def test_stalls():
    dut = Window(TINY, lanes=4, step=2)
    rng = random.Random(5)

    async def bench(ctx):
        for stall in STALLS:
            for first in range(2):
                for case in ((1, 1, 3, 5), (3, 2, 3, 9), (1, 3, 1, 4), (2, 3, 3, 1)):
                    await run(ctx, dut, TINY, first, case, rng, stall)

    simulate(dut, bench)


def test_large_image():
    """The last pixels of the largest plane, and the first ones."""
    dut = Window(TINY, lanes=4, step=4)

    async def bench(ctx):
        for height, width in ((255, 257), (1, 65535), (65535, 1)):
            ctx.set(dut.geometry, geometry(TINY, height, width, outputs=1))
            ctx.set(dut.first, 3)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            ctx.set(dut.o.ready, 1)
            expected = walk(TINY, 4, height, width, kernel=3, outputs=1, first=3, step=4)
            for _ in range(40):
                step = next(expected)
                payload = ctx.get(dut.o.payload)
                assert ctx.get(dut.o.valid)
                assert {name: payload[name] for name in step} == step
                await ctx.tick()

    simulate(dut, bench)
