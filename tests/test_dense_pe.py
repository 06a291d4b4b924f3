"""The dense PE, as generated Verilog, against exact sums and the cycle model."""

from dataclasses import replace

import pytest

from hw.config import TINY
from hw.dense_pe import DensePE
from hw.verilog import emit
from sim import verilator

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
