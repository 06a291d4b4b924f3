"""Runs of a whole PE, every sum and every cycle against the schedule of its units."""

import random

from hw.drain import Results, capacity, steps, unit_cycles
from hw.scale_unit import ScaleUnit
from hw.window import SETUP_CYCLES
from tests.pe_case import Case
from tests.pe_model import STALLS, Schedule, lanes_of, simulate, units


def first_chunk(config, make):
    """Cycles from the last issue of a unit to its first chunk at ``o``, for a class of PEs."""
    return make.operand_cycles + make.group.latency + 1 + steps(config, make.side) \
        + ScaleUnit.latency - 1 + Results.latency


class Seen:
    """What a run of a PE showed: chunks with the cycles in which they came and were taken."""

    def __init__(self):
        self.busy = self.work = self.starved = 0
        self.chunks, self.came, self.taken = [], [], []


def check(case, index, seen, first_issue, arrival):
    """Compare a run with the sums of plain integers and with the schedule.

    ``first_issue`` besides one for each PE; ``arrival``: cycles from the last issue of a unit to
    its first chunk.
    """
    config, side = case.config, case.side
    expected = list(case.chunks(index))
    assert seen.chunks == [chunk for unit in expected for chunk in unit], str(case)
    lasts, number = [], -1
    for unit in expected:
        number += len(unit)
        lasts.append(number)
    schedule = Schedule(case.pes + first_issue, steps(config, side), unit_cycles(config, side),
                        capacity(config, side))
    ends = case.schedule(schedule, index, lambda unit: seen.taken[lasts[unit]])
    came = []
    for end, unit in zip(ends, expected, strict=True):
        came += [end + arrival + chunk for chunk in range(len(unit))]
    before = [-1, *seen.taken]
    assert seen.came == [max(cycle, last + 1) for cycle, last in zip(came, before)], str(case)
    assert seen.starved == schedule.starved, str(case)
    some = any(units(config, side, case.geometry, index))
    assert seen.busy == (schedule.end if some else case.pes + SETUP_CYCLES), str(case)
    assert seen.work == case.work(index), str(case)
    return schedule


def place_whole(m, name, _, part):
    """In place of `hw.parts.place`: the part itself, for Amaranth's simulator."""
    first = name == "group_0"
    m.submodules[name] = whole = part if first else type(part)(part.config, part.lanes)
    return whole


async def load(ctx, dut, case, index):
    """Fill the buffers, all ports at once."""
    ports = {}
    for port, enable, address, data in case.loads(index):
        ports.setdefault(port, []).append((enable, address, data))
    for number in range(max(map(len, ports.values())) + 1):
        for name, writes in ports.items():
            enable, address, value = writes[number] if number < len(writes) else (0, 0, 0)
            ctx.set(getattr(dut, name), {"enable": enable, "address": address, "data": value})
        await ctx.tick()


async def run(ctx, dut, case, index, rng, stall, wait):
    """Run what is loaded; the sink takes nothing in the first ``wait`` cycles."""
    seen, cycle, idle, new = Seen(), 0, 0, True
    ctx.set(dut.geometry, case.geometry)
    ctx.set(dut.index, index)
    while idle < 40:
        ctx.set(dut.start, cycle == 0)
        ready = cycle > wait and rng.random() >= stall
        ctx.set(dut.o.ready, ready)
        busy, valid = ctx.get(dut.busy), ctx.get(dut.o.valid)
        seen.busy += busy
        seen.work += ctx.get(dut.work)
        seen.starved += ctx.get(dut.starved)
        if valid and new:
            seen.came.append(cycle)
            seen.chunks.append(list(ctx.get(dut.o.payload)))
        if valid and ready:
            assert list(ctx.get(dut.o.payload)) == seen.chunks[-1], "a chunk must not change"
            seen.taken.append(cycle)
        assert valid or new, "a chunk must stay until it is taken"
        new = not valid or ready
        await ctx.tick()
        cycle += 1
        idle = 0 if busy or valid or cycle < 20 else idle + 1
        assert cycle < 20_000, f"{case} must end"
    return seen


SHAPES = (
    {}, {"mx": True}, {"mx": False, "kernel3": False, "size": (3, 4)},
    {"mx": False, "kernel3": True}, {"extreme": True},
)
"""Random runs one after the other; those without border have many units and results."""


def run_random(monkeypatch, module, make, config, side, first_issue, arrival, count=5, seed=0):
    """Random runs of one PE; the cycles in which it waited for room for results."""
    monkeypatch.setattr(module, "place", place_whole)
    dut = make(config)
    rng = random.Random(f"{side} {seed}")
    starved = 0

    async def bench(ctx):
        nonlocal starved
        for number in range(count):
            shape = dict(SHAPES[number % len(SHAPES)])
            if "size" in shape:
                pes, lanes, _ = lanes_of(config, side)
                shape["outputs"] = pes * lanes
            case = Case(config, side, rng, density=(0.6, 0.1, 0.3)[number % 3], **shape)
            index = number % case.pes
            await load(ctx, dut, case, index)
            for stall, wait in ((0, 0), (rng.choice(STALLS), 400 if number % 5 == 2 else 0)):
                seen = await run(ctx, dut, case, index, rng, stall, wait)
                starved += check(case, index, seen, first_issue, arrival).starved

    simulate(dut, bench)
    return starved
