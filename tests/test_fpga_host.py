"""fpga/host.py against a shell in Python, in memory and behind a pseudo-terminal."""

import os
import threading
import tty

import pytest

from fpga import protocol
from fpga.host import Host, HostError
from fpga.protocol import Command, Status
from hw import descriptor, registers
from hw.registers import number

WORD_BYTES = 8
ADDRESS_WIDTH = 10
BLOCK_WORDS = protocol.BLOCK_BYTES // WORD_BYTES


class Shell:
    """The replies of a shell with a core; `mangle` may change or drop a reply's bytes."""

    def __init__(self, mangle=lambda count, reply: reply):
        self.memory = bytearray(WORD_BYTES << ADDRESS_WIDTH)
        self.registers = dict.fromkeys(range(16), 0)
        self.registers[number("identity")] = registers.IDENTITY
        self.registers[number("parameters")] = descriptor.VERSION
        self.after_start = 0b10  # status: done
        self.version = protocol.VERSION
        self.requests = []
        self._mangle = mangle
        self._out = bytearray()

    def read(self, n):
        data = bytes(self._out[:n])
        del self._out[:n]
        return data

    def write(self, data):
        sequence, command, length = data[1], data[2], int.from_bytes(data[3:5], "little")
        payload = data[5:5 + length]
        assert data == protocol.frame(protocol.REQUEST_SYNC, sequence, command, payload)
        self.requests.append((sequence, Command(command), payload))
        reply = protocol.frame(protocol.REPLY_SYNC, sequence, *self._execute(command, payload))
        self._out += self._mangle(len(self.requests) - 1, reply)

    def _execute(self, command, payload):
        address = int.from_bytes(payload[:4], "little") * WORD_BYTES
        if command == Command.IDENTIFY:
            return Status.OK, bytes([self.version, WORD_BYTES, ADDRESS_WIDTH, BLOCK_WORDS])
        if command == Command.READ_REGISTER:
            return Status.OK, self.registers[payload[0]].to_bytes(4, "little")
        if command == Command.WRITE_REGISTER:
            self.registers[payload[0]] = int.from_bytes(payload[1:], "little")
            if payload[0] == number("control"):
                self.registers[number("status")] = self.after_start
            return Status.OK, b""
        if self.registers[number("status")] & 1:
            return Status.BUSY, b""
        if command == Command.READ_MEMORY:
            return Status.OK, bytes(self.memory[address:address + payload[4] * WORD_BYTES])
        self.memory[address:address + len(payload) - 4] = payload[4:]
        return Status.OK, b""


@pytest.fixture
def shell():
    return Shell()


@pytest.fixture
def host(shell):
    return Host(shell)


def test_memory_goes_in_blocks(shell, host):
    data = bytes(n % 251 for n in range((2 * BLOCK_WORDS + 5) * WORD_BYTES))
    del shell.requests[:]
    host.write_memory(3, data)
    assert [len(payload) for *_, payload in shell.requests] == [1028, 1028, 44]
    assert shell.memory[3 * WORD_BYTES:][:len(data)] == data
    assert host.read_memory(3, 2 * BLOCK_WORDS + 5) == data
    assert host.read_memory(0, 0) == b""
    host.write_memory(host.words, b"")


def test_register_by_name(shell, host):
    host.write_register("evaluation", 17)
    assert shell.registers[number("evaluation")] == 17
    shell.registers[number("status")] = 0x0302
    assert host.read_register("status") == 0x0302
    assert host.read_fields("status") == {"busy": 0, "done": 1, "error": 3}


def test_run(shell, host):
    shell.registers.update({number(name): n for n, name in enumerate(registers.COUNTERS)})
    assert host.run(32, evaluation=4) == {name: n for n, name in enumerate(registers.COUNTERS)}
    assert shell.registers[number("descriptor")] == 32
    assert shell.registers[number("evaluation")] == 4
    assert shell.registers[number("control")] == 1


@pytest.mark.parametrize(("error", "name"), [(11, "WINDOW"), (200, "unknown")])
def test_run_names_the_error(shell, host, error, name):
    shell.after_start = 0b10 | error << 8
    with pytest.raises(HostError, match=rf"^pass at word 5 ended with error {error} \({name}\)$"):
        host.run(5)


def test_run_that_does_not_end(shell):
    seconds = iter(range(100))
    host = Host(shell, clock=lambda: next(seconds))
    shell.after_start = 1
    with pytest.raises(HostError, match=r"^pass at word 5 must end within 3 s$"):
        host.run(5, timeout=3)
    with pytest.raises(HostError, match=r"^READ_MEMORY was refused: BUSY$"):
        host.read_memory(0, 1)


@pytest.mark.parametrize(("call", "message"), [
    (lambda host: host.read_register("stauts"),
     r"register must be one of identity, .*, array, not 'stauts'"),
    (lambda host: host.read_register("control"),
     r"register control must allow read, but is write"),
    (lambda host: host.write_register("status", 0),
     r"register status must allow write, but is read"),
    (lambda host: host.write_register("descriptor", 1 << 32),
     r"value of register descriptor must fit 32 bits, not 4294967296"),
    (lambda host: host.write_memory(0, bytes(9)),
     r"data must be whole words of 8 bytes, not 9 bytes"),
    (lambda host: host.write_memory(1023, bytes(16)),
     r"words 1023 to 1024 must lie in the memory of 1024 words"),
    (lambda host: host.read_memory(-1, 2),
     r"words -1 to 0 must lie in the memory of 1024 words"),
])
def test_wrong_use(shell, host, call, message):
    del shell.requests[:]
    with pytest.raises(HostError, match=f"^{message}$"):
        call(host)
    assert not shell.requests


def test_asks_again_with_the_same_sequence_number():
    faults = {
        3: lambda reply: b"",                          # lost
        4: lambda reply: reply[:-1],                   # short
        5: lambda reply: reply[:-1] + b"\xff",         # CRC
        7: lambda reply: b"\x5a\x01" + reply,          # noise before it
        9: lambda reply: protocol.frame(protocol.REPLY_SYNC, 77, Status.OK) + reply,   # stale
        10: lambda reply: protocol.frame(protocol.REPLY_SYNC, reply[1], Status.CRC),
        11: lambda reply: protocol.frame(protocol.REPLY_SYNC, reply[1], Status.TIMEOUT),
        12: lambda reply: protocol.frame(protocol.REPLY_SYNC, reply[1], Status.LENGTH),
    }
    shell = Shell(lambda count, reply: faults.get(count, bytes)(reply))
    host = Host(shell)
    for value in range(6):
        host.write_register("evaluation", value)
        assert host.read_register("evaluation") == value
    sequences = [sequence for sequence, *_ in shell.requests]
    assert sorted(set(sequences)) == list(range(1, 3 + 12 + 1))
    assert host.retried == len(sequences) - 15 == 7


def test_sequence_number_wraps(host):
    for value in range(300):
        host.write_register("evaluation", value)
    assert host.read_register("evaluation") == 299


@pytest.mark.parametrize(("mangle", "fault"), [
    (lambda reply: b"", "no reply"),
    (lambda reply: reply[:-2], "damaged reply"),
    (lambda reply: protocol.frame(protocol.REPLY_SYNC, reply[1], Status.CRC),
     "shell received it with CRC error"),
    (lambda reply: protocol.frame(protocol.REPLY_SYNC, reply[1], 99), "reply with status 99"),
    (lambda reply: protocol.frame(protocol.REPLY_SYNC, reply[1], Status.OK, b"12345"),
     "reply of 5 bytes instead of 4"),
])
def test_gives_up(mangle, fault):
    shell = Shell(lambda count, reply: mangle(reply) if count > 2 else reply)
    host = Host(shell, retries=2)
    with pytest.raises(HostError, match=f"^READ_REGISTER failed 3 times: {fault}$"):
        host.read_register("status")
    assert len(shell.requests) == 6


def test_other_devices():
    shell = Shell()
    shell.version = 2
    with pytest.raises(HostError, match=r"^shell's protocol version must be 1, not 2$"):
        Host(shell)
    shell = Shell()
    shell.registers[number("identity")] = 0xDEAD
    with pytest.raises(HostError, match=r"^core's identity must be 0x5351444D, not 0x0000DEAD$"):
        Host(shell)
    shell = Shell()
    shell.registers[number("parameters")] = 9
    with pytest.raises(HostError, match=r"^core's descriptor version must be 2, not 9$"):
        Host(shell)


def test_serial_port():
    """The same host through pyserial and a pseudo-terminal."""
    controller, device = os.openpty()
    tty.setraw(device)
    shell = Shell()

    def serve():
        waiting = b""
        while True:
            try:
                waiting += os.read(controller, 4096)
            except OSError:
                return
            while len(waiting) >= 5 and len(waiting) >= (
                    size := 7 + int.from_bytes(waiting[3:5], "little")):
                shell.write(waiting[:size])
                waiting = waiting[size:]
                os.write(controller, shell.read(4096))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with Host.open(os.ttyname(device), 1_000_000) as host:
        data = bytes(range(256)) * 8
        host.write_memory(0, data)
        assert host.read_memory(0, 256) == data
        host.write_register("evaluation", 3)
        assert host.read_register("evaluation") == 3
        assert host.retried == 0
    os.close(device)
    thread.join(10)
    os.close(controller)


def test_no_serial_port(tmp_path):
    with pytest.raises(HostError, match=rf"^{tmp_path}/tty: cannot be opened: "):
        Host.open(f"{tmp_path}/tty", 1_000_000)
