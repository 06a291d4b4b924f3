"""fpga/shell.py through its UART pins: the tests of tests/fpga_shell_bench.py."""

import pytest

from fpga.system import System
from hw import verilog
from sim import verilator
from tests import fpga_shell_bench as bench
from tests import stand_in_core

TESTS = [name for name in vars(bench) if name.startswith("test_")]


@pytest.mark.parametrize("name", bench.CONFIGS)
def test_shell(name, tmp_path):
    config = bench.CONFIGS[name]
    system = System(config, divisor=bench.DIVISORS[name], timeout=bench.TIMEOUT)
    simulator = verilator.build(
        {"system.v": verilog.emit(system, "system"), "core.v": stand_in_core.generate(config)},
        "system")
    ran = verilator.run(simulator, bench.__name__, folder=tmp_path, env={"SQDM_CONFIG": name})
    assert ran == TESTS
