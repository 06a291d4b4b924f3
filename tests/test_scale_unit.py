"""The scale unit against exact integers, cycle by cycle."""

import random
from dataclasses import replace

import pytest

from hw.config import SMALL, TINY
from hw.scale_unit import ScaleUnit
from tests import naive
from tests.pe_model import simulate

CODES = 127   # E4M3 codes 0x00 to 0x7E
WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8)


def factor(code, mx):
    """What a scale code multiplies a sum by."""
    if mx:
        return 1 << code
    return naive.UNITS[code]


def activation_scale(code, mx):
    """A decoded scale."""
    if mx:
        return {"factor": 1, "shift": code}
    field, mantissa = code >> 3, code & 7
    return {"factor": mantissa + 8 * (field > 0), "shift": max(field, 1) - 1}


class Model:
    """Partial sums as they show, `latency` cycles after the step that made them."""

    def __init__(self):
        self.sums, self.shown, self.pending = {}, {}, []

    def step(self, cycle, place, first, term):
        self.sums[place] = term + (0 if first else self.sums.get(place, 0))
        self.pending.append((cycle + ScaleUnit.latency, place, self.sums[place]))

    def show(self, cycle, place):
        while self.pending and self.pending[0][0] <= cycle:
            _, at, value = self.pending.pop(0)
            self.shown[at] = value
        return self.shown.get(place, 0)


class Bench:
    """Drives a unit and compares a partial sum in every cycle."""

    def __init__(self, ctx, dut, rng, mx):
        self.ctx, self.dut, self.rng, self.mx = ctx, dut, rng, mx
        self.model, self.cycle, self.seen = Model(), 0, 0
        ctx.set(dut.mx, mx)

    async def tick(self, **inputs):
        ctx, dut, rng = self.ctx, self.dut, self.rng
        for name in ("load", "step"):
            ctx.set(getattr(dut, name), 0)
        for name, value in inputs.items():
            ctx.set(getattr(dut, name), value)
        place = rng.randrange(dut.lanes), rng.randrange(2)
        ctx.set(dut.flush_lane, place[0])
        ctx.set(dut.flush_bank, place[1])
        expected = self.model.show(self.cycle, place)
        assert ctx.get(dut.flush_sum) == expected, (place, self.cycle)
        self.seen += expected != 0
        await ctx.tick()
        self.cycle += 1

    async def group(self, sums, *, bank, first, scale, codes, gap, following=None):
        """The steps of sums that are loaded; the next ones are loaded with the last step."""
        for lane, code in enumerate(codes):
            while self.rng.random() < gap:
                await self.tick()
            self.model.step(self.cycle, (lane, bank), first, sums[lane]
                            * factor(scale, self.mx) * factor(code, self.mx))
            inputs = {"load": 1, "sums": following} if following and lane + 1 == len(codes) else {}
            await self.tick(step=1, lane=lane, bank=bank, first_add=first, weight_scale=code,
                            scale=activation_scale(scale, self.mx), **inputs)


@pytest.mark.parametrize("config, lanes", [(TINY, 1), (TINY, 2), (SMALL, 8), (WIDE, 4)],
                         ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx"])
def test_groups(config, lanes, mx):
    """Random and extreme sums, up to the most groups of a tile, back to back and with gaps."""
    dut = ScaleUnit(config, lanes)
    rng = random.Random(lanes + 50 * mx)
    limit = 32 * 128 * 128 if mx else 15 * 8 * config.max_channels
    highest = 15 if mx else CODES - 1
    longest = 9 * (config.max_channels // 32 if mx else 1)

    def sums():
        return [rng.choice((limit, -limit, 0, -1, rng.randint(-limit, limit)))
                for _ in range(lanes)]

    async def bench(ctx):
        bench = Bench(ctx, dut, rng, mx)
        loaded = sums()
        await bench.tick(load=1, sums=loaded)
        for tile in range(16):
            extreme, gap = tile % 4 == 1, rng.choice((0, 0, 0.5))
            groups = longest if extreme else rng.choice((1, 2, 9))
            steps = rng.choice((lanes, lanes, rng.randint(1, lanes)))
            if extreme:
                steps = lanes
            for group in range(groups):
                following = [limit] * lanes if extreme else sums()
                await bench.group(
                    loaded, bank=tile & 1, first=group == 0, gap=gap, following=following,
                    scale=highest if extreme else rng.randint(0, highest),
                    codes=[highest if extreme else rng.randint(0, highest)
                           for _ in range(steps)])
                loaded = following
        for _ in range(ScaleUnit.latency + 4 * lanes):
            await bench.tick()
        assert bench.seen > 30

    simulate(dut, bench)


@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx"])
def test_all_scale_codes(mx):
    """Every weight scale code, and every activation scale code, alone."""
    dut = ScaleUnit(TINY, 1)

    async def bench(ctx):
        bench = Bench(ctx, dut, random.Random(1), mx)
        count = 16 if mx else CODES
        pairs = [(code, count - 1 - code) for code in range(count)]
        pairs += [(count - 1, count - 1), (0, count - 1), (count - 1, 0), (0, 0)]
        await bench.tick(load=1, sums=[-3])
        for number, (scale, code) in enumerate(pairs):
            await bench.group([-3], bank=number & 1, first=True, scale=scale, codes=[code],
                              gap=0, following=[-3])
        for _ in range(8):
            await bench.tick()

    simulate(dut, bench)


def test_latency():
    dut = ScaleUnit(TINY, 2)

    async def bench(ctx):
        ctx.set(dut.sums, [5, 0])
        ctx.set(dut.load, 1)
        await ctx.tick()
        ctx.set(dut.load, 0)
        ctx.set(dut.step, 1)
        ctx.set(dut.first_add, 1)
        ctx.set(dut.mx, 1)
        ctx.set(dut.scale, {"factor": 1, "shift": 0})
        await ctx.tick()
        ctx.set(dut.step, 0)
        cycles = 1
        while not ctx.get(dut.flush_sum):
            await ctx.tick()
            cycles += 1
        assert cycles == ScaleUnit.latency
        assert ctx.get(dut.flush_sum) == 5

    simulate(dut, bench)
