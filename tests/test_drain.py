"""The drain's schedule and the throttle's distances against absolute times."""

import random
from dataclasses import replace

import pytest

from hw.config import SMALL, TINY
from hw.drain import Drain, Throttle
from hw.scale_unit import ScaleUnit
from tests.pe_model import ThrottleModel, simulate

WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8)
CASES = [(TINY, 4, 1), (TINY, 4, 2), (TINY, 4, 4), (TINY, 32, 4), (SMALL, 8, 4), (SMALL, 64, 8),
         (WIDE, 32, 16), (WIDE, 8, 4)]


def of_case(function):
    return pytest.mark.parametrize("config, lanes, units", CASES, ids=[
        f"{config.name}-{lanes}-{units}" for config, lanes, units in CASES])(function)


def some_tiles(config, lanes, rng, count):
    """Products as (group_last, tile_last, chunks): full tiles, partial ones, groups of any length.

    Many groups are of one product and many tiles of one group.
    """
    most = lanes // config.quad
    for _ in range(count):
        chunks = rng.choice((most, most, 1, rng.randint(1, most)))
        groups = rng.choice((1, 1, 2, rng.randint(1, 9)))
        for group in range(groups):
            products = rng.choice((1, 1, 2, rng.randint(1, 12)))
            for product in range(products):
                last = product + 1 == products
                yield last, last and group + 1 == groups, chunks


@of_case
def test_schedule(config, lanes, units):
    """Groups as close as the throttle lets them come, and further apart, in every cycle."""
    dut = Drain(config, lanes=lanes, units=units, scale_depth=config.weight_scale_depth)
    rng = random.Random(lanes * units)
    throttle = ThrottleModel(config, lanes, units)
    throttle.room = 1 << 30
    events = {}            # cycle: expected outputs
    groups = {}            # cycle: inputs
    cycle, first, bank = 3, True, None

    def expect(at, **outputs):
        for name, value in outputs.items():
            assert name not in events.setdefault(at, {}), f"{name} twice in cycle {at}"
            events[at][name] = value

    expected_flushes = 0
    for group_last, tile_last, chunks in some_tiles(config, lanes, rng, 40):
        while not throttle.allowed(cycle, group_last, tile_last, chunks):
            cycle += 1
        throttle.issue(cycle, group_last, tile_last, chunks)
        if group_last:
            row, scale = rng.randrange(400), {"factor": rng.randrange(16),
                                              "shift": rng.randrange(16)}
            groups[cycle] = {"row": row, "scale": scale, "first": int(first),
                             "last": int(tile_last), "chunks": chunks}
            steps = throttle.steps(chunks)
            bank = 0 if bank is None else bank ^ first
            expect(cycle + 1, load=1)
            for step in range(steps):
                expect(cycle + step, scale_request=1, scale_row=row + step)
                expect(cycle + 2 + step, step=1, lane=step, bank=bank, first=int(first),
                       scale=scale)
            if tile_last:
                final = cycle + 1 + steps + ScaleUnit.latency
                parts = max(1, units // config.quad)
                for turn in range(chunks * throttle.chunk_cycles):
                    expect(final + turn, flush=1, flush_lane=turn // parts,
                           flush_part=turn % parts, flush_bank=bank)
                expected_flushes += chunks * throttle.chunk_cycles
            first = tile_last
        cycle += 1 + (rng.randrange(30) if rng.random() < 0.1 else 0)

    async def bench(ctx):
        flushes = 0
        for at in range(cycle + 3 * lanes + 20):
            ctx.set(dut.group_valid, at in groups)
            ctx.set(dut.group, groups.get(at, {"row": 7, "last": 1, "first": 1}))
            expected = {"load": 0, "scale_request": 0, "step": 0, "flush": 0} | events.get(at, {})
            for name, value in expected.items():
                seen = ctx.get(getattr(dut, name))
                if name == "scale":
                    seen = {"factor": seen.factor, "shift": seen.shift}
                assert seen == value, (name, at)
            flushes += ctx.get(dut.flush)
            await ctx.tick()
        assert flushes == expected_flushes

    simulate(dut, bench)


@of_case
@pytest.mark.parametrize("taken", [0.02, 0.5, 1.0], ids=lambda taken: f"taken-{taken}")
def test_distances(config, lanes, units, taken):
    """`allowed` and `starved` in every cycle, for products that issue at once or hesitate."""
    most = max(lanes // config.quad, 1)
    config = replace(config, sparse_pes=0, result_depth=64)
    dut = Throttle(config, lanes=lanes, units=units)
    rng = random.Random(lanes + units)

    async def bench(ctx):
        model = ThrottleModel(config, lanes, units)
        cycle = results = starved = held = 0
        for group_last, tile_last, chunks in some_tiles(config, lanes, rng, 25 if most > 4 else 60):
            hesitates = rng.random() < 0.2
            issued = False
            while not issued:
                for name, value in (("group_last", group_last), ("tile_last", tile_last),
                                    ("chunks", chunks)):
                    ctx.set(getattr(dut, name), value)
                allowed = model.allowed(cycle, group_last, tile_last, chunks)
                assert ctx.get(dut.allowed) == allowed, cycle
                assert ctx.get(dut.starved) == model.starved(tile_last, chunks), cycle
                starved += model.starved(tile_last, chunks)
                held += not allowed
                issued = allowed and not (hesitates and rng.random() < 0.7)
                popped = results > 0 and rng.random() < taken
                ctx.set(dut.issue, issued)
                ctx.set(dut.popped, popped)
                await ctx.tick()
                if issued:
                    model.issue(cycle, group_last, tile_last, chunks)
                    results += chunks if tile_last else 0
                if popped:
                    model.pop()
                    results -= 1
                cycle += 1
        assert held or units == lanes == config.quad    # a step and a chunk a tile
        if taken < 0.1 and most > 4:
            assert starved

    simulate(dut, bench)


def test_results_fill_all_room():
    """With nothing taken, tiles are issued until exactly ``result_depth`` chunks are on hand."""
    config = replace(TINY, result_depth=16)
    dut = Throttle(config, lanes=32, units=4)

    async def bench(ctx):
        for name, value in (("group_last", 1), ("tile_last", 1), ("chunks", 5)):
            ctx.set(getattr(dut, name), value)
        issued = 0
        for _ in range(100):
            allowed = ctx.get(dut.allowed)
            ctx.set(dut.issue, allowed)
            issued += allowed
            await ctx.tick()
        assert issued == 3
        assert ctx.get(dut.starved)
        ctx.set(dut.issue, 0)
        ctx.set(dut.chunks, 1)
        assert not ctx.get(dut.starved)
        ctx.set(dut.chunks, 2)
        assert ctx.get(dut.starved)
        ctx.set(dut.popped, 1)
        await ctx.tick()
        assert not ctx.get(dut.starved)

    simulate(dut, bench)
