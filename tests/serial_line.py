"""A serial line in a cocotb bench, for blocking code such as `fpga.host.Host`."""

import random

import cocotb
from cocotb.task import resume
from cocotb.triggers import FallingEdge, Timer

__all__ = ["SerialLine", "DamagedLine"]


class SerialLine:
    """What `serial.Serial` is to a real line.

    Parameters
    ----------
    rx, tx : handle
        The device's pins.
    bit_ns : int
        Duration of a bit.
    timeout_ns : int
        `read` gives up when no byte came for so long.
    """

    def __init__(self, rx, tx, *, bit_ns, timeout_ns):
        self._rx, self._tx = rx, tx
        self._bit_ns = bit_ns
        self._timeout_ns = timeout_ns
        self._received = bytearray()
        rx.value = 1
        cocotb.start_soon(self._listen())

    def read(self, n):
        return resume(self.receive)(n)

    def write(self, data):
        return resume(self.send)(data)

    async def receive(self, n):
        waited = 0
        while len(self._received) < n and waited < self._timeout_ns:
            before = len(self._received)
            await Timer(self._bit_ns, "ns")
            waited = waited + self._bit_ns if len(self._received) == before else 0
        data = bytes(self._received[:n])
        del self._received[:n]
        return data

    async def send(self, data, stop=1):
        for byte in data:
            for level in (0, *(byte >> n & 1 for n in range(8)), stop):
                self._rx.value = level
                await Timer(self._bit_ns, "ns")
        self._rx.value = 1

    async def _listen(self):
        while True:
            await FallingEdge(self._tx)
            await Timer(self._bit_ns // 2, "ns")
            byte = 0
            for n in range(8):
                await Timer(self._bit_ns, "ns")
                byte |= int(self._tx.value) << n
            await Timer(self._bit_ns, "ns")
            assert self._tx.value == 1, "a reply's byte must have a stop bit"
            self._received.append(byte)


class DamagedLine:
    """A line that flips a bit of, loses or doubles a byte now and then, in both directions."""

    def __init__(self, line, *, rate, seed):
        self._line = line
        self._rate = rate
        self._rng = random.Random(seed)
        self.faults = 0

    def read(self, n):
        return self._damage(self._line.read(n))

    def write(self, data):
        self._line.write(self._damage(data))

    def _damage(self, data):
        if not data or self._rng.random() >= self._rate:
            return data
        self.faults += 1
        position = self._rng.randrange(len(data))
        byte = data[position]
        kind = self._rng.choice(["flip", "lose", "double"])
        middle = {"flip": bytes([byte ^ 1 << self._rng.randrange(8)]), "lose": b"",
                  "double": bytes([byte, byte])}[kind]
        return data[:position] + middle + data[position + 1:]
