"""The UART shell: a core's registers and memory for a host at the other end of a serial line."""

from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from hw import registers
from hw.memory_port import MemoryPort

from . import protocol
from .framing import Deframer, Framer
from .memory import BlockMemory
from .protocol import Command, Status
from .uart import Receiver, Transmitter

__all__ = ["Shell"]

BUSY_BIT = registers.REGISTERS["status"][2]["busy"][0]
ERROR_LOW, ERROR_BITS, _ = registers.REGISTERS["status"][2]["error"]


def accessible(access):
    """Mask of the numbers of registers that allow `access` (``read`` or ``write``)."""
    table = registers.REGISTERS.values()
    return sum(1 << number for number, allowed, _ in table if access in allowed)


class Shell(wiring.Component):
    """Serve the requests of `fpga.protocol` from a serial line, and hold the core's memory.

    One request is carried out at a time, after its CRC was checked. Registers can be accessed at
    any time, memory while no pass runs. A register access whose sequence number is the same as the
    last request's is not repeated: the reply is that of the first time, so that a host may ask
    again after a lost reply even where an access has side effects.

    Parameters
    ----------
    config : hw.config.Config
        Of the core; the memory has ``2 ** address_width`` port words.
    divisor : int
        Clock cycles per bit of the line.
    timeout : int
        Clock cycles between two bytes of a request after which it is given up.

    Members
    -------
    rx : ``In(1)``, tx : ``Out(1)``
        The line.
    csr_address, csr_write, csr_write_data, csr_read, csr_read_data
        To the core's register port.
    memory : ``In(MemoryPort(config))``
        From the core.
    busy : ``Out(1)``
        A pass is running.
    error : ``Out(1)``
        The last pass ended with an error.
    """

    def __init__(self, config, *, divisor, timeout):
        self._config = config
        self._divisor = divisor
        self._timeout = timeout
        super().__init__({
            "rx": In(1, init=1),
            "tx": Out(1, init=1),
            "csr_address": Out(5),
            "csr_write": Out(1),
            "csr_write_data": Out(32),
            "csr_read": Out(1),
            "csr_read_data": In(32),
            "memory": In(MemoryPort(config)),
            "busy": Out(1),
            "error": Out(1),
        })

    def elaborate(self, platform):
        m = Module()

        m.submodules.receiver = receiver = Receiver(self._divisor)
        m.submodules.deframer = deframer = Deframer(self._timeout)
        m.submodules.framer = framer = Framer()
        m.submodules.transmitter = transmitter = Transmitter(self._divisor)
        m.submodules.memory = memory = BlockMemory(self._config)
        wiring.connect(m, receiver.o, deframer.i)
        wiring.connect(m, framer.o, transmitter.i)
        m.d.comb += [receiver.rx.eq(self.rx), self.tx.eq(transmitter.tx)]

        word_bytes = self._config.port_width // 8
        words = 2 ** self._config.address_width
        block_words = protocol.BLOCK_BYTES // word_bytes
        identification = int.from_bytes(
            [protocol.VERSION, word_bytes, self._config.address_width, block_words], "little")

        # The request, as long as the deframer holds it.
        request = deframer.o.p
        number = request.argument[0]
        first = Cat(*request.argument[:protocol.ADDRESS_BYTES])
        data_bytes = Signal(16)  # of a write
        count = Signal(16)       # words of a block

        executed = Signal(data.StructLayout({"valid": 1, "sequence": 8}))
        repeated = executed.valid & (executed.sequence == request.sequence)

        reply = framer.i_header.p
        value = Signal(data.ArrayLayout(8, 4))
        address = Signal(self._config.address_width)
        left = Signal(range(block_words + 1))  # words to send
        byte = Signal(range(word_bytes))       # in the word
        index = Signal(16)                     # in the payload of a write
        last_byte = byte == word_bytes - 1
        m.d.comb += [
            reply.sequence.eq(request.sequence),
            deframer.payload_address.eq(index),
        ]

        # The host has the memory while it accesses it, the core otherwise.
        access = MemoryPort(self._config).create()
        host = Signal()
        with m.If(host):
            wiring.connect(m, access, memory.port)
        with m.Else():
            wiring.connect(m, wiring.flipped(self.memory), memory.port)
        m.d.comb += [
            access.read_request.payload.eq(address),
            access.write_request.p.address.eq(address),
            access.write_request.p.data.eq(deframer.payload_data.replicate(word_bytes)),
            access.write_request.p.strobe.eq(1 << byte),
        ]

        polled = Signal()
        m.d.sync += polled.eq(0)
        with m.If(polled):
            m.d.sync += [
                self.busy.eq(self.csr_read_data[BUSY_BIT]),
                self.error.eq(self.csr_read_data[ERROR_LOW:ERROR_LOW + ERROR_BITS] != 0),
            ]

        def refuse(status):
            m.d.sync += [reply.status.eq(status), reply.length.eq(0)]
            m.next = "Reply"

        def execute(then, reply_length=0):
            m.d.sync += [
                reply.status.eq(Status.OK),
                reply.length.eq(reply_length),
                executed.valid.eq(1),
                executed.sequence.eq(request.sequence),
            ]
            m.next = then

        def judge_register(access, length, then, reply_length):
            with m.If(request.length != length):
                refuse(Status.LENGTH)
            with m.Elif((number >= 32) | ~Const(accessible(access), 32).bit_select(number[:5], 1)):
                refuse(Status.ADDRESS)
            with m.Elif(repeated):
                execute("Reply", reply_length)
            with m.Else():
                execute(then, reply_length)

        def judge_memory(length_fits, then, reply_length):
            with m.If(~length_fits | (count == 0) | (count > block_words)):
                refuse(Status.LENGTH)
            with m.Elif(first + count > words):
                refuse(Status.ADDRESS)
            with m.Elif(self.busy):
                refuse(Status.BUSY)
            with m.Else():
                execute(then, reply_length)

        with m.FSM(name="serve"):
            with m.State("Idle"):
                m.d.comb += [
                    self.csr_read.eq(1),
                    self.csr_address.eq(registers.number("status")),
                ]
                m.d.sync += polled.eq(1)
                m.d.sync += data_bytes.eq(request.length - protocol.ADDRESS_BYTES)
                with m.If(deframer.o.valid):
                    m.next = "Measure"
            with m.State("Measure"):
                m.d.sync += count.eq(request.argument[protocol.ADDRESS_BYTES])
                with m.If(request.command == Command.WRITE_MEMORY):
                    m.d.sync += count.eq(data_bytes[exact_log2(word_bytes):])
                m.next = "Judge"
            with m.State("Judge"):
                m.d.sync += [address.eq(first), left.eq(count), byte.eq(0),
                             index.eq(protocol.ADDRESS_BYTES)]
                with m.If(request.status != Status.OK):
                    refuse(request.status)
                with m.Else():
                    with m.Switch(request.command):
                        with m.Case(Command.IDENTIFY):
                            with m.If(request.length != 0):
                                refuse(Status.LENGTH)
                            with m.Else():
                                m.d.sync += Value.cast(value).eq(identification)
                                execute("Reply", 4)
                        with m.Case(Command.READ_REGISTER):
                            judge_register("read", 1, "Read register", 4)
                        with m.Case(Command.WRITE_REGISTER):
                            judge_register("write", 5, "Write register", 0)
                        with m.Case(Command.READ_MEMORY):
                            judge_memory(request.length == protocol.ADDRESS_BYTES + 1, "Reply",
                                         count << exact_log2(word_bytes))
                        with m.Case(Command.WRITE_MEMORY):
                            judge_memory(data_bytes[:exact_log2(word_bytes)] == 0, "Fetch byte", 0)
                        with m.Default():
                            refuse(Status.COMMAND)

            with m.State("Read register"):
                m.d.comb += [self.csr_read.eq(1), self.csr_address.eq(number)]
                m.next = "Take register"
            with m.State("Take register"):
                m.d.sync += Value.cast(value).eq(self.csr_read_data)
                m.next = "Reply"
            with m.State("Write register"):
                m.d.comb += [
                    self.csr_write.eq(1),
                    self.csr_address.eq(number),
                    self.csr_write_data.eq(Cat(*request.argument[1:])),
                ]
                m.next = "Reply"

            with m.State("Fetch byte"):
                m.d.comb += host.eq(1)
                m.next = "Store byte"
            with m.State("Store byte"):
                m.d.comb += [host.eq(1), access.write_request.valid.eq(1)]
                with m.If(access.write_request.ready):
                    m.d.sync += [byte.eq(byte + 1), address.eq(address + last_byte),
                                 index.eq(index + 1)]
                    m.next = "Await answer"
            # The answer must not reach the core, which has written nothing.
            with m.State("Await answer"):
                m.d.comb += host.eq(1)
                with m.If(access.write_response.valid):
                    m.next = "Fetch byte"
                    with m.If(index == request.length):
                        m.next = "Reply"

            with m.State("Reply"):
                m.d.comb += framer.i_header.valid.eq(1)
                with m.If(framer.i_header.ready):
                    m.next = "Send value"
                    with m.If(reply.length == 0):
                        m.next = "Finish"
                    with m.Elif(request.command == Command.READ_MEMORY):
                        m.next = "Ask word"
            with m.State("Send value"):
                m.d.comb += [
                    framer.i_payload.valid.eq(1),
                    framer.i_payload.payload.eq(value[byte[:2]]),
                ]
                with m.If(framer.i_payload.ready):
                    m.d.sync += byte.eq(byte + 1)
                    with m.If(byte == 3):
                        m.next = "Finish"
            with m.State("Ask word"):
                m.d.comb += [host.eq(1), access.read_request.valid.eq(1)]
                with m.If(access.read_request.ready):
                    m.next = "Send word"
            with m.State("Send word"):
                sent = access.read_response.valid & framer.i_payload.ready
                m.d.comb += [
                    host.eq(1),
                    framer.i_payload.valid.eq(access.read_response.valid),
                    framer.i_payload.payload.eq(
                        access.read_response.payload.word_select(byte, 8)),
                    access.read_response.ready.eq(framer.i_payload.ready & last_byte),
                ]
                with m.If(sent):
                    m.d.sync += byte.eq(byte + 1)
                with m.If(sent & last_byte):
                    m.d.sync += [address.eq(address + 1), left.eq(left - 1)]
                    m.next = "Ask word"
                    with m.If(left == 1):
                        m.next = "Finish"
            with m.State("Finish"):
                m.d.comb += deframer.o.ready.eq(1)
                m.next = "Idle"

        return m
