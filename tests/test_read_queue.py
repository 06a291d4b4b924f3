"""The queue of read responses: nothing waits outside, nothing is lost, and no cycle is added."""

import collections
import random

import pytest

from hw.config import TINY
from hw.read_queue import ReadQueue
from tests.pe_model import STALLS, simulate


class ShortQueue(ReadQueue):
    """A queue that a short test fills."""

    depth = 4


@pytest.mark.parametrize("unit_stall", STALLS)
@pytest.mark.parametrize("memory_stall", STALLS)
@pytest.mark.parametrize("latency", [1, 7])
def test_traffic(unit_stall, memory_stall, latency):
    """Words in order, whoever is held up; memory is never."""
    dut = ShortQueue(TINY)
    rng = random.Random(int(100 * unit_stall + 10 * memory_stall) + latency)

    async def bench(ctx):
        flight, expected = collections.deque(), collections.deque()
        offer, shown, most, got = None, False, 0, 0
        for cycle in range(400):
            if offer is None and cycle < 300 and rng.random() >= unit_stall:
                offer = rng.getrandbits(TINY.address_width)
            ready, takes = rng.random() >= memory_stall, rng.random() >= unit_stall or cycle > 350
            answer = None
            if flight and flight[0][0] <= cycle and rng.random() >= memory_stall / 2:
                answer = flight[0][1]
            word = rng.getrandbits(TINY.port_width) if answer is None else answer
            for signal, value in (
                    (dut.i.request.valid, offer is not None), (dut.i.request.payload, offer or 0),
                    (dut.i.response.ready, takes), (dut.o.request.ready, ready),
                    (dut.o.response.valid, answer is not None), (dut.o.response.payload, word)):
                ctx.set(signal, value)
            assert ctx.get(dut.o.response.ready), "memory must never wait"
            asks = ctx.get(dut.o.request.valid)
            assert asks == (offer is not None and len(expected) < ShortQueue.depth)
            assert asks or not shown, "a request must stay"
            assert ctx.get(dut.i.request.ready) == (ready and len(expected) < ShortQueue.depth)
            arrived = len(expected) - len(flight) + (answer is not None)
            assert ctx.get(dut.i.response.valid) == (arrived > 0), "no cycle is added"
            if arrived:
                assert ctx.get(dut.i.response.payload) == expected[0]
            await ctx.tick()
            if answer is not None:
                flight.popleft()
            if arrived and takes:
                expected.popleft()
                got += 1
            shown = asks and not ready
            if asks and ready:
                word = rng.getrandbits(TINY.port_width)
                flight.append((cycle + latency, word))
                expected.append(word)
                offer = None
            most = max(most, len(expected))
        assert not expected and got > 10
        if unit_stall == 0.5 and memory_stall < 0.9 and latency == 7:
            assert most == ShortQueue.depth
        if not unit_stall and not memory_stall and latency == 1:
            assert got == 300       # a word a cycle

    simulate(dut, bench)
