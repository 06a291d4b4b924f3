"""fpga/system.py: the core behind the shell, see tests/fpga_core_bench.py."""

from fpga.system import System
from hw import verilog
from hw.config import TINY
from sim import verilator
from tests import fpga_core_bench as bench


def test_layers_through_the_uart(tmp_path):
    core, _ = verilog.generate(TINY)
    system = verilog.emit(System(TINY, divisor=bench.DIVISOR, timeout=bench.TIMEOUT), "system")
    simulator = verilator.build({"system.v": system, "core.v": core}, "system")
    assert verilator.run(simulator, bench.__name__, folder=tmp_path) == ["test_layers"]
