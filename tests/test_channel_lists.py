"""Channel lists against golden."""

import random
import unittest
from dataclasses import replace

import torch
from amaranth.sim import Simulator

from golden import detector as golden
from hw.channel_lists import ChannelLists, most_slots
from hw.config import TINY

WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8, max_channels=96)


def build(config, channels, labels, natural, base):
    """Counts, cycles and positions of the lists that the unit builds."""
    dut = ChannelLists(config)
    vector, seen = config.vector, {}
    words = [-(-count // vector) for count in channels]

    async def testbench(ctx):
        ctx.set(dut.first_words, words[0])
        ctx.set(dut.words, sum(words))
        ctx.set(dut.channels, channels[0])
        ctx.set(dut.channels_second, channels[1] if len(channels) > 1 else 0)
        ctx.set(dut.natural, natural)
        ctx.set(dut.labelled, not natural)
        ctx.set(dut.base, base)
        for again in range(2):
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            cycles = 0
            while ctx.get(dut.busy):
                entry = ctx.get(dut.detector_entry) - base
                await ctx.tick()
                ctx.set(dut.detector_sparse, bool(labels[entry]) if entry < len(labels) else again)
                cycles += 1
        seen["cycles"] = cycles
        seen["counts"] = ctx.get(dut.dense_count), ctx.get(dut.sparse_count)
        rows = 4 * (ctx.get(dut.dense_words) + ctx.get(dut.sparse_words))
        positions = []
        for row in range(rows):
            ctx.set(dut.row, row)
            ctx.set(dut.enable, 1)
            await ctx.tick()
            ctx.set(dut.enable, 0)
            ctx.set(dut.row, 0)
            await ctx.tick()
            for lane in range(config.quad):
                entry = ctx.get(dut.entries[lane])
                positions.append(golden.NO_CHANNEL if entry.pad else entry.slot)
        seen["positions"] = positions

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(testbench)
    simulator.run()
    return seen


class ChannelListsTests(unittest.TestCase):
    def check(self, config, channels, labels, natural=False, base=0):
        vector = config.vector
        valid = torch.cat([torch.arange(-(-count // vector) * vector) < count
                           for count in channels])
        dense, sparse = golden.permutation(labels & valid, valid, vector, natural)
        seen = build(config, channels, labels.tolist(), natural, base)
        self.assertEqual(seen["counts"], (len(dense), len(sparse)))
        self.assertEqual(seen["positions"], golden.positions(dense, sparse, vector).tolist())
        self.assertEqual(seen["cycles"], len(valid) + 1)

    def test_random_labels(self):
        rng = random.Random(4)
        for config in (TINY, WIDE):
            for _ in range(8):
                words = rng.randint(1, config.max_channels // config.vector)
                first = rng.randint(1, words)
                channels = [rng.randint(1, first * config.vector)]
                first = -(-channels[0] // config.vector)
                if words > first and rng.random() < 0.7:
                    channels.append(rng.randint(1, (words - first) * config.vector))
                slots = sum(-(-count // config.vector) for count in channels) * config.vector
                share = rng.choice((0.1, 0.5, 0.9))
                labels = torch.tensor([rng.random() < share for _ in range(slots)])
                self.check(config, channels, labels, base=rng.randrange(1000))

    def test_one_side_only(self):
        for config in (TINY, WIDE):
            for channels in ([1], [config.vector], [config.max_channels]):
                slots = -(-channels[0] // config.vector) * config.vector
                for label in (False, True):
                    self.check(config, channels, torch.full((slots,), label))

    def test_natural_order_keeps_pads(self):
        for config in (TINY, WIDE):
            vector = config.vector
            for channels in ([3], [3, 3], [vector, vector - 1], [vector + 1]):
                slots = sum(-(-count // vector) for count in channels) * vector
                self.assertLessEqual(slots, most_slots(config))
                self.check(config, channels, torch.ones(slots, dtype=torch.bool), natural=True)


if __name__ == "__main__":
    unittest.main()
