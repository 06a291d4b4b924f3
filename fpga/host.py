"""The host's end of the UART shell: registers, memory and passes of a core on a board."""

import time

from hw import descriptor, registers

from . import protocol
from .protocol import Command, Status

__all__ = ["Host", "HostError"]

# What a request damaged on the line leads to; `Host` itself never sends a wrong length.
DAMAGED = (Status.CRC, Status.TIMEOUT, Status.LENGTH)


class HostError(Exception):
    """A request that failed, in one line."""

    exit_code = 1


class Host:
    """Talk to a shell.

    Requests and replies that are damaged on the line are sent again; the shell does not repeat
    what it has done already. The constructor identifies shell and core.

    Parameters
    ----------
    port : object with ``read(n)`` and ``write(data)``
        The line. ``read`` returns `n` bytes, or fewer if they do not come for longer than the
        shell's timeout, as `serial.Serial` with a ``timeout`` does; see `open`.
    retries : int
        How often a request is sent again.
    clock : callable
        Seconds, for the timeout of `run`.

    Attributes
    ----------
    word_bytes : int
        Bytes of a memory word.
    words : int
        Words of the memory.
    retried : int
        Requests sent again so far.

    Raises
    ------
    HostError
        If no shell answers, it speaks another version, or there is no core behind it.
    """

    def __init__(self, port, *, retries=3, clock=time.monotonic):
        self._port = port
        self._retries = retries
        self._clock = clock
        self._sequence = 0
        self.retried = 0
        version, self.word_bytes, address_width, self._block_words = self._request(
            Command.IDENTIFY, b"", 4)
        if version != protocol.VERSION:
            raise HostError(f"shell's protocol version must be {protocol.VERSION}, not {version}")
        self.words = 1 << address_width
        if (identity := self.read_register("identity")) != registers.IDENTITY:
            raise HostError(f"core's identity must be 0x{registers.IDENTITY:08X},"
                            f" not 0x{identity:08X}")
        if (version := self.read_fields("parameters")["version"]) != descriptor.VERSION:
            raise HostError(
                f"core's descriptor version must be {descriptor.VERSION}, not {version}")

    @classmethod
    def open(cls, device, baud, **options):
        """Host on a serial device such as ``/dev/ttyUSB0``; `options` as for the class.

        As a context manager it closes the device at the end.

        Raises
        ------
        HostError
            If the device cannot be opened, or as the class does.
        """
        import serial

        try:
            port = serial.Serial(device, baud, timeout=0.5)
        except (OSError, ValueError) as error:
            raise HostError(f"{device}: cannot be opened: {error}") from None
        try:
            return cls(port, **options)
        except BaseException:
            port.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._port.close()

    def read_register(self, name):
        """Value of a register.

        Raises
        ------
        HostError
            If there is no such register, or it cannot be read.
        """
        data = self._request(Command.READ_REGISTER, bytes([number(name, "read")]), 4)
        return int.from_bytes(data, "little")

    def read_fields(self, name):
        """Fields of a register by name; raises as `read_register`."""
        value = self.read_register(name)
        fields = registers.REGISTERS[name][2].items()
        return {field: value >> low & (1 << bits) - 1 for field, (low, bits, _) in fields}

    def write_register(self, name, value):
        """Write a register.

        Raises
        ------
        HostError
            If there is no such register, it cannot be written, or `value` is not of 32 bits.
        """
        if not 0 <= value < 1 << 32:
            raise HostError(f"value of register {name} must fit 32 bits, not {value!r}")
        payload = bytes([number(name, "write")]) + value.to_bytes(4, "little")
        self._request(Command.WRITE_REGISTER, payload, 0)

    def write_memory(self, address, data):
        """Write `data`, bytes of whole words, from word `address` on.

        Raises
        ------
        HostError
            If `data` is not of whole words or does not fit, or a pass is running.
        """
        data = bytes(data)
        if len(data) % self.word_bytes:
            raise HostError(f"data must be whole words of {self.word_bytes} bytes,"
                            f" not {len(data)} bytes")
        self._check_range(address, len(data) // self.word_bytes)
        step = self._block_words * self.word_bytes
        for start in range(0, len(data), step):
            first = address + start // self.word_bytes
            self._request(Command.WRITE_MEMORY, memory_address(first) + data[start:start + step], 0)

    def read_memory(self, address, words):
        """Bytes of `words` words from word `address` on.

        Raises
        ------
        HostError
            If the words are not all in memory, or a pass is running.
        """
        self._check_range(address, words)
        blocks = []
        for first in range(address, address + words, self._block_words):
            count = min(self._block_words, address + words - first)
            blocks.append(self._request(
                Command.READ_MEMORY, memory_address(first) + bytes([count]),
                count * self.word_bytes))
        return b"".join(blocks)

    def run(self, address, *, evaluation=None, timeout=10.0):
        """Run the pass whose descriptor is at word `address`, and return the counters by name.

        Raises
        ------
        HostError
            If the pass ends with an error or does not end within `timeout` seconds.
        """
        if evaluation is not None:
            self.write_register("evaluation", evaluation)
        self.write_register("descriptor", address)
        self.write_register("control", 1)
        end = self._clock() + timeout
        while not (status := self.read_fields("status"))["done"]:
            if self._clock() > end:
                raise HostError(f"pass at word {address} must end within {timeout} s")
        if status["error"]:
            known = status["error"] in iter(descriptor.Error)
            name = descriptor.Error(status["error"]).name if known else "unknown"
            raise HostError(f"pass at word {address} ended with error {status['error']} ({name})")
        return {name: self.read_register(name) for name in registers.COUNTERS}

    def _check_range(self, address, words):
        if not 0 <= address <= address + words <= self.words:
            raise HostError(f"words {address} to {address + words - 1} must lie in the memory of"
                            f" {self.words} words")

    def _request(self, command, payload, length):
        """Payload of the reply, `length` bytes."""
        self._sequence = (self._sequence + 1) % 256
        message = protocol.frame(protocol.REQUEST_SYNC, self._sequence, command, payload)
        for attempt in range(1 + self._retries):
            if attempt:
                self.retried += 1
                while self._port.read(protocol.MAX_PAYLOAD):
                    pass
            self._port.write(message)
            status, data = self._reply()
            if status is None or status in DAMAGED:
                fault = data if status is None else f"shell received it with {status.name} error"
            elif status != Status.OK:
                raise HostError(f"{command.name} was refused: {status.name}")
            elif len(data) != length:
                fault = f"reply of {len(data)} bytes instead of {length}"
            else:
                return data
        raise HostError(f"{command.name} failed {1 + self._retries} times: {fault}")

    def _reply(self):
        """Status and payload of the reply to the last request, or None and what was wrong."""
        while True:
            while (sync := self._port.read(1)) != bytes([protocol.REPLY_SYNC]):
                if not sync:
                    return None, "no reply"
            header = self._port.read(4)
            length = int.from_bytes(header[2:], "little")
            if len(header) < 4 or length > protocol.MAX_PAYLOAD:
                return None, "damaged reply"
            rest = self._port.read(length + 2)
            body = header + rest[:-2]
            if len(rest) < length + 2 or protocol.crc(body) != int.from_bytes(rest[-2:], "big"):
                return None, "damaged reply"
            sequence, status = header[:2]
            if status not in iter(Status):
                return None, f"reply with status {status}"
            if sequence == self._sequence or status in DAMAGED:
                return Status(status), rest[:-2]


def number(name, access):
    """Number of the register `name`, which must allow `access`."""
    if name not in registers.REGISTERS:
        raise HostError(f"register must be one of {', '.join(registers.REGISTERS)}, not {name!r}")
    index, allowed, _ = registers.REGISTERS[name]
    if access not in allowed:
        raise HostError(f"register {name} must allow {access}, but is {allowed}")
    return index


def memory_address(address):
    return address.to_bytes(protocol.ADDRESS_BYTES, "little")
