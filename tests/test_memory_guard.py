"""The guard: what lies inside passes untouched, what lies outside does not reach memory."""

import collections
import random

import pytest
from amaranth import Const

from hw.config import TINY
from hw.memory_guard import MemoryGuard, inside
from tests.pe_model import STALLS, simulate

LAST = (1 << TINY.address_width) - 1
WINDOWS = [(0, LAST + 1), (100, 101), (100, 100), (LAST, LAST + 1), (300, 700)]


class FewWrites(MemoryGuard):
    """A guard that lets few writes be on their way, so that a short test reaches the limit."""

    outstanding = 3


def near(rng, base, limit):
    """Addresses around both ends of a window."""
    place = rng.choice((base - 1, base, limit - 1, limit, base + 1, rng.randint(0, LAST)))
    return max(0, min(LAST, place))


@pytest.mark.parametrize("unit_stall", STALLS)
@pytest.mark.parametrize("memory_stall", STALLS)
def test_traffic(unit_stall, memory_stall):
    """Reads, writes and their answers, held up on either side, in windows of all kinds."""
    dut = MemoryGuard(TINY)
    rng = random.Random(int(100 * unit_stall + 10 * memory_stall))

    async def bench(ctx):
        waiting, outside = 0, [0, 0]
        for windows in zip(WINDOWS, reversed(WINDOWS)):
            (read_base, read_limit), (write_base, write_limit) = windows
            ctx.set(dut.read_base, read_base & LAST)
            for _ in range(60):
                asked = near(rng, read_base, read_limit)
                target = near(rng, write_base, write_limit)
                payload = {"address": target, "data": rng.getrandbits(64),
                           "strobe": rng.getrandbits(8)}
                word = rng.getrandbits(64)
                reads, writes = rng.random() >= unit_stall, rng.random() >= unit_stall
                takes = rng.random() >= unit_stall
                read_ready, write_ready, answers = (
                    rng.random() >= memory_stall for _ in range(3))
                done = waiting > 0 and rng.random() >= memory_stall
                for signal, value in (
                        (dut.read.request.valid, reads), (dut.read.request.payload, asked),
                        (dut.write.request.valid, writes), (dut.write.request.payload, payload),
                        (dut.read.response.ready, takes),
                        (dut.memory.read_request.ready, read_ready),
                        (dut.memory.write_request.ready, write_ready),
                        (dut.memory.read_response.valid, answers),
                        (dut.memory.read_response.payload, word),
                        (dut.memory.write_response.valid, done)):
                    ctx.set(signal, value)
                read_inside = ctx.get(inside(Const(asked), Const(read_base), Const(read_limit)))
                write_inside = ctx.get(
                    inside(Const(target), Const(write_base), Const(write_limit)))
                assert read_inside == (read_base <= asked < read_limit)
                assert write_inside == (write_base <= target < write_limit)
                ctx.set(dut.read_inside, read_inside)
                ctx.set(dut.write_inside, write_inside)
                assert ctx.get(dut.violation) == (
                    (reads and not read_inside) or (writes and not write_inside))
                # reads: a response for each request, in order, whatever was asked for
                assert ctx.get(dut.memory.read_request.valid) == reads
                assert ctx.get(dut.read.request.ready) == read_ready
                if reads:
                    assert ctx.get(dut.memory.read_request.payload) == (
                        asked if read_inside else read_base & LAST)
                assert ctx.get(dut.read.response.valid) == answers
                assert ctx.get(dut.read.response.payload) == word
                assert ctx.get(dut.memory.read_response.ready) == takes
                # writes
                assert ctx.get(dut.memory.write_request.valid) == (writes and write_inside)
                if writes:
                    assert ctx.get(dut.write.request.ready) == (write_ready or not write_inside)
                if writes and write_inside:
                    seen = ctx.get(dut.memory.write_request.payload)
                    assert {name: seen[name] for name in payload} == payload
                assert ctx.get(dut.write.done) == done
                sent = writes and write_inside and write_ready
                assert ctx.get(dut.settled) == (waiting == 0 and not sent)
                outside[0] += reads and not read_inside
                outside[1] += writes and not write_inside
                await ctx.tick()
                waiting += sent - done
        assert min(outside) > 3

    simulate(dut, bench)


def test_writes_wait_for_answers():
    """No more writes are sent than may be on their way."""
    dut = FewWrites(TINY)

    async def bench(ctx):
        ctx.set(dut.write_inside, 1)
        ctx.set(dut.write.request.valid, 1)
        ctx.set(dut.memory.write_request.ready, 1)
        order = collections.Counter()
        for cycle in range(12):
            answer = cycle == 8
            ctx.set(dut.memory.write_response.valid, answer)
            sent = ctx.get(dut.memory.write_request.valid)
            assert sent == ctx.get(dut.write.request.ready)
            order[sent] += 1
            assert not ctx.get(dut.settled)
            await ctx.tick()
        assert order[1] == FewWrites.outstanding + 1

    simulate(dut, bench)
