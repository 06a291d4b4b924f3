"""Block RAM gives anything for a word that is written while it is read: nothing may use that."""

import numpy as np
import pytest
from amaranth import Module, Signal
from amaranth.lib import memory
from amaranth.sim import Simulator

from hw.buffer import Buffer, WideBuffer
from hw.config import TINY
from hw.core import Core
from hw.verilog import emit
from sim import random_layers
from tests.test_layers import check, stalling


def elaborate(self, platform):
    """A `Buffer` that inverts a word which any column is written to while it is read."""
    m = Module()
    m.submodules.store = store = memory.Memory(shape=self.width, depth=self.depth, init=[])
    write = store.write_port(granularity=self.width // self.columns)
    read = store.read_port()
    requested, hit = Signal(), Signal()
    m.d.comb += [
        write.addr.eq(self.write_address), write.data.eq(self.write_data),
        write.en.eq(self.write), read.addr.eq(self.address), read.en.eq(self.request)]
    m.d.sync += [requested.eq(self.request), self.response.eq(requested)]
    with m.If(self.request):
        m.d.sync += hit.eq((self.write != 0) & (self.address == self.write_address))
    with m.If(requested):
        m.d.sync += self.data.eq(read.data ^ hit.replicate(self.width))
    return m


@pytest.fixture
def colliding(monkeypatch):
    monkeypatch.setattr(Buffer, "elaborate", elaborate)


@pytest.mark.parametrize("make", [Buffer, WideBuffer])
def test_a_colliding_buffer(make, colliding):
    """The word is inverted when it collides, and only then."""
    dut = make(8, 40)

    async def bench(ctx):
        ctx.set(dut.write, 1)
        ctx.set(dut.write_address, 3)
        ctx.set(dut.write_data, 0x123)
        await ctx.tick()
        for writes, expected in ((0, 0x123), (1, 0x123 ^ (1 << 40) - 1)):
            ctx.set(dut.write, writes)
            ctx.set(dut.address, 3)
            ctx.set(dut.request, 1)
            await ctx.tick()
            ctx.set(dut.write, 0)
            ctx.set(dut.request, 0)
            await ctx.tick()
            assert ctx.get(dut.data) == expected

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


@pytest.mark.slow
def test_a_core_of_colliding_buffers(colliding):
    """Layers with and without a memory that stalls, so that loads come at all times of a run."""
    text = emit(Core(TINY), "sqdm_core")
    assert " hit;" in text
    for seed, options in ((1, {}), (2, {"memory": stalling})):
        calls = random_layers.random_calls(np.random.default_rng(seed), TINY, 40)
        assert len(check(calls, TINY, verilog=text, **options).records) == 40
