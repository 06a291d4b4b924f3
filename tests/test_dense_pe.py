"""The dense PE against sums of plain integers and the schedule of its units."""

from dataclasses import replace

import pytest

from hw import dense_pe
from hw.config import TINY
from hw.dense_pe import FIRST_ISSUE, OPERAND_CYCLES, DensePE
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
