# amaranth: UnusedElaboratable=no
"""A ring's places against two plain numbers."""

import random
import unittest

from amaranth.sim import Simulator

from hw.ring import Ring


class RingTests(unittest.TestCase):
    def test_random_traffic(self):
        rng = random.Random(2)
        for depth in (1, 2, 3, 4):
            dut = Ring(depth)

            async def testbench(ctx, dut=dut, depth=depth):
                reserved = filling = filled = emptying = 0
                for _ in range(2000):
                    self.assertEqual(ctx.get(dut.room), reserved < depth)
                    self.assertEqual(ctx.get(dut.ready), filled > 0)
                    busy = rng.random()
                    reserve = reserved < depth and rng.random() < busy
                    fill = filling > 0 and rng.random() < busy
                    take = filled > 0 and rng.random() < 0.5
                    release = emptying > 0 and rng.random() < 0.5
                    for signal, value in ((dut.reserve, reserve), (dut.fill, fill),
                                          (dut.take, take), (dut.release, release)):
                        ctx.set(signal, value)
                    await ctx.tick()
                    reserved += reserve - release
                    filling += reserve - fill
                    filled += fill - take
                    emptying += take - release

            simulator = Simulator(dut)
            simulator.add_clock(1e-8)
            simulator.add_testbench(testbench)
            simulator.run()

    def test_wrong_depth(self):
        for depth in (0, -1, 2.0):
            with self.assertRaisesRegex(
                    ValueError, rf"^depth must be a positive integer, not {depth!r}$"):
                Ring(depth)


if __name__ == "__main__":
    unittest.main()
