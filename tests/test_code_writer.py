"""The writer of a requantization pass against the memory layouts, with stalls on both sides."""

import itertools
import random
import unittest

import numpy as np
import torch
from amaranth.sim import Simulator

from golden import detector as golden
from hw.code_writer import PIXELS, CodeWriter
from hw.config import TINY
from hw.descriptor import Format
from sim import lowering

V, Q = TINY.vector, TINY.quad
PORT = V // 2
BASES = {"permutation": 10, "scales": 100, "destination": 200, "counts": 700}


class Source:
    """What the writer reads: lists, codes, scales and counts, as the units around it hold them."""

    def __init__(self, rng, format, slots, pixels):
        self.format, self.slots, self.pixels = format, slots, pixels
        self.natural = format in (Format.MX8, Format.IN16)
        valid = torch.tensor([rng.random() < 0.9 for _ in range(slots)])
        labels = torch.tensor([rng.random() < 0.4 for _ in range(slots)])
        self.dense, self.sparse = golden.permutation(labels, valid, V, self.natural)
        self.positions = golden.positions(self.dense, self.sparse, V).tolist()
        low, high = {Format.A4U: (0, 15), Format.A4S: (-7, 7)}.get(format, (-128, 127))
        self.codes = np.array([[rng.randint(low, high) if valid[slot] else 0
                                for _ in range(pixels)] for slot in range(slots)])
        self.groups = {Format.MX8: -(-slots // 32), Format.IN16: 2}.get(format, 1)
        self.scales = np.array([[rng.randrange(127) for _ in range(pixels)]
                                for _ in range(self.groups)])
        self.counts = [rng.randrange(65536) for _ in range(slots)]

    def expected(self):
        """{(address, byte): value} of everything that must be written."""
        ordered = np.array([[0] * self.pixels if slot == golden.NO_CHANNEL else self.codes[slot]
                            for slot in self.positions])
        regions = {
            "permutation": lowering.pack_permutation(self.dense, self.sparse, V),
            "destination": lowering.pack_codes(ordered[:, None], self.format, V),
        }
        if self.format != Format.IN16:
            regions["counts"] = lowering.pack_halves(np.array(self.counts), V)
        memory = {(BASES[name] + row, byte): int(value) for name, words in regions.items()
                  for row, word in enumerate(words) for byte, value in enumerate(word)}
        for number, value in enumerate(self.scales.ravel()):
            memory[BASES["scales"] + number // PORT, number % PORT] = int(value)
        return memory


def simulate(source, stall, hold, store, rng):
    """Bytes written, counts handed to the detector, and the busy cycles."""
    dut = CodeWriter(TINY)
    written, stored = {}, {}

    def row_entries(row):
        slots = source.positions[row * Q:row * Q + Q]
        slots += [golden.NO_CHANNEL] * (Q - len(slots))
        return [{"slot": 0 if slot == golden.NO_CHANNEL else slot,
                 "pad": int(slot == golden.NO_CHANNEL)} for slot in slots]

    async def testbench(ctx):
        settings = {
            "lists_ready": 0, "format": source.format, "pixels": source.pixels,
            "words": source.slots // V, "groups": source.groups, "detector": 300,
            "store_counts": store, "dense_count": len(source.dense),
            "sparse_count": len(source.sparse), "dense_words": -(-len(source.dense) // V),
            "sparse_words": -(-len(source.sparse) // V), "start": 1, **BASES}
        for name, value in settings.items():
            ctx.set(getattr(dut, name), value)
        await ctx.tick()
        ctx.set(dut.start, 0)
        filled = taken = released = cycle = 0
        fill = [(pixel, row) for pixel in range(source.pixels) for row in range(source.slots // Q)]
        held = None
        while ctx.get(dut.busy):
            cycle += 1
            assert cycle < 40000, "the writer must end"
            ctx.set(dut.lists_ready, cycle > 5)
            # a row of codes, where the ring has a place
            ctx.set(dut.w_enable, 0)
            done = None
            if fill and fill[0][0] < released + PIXELS and rng.random() >= hold:
                done = fill.pop(0)
                ctx.set(dut.w_enable, 1)
                ctx.set(dut.w_pixel, done[0] % PIXELS)
                ctx.set(dut.w_row, done[1])
                ctx.set(dut.w_codes, sum(
                    (int(source.codes[done[1] * Q + lane][done[0]]) & 255) << 8 * lane
                    for lane in range(Q)))
            ctx.set(dut.pixel_ready, filled > taken)
            ready = rng.random() >= stall
            ctx.set(dut.write.ready, ready)

            valid = ctx.get(dut.write.valid)
            payload = ctx.get(dut.write.payload) if valid else None
            if held is not None:
                assert valid and (payload.address, payload.data, payload.strobe) == held
            held = (payload.address, payload.data, payload.strobe) if valid and not ready else None
            if valid and ready:
                for byte in range(PORT):
                    if payload.strobe >> byte & 1:
                        assert (payload.address, byte) not in written, "no byte is written twice"
                        written[payload.address, byte] = payload.data >> 8 * byte & 255
            if ctx.get(dut.detector_enable):
                entry = ctx.get(dut.detector_entry)
                assert entry not in stored, "no count is stored twice"
                stored[entry] = ctx.get(dut.detector_count)
            reads = []
            if ctx.get(dut.list_enable):
                reads.append((dut.list_entries, row_entries(ctx.get(dut.list_row))))
            if ctx.get(dut.scale_enable):
                group, pixel = ctx.get(dut.scale_group), ctx.get(dut.scale_pixel)
                known = group < source.groups and pixel < source.pixels
                reads.append((dut.scale, int(source.scales[group][pixel]) if known else 85))
            if ctx.get(dut.count_enable):
                row = ctx.get(dut.count_row)
                reads.append((dut.count_row_data, sum(
                    count << 16 * n for n, count in
                    enumerate(source.counts[row * Q:row * Q + Q]))))
            taken += ctx.get(dut.pixel_take)
            released += ctx.get(dut.pixel_release)
            await ctx.tick()
            for signal, value in reads:
                ctx.set(signal, value)
            filled += done is not None and done[1] == source.slots // Q - 1
        assert (taken, released) == (source.pixels, source.pixels)

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(testbench)
    simulator.run()
    return written, stored


class CodeWriterTests(unittest.TestCase):
    def check(self, seed, format, slots, pixels, stall=0.0, hold=0.0, store=False):
        rng = random.Random(seed)
        source = Source(rng, format, slots, pixels)
        written, stored = simulate(source, stall, hold, store, rng)
        self.assertEqual(written, source.expected(), (seed, format, slots, pixels))
        self.assertEqual(stored, {300 + slot: count for slot, count in enumerate(source.counts)}
                         if store else {}, (seed, format, slots, pixels))

    def test_formats(self):
        for seed, (format, slots) in enumerate(itertools.product(
                (Format.A4U, Format.A4S, Format.MX8), (V, 2 * V, 4 * V))):
            self.check(seed, format, slots, 3, store=format != Format.MX8)
        self.check(9, Format.IN16, 2 * V, 3)

    def test_one_pixel(self):
        for seed, format in enumerate(Format):
            self.check(seed, format, 2 * V, 1)

    def test_stalls(self):
        formats = itertools.cycle(Format)
        for seed, (stall, hold) in enumerate(itertools.product((0.0, 0.5, 0.9), repeat=2)):
            for _ in range(2):
                format = next(formats)
                with self.subTest(stall=stall, hold=hold, format=format):
                    self.check(seed, format, 2 * V, 6, stall, hold,
                               store=format in (Format.A4U, Format.A4S))


if __name__ == "__main__":
    unittest.main()
