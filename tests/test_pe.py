"""The PEs against sums of plain integers and the schedule of their units."""

from dataclasses import replace

import pytest

from hw import pe
from hw.config import TINY
from hw.dense_pe import DensePE
from hw.sparse_pe import SparsePE
from hw.verilog import emit
from sim import verilator
from tests.pe_run import first_chunk, run_random

FEW = replace(TINY, name="few", record_depth=256, codes_depth=256, entry_depth=2048,
              weight_depth=256, sparse_weight_depth=2048, weight_scale_depth=256,
              sparse_weight_scale_depth=256, tile_channels=32, result_depth=8)
PES = {"dense": DensePE, "sparse": SparsePE}


@pytest.mark.parametrize("side, changes", [
    ("dense", {"dense_pes": 1, "dense_lanes": 4, "dense_scale_units": 4}),
    ("dense", {"dense_pes": 2, "dense_lanes": 8, "dense_scale_units": 4}),
    ("dense", {"dense_pes": 3, "dense_lanes": 8, "dense_scale_units": 4}),
    ("sparse", {"sparse_pes": 1, "sparse_rate": 4, "sparse_scale_units": 4}),
    ("sparse", {"sparse_pes": 2, "sparse_rate": 1, "sparse_scale_units": 16, "tile_outputs": 64}),
    ("sparse", {"sparse_pes": 3, "sparse_rate": 2, "sparse_scale_units": 8, "tile_outputs": 64}),
])
def test_random_runs(side, changes, monkeypatch):
    config, make = replace(FEW, **changes), PES[side]
    arrival = first_chunk(config, make)
    assert arrival == pe.first_chunk(config, make)
    assert run_random(monkeypatch, pe, make, config, side, pe.FIRST_ISSUE, arrival)


@pytest.mark.parametrize("side", PES)
def test_verilog(side, tmp_path):
    """The same for the generated Verilog, whose groups are instances of one module."""
    config = replace(FEW, **{f"{side}_pes": 2})
    path = tmp_path / "few.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    name = f"{side}_pe"
    simulator = verilator.build({f"{name}.v": emit(PES[side](config), name)}, name)
    verilator.run(simulator, "tests.pe_bench", folder=tmp_path,
                  env={"PE_CONFIG": str(path), "PE_SIDE": side})
