"""Narrowing functions of the hardware against Python's exact arithmetic."""

import random
import unittest
from fractions import Fraction

from amaranth.hdl import Module, Signal, signed, unsigned
from amaranth.sim import Simulator

from hw.rounding import round_half_even, saturate


def evaluate(expression, shape, stimuli, shift=None):
    """Values of ``expression(signal[, shift])`` for each stimulus, and the expression's shape."""
    value = Signal(shape)
    amount = Signal(5)
    result = expression(value) if shift is None else expression(value, amount)
    output = Signal(result.shape())
    m = Module()
    m.d.comb += output.eq(result)
    seen = []

    async def bench(ctx):
        for stimulus in stimuli:
            if shift is None:
                ctx.set(value, stimulus)
            else:
                ctx.set(value, stimulus[0])
                ctx.set(amount, stimulus[1])
            await ctx.delay(1e-9)
            seen.append(ctx.get(output))

    simulator = Simulator(m)
    simulator.add_testbench(bench)
    simulator.run()
    return seen, result.shape()


class RoundHalfEvenTests(unittest.TestCase):
    def test_constant_shifts(self):
        for width, is_signed in ((5, True), (6, False)):
            shape = signed(width) if is_signed else unsigned(width)
            low = -(1 << width - 1) if is_signed else 0
            values = range(low, low + (1 << width))
            for shift in range(9):
                with self.subTest(shape=shape, shift=shift):
                    seen, result = evaluate(lambda v, s=shift: round_half_even(v, s), shape, values)
                    self.assertEqual(seen, [round(Fraction(v, 1 << shift)) for v in values])
                    self.assertEqual((result.width, result.signed), (width + 1, is_signed))

    def test_variable_shifts(self):
        rng = random.Random(1)
        for shape in (signed(32), unsigned(24)):
            low = -(1 << 31) if shape.signed else 0
            high = (1 << 31) - 1 if shape.signed else (1 << 24) - 1
            stimuli = [(value, shift) for shift in range(32) for value in (
                low, high, 0, 1, min(high, (1 << shift) // 2), min(high, 3 * (1 << shift) // 2),
                *(rng.randint(low, high) >> rng.randrange(24) for _ in range(8)))]
            seen, result = evaluate(round_half_even, shape, stimuli, shift=True)
            self.assertEqual(seen, [round(Fraction(v, 1 << s)) for v, s in stimuli])
            self.assertEqual(result.width, shape.width + 1)

    def test_wrong_shift(self):
        with self.assertRaisesRegex(ValueError, r"^shift must be between 0 and 31, not 32$"):
            round_half_even(Signal(4), 32)
        with self.assertRaisesRegex(ValueError, r"^shift must be at most 5 bits wide, not 6$"):
            round_half_even(Signal(4), Signal(6))
        with self.assertRaisesRegex(TypeError, r"^shift must be unsigned, not signed\(3\)$"):
            round_half_even(Signal(4), Signal(signed(3)))


class SaturateTests(unittest.TestCase):
    def test_range(self):
        for shape in (signed(7), unsigned(6), signed(3)):
            low = -(1 << shape.width - 1) if shape.signed else 0
            values = range(low, low + (1 << shape.width))
            for symmetric in (False, True):
                with self.subTest(shape=shape, symmetric=symmetric):
                    seen, result = evaluate(
                        lambda v, s=symmetric: saturate(v, 4, symmetric=s), shape, values)
                    bottom = -7 if symmetric else -8
                    self.assertEqual(seen, [min(7, max(bottom, v)) for v in values])
                    self.assertEqual((result.width, result.signed), (4, True))

    def test_wrong_bits(self):
        with self.assertRaisesRegex(ValueError, r"^bits must be an integer of at least 2, not 1$"):
            saturate(Signal(4), 1)


if __name__ == "__main__":
    unittest.main()
