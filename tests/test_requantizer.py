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
    "dense": replace(TINY, name="dense", sparse_pes=0, max_channels=96),
    "wide": replace(TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8,
                    sparse_lanes=32, sparse_scale_units=8, max_channels=192, tile_channels=96,
                    address_width=14),
    # A ring holds one pixel of the widest tensors.
    "small": replace(SMALL, max_channels=320, address_width=15),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_requantizer(name, tmp_path):
    config = CONFIGS[name]
    path = tmp_path / f"{name}.toml"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in config.as_dict().items()))
    simulator = verilator.build(
        {"requantizer.v": emit(Requantizer(config), "sqdm_requantizer")}, "sqdm_requantizer")
    verilator.run(simulator, BENCH, folder=tmp_path, env={"REQUANTIZER_CONFIG": str(path)})
