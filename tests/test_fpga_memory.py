"""fpga/memory.py against a bytearray, with stalls on both sides."""

import itertools
import random
from dataclasses import replace

import pytest
from amaranth.sim import Simulator

from fpga.memory import BlockMemory
from hw.config import TINY

CONFIGS = {vector: replace(TINY, vector=vector, dense_lanes=8, dense_scale_units=8, sparse_lanes=32,
                           sparse_scale_units=8, address_width=10)
           for vector in (16, 32)}


def simulate(dut, *benches):
    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    for bench in benches:
        simulator.add_testbench(bench)
    simulator.run()


async def write(ctx, port, address, data, strobe):
    ctx.set(port.write_request.p, {"address": address, "data": data, "strobe": strobe})
    ctx.set(port.write_request.valid, 1)
    await ctx.tick().until(port.write_request.ready)
    ctx.set(port.write_request.valid, 0)


@pytest.mark.parametrize("vector", [16, 32])
@pytest.mark.parametrize(("request_stall", "response_stall"),
                         [*itertools.product((0.0, 0.5, 0.9), repeat=2)])
def test_reads_what_was_written(vector, request_stall, response_stall):
    config = CONFIGS[vector]
    rng = random.Random(vector)
    model = [0] * 2 ** config.address_width
    dut = BlockMemory(config)
    port = dut.port
    addresses = [rng.randrange(len(model)) for _ in range(200)] + [0, len(model) - 1]
    answers = []

    async def fill(ctx):
        answered = 0
        for address in addresses * 2:
            data = rng.getrandbits(config.port_width)
            strobe = rng.getrandbits(config.port_width // 8)
            await write(ctx, port, address, data, strobe)
            answered += ctx.get(port.write_response.valid)
            mask = sum(0xFF << 8 * n for n in range(config.port_width // 8) if strobe >> n & 1)
            model[address] = model[address] & ~mask | data & mask
        assert answered == 2 * len(addresses)
        await ctx.tick()
        assert not ctx.get(port.write_response.valid)
        for address in addresses:
            while rng.random() < request_stall:
                await ctx.tick()
            ctx.set(port.read_request.payload, address)
            ctx.set(port.read_request.valid, 1)
            await ctx.tick().until(port.read_request.ready)
            ctx.set(port.read_request.valid, 0)

    async def take(ctx):
        for _ in addresses:
            while rng.random() < response_stall:
                await ctx.tick()
            ctx.set(port.read_response.ready, 1)
            word, = await ctx.tick().sample(port.read_response.payload).until(
                port.read_response.valid)
            answers.append(word)
            ctx.set(port.read_response.ready, 0)
        await ctx.tick().repeat(10)
        assert not ctx.get(port.read_response.valid)

    simulate(dut, fill, take)
    assert answers == [model[address] for address in addresses]


def test_latency_and_throughput():
    dut = BlockMemory(CONFIGS[16])
    port = dut.port
    ready, valid = [], []

    async def bench(ctx):
        ctx.set(port.read_response.ready, 1)
        ctx.set(port.read_request.valid, 1)
        for _ in range(32):
            ready.append(ctx.get(port.read_request.ready))
            valid.append(ctx.get(port.read_response.valid))
            await ctx.tick()

    simulate(dut, bench)
    assert ready == [1] * 32
    assert valid == [0] * dut.latency + [1] * (32 - dut.latency)


def test_capacity():
    dut = BlockMemory(CONFIGS[16])
    port = dut.port

    async def bench(ctx):
        ctx.set(port.read_request.valid, 1)
        taken = 0
        for _ in range(20):
            taken += ctx.get(port.read_request.ready)
            await ctx.tick()
        assert taken == dut.capacity

    simulate(dut, bench)


def test_read_and_write_in_every_cycle():
    """A word asked for after its write was answered is the new one, at full rate."""
    dut = BlockMemory(CONFIGS[16])
    port = dut.port
    answers = []

    async def bench(ctx):
        ctx.set(port.read_response.ready, 1)
        for cycle in range(64):
            ctx.set(port.write_request.p, {"address": cycle, "data": 7 * cycle, "strobe": 0xFF})
            ctx.set(port.write_request.valid, 1)
            ctx.set(port.read_request.payload, max(cycle - 1, 0))
            ctx.set(port.read_request.valid, cycle > 0)
            if ctx.get(port.read_response.valid):
                answers.append(ctx.get(port.read_response.payload))
            await ctx.tick()

    simulate(dut, bench)
    assert answers == [7 * n for n in range(63 - dut.latency)]
