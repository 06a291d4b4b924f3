"""The post-processor: its lane alone, and the unit as generated Verilog, against exact integers."""

import random
from dataclasses import replace

import pytest

from hw.config import TINY
from hw.post_processor import EpilogueLane, PostProcessor
from hw.verilog import emit
from sim import verilator
from tests import naive
from tests.pe_model import simulate

BENCH = "tests.post_processor_bench"
CONFIGS = {
    "two": replace(TINY, name="two", sparse_pes=2, result_depth=32),
    "wide": replace(TINY, name="wide", vector=32, dense_lanes=8, sparse_pes=4, address_width=12),
}


@pytest.mark.parametrize("align_shift, scale_shift", [
    (0, 0), (0, 31), (31, 0), (31, 31), (7, 16), (20, 12)])
def test_lane(align_shift, scale_shift):
    """A sum a cycle with ties, saturation and extremes in every step; `latency` asserted."""
    dut = EpilogueLane(TINY)
    rng = random.Random(align_shift * 32 + scale_shift)
    top = 1 << TINY.accumulator_width - 2
    half = 1 << align_shift >> 1
    word, wide = 1 << 15, 1 << 31

    async def bench(ctx):
        for residual_multiplier in (0, 1, 16384, 65535):
            ctx.set(dut.align_shift, align_shift)
            ctx.set(dut.scale_shift, scale_shift)
            ctx.set(dut.residual_multiplier, residual_multiplier)
            results, before = [], (0, 0)
            for cycle in range(80 + EpilogueLane.latency):
                near = rng.choice((0, 1, -1, wide - 1, -wide, rng.randint(-wide, wide)))
                total = max(-top, min(top - 1, (near << align_shift) + rng.choice(
                    (0, half, -half, half + 1, rng.randint(-top, top)))))
                dense = rng.randint(-top // 2, top // 2)
                residual = rng.choice((word - 1, -word, rng.randint(-word, word - 1)))
                multiplier = rng.choice((word - 1, -word, 1, -1, 0, rng.randint(-word, word - 1)))
                # a bias that leaves ties for the last rounding
                bias = rng.choice((wide - 1, -wide, 1 << 15, -1 << 15, 3 << 15,
                                   rng.randint(-wide, wide - 1)))
                for name, value in (("dense", dense), ("sparse", total - dense),
                                    ("residual", residual), ("multiplier", before[0]),
                                    ("bias", before[1])):
                    ctx.set(getattr(dut, name), value)
                if cycle >= EpilogueLane.latency:
                    assert ctx.get(dut.result) == results[cycle - EpilogueLane.latency], cycle
                await ctx.tick()
                results.append(naive.epilogue(
                    [[[total]]], align_shift, [multiplier], scale_shift, [bias], [[[residual]]],
                    residual_multiplier)[0][0][0])
                before = multiplier, bias

    simulate(dut, bench)


@pytest.mark.parametrize("name", CONFIGS)
def test_post_processor(name, tmp_path):
    config = CONFIGS[name]
    path = tmp_path / f"{name}.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build(
        {"post_processor.v": emit(PostProcessor(config), "post_processor")}, "post_processor")
    verilator.run(simulator, BENCH, folder=tmp_path, env={"PE_CONFIG": str(path)})
