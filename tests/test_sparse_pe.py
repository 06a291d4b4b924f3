"""The sparse PE, as generated Verilog, against exact sums and the cycle model."""

from dataclasses import replace

import pytest

from hw.config import TINY
from hw.sparse_pe import SparsePE
from hw.verilog import emit
from sim import verilator

BENCH = "tests.sparse_pe_bench"
FEW = replace(TINY, name="two", sparse_pes=2, result_depth=16, activation_depth=128,
              scale_depth=128, sparse_weight_depth=1024)
CONFIGS = {
    "two": FEW,
    "wide-units": replace(FEW, name="wide-units", sparse_pes=4, sparse_scale_units=8),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_sparse_pe(name, tmp_path):
    config = CONFIGS[name]
    path = tmp_path / f"{name}.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build({"sparse_pe.v": emit(SparsePE(config), "sparse_pe")}, "sparse_pe")
    verilator.run(simulator, BENCH, folder=tmp_path, env={"PE_CONFIG": str(path)})
