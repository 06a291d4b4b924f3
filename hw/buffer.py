"""On-chip memory behind a request/response port."""

from amaranth import Module, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Buffer", "WideBuffer", "memory_attributes"]

SHALLOW = 64   # words of which LUT RAM takes less than the block RAMs that they would leave empty


def memory_attributes(depth):
    """Attributes of a memory of ``depth`` words whose reads never meet a write of the same word.

    Without the first one synthesis adds logic that keeps the old word.
    """
    return {"no_rw_check": 1} | ({"ram_style": "distributed"} if depth <= SHALLOW else {})


class Buffer(wiring.Component):
    """A memory with one write and one read port.

    A read takes `latency` = 2 cycles (block RAM and its output register) and one can start every
    cycle. A word that is written while it is read comes out as it was before in simulation, but as
    anything in block RAM: what waits for such a read must not use it.

    Parameters
    ----------
    depth : int
        Words.
    width : int
        Bits of a word.
    columns : int
        Parts of a word that are written separately, each ``width // columns`` bits.

    Members
    -------
    write : ``In(columns)``
        Which columns to write in this cycle.
    write_address, write_data : ``In``
        Where and what.
    request : ``In(1)``
        Start a read of ``address``.
    address : ``In``
        Word to read.
    response : ``Out(1)``
        High `latency` cycles after ``request``, while ``data`` is the word.
    data : ``Out(width)``
        The word.
    """

    latency = 2

    def __init__(self, depth, width, columns=1):
        if width % columns:
            raise ValueError(f"columns must divide width {width}, not {columns!r}")
        self.depth, self.width, self.columns = depth, width, columns
        bits = max(1, (depth - 1).bit_length())
        super().__init__({
            "write": In(columns),
            "write_address": In(bits),
            "write_data": In(width),
            "request": In(1),
            "address": In(bits),
            "response": Out(1),
            "data": Out(width),
        })

    def connect_load(self, m, load):
        """Let ``load``, a `hw.job.load_layout`, write; all columns are offered the same data."""
        m.d.comb += [
            self.write.eq(load.enable),
            self.write_address.eq(load.address),
            self.write_data.eq(load.data.replicate(self.columns)),
        ]

    def elaborate(self, platform):
        m = Module()
        m.submodules.store = store = memory.Memory(
            shape=self.width, depth=self.depth, init=[], attrs=memory_attributes(self.depth))
        write = store.write_port(granularity=self.width // self.columns)
        read = store.read_port()
        requested = Signal()
        m.d.comb += [
            write.addr.eq(self.write_address),
            write.data.eq(self.write_data),
            write.en.eq(self.write),
            read.addr.eq(self.address),
            read.en.eq(self.request),
        ]
        m.d.sync += [
            requested.eq(self.request),
            self.response.eq(requested),
        ]
        with m.If(requested):
            m.d.sync += self.data.eq(read.data)
        return m


class WideBuffer(Buffer):
    """A `Buffer` made of buffers of at most 32 bits, each of which fits the width of block RAMs.

    A single wide memory would be built from shallow block RAMs with multiplexers behind them.
    """

    def elaborate(self, platform):
        m = Module()
        size = self.width // self.columns
        for column in range(self.columns):
            for first in range(column * size, (column + 1) * size, 32):
                end = min(first + 32, (column + 1) * size)
                m.submodules[f"bits_{first}"] = part = Buffer(self.depth, end - first)
                m.d.comb += [
                    part.write.eq(self.write[column]),
                    part.write_address.eq(self.write_address),
                    part.write_data.eq(self.write_data[first:end]),
                    part.request.eq(self.request),
                    part.address.eq(self.address),
                    self.data[first:end].eq(part.data),
                ]
        m.d.comb += self.response.eq(part.response)
        return m
