"""A core for tests of the shell: the real one's ports and registers, but a pass only copies.

A pass copies ``height`` words from ``source`` to ``destination``; one with another version ends
with the error `Error.VERSION`. It keeps registers as the real core does, and counts the words.
"""

from amaranth.back import verilog
from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw import registers
from hw.descriptor import FIELDS, VERSION, WORDS, Error
from hw.memory_port import MemoryPort
from hw.registers import number

__all__ = ["StandIn", "generate"]


class StandIn(wiring.Component):
    """The ports of `hw.core.Core`."""

    def __init__(self, config):
        self._config = config
        super().__init__({
            "csr_address": In(5),
            "csr_write": In(1),
            "csr_write_data": In(32),
            "csr_read": In(1),
            "csr_read_data": Out(32),
            "interrupt": Out(1),
            "memory": Out(MemoryPort(config)),
        })

    def elaborate(self, platform):
        m = Module()
        memory = self.memory
        per_word = self._config.port_width // 32

        descriptor, evaluation, entry, total = (Signal(32, name=name) for name in (
            "descriptor", "evaluation", "entry", "total"))
        counts = [Signal(16, name=f"count_{n}") for n in range(4)]
        done, error = Signal(), Signal(8)
        busy = Signal()
        m.d.comb += self.interrupt.eq(done)

        parameters = (VERSION | self._config.vector << 8 | self._config.dense_lanes << 16
                      | self._config.sparse_pes << 24)
        values = {
            "identity": Const(registers.IDENTITY, 32), "parameters": Const(parameters, 32),
            "status": busy | done << 1 | error << 8, "descriptor": descriptor,
            "evaluation": evaluation[:16], "detector_entry": entry, "total_cycles": total,
        }
        with m.If(self.csr_read):
            with m.Switch(self.csr_address):
                for name, value in values.items():
                    with m.Case(number(name)):
                        m.d.sync += self.csr_read_data.eq(value)
                with m.Case(number("detector_count")):
                    m.d.sync += entry.eq(entry + 1)
                    with m.Switch(entry):
                        for n, count in enumerate(counts):
                            with m.Case(n):
                                m.d.sync += self.csr_read_data.eq(count)
                with m.Default():
                    m.d.sync += self.csr_read_data.eq(0)

        start = Signal()
        with m.If(self.csr_write):
            with m.Switch(self.csr_address):
                for name, register in {"descriptor": descriptor, "evaluation": evaluation,
                                       "detector_entry": entry}.items():
                    with m.Case(number(name)):
                        m.d.sync += register.eq(self.csr_write_data)
                with m.Case(number("control")):
                    m.d.comb += start.eq(self.csr_write_data[0])
                with m.Case(number("detector_count")):
                    m.d.sync += entry.eq(entry + 1)
                    with m.Switch(entry):
                        for n, count in enumerate(counts):
                            with m.Case(n):
                                m.d.sync += count.eq(self.csr_write_data)

        table = Signal(WORDS * 32)
        fields = {name: table[32 * word + low:32 * word + low + bits]
                  for name, (word, low, bits, _) in FIELDS.items()}
        index, left = Signal(16), Signal(16)
        source, destination = Signal(32), Signal(32)
        waiting = Signal(16)  # writes that were not answered yet; must never go below 0
        m.d.sync += waiting.eq(waiting + (memory.write_request.valid & memory.write_request.ready)
                               - memory.write_response.valid)
        with m.If(busy):
            m.d.sync += total.eq(total + 1)

        with m.FSM(name="pass"):
            with m.State("Idle"):
                with m.If(start):
                    m.d.sync += [busy.eq(1), done.eq(0), index.eq(0), total.eq(0)]
                    m.next = "Ask descriptor"
            with m.State("Ask descriptor"):
                m.d.comb += [memory.read_request.valid.eq(1),
                             memory.read_request.payload.eq(descriptor + index)]
                with m.If(memory.read_request.ready):
                    m.next = "Take descriptor"
            with m.State("Take descriptor"):
                m.d.comb += memory.read_response.ready.eq(1)
                with m.If(memory.read_response.valid):
                    m.d.sync += [
                        table.eq((memory.read_response.payload << (WORDS * 32)
                                  | table) >> self._config.port_width),
                        index.eq(index + 1),
                    ]
                    m.next = "Ask descriptor"
                    with m.If(index == WORDS // per_word - 1):
                        m.next = "Check"
            with m.State("Check"):
                m.d.sync += [source.eq(fields["source"]), destination.eq(fields["destination"]),
                             left.eq(fields["height"]), error.eq(Error.NONE)]
                m.next = "Ask"
                with m.If(fields["version"] != VERSION):
                    m.d.sync += [error.eq(Error.VERSION), left.eq(0)]
            with m.State("Ask"):
                m.d.comb += [memory.read_request.valid.eq(left != 0),
                             memory.read_request.payload.eq(source)]
                with m.If(left == 0):
                    m.next = "End"
                with m.Elif(memory.read_request.ready):
                    m.next = "Copy"
            with m.State("Copy"):
                m.d.comb += [
                    memory.write_request.valid.eq(memory.read_response.valid),
                    memory.write_request.payload.eq(Cat(
                        destination[:self._config.address_width], memory.read_response.payload,
                        Const(1).replicate(self._config.port_width // 8))),
                    memory.read_response.ready.eq(memory.write_request.ready),
                ]
                with m.If(memory.write_request.valid & memory.write_request.ready):
                    m.d.sync += [source.eq(source + 1), destination.eq(destination + 1),
                                 left.eq(left - 1)]
                    m.next = "Ask"
            with m.State("End"):
                with m.If(waiting == 0):
                    m.d.sync += [busy.eq(0), done.eq(1)]
                    m.next = "Idle"

        return m


def generate(config):
    """Verilog of the stand-in as module ``sqdm_core``."""
    core = StandIn(config)
    ports = {}
    for path, _, port in core.signature.flatten(core):
        value = Value.cast(port)
        # Not the constant `ready` and the empty payload of the stream of write responses.
        if isinstance(value, Signal) and len(value):
            ports["__".join(path)] = (value, None)
    return verilog.convert(core, name="sqdm_core", ports=ports, emit_src=False)
