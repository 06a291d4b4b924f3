"""Zero counters against a plain list."""

import random
import unittest

from amaranth.sim import Simulator

from hw.config import TINY
from hw.zero_counters import ZeroCounters


class ZeroCountersTests(unittest.TestCase):
    def test_counts(self):
        rng = random.Random(3)
        dut = ZeroCounters(TINY)
        quad = TINY.quad

        async def testbench(ctx):
            for rows, gap in ((2, 0.0), (4, 0.0), (16, 0.3), (3, 0.5)):
                expected = [[0] * quad for _ in range(rows)]
                for pixel in range(20):
                    for row in range(rows):
                        zeros = [rng.randrange(2) for _ in range(quad)]
                        ctx.set(dut.enable, 1)
                        ctx.set(dut.first, pixel == 0)
                        ctx.set(dut.row, row)
                        ctx.set(dut.zeros, sum(zero << n for n, zero in enumerate(zeros)))
                        await ctx.tick()
                        expected[row] = [a + b for a, b in zip(expected[row], zeros, strict=True)]
                        while rng.random() < gap:
                            ctx.set(dut.enable, 0)
                            await ctx.tick()
                ctx.set(dut.enable, 0)
                await ctx.tick()
                for row in range(rows):
                    ctx.set(dut.r_row, row)
                    ctx.set(dut.r_enable, 1)
                    await ctx.tick()
                    ctx.set(dut.r_enable, 0)
                    await ctx.tick()
                    counts = ctx.get(dut.r_counts)
                    self.assertEqual([counts >> 16 * n & 0xFFFF for n in range(quad)],
                                     expected[row])

        simulator = Simulator(dut)
        simulator.add_clock(1e-8)
        simulator.add_testbench(testbench)
        simulator.run()


if __name__ == "__main__":
    unittest.main()
