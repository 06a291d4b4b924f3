# amaranth: UnusedElaboratable=no
"""The buffer against a list."""

import random

import pytest

from hw.buffer import Buffer, WideBuffer
from tests.pe_model import simulate


@pytest.mark.parametrize("kind, depth, width, columns", [
    (Buffer, 1, 4, 1), (Buffer, 2, 8, 2), (Buffer, 5, 12, 3), (Buffer, 8, 7, 1),
    (WideBuffer, 3, 8, 2), (WideBuffer, 8, 200, 2), (WideBuffer, 4, 32, 1)])
def test_random_traffic(kind, depth, width, columns):
    """Reads, column writes and both at once; every response comes `latency` cycles later."""
    dut = kind(depth, width, columns)
    rng = random.Random(depth)

    async def bench(ctx):
        words = [0] * depth
        part = width // columns
        mask = (1 << part) - 1
        due = [None] * Buffer.latency      # words on their way, the next one to arrive first
        for _ in range(600):
            request, address = rng.random() < 0.6, rng.randrange(depth)
            write, data = rng.getrandbits(columns) * (rng.random() < 0.6), rng.getrandbits(width)
            target = address if rng.random() < 0.4 else rng.randrange(depth)
            for name, value in (("request", request), ("address", address), ("write", write),
                                ("write_address", target), ("write_data", data)):
                ctx.set(getattr(dut, name), value)
            if kind is Buffer:
                assert ctx.get(dut.response) == (due[0] is not None)
            if due[0] is not None:
                assert ctx.get(dut.data) == due[0]
            await ctx.tick()
            due = due[1:] + [words[address] if request else None]
            for column in range(columns):
                if write >> column & 1:
                    words[target] &= ~(mask << column * part)
                    words[target] |= data & mask << column * part

    simulate(dut, bench)


def test_latency():
    dut = Buffer(2, 4)

    async def bench(ctx):
        ctx.set(dut.request, 1)
        await ctx.tick()
        ctx.set(dut.request, 0)
        cycles = 1
        while not ctx.get(dut.response):
            await ctx.tick()
            cycles += 1
        assert cycles == Buffer.latency
        for _ in range(5):
            await ctx.tick()
            assert not ctx.get(dut.response)

    simulate(dut, bench)


@pytest.mark.parametrize("kind", [Buffer, WideBuffer])
def test_wrong_columns(kind):
    with pytest.raises(ValueError, match=r"^columns must divide width 12, not 5$"):
        kind(4, 12, columns=5)
