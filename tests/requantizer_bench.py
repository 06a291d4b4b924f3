"""cocotb tests of hw/requantizer.py against golden; run by tests/test_requantizer.py."""

import collections
import itertools
import os
import random

import cocotb
import numpy as np
import torch
from cocotb.triggers import Timer

from golden import detector, requantizer
from golden.requantizer import Format
from hw.code_writer import ring_depth
from hw.config import load
from hw.memory_port import write_layout
from hw.requantizer import fields_layout
from sim import lowering

CONFIG = load(os.environ.get("REQUANTIZER_CONFIG", "tiny"))
V = CONFIG.vector
PORT_BYTES = V // 2
MOST_INPUTS = CONFIG.max_channels // 64 * 32  # channels of IN16
COUNTS = np.zeros(CONFIG.detector_depth, np.int64)  # as the detector keeps them from test to test


class Memory:
    """The memory behind both ports: latency, stalls, and the rules of a stream.

    ``stalls`` are the fractions of cycles in which requests, responses and writes are held up.
    """

    def __init__(self, dut, rng, stalls, latency):
        self.dut, self.rng, self.latency = dut, rng, latency
        self.stalls = stalls
        self.words = lowering.filler(0, 1 << CONFIG.address_width, V).copy()
        self.waiting = collections.deque()  # (first cycle, word)
        self.reads = 0
        self.held = {}
        self.cycle = 0

    def load(self, first, words):
        self.words[first:first + len(words)] = words

    def drive(self):
        """Inputs of the coming clock edge."""
        dut, rng = self.dut, self.rng
        request, response, write = self.stalls
        dut.read__request__ready.value = rng.random() >= request
        dut.write__request__ready.value = rng.random() >= write
        if self.offered is None and self.waiting and self.waiting[0][0] <= self.cycle:
            if rng.random() >= response:
                self.offered = self.waiting.popleft()[1]
        dut.read__response__valid.value = self.offered is not None
        dut.read__response__payload.value = rng.getrandbits(8 * PORT_BYTES) \
            if self.offered is None else self.offered

    offered = None

    def sample(self):
        """What the clock edge transfers."""
        dut = self.dut
        self.cycle += 1
        if self.transfer("read__request"):
            address = int(dut.read__request__payload.value)
            word = int.from_bytes(self.words[address].tobytes(), "little")
            self.waiting.append((self.cycle + self.latency - 1, word))
            self.reads += 1
        if self.offered is not None and int(dut.read__response__ready.value):
            self.offered = None
        if self.transfer("write__request"):
            payload = int(dut.write__request__payload.value)
            address = payload & (1 << CONFIG.address_width) - 1
            payload >>= CONFIG.address_width
            for byte in range(PORT_BYTES):
                if payload >> 8 * PORT_BYTES + byte & 1:
                    self.words[address, byte] = payload >> 8 * byte & 255

    def transfer(self, name):
        """Whether the stream transfers; a payload that waits must not change."""
        valid = int(getattr(self.dut, f"{name}__valid").value)
        ready = int(getattr(self.dut, f"{name}__ready").value)
        payload = int(getattr(self.dut, f"{name}__payload").value) if valid else None
        if name in self.held:
            assert payload == self.held[name], f"{name} must keep its payload until it is taken"
        self.held.pop(name, None)
        if valid and not ready:
            self.held[name] = payload
        return valid and ready


class Bench:
    """Clock, memory and registers of a requantizer, and the counts its detector should hold."""

    def __init__(self, dut, seed, stalls=(0, 0, 0), latency=1):
        self.dut, self.rng = dut, random.Random(seed)
        self.memory = Memory(dut, self.rng, stalls, latency)
        self.counts = COUNTS

    async def reset(self):
        dut = self.dut
        for name in ("start", "fields", "evaluation", "register_entry_write",
                     "register_count_write", "register_count_read", "register_data",
                     "write__done"):
            getattr(dut, name).value = 0
        dut.rst.value = 1
        await self.ticks(2)
        dut.rst.value = 0

    async def tick(self):
        """One cycle: inputs change while the clock is low, outputs are read before it rises."""
        self.dut.clk.value = 0
        self.memory.drive()
        await Timer(5, "ns")
        self.memory.sample()
        self.dut.clk.value = 1
        await Timer(5, "ns")

    async def ticks(self, count):
        for _ in range(count):
            await self.tick()

    async def strobe(self, name, data=0):
        getattr(self.dut, name).value = 1
        self.dut.register_data.value = int(data)
        await self.tick()
        getattr(self.dut, name).value = 0

    async def store_counts(self, base, counts):
        """Write counts to the detector through its registers."""
        await self.strobe("register_entry_write", base)
        for number, count in enumerate(counts):
            await self.strobe("register_count_write", count)
            self.counts[base + number] = count

    async def stored_counts(self, base, count):
        """Counts of the detector, through its registers."""
        await self.strobe("register_entry_write", base)
        seen = []
        for _ in range(count):
            await self.strobe("register_count_read")
            seen.append(int(self.dut.register_count.value))
        assert int(self.dut.register_entry.value) == base + count
        return np.array(seen)

    async def run(self, case, limit=None):
        """Run a pass, compare all of memory and the detector; return its cycles."""
        memory, dut = self.memory, self.dut
        expected = case.place(memory, self.counts)
        dut.fields.value = case.fields_value()
        dut.evaluation.value = case.evaluation
        dut.start.value = 1
        await self.tick()
        dut.start.value = 0
        first, reads = memory.cycle, memory.reads
        slowest = max(1 / (1 - stall) for stall in memory.stalls)
        limit = limit or int((2000 + 4 * case.work) * slowest * 1.5) + 200 * memory.latency
        await self.tick()
        while int(dut.busy.value):
            assert memory.cycle - first < limit, f"{case} must end within {limit} cycles"
            await self.tick()
        cycles = memory.cycle - first
        await self.ticks(3)
        assert not memory.waiting and memory.offered is None, f"{case} must take what it asked for"
        assert memory.reads - reads == case.reads, f"{case} must read each word once"
        assert int(dut.saturations.value) == case.codes.saturations, \
            f"{case}: saturations {int(dut.saturations.value)} must be {case.codes.saturations}"
        for name, (start, end) in case.regions.items():
            different = np.argwhere(memory.words[start:end] != expected[start:end])
            assert not len(different), (
                f"{case}: {name} word {different[0][0]} byte {different[0][1]} of"
                f" {end - start} words must be {expected[start:end][different[0][0]]},"
                f" not {memory.words[start:end][different[0][0]]}")
        assert (memory.words == expected).all(), f"{case} must write nowhere else"
        if case.updates:
            self.counts[case.base:case.base + case.slots] = case.codes.zero_counts
        base = max(0, case.base - 1)
        end = min(CONFIG.detector_depth, case.base + case.slots + 1)
        seen = await self.stored_counts(base, end - base)
        assert (seen == self.counts[base:end]).all(), f"{case}: detector {seen}"
        return cycles


class Case:
    """A random legal pass."""

    def __init__(self, rng, format=None, channels=None, size=None, labels=None, spread=None,
                 evaluation=None, interval=1, base=None):
        self.rng = rng
        most = CONFIG.max_channels
        self.format = Format(rng.choice(list(Format)) if format is None else format)
        step = 32 if self.format == Format.MX8 else V
        if channels is None:
            channels = [rng.choice((1, V, rng.randint(1, V), rng.randint(1, MOST_INPUTS)))]
            if self.format != Format.IN16:
                channels = [rng.randint(1, rng.choice((V, 4 * V, most)))]
                left = most - -(-channels[0] // step) * step
                if left and rng.random() < 0.4:
                    channels.append(rng.randint(1, left))
        self.channels = channels
        self.tile_channels = 32 if self.format.mx else 32 * rng.randint(
            1, CONFIG.tile_channels // 32)
        self.dense_limit = rng.choice((255, 255, rng.randint(0, CONFIG.tile_channels // V)))
        self.height, self.width = size or rng.choice(
            ((1, 1), (1, 2), (2, 1), (3, 3), (1, 5), (rng.randint(1, 6), rng.randint(1, 6))))
        self.pixels = self.height * self.width
        self.labels = labels or rng.choice(("dense", "sparse", "mixed", "balanced", "balanced"))
        self.costs = detector.Costs(*(rng.randint(0, most) for most in (400, 100, 60, 400)))
        self.evaluation = rng.randrange(40) if evaluation is None else evaluation
        self.interval = interval
        self.generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        step = 32 if self.format.mx else V
        self.slots = -(-sum(-(-count // V) * V for count in channels) // step) * step
        if self.format == Format.IN16:
            self.slots *= 2
        self.base = rng.randrange(CONFIG.detector_depth - self.slots) if base is None else base
        self.operands(rng.choice(("small", "wide", "huge", "sparse")) if spread is None else spread)

    def __str__(self):
        return (f"{self.format.name} {self.channels} channels {self.height}x{self.width}"
                f" {self.labels} {self.spread} evaluation {self.evaluation}")

    def integers(self, low, high, shape):
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def operands(self, spread):
        """Input, coefficients and the golden result."""
        rng, generator = self.rng, self.generator
        self.spread = spread
        total = sum(self.channels)
        shape = (total, self.height, self.width)
        bits = {"small": 6, "wide": 12, "huge": 15, "sparse": 13}[spread]
        x = self.integers(-(1 << bits), (1 << bits) - 1, shape)
        x[torch.rand(shape, generator=generator) < 0.1] = rng.choice((0, 32767, -32768))
        x[:, torch.rand(shape[1:], generator=generator) < 0.1] = 0
        if spread == "sparse":
            x[torch.rand(shape, generator=generator) < 0.7] = -5
        self.segments = list(x.split(self.channels))
        self.relu = self.format == Format.A4U or (
            self.format in (Format.A4S, Format.MX8) and rng.random() < 0.3)
        self.shift = rng.randrange(32)
        gain = offset = None
        if self.format != Format.IN16:
            gain = self.integers(-32768, 32767, (total,))
            reach = {"small": 4, "wide": 12, "huge": 31, "sparse": 0}[spread]
            offset = self.integers(-(1 << reach), (1 << reach) - 1, (total,))
            if spread == "small":
                self.shift = rng.randint(8, 24)
            gain, offset = (requantizer.spread(t, self.channels, V, mx=self.format.mx)
                            for t in (gain, offset))
        else:
            self.shift = 0
        self.gain, self.offset = gain, offset
        self.codes = requantizer.requantize(
            self.segments, gain, offset, self.shift, self.relu, self.format, V)

    @property
    def natural(self):
        return self.format.mx

    @property
    def updates(self):
        return not self.natural and self.evaluation % self.interval == 0

    @property
    def threshold(self):
        return {"dense": detector.NEVER, "sparse": 0}.get(self.labels, 30000)

    @property
    def balanced(self):
        return self.labels == "balanced" and not self.natural

    @property
    def reads(self):
        words = sum(-(-count // V) for count in self.channels)
        return (0 if self.format == Format.IN16 else 16 * words) + 4 * words * self.pixels

    @property
    def work(self):
        """Port words of the pass, roughly."""
        return 100 * self.slots // V + (5 * self.slots // V + 12) * self.pixels

    def list_cycles(self):
        """What `ChannelLists` takes, by its contract; the case must have been placed."""
        sides = bool(CONFIG.dense_pes and CONFIG.sparse_pes) and not self.natural
        cycles = 6
        for tile in self.lists:
            words = -(-len(tile.slots) // V)
            cycles += 2 * tile.size + 14 + words * V - len(tile.slots)
            cycles += (64 if self.balanced else 2) if sides else 1
            if sides and self.balanced:
                taken = -(-tile.low // V)
                cycles += 4 * taken + (4 if taken == min(words, self.dense_limit) else 15)
        return cycles

    def stored(self):
        """Counts to put into the detector first, so that labels are as asked for."""
        counts = self.integers(0, self.pixels, (self.slots,))
        counts[torch.rand(self.slots, generator=self.generator) < 0.1] = \
            -(-self.threshold * self.pixels // 65536) if self.labels == "mixed" else 0
        if self.balanced:
            counts[torch.rand(self.slots, generator=self.generator) < 0.05] = 65535
        return counts

    def place(self, memory, counts):
        """Put the operands into memory; set the regions; return memory as it must become."""
        codes, word_bytes = self.codes, V // 2
        counts = torch.tensor(counts[self.base:self.base + self.slots])
        common = {"tile_channels": self.tile_channels, "dense_limit": self.dense_limit,
                  "dense": CONFIG.dense_pes > 0, "sparse": CONFIG.sparse_pes > 0}
        if self.natural:
            lists = detector.natural_lists(codes.valid)
        elif self.balanced:
            lists = detector.balanced_lists(
                counts, self.pixels, self.costs, codes.valid, V, **common)
        else:
            labels = detector.labels(counts, self.pixels, self.threshold, codes.valid)
            lists = detector.threshold_lists(labels, codes.valid, V, **common)
        loads = {f"segment_{n}": lowering.pack_tensor(self.noisy(segment), V)
                 for n, segment in enumerate(self.segments)}
        if self.gain is not None:
            gain, offset = (torch.where(codes.valid, known, self.integers(-999, 999, known.shape))
                            for known in (self.gain, self.offset))
            loads["table"] = lowering.pack_table(gain, offset, V)
        # The lists leave gaps that are not written.
        block = lowering.block_words(self.tile_channels, V)
        blocks = [lowering.pack_list(tile.slots, tile.low, tile.high, tile.cut, V)
                  for tile in lists]
        stores = {
            "permutation": np.zeros((block * len(lists), word_bytes), np.uint8),
            "scales": lowering.pack_bytes(codes.scales, V),
            "codes": np.concatenate([
                lowering.pack_codes(tile.gather(codes.codes, V), self.format, V)
                for tile in lists]),
        }
        if self.format != Format.IN16:
            stores["counts"] = lowering.pack_halves(codes.zero_counts, V)
        self.regions, self.lists = {}, lists
        place = self.rng.randrange(1, 50)
        order = [*loads.items(), *stores.items()]
        self.rng.shuffle(order)
        for name, words in order:
            self.regions[name] = (place, place + len(words))
            place += len(words) + self.rng.randrange(3)
        assert place <= len(memory.words), "case must fit memory"
        memory.load(0, lowering.filler(0, len(memory.words), V))
        for name, words in loads.items():
            memory.load(self.regions[name][0], words)
        expected = memory.words.copy()
        for name, words in stores.items():
            first, end = self.regions[name]
            if name == "permutation":
                for number, words in enumerate(blocks):
                    place = first + number * block
                    expected[place:place + len(words)] = words
            else:
                expected[first:end] = words
        first, end = self.regions["scales"]
        used = codes.scales.numel()
        expected[first:end].reshape(-1)[used:] = memory.words[first:end].reshape(-1)[used:]
        return expected

    def noisy(self, segment):
        """``segment`` with noise in slots without a channel, which must not matter."""
        missing = -len(segment) % V
        return torch.cat([segment, self.integers(-32768, 32767, (missing, *segment.shape[1:]))])

    def fields_value(self):
        """The port's value."""
        first = {name: start for name, (start, _) in self.regions.items()}
        values = {
            "format": int(self.format), "relu": int(self.relu), "height": self.height,
            "width": self.width, "channels": self.channels[0],
            "channels_second": self.channels[1] if len(self.channels) > 1 else 0,
            "source": first["segment_0"], "source_second": first.get("segment_1", 0),
            "scales": first["scales"], "permutation": first["permutation"],
            "counts": first.get("counts", 0), "table": first.get("table", 0),
            "destination": first["codes"], "shift": self.shift, "detector": self.base,
            "interval": self.interval, "threshold": self.threshold,
            "balance": int(self.balanced), "tile_channels": self.tile_channels,
            "dense_limit": self.dense_limit, "cost_word": self.costs.word,
            "cost_nonzero": self.costs.nonzero, "cost_group": self.costs.group,
            "cost_floor": self.costs.floor,
        }
        assert set(values) == set(dict(fields_layout(CONFIG)))
        return sum(value << fields_layout(CONFIG)[name].offset for name, value in values.items())


assert write_layout(CONFIG)["data"].offset == CONFIG.address_width


async def run_case(bench, case):
    await bench.store_counts(case.base, case.stored().tolist())
    return await bench.run(case)


@cocotb.test()
async def test_random_passes(dut):
    """Formats, sizes, segments and labels, without stalls, one pass after the other."""
    seed = cocotb.RANDOM_SEED
    bench = Bench(dut, seed, latency=3)
    await bench.reset()
    for _ in range(40):
        await run_case(bench, Case(bench.rng))


@cocotb.test()
async def test_edges(dut):
    """One pixel, one channel, full words, one channel more, two segments, all kinds of labels."""
    bench = Bench(dut, cocotb.RANDOM_SEED)
    await bench.reset()
    for format in Format:
        most = CONFIG.max_channels
        wide = [[V], [V - 1], [V + 1], [MOST_INPUTS]] if format == Format.IN16 else [
            [V], [V + 1], [V, V], [V - 1, 1], [most], [1, most - V]]
        for channels, labels in itertools.product(
                [[1], *wide], ("dense",) if format.mx else
                ("dense", "sparse", "mixed", "balanced")):
            await run_case(bench, Case(bench.rng, format, channels, (1, 1), labels))


@cocotb.test()
async def test_stalls(dut):
    """Every stream held up by its own fraction, asymmetrically."""
    bench = Bench(dut, cocotb.RANDOM_SEED)
    await bench.reset()
    for stalls in itertools.product((0.0, 0.5, 0.9), repeat=3):
        bench.memory.stalls = stalls
        bench.memory.latency = bench.rng.choice((1, 2, 30))
        channels = bench.rng.choice(([V], [3], [V + 2], [2, 5]))
        format = bench.rng.choice(list(Format)[:3])
        await run_case(bench, Case(bench.rng, format, channels, (2, 3)))
        if sum(stalls) < 1.2:
            await run_case(bench, Case(bench.rng, Format.IN16, [bench.rng.randint(1, V)], (2, 3)))


@cocotb.test()
async def test_labels_follow_the_interval(dut):
    """Counts of a pass label the next one, and only evaluations of the interval store them."""
    bench = Bench(dut, cocotb.RANDOM_SEED)
    await bench.reset()
    base = 77
    await bench.store_counts(base, [bench.rng.randrange(10) for _ in range(2 * V)])
    for evaluation in range(9):
        case = Case(bench.rng, Format.A4U, [2 * V - 3], (3, 3), "mixed", "sparse", evaluation,
                    interval=4, base=base)
        await bench.run(case)
    for evaluation, interval in ((65535, 5), (65535, 65535), (65534, 65535), (1, 7), (0, 9)):
        await bench.run(Case(bench.rng, Format.A4S, [5], (2, 2), "mixed", "sparse", evaluation,
                             interval=interval, base=base))


@cocotb.test()
async def test_pace(dut):
    """Cycles of a pass when memory keeps up; see the contract of `Requantizer`."""
    bench = Bench(dut, cocotb.RANDOM_SEED, latency=2)
    await bench.reset()
    most = min(CONFIG.max_channels, ring_depth(CONFIG) * CONFIG.quad // 3 // V * V)
    for format, channels, labels in (
            (Format.A4U, [most], "dense"), (Format.A4S, [most - 7], "balanced"),
            (Format.MX8, [most], "dense"), (Format.A4U, [V], "dense"), (Format.IN16, [3], "dense"),
            (Format.IN16, [most // 64 * 32 - 1], "dense")):
        seen = []
        for size in ((1, 8), (5, 8)):
            case = Case(bench.rng, format, channels, size, labels)
            case.tile_channels = 32 if format.mx else CONFIG.tile_channels
            cycles = await run_case(bench, case)
            words = [-(-len(tile.slots) // V) for tile in case.lists]
            lists = case.list_cycles() + 4 * words[-1]
            seen.append((cycles, lists))
        pace = (seen[1][0] - seen[0][0]) / 32
        limit = 4 * sum(words) + len(case.codes.scales) + format.mx
        change = abs(seen[1][1] - seen[0][1]) + 8
        assert pace <= limit + change / 32, f"{case}: {pace} cycles a pixel, not {limit}"
        code_words = case.slots // V
        counting = 0 if format == Format.IN16 else case.slots
        rest = cycles - 40 * limit - counting - max(lists, 16 * code_words)
        dut._log.info(f"{case}: {pace} cycles a pixel, lists {lists}, {rest} more")
        limit = 30 + 8 * code_words
        assert rest <= limit, f"{case}: {rest} cycles around the pixels must be at most {limit}"
