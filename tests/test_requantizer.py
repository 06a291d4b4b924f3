"""The requantizer, as generated Verilog, against golden."""

from dataclasses import replace

import pytest

from hw.config import SMALL, TINY
from hw.requantizer import Requantizer
from hw.verilog import emit
from sim import verilator

BENCH = "tests.requantizer_bench"

# The bench loads its configuration by name or file, as users do.
CONFIGS = {
    "tiny": TINY,
    "dense": replace(TINY, name="dense", sparse_pes=0),
    "wide": replace(TINY, name="wide", vector=32, dense_lanes=8, max_channels=96, address_width=14),
    "small": replace(SMALL, address_width=14),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_requantizer(name, tmp_path):
    config = CONFIGS[name]
    path = tmp_path / f"{name}.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build(
        {"requantizer.v": emit(Requantizer(config), "sqdm_requantizer")}, "sqdm_requantizer")
    verilator.run(simulator, BENCH, folder=tmp_path, env={"REQUANTIZER_CONFIG": str(path)})
