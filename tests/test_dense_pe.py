"""The dense PE, as generated Verilog, against exact sums and the cycle model."""

from dataclasses import replace

import pytest

from hw.config import TINY
from hw.dense_pe import DenseGroup, DensePE
from hw.scale_unit import ScaleUnit
from hw.verilog import emit
from sim import verilator
from tests.pe_model import nibbles, simulate

BENCH = "tests.dense_pe_bench"
FEW = replace(TINY, name="few-results", sparse_lanes=16, result_depth=16, activation_depth=128,
              scale_depth=128)
CONFIGS = {
    "one-unit": replace(FEW, name="one-unit", dense_scale_units=1),
    "wide-lanes": replace(FEW, name="wide-lanes", dense_lanes=16, dense_scale_units=8),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_pe(name, tmp_path):
    config = CONFIGS[name]
    path = tmp_path / f"{name}.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build({"dense_pe.v": emit(DensePE(config), "dense_pe")}, "dense_pe")
    verilator.run(simulator, BENCH, folder=tmp_path, env={"PE_CONFIG": str(path)})


def test_group_latency():
    """The sums hold a word's dot products `latency` cycles after it entered, not earlier."""
    codes, weights = [3, 0, 7, 1] * 4, [-7, 5, 1, -1] * 4
    expected = sum(code * weight for code, weight in zip(codes, weights))
    right = []
    for delay in range(1, 6):
        dut = DenseGroup(TINY, 2)

        async def bench(ctx, dut=dut, delay=delay):
            for name, value in (("first", 1), ("activations", nibbles(codes)), ("mx", 1),
                                ("weights", nibbles(weights)), ("weights_signed", 1),
                                ("first_add", 1), ("scale", {"factor": 1, "shift": 0})):
                ctx.set(getattr(dut, name), value)
            for cycle in range(delay + 1 + ScaleUnit.latency):
                ctx.set(dut.valid, cycle == 0)
                ctx.set(dut.load, cycle == delay)
                ctx.set(dut.step, cycle == delay + 1)
                await ctx.tick()
            right.append(ctx.get(dut.flush_sum) == expected)

        simulate(dut, bench)
    assert right.index(True) + 1 == DenseGroup.latency and all(right[DenseGroup.latency:])
