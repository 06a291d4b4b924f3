"""The memory port: how the core and its units reach memory."""

from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["ReadPort", "WritePort", "MemoryPort", "write_layout"]


def write_layout(config):
    """Payload of a write request: word ``address``, ``data``, and a ``strobe`` bit a byte."""
    return data.StructLayout({
        "address": config.address_width,
        "data": config.port_width,
        "strobe": config.port_width // 8,
    })


class ReadPort(wiring.Signature):
    """Reads, seen from the unit that asks.

    Any number of requests may be in flight; responses come in the order of their requests, at
    least one cycle after them.

    Members
    -------
    request : ``Out(stream.Signature(address_width))``
        Word addresses.
    response : ``In(stream.Signature(port_width))``
        Words.
    """

    def __init__(self, config):
        super().__init__({
            "request": Out(stream.Signature(config.address_width)),
            "response": In(stream.Signature(config.port_width)),
        })


class WritePort(wiring.Signature):
    """Writes, seen from the unit that asks.

    Members
    -------
    request : ``Out(stream.Signature(write_layout(config)))``
        Word address, data and byte strobes.
    done : ``In(1)``
        High for one cycle for each write that has reached memory.
    """

    def __init__(self, config):
        super().__init__({
            "request": Out(stream.Signature(write_layout(config))),
            "done": In(1),
        })


class MemoryPort(wiring.Signature):
    """Independent read and write channels of the core.

    Members
    -------
    read_request, read_response, write_request
        The streams of `ReadPort` and `WritePort`.
    write_response : ``In(wiring.Signature({"valid": Out(1)}))``
        High for one cycle for each write that has reached memory; always taken.
    """

    def __init__(self, config):
        super().__init__({
            "read_request": Out(stream.Signature(config.address_width)),
            "read_response": In(stream.Signature(config.port_width)),
            "write_request": Out(stream.Signature(write_layout(config))),
            "write_response": In(wiring.Signature({"valid": Out(1)})),
        })
