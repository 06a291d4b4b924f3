"""Lanes, scale units and queues of both PEs against integers, at the least distances."""

import random
from dataclasses import replace

import pytest
from amaranth import Cat, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from hw.config import SMALL, TINY
from hw.drain import (
    Drain, Results, connect_drain, group_layout, scale_rows_of, steps, unit_cycles)
from hw.lanes import DenseGroup, SparseCodes, SparseGroup, extend_codes
from tests.pe_model import nibbles, octets, simulate
from tests.test_scale_unit import factor, weight_byte

WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8,
               sparse_lanes=32, sparse_scale_units=8, sparse_rate=4)
ALL_UNITS = replace(TINY, name="all-units", sparse_rate=1, sparse_scale_units=16, dense_lanes=16)
SPARSE = [TINY, replace(SMALL, name="small-16", sparse_lanes=16, sparse_scale_units=8), ALL_UNITS,
          WIDE]
DENSE = [TINY, replace(SMALL, name="small-8"), ALL_UNITS, WIDE]


class Lanes(wiring.Component):
    """What a PE has behind its buffers: all lanes, `Drain` and `Results`."""

    def __init__(self, config, side):
        self.config, self.side = config, side
        width = config.sparse_rate if side == "sparse" else config.vector
        lanes = getattr(config, f"{side}_lanes")
        self.results = Results(config, side)
        super().__init__({
            "valid": In(1), "first": In(1), "codes": In(4 * width), "codes_signed": In(1),
            "weights": In(4 * width * lanes), "weights_signed": In(1),
            "group_valid": In(1), "group": In(group_layout(config, side)),
            "scale_row": Out(range(scale_rows_of(config, side))),
            "weight_scales": In(8 * getattr(config, f"{side}_scale_units")),
            "o": Out(self.results.o.signature), "returned": Out(1)})

    def elaborate(self, platform):
        m = Module()
        config, sparse = self.config, self.side == "sparse"
        m.submodules.drain = drain = Drain(config, self.side)
        m.submodules.results = results = self.results
        lanes, units = (getattr(config, f"{self.side}_{name}") for name in ("lanes", "scale_units"))
        width = len(self.codes)
        groups = []
        if sparse:
            m.submodules.codes = codes = SparseCodes(config)
            m.d.comb += [codes.codes.eq(self.codes), codes.codes_signed.eq(self.codes_signed),
                         codes.weights_signed.eq(self.weights_signed)]
        for unit in range(units):
            kind = SparseGroup if sparse else DenseGroup
            m.submodules[f"group_{unit}"] = part = kind(config, lanes // units)
            groups.append(part)
            m.d.comb += [
                part.valid.eq(self.valid), part.first.eq(self.first),
                part.weights.eq(Cat(*(self.weights[lane * width:(lane + 1) * width]
                                      for lane in range(unit, lanes, units))))]
            if sparse:
                m.d.comb += [part.plain.eq(codes.plain), part.negated.eq(codes.negated)]
            else:
                m.d.comb += [part.codes.eq(extend_codes(self.codes, self.codes_signed)),
                             part.weights_signed.eq(self.weights_signed)]
        connect_drain(m, drain, results, groups, self.weight_scales)
        m.d.comb += [
            drain.group_valid.eq(self.group_valid), drain.group.eq(self.group),
            self.scale_row.eq(drain.scale_row), self.returned.eq(results.returned)]
        wiring.connect(m, results.o, wiring.flipped(self.o))
        return m


def value(nibble, is_signed):
    return nibble - 16 if is_signed and nibble & 8 else nibble


def at(events, cycle, **fields):
    assert not events.setdefault(cycle, {}).keys() & fields.keys(), (cycle, fields)
    events[cycle].update(fields)


class Run:
    """Random units of work as close as `hw.drain` allows: inputs by cycle, and the results."""

    def __init__(self, config, side, rng, *, mx, count=16):
        sparse = side == "sparse"
        kind = SparseGroup if sparse else DenseGroup
        width = config.sparse_rate if sparse else config.vector
        self.lanes, units = (getattr(config, f"{side}_{name}") for name in ("lanes", "scale_units"))
        self.inputs, self.expected, self.rows = {}, [], {}
        depth, enters = steps(config, side), kind.latency - Drain.lead
        time = group_free = unit_free = 4
        signed_codes = rng.random() < 0.5
        most = config.tile_channels // width      # issues of a group of a whole tile
        row = 0
        for _ in range(count):
            sums = [0] * self.lanes
            groups = rng.choice((1, 1, 2, 8))
            for number in range(groups):
                ends = number + 1 == groups
                power_a, power_w = (rng.getrandbits(1), rng.getrandbits(1)) if mx else (0, 0)
                codes_signed = power_a if mx else signed_codes
                weights_signed = power_w if mx else 1
                issues = min(rng.choice((1, 1, 2, 5, most)), 32 // width if mx else most)
                extreme = rng.choice((None, None, None, 15, 8, 7))
                total = [0] * self.lanes
                for issue in range(issues):
                    last = issue + 1 == issues
                    if last:
                        time = max(time, group_free, unit_free if ends else 0)
                    time += rng.choice((0, 0, 0, 0, 3))
                    codes, weights = ([extreme if extreme is not None else rng.choice(
                        (0, 8, 15, rng.getrandbits(4))) for _ in range(n)]
                        for n in (width, width * self.lanes))
                    for lane in range(self.lanes):
                        total[lane] += sum(
                            value(code, codes_signed) * value(weight, weights_signed)
                            for code, weight in zip(codes, weights[lane * width:]))
                    at(self.inputs, time, valid=1, first=int(issue == 0), weights=nibbles(weights))
                    at(self.inputs, time - SparseCodes.latency if sparse else time,
                       codes=nibbles(codes), codes_signed=codes_signed,
                       weights_signed=weights_signed)
                    time += 1
                group_free = time - 1 + depth
                if ends:
                    unit_free = time - 1 + unit_cycles(config, side)
                highest = 15 if mx else 126
                scale = rng.randint(0, highest)
                codes = [rng.randint(0, highest) for _ in range(self.lanes)]
                row = (row + depth) % (scale_rows_of(config, side) - depth)
                for step in range(depth):
                    # rows are used again, so each belongs to a time
                    self.rows[time - 1 + enters + step] = row + step, octets(
                        weight_byte(code, mx) for code in codes[step * units:(step + 1) * units])
                chunks = rng.choice((self.lanes // config.quad,
                                     rng.randint(1, self.lanes // config.quad)))
                at(self.inputs, time - 1 + enters, group_valid=1, group={
                    "row": row, "scale": scale, "mx": int(mx), "power": power_a + power_w,
                    "last": int(ends), "chunks": chunks})
                for lane in range(self.lanes):
                    sums[lane] += (total[lane] * factor(scale, mx) * factor(codes[lane], mx)
                                   << 4 * (power_a + power_w))
            final = time - 1 + kind.latency
            for chunk in range(chunks):
                self.expected.append((
                    final + 3 + depth + chunk + Results.latency, chunk + 1 == chunks,
                    sums[chunk * config.quad:(chunk + 1) * config.quad]))


IDLE = {"valid": 0, "first": 1, "group_valid": 0}


@pytest.mark.parametrize("side, config", [
    *[("sparse", config) for config in SPARSE], *[("dense", config) for config in DENSE]],
    ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("mx", [False, True], ids=["a4", "mx"])
def test_units_of_work(side, config, mx):
    """Every chunk with every sum, in its cycle when it is taken at once."""
    dut = Lanes(config, side)
    rng = random.Random(f"{side} {config.name} {mx}")
    run = Run(config, side, rng, mx=mx)
    seen = []

    async def bench(ctx):
        ctx.set(dut.o.ready, 1)
        read = {}
        for cycle in range(max(time for time, _, _ in run.expected) + 4):
            for name, given in (IDLE | run.inputs.get(cycle, {})).items():
                ctx.set(getattr(dut, name), given)
            if cycle in run.rows:
                row, data = run.rows[cycle]
                assert ctx.get(dut.scale_row) == row
                read[cycle + 2] = data
            ctx.set(dut.weight_scales, read.pop(cycle, rng.getrandbits(len(dut.weight_scales))))
            if ctx.get(dut.o.valid):
                chunk = ctx.get(dut.o.payload)
                seen.append((cycle, bool(ctx.get(dut.returned)),
                             [chunk[number] for number in range(config.quad)]))
            await ctx.tick()

    simulate(dut, bench)
    assert len(seen) == len(run.expected)
    for got, expected in zip(seen, run.expected):
        assert got == expected


def test_all_products():
    """Each code times each weight, signed and not, as the only product of a group."""
    config = ALL_UNITS
    dut = SparseGroup(config, 1)

    async def bench(ctx):
        ctx.set(dut.valid, 1)
        for name in ("first", "group_first", "step", "last"):
            ctx.set(getattr(dut, name), 1)
        ctx.set(dut.scale, {"factor": 1})
        ctx.set(dut.weight_scale, 1)
        expected = []
        for flags in range(4):
            for pair in range(256):
                code, weight = value(pair & 15, flags & 1), value(pair >> 4, flags & 2)
                ctx.set(dut.plain, [code])
                ctx.set(dut.negated, [-code if flags & 2 else code])
                ctx.set(dut.weights, pair >> 4)
                expected.append(code * weight)
                # added at latency, taken by the scale unit a cycle later, final three later
                if len(expected) > SparseGroup.latency + 4:
                    assert ctx.get(dut.sum) == expected[-1 - SparseGroup.latency - 4]
                await ctx.tick()

    simulate(dut, bench)


def test_codes_are_those_of_the_formats():
    """A4U, A4S and the planes of MX8 as `SparseCodes` is told."""
    dut = SparseCodes(replace(TINY, sparse_rate=4))

    async def bench(ctx):
        for nibble in range(16):
            for flags in range(4):
                ctx.set(dut.codes, [nibble, 15 - nibble, 0, nibble])
                ctx.set(dut.codes_signed, flags & 1)
                ctx.set(dut.weights_signed, flags >> 1)
                await ctx.tick()
                for number, given in enumerate((nibble, 15 - nibble, 0, nibble)):
                    plain = value(given, flags & 1)
                    assert ctx.get(dut.plain)[number] == plain
                    assert ctx.get(dut.negated)[number] == (-plain if flags & 2 else plain)

    simulate(dut, bench)
