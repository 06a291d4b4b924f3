"""A queue of read responses for a unit that takes them at its own pace."""

from amaranth import Module, Mux, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out

from .memory_port import ReadPort

__all__ = ["ReadQueue"]


class ReadQueue(wiring.Component):
    """Takes every response when it comes, so that those of other units never wait behind it.

    Adds no cycle: a response passes through when the unit takes it and none waits. Requests are
    held back while `depth` words are on their way or wait.

    Members
    -------
    i : ``In(ReadPort(config))``
        The unit.
    o : ``Out(ReadPort(config))``
        Memory; responses are always taken.
    """

    depth = 32

    def __init__(self, config):
        self.config = config
        super().__init__({"i": In(ReadPort(config)), "o": Out(ReadPort(config))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.words = words = fifo.SyncFIFO(
            width=self.config.port_width, depth=self.depth)
        room = Signal(range(self.depth + 1), init=self.depth)
        asked, taken = Signal(), Signal()
        unit, memory = self.i, self.o
        m.d.comb += [
            memory.request.valid.eq(unit.request.valid & (room != 0)),
            memory.request.payload.eq(unit.request.payload),
            unit.request.ready.eq(memory.request.ready & (room != 0)),
            asked.eq(memory.request.valid & memory.request.ready),
            memory.response.ready.eq(1),
            unit.response.valid.eq(words.r_rdy | memory.response.valid),
            unit.response.payload.eq(Mux(words.r_rdy, words.r_data, memory.response.payload)),
            taken.eq(unit.response.valid & unit.response.ready),
            words.r_en.eq(unit.response.ready),
            words.w_en.eq(memory.response.valid & (words.r_rdy | ~unit.response.ready)),
            words.w_data.eq(memory.response.payload),
        ]
        m.d.sync += room.eq(room - asked + taken)
        return m
