"""Channel lists against golden."""

import random
import unittest
from dataclasses import replace

import torch
from amaranth.sim import Simulator

from golden import detector as golden
from golden.requantizer import slots as golden_slots
from hw.channel_lists import ChannelLists
from hw.config import TINY

WIDE = replace(TINY, name="wide", vector=32, dense_scale_units=8, dense_lanes=8,
               sparse_lanes=32, sparse_scale_units=8, max_channels=192, tile_channels=96)
NARROW = replace(TINY, name="narrow", tile_channels=32)
DENSE = replace(TINY, name="dense", sparse_pes=0)
SPARSE = replace(TINY, name="sparse", dense_pes=0)
FIELDS = ("natural", "balance", "first_slots", "slots", "channels", "channels_second",
          "tile_channels", "dense_limit", "pixels", "cost_word", "cost_nonzero", "cost_group",
          "cost_floor", "base")


def simulate(config, cases, rng):
    """(tiles, entries, cycles to each tile) of each case, one after the other on one unit."""
    dut = ChannelLists(config)
    seen = []

    async def testbench(ctx):
        for case in cases:
            for name in FIELDS:
                ctx.set(getattr(dut, name), case[name])
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            tiles, cycles, cycle = [], [], 0
            ready = 1
            while not tiles or not tiles[-1]["last"]:
                cycle += 1
                assert cycle < 4000, f"{case} must end"
                ready = case["stall"] == 0 or rng.random() >= case["stall"]
                ctx.set(dut.o.ready, ready)
                if ctx.get(dut.o.valid) and ready:
                    tiles.append({name: getattr(ctx.get(dut.o.payload), name)
                                  for name in ("count", "low", "high", "cut", "words", "first",
                                               "offset", "last")})
                    cycles.append(cycle)
                entry = (ctx.get(dut.detector_entry) - case["base"]) & 0xFFFF
                await ctx.tick()
                known = entry < len(case["counts"])
                ctx.set(dut.detector_count, case["counts"][entry] if known else 0xFFFF)
                ctx.set(dut.detector_sparse, case["labels"][entry] if known else 1)
            ctx.set(dut.o.ready, 1)
            entries = []
            for row in range(sum(4 * tile["words"] for tile in tiles)):
                ctx.set(dut.row, row)
                ctx.set(dut.enable, 1)
                await ctx.tick()
                ctx.set(dut.enable, 0)
                ctx.set(dut.row, 0)
                await ctx.tick()
                for lane in range(config.quad):
                    entry = ctx.get(dut.entries[lane])
                    entries.append((golden.NO_CHANNEL if entry.pad else entry.slot, entry.last))
            seen.append((tiles, entries, cycles))

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(testbench)
    simulator.run()
    return seen


def draw(config, rng, mode, channels=None, **settings):
    """A legal pass in ``mode``: labels, balance, mx8 or in16."""
    most, vector = config.max_channels, config.vector
    step = 32 if mode in ("mx8", "in16") else vector
    if channels is None:
        channels = [rng.randint(1, most // 64 * 32)] if mode == "in16" else [
            rng.randint(1, rng.choice((vector, most - vector, most)))]
        left = most - -(-channels[0] // step) * step
        if mode != "in16" and left >= step and rng.random() < 0.6:
            channels.append(rng.randint(1, left))
    pixels = rng.choice((1, 3, 63, 64, 1024, 65535, rng.randint(1, 65535)))
    order, slots = golden_slots(channels, vector, mx=mode in ("mx8", "in16"))
    valid = torch.zeros(slots, dtype=torch.bool)
    valid[order] = True
    first_slots = -(-channels[0] // vector) * vector
    if mode == "in16":
        valid, first_slots, slots = valid.repeat(2), slots, 2 * slots
        channels = channels * 2
    share = rng.random()
    cost = rng.choice((1, 40, 3000, 65535))
    case = {
        "mode": mode, "valid": valid, "natural": int(mode in ("mx8", "in16")),
        "balance": int(mode == "balance"), "first_slots": first_slots, "slots": slots,
        "channels": channels[0], "channels_second": channels[1] if len(channels) > 1 else 0,
        "tile_channels": 32 if mode in ("mx8", "in16")
        else 32 * rng.randint(1, config.tile_channels // 32),
        "dense_limit": rng.choice((255, rng.randint(0, config.tile_channels // vector))),
        "pixels": pixels, "base": rng.randrange(1000), "stall": rng.choice((0, 0, 0.9)),
        "counts": [min(65535, max(0, round(rng.gauss(share * pixels, 0.2 * pixels))))
                   for _ in range(slots)],
        "labels": [int(rng.random() < share) for _ in range(slots)],
        "cost_word": rng.randint(0, cost), "cost_nonzero": rng.randint(0, max(1, cost // 16)),
        "cost_group": rng.randint(0, max(1, cost // 8)), "cost_floor": rng.randint(0, cost),
    }
    return case | settings


def expected(config, case):
    """Golden's lists."""
    sides = {"dense": config.dense_pes > 0, "sparse": config.sparse_pes > 0}
    if case["natural"]:
        return golden.natural_lists(case["valid"])
    common = (case["valid"], config.vector, case["tile_channels"], case["dense_limit"])
    if case["balance"]:
        costs = golden.Costs(*(case[f"cost_{name}"]
                               for name in ("word", "nonzero", "group", "floor")))
        return golden.balanced_lists(torch.tensor(case["counts"]), case["pixels"], costs, *common,
                                     **sides)
    return golden.threshold_lists(torch.tensor(case["labels"], dtype=torch.bool), *common, **sides)


class ChannelListsTests(unittest.TestCase):
    def check(self, config, cases, rng):
        results = simulate(config, cases, rng)
        for case, (tiles, entries, _) in zip(cases, results, strict=True):
            lists = expected(config, case)
            self.assertEqual(len(tiles), len(lists), case)
            positions, offset = [], 0
            for tile, known in zip(tiles, lists, strict=True):
                words = -(-len(known.slots) // config.vector)
                self.assertEqual(tile, {
                    "count": len(known.slots), "low": known.low, "high": known.high,
                    "cut": known.cut, "words": words, "first": known.first,
                    "offset": offset % (1 << config.address_width),
                    "last": int(known is lists[-1])}, case)
                offset += words * case["pixels"] * (2 if case["natural"] else 1)
                places = known.positions(config.vector)
                positions += [(slot if slot == golden.NO_CHANNEL else slot + known.first,
                               int(place == len(places) - 1))
                              for place, slot in enumerate(places.tolist())]
            self.assertEqual(entries, positions, case)
        return results

    def test_random(self):
        rng = random.Random(4)
        for config in (TINY, WIDE, NARROW):
            self.check(config, [draw(config, rng, mode) for mode in
                                ("labels", "balance", "mx8", "balance", "in16", "labels") * 2], rng)

    def test_balanced(self):
        """Splits of all kinds have occurred: at an end, at the limit, with a cut and without."""
        rng = random.Random(5)
        kinds = set()
        for config in (TINY, WIDE):
            cases = [draw(config, rng, "balance", [config.tile_channels - rng.randrange(32)])
                     for _ in range(20)]
            for case, (tiles, *_) in zip(cases, self.check(config, cases, rng), strict=True):
                tile = tiles[0]
                kinds.add("cut" if tile["cut"] else
                          "none" if tile["high"] == 0 else
                          "all" if tile["high"] == tile["count"] else
                          "limit" if tile["high"] == case["dense_limit"] * config.vector
                          else "even")
        self.assertLessEqual({"cut", "none", "all", "limit"}, kinds)

    def test_extremes(self):
        rng = random.Random(6)
        largest = {f"cost_{name}": 65535 for name in ("word", "nonzero", "group", "floor")}
        cases = []
        for config in (TINY, WIDE):
            for counts in (0, 65535):
                for costs in (largest, largest | {"cost_word": 0}, largest | {"cost_floor": 0},
                              largest | {"cost_nonzero": 0, "cost_group": 0}):
                    cases.append(draw(
                        config, rng, "balance", [config.tile_channels], pixels=65535,
                        counts=[counts] * config.tile_channels, **costs))
            self.check(config, cases, rng)
            cases.clear()

    def test_one_side_only(self):
        rng = random.Random(7)
        for config in (DENSE, SPARSE):
            self.check(config, [draw(config, rng, mode) for mode in
                                ("labels", "balance", "mx8", "in16") * 2], rng)

    def test_cycles(self):
        """A tile takes what the contract of `ChannelLists` says."""
        rng = random.Random(8)
        for config, mode, buckets in (
                (TINY, "labels", 2), (TINY, "balance", 64), (WIDE, "balance", 64),
                (TINY, "mx8", 1), (DENSE, "labels", 1)):
            cases = [draw(config, rng, mode, [config.max_channels - rng.randrange(12)], stall=0)
                     for _ in range(4)]
            for case, (tiles, _, cycles) in zip(
                    cases, self.check(config, cases, rng), strict=True):
                before = 6
                for tile, cycle in zip(tiles, cycles, strict=True):
                    slots = min(case["tile_channels"], case["slots"] - tile["first"])
                    pads = tile["words"] * config.vector - tile["count"]
                    known = 2 * slots + buckets + pads + 14
                    if mode == "balance":
                        words = -(-tile["low"] // config.vector)
                        limited = words == min(case["dense_limit"], tile["words"])
                        known += 4 * words + (4 if limited else 15)
                    self.assertEqual(cycle - before, known, case)
                    before = cycle


if __name__ == "__main__":
    unittest.main()
