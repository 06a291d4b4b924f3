"""Issue times of random runs, without lanes and results, against the schedule of the contract."""

import random
from dataclasses import replace

import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring

from hw.config import TINY
from hw.drain import capacity, steps, unit_cycles
from hw.issue import ISSUE_CYCLES, Issue
from hw.window import SETUP_CYCLES, Window
from tests.pe_case import Case
from tests.pe_model import Schedule, groups, own_tile, simulate, units

FEW = replace(TINY, name="few", record_depth=256, codes_depth=256, entry_depth=2048,
              weight_depth=1024, sparse_weight_depth=4096, weight_scale_depth=512,
              sparse_weight_scale_depth=512, result_depth=8, tile_outputs=64)


def walk(config, side):
    """A design of a Window and an Issue; its two parts."""
    m = Module()
    m.submodules.window = window = Window(config, side=side)
    m.submodules.issue = issue = Issue(config, side=side)
    wiring.connect(m, window.o, issue.i)
    m.d.comb += [issue.geometry.eq(window.geometry)]
    return m, window, issue


def products(case, index):
    """(address, row), and (scale row, scale, power, last, chunks) of each issue of a PE."""
    geometry, side = case.geometry, case.side
    starts, start = [], 0
    for record in range(case.places * (2 if case.mx else 1)):
        starts.append(start)
        start += case.record(record)[0]
    planes = 2 if case.mx else 1
    own = geometry["tiles"] if side == "dense" else max(1, geometry["tiles"] // case.pes)
    for pixel, tile, null in units(case.config, side, geometry, index):
        inside = [] if null else list(groups(geometry, pixel))
        for number, (tap, record, plane) in enumerate(inside):
            (left_out, count), last = case.issues(record, pixel), number == len(inside) - 1
            mine = own_tile(case.config, side, tile)
            row = geometry["weights"] + (
                (tap * planes + plane % 2) * own + mine) * geometry["pitch"]
            scale_row = geometry["weight_scales"] + (tap * own + mine) * (case.lanes // case.units)
            scale = case.scales[record // planes]
            for product in range(count or last):
                ends = product == max(count, 1) - 1
                yield (
                    (starts[record] + left_out + product,
                     row + (product if side == "dense" else 0)),
                    ends and (scale_row, scale if count or case.mx else 0,
                              plane // 2 + plane % 2, last))


async def run(ctx, window, issue, case, index, rng, hold):
    """Run one PE; units come back ``hold`` cycles at most after their last issue."""
    config, side = case.config, case.side
    expected = list(products(case, index))
    ctx.set(window.geometry, case.geometry)
    ctx.set(window.index, index)
    ctx.set(window.start, 1)
    seen, back, starved, busy, cycle = [], [], 0, 0, 0
    while cycle < 20 or ctx.get(window.busy | issue.busy) or cycle <= max(back, default=0):
        ctx.set(issue.returned, cycle in back)
        starved += ctx.get(issue.starved)
        busy += ctx.get(window.busy | issue.busy)
        if ctx.get(issue.fire):
            product, group, ends = (
                ctx.get(part) for part in (issue.product, issue.group, issue.ends))
            seen.append((cycle, product.first, ends, ends and group.last, product.empty))
            place, end = expected[len(seen) - 1]
            assert product.empty or (product.address, product.row) == place, (str(case), len(seen))
            assert bool(ends) == bool(end)
            if ends:
                assert (group.row, group.scale, group.power, group.last) == end, str(case)
            if ends and group.last:
                back.append(max(back[-1] if back else 0, cycle + rng.randint(0, hold)) + 1)
        await ctx.tick()
        cycle += 1
        assert cycle < 20_000, f"{case} must end"
        ctx.set(window.start, 0)
    ctx.set(issue.returned, 0)
    schedule = Schedule(case.pes + SETUP_CYCLES + 1 + ISSUE_CYCLES, steps(config, side),
                        unit_cycles(config, side), capacity(config, side))
    case.schedule(schedule, index, back.__getitem__)
    assert seen == [tuple(map(int, issue)) for issue in schedule.issues], str(case)
    assert starved == schedule.starved, str(case)
    some = any(units(config, side, case.geometry, index))
    assert busy == (schedule.end if some else case.pes + SETUP_CYCLES), str(case)
    return schedule


@pytest.mark.parametrize("side, pes, rate", [
    ("dense", 1, 1), ("dense", 2, 1), ("dense", 3, 1),
    ("sparse", 1, 4), ("sparse", 2, 1), ("sparse", 3, 2)])
def test_issue_times(side, pes, rate):
    config = replace(FEW, sparse_pes=pes, dense_pes=pes, sparse_rate=rate)
    design, window, issue = walk(config, side)
    rng = random.Random(7 * pes + rate)
    stalled = []

    async def bench(ctx):
        for number in range(9):
            shape = [{}, {"mx": True}, {"mx": False, "kernel3": False, "size": (7, 7)}][number % 3]
            case = Case(config, side, rng, density=(0.5, 0.1, 0.9)[number % 3], **shape)
            start = (config.codes_depth if side == "dense" else config.entry_depth) // 2
            record = 0
            for port, enable, address, data in case.loads(0):
                if port == "load_records":
                    # the test's buffers begin at 0
                    ctx.set(issue.load_records, {
                        "enable": enable, "address": address, "data": data - start})
                    await ctx.tick()
                    record += 1
            ctx.set(issue.load_records, {"enable": 0, "address": 0, "data": 0})
            schedule = await run(
                ctx, window, issue, case, number % pes, rng, (0, 3, 300)[number % 3])
            stalled.append(schedule.starved)

    simulate(design, bench)
    assert any(stalled)
