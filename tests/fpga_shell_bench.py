"""cocotb tests of the shell through its UART pins, with a core that only copies."""

import os
import random
from dataclasses import replace

import cocotb
from cocotb.clock import Clock
from cocotb.simtime import get_sim_time
from cocotb.task import bridge
from cocotb.triggers import ClockCycles

from fpga import protocol
from fpga.host import Host, HostError
from fpga.protocol import Command, Status
from hw import descriptor, registers
from hw.config import TINY
from tests.serial_line import DamagedLine, SerialLine

CONFIGS = {
    "tiny": TINY,
    "wide": replace(TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8,
                    sparse_lanes=32, sparse_scale_units=8, address_width=12),
}
DIVISORS = {"tiny": 4, "wide": 7}  # clock cycles per bit
CONFIG = CONFIGS[os.environ.get("SQDM_CONFIG", "tiny")]
DIVISOR = DIVISORS[CONFIG.name]
TIMEOUT = 600
CLOCK_NS = 10
WORD_BYTES = CONFIG.port_width // 8
WORDS = 2 ** CONFIG.address_width
BLOCK_WORDS = protocol.BLOCK_BYTES // WORD_BYTES


async def start(dut):
    """Reset, and the line to the shell."""
    cocotb.start_soon(Clock(dut.clk, CLOCK_NS, unit="ns", impl="gpi").start())
    line = SerialLine(dut.rx, dut.tx, bit_ns=DIVISOR * CLOCK_NS, timeout_ns=6 * TIMEOUT * CLOCK_NS)
    dut.rst.value = 1
    await ClockCycles(dut.clk, 4)
    dut.rst.value = 0
    await ClockCycles(dut.clk, 4)
    return line


def connect(line, **options):
    return Host(line, clock=lambda: get_sim_time("sec"), **options)


def ask(line, command, payload=b"", *, sequence=200):
    """Send one request as it is; the reply's status and payload."""
    line.write(protocol.frame(protocol.REQUEST_SYNC, sequence, command, payload))
    return answer(line, sequence)


def answer(line, sequence=None):
    reply = line.read(5)
    assert reply[0] == protocol.REPLY_SYNC
    rest = line.read(int.from_bytes(reply[3:5], "little") + 2)
    assert protocol.crc(reply[1:] + rest[:-2]) == int.from_bytes(rest[-2:], "big")
    assert sequence is None or reply[1] == sequence
    return Status(reply[2]), rest[:-2]


def copy_descriptor(source, destination, words, version=descriptor.VERSION):
    fields = descriptor.pack(version=version, source=source, destination=destination, height=words)
    return b"".join(word.to_bytes(4, "little") for word in fields)


def memory_request(address, tail):
    return address.to_bytes(4, "little") + tail


@cocotb.test()
async def test_identifies(dut):
    line = await start(dut)

    def use():
        host = connect(line)
        assert (host.word_bytes, host.words) == (WORD_BYTES, WORDS)
        assert host.read_register("identity") == registers.IDENTITY
        assert host.read_fields("parameters") == {
            "version": descriptor.VERSION, "vector": CONFIG.vector,
            "dense_lanes": CONFIG.dense_lanes, "sparse_pes": CONFIG.sparse_pes}
        assert ask(line, Command.IDENTIFY) == (Status.OK, bytes(
            [protocol.VERSION, WORD_BYTES, CONFIG.address_width, BLOCK_WORDS]))
        assert host.retried == 0

    await bridge(use)()


@cocotb.test()
async def test_registers(dut):
    line = await start(dut)

    def use():
        host = connect(line)
        for value in (0, 1, 0x89ABCDEF, 0xFFFFFFFF):
            host.write_register("descriptor", value)
            assert host.read_register("descriptor") == value
        host.write_register("detector_entry", 0)
        for count in (11, 22, 33, 44):
            host.write_register("detector_count", count)
        host.write_register("detector_entry", 1)
        assert [host.read_register("detector_count") for _ in range(3)] == [22, 33, 44]
        assert host.read_register("detector_entry") == 4

    await bridge(use)()


@cocotb.test()
async def test_memory(dut):
    line = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)

    def use():
        host = connect(line)
        model = bytearray(host.read_memory(0, 2 * BLOCK_WORDS + 3))
        for words in (1, 2, BLOCK_WORDS, BLOCK_WORDS + 1, 0):
            address = rng.randrange(2 * BLOCK_WORDS + 3 - words)
            data = rng.randbytes(words * WORD_BYTES)
            host.write_memory(address, data)
            model[address * WORD_BYTES:(address + words) * WORD_BYTES] = data
            assert host.read_memory(address, words) == data
        assert host.read_memory(0, 2 * BLOCK_WORDS + 3) == model
        data = rng.randbytes(3 * WORD_BYTES)
        host.write_memory(WORDS - 3, data)
        assert host.read_memory(WORDS - 2, 2) == data[WORD_BYTES:]
        assert host.read_memory(0, 3) == model[:3 * WORD_BYTES]
        assert host.retried == 0

    await bridge(use)()


@cocotb.test()
async def test_runs_a_pass(dut):
    line = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)

    def use():
        host = connect(line)
        assert (dut.busy.value, dut.done.value, dut.error.value) == (0, 0, 0)
        data = rng.randbytes(20 * WORD_BYTES)
        host.write_memory(0, copy_descriptor(100, 300, 20))
        host.write_memory(100, data)
        counters = host.run(0, evaluation=5, timeout=1e-3)
        assert list(counters) == list(registers.COUNTERS)
        assert counters["total_cycles"] > 40
        assert host.read_register("evaluation") == 5
        assert host.read_memory(300, 20) == data
        assert (dut.busy.value, dut.done.value, dut.error.value) == (0, 1, 0)

    await bridge(use)()


@cocotb.test()
async def test_reports_the_error_of_a_pass(dut):
    line = await start(dut)

    def use():
        host = connect(line)
        host.write_memory(16, copy_descriptor(100, 300, 20, version=9))
        message = fails(host.run, 16)
        assert message == "pass at word 16 ended with error 1 (VERSION)", message
        assert (dut.busy.value, dut.done.value, dut.error.value) == (0, 1, 1)

    await bridge(use)()


@cocotb.test()
async def test_memory_is_busy_during_a_pass(dut):
    line = await start(dut)

    def use():
        host = connect(line)
        data = random.Random(1).randbytes(WORD_BYTES * 8)
        host.write_memory(0, copy_descriptor(1024, WORDS // 2, 2000))
        host.write_memory(1024, data)
        assert fails(host.run, 0, timeout=1e-9) == "pass at word 0 must end within 1e-09 s"
        assert dut.busy.value == 1
        assert fails(host.read_memory, 0, 1) == "READ_MEMORY was refused: BUSY"
        assert fails(host.write_memory, 0, data[:WORD_BYTES]) == "WRITE_MEMORY was refused: BUSY"
        host.write_register("evaluation", 7)
        assert host.read_register("evaluation") == 7
        while host.read_fields("status")["busy"]:
            pass
        assert host.read_memory(WORDS // 2, 8) == data
        assert host.read_memory(0, 2) == copy_descriptor(1024, WORDS // 2, 2000)[:2 * WORD_BYTES]

    await bridge(use)()


@cocotb.test()
async def test_refuses(dut):
    """Every illegal request gets its error, and changes nothing."""
    line = await start(dut)
    word = bytes(range(WORD_BYTES))
    refused = [
        (0, b"", Status.COMMAND),
        (6, b"", Status.COMMAND),
        (255, word, Status.COMMAND),
        (Command.IDENTIFY, b"\0", Status.LENGTH),
        (Command.READ_REGISTER, b"", Status.LENGTH),
        (Command.READ_REGISTER, b"\x04\0", Status.LENGTH),
        (Command.WRITE_REGISTER, b"\x04\x01\x01\x01", Status.LENGTH),
        (Command.WRITE_REGISTER, b"\x04\x01\x01\x01\x01\x01", Status.LENGTH),
        (Command.READ_MEMORY, memory_request(0, b""), Status.LENGTH),
        (Command.READ_MEMORY, memory_request(0, b"\x01\0"), Status.LENGTH),
        (Command.READ_MEMORY, memory_request(0, b"\0"), Status.LENGTH),
        (Command.READ_MEMORY, memory_request(0, bytes([BLOCK_WORDS + 1])), Status.LENGTH),
        (Command.WRITE_MEMORY, b"", Status.LENGTH),
        (Command.WRITE_MEMORY, b"\0\0\0", Status.LENGTH),
        (Command.WRITE_MEMORY, memory_request(0, b""), Status.LENGTH),
        (Command.WRITE_MEMORY, memory_request(0, word[:-1]), Status.LENGTH),
        (Command.WRITE_MEMORY, memory_request(0, word + b"\0"), Status.LENGTH),
        (Command.READ_REGISTER, bytes([len(registers.REGISTERS)]), Status.ADDRESS),
        (Command.READ_REGISTER, bytes([32]), Status.ADDRESS),
        (Command.READ_REGISTER, bytes([36]), Status.ADDRESS),
        (Command.READ_REGISTER, bytes([registers.number("control")]), Status.ADDRESS),
        (Command.WRITE_REGISTER, bytes([registers.number("identity")]) + b"\1\1\1\1",
         Status.ADDRESS),
        (Command.WRITE_REGISTER, bytes([36]) + b"\1\1\1\1", Status.ADDRESS),
        (Command.READ_MEMORY, memory_request(WORDS, b"\1"), Status.ADDRESS),
        (Command.READ_MEMORY, memory_request(WORDS - 1, b"\2"), Status.ADDRESS),
        (Command.READ_MEMORY, memory_request(0xFFFFFFFF, b"\1"), Status.ADDRESS),
        (Command.WRITE_MEMORY, memory_request(WORDS, word), Status.ADDRESS),
        (Command.WRITE_MEMORY, memory_request(WORDS - 1, 2 * word), Status.ADDRESS),
        (Command.WRITE_MEMORY, memory_request(0x80000000, word), Status.ADDRESS),
    ]

    def use():
        host = connect(line)
        before = [random.Random(n).randbytes(4 * WORD_BYTES) for n in range(2)]
        host.write_memory(0, before[0])
        host.write_memory(WORDS - 4, before[1])
        host.write_register("descriptor", 0x12345678)
        for command, payload, status in refused:
            assert ask(line, command, payload) == (status, b""), (command, payload)

        good = protocol.frame(protocol.REQUEST_SYNC, 3, Command.WRITE_MEMORY,
                              memory_request(0, word))
        line.write(good[:12] + bytes([good[12] ^ 0x10]) + good[13:])
        assert answer(line, 3) == (Status.CRC, b"")
        line.write(good[:-1])
        assert answer(line, 3) == (Status.TIMEOUT, b"")
        line.write(good[:3] + (protocol.MAX_PAYLOAD + 1).to_bytes(2, "little"))
        assert answer(line, 3) == (Status.LENGTH, b"")

        assert host.read_memory(0, 4) == before[0]
        assert host.read_memory(WORDS - 4, 4) == before[1]
        assert host.read_register("descriptor") == 0x12345678
        assert host.read_fields("status") == {"busy": 0, "done": 0, "error": 0}
        assert host.retried == 0

    await bridge(use)()


@cocotb.test()
async def test_byte_without_stop_bit_spoils_a_frame(dut):
    line = await start(dut)
    frame = protocol.frame(protocol.REQUEST_SYNC, 3, Command.IDENTIFY)
    await line.send(frame[:2])
    await line.send(frame[2:3], stop=0)
    await line.send(b"")
    await ClockCycles(dut.clk, DIVISOR)
    await line.send(frame[3:])
    assert await bridge(answer)(line, 3) == (Status.CRC, b"")
    await line.send(frame)
    assert (await bridge(answer)(line, 3))[0] == Status.OK


@cocotb.test()
async def test_repeated_access_is_done_once(dut):
    line = await start(dut)
    entry = bytes([registers.number("detector_entry")])
    count = bytes([registers.number("detector_count")])

    def use():
        write = [Command.WRITE_REGISTER, entry + b"\0\0\0\0"]
        assert ask(line, *write, sequence=1) == (Status.OK, b"")
        for sequence, value in ((2, 11), (3, 22), (4, 33)):
            request = count + value.to_bytes(4, "little")
            damaged = bytearray(protocol.frame(
                protocol.REQUEST_SYNC, sequence, Command.WRITE_REGISTER, request))
            damaged[-1] ^= 1
            line.write(damaged)
            assert answer(line, sequence) == (Status.CRC, b"")  # not an access
            for _ in range(3):
                assert ask(line, Command.WRITE_REGISTER, request, sequence=sequence) == (
                    Status.OK, b"")
        assert ask(line, *write, sequence=5) == (Status.OK, b"")
        for sequence, value in ((6, 11), (7, 22), (8, 33)):
            for _ in range(2):
                assert ask(line, Command.READ_REGISTER, count, sequence=sequence) == (
                    Status.OK, value.to_bytes(4, "little"))
        # A refused request in between is not an access; another one that was carried out is.
        assert ask(line, Command.READ_REGISTER, b"", sequence=8)[0] == Status.LENGTH
        assert ask(line, Command.READ_REGISTER, count, sequence=8) == (Status.OK, b"\x21\0\0\0")
        assert ask(line, Command.IDENTIFY, sequence=9)[0] == Status.OK
        assert ask(line, Command.READ_REGISTER, entry, sequence=8) == (Status.OK, b"\3\0\0\0")

    await bridge(use)()


@cocotb.test()
async def test_recovers_from_garbage(dut):
    line = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)

    def use():
        host = connect(line)
        data = rng.randbytes(4 * WORD_BYTES)
        host.write_memory(8, data)
        for length in (1, 7, 60):
            line.write(bytes(rng.choice([protocol.REQUEST_SYNC, 0, 1, rng.randrange(256)])
                             for _ in range(length)))
            assert host.read_memory(8, 4) == data

    await bridge(use)()


@cocotb.test()
async def test_damaged_line(dut):
    """The host gets everything right although one transfer in ten is damaged."""
    line = await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    damaged = DamagedLine(line, rate=0.1, seed=cocotb.RANDOM_SEED)

    def use():
        host = connect(damaged, retries=12)
        data = rng.randbytes(40 * WORD_BYTES)
        for start_word in range(0, 40, 10):
            host.write_memory(start_word, data[start_word * WORD_BYTES:][:10 * WORD_BYTES])
        host.write_register("detector_entry", 0)
        counts = [rng.randrange(1 << 16) for _ in range(4)]
        for count in counts:
            host.write_register("detector_count", count)
        assert host.read_register("detector_entry") == 4
        host.write_register("detector_entry", 0)
        assert [host.read_register("detector_count") for _ in counts] == counts
        assert host.read_memory(0, 40) == data
        assert host.retried > 0 < damaged.faults
        dut._log.info(f"{damaged.faults} faults, {host.retried} requests sent again")

    await bridge(use)()


@cocotb.test()
async def test_dead_line_is_an_error(dut):
    await start(dut)

    class DeadLine:
        def read(self, n):
            return b""

        def write(self, data):
            pass

    assert fails(connect, DeadLine()) == "IDENTIFY failed 4 times: no reply"


def fails(function, *args, **options):
    """The message of the `HostError` that the call raises."""
    try:
        function(*args, **options)
    except HostError as error:
        return str(error)
    raise AssertionError(f"{function.__name__} must fail")
