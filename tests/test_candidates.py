"""Candidates for both PEs: units against integers, and the cycle model's rules."""

import random

import numpy as np
import pytest

from hw.candidates.lanes import DenseLanes, SparseLanes, WordMultiplexer
from hw.candidates.scale_operation import FORMATS, ScaleOperation
from hw.candidates.walker import PairWalker, word_layout
from sim.candidates import (
    Dense, Layer, Sparse, dense_pixels, layer_cycles, slowest, sparse_pixels, with_zeros,
    zero_share,
)
from tests.pe_model import nibbles, packed, simulate


def value(bits, width, is_signed):
    return bits - (1 << width) if is_signed and bits >> width - 1 else bits


def choice(rng, width):
    return rng.choice((0, 1 << width - 1, (1 << width) - 1, rng.getrandbits(width)))


def check_sums(dut, inputs, expected):
    """Drive ``inputs``, a dictionary a cycle; ``expected`` are the sums after some cycles."""
    async def bench(ctx):
        for cycle in range(len(inputs) + dut.latency + 1):
            for name, number in (inputs[cycle] if cycle < len(inputs) else {"valid": 0}).items():
                ctx.set(getattr(dut, name), number)
            if cycle in expected:
                assert [ctx.get(one) for one in dut.sums] == expected[cycle], cycle
            await ctx.tick()

    simulate(dut, bench)


@pytest.mark.parametrize("rate", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_sparse_lanes(rate, seed):
    rng = random.Random(f"{rate} {seed}")
    lanes = 3
    dut = SparseLanes(lanes, rate)
    inputs, expected = [], {}
    for _ in range(12):
        codes_signed, weights_signed = rng.getrandbits(1), rng.getrandbits(1)
        sums = [0] * lanes
        for number in range(rng.choice((1, 1, 3, 8))):
            codes = [value(choice(rng, 4), 4, codes_signed) for _ in range(rate)]
            weights = [choice(rng, 4) for _ in range(rate * lanes)]
            for lane in range(lanes):
                sums[lane] += sum(
                    code * value(weight, 4, weights_signed)
                    for code, weight in zip(codes, weights[lane * rate:]))
            inputs.append({
                "valid": 1, "first": number == 0, "plain": codes, "weights": nibbles(weights),
                "negated": [-code if weights_signed else code for code in codes]})
            if rng.random() < 0.2:
                inputs.append({"valid": 0})
        expected[len(inputs) + dut.latency - 1 if inputs[-1]["valid"]
                 else len(inputs) + dut.latency - 2] = list(sums)
    check_sums(dut, inputs, expected)


@pytest.mark.parametrize("lanes, pixels, half_rate", [(1, 1, False), (2, 2, False), (1, 1, True)])
@pytest.mark.parametrize("seed", range(2))
def test_dense_lanes(lanes, pixels, half_rate, seed):
    rng = random.Random(f"{lanes} {pixels} {half_rate} {seed}")
    vector, bits = 16, 8 if half_rate else 4
    dut = DenseLanes(lanes, pixels, vector, 22, half_rate=half_rate)
    inputs, expected = [], {}
    for _ in range(8):
        codes_signed, weights_signed = rng.getrandbits(1), rng.getrandbits(1)
        sums = [0] * (lanes * pixels)
        for number in range(rng.choice((1, 2, 5))):
            codes = [choice(rng, 4) for _ in range(vector * pixels)]
            weights = [choice(rng, bits) for _ in range(vector * lanes)]
            for lane in range(lanes):
                for pixel in range(pixels):
                    sums[lane * pixels + pixel] += sum(
                        value(weights[lane * vector + n], bits, weights_signed)
                        * value(codes[pixel * vector + n], 4, codes_signed)
                        for n in range(vector))
            inputs.append({
                "valid": 1, "first": number == 0, "codes": nibbles(codes),
                "weights": sum(weight << bits * n for n, weight in enumerate(weights)),
                "codes_signed": codes_signed, "weights_signed": weights_signed})
        expected[len(inputs) + dut.latency - 1] = list(sums)
    check_sums(dut, inputs, expected)


@pytest.mark.parametrize("rate", [2, 4])
def test_word_multiplexer(rate):
    rng = random.Random(rate)
    lanes, vector = 3, 16
    dut = WordMultiplexer(lanes, rate, vector)

    async def bench(ctx):
        before = None
        for _ in range(40):
            weights = [rng.getrandbits(4) for _ in range(lanes * vector)]
            channels = [rng.randrange(vector) for _ in range(rate)]
            ctx.set(dut.weights, nibbles(weights))
            ctx.set(dut.channels, channels)
            await ctx.tick()
            if before is not None:
                assert ctx.get(dut.chosen) == nibbles(
                    before[lane * vector + channel] for lane in range(lanes)
                    for channel in channels)
            before = weights

    simulate(dut, bench)


@pytest.mark.parametrize("scales", FORMATS)
def test_scale_operation(scales):
    rng = random.Random(scales)
    dut = ScaleOperation(scales)
    inputs, totals = [], []
    total = 0
    for number in range(60):
        extreme = number < 9
        one = {"step": 1, "first": number == 0 or number > 9 and rng.random() < 0.3,
               "sum": -15 * 8 * 128 if extreme else rng.randrange(-1 << 17, 1 << 17) >> 2}
        for name in ("factor", "weight_factor"):
            one[name] = 15 if extreme else rng.randrange(16)
        for name in ("shift", "weight_shift"):
            most = 15 if scales == "power of two both" or (
                name == "shift" and scales == "power of two activation") else 14
            one[name] = most if extreme else rng.randrange(most + 1)
        factor = 1 if scales.startswith("power") else one["factor"]
        factor *= 1 if scales == "power of two both" else one["weight_factor"]
        shift = 0 if scales == "integer" else one["shift"] + one["weight_shift"]
        total = (0 if one["first"] else total) + (one["sum"] * factor << shift)
        inputs.append(one)
        totals.append(total)

    async def bench(ctx):
        for cycle in range(len(inputs) + dut.latency):
            for name, number in (inputs[cycle] if cycle < len(inputs) else {"step": 0}).items():
                ctx.set(getattr(dut, name), number)
            if cycle >= dut.latency:
                assert ctx.get(dut.total) == totals[cycle - dut.latency], cycle
            await ctx.tick()

    simulate(dut, bench)


def pair_case(rng, density):
    """Words for a `PairWalker`, and the issues that must come of them."""
    words, issues = [], []
    for _ in range(12):
        done = rng.random() < 0.3
        group = []
        for _ in range(rng.randint(1, 5)):
            codes = [rng.randint(1, 15) if rng.random() < density else 0 for _ in range(16)]
            if any(codes):
                group.append(codes)
        if not group and not done:
            continue
        group = group or [[0] * 16]
        found = []
        for number, codes in enumerate(group):
            last = number + 1 == len(group)
            tag = rng.getrandbits(16)
            words.append({"codes": nibbles(codes), "tag": tag, "last": last, "done": last and done})
            found += [(channel, code, tag) for channel, code in enumerate(codes) if code]
        pairs = [found[n:n + 2] for n in range(0, len(found), 2)] or [[]]
        issues += [(pair, pair is pairs[-1], pair is pairs[-1] and done) for pair in pairs]
    return words, issues


@pytest.mark.parametrize("density", [0.1, 0.35, 1])
@pytest.mark.parametrize("i_stall, o_stall", [(0, 0), (0.5, 0), (0, 0.6)])
def test_pair_walker(density, i_stall, o_stall):
    rng = random.Random(f"{density} {i_stall} {o_stall}")
    dut, layout = PairWalker(), word_layout(16, 16)
    words, expected = pair_case(rng, density)
    issues = []

    async def feed(ctx):
        for word in words:
            while rng.random() < i_stall:
                await ctx.tick()
            ctx.set(dut.i.payload, layout.from_bits(packed(layout, word)))
            ctx.set(dut.i.valid, 1)
            await ctx.tick().until(dut.i.ready)
            ctx.set(dut.i.valid, 0)

    async def take(ctx):
        idle = 0
        while idle < 60:
            idle += 1
            ctx.set(dut.allow, rng.random() >= o_stall)
            if ctx.get(dut.issue):
                pair = [(ctx.get(dut.channels[n]), ctx.get(dut.codes[n]), ctx.get(dut.tags[n]))
                        for n in range(2) if ctx.get(dut.filled) >> n & 1]
                idle = 0
                issues.append((pair, bool(ctx.get(dut.last)), bool(ctx.get(dut.done))))
            await ctx.tick()

    simulate(dut, feed, take)
    assert issues == expected


def layer_of(rng, *, channels=40, outputs=40, kernel=3, density=0.4, evaluations=2):
    return Layer(height=5, width=6, kernel=kernel, outputs=outputs, mx=False,
                 nonzero=rng.random((evaluations, channels, 5, 6)) < density)


def under(layer, y, x):
    """Input pixels of an output pixel."""
    reach = range(-1, 2) if layer.kernel == 3 else (0,)
    return [(y + dy, x + dx) for dy in reach for dx in reach
            if 0 <= y + dy < layer.height and 0 <= x + dx < layer.width]


@pytest.mark.parametrize("choose", ["group", "word", "banks"])
@pytest.mark.parametrize("rate, units", [(2, 4), (4, 16)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_gather_cycles(choose, rate, units, kernel):
    layer = layer_of(np.random.default_rng(rate), kernel=kernel)
    sparse = Sparse(pes=3, rate=rate, units=units, choose=choose)
    cycles = [0] * sparse.pes
    number = 0
    for y in range(layer.height):
        for x in range(layer.width):
            unit = 0
            for v, u in under(layer, y, x):
                codes = layer.nonzero[1, :, v, u]
                parts = {"group": [codes], "word": [codes[:16], codes[16:32], codes[32:]],
                         "banks": [codes[::2], codes[1::2]]}[choose]
                each = rate // 2 if choose == "banks" else rate
                issues = [-(-int(part.sum()) // each) for part in parts]
                total = max(issues) if choose == "banks" else sum(issues)
                unit += max(total, 32 // units) if total else 0
            for _ in range(2):     # tiles of 32 of 40 outputs
                cycles[number % sparse.pes] += unit
                number += 1
    assert slowest(sparse_pixels(layer.nonzero[1], layer, sparse), sparse, layer) == max(cycles)


def test_dense_cycles():
    layer = layer_of(np.random.default_rng(0))
    dense = Dense(lanes=8, units=4)
    visits = sum(len(under(layer, y, x)) for y in range(5) for x in range(6))
    assert dense_pixels(3, layer, dense).sum() == visits * 3 * 5
    assert dense_pixels(1, layer, dense).sum() == visits * 2 * 5    # bound by scale units
    assert dense_pixels(0, layer, dense).sum() == 0


def test_both_sides_share_all_work():
    layer = layer_of(np.random.default_rng(1), channels=64)
    dense, sparse = Dense(), Sparse(pes=1, rate=4, units=16)
    parts = layer_cycles(layer, 1, dense, sparse)
    alone = layer_cycles(layer, 1, None, sparse)
    assert 0 < parts[0] and 0 < parts[1] < alone[1]
    assert 0 < parts[3] < layer.macs and 0 < parts[2] < alone[2] <= layer.macs


@pytest.mark.parametrize("share", [0.3, 0.65, 0.8])
def test_zeros(share):
    rng = np.random.default_rng(2)
    layers = {str(n): layer_of(rng, channels=64, density=0.2 * n + 0.1) for n in range(4)}
    changed = with_zeros(layers, share)
    assert abs(zero_share(changed) - share) < 0.02
    for name, layer in layers.items():
        old, new = layer.nonzero, changed[name].nonzero
        assert not (old & ~new).any() or not (~old & new).any()   # moved one way
