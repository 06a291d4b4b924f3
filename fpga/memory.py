"""Block RAM behind the core's memory port."""

from amaranth.hdl import Module, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In

from hw.memory_port import MemoryPort, write_layout

__all__ = ["BlockMemory"]


class BlockMemory(wiring.Component):
    """Memory for the whole address space, ``2 ** address_width`` port words.

    One read and one write a cycle. A response comes `latency` cycles after its request; while
    responses wait, up to `capacity` reads are taken. A write is answered in the next cycle;
    a read requested after the answer sees it, one requested before may or may not. The contents are
    zero after configuration.

    Parameters
    ----------
    config : hw.config.Config

    Attributes
    ----------
    latency : int
        4: registers in front of the block RAM, block RAM, its output register, response queue.
    capacity : int
        5: one request a cycle as long as responses are taken.

    Members
    -------
    port : ``In(MemoryPort(config))``
        Both channels.
    """

    latency = 4
    capacity = 5

    def __init__(self, config):
        self._config = config
        super().__init__({"port": In(MemoryPort(config))})

    def elaborate(self, platform):
        m = Module()
        port = self.port

        m.submodules.memory = memory = Memory(
            shape=self._config.port_width, depth=2 ** self._config.address_width, init=[])
        write = memory.write_port(granularity=8)
        read = memory.read_port()
        m.submodules.queue = queue = fifo.SyncFIFO(
            width=self._config.port_width, depth=self.capacity)

        # Requests go through registers, since many block RAMs hang on their wires.
        asked, taken = Signal(), Signal()
        free = Signal(range(self.capacity + 1), init=self.capacity)
        address = Signal(self._config.address_width)
        in_front, in_memory, in_register = Signal(), Signal(), Signal()
        m.d.comb += [
            port.read_request.ready.eq(free != 0),
            asked.eq(port.read_request.valid & port.read_request.ready),
            taken.eq(port.read_response.valid & port.read_response.ready),
            read.addr.eq(address),
        ]
        m.d.sync += [
            free.eq(free - asked + taken),
            address.eq(port.read_request.payload),
            in_front.eq(asked),
            in_memory.eq(in_front),
            in_register.eq(in_memory),
            queue.w_data.eq(read.data),
        ]
        m.d.comb += [
            queue.w_en.eq(in_register),
            port.read_response.valid.eq(queue.r_rdy),
            port.read_response.payload.eq(queue.r_data),
            queue.r_en.eq(port.read_response.ready),
        ]

        written = Signal(write_layout(self._config))
        m.d.sync += [
            written.eq(port.write_request.p),
            port.write_response.valid.eq(port.write_request.valid),
        ]
        m.d.comb += [
            port.write_request.ready.eq(1),
            write.addr.eq(written.address),
            write.data.eq(written.data),
            write.en.eq(written.strobe & port.write_response.valid.replicate(
                self._config.port_width // 8)),
        ]

        return m
