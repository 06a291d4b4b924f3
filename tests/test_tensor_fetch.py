"""The requests of a requantization pass against the memory layout."""

import random
import unittest

from amaranth.sim import Simulator

from hw.config import TINY
from hw.tensor_fetch import TensorFetch
from tests.test_channel_lists import WIDE



def requests(config, words, pixels, has_table, stall, rng):
    """Addresses in order, and the cycles they took."""
    dut = TensorFetch(config)
    seen = []

    async def testbench(ctx):
        ctx.set(dut.has_table, has_table)
        ctx.set(dut.table, 1000)
        ctx.set(dut.source, 2000)
        ctx.set(dut.source_second, 5000)
        ctx.set(dut.first_words, words[0])
        ctx.set(dut.words, sum(words))
        ctx.set(dut.pixels, pixels)
        ctx.set(dut.start, 1)
        await ctx.tick()
        ctx.set(dut.start, 0)
        held = None
        idle = cycle = 0
        while idle < 40:
            ready = rng.random() >= stall
            ctx.set(dut.request.ready, ready)
            valid, payload = ctx.get(dut.request.valid), ctx.get(dut.request.payload)
            if held is not None:
                assert valid and payload == held, "a request must wait until it is taken"
            held = payload if valid and not ready else None
            cycle += 1
            if valid and ready:
                seen.append((payload, cycle))
            idle = idle + 1 if not valid else 0
            await ctx.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(testbench)
    simulator.run()
    return [address for address, _ in seen], seen[-1][1]


class TensorFetchTests(unittest.TestCase):
    def test_order(self):
        rng = random.Random(8)
        for config, words, pixels, has_table in (
                (TINY, [1], 1, True), (TINY, [1], 3, False), (TINY, [2, 1], 6, True),
                (TINY, [1, 3], 5, True), (WIDE, [1, 1], 4, True)):
            expected = list(range(1000, 1000 + 16 * sum(words))) if has_table else []
            for pixel in range(pixels):
                for base, count in zip((2000, 5000), words, strict=False):
                    expected += [base + (word * pixels + pixel) * 4 + sub
                                 for word in range(count) for sub in range(4)]
            for stall in (0.0, 0.5, 0.9):
                with self.subTest(words=words, pixels=pixels, stall=stall):
                    seen, cycles = requests(config, words, pixels, has_table, stall, rng)
                    self.assertEqual(seen, expected)
                    if stall == 0:
                        self.assertEqual(cycles, len(expected) + 1)


if __name__ == "__main__":
    unittest.main()
