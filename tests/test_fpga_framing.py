# amaranth: UnusedElaboratable=no
"""fpga/framing.py against frames made by fpga/protocol.py."""

import random

import pytest
from amaranth.lib.crc import catalog
from amaranth.sim import Simulator

from fpga import protocol
from fpga.framing import Deframer, Framer
from fpga.protocol import MAX_PAYLOAD, REPLY_SYNC, REQUEST_SYNC, Status

TIMEOUT = 60


def request(sequence=1, command=2, payload=b""):
    return protocol.frame(REQUEST_SYNC, sequence, command, payload)


def deframe(*parts, gap=0):
    """Requests the deframer finds, each as (status, sequence, command, payload).

    A part is bytes, an (int) number of cycles without any, or a tuple (byte,) with an error. The
    payload is read back through the buffer's port.
    """
    dut = Deframer(TIMEOUT)
    requests = []

    async def send(ctx, byte, error):
        ctx.set(dut.i.p.data, byte)
        ctx.set(dut.i.p.error, error)
        ctx.set(dut.i.valid, 1)
        await ctx.tick()
        ctx.set(dut.i.valid, 0)
        if gap:
            await ctx.tick().repeat(gap)

    async def take(ctx):
        await ctx.tick().repeat(2)
        if ctx.get(dut.o.valid):
            header = ctx.get(dut.o.p)
            payload = []
            for n in range(header.length if header.status == Status.OK else 0):
                ctx.set(dut.payload_address, n)
                await ctx.tick()
                payload.append(ctx.get(dut.payload_data))
            assert ctx.get(dut.o.p) == header, "the request must not change while it waits"
            argument = [header.argument[n] for n in range(min(5, len(payload)))]
            assert payload[:5] == argument
            requests.append((Status(header.status), header.sequence, header.command,
                             bytes(payload)))
            ctx.set(dut.o.ready, 1)
            await ctx.tick()
            ctx.set(dut.o.ready, 0)
            await ctx.tick()

    async def bench(ctx):
        for part in parts:
            if isinstance(part, int):
                await ctx.tick().repeat(part)
            elif isinstance(part, tuple):
                await send(ctx, *part, 1)
            else:
                for byte in part:
                    await send(ctx, byte, 0)
            await take(ctx)

    simulate(dut, bench)
    return requests


def simulate(dut, bench):
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def test_crc_is_the_catalog_one():
    assert protocol.crc(b"123456789") == 0x29B1
    rng = random.Random(1)
    for length in (0, 1, 2, 300):
        data = rng.randbytes(length)
        assert protocol.crc(data) == catalog.CRC16_IBM_3740(8).compute(data)


@pytest.mark.parametrize("gap", [0, 3, TIMEOUT - 1])
def test_payload_lengths(gap):
    rng = random.Random(gap)
    payloads = [rng.randbytes(length) for length in (0, 1, 2, 4, 5, 6, 40)]
    frames = [request(n, 0x80 + n, payload) for n, payload in enumerate(payloads)]
    assert deframe(*frames, gap=gap) == [
        (Status.OK, n, 0x80 + n, payload) for n, payload in enumerate(payloads)]


def test_longest_payload():
    payload = random.Random(2).randbytes(MAX_PAYLOAD)
    assert deframe(request(9, 5, payload)) == [(Status.OK, 9, 5, payload)]


def test_payload_of_sync_bytes():
    payload = bytes([REQUEST_SYNC]) * 12
    assert deframe(request(REQUEST_SYNC, REQUEST_SYNC, payload)) == [
        (Status.OK, REQUEST_SYNC, REQUEST_SYNC, payload)]


def test_every_flipped_bit_is_noticed():
    good = request(3, 2, b"\x05\x06")
    for bit in range(8, 8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        found = deframe(bytes(bad), TIMEOUT + 2, good)
        if bad[3:5] == good[3:5]:
            assert [status for status, *_ in found] == [Status.CRC, Status.OK], bit
        else:  # another length: the frame ends elsewhere
            assert all(status != Status.OK for status, *_ in found[:-1]), bit
            assert found[-1] == (Status.OK, 3, 2, b"\x05\x06"), bit


def test_byte_with_an_error_spoils_its_frame_only():
    good = request(3, 2, b"\x05")
    for position in range(1, len(good)):
        found = deframe(good[:position], (good[position],), good[position + 1:], good)
        assert [status for status, *_ in found] == [Status.CRC, Status.OK], position


def test_sync_byte_with_an_error_is_none():
    good = request(3, 2)
    assert deframe((REQUEST_SYNC,), good) == [(Status.OK, 3, 2, b"")]


@pytest.mark.parametrize("position", range(1, 9))
def test_half_frame_times_out(position):
    half = request(7, 3, b"\x01\x02")[:position]
    good = request(8, 1)
    found = deframe(half, TIMEOUT - 1, 3, good)
    assert [status for status, *_ in found] == [Status.TIMEOUT, Status.OK]
    if position > 1:
        assert found[0][1] == 7


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 0x8000, 0xFFFF])
def test_illegal_length_is_refused_at_once(length):
    header = bytes([REQUEST_SYNC, 7, 3]) + length.to_bytes(2, "little")
    found = deframe(header, request(8, 1))
    assert [status for status, *_ in found] == [Status.LENGTH, Status.OK]


@pytest.mark.parametrize("seed", range(8))
def test_finds_frames_again_after_garbage(seed):
    """At most what the garbage announced is lost; after a pause everything is found."""
    rng = random.Random(seed)
    garbage = bytes(rng.choice([REQUEST_SYNC, 0, 1, rng.randrange(256)]) for _ in range(200))
    parts = [garbage[n:n + 1] for n in range(len(garbage))]
    found = deframe(*parts, TIMEOUT + 2, request(8, 1, b"abc"))
    assert [entry for entry in found if entry[0] == Status.OK] == [(Status.OK, 8, 1, b"abc")], seed


def test_timeout_is_checked():
    with pytest.raises(ValueError, match=r"^timeout must be positive, not 0$"):
        Deframer(0)


@pytest.mark.parametrize("payload_stall", [0.0, 0.9])
@pytest.mark.parametrize("output_stall", [0.0, 0.9])
def test_framer(payload_stall, output_stall):
    rng = random.Random(5)
    replies = [(n, Status(n % 7), rng.randbytes(length))
               for n, length in enumerate((0, 1, 4, 0, 300, 2))]
    dut = Framer()
    sent = bytearray()
    total = sum(len(payload) + 7 for *_, payload in replies)

    async def headers(ctx):
        for sequence, status, payload in replies:
            ctx.set(dut.i_header.p.sequence, sequence)
            ctx.set(dut.i_header.p.status, status)
            ctx.set(dut.i_header.p.length, len(payload))
            ctx.set(dut.i_header.valid, 1)
            await ctx.tick().until(dut.i_header.ready)
            ctx.set(dut.i_header.valid, 0)

    async def payloads(ctx):
        for byte in b"".join(payload for *_, payload in replies):
            while rng.random() < payload_stall:
                await ctx.tick()
            ctx.set(dut.i_payload.payload, byte)
            ctx.set(dut.i_payload.valid, 1)
            await ctx.tick().until(dut.i_payload.ready)
            ctx.set(dut.i_payload.valid, 0)

    async def output(ctx):
        while len(sent) < total:
            while rng.random() < output_stall:
                await ctx.tick()
            ctx.set(dut.o.ready, 1)
            byte, = await ctx.tick().sample(dut.o.payload).until(dut.o.valid)
            sent.append(byte)
            ctx.set(dut.o.ready, 0)
        await ctx.tick().repeat(20)
        assert not ctx.get(dut.o.valid)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    for bench in (headers, payloads, output):
        simulator.add_testbench(bench)
    simulator.run()
    assert sent == b"".join(protocol.frame(REPLY_SYNC, *reply) for reply in replies)
