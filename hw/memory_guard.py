"""The guard at the memory port: no access leaves the windows of the descriptor it belongs to."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .memory_port import MemoryPort, ReadPort, WritePort

__all__ = ["MemoryGuard", "inside"]


def inside(address, base, limit):
    """Whether ``address`` lies in the window from ``base`` to before ``limit``."""
    return (address >= base) & (address < limit)


class MemoryGuard(wiring.Component):
    """Passes reads and writes on when they lie in their windows; adds no cycle.

    A read outside its window reads ``read_base`` instead, so that responses stay in order; a write
    outside is dropped. Both raise ``violation``. Passes overlap, so every request comes with the
    verdict of its own descriptor's windows.

    Members
    -------
    read, write : ``In(ReadPort)``, ``In(WritePort)``
        From the units.
    memory : ``Out(MemoryPort)``
    read_inside, write_inside : ``In(1)``
        The request that is offered may go to memory; see `inside`.
    read_base : ``In``
        First word of the read's window.
    violation : ``Out(1)``
        High in the cycle of an access outside.
    settled : ``Out(1)``
        No write is on its way.
    """

    outstanding = 1 << 10  # writes that may be on their way

    def __init__(self, config):
        self.config = config
        super().__init__({
            "read": In(ReadPort(config)),
            "write": In(WritePort(config)),
            "memory": Out(MemoryPort(config)),
            "read_inside": In(1),
            "write_inside": In(1),
            "read_base": In(config.address_width),
            "violation": Out(1),
            "settled": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        read, write, memory = self.read, self.write, self.memory
        room = Signal()
        waiting = Signal(range(self.outstanding + 1))
        sent = Signal()
        m.d.comb += [
            memory.read_request.valid.eq(read.request.valid),
            memory.read_request.payload.eq(
                Mux(self.read_inside, read.request.payload, self.read_base)),
            read.request.ready.eq(memory.read_request.ready),
            read.response.valid.eq(memory.read_response.valid),
            read.response.payload.eq(memory.read_response.payload),
            memory.read_response.ready.eq(read.response.ready),
            room.eq(waiting != self.outstanding),
            memory.write_request.valid.eq(write.request.valid & self.write_inside & room),
            memory.write_request.payload.eq(write.request.payload),
            write.request.ready.eq(Mux(self.write_inside, memory.write_request.ready & room, 1)),
            write.done.eq(memory.write_response.valid),
            sent.eq(memory.write_request.valid & memory.write_request.ready),
            self.violation.eq((read.request.valid & ~self.read_inside)
                              | (write.request.valid & ~self.write_inside)),
            self.settled.eq((waiting == 0) & ~sent),
        ]
        m.d.sync += waiting.eq(waiting + sent - memory.write_response.valid)
        return m
