# amaranth: UnusedElaboratable=no
"""fpga/uart.py against lines drawn bit by bit, with other rates, jitter and glitches."""

import itertools
import random

import pytest
from amaranth.hdl import Module
from amaranth.sim import Simulator

from fpga.uart import Receiver, Transmitter


def levels(byte, stop=1):
    """The bits of a byte on the line."""
    return [0, *(byte >> n & 1 for n in range(8)), stop]


def draw(bits, cycles, jitter=0.0, rng=None):
    """Samples of a line whose bits last `cycles`, each edge moved by up to `jitter` cycles."""
    rng = rng or random.Random(0)
    edges = [n * cycles + rng.uniform(-jitter, jitter) for n in range(1, len(bits) + 1)]
    samples = []
    for bit, edge in zip(bits, edges):
        samples += [bit] * (round(edge) - len(samples))
    return samples


def receive(divisor, samples):
    """Bytes and error flags that the receiver makes of a line."""
    dut = Receiver(divisor)
    received = []

    async def bench(ctx):
        for sample in [1] * 4 + samples + [1] * 2 * divisor:
            ctx.set(dut.rx, sample)
            await ctx.tick()
            if ctx.get(dut.o.valid):
                received.append((ctx.get(dut.o.p.data), ctx.get(dut.o.p.error)))

    simulate(dut, bench)
    return received


def simulate(dut, *benches):
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    for bench in benches:
        simulator.add_testbench(bench)
    simulator.run()


@pytest.mark.parametrize("divisor", [4, 5, 8, 25, 217])
def test_receives_every_byte_back_to_back(divisor):
    data = list(range(256)) if divisor < 25 else [0x00, 0xFF, 0x55, 0xA5, 0x01, 0x80]
    samples = draw([bit for byte in data for bit in levels(byte)], divisor)
    assert receive(divisor, samples) == [(byte, 0) for byte in data]


@pytest.mark.parametrize("error", [-0.04, 0.04])
@pytest.mark.parametrize("divisor", [16, 25, 217])
def test_tolerates_4_percent(divisor, error):
    data = [0x00, 0xFF, 0x55, 0xAA, 0xA5, 0x7F, 0x80]
    samples = draw([bit for byte in data for bit in levels(byte)], divisor * (1 + error))
    assert receive(divisor, samples) == [(byte, 0) for byte in data]


def test_rate_that_is_too_wrong_shows():
    samples = draw([bit for byte in [0x55] * 8 for bit in levels(byte)], 25 * 1.10)
    assert receive(25, samples) != [(0x55, 0)] * 8


@pytest.mark.parametrize("seed", range(4))
def test_tolerates_jitter(seed):
    rng = random.Random(seed)
    data = [rng.randrange(256) for _ in range(40)]
    samples = draw([bit for byte in data for bit in levels(byte)], 25, jitter=5, rng=rng)
    assert receive(25, samples) == [(byte, 0) for byte in data], f"seed {seed}"


def test_glitch_is_no_start_bit():
    samples = [0] * 10 + [1] * 40 + draw(levels(0x3C), 25)
    assert receive(25, samples) == [(0x3C, 0)]


def test_missing_stop_bit_is_an_error_once():
    break_condition = [0] * 25 * 40
    samples = break_condition + [1] * 25 + draw(levels(0x96), 25)
    assert receive(25, samples) == [(0x00, 1), (0x96, 0)]


def test_receives_after_an_error():
    samples = draw(levels(0x0F, stop=0) + [1] + levels(0x96), 25)
    assert receive(25, samples) == [(0x0F, 1), (0x96, 0)]


@pytest.mark.parametrize(("divisor", "stall"), [*itertools.product([4, 7, 25], [0.0, 0.9])])
def test_transmits(divisor, stall):
    """The line is exactly the bits drawn at the divisor's rate, with only ones between bytes."""
    rng = random.Random(divisor)
    data = [0x00, 0xFF, 0x55, 0xA5, *(rng.randrange(256) for _ in range(12))]
    dut = Transmitter(divisor)
    line = []

    async def drive(ctx):
        for byte in data:
            if rng.random() < stall:
                await ctx.tick().repeat(rng.randrange(15 * divisor))
            ctx.set(dut.i.payload, byte)
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)
        await ctx.tick().repeat(12 * divisor)

    async def watch(ctx):
        async for _, _, tx in ctx.tick().sample(dut.tx):
            line.append(tx)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.add_process(watch)
    simulator.run()

    found, position, gaps = [], 0, 0
    while 0 in line[position:]:
        start = line.index(0, position)
        gaps += start - position if found else 0
        bits = line[start:start + 10 * divisor]
        byte = sum(bits[(n + 1) * divisor] << n for n in range(8))
        assert bits == draw(levels(byte), divisor)
        found.append(byte)
        position = start + 10 * divisor
    assert found == data
    assert (gaps == 0) == (stall == 0)


def test_loop_of_both():
    data = [0x00, 0x5A, 0xA5, 0xFF]
    m = Module()
    m.submodules.transmitter = transmitter = Transmitter(6)
    m.submodules.receiver = receiver = Receiver(6)
    m.d.comb += receiver.rx.eq(transmitter.tx)
    received = []

    async def drive(ctx):
        ctx.set(transmitter.i.valid, 1)
        for byte in data:
            ctx.set(transmitter.i.payload, byte)
            await ctx.tick().until(transmitter.i.ready)
        ctx.set(transmitter.i.valid, 0)

    async def take(ctx):
        for _ in data:
            payload, = await ctx.tick().sample(receiver.o.p).until(receiver.o.valid)
            received.append((payload.data, payload.error))

    simulate(m, drive, take)
    assert received == [(byte, 0) for byte in data]


@pytest.mark.parametrize("unit", [Receiver, Transmitter])
def test_divisor_is_checked(unit):
    with pytest.raises(ValueError, match=r"^divisor must be at least 4, not 3$"):
        unit(3)
    with pytest.raises(TypeError, match=r"^divisor must be an integer, not 4\.0$"):
        unit(4.0)
