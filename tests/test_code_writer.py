"""The writer of a requantization pass against the memory layouts, with stalls on both sides."""

import itertools
import random
import unittest

import numpy as np
from amaranth.sim import Simulator

from hw.code_writer import CodeWriter
from hw.config import TINY
from hw.descriptor import Format
from tests.test_channel_lists import WIDE

NO_CHANNEL = 0xFFFF
BASES = {"permutation": 10, "scales": 400, "destination": 1000, "counts": 3900}


def nibbles(values, vector):
    """Port words of V values each, as bytes."""
    values = np.asarray(values).reshape(-1, 2) & 15
    return (values[:, 0] | values[:, 1] << 4).reshape(-1, vector // 2)


def halves(values, vector):
    """Port words of V/4 values of 16 bits each, as bytes."""
    values = np.asarray(values, "<u2")
    return np.pad(values, (0, -len(values) % (vector // 4))).view(np.uint8).reshape(-1, vector // 2)


class Source:
    """What the writer reads: lists, codes, scales and counts, as the units around it hold them."""

    def __init__(self, rng, config, format, slots, pixels, tile_channels):
        self.config, self.format, self.slots, self.pixels = config, format, slots, pixels
        self.mx = format in (Format.MX8, Format.IN16)
        self.tile_channels = 32 if self.mx else tile_channels
        valid = [rng.random() < 0.9 for _ in range(slots)]
        low, high = {Format.A4U: (0, 15), Format.A4S: (-7, 7)}.get(format, (-128, 127))
        self.codes = np.array([[rng.randint(low, high) if valid[slot] else 0
                                for _ in range(pixels)] for slot in range(slots)])
        self.groups = slots // 32 if self.mx else 1
        self.scales = np.array([[rng.randrange(127) for _ in range(pixels)]
                                for _ in range(self.groups)])
        self.counts = [rng.randrange(65536) for _ in range(slots)]
        self.tiles, offset = [], 0
        for first in range(0, slots, self.tile_channels):
            order = list(range(first, min(first + self.tile_channels, slots)))
            if self.mx:
                order = [slot if valid[slot] else NO_CHANNEL for slot in order]
            else:
                order = [slot for slot in order if valid[slot]] or order[:1]
                rng.shuffle(order)
            words = -(-len(order) // config.vector)
            self.tiles.append({
                "count": len(order), "low": rng.randint(0, len(order)),
                "high": rng.randint(0, len(order)), "cut": rng.randint(0, 256), "words": words,
                "first": first, "offset": offset, "last": 0,
                "slots": order + [NO_CHANNEL] * (words * config.vector - len(order))})
            offset += words * pixels * (2 if self.mx else 1)
        self.tiles[-1]["last"] = 1
        self.positions = [(slot, int(n == len(tile["slots"]) - 1))
                          for tile in self.tiles for n, slot in enumerate(tile["slots"])]

    def expected(self):
        """{(address, byte): value} of everything that must be written."""
        vector = self.config.vector
        regions = []
        for number, tile in enumerate(self.tiles):
            order = np.array(tile["slots"])
            there = order != NO_CHANNEL
            fields = [tile[name] for name in ("count", "low", "high", "cut")]
            regions.append((
                BASES["permutation"] + number * (1 + self.tile_channels * 4 // vector),
                np.concatenate([halves(fields + [0] * (vector // 4 - 4), vector),
                                halves(np.where(there, order - tile["first"], NO_CHANNEL),
                                       vector)])))
            codes = np.where(there[:, None], self.codes[np.where(there, order, 0)], 0).T
            planes = np.stack([codes, codes >> 4], 1) if self.mx else codes    # (pixel, [plane], V)
            regions.append((BASES["destination"] + tile["offset"], nibbles(planes, vector)))
        if self.format != Format.IN16:
            regions.append((BASES["counts"], halves(self.counts, vector)))
        memory = {}
        for base, words in regions:
            for row, word in enumerate(words):
                for byte, value in enumerate(word):
                    assert (base + row, byte) not in memory
                    memory[base + row, byte] = int(value)
        port = vector // 2
        for number, value in enumerate(self.scales.ravel()):
            memory[BASES["scales"] + number // port, number % port] = int(value)
        return memory


def simulate(source, stall, hold, store, rng):
    """Bytes written, counts handed to the detector, and the busy cycles."""
    config = source.config
    vector, quad = config.vector, config.quad
    port, rows = vector // 2, source.slots // quad
    dut = CodeWriter(config)
    written, stored = {}, {}
    seen = {}

    def row_entries(row):
        places = source.positions[row * quad:row * quad + quad]
        places += [(NO_CHANNEL, 0)] * (quad - len(places))
        return [{"slot": 0 if slot == NO_CHANNEL else slot, "pad": int(slot == NO_CHANNEL),
                 "last": last} for slot, last in places]

    async def testbench(ctx):
        settings = {
            "format": source.format, "pixels": source.pixels, "words": source.slots // vector,
            "groups": source.groups, "block_words": 1 + source.tile_channels // quad,
            "detector": 300, "store_counts": store, "start": 1, **BASES}
        for name, value in settings.items():
            ctx.set(getattr(dut, name), value)
        await ctx.tick()
        ctx.set(dut.start, 0)
        filled = taken = released = cycle = 0
        fill = [(pixel, row) for pixel in range(source.pixels) for row in range(rows)]
        scales = iter(source.scales.T.ravel())
        tiles = list(source.tiles)
        offered = held = None
        while ctx.get(dut.busy):
            cycle += 1
            assert cycle < 40000, "the writer must end"
            if offered is None and tiles and rng.random() >= hold:
                offered = tiles.pop(0)
                ctx.set(dut.tiles.payload,
                        {name: value for name, value in offered.items() if name != "slots"})
            ctx.set(dut.tiles.valid, offered is not None)
            # a row of codes, where the ring has a place
            ctx.set(dut.w_enable, 0)
            done = None
            if fill and (fill[0][0] - released + 1) * rows <= dut.depth and rng.random() >= hold:
                done = fill.pop(0)
                ctx.set(dut.w_enable, 1)
                ctx.set(dut.w_address, (done[0] * rows + done[1]) % dut.depth)
                ctx.set(dut.w_codes, sum(
                    (int(source.codes[done[1] * quad + lane][done[0]]) & 255) << 8 * lane
                    for lane in range(quad)))
            ctx.set(dut.pixel_ready, filled > taken)
            ready = rng.random() >= stall
            ctx.set(dut.write.ready, ready)

            valid = ctx.get(dut.write.valid)
            payload = ctx.get(dut.write.payload) if valid else None
            if held is not None:
                assert valid and (payload.address, payload.data, payload.strobe) == held
            held = (payload.address, payload.data, payload.strobe) if valid and not ready else None
            if valid and ready:
                for byte in range(port):
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
                reads.append((dut.scale, int(next(scales))))
            if ctx.get(dut.count_enable):
                row = ctx.get(dut.count_row)
                reads.append((dut.count_row_data, sum(
                    count << 16 * n for n, count in
                    enumerate(source.counts[row * quad:row * quad + quad]))))
            if offered is not None and ctx.get(dut.tiles.ready):
                offered = None
            taken += ctx.get(dut.pixel_take)
            released += ctx.get(dut.pixel_release)
            await ctx.tick()
            for signal, value in reads:
                ctx.set(signal, value)
            filled += done is not None and done[1] == rows - 1
        assert (taken, released) == (source.pixels, source.pixels)
        assert not tiles and offered is None and next(scales, None) is None
        seen["cycles"] = cycle

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(testbench)
    simulator.run()
    return written, stored, seen["cycles"]


class CodeWriterTests(unittest.TestCase):
    def check(self, seed, format, slots, pixels, stall=0.0, hold=0.0, store=False, config=TINY,
              tile_channels=32):
        rng = random.Random(seed)
        source = Source(rng, config, format, slots, pixels, tile_channels)
        written, stored, cycles = simulate(source, stall, hold, store, rng)
        self.assertEqual(written, source.expected(), (seed, format, slots, pixels))
        self.assertEqual(stored, {300 + slot: count for slot, count in enumerate(source.counts)}
                         if store else {}, (seed, format, slots, pixels))
        return source, cycles

    def test_formats(self):
        for seed, (format, slots) in enumerate(itertools.product(
                (Format.A4U, Format.A4S), (16, 48, 96))):
            self.check(seed, format, slots, 2, store=True)
        for format, slots in itertools.product((Format.MX8, Format.IN16), (64, 96)):
            self.check(8, format, slots, 2)

    def test_tiles(self):
        for seed, (config, slots, tile_channels) in enumerate((
                (TINY, 112, 64), (WIDE, 192, 96), (WIDE, 160, 64))):
            self.check(seed, Format.A4S, slots, 3, config=config, tile_channels=tile_channels)
        for format in (Format.MX8, Format.IN16):
            self.check(5, format, 64, 3, config=WIDE)

    def test_one_pixel(self):
        for seed, format in enumerate(Format):
            self.check(seed, format, 64, 1)

    def test_stalls(self):
        formats = itertools.cycle(Format)
        for seed, (stall, hold) in enumerate(itertools.product((0.0, 0.5, 0.9), repeat=2)):
            format = next(formats)
            with self.subTest(stall=stall, hold=hold, format=format):
                self.check(seed, format, 64, 4, stall, hold,
                           store=format in (Format.A4U, Format.A4S))

    def test_pace(self):
        """Cycles of a pixel and of a list, as the contract of `CodeWriter` says."""
        for format, slots in ((Format.A4U, 64), (Format.MX8, 64), (Format.IN16, 128)):
            (source, few), (_, many) = (self.check(1, format, slots, pixels) for pixels in (8, 16))
            words = sum(tile["words"] for tile in source.tiles)
            pixel = 4 * words + source.groups + source.mx
            self.assertEqual(many - few, 8 * pixel, format)


if __name__ == "__main__":
    unittest.main()
