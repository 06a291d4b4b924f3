"""Address mappers against the layouts of the memory contract, written as index arithmetic."""

import random
import unittest
from dataclasses import replace

from amaranth.sim import Simulator

from hw.config import SMALL, TINY
from hw.mapper import ActivationMapper, ScaleMapper, WeightMapper


def check(case, unit, stimuli, expected):
    """Apply each dictionary of inputs and compare the outputs named in ``expected``."""
    async def bench(ctx):
        for inputs, outputs in zip(stimuli, expected, strict=True):
            for name, value in inputs.items():
                ctx.set(getattr(unit, name), value)
            await ctx.delay(1e-9)
            for name, value in outputs.items():
                case.assertEqual(ctx.get(getattr(unit, name)), value, (name, inputs))

    simulator = Simulator(unit)
    simulator.add_testbench(bench)
    simulator.run()


CONFIGS = (TINY, SMALL, replace(SMALL, name="wide", vector=32, sparse_lanes=64, max_channels=1024,
                                address_width=28))


class ActivationMapperTests(unittest.TestCase):
    def test_every_word_once(self):
        """Walking a tensor channel-last touches each address from base on exactly once."""
        height, width, words, base = 3, 5, 3, 700
        for unit in (0, 1, 2):
            order = [(word, y, x, sub) for word in range(words) for y in range(height)
                     for x in range(width) for sub in range(1 << unit)]
            stimuli = [{"base": base, "plane": height * width, "word": word,
                        "pixel": y * width + x, "unit": unit, "sub": sub}
                       for word, y, x, sub in order]
            check(self, ActivationMapper(TINY), stimuli,
                  [{"address": base + n} for n in range(len(order))])

    def test_large(self):
        rng = random.Random(2)
        for config in CONFIGS:
            stimuli = []
            for _ in range(200):
                plane = rng.choice((1, 4096, 65535, rng.randint(1, 65535)))
                stimuli.append({
                    "base": rng.randrange(1 << config.address_width), "plane": plane,
                    "word": rng.randrange(config.max_channels // config.vector),
                    "pixel": rng.randrange(plane), "unit": rng.randrange(3),
                    "sub": rng.randrange(4)})
            check(self, ActivationMapper(config), stimuli, [
                {"address": (s["base"] + (s["word"] * s["plane"] + s["pixel"]) * 2 ** s["unit"]
                             + s["sub"]) % (1 << config.address_width)} for s in stimuli])


class ScaleMapperTests(unittest.TestCase):
    def test_every_byte_once(self):
        for config in CONFIGS:
            port = config.port_width // 8
            stimuli = [{"base": 9, "plane": 37, "group": group, "pixel": pixel}
                       for group in range(2) for pixel in range(37)]
            check(self, ScaleMapper(config), stimuli,
                  [{"address": 9 + n // port, "byte": n % port} for n in range(len(stimuli))])


class WeightMapperTests(unittest.TestCase):
    def test_rows_are_contiguous(self):
        stimuli = [{"base": 50, "slot": slot, "row_words": 18, "offset": offset}
                   for slot in range(5) for offset in range(18)]
        check(self, WeightMapper(TINY), stimuli,
              [{"address": 50 + n} for n in range(len(stimuli))])

    def test_large(self):
        rng = random.Random(3)
        for config in CONFIGS:
            stimuli = [{"base": rng.randrange(1 << config.address_width),
                        "slot": rng.randrange(config.max_channels),
                        "row_words": rng.randrange(1, 2048), "offset": rng.randrange(2048)}
                       for _ in range(200)]
            check(self, WeightMapper(config), stimuli, [
                {"address": (s["base"] + s["slot"] * s["row_words"] + s["offset"])
                 % (1 << config.address_width)} for s in stimuli])


if __name__ == "__main__":
    unittest.main()
