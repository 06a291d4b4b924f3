# amaranth: UnusedElaboratable=no
"""The compactor: groups of words against a plain list of their non-zeros, and its pace."""

import random
from dataclasses import replace

import pytest

from hw.compactor import Compactor
from hw.config import TINY
from tests.pe_model import nibbles, simulate

CONFIGS = [replace(TINY, name=f"rate-{rate}-{vector}", sparse_rate=rate, vector=vector,
                   dense_lanes=8, dense_scale_units=8, sparse_lanes=32, sparse_scale_units=8)
           for rate, vector in ((1, 16), (2, 16), (4, 16), (4, 32))]


def random_groups(config, rng, count):
    """Groups of (codes, mask, early, word) with all densities, empty ones and full ones."""
    groups = []
    for _ in range(count):
        density = rng.choice((0, 0.05, 0.3, 0.5, 0.9, 1))
        most = config.tile_channels // config.vector
        words = rng.randrange(1, most + 1)
        first = rng.randrange(most - words + 1)
        groups.append([
            ([rng.randrange(1, 16) if rng.random() < density else 0
              for _ in range(config.vector)],
             rng.choice(((1 << config.vector) - 1, 0, -1 << rng.randrange(config.vector)))
             & (1 << config.vector) - 1, rng.choice((0, (1 << config.vector) - 1, 0xFF)),
             first + n) for n in range(words)])
    return groups


def entries_of(config, group):
    """Entries of a group as lists of (position, code), skip, rest, and the cycles it takes."""
    rate, items, cycles, early = config.sparse_rate, [], 0, 0
    for number, (codes, mask, skipped, word) in enumerate(group):
        before = len(items)
        items += [(word * config.vector + n, code) for n, code in enumerate(codes)
                  if code and mask >> n & 1]
        early += sum(code > 0 and mask & skipped & 1 << n > 0 for n, code in enumerate(codes))
        full = len(items) // rate - before // rate
        full += number == len(group) - 1 and len(items) % rate > 0
        cycles += max(1, full)
    entries = [items[n:n + rate] for n in range(0, len(items), rate)]
    return (entries, early // rate, int(early < len(items))), cycles


def run(config, groups, stall, rng):
    """Entries and tag of each group, and the cycles from the first word to the last payload."""
    dut = Compactor(config, 8)
    seen, times = [[]], []
    words = [(*word, n == len(group) - 1, number & 255)
             for number, group in enumerate(groups) for n, word in enumerate(group)]

    async def bench(ctx):
        sent = after = cycle = 0
        offered = False
        while after < 40:
            offered = sent < len(words) and (offered or rng.random() >= stall)
            ctx.set(dut.i.valid, offered)
            if offered:
                codes, mask, early, word, last, tag = words[sent]
                ctx.set(dut.i.payload, {"codes": nibbles(codes), "mask": mask, "early": early,
                                        "word": word, "last": last, "tag": tag})
            if ctx.get(dut.o.valid):
                times.append(cycle)
                o = ctx.get(dut.o.payload)
                assert o.filled or o.last, "a payload is an entry or an end"
                if o.filled:
                    seen[-1].append([(item.position, item.code) for item in o.entry if item.code])
                if o.last:
                    assert o.tag == (len(seen) - 1) & 255
                    seen[-1] = seen[-1], o.skip, o.rest
                    seen.append([])
            if offered and ctx.get(dut.i.ready):
                if not sent:
                    times.append(cycle)
                sent, offered = sent + 1, False
            after += sent == len(words)
            cycle += 1
            await ctx.tick()

    simulate(dut, bench)
    assert seen.pop() == [], "the last group ends"
    return seen, times[-1] - times[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@pytest.mark.parametrize("stall", [0, 0.5, 0.9])
def test_groups(config, stall):
    rng = random.Random(config.sparse_rate * 10 + config.vector + int(10 * stall))
    groups = random_groups(config, rng, 50 if config.vector == 16 else 25)
    seen, _ = run(config, groups, stall, rng)
    assert seen == [entries_of(config, group)[0] for group in groups]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_pace(config):
    """A word or an entry a cycle, whichever is more."""
    rng = random.Random(1)
    groups = random_groups(config, rng, 40)
    _, cycles = run(config, groups, 0, rng)
    assert cycles == sum(entries_of(config, group)[1] for group in groups) - 1 + Compactor.latency


def test_latency():
    dut = Compactor(CONFIGS[2], 8)
    group = [([1] * 4 + [0] * 12, 0xFFFF, 0, 0)]
    assert run(dut.config, [group], 0, random.Random(0))[1] == Compactor.latency
