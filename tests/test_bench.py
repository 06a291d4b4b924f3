"""sim/bench.sv and sim/layer_bench.py around a core that copies words and can misbehave."""

import importlib.resources
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from sim import layer_bench, verilator

COUNT, SOURCE, DESTINATION = 16, 0, 64
QUIET = {"read_latency": 4, "write_latency": 4, "read_stall": 0, "response_stall": 0,
         "write_stall": 0, "answer_stall": 0, "seed": 1, "memory_first": 0,
         "descriptor": 128, "descriptor_words": 16}


@pytest.fixture(scope="module", params=[16, 32], ids=["vector16", "vector32"])
def simulator(request):
    sources = {"copy_core.sv": (Path(__file__).parent / "copy_core.sv").read_text().replace(
        "PORT_WIDTH = 64", f"PORT_WIDTH = {4 * request.param}"),
        "bench.sv": importlib.resources.files("sim").joinpath("bench.sv").read_text()}
    built = verilator.build(sources, "bench", build_args=[
        f"-GVECTOR={request.param}", "-GADDRESS_WIDTH=10", "-GMEMORY_WIDTH=9"])
    return built, request.param // 2


def run(simulator, folder, jobs, base=0):
    """Run copies; each job is (memory settings, fault). Answers, what was loaded and read back.

    What is loaded lies ``base`` words further up than the core expects it.
    """
    built, width = simulator
    rng = np.random.default_rng(1)
    written = []
    windows = {"read_base": base + SOURCE, "read_limit": base + SOURCE + COUNT,
               "write_base": base + DESTINATION, "write_limit": base + DESTINATION + COUNT}
    for number, (settings, fault) in enumerate(jobs):
        words = rng.integers(0, 256, (COUNT + 3, width), np.uint8)
        with open(folder / f"{number}.load", "wb") as file:
            for first, part in ((SOURCE, words[:COUNT]), (DESTINATION + COUNT - 1, words[COUNT:])):
                file.write(np.array([base + first, len(part)], ">u4").tobytes()
                           + part[:, ::-1].tobytes())
        written.append(words)
        (folder / f"{number}.json").write_text(json.dumps({
            "memory": QUIET | windows | settings, "writes": [[6, 40], [5, fault]],
            "limit": 20_000,
            "reads": [3, 8, 7], "rereads": [[[[6, 7]], [7, 7, 7]]],
            "dump": [base + DESTINATION, COUNT + 1]}))
    (folder / "end").write_text(str(len(jobs)))
    verilator.run(built, "sim.layer_bench", folder=folder)
    for number, words in enumerate(written):
        path = folder / f"{number}.result.json"
        if not path.exists():
            return
        dump = np.fromfile(folder / f"{number}.dump", np.uint8).reshape(-1, width)
        yield json.loads(path.read_text()), words, dump


def test_copies_whatever_stalls(simulator, tmp_path):
    stalls = ("read_stall", "response_stall", "write_stall", "answer_stall")
    jobs = [({**dict(zip(stalls, values, strict=True)), "read_latency": 1 + number % 9,
              "write_latency": 1 + number % 5, "seed": number + 1}, 0)
            for number, values in enumerate(itertools.product((0, 128, 230), repeat=4))]
    count = 0
    for answer, words, dump in run(simulator, tmp_path, jobs):
        expected = words[:COUNT + 1].copy()
        expected[COUNT - 1, 1::2] = words[COUNT, 1::2]     # bytes without strobe
        expected[COUNT] = words[COUNT + 1]
        assert (dump == expected).all()
        assert answer["violations"] == []
        assert not answer["hung"]
        assert answer["registers"][0] == 2
        assert answer["registers"][2] == 40
        assert answer["rereads"] == [[7, 8, 9]]
        assert (answer["reads"], answer["writes"]) == (COUNT, COUNT)
        count += 1
    assert count == len(jobs)


def test_memory_may_begin_anywhere(simulator, tmp_path):
    """What is loaded, and read back, lies behind the first word; the rest does not exist."""
    [(answer, words, dump)] = run(simulator, tmp_path, [({"memory_first": 512}, 0)], base=512)
    assert answer["violations"] == [
        "a read lay outside the memory", "a write lay outside the memory",
        "a read lay outside the read window", "a write lay outside the write window"]
    assert (dump[COUNT] == words[COUNT + 1]).all()


def test_latency_and_throughput(simulator, tmp_path):
    """Without stalls a word moves every cycle, and latencies are those that were asked for."""
    pairs = list(itertools.product((1, 2, 7, 40), repeat=2))
    jobs = [({"read_latency": read, "write_latency": write}, 0) for read, write in pairs]
    took = {pair: answer["registers"][1] for pair, (answer, _, _) in zip(
        pairs, run(simulator, tmp_path, jobs), strict=True)}
    for read, write in pairs:
        assert took[read, write] - took[1, 1] == read - 1 + write - 1
    assert took[1, 1] == COUNT + 1 + 1 + 1


@pytest.mark.parametrize("fault", range(1, 10))
def test_violations_are_seen(simulator, tmp_path, fault):
    settings = {"read_stall": 200, "write_stall": 200, "write_latency": 20}
    [(answer, _, _)] = run(simulator, tmp_path, [(settings, fault)])
    assert layer_bench.VIOLATIONS[fault - 1] in answer["violations"]


def test_violations_do_not_outlast_their_pass(simulator, tmp_path):
    answers = [answer for answer, _, _ in run(simulator, tmp_path, [({}, 6), ({}, 0)])]
    assert answers[0]["violations"] == ["a write lay outside the write window"]
    assert answers[1]["violations"] == []


def test_a_pass_that_never_ends_is_the_last(simulator, tmp_path):
    answers = [answer for answer, _, _ in run(simulator, tmp_path, [({}, 0), ({}, 10), ({}, 0)])]
    assert [answer["hung"] for answer in answers] == [False, True]
