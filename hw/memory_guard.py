"""The guard at the memory port: no access leaves a descriptor's windows."""

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .memory_port import MemoryPort, ReadPort, WritePort

__all__ = ["MemoryGuard"]


class MemoryGuard(wiring.Component):
    """Passes reads and writes on when they lie in their windows; adds no cycle.

    A read outside its window reads the window's first word instead, so that responses stay in
    order; a write outside is dropped. Both raise ``violation``.

    Members
    -------
    read, write : ``In(ReadPort)``, ``In(WritePort)``
        From the units.
    memory : ``Out(MemoryPort)``
    check : ``In(1)``
        Windows hold; else reads are not checked and writes are dropped.
    read_base, read_limit, write_base, write_limit : ``In``
        First word inside and first word after each window.
    violation : ``Out(1)``
        High in the cycle of an access outside.
    settled : ``Out(1)``
        No write is on its way.
    """

    outstanding = 1 << 10  # writes that may be on their way

    def __init__(self, config):
        self.config = config
        bound = config.address_width + 1
        super().__init__({
            "read": In(ReadPort(config)),
            "write": In(WritePort(config)),
            "memory": Out(MemoryPort(config)),
            "check": In(1),
            "read_base": In(bound),
            "read_limit": In(bound),
            "write_base": In(bound),
            "write_limit": In(bound),
            "violation": Out(1),
            "settled": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        read, write, memory = self.read, self.write, self.memory
        asked, address = read.request.payload, write.request.payload.address
        read_inside, write_inside, room = Signal(), Signal(), Signal()
        waiting = Signal(range(self.outstanding + 1))
        sent = Signal()
        m.d.comb += [
            read_inside.eq(~self.check | ((asked >= self.read_base) & (asked < self.read_limit))),
            write_inside.eq(
                self.check & (address >= self.write_base) & (address < self.write_limit)),
            memory.read_request.valid.eq(read.request.valid),
            memory.read_request.payload.eq(Mux(read_inside, asked, self.read_base)),
            read.request.ready.eq(memory.read_request.ready),
            read.response.valid.eq(memory.read_response.valid),
            read.response.payload.eq(memory.read_response.payload),
            memory.read_response.ready.eq(read.response.ready),
            room.eq(waiting != self.outstanding),
            memory.write_request.valid.eq(write.request.valid & write_inside & room),
            memory.write_request.payload.eq(write.request.payload),
            write.request.ready.eq(Mux(write_inside, memory.write_request.ready & room, 1)),
            write.done.eq(memory.write_response.valid),
            sent.eq(memory.write_request.valid & memory.write_request.ready),
            self.violation.eq((read.request.valid & ~read_inside)
                              | (write.request.valid & ~write_inside)),
            self.settled.eq((waiting == 0) & ~sent),
        ]
        m.d.sync += waiting.eq(waiting + sent - memory.write_response.valid)
        return m
