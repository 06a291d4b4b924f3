"""Reads of codes and scales, and the queue of results."""

import collections
import random
from dataclasses import replace

import pytest

from hw.config import TINY
from hw.operands import Operands, Results, scale_words
from tests import naive
from tests.pe_model import STALLS, code_words, geometry, port_bytes, simulate

NARROW = replace(TINY, name="narrow", activation_depth=64, scale_depth=100)
WIDE = replace(NARROW, name="wide", vector=32, dense_lanes=8, max_channels=96)


def decoded(code, mx):
    """Factor and shift of a scale code."""
    if mx:
        return 1, code
    return (code & 7) + 8 * (code > 7), max(code >> 3, 1) - 1


@pytest.mark.parametrize("format", [naive.A4U, naive.MX8, naive.IN16], ids=["a4", "mx8", "in16"])
@pytest.mark.parametrize("config", [NARROW, WIDE], ids=["narrow", "wide"])
def test_reads(config, format):
    """Every plane of every word and the scale of every group of a pixel, `latency` cycles later."""
    dut = Operands(config)
    rng = random.Random(config.vector + format)
    mx = format in (naive.MX8, naive.IN16)
    highest = 15 if mx else 126

    async def bench(ctx):
        # images one after the other: later ones find the words of those before
        for height, width, words in ((3, 3, 2), (1, 1, 1), (1, 7, 2), (5, 1, 3)):
            words = 2 if format == naive.IN16 else words
            shape = geometry(config, height, width, words=words, format=format)
            plane, groups = shape["plane"], shape["groups"]
            codes = [[rng.randrange(-128, 128) for _ in range(plane)]
                     for _ in range(words * config.vector)]
            scales = [[rng.randint(0, highest) for _ in range(plane)] for _ in range(groups)]
            ctx.set(dut.geometry, shape)
            stored = code_words(config, codes, mx)
            for port, loads in ((dut.load_codes, stored), (dut.load_scales, port_bytes(
                    config, [code for line in scales for code in line]))):
                for address, word in enumerate(loads):
                    ctx.set(port, {"enable": 1, "address": address, "data": word})
                    await ctx.tick()
                ctx.set(port, {"enable": 0, "address": 1, "data": 99})
            places = [(word, pixel, sub, group) for word in range(words) for pixel in range(plane)
                      for sub in range(2 if mx else 1) for group in range(groups)]
            rng.shuffle(places)
            due = [None] * Operands.latency
            while places or any(due):
                assert ctx.get(dut.valid) == (due[0] is not None)
                if due[0] is not None:
                    word, pixel, sub, group = due[0]
                    assert ctx.get(dut.codes) == stored[
                        (word * plane + pixel) * (2 if mx else 1) + sub]
                    scale = ctx.get(dut.scale)
                    assert (scale.factor, scale.shift) == decoded(scales[group][pixel], mx)
                place = places.pop() if places and rng.random() < 0.8 else None
                ctx.set(dut.issue, place is not None)
                for name, value in zip(("word", "pixel", "sub", "group"),
                                       place or (0, rng.randrange(plane), 0, 0)):
                    ctx.set(getattr(dut, name), value)
                await ctx.tick()
                due = due[1:] + [place]

    simulate(dut, bench)


def test_scale_codes():
    """All codes of both kinds."""
    dut = Operands(TINY)

    async def bench(ctx):
        for format, count in ((naive.A4S, 127), (naive.MX8, 16)):
            ctx.set(dut.geometry, geometry(TINY, 1, count, format=format))
            for address, word in enumerate(port_bytes(TINY, range(count))):
                ctx.set(dut.load_scales, {"enable": 1, "address": address, "data": word})
                await ctx.tick()
            ctx.set(dut.load_scales.enable, 0)
            for cycle in range(count + Operands.latency):
                ctx.set(dut.issue, cycle < count)
                ctx.set(dut.pixel, min(cycle, count - 1))
                if cycle >= Operands.latency:
                    scale = ctx.get(dut.scale)
                    assert ctx.get(dut.valid)
                    assert (scale.factor, scale.shift) == decoded(
                        cycle - Operands.latency, format == naive.MX8)
                await ctx.tick()
            assert not ctx.get(dut.valid)

    simulate(dut, bench)


def test_last_words():
    """The ends of both buffers, in a tensor that fills them."""
    config = NARROW
    dut = Operands(config)

    async def bench(ctx):
        ctx.set(dut.geometry, geometry(config, 1, 64))
        ctx.set(dut.load_codes, {"enable": 1, "address": 63, "data": 0xFEDCBA9876543210})
        ctx.set(dut.load_scales, {"enable": 1, "address": scale_words(config) - 1,
                                  "data": 0x0807060504030201})
        await ctx.tick()
        ctx.set(dut.load_codes.enable, 0)
        ctx.set(dut.load_scales.enable, 0)
        for pixel, codes, factor in ((63, 0xFEDCBA9876543210, None), (99, None, 4)):
            ctx.set(dut.issue, 1)
            ctx.set(dut.pixel, pixel)
            await ctx.tick()
            ctx.set(dut.issue, 0)
            cycles = 1
            while not ctx.get(dut.valid):
                await ctx.tick()
                cycles += 1
            assert cycles == Operands.latency
            assert codes is None or ctx.get(dut.codes) == codes
            assert factor is None or ctx.get(dut.scale).factor == factor

    simulate(dut, bench)


@pytest.mark.parametrize("pushing", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("stall", STALLS)
def test_results_keep_their_order(pushing, stall):
    """Chunks wait until they are taken, in order, as many as there is room for."""
    config = replace(TINY, sparse_pes=0, result_depth=16)
    dut = Results(config)
    rng = random.Random(int(10 * stall + pushing))

    async def bench(ctx):
        queue, room, number, held = collections.deque(), config.result_depth, 0, 0
        fullest = 0
        for cycle in range(400):
            push = room > 0 and rng.random() < pushing and cycle < 360
            if cycle < 40:
                ready = False                       # results wait
            else:
                ready = rng.random() >= stall or cycle >= 360
            number += push
            chunk = [rng.choice((number, -number)) * 7 for _ in range(config.quad)]
            ctx.set(dut.push, push)
            ctx.set(dut.chunk, chunk)
            ctx.set(dut.o.ready, ready)
            valid = ctx.get(dut.o.valid)
            if valid:
                held = 0
                payload = ctx.get(dut.o.payload)
                assert [payload[n] for n in range(config.quad)] == queue[0]
            else:
                held += bool(queue)
                assert held < 3, "a chunk must come out two cycles after it went in"
            assert ctx.get(dut.popped) == (valid and ready)
            if valid and ready:
                queue.popleft()
            await ctx.tick()
            room += (valid and ready) - push
            if push:
                queue.append(chunk)
            fullest = max(fullest, len(queue))
        assert not queue
        if pushing > 0.4:
            assert fullest == config.result_depth

    simulate(dut, bench)
