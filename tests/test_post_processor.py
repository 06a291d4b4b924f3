"""The post-processor: its lane alone, and the unit as generated Verilog, against exact integers."""

import collections
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
    "two": replace(TINY, name="two", dense_pes=2, sparse_pes=2),
    "wide": replace(TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8,
                    sparse_lanes=32, sparse_scale_units=8, sparse_pes=3, tile_outputs=96,
                    address_width=12),
    "dense": replace(TINY, name="dense", dense_lanes=16, sparse_pes=0),
    "sparse": replace(TINY, name="sparse", dense_pes=0, sparse_pes=2),
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
            sums, results = [], []
            late = collections.deque([(0, 0, 0)] * EpilogueLane.table_cycles)
            for cycle in range(80 + EpilogueLane.latency):
                near = rng.choice((0, 1, -1, wide - 1, -wide, rng.randint(-wide, wide)))
                total = max(-top, min(top - 1, (near << align_shift) + rng.choice(
                    (0, half, -half, half + 1, rng.randint(-top, top)))))
                dense, sparse = (rng.randint(-top // 2, top // 2) for _ in range(2))
                residual = rng.choice((word - 1, -word, rng.randint(-word, word - 1)))
                multiplier = rng.choice((word - 1, -word, 1, -1, 0, rng.randint(-word, word - 1)))
                # a bias that leaves ties for the last rounding
                bias = rng.choice((wide - 1, -wide, 1 << 15, -1 << 15, 3 << 15,
                                   rng.randint(-wide, wide - 1)))
                late.append((total - dense - sparse, multiplier, bias))
                _, old_multiplier, old_bias = late.popleft()
                partial = late[-1 - EpilogueLane.partial_cycles][0]
                for name, value in (("dense", dense), ("sparse", sparse), ("partial", partial),
                                    ("residual", residual), ("multiplier", old_multiplier),
                                    ("bias", old_bias)):
                    ctx.set(getattr(dut, name), value)
                if cycle >= EpilogueLane.total_cycles:
                    assert ctx.get(dut.total) == sums[cycle - EpilogueLane.total_cycles], cycle
                if cycle >= EpilogueLane.latency:
                    assert ctx.get(dut.result) == results[cycle - EpilogueLane.latency], cycle
                await ctx.tick()
                sums.append(total)
                results.append(naive.epilogue(
                    [[[total]]], align_shift, [multiplier], scale_shift, [bias], [[[residual]]],
                    residual_multiplier)[0][0][0])

    simulate(dut, bench)


@pytest.mark.parametrize("name", CONFIGS)
def test_post_processor(name, tmp_path):
    config = CONFIGS[name]
    path = tmp_path / f"{name}.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build(
        {"post_processor.v": emit(PostProcessor(config), "post_processor")}, "post_processor")
    verilator.run(simulator, BENCH, folder=tmp_path, env={"PE_CONFIG": str(path)})
