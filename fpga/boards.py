"""The boards that a bitstream can be built for, and what of them a design uses."""

import importlib
from dataclasses import dataclass, replace

from amaranth.hdl import Module
from amaranth.lib import io, wiring

from .system import System

__all__ = ["BOARDS", "Board", "Top", "get"]


@dataclass(frozen=True, kw_only=True)
class Board:
    """Choices for one board.

    The clock is the board's oscillator, the core's memory is block RAM.
    """

    name: str
    platform: str            # module and class in amaranth_boards
    clock_hz: int            # of the oscillator
    baud: int                # of the UART; divides the clock
    memory_bytes: int        # most block RAM to give the core's memory
    timeout_s: float = 0.1   # half requests are given up after it; longer than pauses of USB

    @property
    def divisor(self):
        """Clock cycles per bit of the UART."""
        return round(self.clock_hz / self.baud)

    @property
    def timeout(self):
        """Clock cycles after which a half request is given up."""
        return round(self.clock_hz * self.timeout_s)

    def fit(self, config):
        """`config` with no more address space than the board's memory.

        The core itself then refuses descriptors that reach beyond it.
        """
        words = self.memory_bytes // (config.port_width // 8)
        return replace(config, address_width=min(config.address_width, words.bit_length() - 1))

    def create_platform(self):
        """A new platform of `amaranth_boards`."""
        module, name = self.platform.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)()


BOARDS = {board.name: board for board in (
    Board(name="ulx3s-85f", platform="amaranth_boards.ulx3s.ULX3S_85F_Platform",
          clock_hz=25_000_000, baud=1_000_000, memory_bytes=1 << 17),  # 64 of 208 block RAMs
)}


def get(name):
    """Board of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name not in BOARDS:
        raise ValueError(f"board must be one of {', '.join(BOARDS)}, not {name!r}")
    return BOARDS[name]


class Top(wiring.Component):
    """A `System` on the pins of a board.

    UART 0 is the serial line; LED 0 is on while a pass runs, LED 1 when the last pass has ended
    with an error, LED 2 when a pass has ended.

    Parameters
    ----------
    board : Board
    config : hw.config.Config
        Of the core; see `Board.fit`.
    """

    def __init__(self, board, config):
        self._board = board
        self._config = config
        super().__init__({})

    def elaborate(self, platform):
        m = Module()
        m.submodules.system = system = System(
            self._config, divisor=self._board.divisor, timeout=self._board.timeout)

        uart = platform.request("uart", 0, dir="-")
        m.submodules.rx = rx = io.Buffer("i", uart.rx)
        m.submodules.tx = tx = io.Buffer("o", uart.tx)
        m.d.comb += [system.rx.eq(rx.i), tx.o.eq(system.tx)]

        for number, lit in enumerate([system.busy, system.error, system.done]):
            pin = platform.request("led", number, dir="-")
            m.submodules[f"led_{number}"] = led = io.Buffer("o", pin)
            m.d.comb += led.o.eq(lit)

        return m
