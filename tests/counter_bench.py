"""cocotb tests of tests/counter.v; those named ``test_must_fail...`` fail on purpose."""

import os
import random

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, Timer


async def start(dut):
    dut.rst.value = 1
    dut.step.value = 3
    dut.write.value = 0
    dut.address.value = 0
    Clock(dut.clk, 10, unit="ns", impl="gpi").start()
    await ClockCycles(dut.clk, 2)
    dut.rst.value = 0
    await ClockCycles(dut.clk, 1)


@cocotb.test()
async def test_counts(dut):
    await start(dut)
    cycles = int(os.environ.get("COUNTER_CYCLES", "1000"))
    before = int(dut.total.value)
    await Timer(10 * cycles, "ns")
    assert int(dut.total.value) - before == 3 * cycles


@cocotb.test()
async def test_remembers(dut):
    await start(dut)
    rng = random.Random(cocotb.RANDOM_SEED)
    words = [rng.getrandbits(32) for _ in range(16)]
    dut.write.value = 1
    for address, word in enumerate(words):
        dut.address.value = address
        dut.write_data.value = word
        await ClockCycles(dut.clk, 1)
    dut.write.value = 0
    for address, word in enumerate(words):
        dut.address.value = address
        await ClockCycles(dut.clk, 2)
        assert int(dut.read_data.value) == word, f"seed {cocotb.RANDOM_SEED}"


@cocotb.test(skip="COUNTER_START" not in os.environ)
async def test_starts(dut):
    await start(dut)
    assert int(dut.total.value) == int(os.environ["COUNTER_START"])


@cocotb.test(skip="COUNTER_INNER" not in os.environ)
async def test_sees_inner_signal(dut):
    await start(dut)
    dut.address.value = 5
    await ClockCycles(dut.clk, 2)
    assert int(dut.store.last.value) == 5


@cocotb.test(skip="COUNTER_FAIL" not in os.environ)
async def test_must_fail(dut):
    await start(dut)
    assert int(dut.total.value) < 0, f"total must be negative, not {int(dut.total.value)}"


@cocotb.test(skip="COUNTER_CRASH" not in os.environ)
async def test_must_fail_hard(dut):
    os.abort()
