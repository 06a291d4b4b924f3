"""cocotb tests of hw/post_processor.py; run by tests/test_post_processor.py."""

import collections
import itertools
import os
import random

import cocotb
from cocotb.triggers import Timer

from hw.config import load
from hw.layer import layer_layout
from hw.operands import load_layout
from hw.post_processor import EpilogueLane
from tests import naive, pe_model

CONFIG = load(os.environ.get("PE_CONFIG", "tiny"))
V, Q = CONFIG.vector, CONFIG.quad
PES = range(CONFIG.sparse_pes)
ENTRIES = CONFIG.port_width // 64
TABLE = load_layout(1, CONFIG.max_outputs // ENTRIES, CONFIG.port_width)
MASK = (1 << CONFIG.address_width) - 1
WIDTH = CONFIG.accumulator_width


def seed():
    return cocotb.RANDOM_SEED


class Source:
    """A stream of chunks; one that is offered stays until it is taken."""

    def __init__(self, dut, name, rng, stall):
        self.valid, self.ready, self.payload = (
            getattr(dut, f"{name}__{part}") for part in ("valid", "ready", "payload"))
        self.rng, self.stall, self.chunks, self.offered = rng, stall, collections.deque(), False

    def drive(self):
        if self.chunks and not self.offered:
            self.offered = self.rng.random() >= self.stall
        self.valid.value = self.offered
        chunk = self.chunks[0] if self.offered else [self.rng.getrandbits(WIDTH)] * Q
        self.payload.value = sum((value % (1 << WIDTH)) << n * WIDTH
                                 for n, value in enumerate(chunk))

    def sample(self):
        if int(self.ready.value):
            # without its part, or without a chunk, a side must not be asked for one
            assert self.offered, "ready without a chunk"
            self.chunks.popleft()
            self.offered = False


class Case:
    """Sums of both sides, table, residual and what must be written."""

    def __init__(self, rng, outputs, pixels, *, dense=True, sparse=False, residual=False,
                 extreme=False):
        self.outputs, self.pixels = outputs, pixels
        self.parts = dense, sparse
        self.words = -(-outputs // V)
        self.layer = {
            "plane": pixels, "output_words": self.words, "outputs": outputs,
            "residual": int(residual), "residual_source": rng.getrandbits(CONFIG.address_width),
            "destination": rng.getrandbits(CONFIG.address_width),
            "align_shift": rng.choice((0, 31, rng.randrange(32), rng.randrange(8, 24))),
            "shift": rng.choice((0, 31, rng.randrange(32))),
            "residual_multiplier": rng.choice((0, 65535, rng.getrandbits(16))),
        }
        top = 1 << WIDTH - 2
        real = -(-outputs // Q) * Q         # chunks are whole
        bits = rng.randrange(10, WIDTH - 2)

        def total():
            if extreme:
                near = min(top, 1 << 31 + self.layer["align_shift"])    # where `align` saturates
                return rng.choice((top - 1, -top, near - 1, -near, 0))
            return rng.randint(-1 << bits, 1 << bits)

        self.sums = [[[total() for _ in range(real)] for _ in range(pixels)] for _ in range(2)]
        limit = 32767
        self.multiplier = [rng.choice((limit, -limit - 1, rng.randint(-limit, limit)))
                           for _ in range(outputs)]
        self.bias = [rng.choice((-1 << 31, (1 << 31) - 1, rng.randint(-1 << 24, 1 << 24)))
                     for _ in range(outputs)]
        self.residual = [[rng.choice((limit, -limit - 1, rng.randint(-limit, limit)))
                          for _ in range(outputs)] for _ in range(pixels)]

    def __str__(self):
        return f"{self.outputs} outputs of {self.pixels} pixels, sides {self.parts}, {self.layer}"

    def places(self):
        """Pixel and port word within the pixel of each chunk, and its distance in memory."""
        for pixel, word, sub in itertools.product(range(self.pixels), range(self.words), range(4)):
            yield pixel, 4 * word + sub, (word * self.pixels + pixel) * 4 + sub

    def table(self):
        entries = [bias & 0xFFFFFFFF | (multiplier & 0xFFFF) << 32
                   for multiplier, bias in zip(self.multiplier, self.bias)]
        entries += [0] * (self.words * V - self.outputs)
        return [sum(entry << 64 * n for n, entry in enumerate(entries[first:first + ENTRIES]))
                for first in range(0, len(entries), ENTRIES)]

    def residual_word(self, pixel, chunk):
        values = self.residual[pixel][chunk * Q:(chunk + 1) * Q]
        return sum((value & 0xFFFF) << 16 * n for n, value in enumerate(values))

    def result(self, pixel, output):
        if output >= self.outputs:
            return 0
        total = sum(side[pixel][output] for side, part in zip(self.sums, self.parts) if part)
        residual = [[[self.residual[pixel][output]]]] if self.layer["residual"] else None
        return naive.epilogue(
            [[[total]]], self.layer["align_shift"], [self.multiplier[output]],
            self.layer["shift"], [self.bias[output]], residual,
            self.layer["residual_multiplier"])[0][0][0]

    def writes(self):
        """(address, data) in order."""
        for pixel, chunk, distance in self.places():
            data = sum((self.result(pixel, chunk * Q + n) & 0xFFFF) << 16 * n for n in range(Q))
            yield self.layer["destination"] + distance & MASK, data

    def reads(self):
        """(address, word) in order."""
        if self.layer["residual"]:
            for pixel, chunk, distance in self.places():
                yield (self.layer["residual_source"] + distance & MASK,
                       self.residual_word(pixel, chunk))


class Bench:
    """Clock, sources, memory and checks."""

    def __init__(self, dut):
        self.dut, self.rng = dut, random.Random(seed())

    async def reset(self):
        for handle in ("start", "layer", "dense_part", "sparse_part", "load_table",
                       "write__done", "write__request__ready", "read__request__ready",
                       "read__response__valid", "read__response__payload", "i_dense__valid",
                       *(f"i_sparse_{number}__valid" for number in PES)):
            getattr(self.dut, handle).value = 0
        self.dut.rst.value = 1
        await self.settle()
        await self.rise()
        self.dut.rst.value = 0

    async def settle(self):
        self.dut.clk.value = 0
        await Timer(5, "ns")

    async def rise(self):
        self.dut.clk.value = 1
        await Timer(5, "ns")

    async def tick(self):
        await self.settle()
        await self.rise()

    async def run(self, case, *, stalls=(0, 0, 0, 0, 0), latency=1, wait=0):
        """Run a case; cycles until the last chunk was taken, and until the end.

        ``stalls`` are those of dense and sparse chunks, reads, responses and writes; nothing is
        written in the first ``wait`` cycles.
        """
        dut, rng = self.dut, self.rng
        dut.layer.value = pe_model.packed(layer_layout(CONFIG), case.layer)
        dut.dense_part.value, dut.sparse_part.value = case.parts
        for address, word in enumerate(case.table()):
            dut.load_table.value = pe_model.packed(
                TABLE, {"enable": 1, "address": address, "data": word})
            await self.tick()
        dut.load_table.value = 0
        dut.start.value = 1
        await self.tick()
        dut.start.value = 0

        sources = [Source(dut, "i_dense", rng, stalls[0])]
        sources += [Source(dut, f"i_sparse_{number}", rng, stalls[1]) for number in PES]
        chunks = -(-case.outputs // Q)
        for pixel, chunk in itertools.product(range(case.pixels), range(chunks)):
            dense, sparse = (side[pixel][chunk * Q:(chunk + 1) * Q] for side in case.sums)
            if case.parts[0]:
                sources[0].chunks.append(dense)
            if case.parts[1]:
                sources[1 + pixel % len(PES)].chunks.append(sparse)
        reads, writes = collections.deque(case.reads()), collections.deque(case.writes())
        waiting, offered = collections.deque(), None
        cycle = merging = first_write = idle = 0
        held = None
        while idle < 25:
            for source in sources:
                source.drive()
            if offered is None and waiting and waiting[0][0] <= cycle:
                if rng.random() >= stalls[3]:
                    offered = waiting.popleft()[1]
            dut.read__response__valid.value = offered is not None
            dut.read__response__payload.value = rng.getrandbits(64) if offered is None else offered
            dut.read__request__ready.value = rng.random() >= stalls[2]
            dut.write__request__ready.value = cycle >= wait and rng.random() >= stalls[4]
            await self.settle()
            cycle += 1
            merging += int(dut.merging.value)
            for source in sources:
                source.sample()
            if offered is not None and int(dut.read__response__ready.value):
                offered = None
            if int(dut.read__request__valid.value) and int(dut.read__request__ready.value):
                address, word = reads.popleft() if reads else (None, None)
                assert int(dut.read__request__payload.value) == address, str(case)
                waiting.append((cycle + latency - 1, word))
            valid = int(dut.write__request__valid.value)
            assert valid or held is None, "a write must stay until it is taken"
            if valid:
                first_write = first_write or cycle
                payload = int(dut.write__request__payload.value)
                assert held is None or payload == held, "a write must not change"
                held = payload
                if int(dut.write__request__ready.value):
                    held = None
                    assert writes, f"{case}: a write too many"
                    data = payload >> CONFIG.address_width & (1 << CONFIG.port_width) - 1
                    strobe = payload >> CONFIG.address_width + CONFIG.port_width
                    expected = writes.popleft()
                    assert (payload & MASK, data) == expected, (
                        f"{case} seed {seed()}: {len(writes)} before the end"
                        f" ({payload & MASK}, {data:x}) must be ({expected[0]}, {expected[1]:x})")
                    assert strobe == (1 << CONFIG.port_width // 8) - 1
            busy = int(dut.busy.value)
            assert busy or not writes, f"{case}: busy must last until the last write"
            idle = 0 if busy else idle + 1
            await self.rise()
            assert cycle < 50_000, f"{case} must end"
        assert not reads and not writes and not waiting and offered is None
        assert not any(source.chunks for source in sources)
        return merging, first_write, cycle - idle


async def start(dut):
    bench = Bench(dut)
    await bench.reset()
    return bench


SIDES = [{"dense": True}, {"dense": True, "sparse": True}, {"dense": False, "sparse": True}]


@cocotb.test()
async def test_edges(dut):
    """One pixel and several, partial chunks, padding words, each kind of sides and residual."""
    bench = await start(dut)
    outputs = [1, Q, Q + 1, V - 1, V, V + 1, CONFIG.max_outputs - 1,
               CONFIG.max_outputs]
    for number, (sides, residual) in enumerate(itertools.product(SIDES * 4, (False, True))):
        await bench.run(Case(
            bench.rng, outputs[number % 8], (1, 2, 5)[number // 2 % 3], **sides,
            residual=residual, extreme=number % 5 == 4))


@cocotb.test()
async def test_stalls(dut):
    """Every stream held up by its own fraction, asymmetrically."""
    bench = await start(dut)
    for stalls in ((0, 0, 0, 0, 0.9), (0.9, 0, 0, 0, 0), (0, 0.9, 0, 0, 0.5), (0, 0, 0.9, 0, 0),
                   (0, 0, 0, 0.9, 0), (0.5, 0.9, 0.5, 0, 0.5), (0, 0.5, 0, 0.5, 0.9)):
        case = Case(bench.rng, V + Q + 1, 4, sparse=True, residual=True)
        await bench.run(case, stalls=stalls, latency=bench.rng.choice((1, 2, 30)))


@cocotb.test()
async def test_results_wait(dut):
    """Writes that wait for long hold back chunks and residuals, and lose none."""
    bench = await start(dut)
    for sides in SIDES:
        await bench.run(Case(bench.rng, 2 * V, 6, **sides, residual=True), wait=100, latency=3)


@cocotb.test()
async def test_pace(dut):
    """A chunk a cycle; its result `latency` cycles and two of the queue later."""
    bench = await start(dut)
    for sides in SIDES:
        case = Case(bench.rng, 2 * V, 5, **sides)
        merging, first_write, cycles = await bench.run(case)
        chunks = 5 * 2 * 4
        assert merging == chunks
        assert first_write == 1 + EpilogueLane.latency + 2
        assert cycles == first_write + chunks - 1
