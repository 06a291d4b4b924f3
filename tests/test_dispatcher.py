"""The dispatcher: every operand in its place on the side of its label, and no other read."""

import collections
import itertools
import random
from dataclasses import replace

import pytest

from hw.config import TINY
from hw.dispatcher import PADDING, Dispatcher
from tests import naive
from tests.pe_model import (
    STALLS,
    code_words,
    dense_weights,
    geometry,
    nibbles,
    padded_outputs,
    port_bytes,
    simulate,
    sparse_weights,
    weight_scale_rows,
)

DENSE = replace(TINY, name="dense", sparse_pes=0, dense_lanes=16, dense_scale_units=8)
WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8, sparse_lanes=64,
               sparse_scale_units=16, max_channels=96)
PORTS = ("table", "scales", "dense_codes", "dense_weights", "dense_weight_scales",
         "sparse_codes", "sparse_weights", "sparse_weight_scales")


class Case:
    """A layer's operands: memory, the reads and the writes of all buffers."""

    def __init__(self, config, rng, format, height, width, kernel, outputs, channels,
                 sparse=0):
        vector, quad = config.vector, config.quad
        mx = format in (naive.MX8, naive.IN16)
        slot_words = 2 if format == naive.IN16 else -(-channels // vector)
        slots, pixels, taps = slot_words * vector, height * width, kernel * kernel
        planes = (0, 4) if mx else (0,)
        outputs_padded = padded_outputs(config, outputs)

        # the lists; padding slots are in none, or keep their place in the natural order
        order = rng.sample(range(channels), channels)
        lists = [sorted(order[sparse:]), sorted(order[:sparse])]
        if mx:
            lists = [[slot if slot < channels or format == naive.IN16 else PADDING
                      for slot in range(slots)], []]
        self.positions = []
        for entries in lists:
            self.positions += entries + [PADDING] * (-len(entries) % vector)
        words = [-(-len(entries) // vector) for entries in lists]
        self.head = len(lists[0]) | len(lists[1]) << 16
        self.geometries = [geometry(config, height, width, kernel=kernel, outputs=outputs,
                                    words=count, format=format) for count in words]
        groups = self.geometries[0]["groups"]

        def numbers(count, bits):
            return [rng.getrandbits(bits) for _ in range(count)]

        weights = [[numbers(outputs_padded, 8) for _ in range(taps)] for _ in range(slots)]
        weight_scales = [[numbers(groups, 8) for _ in range(taps)]
                         for _ in range(outputs_padded)]
        codes = [numbers(pixels, 8) for _ in self.positions]
        scales = numbers(groups * pixels, 8)
        table = numbers(outputs_padded * 64 // config.port_width, config.port_width)
        row = [[nibbles(code >> shift for code in weights[slot][tap][first:first + vector])
                for tap in range(taps) for shift in planes
                for first in range(0, outputs_padded, vector)] for slot in range(slots)]
        regions = {
            "permutation": [self.head] + [
                sum(entry << 16 * n for n, entry in enumerate(self.positions[first:first + quad]))
                for first in range(0, len(self.positions), quad)],
            "table": table,
            "scales": port_bytes(config, scales),
            "weight_scales": port_bytes(config, [
                weight_scales[output][tap][group] for tap in range(taps)
                for group in range(groups) for output in range(outputs_padded)]),
            "weights": list(itertools.chain(*row)),
            "source": code_words(config, codes, mx),
        }
        self.memory, self.layer, place = {}, {}, rng.randrange(50)
        for name, region in rng.sample(list(regions.items()), len(regions)):
            self.layer[name] = place
            self.memory |= {place + n: word for n, word in enumerate(region)}
            place += len(region) + rng.randrange(3)
        assert place < 1 << config.address_width
        self.layer |= {
            "format": format, "mx": int(mx), "height": height, "width": width, "plane": pixels,
            "kernel": kernel, "outputs": outputs, "slot_words": slot_words,
            "output_words": outputs_padded // vector}
        rows = [(self.layer["weights"] + slot * len(row[0]), len(row[0]))
                for slot in self.positions if slot != PADDING]
        self.reads = [address for first, count in (
            *((self.layer[name], len(regions[name]))
              for name in ("permutation", "table", "scales", "weight_scales")), *rows,
            (self.layer["source"], len(regions["source"]))) for address in range(
                first, first + count)]

        # what the buffers must hold
        none = [[0] * outputs_padded] * taps
        ordered = [none if slot == PADDING else weights[slot] for slot in self.positions]
        split = words[0] * vector
        halves = ordered[:split], ordered[split:]
        self.buffers = {name: {} for name in PORTS}
        self.buffers["table"] = dict(enumerate(table))
        self.buffers["scales"] = dict(enumerate(regions["scales"]))
        if words[0]:
            self.buffers["dense_weights"] = {
                (number, column): word for (number, column), word in dense_weights(
                    config, halves[0], mx).items()
                if self.positions[number // (outputs_padded // config.dense_lanes) % words[0]
                                  * vector + column] != PADDING}
        self.buffers["sparse_weights"] = sparse_weights(
            config, [line for line, slot in zip(halves[1], self.positions[split:])
                     if slot != PADDING])
        sides = [("dense", config.dense_scale_units)]
        if not mx:
            sides.append(("sparse", config.sparse_scale_units))
        for side, units in sides:
            self.buffers[f"{side}_weight_scales"] = dict(enumerate(
                weight_scale_rows(config, weight_scales, units)))
        dense_total = words[0] * pixels * len(planes)
        for side, part in (("dense", regions["source"][:dense_total]),
                           ("sparse", regions["source"][dense_total:])):
            self.buffers[f"{side}_codes"] = dict(enumerate(part))


class Bench:
    """Memory with stalls, and monitors of all buffer writes."""

    def __init__(self, ctx, dut, rng, stalls=(0, 0), latency=1):
        self.ctx, self.dut, self.rng = ctx, dut, rng
        self.stalls, self.latency = stalls, latency

    async def run(self, case):
        """Load; "done" or "refused", the addresses read, and the buffers' new words."""
        ctx, dut, rng = self.ctx, self.dut, self.rng
        read = dut.read
        ctx.set(dut.layer, case.layer)
        ctx.set(dut.start, 1)
        await ctx.tick()
        ctx.set(dut.start, 0)
        reads, buffers = [], {name: {} for name in PORTS}
        waiting, offered, verdict = collections.deque(), None, None
        cycle = after = 0
        while after < 8:
            ready = rng.random() >= self.stalls[0]
            if offered is None and waiting and waiting[0][0] <= cycle:
                if rng.random() >= self.stalls[1]:
                    offered = waiting.popleft()[1]
            ctx.set(read.request.ready, ready)
            ctx.set(read.response.valid, offered is not None)
            ctx.set(read.response.payload, 12345 if offered is None else offered)
            cycle += 1
            if ctx.get(read.request.valid) and ready:
                address = ctx.get(read.request.payload)
                reads.append(address)
                waiting.append((cycle + self.latency - 1, case.memory.get(address, 0)))
            if offered is not None and ctx.get(read.response.ready):
                offered = None
            for name in PORTS:
                port = getattr(dut, name)
                enable = ctx.get(port.enable)
                if enable:
                    address, word = ctx.get(port.address), ctx.get(port.data)
                    for column in range(len(port.enable)):
                        if enable >> column & 1:
                            place = address
                            if name in ("dense_weights", "sparse_weights"):
                                place = address, column
                            assert place not in buffers[name], f"{name} {place} written twice"
                            buffers[name][place] = word
            for name in ("done", "refused"):
                if ctx.get(getattr(dut, name)):
                    assert verdict is None
                    verdict = name
            after += verdict is not None
            await ctx.tick()
            assert cycle < 30_000, "loading must end"
        self.cycles = cycle - after
        assert not waiting and offered is None, "every response must be taken"
        return verdict, reads, buffers

    async def check(self, case):
        verdict, reads, buffers = await self.run(case)
        assert verdict == "done"
        assert reads == case.reads
        sparse = self.dut.config.sparse_pes > 0
        for name in PORTS:
            if sparse or not name.startswith("sparse"):
                assert buffers[name] == case.buffers[name], name
        for side, expected in zip(("dense", "sparse"), case.geometries):
            seen = self.ctx.get(getattr(self.dut, f"{side}_geometry"))
            if expected["words"] == 0:      # a side that is not started
                expected = {"words": 0}
            assert {name: seen[name] for name in expected} == expected, side


CASES = [    # format, height, width, kernel, outputs, channels, channels of them sparse
    (naive.A4U, 2, 3, 1, 5, 20, 7),
    (naive.A4S, 1, 1, 3, 17, 18, 1),
    (naive.MX8, 1, 5, 1, 17, 20, 0),
    (naive.A4U, 3, 1, 1, 33, 16, 16),
    (naive.IN16, 3, 3, 3, 1, 3, 0),
    (naive.A4U, 1, 2, 1, 16, 33, 0),
    (naive.A4S, 5, 2, 1, 40, 34, 33),
]


def run(config, body, **options):
    dut = Dispatcher(config)
    rng = random.Random(config.vector + config.dense_lanes)

    async def bench(ctx):
        await body(Bench(ctx, dut, rng, **options), rng)

    simulate(dut, bench)


@pytest.mark.parametrize("config", [TINY, DENSE, WIDE], ids=lambda config: config.name)
def test_operands_reach_their_place(config):
    """Formats, sides, sizes and kernels, one layer after the other."""
    async def body(bench, rng):
        for *shape, channels, sparse in CASES:
            await bench.check(Case(config, rng, *shape, channels,
                                   sparse if config.sparse_pes else 0))

    run(config, body)


@pytest.mark.parametrize("response", STALLS)
@pytest.mark.parametrize("request_stall", STALLS)
def test_stalls(request_stall, response):
    async def body(bench, rng):
        for case in ((naive.A4U, 1, 3, 1, 20, 18, 3), (naive.MX8, 2, 1, 1, 3, 16, 0)):
            bench.latency = rng.choice((1, 2, 20))
            await bench.check(Case(TINY, rng, *case))

    run(TINY, body, stalls=(request_stall, response))


def bad_heads(slots, mx, sparse_pes):
    """Lengths of lists that no permutation of a layer with these slots has."""
    yield from ((0, 0), (slots + 1, 0), (0xFFFF, 0), (0, slots + 1), (0, 0xFFFF),
                (slots, 1), (1, slots))
    if mx or not sparse_pes:
        yield from ((slots - 1, 1), (0, slots))
    if mx:
        yield slots - 1, 0


@pytest.mark.parametrize("config", [TINY, DENSE], ids=lambda config: config.name)
@pytest.mark.parametrize("format", [naive.A4U, naive.MX8], ids=["a4", "mx8"])
def test_wrong_lengths(config, format):
    """Such a permutation is refused after its first word; the next layer loads."""
    async def body(bench, rng):
        case = Case(config, rng, format, 1, 1, 1, 3, 20)
        place = case.layer["permutation"]
        for dense, sparse in bad_heads(32, format == naive.MX8, config.sparse_pes):
            case.memory[place] = dense | sparse << 16
            verdict, reads, buffers = await bench.run(case)
            assert verdict == "refused", (dense, sparse)
            assert reads == [place] and not any(buffers.values())
        case.memory[place] = case.head
        await bench.check(case)

    run(config, body)


def test_slots_that_do_not_exist():
    """A list with one is read to its end and refused; nothing is loaded from it."""
    async def body(bench, rng):
        case = Case(TINY, rng, naive.A4U, 1, 1, 1, 3, 36, 14)
        place = case.layer["permutation"]
        count = len(case.positions) // 4
        for position, slot in ((0, 48), (5, 0xFFFE), (len(case.positions) - 1, 48),
                               (len(case.positions) - 4, 60000)):
            word = place + 1 + position // 4
            before = case.memory[word]
            case.memory[word] &= ~(0xFFFF << 16 * (position % 4))
            case.memory[word] |= slot << 16 * (position % 4)
            verdict, reads, buffers = await bench.run(case)
            assert verdict == "refused", position
            assert reads == list(range(place, place + 1 + count))
            assert not any(buffers.values())
            case.memory[word] = before
        await bench.check(case)

    run(TINY, body, stalls=(0.2, 0.5), latency=5)


def test_pace():
    """A port word a cycle, or as many cycles as it holds rows; few cycles around a section."""
    async def body(bench, rng):
        for sparse in (0, 16):
            case = Case(TINY, rng, naive.A4U, 4, 16, 1, 16, 32, sparse)
            await bench.check(case)
            weights, scales = 32 - sparse, 2
            rows = len(case.reads) + 3 * weights + 3 * scales
            sections = 6 + 32
            assert rows < bench.cycles <= rows + 4 * sections

    run(TINY, body)
