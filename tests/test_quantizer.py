"""The quantizer lane against exact division."""

import random
import unittest
from fractions import Fraction

from amaranth.sim import Simulator

from hw.descriptor import Format
from hw.quantizer import QuantizerLane


def model(format, low, zero, mantissa, shift, value):
    """Code of a signed element, from its definition."""
    if format == Format.IN16:
        lo = ((value + 128) & 255) - 128
        return lo if low else (value - lo) >> 8
    if zero:
        return 0
    step = (mantissa if format != Format.MX8 else 1) << shift + 1
    limit = {Format.A4U: 15, Format.A4S: 7, Format.MX8: 127}[format]
    code = min(limit, round(Fraction(abs(value), step)))
    return -code if value < 0 else code


def stimuli(format, rng, count):
    """Elements around ties and limits of every step, and elements anywhere."""
    top = (1 << 23) - 1
    for _ in range(count):
        low, zero = rng.randrange(2), rng.random() < 0.05
        mantissa, shift = rng.randint(1, 15), rng.randrange(16)
        if format == Format.IN16:
            value = rng.choice((32639, -32639, 127, 128, -128, -129, rng.randint(-32639, 32639)))
        elif format == Format.MX8:
            value = min(top, rng.randrange(256) * (1 << shift) + rng.choice((-1, 0, 1)))
        else:
            step = mantissa << shift
            value = rng.choice((rng.randrange(40) * step + rng.choice((-1, 0, 1)),
                                rng.randrange(1 << rng.randint(1, 23)), top))
        if format in (Format.A4S, Format.MX8) and rng.random() < 0.5:
            value = -value
        if format == Format.A4U:
            value = max(value, 0)
        yield format, low, int(zero), mantissa, shift, max(-top, min(top, value))


class QuantizerLaneTests(unittest.TestCase):
    def test_all_formats(self):
        dut = QuantizerLane()
        rng = random.Random(5)
        results, expected = [], []

        async def bench(ctx):
            for format in Format:
                ctx.set(dut.format, format)
                seen = []
                cases = list(stimuli(format, rng, 1500))
                for case in cases + cases[:dut.latency - 1]:
                    _, low, zero, mantissa, shift, value = case
                    ctx.set(dut.low, low)
                    ctx.set(dut.zero, zero)
                    ctx.set(dut.mantissa, mantissa)
                    ctx.set(dut.shift, shift)
                    ctx.set(dut.negative, value < 0)
                    ctx.set(dut.magnitude, abs(value))
                    await ctx.tick()
                    seen.append(ctx.get(dut.code))
                results.extend(zip(cases, seen[dut.latency - 1:], strict=True))
                expected.extend((case, model(*case)) for case in cases)

        simulator = Simulator(dut)
        simulator.add_clock(1e-8)
        simulator.add_testbench(bench)
        simulator.run()
        for result, wanted in zip(results, expected, strict=True):
            self.assertEqual(result, wanted)


if __name__ == "__main__":
    unittest.main()
