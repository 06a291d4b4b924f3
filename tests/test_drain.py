"""The drain's schedule, the throttle's distances and the queue of results."""

import collections
import random
from dataclasses import replace

import pytest

from hw.config import LARGE, SMALL, TINY
from hw.drain import Drain, Results, Throttle, capacity, scale_rows_of, steps, unit_cycles
from hw.scale_unit import ScaleUnit, tile_sum_width
from tests.pe_model import STALLS, simulate
from tests.test_scale_unit import activation_scale

EIGHT = replace(TINY, name="eight", sparse_lanes=32, sparse_scale_units=4)
ROW = replace(TINY, name="row", sparse_lanes=32, sparse_scale_units=32)
CASES = [(TINY, "dense"), (TINY, "sparse"), (EIGHT, "sparse"), (ROW, "sparse"), (SMALL, "dense"),
         (SMALL, "sparse"), (LARGE, "sparse")]


def of_case(function):
    return pytest.mark.parametrize("config, side", CASES, ids=[
        f"{config.name}-{side}" for config, side in CASES])(function)


def tile_chunks(config, side):
    return getattr(config, f"{side}_lanes") // config.quad


def test_distances_of_presets():
    """Steps and units of work as they follow from lanes and units, by hand."""
    expected = {
        ("tiny", "dense"): (1, 1), ("tiny", "sparse"): (4, 4), ("eight", "sparse"): (8, 8),
        ("row", "sparse"): (1, 8),
        ("small", "dense"): (1, 2), ("small", "sparse"): (2, 9), ("large", "sparse"): (2, 9)}
    assert expected == {(config.name, side): (steps(config, side), unit_cycles(config, side))
                        for config, side in CASES}


@of_case
def test_schedule(config, side):
    """Groups as close as may be, and further apart: every output in every cycle."""
    dut = Drain(config, side)
    rng = random.Random(f"{config.name} {side}")
    units, depth = getattr(config, f"{side}_scale_units"), steps(config, side)
    parts = units // config.quad
    groups, events = {}, {}
    cycle = group_free = unit_free = 2

    def expect(at, **outputs):
        for name, value in outputs.items():
            assert name not in events.setdefault(at, {}), f"{name} twice in cycle {at}"
            events[at][name] = value

    flushes = 0
    for _ in range(60):
        last, mx = rng.random() < 0.5, rng.random() < 0.5
        cycle = max(cycle, group_free, unit_free if last else 0) + rng.choice((0, 0, 0, 1, 9))
        scale, power = rng.randint(0, 15 if mx else 126), rng.randint(0, 2) if mx else 0
        row = rng.randrange(scale_rows_of(config, side) - depth)
        chunks = rng.choice((tile_chunks(config, side), rng.randint(1, tile_chunks(config, side))))
        groups[cycle] = {"row": row, "scale": scale, "mx": mx, "power": power, "last": last,
                         "chunks": chunks}
        group_free = cycle + depth
        for step in range(depth):
            expect(cycle + step, scale_request=1, scale_row=row + step)
            expect(cycle + Drain.lead + 1 + step, step=1, first=step == 0, last=last,
                   scale=activation_scale(scale, mx, power))
        if last:
            unit_free = cycle + unit_cycles(config, side)
            final = cycle + Drain.lead + depth + ScaleUnit.latency
            for chunk in range(chunks):
                expect(final + chunk, flush=1, flush_part=chunk % parts,
                       flush_left=chunks - chunk, advance=chunk % parts == parts - 1)
            flushes += chunks

    async def bench(ctx):
        seen = 0
        for at in range(max(events) + 4):
            ctx.set(dut.group_valid, at in groups)
            ctx.set(dut.group, groups.get(at, {"row": 7, "last": 1, "chunks": 1}))
            expected = ({"scale_request": 0, "step": 0, "flush": 0, "advance": 0}
                        | events.get(at, {}))
            for name, value in expected.items():
                got = ctx.get(getattr(dut, name))
                if name == "scale":
                    got = {field: got[field] for field in value}
                assert got == value, (name, at)
            seen += ctx.get(dut.flush)
            await ctx.tick()
        assert seen == flushes

    simulate(dut, bench)


@of_case
@pytest.mark.parametrize("taken", [0.02, 0.5, 1.0], ids=lambda taken: f"taken-{taken}")
def test_throttle(config, side, taken):
    """`allowed` and `starved` in every cycle, for issues that come at once or hesitate."""
    config = replace(config, result_depth=16)
    dut = Throttle(config, side)
    rng = random.Random(f"{config.name} {side} {taken}")

    async def bench(ctx):
        group_free = unit_free = cycle = starved = held = 0
        room = capacity(config, side)
        for _ in range(150):
            unit_last = rng.random() < 0.4
            group_last = unit_last or rng.random() < 0.7
            hesitates, issued = rng.random() < 0.2, False
            while not issued:
                ctx.set(dut.unit_last, unit_last)
                # the last issue of a unit of work ends a scaled group, said or not
                ctx.set(dut.group_last, group_last and (not unit_last or rng.random() < 0.5))
                starves = unit_last and not room
                allowed = not (group_last and cycle < group_free or unit_last and cycle < unit_free
                               or starves)
                assert ctx.get(dut.allowed) == allowed, cycle
                assert ctx.get(dut.starved) == starves, cycle
                starved += starves
                held += not allowed
                issued = allowed and not (hesitates and rng.random() < 0.7)
                returned = room < capacity(config, side) and rng.random() < taken
                ctx.set(dut.issue, issued)
                ctx.set(dut.returned, returned)
                await ctx.tick()
                if issued and group_last:
                    group_free = cycle + steps(config, side)
                if issued and unit_last:
                    unit_free = cycle + unit_cycles(config, side)
                room += returned - (issued and unit_last)
                cycle += 1
        assert held or unit_cycles(config, side) == 1 and taken > 0.1
        assert starved or taken > 0.1

    simulate(dut, bench)


@of_case
@pytest.mark.parametrize("o_stall", STALLS)
def test_results(config, side, o_stall):
    """Chunks of as many units of work as there is room for, in order, each once."""
    config = replace(config, result_depth=16)
    dut = Results(config, side)
    rng = random.Random(f"{config.name} {side} {o_stall}")
    units = getattr(config, f"{side}_scale_units")
    parts, width = units // config.quad, tile_sum_width(config)
    pushed, total = collections.deque(), 60
    state = {"room": capacity(config, side), "returned": 0, "least": capacity(config, side)}

    async def produce(ctx):
        for _ in range(total):
            while not state["room"] or rng.random() < 0.2:
                await ctx.tick()
            state["room"] -= 1
            state["least"] = min(state["least"], state["room"])
            chunks = rng.randint(1, tile_chunks(config, side))
            for chunk in range(chunks):
                sums = [rng.randrange(-1 << width - 1, 1 << width - 1) for _ in range(units)]
                part = chunk % parts
                ctx.set(dut.push, 1)
                ctx.set(dut.part, part)
                ctx.set(dut.left, chunks - chunk)
                ctx.set(dut.sums, sums)
                pushed.append((sums[part * config.quad:(part + 1) * config.quad],
                               chunk + 1 == chunks))
                await ctx.tick()
                ctx.set(dut.push, 0)

    async def consume(ctx):
        while state["returned"] < total:
            ctx.set(dut.o.ready, rng.random() >= o_stall)
            if ctx.get(dut.o.valid) and ctx.get(dut.o.ready):
                sums, last = pushed.popleft()
                assert [ctx.get(dut.o.payload)[n] for n in range(config.quad)] == sums
                assert ctx.get(dut.returned) == last
                state["returned"] += last
                state["room"] += last
            else:
                assert not ctx.get(dut.returned)
            await ctx.tick()
        ctx.set(dut.o.ready, 1)
        for _ in range(4):
            assert not ctx.get(dut.o.valid)
            await ctx.tick()

    simulate(dut, produce, consume)
    assert not pushed
    assert state["least"] == 0 or o_stall == 0


def test_latency_of_results():
    dut = Results(TINY, "dense")

    async def bench(ctx):
        ctx.set(dut.push, 1)
        ctx.set(dut.left, 1)
        ctx.set(dut.sums, [1, -2, 3, -4])
        cycles = 0
        while not ctx.get(dut.o.valid):
            await ctx.tick()
            ctx.set(dut.push, 0)
            cycles += 1
        assert cycles == Results.latency
        assert [ctx.get(dut.o.payload)[n] for n in range(4)] == [1, -2, 3, -4]

    simulate(dut, bench)
