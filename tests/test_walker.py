"""The compactor and the walk over non-zero codes against loops over all codes."""

import collections
import random
from dataclasses import replace

import pytest

from hw.config import TINY
from hw.walker import WORD_QUEUE_DEPTH, Compactor, NonzeroWalker
from tests.pe_model import ThrottleModel, nibbles, simulate

FIELDS = ("codes", "word", "tap", "tile", "chunks", "group_last", "tile_last")
FEW_UNITS = replace(TINY, name="few-units", sparse_scale_units=1, result_depth=16)
WIDE = replace(TINY, name="wide", vector=32, dense_lanes=8, sparse_scale_units=16)


def some_tile(config, rng, density):
    """Groups of words of a tile as dictionaries; codes are nibbles."""
    groups, words = rng.choice((1, 1, 2, 4, 9)), rng.choice((1, 1, 2, config.max_channels
                                                            // config.vector))
    chunks = rng.randint(1, config.sparse_lanes // config.quad)
    tile, record = rng.randrange(2), []
    for group in range(groups):
        share = rng.choice((0, 0, 1, density))       # groups without non-zeros, and full ones
        for word in range(words):
            codes = [rng.randint(1, 15) if rng.random() < share * rng.choice((0, 1, 1)) else 0
                     for _ in range(config.vector)]
            record.append({
                "codes": nibbles(codes), "word": word, "tap": group, "tile": tile,
                "chunks": chunks, "scale": {"factor": group + 1, "shift": 15 - group},
                "group_last": int(word + 1 == words),
                "tile_last": int(word + 1 == words and group + 1 == groups)})
    return record


def compacted(tile):
    """The words of a tile that have codes, with the ends where they belong."""
    kept = []
    for number, word in enumerate(tile):
        if word["codes"]:
            following = tile[number + 1:]
            same = [later["codes"] for later in following if later["tap"] == word["tap"]]
            kept.append(word | {"group_last": int(not any(same)),
                                "tile_last": int(not any(w["codes"] for w in following))})
    return kept or [tile[-1]]


def check_word(seen, word):
    assert {name: seen[name] for name in FIELDS} == {name: word[name] for name in FIELDS}
    assert (seen.scale.factor, seen.scale.shift) == (
        word["scale"]["factor"], word["scale"]["shift"])


@pytest.mark.parametrize("pace", [1.0, 0.5, 0.1])
def test_compactor(pace):
    """Words with and without codes; a word leaves with the one that decides its flags."""
    dut = Compactor(TINY)
    rng = random.Random(int(10 * pace))

    async def bench(ctx):
        expected, entered = collections.deque(), collections.deque()
        words, left, dropped, ended = 0, 0, 0, False
        for density in (0.0, 0.1, 0.5, 1.0) * 8:
            tile = some_tile(TINY, rng, density)
            entered += tile
            words += len(tile)
            expected += compacted(tile)
        while entered or ended:
            enters = bool(entered) and rng.random() < pace
            word = entered.popleft() if enters else None
            ctx.set(dut.i_valid, enters)
            ctx.set(dut.i, word or {"codes": rng.randrange(2), "group_last": 1, "tile_last": 1})
            # what ended its tile leaves one cycle later, come what may
            if ended:
                assert ctx.get(dut.o_valid)
            if ctx.get(dut.o_valid):
                assert enters or ended
                check_word(ctx.get(dut.o), expected.popleft())
                left += 1
            ended = ended and not ctx.get(dut.o_valid)
            dropped += ctx.get(dut.dropped)
            assert enters or not ctx.get(dut.dropped)
            ended = enters and word["tile_last"] and not ctx.get(dut.dropped)
            await ctx.tick()
        ctx.set(dut.i_valid, 0)
        assert not expected and not ctx.get(dut.o_valid)
        assert left + dropped == words

    simulate(dut, bench)


def products(config, word):
    """(channel, code) of each non-zero of a word, or of nothing for an empty one."""
    codes = [(channel, word["codes"] >> 4 * channel & 15) for channel in range(config.vector)]
    return [pair for pair in codes if pair[1]] or [(None, None)]


def issues_of(config, words):
    """What is issued, in order, with its place in group and tile."""
    issues, group_first, tile_first = [], True, True
    for word in words:
        codes = products(config, word)
        for number, (channel, code) in enumerate(codes):
            last = number + 1 == len(codes)
            issues.append({
                "word": word, "channel": channel, "code": code, "group_first": group_first,
                "group_last": last and bool(word["group_last"]), "tile_first": tile_first,
                "tile_last": last and bool(word["tile_last"]), "word_last": last})
            group_first = issues[-1]["group_last"]
            tile_first = issues[-1]["tile_last"] or (tile_first and not group_first)
    return issues


async def walk(ctx, dut, config, words, rng, *, pace, taken_share):
    """Feed words, compare every issue and every cycle without one; cycles and held cycles."""
    model = ThrottleModel(config, config.sparse_lanes, config.sparse_scale_units)
    waiting = collections.deque(words)
    issues = collections.deque(issues_of(config, words))
    queue = results = cycle = starved = 0
    here = False                    # the next issue's word has left the queue
    held = 0
    while issues:
        enters = bool(waiting) and queue < WORD_QUEUE_DEPTH and rng.random() < pace
        popped = results > 0 and rng.random() < taken_share
        ctx.set(dut.i_valid, enters)
        ctx.set(dut.i, waiting.popleft() if enters else {"codes": 5, "tile_last": 1})
        ctx.set(dut.popped, popped)
        issue = issues[0]
        ends = issue["group_last"], issue["tile_last"], issue["word"]["chunks"]
        allowed = model.allowed(cycle, *ends)
        issued = here and allowed
        assert ctx.get(dut.issue) == issued, f"cycle {cycle}"
        assert ctx.get(dut.starved) == (here and model.starved(*ends[1:]))
        starved += ctx.get(dut.starved)
        held += here and not allowed
        if issued:
            check_word(ctx.get(dut.entry), issue["word"])
            assert ctx.get(dut.nonzero) == (issue["channel"] is not None)
            if issue["channel"] is not None:
                assert ctx.get(dut.channel) == issue["channel"]
                assert ctx.get(dut.code) == issue["code"]
            for name in ("group_first", "group_last", "tile_first", "tile_last"):
                assert ctx.get(getattr(dut, name)) == issue[name], (name, cycle)
        takes = queue > 0 and (not here or (issued and issue["word_last"]))
        assert ctx.get(dut.taken) == takes, f"cycle {cycle}"
        await ctx.tick()
        if issued:
            model.issue(cycle, *ends)
            results += ends[2] if ends[1] else 0
            issues.popleft()
            here = not issue["word_last"]
        if popped:
            model.pop()
            results -= 1
        here = here or takes
        queue += enters - takes
        cycle += 1
    ctx.set(dut.i_valid, 0)
    for _ in range(5):
        assert not ctx.get(dut.issue) and not ctx.get(dut.taken)
        ctx.set(dut.popped, results > 0)
        results -= results > 0
        await ctx.tick()
    assert not waiting and not queue
    ctx.set(dut.popped, 1)
    for _ in range(results):
        await ctx.tick()
    ctx.set(dut.popped, 0)
    return cycle, held, starved


@pytest.mark.parametrize("config, density", [
    (TINY, 0.05), (TINY, 1.0), (FEW_UNITS, 0.3), (WIDE, 0.5)],
    ids=lambda value: getattr(value, "name", str(value)))
def test_walk(config, density):
    """Codes in order, flags, and the cycle of every issue, with words held up on their way."""
    dut = NonzeroWalker(config)
    rng = random.Random(int(10 * density))

    async def bench(ctx):
        held = starved = 0
        for pace, taken in ((1.0, 1.0), (0.1, 1.0), (1.0, 0.02), (0.5, 0.2)):
            words = []
            for _ in range(8):
                words += compacted(some_tile(config, rng, density))
            _, more, waited = await walk(ctx, dut, config, words, rng, pace=pace,
                                         taken_share=taken)
            held += more
            starved += waited
            for _ in range(70):      # until the throttle has forgotten the walk
                await ctx.tick()
        assert held
        assert starved or config is not FEW_UNITS

    simulate(dut, bench)


def test_no_cycle_for_a_zero():
    """Zeros between the codes of a word, and words of one code, cost nothing."""
    dut = NonzeroWalker(TINY)
    rng = random.Random(3)

    async def bench(ctx):
        for places in ([0], [15], [0, 15], [3, 4, 5, 6], list(range(16))):
            codes = [channel + 1 & 15 or 9 if channel in places else 0 for channel in range(16)]
            word = {"codes": nibbles(codes), "word": 1, "tap": 0, "tile": 0, "chunks": 1,
                    "scale": {"factor": 1, "shift": 0}, "group_last": 0, "tile_last": 0}
            words = [word] * 11 + [word | {"group_last": 1, "tile_last": 1}]
            cycles, held, _ = await walk(ctx, dut, TINY, words, rng, pace=1.0, taken_share=1.0)
            assert held == 0
            assert cycles == 12 * len(places) + 2     # into the queue and out of it

    simulate(dut, bench)
