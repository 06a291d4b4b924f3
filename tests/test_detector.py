"""The sparsity detector against golden and against its register contract."""

import random
import unittest

import torch
from amaranth.sim import Simulator

from golden import detector as golden
from hw.config import TINY
from hw.detector import Detector


def simulate(bench):
    """Run ``bench(context, detector)``."""
    dut = Detector(TINY)

    async def testbench(ctx):
        await bench(ctx, dut)

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(testbench)
    simulator.run()


async def strobe(ctx, signal):
    ctx.set(signal, 1)
    await ctx.tick()
    ctx.set(signal, 0)


async def start(ctx, dut, *, threshold=0, pixels=1, evaluation=0, interval=1):
    """Start a pass and return whether it is due, and the cycles that took."""
    ctx.set(dut.threshold, threshold)
    ctx.set(dut.pixels, pixels)
    ctx.set(dut.evaluation, evaluation)
    ctx.set(dut.interval, interval)
    await strobe(ctx, dut.start)
    cycles = 1
    while ctx.get(dut.busy):
        await ctx.tick()
        cycles += 1
    return ctx.get(dut.due), cycles


class DetectorTests(unittest.TestCase):
    def test_labels(self):
        rng = random.Random(1)
        cases = []
        for _ in range(60):
            pixels = rng.choice((1, 2, 63, 1024, 65535, rng.randint(1, 65535)))
            threshold = rng.choice((0, 1, 65535, 65536, 65537, golden.NEVER,
                                    rng.randrange(65536)))
            edge = -(-threshold * pixels // 65536)
            counts = [min(65535, max(0, count)) for count in
                      (0, edge - 1, edge, edge + 1, pixels - 1, pixels, 65535)]
            cases.append((pixels, threshold, counts))

        async def bench(ctx, dut):
            for pixels, threshold, counts in cases:
                for entry, count in enumerate(counts):
                    ctx.set(dut.w_enable, 1)
                    ctx.set(dut.w_entry, 100 + entry)
                    ctx.set(dut.w_count, count)
                    await ctx.tick()
                ctx.set(dut.w_enable, 0)
                await start(ctx, dut, threshold=threshold, pixels=pixels)
                seen = []
                for entry in range(len(counts)):
                    ctx.set(dut.entry, 100 + entry)
                    await ctx.tick()
                    self.assertEqual(ctx.get(dut.count), counts[entry])
                    seen.append(bool(ctx.get(dut.sparse)))
                expected = golden.labels(torch.tensor(counts), pixels, threshold,
                                         torch.ones(len(counts), dtype=torch.bool))
                self.assertEqual(seen, expected.tolist(), (pixels, threshold, counts))

        simulate(bench)

    def test_due(self):
        rng = random.Random(2)
        cases = [(0, 1), (0, 65535), (65535, 65535), (65535, 5), (65535, 2), (1, 65535), (17, 17)]
        cases += [(rng.randrange(65536), rng.randint(1, 40)) for _ in range(60)]

        async def bench(ctx, dut):
            for evaluation, interval in cases:
                due, cycles = await start(ctx, dut, evaluation=evaluation, interval=interval)
                self.assertEqual(due, evaluation % interval == 0, (evaluation, interval))
                self.assertEqual(cycles, 17)

        simulate(bench)

    def test_registers(self):
        async def bench(ctx, dut):
            ctx.set(dut.register_data, 40)
            await strobe(ctx, dut.register_entry_write)
            for count in (7, 8, 65535):
                ctx.set(dut.register_data, count)
                await strobe(ctx, dut.register_count_write)
            self.assertEqual(ctx.get(dut.register_entry), 43)
            ctx.set(dut.register_data, 41)
            await strobe(ctx, dut.register_entry_write)
            for count in (8, 65535):
                await strobe(ctx, dut.register_count_read)
                self.assertEqual(ctx.get(dut.count), count)
            self.assertEqual(ctx.get(dut.register_entry), 43)

        simulate(bench)

    def test_entries_beyond_the_memory_are_not_written(self):
        async def bench(ctx, dut):
            for entry, count in ((0, 5), (TINY.detector_depth, 6), (65535, 7)):
                ctx.set(dut.register_data, entry)
                await strobe(ctx, dut.register_entry_write)
                ctx.set(dut.register_data, count)
                await strobe(ctx, dut.register_count_write)
            ctx.set(dut.entry, 0)
            await ctx.tick()
            self.assertEqual(ctx.get(dut.count), 5)
            ctx.set(dut.entry, TINY.detector_depth - 1)
            await ctx.tick()
            self.assertEqual(ctx.get(dut.count), 0)

        simulate(bench)


if __name__ == "__main__":
    unittest.main()
