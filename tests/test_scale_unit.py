"""The scale unit against exact integers, cycle by cycle."""

import itertools
import random
from dataclasses import replace

import pytest
from amaranth import Module, Signal
from amaranth.hdl import Fragment
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.carry import WideMultipliers
from hw.config import SMALL, TINY
from hw.scale_unit import (
    ScaleUnit, activation_scale_layout, decode_activation_scale, decode_weight_scales,
    tile_sum_width)
from tests import naive
from tests.pe_model import octets, simulate

CODES = 127   # E4M3 codes 0x00 to 0x7E
DEEP = replace(TINY, name="deep", tile_channels=128)


def factor(code, mx):
    """What a scale code multiplies a sum by."""
    return 1 << code if mx else naive.UNITS[code]


def fields(code, mx):
    """Factor and shift of a scale code."""
    return (1, code) if mx else ((code & 7) + 8 * (code > 7), max(code >> 3, 1) - 1)


def weight_byte(code, mx):
    value, shift = fields(code, mx)
    return value | shift << 4


def activation_scale(code, mx, power):
    value, shift = fields(code, mx)
    return {"factor": 0 if power else value, "middle": power == 1, "high": power == 2,
            "shift": shift}


class Decoder(wiring.Component):
    """Both decoders as a component."""

    def __init__(self):
        super().__init__({
            "word": In(32), "code": In(8), "power": In(2), "mx": In(1),
            "bytes": Out(32), "scale": Out(activation_scale_layout)})

    def elaborate(self, platform):
        m = Module()
        clock = Signal()     # the simulator wants a domain
        m.d.sync += clock.eq(~clock)
        m.d.comb += [
            self.bytes.eq(decode_weight_scales(self.word, self.mx)),
            self.scale.eq(decode_activation_scale(self.code, self.mx, self.power)),
        ]
        return m


@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx"])
def test_decoders(mx):
    """Every code, in every byte of a word."""
    dut = Decoder()

    async def bench(ctx):
        ctx.set(dut.mx, mx)
        for code in range(16 if mx else CODES):
            others = [code, (code * 5 + 3) % 16, 0, code]
            for power in range(3 if mx else 1):
                ctx.set(dut.word, octets(others))
                ctx.set(dut.code, code)
                ctx.set(dut.power, power)
                assert ctx.get(dut.bytes) == octets(weight_byte(one, mx) for one in others)
                scale, expected = ctx.get(dut.scale), activation_scale(code, mx, power)
                assert {name: scale[name] for name in expected} == expected, (code, power)
        await ctx.tick()

    simulate(dut, bench)


class Unit:
    """A unit of work: its groups, and the sums they come to."""

    def __init__(self, config, lanes, rng, mx, extreme):
        self.lanes, self.groups = lanes, []
        limit = (1 << config.sum_width - 1) - 1
        longest = 36 if mx else 9
        self.sums = [0] * lanes
        # what the format allows: no more than nine taps' worth of the largest products
        limits = {0: 15 * 15 * 32, 1: 15 * 8 * 32, 2: 8 * 8 * 32}
        highest = 15 if mx else CODES - 1
        for number in range(longest if extreme else rng.choice((1, 1, 2, 9))):
            power = (0, 1, 1, 2)[number % 4] if mx else 0
            most = limits[power] if mx else min(limit, 15 * 8 * config.tile_channels)
            sums = [most if extreme else rng.choice((most, -most, 0, -1, rng.randint(-most, most)))
                    for _ in range(lanes)]
            scale = highest if extreme else rng.randint(0, highest)
            codes = [highest if extreme else rng.randint(0, highest) for _ in range(lanes)]
            self.groups.append((sums, scale, codes, power))
            for lane in range(lanes):
                self.sums[lane] += (sums[lane] * factor(scale, mx) * factor(codes[lane], mx)
                                    << 4 * power)


@pytest.mark.parametrize("config, lanes", [(TINY, 1), (TINY, 2), (SMALL, 4), (DEEP, 8)],
                         ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx"])
@pytest.mark.parametrize("platform", [None, WideMultipliers()], ids=["plain", "wide"])
def test_units(config, lanes, mx, platform):
    """Groups back to back or with pauses; sums are final exactly `latency` cycles after a step."""
    dut = ScaleUnit(config, lanes)
    rng = random.Random(lanes + 50 * mx)
    units = [Unit(config, lanes, rng, mx, extreme=number % 5 == 1) for number in range(20)]
    stimuli, shown, advances, cycle, free = {}, {}, set(), 0, 0
    for unit in units:
        for number, (sums, scale, codes, power) in enumerate(unit.groups):
            cycle += rng.choice((0, 0, 0, 1, 5))
            ends = number + 1 == len(unit.groups)
            if ends:       # the row before has been shown when the first sum of this one moves in
                cycle = max(cycle, free - ScaleUnit.latency + 1)
            for lane, code in enumerate(codes):
                stimuli[cycle + lane] = {
                    "step": 1, "first": lane == 0, "last": ends, "sums": sums,
                    "scale": activation_scale(scale, mx, power),
                    "weight_scale": weight_byte(code, mx)}
            cycle += lanes
        first = cycle - 1 + ScaleUnit.latency
        for lane, value in enumerate(unit.sums):
            shown[first] = value
            if lane + 1 < lanes:
                first += rng.choice((0, 0, 2))
                advances.add(first)
                first += 1
        free = first

    async def bench(ctx):
        for at in range(max(shown) + 1):
            for name, value in stimuli.get(at, {"step": 0, "first": 1, "last": 1}).items():
                ctx.set(getattr(dut, name), value)
            ctx.set(dut.advance, at in advances)
            if at in shown:
                assert ctx.get(dut.sum) == shown[at], at
            await ctx.tick()

    assert len(set(shown.values())) > 10
    simulate(Fragment.get(dut, platform), bench)


@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx"])
@pytest.mark.parametrize("platform", [None, WideMultipliers()], ids=["plain", "wide"])
def test_all_scale_codes(mx, platform):
    """Every weight scale code, and every activation scale code, alone."""
    dut = ScaleUnit(TINY, 1)
    count = 16 if mx else CODES
    pairs = [(code, count - 1 - code, 0) for code in range(count)]
    pairs += [(scale, code, power) for scale, code in itertools.product((0, count - 1), repeat=2)
              for power in range(3 if mx else 1)]

    async def bench(ctx):
        ctx.set(dut.sums, [-3])
        for name in ("step", "first", "last"):
            ctx.set(getattr(dut, name), 1)
        expected = []
        for scale, code, power in [*pairs, *[(0, 0, 0)] * ScaleUnit.latency]:
            ctx.set(dut.scale, activation_scale(scale, mx, power))
            ctx.set(dut.weight_scale, weight_byte(code, mx))
            expected.append(-3 * factor(scale, mx) * factor(code, mx) << 4 * power)
            if len(expected) > ScaleUnit.latency:
                assert ctx.get(dut.sum) == expected[-1 - ScaleUnit.latency]
            await ctx.tick()

    simulate(Fragment.get(dut, platform), bench)


def test_width_holds_the_largest_sums():
    """All products of a tile at their largest, from the definition of the formats."""
    for config in (TINY, SMALL, DEEP):
        largest = 1 << tile_sum_width(config) - 1
        assert 9 * config.tile_channels * 15 * 8 * naive.UNITS[0x7E] ** 2 < largest
        assert 9 * 32 * 128 * 128 << 30 < largest
        assert 8 * largest > 9 * 32 * 128 * 128 << 30
