"""The core as a whole where `tests/test_layers.py` does not lead it.

Passes of every kind in one chain, jobs of unlike layers that overlap, and chains that end with an
error.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from golden import detector, layer
from hw import registers
from hw.config import TINY
from hw.descriptor import Error, Format, Kind, pack
from hw.registers import COUNTERS
from sim import lowering, random_layers, simulate, verilator
from sim.cycles import layer_cycles
from sim.simulate import MemoryModel

WORDS = lowering.pack_words(pack(), TINY.vector).shape[0]   # port words of a descriptor
SUMS = ("compute_cycles", "dense_busy", "sparse_busy", "dense_work", "sparse_work", "saturations",
        "jobs")


COSTS = detector.Costs(10, 1, 0, 0)     # give both sides some of every layer


@pytest.fixture(scope="module")
def simulator():
    return simulate.build(TINY)


def layers():
    """Layer calls, lowered one behind the other in memory, and the first word behind them."""
    rng = np.random.default_rng(9)
    end, found = 0, []
    for number, chosen in enumerate((
            {"format": Format.A4U, "kernel": 3, "height": 6, "width": 5, "channels": (40, 9),
             "outputs": 40, "residual": True},
            {"format": Format.MX8, "kernel": 1, "height": 3, "width": 4, "channels": (33,),
             "outputs": 18, "residual": False},
            {"format": Format.A4S, "kernel": 3, "height": 24, "width": 9, "channels": (30,),
             "outputs": 5, "residual": True},
            {"format": Format.IN16, "kernel": 1, "height": 2, "width": 3, "channels": (3,),
             "outputs": 16, "residual": False})):
        call, _ = random_layers.random_call(rng, TINY, name=f"layer {number}", **chosen)
        if chosen["format"] in (Format.A4U, Format.A4S):
            call = dataclasses.replace(call, tile_channels=32, dense_limit=2, balance=COSTS,
                                       detector_base=100 * number)
        lowered = lowering.lower(call, TINY, base=end)
        end = max(region.limit for pass_ in (lowered.requantize, lowered.convolve)
                  for region in pass_.regions.values())
        found.append((call, lowered))
    return *zip(*found, strict=True), end


CALLS, LAYERS, END = layers()
PASSES = [pass_ for lowered in LAYERS for pass_ in (lowered.requantize, lowered.convolve)]
# (word, fields) of every descriptor, in order
CHAIN = [(pass_.chain.address + WORDS * number, fields) for pass_ in PASSES
         for number, fields in enumerate(pass_.descriptors)]
FIRST_JOB = 1                                       # of the first layer's convolution
JOBS = len(LAYERS[0].convolve.descriptors)
SECOND = FIRST_JOB + JOBS                           # the second layer's requantization


def one_chain(chain=None):
    """Words and places of ``chain`` (default: all passes) with one descriptor behind the other."""
    chain = chain or CHAIN
    nexts = [place for place, _ in chain[1:]] + [0]
    return [(place, lowering.pack_words(pack(**fields | {"next": after}), TINY.vector))
            for (place, fields), after in zip(chain, nexts, strict=True)]


def changed(number, **fields):
    """The chain with other fields in one descriptor."""
    return [(place, old | fields if n == number else old) for n, (place, old) in enumerate(CHAIN)]


def operands():
    return [part for pass_ in PASSES for part in pass_.load]


def execute(simulator, folder, starts, model=None):
    """Run chains on a core that has just been reset.

    ``starts`` are pairs of what memory gets and the address of the first descriptor. Returns the
    answers of the bench, with counters by name, and memory at the end of each chain.
    """
    folder.mkdir()
    model = model or MemoryModel()
    for number, (load, address) in enumerate(starts):
        with open(folder / f"{number}.load", "wb") as file:
            for first, words in load:
                file.write(np.array([first, len(words)], ">u4").tobytes())
                file.write(np.ascontiguousarray(words[:, ::-1]).tobytes())
        everything = {"read_base": 0, "read_limit": END, "write_base": 0, "write_limit": END,
                      "descriptor": 0, "descriptor_words": 0}
        (folder / f"{number}.json").write_text(json.dumps({
            "memory": dataclasses.asdict(model) | everything,
            "writes": [(registers.number("evaluation"), 0),
                       (registers.number("descriptor"), address)],
            "limit": int(2_000_000 * model.slowdown),
            "reads": [registers.number(name) for name in ("status", *COUNTERS)],
            "rereads": [], "dump": [0, END]}))
    (folder / "end").write_text(str(len(starts)))
    verilator.run(simulator, "sim.layer_bench", folder=folder)
    answers, memories = [], []
    for number in range(len(starts)):
        answer = json.loads((folder / f"{number}.result.json").read_text())
        assert not answer["hung"] and not answer["violations"]
        answer |= dict(zip(("status", *COUNTERS), answer.pop("registers"), strict=True))
        answer["error"] = Error(answer["status"] >> 8 & 255)
        answers.append(answer)
        memories.append(np.fromfile(folder / f"{number}.dump", np.uint8).reshape(END, -1))
    return answers, memories


@pytest.fixture(scope="module")
def apart(simulator, tmp_path_factory):
    """Every pass with a start of its own: what `tests/test_layers.py` compares with golden."""
    starts = [([] if number else operands(), pass_.chain.address)
              for number, pass_ in enumerate(PASSES)]
    answers, memories = execute(simulator, tmp_path_factory.mktemp("core") / "apart", starts)
    assert all(answer["error"] == Error.NONE for answer in answers)
    assert all(len(pass_.descriptors) == answer["jobs"]
               for pass_, answer in zip(PASSES, answers, strict=True))
    return answers, memories


def results(memory, passes=tuple(PASSES)):
    """What the passes have written."""
    return [memory[pass_.window.address:pass_.window.limit] for pass_ in passes]


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("model", [
    MemoryModel(), MemoryModel(read_latency=30, write_latency=20),
    MemoryModel(seed=3, read_stall=100, response_stall=150, write_stall=120, answer_stall=200)])
def test_all_passes_in_one_chain(simulator, apart, tmp_path, model):
    """Results and counts are those of every pass alone, and loading overlaps computing."""
    (answer,), (memory,) = execute(
        simulator, tmp_path / "run", [(operands() + one_chain(), CHAIN[0][0])], model)
    assert answer["error"] == Error.NONE
    alone, memories = apart
    assert_same(results(memory), results(memories[-1]))
    sums = {name: sum(one[name] for one in alone) for name in (*SUMS, "total_cycles")}
    if model == MemoryModel():
        assert {name: answer[name] for name in SUMS} == {name: sums[name] for name in SUMS}
        assert answer["total_cycles"] < sums["total_cycles"] + 60 * len(PASSES)
    for name in ("dense_work", "sparse_work", "saturations", "jobs"):
        assert answer[name] == sums[name]


@pytest.mark.parametrize("model", [
    MemoryModel(), MemoryModel(seed=4, read_latency=9, read_stall=60, write_stall=230)])
def test_layers_overlap(simulator, apart, tmp_path, model):
    """The loader is at a layer of another format, with other windows, than the PEs."""
    kinds = {kind: [(place, fields) for place, fields in CHAIN if fields["kind"] == kind]
             for kind in Kind}
    chain = kinds[Kind.REQUANTIZE] + kinds[Kind.CONVOLVE]
    (answer,), (memory,) = execute(
        simulator, tmp_path / "run", [(operands() + one_chain(chain), chain[0][0])], model)
    assert answer["error"] == Error.NONE
    alone, memories = apart
    assert_same(results(memory), results(memories[-1]))
    sums = {name: sum(one[name] for one in alone) for name in (*SUMS, "total_cycles")}
    for name in ("dense_work", "sparse_work", "saturations", "jobs"):
        assert answer[name] == sums[name]
    if model == MemoryModel():
        # the port is shared with loading now: sums may wait for it
        for name in SUMS:
            assert abs(answer[name] - sums[name]) <= answer["output_stall"], name
        assert answer["output_stall"] < 0.05 * answer["compute_cycles"]
        # what there is to load while something is computed, but for the first layer
        hidden = sum(one["load_stall"] for one in alone) - answer["load_stall"]
        assert hidden > 500
        assert answer["total_cycles"] < sums["total_cycles"] - hidden


def test_layers_have_what_the_tests_need():
    assert JOBS > 3
    fields = [fields for _, fields in CHAIN[FIRST_JOB:SECOND]]
    assert any(job["accumulate"] for job in fields) and any(job["keep_sums"] for job in fields)
    assert CHAIN[SECOND][1]["kind"] != fields[-1]["kind"]
    runs = []
    for call, lowered in zip(CALLS, LAYERS, strict=True):
        counts = torch.zeros(lowered.shape.slots, dtype=torch.int64)
        result = layer.run(call, counts, TINY.vector)
        assert call.balance is None or any(part.low != part.high for part in result.lists)
        runs += map(len, layer_cycles(lowered.plan, result, TINY)["runs"])
    assert max(runs) > 2


@pytest.mark.parametrize("number", [0, FIRST_JOB, FIRST_JOB + 1, SECOND - 1, SECOND, SECOND + 1])
def test_a_chain_ends_before_a_bad_descriptor(simulator, apart, tmp_path, number):
    """What lies before it is done, nothing behind it has begun."""
    (bad, good), (first, second) = execute(simulator, tmp_path / "run", [
        (operands() + one_chain(changed(number, version=9)), CHAIN[0][0]),
        (operands() + one_chain(), CHAIN[0][0])])
    assert bad["error"] == Error.VERSION and bad["jobs"] == number
    done = [pass_ for pass_, ends in zip(PASSES, itertools.accumulate(
        len(pass_.descriptors) for pass_ in PASSES), strict=True) if ends <= number]
    _, memories = apart
    assert_same(results(first, done), results(memories[-1], done))
    rest = PASSES[len(done) + (FIRST_JOB < number < SECOND):]
    for pass_ in rest:
        window = pass_.window
        np.testing.assert_array_equal(
            first[window.address:window.limit],
            lowering.filler(window.address, window.words, TINY.vector))
    assert good["error"] == Error.NONE      # and the core has recovered
    # labels of the first layer have changed with the first chain's counts; results have not
    written = LAYERS[0].convolve.window
    np.testing.assert_array_equal(second[written.address:written.limit],
                                  memories[-1][written.address:written.limit])


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("number", [FIRST_JOB, SECOND - 1, SECOND])
def test_windows_are_those_of_each_descriptor(simulator, apart, tmp_path, side, number):
    """An empty window stops its own pass only, whatever else is under way."""
    place = {f"{side}_limit": CHAIN[number][1][f"{side}_base"]}
    (answer,), (memory,) = execute(
        simulator, tmp_path / "run", [(operands() + one_chain(changed(number, **place)),
                                       CHAIN[0][0])])
    _, memories = apart
    gives = not CHAIN[number][1].get("keep_sums")
    if side == "write" and not gives:
        assert answer["error"] == Error.NONE      # partial sums do not leave the core
        assert_same(results(memory), results(memories[-1]))
        return
    assert answer["error"] == Error.ACCESS
    assert number < answer["jobs"] <= number + 2
    assert_same(results(memory, PASSES[:1]), results(memories[-1], PASSES[:1]))
    later = PASSES[2 if number < SECOND else 3:]
    for pass_ in later:
        window = pass_.window
        np.testing.assert_array_equal(
            memory[window.address:window.limit],
            lowering.filler(window.address, window.words, TINY.vector))


def test_a_strange_permutation_ends_the_chain(simulator, apart, tmp_path):
    """The tile is refused, nothing is written, and the next chain is none the worse for it."""
    (answer, *others), (first, *_, last) = execute(simulator, tmp_path / "run", [
        (operands(), PASSES[1].chain.address),
        ([], PASSES[0].chain.address), ([], PASSES[1].chain.address)])
    assert answer["error"] == Error.PERMUTATION
    assert answer["jobs"] in (1, 2) and answer["compute_cycles"] == 0
    window = PASSES[1].window
    np.testing.assert_array_equal(first[window.address:window.limit],
                                  lowering.filler(window.address, window.words, TINY.vector))
    assert all(answer["error"] == Error.NONE for answer in others)
    _, memories = apart
    assert_same(results(last, PASSES[:2]), results(memories[1], PASSES[:2]))
