"""The affine lane against exact arithmetic."""

import random
import unittest
from fractions import Fraction

from amaranth.sim import Simulator

from hw.affine import LARGEST, LARGEST_INPUT, AffineLane


def model(x, gain, offset, valid, shift, relu, raw):
    """Sign, magnitude and clip flag, from the definition."""
    if not valid:
        return 0, 0, 0
    exact = x if raw else round(Fraction(x * gain, 1 << shift)) + offset
    limit = LARGEST_INPUT if raw else LARGEST
    y = max(-limit, min(limit, exact))
    clipped = int(y != exact)
    y = max(y, 0) if relu else y
    return int(y < 0), abs(y), clipped


class AffineLaneTests(unittest.TestCase):
    def test_against_model(self):
        dut = AffineLane()
        rng = random.Random(6)

        def element():
            narrow = (-32768, 32767, 0, 1, -1, rng.randint(-32768, 32767))
            return (rng.choice(narrow), rng.choice(narrow),
                    rng.choice((0, 2**31 - 1, -2**31, LARGEST, -LARGEST,
                                rng.randint(-2**23, 2**23), rng.randint(-300, 300))),
                    int(rng.random() < 0.9))

        async def bench(ctx):
            for shift in range(32):
                relu, raw = rng.randrange(2), int(rng.random() < 0.2)
                ctx.set(dut.shift, shift)
                ctx.set(dut.relu, relu)
                ctx.set(dut.raw, raw)
                cases = [element() for _ in range(120)]
                seen = []
                for x, gain, offset, valid in cases + cases[:dut.latency - 1]:
                    ctx.set(dut.x, x)
                    ctx.set(dut.gain, gain)
                    ctx.set(dut.offset, offset)
                    ctx.set(dut.valid, valid)
                    await ctx.tick()
                    seen.append((ctx.get(dut.negative), ctx.get(dut.magnitude),
                                 ctx.get(dut.clipped)))
                for case, result in zip(cases, seen[dut.latency - 1:], strict=True):
                    self.assertEqual(result, model(*case, shift, relu, raw), (case, shift))

        simulator = Simulator(dut)
        simulator.add_clock(1e-8)
        simulator.add_testbench(bench)
        simulator.run()


if __name__ == "__main__":
    unittest.main()
