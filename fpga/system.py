"""Shell and core together: everything of a board design but its pins."""

from amaranth.hdl import ClockSignal, Const, Instance, Module, ResetSignal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.memory_port import MemoryPort

from .shell import Shell

__all__ = ["CORE", "System"]

CORE = "sqdm_core"  # Verilog module of the core


def core_instance(config, shell, interrupt):
    """Instance of the core's Verilog module, connected to a shell."""
    ports = {
        "i_clk": ClockSignal(),
        "i_rst": ResetSignal(allow_reset_less=True),
        "i_csr_address": shell.csr_address,
        "i_csr_write": shell.csr_write,
        "i_csr_write_data": shell.csr_write_data,
        "i_csr_read": shell.csr_read,
        "o_csr_read_data": shell.csr_read_data,
        "o_interrupt": interrupt,
    }
    signature = MemoryPort(config)
    for path, member, port in signature.flatten(shell.memory):
        value = Value.cast(port)
        if isinstance(value, Const) or not len(value):  # not in the Verilog
            continue
        direction = "o" if member.flow == Out else "i"
        ports[f"{direction}_memory__{'__'.join(path)}"] = value
    return Instance(CORE, **ports)


class System(wiring.Component):
    """A core, its memory and the UART shell that serves both.

    Parameters
    ----------
    config : hw.config.Config
        Of the core, whose Verilog is added to the design as module ``sqdm_core``.
    divisor, timeout : int
        As for `Shell`.

    Members
    -------
    rx : ``In(1)``, tx : ``Out(1)``
        The serial line.
    busy, done, error : ``Out(1)``
        A pass is running; the last pass has ended; it ended with an error.
    """

    rx: In(1, init=1)
    tx: Out(1, init=1)
    busy: Out(1)
    done: Out(1)
    error: Out(1)

    def __init__(self, config, *, divisor, timeout):
        self._config = config
        self._divisor = divisor
        self._timeout = timeout
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.shell = shell = Shell(
            self._config, divisor=self._divisor, timeout=self._timeout)
        m.submodules.core = core_instance(self._config, shell, self.done)
        m.d.comb += [
            shell.rx.eq(self.rx),
            self.tx.eq(shell.tx),
            self.busy.eq(shell.busy),
            self.error.eq(shell.error),
        ]
        return m
