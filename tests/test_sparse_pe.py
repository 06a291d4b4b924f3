"""The sparse PE against sums of plain integers and the schedule of its units."""

from dataclasses import replace

import pytest

from hw import sparse_pe
from hw.config import TINY
from hw.lanes import SparseGroup
from hw.sparse_pe import FIRST_ISSUE, OPERAND_CYCLES, SparsePE
from hw.verilog import emit
from sim import verilator
from tests.pe_run import first_chunk, run_random

FEW = replace(TINY, name="few", record_depth=256, entry_depth=2048, sparse_weight_depth=2048,
              weight_scale_depth=256, tile_channels=32, result_depth=8)


@pytest.mark.parametrize("pes, outputs, rate, units", [
    (1, 32, 4, 4), (2, 64, 1, 16), (3, 64, 2, 8)])
def test_sparse_pe(pes, outputs, rate, units, monkeypatch):
    config = replace(FEW, sparse_pes=pes, tile_outputs=outputs, sparse_rate=rate,
                     sparse_scale_units=units)
    arrival = first_chunk(config, "sparse", OPERAND_CYCLES, SparseGroup)
    assert arrival == config.sparse_steps + sparse_pe.FIRST_CHUNK
    starved = run_random(monkeypatch, sparse_pe, SparsePE, config, "sparse", FIRST_ISSUE, arrival)
    assert starved


def test_verilog(tmp_path):
    """The same for the generated Verilog, whose groups are instances of one module."""
    config = replace(FEW, sparse_pes=2)
    path = tmp_path / "few.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build(
        {"sparse_pe.v": emit(SparsePE(config), "sparse_pe")}, "sparse_pe")
    verilator.run(simulator, "tests.pe_bench", folder=tmp_path,
                  env={"PE_CONFIG": str(path), "PE_SIDE": "sparse"})
