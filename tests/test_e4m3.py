"""The scale encoder against golden."""

import random
import unittest

import torch
from amaranth.hdl import Module, Signal
from amaranth.sim import Simulator

from golden import e4m3 as golden
from hw.descriptor import Format
from hw.e4m3 import ScaleEncoder, decode


class DecodeTests(unittest.TestCase):
    def test_all_codes(self):
        code, mantissa, exponent = Signal(8), Signal(4), Signal(4)
        m = Module()
        m.d.comb += [left.eq(right) for left, right in
                     zip((mantissa, exponent), decode(code), strict=True)]
        expected = golden.decode(torch.arange(127))

        async def bench(ctx):
            for number in range(127):
                ctx.set(code, number)
                await ctx.delay(1e-9)
                self.assertEqual((ctx.get(mantissa), ctx.get(exponent)),
                                 (int(expected[0][number]), int(expected[1][number])))

        simulator = Simulator(m)
        simulator.add_testbench(bench)
        simulator.run()


def encode(format, maxima):
    """Codes and zero flags of the maxima, one a cycle, ``latency`` cycles later."""
    dut = ScaleEncoder()
    results = []

    async def bench(ctx):
        ctx.set(dut.format, format)
        for number in [*maxima, *[0] * (dut.latency - 1)]:
            ctx.set(dut.amax, number)
            await ctx.tick()
            results.append((ctx.get(dut.code), ctx.get(dut.zero)))

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    return results[dut.latency - 1:]


class ScaleEncoderTests(unittest.TestCase):
    def maxima(self, n):
        rng = random.Random(n)
        near = [int(mid) * n + delta for mid in golden.midpoints() for delta in (-1, 0, 1)]
        some = [rng.randrange(1 << rng.randint(1, 23)) for _ in range(1500)]
        powers = [(1 << bit) + delta for bit in range(24) for delta in (-1, 0, 1)]
        return [number for number in (*range(600), *near, *some, *powers)
                if 0 <= number < 1 << 23]

    def test_pixel_scales(self):
        for format, n in ((Format.A4U, 15), (Format.A4S, 7)):
            maxima = self.maxima(n)
            codes = golden.scale_code(torch.tensor(maxima), n).tolist()
            self.assertEqual(encode(format, maxima), [(code, int(code == 0)) for code in codes])

    def test_block_scales(self):
        maxima = self.maxima(32)
        leads = [number.bit_length() - 1 for number in maxima]
        self.assertEqual(encode(Format.MX8, maxima),
                         [(lead - 7, 0) if lead >= 7 else (0, 1) for lead in leads])


if __name__ == "__main__":
    unittest.main()
