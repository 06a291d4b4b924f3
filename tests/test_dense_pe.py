"""The dense PE against sums of plain integers and the schedule of its units."""

from dataclasses import replace

import pytest

from hw import dense_pe
from hw.config import TINY
from hw.dense_pe import FIRST_ISSUE, OPERAND_CYCLES, DensePE
from hw.verilog import emit
from sim import verilator
from hw.lanes import DenseGroup
from tests.pe_run import first_chunk, run_random

FEW = replace(TINY, name="few", record_depth=256, codes_depth=256, weight_depth=256,
              weight_scale_depth=256, tile_channels=32, tile_outputs=32, result_depth=8)


@pytest.mark.parametrize("pes, lanes, units", [(1, 4, 4), (2, 8, 4), (3, 8, 4)])
def test_dense_pe(pes, lanes, units, monkeypatch):
    config = replace(FEW, dense_pes=pes, dense_lanes=lanes, dense_scale_units=units)
    arrival = first_chunk(config, "dense", OPERAND_CYCLES, DenseGroup)
    assert arrival == config.dense_steps + dense_pe.FIRST_CHUNK
    starved = run_random(monkeypatch, dense_pe, DensePE, config, "dense", FIRST_ISSUE, arrival)
    assert starved


def test_verilog(tmp_path):
    """The same for the generated Verilog, whose groups are instances of one module."""
    config = replace(FEW, dense_pes=2)
    path = tmp_path / "few.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build(
        {"dense_pe.v": emit(DensePE(config), "dense_pe")}, "dense_pe")
    verilator.run(simulator, "tests.pe_bench", folder=tmp_path,
                  env={"PE_CONFIG": str(path), "PE_SIDE": "dense"})
