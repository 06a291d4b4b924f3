"""cocotb tests of hw/dense_pe.py; run by tests/test_dense_pe.py."""

import cocotb

from hw.operands import load_layout
from sim.cycles import DENSE_FLUSH, Side
from tests import naive, pe_model
from tests.pe_bench import CONFIG, Bench, Case, V, check_cycles, seed
from tests.pe_model import STALLS

K = CONFIG.dense_lanes
FORMATS = (naive.A4U, naive.A4S, naive.MX8, naive.IN16)
LOADS = {
    "load_weights": load_layout(V, CONFIG.weight_depth, 4 * K),
    "load_weight_scales": load_layout(
        1, CONFIG.weight_scale_depth, 8 * CONFIG.dense_scale_units),
}


async def start(dut):
    bench = Bench(dut, seed(), LOADS)
    await bench.reset()
    return bench


async def load(bench, case):
    await bench.load(
        case, pe_model.dense_weights(CONFIG, case.by_position(), case.mx),
        pe_model.weight_scale_rows(CONFIG, case.weight_scales, CONFIG.dense_scale_units))


def groups_of(case):
    """Issues of each group of a tap."""
    if not case.mx:
        return [case.words]
    size = case.geometry["group_words"]
    return [4 * min(size, case.words - first) for first in range(0, case.words, size)]


async def run(bench, case, *, reload=True, **sink):
    """Run a case; every sum, and every cycle against the cycle model."""
    if reload:
        await load(bench, case)
    seen = await bench.run(case, list(case.chunks(range(case.pixels))), **sink)
    side = Side(CONFIG, K, CONFIG.dense_scale_units, case.geometry["chunks"], DENSE_FLUSH)
    side.pops = seen["pops"]
    arrivals = []
    for inputs in case.taps():
        arrivals += side.pixel(len(inputs), groups_of(case))
    check_cycles(case, seen, side, arrivals)
    if not sink:
        assert seen["pops"] == arrivals
    tiles = -(-case.outputs // K)
    assert seen["work"] == tiles * sum(map(len, case.taps())) * sum(groups_of(case))
    return seen


def words_of(format, words):
    return 2 if format == naive.IN16 else words


@cocotb.test()
async def test_edges(dut):
    """Images of one row, column or pixel; outputs that leave a part of a tile or a chunk."""
    bench = await start(dut)
    sizes = [(1, 1), (1, 4), (4, 1), (2, 2), (3, 3)]
    outputs = [1, K, K + 1, 2 * K + 1, V + 1]
    for number in range(12):
        format = FORMATS[number % 4]
        await run(bench, Case(
            bench.rng, format, *sizes[number % 5], (3, 1)[number // 3 % 2],
            outputs[number % 5], words_of(format, 1 + number // 4 % 3)))


@cocotb.test()
async def test_stalls(dut):
    """A sink that stalls or waits for long: results keep their order and the PE waits for room."""
    bench = await start(dut)
    starved = 0
    for number, stall in enumerate(STALLS * 2):
        format = FORMATS[number % 3]
        case = Case(bench.rng, format, 3, 4, 1, 2 * V - 1, words_of(format, 1), density=0.3)
        for wait in (0, 150):
            seen = await run(bench, case, stall=stall, wait=wait, reload=wait == 0)
            starved += seen["starved"]
    assert starved


@cocotb.test()
async def test_largest_sums(dut):
    """The most that the operands can reach, and the least."""
    bench = await start(dut)
    for format in FORMATS:
        words = words_of(format, CONFIG.max_channels // V)
        await run(bench, Case(bench.rng, format, 3, 3, 1 if words > 2 else 3, 5, words,
                              extreme=True))


@cocotb.test()
async def test_runs_follow_each_other(dut):
    """A run again at once, with nothing loaded in between; no sum is left from the one before."""
    bench = await start(dut)
    for format in FORMATS:
        case = Case(bench.rng, format, 2, 2, 3, K + 1, words_of(format, 1))
        await load(bench, case)
        cycles = {tuple((await run(bench, case, reload=False))["pops"]) for _ in range(3)}
        assert len(cycles) == 1


@cocotb.test()
async def test_zeros_cost_what_they_cost(dut):
    """The dense PE multiplies zeros too."""
    bench = await start(dut)
    cases = [Case(bench.rng, naive.A4U, 2, 3, 3, 9, 2, density=density) for density in (0, 1)]
    first, second = [await run(bench, case) for case in cases]
    assert first == second
