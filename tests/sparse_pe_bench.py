"""cocotb tests of hw/sparse_pe.py; run by tests/test_sparse_pe.py."""

import cocotb

from hw.operands import load_layout
from sim.cycles import SparseSide
from tests import naive, pe_model
from tests.pe_bench import CONFIG, Bench, Case, V, check_cycles, seed
from tests.pe_model import STALLS

L = CONFIG.sparse_lanes
LOADS = {
    "load_weights": load_layout(L // V, CONFIG.sparse_weight_depth, CONFIG.port_width),
    "load_weight_scales": load_layout(
        1, CONFIG.weight_scale_depth, 8 * CONFIG.sparse_scale_units),
}


async def start(dut):
    bench = Bench(dut, seed(), LOADS)
    dut.index.value = 0
    await bench.reset()
    return bench


async def load(bench, case):
    await bench.load(
        case, pe_model.sparse_weights(CONFIG, case.by_position()),
        pe_model.weight_scale_rows(CONFIG, case.weight_scales, CONFIG.sparse_scale_units))


def filled(case):
    """Non-zeros of each word of each input pixel."""
    return [[sum(line[pixel] != 0 for line in case.codes[first:first + V])
             for first in range(0, len(case.codes), V)] for pixel in range(case.pixels)]


async def run(bench, case, *, index=0, reload=True, **sink):
    """Run a case; every sum, and every cycle against the cycle model."""
    if reload:
        await load(bench, case)
    bench.dut.index.value = index
    pixels = range(index, case.pixels, CONFIG.sparse_pes)
    seen = await bench.run(case, list(case.chunks(pixels)), **sink)
    if not pixels:
        assert seen["busy"] == 0
        return seen
    side = SparseSide(CONFIG, case.geometry["chunks"])
    side.pops = seen["pops"]
    counts, taps, arrivals = filled(case), case.taps(), []
    for pixel in pixels:
        arrivals += side.pixel([counts[place] for place in taps[pixel]])
    check_cycles(case, seen, side, arrivals)
    if not sink:
        assert seen["pops"] == arrivals
    assert seen["work"] == -(-case.outputs // L) * sum(
        sum(counts[place]) for pixel in pixels for place in taps[pixel])
    return seen


@cocotb.test()
async def test_edges(dut):
    """Images of one row, column or pixel; partial tiles; few, many and no non-zeros."""
    bench = await start(dut)
    sizes = [(1, 1), (1, 4), (4, 1), (2, 2), (3, 3)]
    outputs = [1, L, L + 1, V + CONFIG.quad]
    for number in range(15):
        await run(bench, Case(
            bench.rng, (naive.A4U, naive.A4S)[number % 2], *sizes[number % 5],
            (3, 1)[number // 3 % 2], outputs[number % 4], 1 + number % 3,
            density=(0.1, 1, 0.4)[number % 3]), index=number // 2 % CONFIG.sparse_pes)


@cocotb.test()
async def test_empty_words_groups_and_tiles(dut):
    """Words, input pixels and whole windows without a non-zero, at the start and at the end."""
    bench = await start(dut)
    rng = bench.rng
    for kernel, density in ((3, 0.5), (1, 0.5), (3, 1), (3, 0.1)):
        words, pixels = 3, 12
        codes = [[0] * pixels for _ in range(words * V)]
        for pixel in range(pixels):
            share = rng.choice((0, density, 1 if kernel == 1 else 0))
            for word in range(words):
                if rng.random() < 0.5:
                    for channel in range(V):
                        if rng.random() < share:
                            codes[word * V + channel][pixel] = rng.randint(1, 15)
        await run(bench, Case(rng, naive.A4U, 3, 4, kernel, V + 1, words, codes=codes))
    nothing = [[0] * 6 for _ in range(2 * V)]
    seen = await run(bench, Case(rng, naive.A4S, 2, 3, 3, L + 1, 2, codes=nothing))
    assert seen["work"] == 0


@cocotb.test()
async def test_zeros_cost_no_cycle(dut):
    """The same non-zeros with zeros before, between or after them take the same cycles."""
    bench = await start(dut)
    rng = bench.rng
    counts = [[rng.choice((0, 1, 2, V // 2, V - 1)) for _ in range(9)] for _ in range(2)]

    def placed(choose):
        codes = [[0] * 9 for _ in range(2 * V)]
        for word, line in enumerate(counts):
            for pixel, count in enumerate(line):
                for channel in choose(count):
                    codes[word * V + channel][pixel] = rng.randint(1, 15)
        return codes

    seen = []
    for choose in (range, lambda count: range(V - count, V),
                   lambda count: rng.sample(range(V), count)):
        case = Case(rng, naive.A4U, 3, 3, 3, L, 2, codes=placed(choose))
        seen.append(await run(bench, case))
    assert seen[0] == seen[1] == seen[2]


@cocotb.test()
async def test_busy_is_the_number_of_nonzeros(dut):
    """With groups that are long enough, nothing but non-zeros takes cycles."""
    bench = await start(dut)
    words = 2
    codes = [[1 + (pixel + n) % 15 if n % 2 or n < V else 0 for pixel in range(4)]
             for n in range(words * V)]
    case = Case(bench.rng, naive.A4U, 1, 4, 1, L // 2, words, codes=codes)
    seen = await run(bench, case)
    front = 6      # the first word on its way to the walker
    assert seen["work"] == (V + V // 2) * len(range(0, 4, CONFIG.sparse_pes))
    assert seen["work"] <= seen["busy"] <= seen["work"] + front


@cocotb.test()
async def test_stalls(dut):
    """A sink that stalls or waits for long: results keep their order and the PE waits for room."""
    bench = await start(dut)
    starved = 0
    for stall in STALLS:
        case = Case(bench.rng, naive.A4S, 3, 4, 1, 2 * V - 1, 1, density=0.2)
        for wait in (0, 200):
            seen = await run(bench, case, stall=stall, wait=wait, reload=wait == 0)
            starved += seen["starved"]
    assert starved


@cocotb.test()
async def test_largest_sums(dut):
    bench = await start(dut)
    for format in (naive.A4U, naive.A4S):
        await run(bench, Case(bench.rng, format, 2, 2, 3, 3, CONFIG.max_channels // V,
                              extreme=True))


@cocotb.test()
async def test_runs_follow_each_other(dut):
    """A run again at once; then one by another PE's number."""
    bench = await start(dut)
    case = Case(bench.rng, naive.A4U, 3, 1, 3, V + 1, 1, density=0.5)
    await load(bench, case)
    cycles = {tuple((await run(bench, case, reload=False))["pops"]) for _ in range(3)}
    assert len(cycles) == 1
    for index in range(CONFIG.sparse_pes):
        await run(bench, case, index=index, reload=False)
