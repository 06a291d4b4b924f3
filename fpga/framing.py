"""Frames out of received bytes, and replies into bytes to send; see `fpga.protocol`."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.crc import catalog
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from . import protocol
from .protocol import Status

__all__ = ["Deframer", "Framer", "request_layout", "reply_layout"]

BUFFER_BYTES = 2048  # one block RAM of the ECP5; holds `protocol.MAX_PAYLOAD`
CRC = catalog.CRC16_IBM_3740(8)  # what `protocol.crc` computes


def request_layout():
    """A checked request: header, the payload's first five bytes, and what is wrong so far."""
    return data.StructLayout({
        "sequence": 8,
        "command": 8,
        "length": 16,
        "argument": data.ArrayLayout(8, protocol.ADDRESS_BYTES + 1),
        "status": Status,
    })


def reply_layout():
    """Header of a reply."""
    return data.StructLayout({"sequence": 8, "status": Status, "length": 16})


class Deframer(wiring.Component):
    """Find requests among received bytes and check them.

    Bytes are skipped until a sync byte. Every sync byte taken for one leads to exactly one request
    at the output: two cycles after its last byte with status ``OK``, or ``CRC`` if the CRC does not
    match or a byte had an error; right after the header with ``LENGTH`` if no frame can be that
    long; with ``TIMEOUT`` if no byte came for `timeout` cycles. From a frame's last byte until its
    request is taken, bytes are dropped; meanwhile the payload can be read. Then the search for a
    sync byte goes on.

    Parameters
    ----------
    timeout : int
        Cycles between two bytes of a frame after which the rest is given up.

    Members
    -------
    i : ``In(stream.Signature({data: 8, error: 1}, always_ready=True))``
        Received bytes.
    o : ``Out(stream.Signature(request_layout()))``
        Requests.
    payload_address : ``In(11)``
        Byte of the payload to read.
    payload_data : ``Out(8)``
        That byte, one cycle later.

    Raises
    ------
    ValueError
        If `timeout` is not positive.
    """

    def __init__(self, timeout):
        if timeout < 1:
            raise ValueError(f"timeout must be positive, not {timeout!r}")
        self._timeout = timeout
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({"data": 8, "error": 1}),
                                     always_ready=True)),
            "o": Out(stream.Signature(request_layout())),
            "payload_address": In(range(BUFFER_BYTES)),
            "payload_data": Out(8),
        })

    def elaborate(self, platform):
        m = Module()

        m.submodules.crc = crc = CRC.create()
        m.submodules.buffer = buffer = Memory(shape=8, depth=BUFFER_BYTES, init=[])
        write = buffer.write_port()
        read = buffer.read_port()
        m.d.comb += [
            read.addr.eq(self.payload_address),
            self.payload_data.eq(read.data),
        ]

        request = self.o.p
        index = Signal(range(BUFFER_BYTES))
        length = Signal(16)
        broken = Signal()
        patience = Signal(range(self._timeout + 1))

        m.d.comb += [
            write.addr.eq(index),
            write.data.eq(self.i.p.data),
            crc.data.eq(self.i.p.data),
        ]

        def end(status):
            m.d.sync += request.status.eq(status)
            m.next = "Hold"

        def receive(store):
            """Take the next byte into the CRC and do `store`, or give up."""
            with m.If(self.i.valid):
                m.d.comb += crc.valid.eq(1)
                m.d.sync += [
                    patience.eq(self._timeout),
                    broken.eq(broken | self.i.p.error),
                    index.eq(index + 1),
                    store,
                ]
            with m.Elif(patience == 0):
                end(Status.TIMEOUT)
            with m.Else():
                m.d.sync += patience.eq(patience - 1)

        def header(name, store, then):
            with m.State(name):
                receive(store)
                with m.If(self.i.valid):
                    m.next = then

        with m.FSM(name="receive"):
            with m.State("Hunt"):
                m.d.comb += crc.start.eq(1)
                m.d.sync += [broken.eq(0), index.eq(0), patience.eq(self._timeout)]
                with m.If(self.i.valid & ~self.i.p.error
                          & (self.i.p.data == protocol.REQUEST_SYNC)):
                    m.next = "Sequence"
            header("Sequence", request.sequence.eq(self.i.p.data), "Command")
            header("Command", request.command.eq(self.i.p.data), "Length low")
            header("Length low", request.length[:8].eq(self.i.p.data), "Length high")
            with m.State("Length high"):
                m.d.comb += length.eq(Cat(request.length[:8], self.i.p.data))
                receive([request.length.eq(length), index.eq(0)])
                with m.If(self.i.valid):
                    m.next = "Payload"
                    with m.If(length > protocol.MAX_PAYLOAD):
                        end(Status.LENGTH)
                    with m.Elif(length == 0):
                        m.next = "Check high"
            with m.State("Payload"):
                m.d.comb += write.en.eq(self.i.valid)
                receive([])
                with m.If(self.i.valid):
                    with m.If(index < len(request.argument)):
                        m.d.sync += request.argument[index].eq(self.i.p.data)
                    with m.If(index + 1 == request.length):
                        m.next = "Check high"
            header("Check high", [], "Check low")
            header("Check low", [], "Judge")
            with m.State("Judge"):
                with m.If(broken | ~crc.match_detected):
                    end(Status.CRC)
                with m.Else():
                    end(Status.OK)
            with m.State("Hold"):
                m.d.comb += self.o.valid.eq(1)
                with m.If(self.o.ready):
                    m.next = "Hunt"

        return m


class Framer(wiring.Component):
    """Make a reply out of a header and a payload.

    Takes a header when the reply before has been handed on, then as many bytes of payload as the
    header says, one for each byte handed on.

    Members
    -------
    i_header : ``In(stream.Signature(reply_layout()))``
        Headers.
    i_payload : ``In(stream.Signature(8))``
        Bytes of payload; not taken between replies.
    o : ``Out(stream.Signature(8))``
        Bytes to send.
    """

    i_header: In(stream.Signature(reply_layout()))
    i_payload: In(stream.Signature(8))
    o: Out(stream.Signature(8))

    def elaborate(self, platform):
        m = Module()

        m.submodules.crc = crc = CRC.create()
        header = Signal(reply_layout())
        left = Signal(16)
        sent = Signal()

        m.d.comb += [
            sent.eq(self.o.valid & self.o.ready),
            crc.data.eq(self.o.payload),
        ]

        def send(byte, then, *, checked=True):
            m.d.comb += [
                self.o.valid.eq(1),
                self.o.payload.eq(byte),
                crc.valid.eq(sent & checked),
            ]
            with m.If(sent):
                m.next = then

        with m.FSM(name="send"):
            with m.State("Idle"):
                m.d.comb += [self.i_header.ready.eq(1), crc.start.eq(1)]
                m.d.sync += [header.eq(self.i_header.p), left.eq(self.i_header.p.length)]
                with m.If(self.i_header.valid):
                    m.next = "Sync"
            with m.State("Sync"):
                send(protocol.REPLY_SYNC, "Sequence", checked=False)
            with m.State("Sequence"):
                send(header.sequence, "Status")
            with m.State("Status"):
                send(header.status, "Length low")
            with m.State("Length low"):
                send(header.length[:8], "Length high")
            with m.State("Length high"):
                send(header.length[8:], "Payload")
            with m.State("Payload"):
                with m.If(left == 0):
                    m.next = "Check high"
                with m.Else():
                    m.d.comb += self.i_payload.ready.eq(self.o.ready)
                    m.d.sync += left.eq(left - sent)
                    send(self.i_payload.payload, "Payload")
                    m.d.comb += self.o.valid.eq(self.i_payload.valid)
            with m.State("Check high"):
                send(crc.crc[8:], "Check low", checked=False)
            with m.State("Check low"):
                send(crc.crc[:8], "Idle", checked=False)

        return m
