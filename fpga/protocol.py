"""The framed protocol between host and shell, as plain data; ``docs/board.md`` has it in bytes.

The host sends a request, the shell answers with one reply; then the next request may follow. Both
are ``sync, sequence, command or status, length (2 bytes, low first), payload, CRC (2 bytes, high
first)``; the CRC is over everything between sync and CRC. Numbers in payloads are low byte first.
"""

import binascii
import enum

__all__ = ["VERSION", "REQUEST_SYNC", "REPLY_SYNC", "BLOCK_BYTES", "ADDRESS_BYTES", "MAX_PAYLOAD",
           "Command", "Status", "crc", "frame"]

VERSION = 1
REQUEST_SYNC = 0xA5
REPLY_SYNC = 0x5A
BLOCK_BYTES = 1024  # most bytes of memory in a frame
ADDRESS_BYTES = 4   # of a memory address in a payload
MAX_PAYLOAD = ADDRESS_BYTES + BLOCK_BYTES


class Command(enum.IntEnum):
    """What a request asks for; payload -> payload of the reply."""

    IDENTIFY = 1        # nothing -> version, bytes in a word, bits of an address, words in a block
    READ_REGISTER = 2   # number -> value (4)
    WRITE_REGISTER = 3  # number, value (4) -> nothing
    READ_MEMORY = 4     # address (4), words (1) -> that many words
    WRITE_MEMORY = 5    # address (4), one or more words -> nothing


class Status(enum.IntEnum):
    """How a request ended; only an ``OK`` reply has a payload, and only then was anything done."""

    OK = 0       # carried out
    CRC = 1      # the CRC was wrong or a byte had no stop bit
    COMMAND = 2  # not a command
    LENGTH = 3   # not the length of this command's payload, or more than `MAX_PAYLOAD`
    ADDRESS = 4  # no such register, not readable or not writable, or outside the memory
    BUSY = 5     # memory belongs to the pass that is running
    TIMEOUT = 6  # the frame stopped before its end


def crc(data):
    """CRC-16/IBM-3740 (polynomial 0x1021, initially 0xFFFF) of bytes."""
    return binascii.crc_hqx(data, 0xFFFF)


def frame(sync, sequence, code, payload=b""):
    """Bytes of a request or reply; `code` is the command or the status."""
    body = bytes([sequence, code]) + len(payload).to_bytes(2, "little") + payload
    return bytes([sync]) + body + crc(body).to_bytes(2, "big")
