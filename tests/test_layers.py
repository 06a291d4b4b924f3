"""Whole layers on the RTL: every bit against golden, every cycle against the cycle model."""

import dataclasses
import tempfile

import numpy as np
import pytest
import torch

from golden import detector, layer
from hw.config import SMALL, SMALL_DENSE, TINY
from hw.descriptor import Format
from sim import random_layers, simulate
from sim.simulate import MemoryModel

WIDE = dataclasses.replace(
    TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8, dense_pes=2,
    sparse_lanes=32, sparse_scale_units=8, sparse_pes=2)
CONFIGS = (TINY, SMALL, SMALL_DENSE, WIDE)
NAMES = [config.name for config in CONFIGS]
RANDOM = {"tiny": 60, "small": 40, "small-dense": 35, "wide": 35}   # and 30 with stalls
STALLS = ((0, 128, 230, 0), (230, 0, 0, 128), (100, 200, 30, 230), (230, 230, 230, 230))


def stalling(number):
    """A memory that answers each call in another way."""
    names = ("read_stall", "response_stall", "write_stall", "answer_stall")
    return MemoryModel(seed=number + 1, read_latency=1 + number % 7, write_latency=1 + number % 5,
                       **dict(zip(names, STALLS[number % 4], strict=True)))


def scattered(number):
    """Layers lie together, apart in another order, or at the end of memory."""
    return ({}, {"rng": np.random.default_rng(number), "base": number % 50}, {"top": True})[
        number % 3]


def check(calls, config, **options):
    """Simulate; the report of a run without differences."""
    report = simulate.simulate(calls, config, placement=scattered, **options)
    assert report.mismatch is None, str(report.mismatch)
    assert report.different.total() == 0
    return report


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_random_layers(config):
    count = RANDOM[config.name]
    report = check(random_layers.random_calls(np.random.default_rng(2), config, count), config)
    assert len(report.records) == count
    assert {record.format for record in report.records} == set(Format.__members__)
    for kind in ("compute_cycles", "dense_work", "sparse_work", "saturations"):
        assert report.compared[kind] == count
    assert sum(not record.convolve["output_stall"] for record in report.records) > count // 2
    sides = {side for record in report.records for side in ("dense", "shared", "sparse")
             if getattr(record, f"{side}_channels")}
    assert sides == ({"dense", "shared", "sparse"} if config.sparse_pes else {"dense"})
    assert max(record.convolve["jobs"] for record in report.records) > 2


def test_random_layers_with_a_memory_that_stalls():
    calls = random_layers.random_calls(np.random.default_rng(3), TINY, 30)
    report = check(calls, TINY, memory=stalling)
    assert len(report.records) == 30


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_edge_sizes(config):
    report = check(random_layers.edge_calls(np.random.default_rng(4), config), config)
    assert len(report.records) > 50


def example(evaluation=0, **fields):
    """A small layer with channels on both sides at any evaluation, in threshold mode."""
    call, _ = random_layers.random_call(
        np.random.default_rng(6), TINY, name="conv", evaluation=evaluation, format=Format.A4U,
        kernel=3, height=5, width=6, channels=(20, 9), outputs=18, residual=True)
    fields = {"threshold": 19661, "interval": 1, "detector_base": 7, "balance": None,
              "tile_channels": 64, "dense_limit": 4} | fields
    return dataclasses.replace(call, **fields)


COUNTS = torch.tensor([0, 30] * 24)


def test_labels_follow_the_counts_of_the_evaluation_before():
    """Nothing is written between evaluations: labels come from what the core counted itself."""
    calls = [(example(evaluation, interval=2), COUNTS if evaluation == 0 else None)
             for evaluation in range(4)]
    report = check(calls, TINY)
    assert report.counts_written == 1
    channels = [(record.dense_channels, record.sparse_channels) for record in report.records]
    assert channels[0] == (15, 14)
    assert channels[1] == channels[2] == channels[3] != channels[0]


def test_counts_of_skipped_evaluations_come_through_registers():
    """Counts that the core holds already are not written again."""
    stored = layer.run(example(0), COUNTS, 16).zero_counts
    calls = [(example(0), COUNTS), (example(1), stored), (example(9), COUNTS)]
    assert check(calls, TINY).counts_written == 2


def test_counts_must_come_from_somewhere():
    with pytest.raises(ValueError, match="^conv: counts must be given, the core holds none yet$"):
        simulate.simulate([(example(), None)], TINY)


def test_balanced_lists_follow_the_counts_of_the_evaluation_before():
    """And a boundary word is shared by both sides."""
    costs = detector.Costs(10, 1, 0, 0)
    calls = [(example(evaluation, balance=costs, tile_channels=32), COUNTS if evaluation == 0
              else None) for evaluation in range(3)]
    report = check(calls, TINY)
    assert report.counts_written == 1
    assert any(record.shared_channels for record in report.records)
    assert {record.convolve["jobs"] for record in report.records} == {2}


def altered(monkeypatch, change):
    """Let golden's results be ``change``d, as if the RTL were wrong in the same place."""
    honest = layer.run

    def run(call, *arguments):
        result = honest(call, *arguments)
        return change(result) if call.evaluation == 3 else result

    monkeypatch.setattr(layer, "run", run)


def other_output(result):
    output = result.output.clone()
    output[11, 3, 2] += 1
    return dataclasses.replace(result, output=output)


def other_code(result):
    codes = result.codes.codes.clone()
    codes[33, 4, 5] ^= 1
    return dataclasses.replace(result, codes=dataclasses.replace(result.codes, codes=codes))


def other_scale(result):
    scales = result.codes.scales.clone()
    scales[0, 1, 4] += 1
    return dataclasses.replace(result, codes=dataclasses.replace(result.codes, scales=scales))


def other_count(result):
    counts = result.zero_counts.clone()
    counts[34] += 1
    return dataclasses.replace(result, zero_counts=counts)


def other_list(**fields):
    def change(result):
        part = result.lists[0]
        return dataclasses.replace(result, lists=[dataclasses.replace(part, **fields)])
    return change


def other_order(result):
    """The first two channels change places; codes follow the list."""
    slots = result.lists[0].slots.clone()
    slots[:2] = slots[:2].flip(0)
    return other_list(slots=slots)(result)


@pytest.mark.parametrize(("change", "text"), [
    (other_output, "channel 11, pixel (y 3, x 2): output must be "),
    (other_code, "channel 21, pixel (y 4, x 5): code must be "),
    (other_scale, "pixel (y 1, x 4): scale must be "),
    (other_count, "channel 22: zero count must be "),
    (other_order, "position 0 of the list: label must be 2, not 0"),
    (other_list(cut=3), "list cut must be 3, not 0"),
    (other_list(low=1), "list low must be 1, not 15"),
    (other_list(high=27), "list high must be 27, not 15"),
    (lambda result: dataclasses.replace(result, saturations=result.saturations + 1),
     "saturations must be "),
])
def test_the_first_difference_is_named(monkeypatch, change, text):
    """The run ends with the call that differs, and says where."""
    altered(monkeypatch, change)
    seen = []
    report = simulate.simulate([(example(evaluation), COUNTS) for evaluation in range(9)], TINY,
                               progress=seen.append)
    separator = ": " if "must" in text.split(":")[0] else ", "
    assert str(report.mismatch).startswith(f"conv, evaluation 3{separator}{text}")
    assert seen == report.records
    assert [record.evaluation for record in report.records] == [0, 1, 2, 3]
    assert report.as_dict()["elements_different"] == report.different.total() > 0
    assert report.as_dict()["mismatch"] == str(report.mismatch)


def test_a_run_can_go_on_after_a_difference(monkeypatch):
    altered(monkeypatch, other_output)
    report = simulate.simulate([(example(evaluation), COUNTS) for evaluation in range(6)], TINY,
                               keep_going=True)
    assert len(report.records) == 6
    assert report.different == {"output": 1}


def test_a_wrong_work_counter_or_cycle_is_named(monkeypatch):
    honest = simulate.layer_cycles

    def cycles(*arguments):
        return honest(*arguments) | {"compute_cycles": 1}

    monkeypatch.setattr(simulate, "layer_cycles", cycles)
    report = simulate.simulate([(example(), COUNTS)], TINY)
    assert str(report.mismatch).startswith("conv, evaluation 0: compute_cycles must be 1, not ")
    monkeypatch.undo()
    monkeypatch.setattr(simulate.convolution, "work", lambda *arguments, **options: (2, 3))
    report = simulate.simulate([(example(), COUNTS)], TINY)
    texts = [str(mismatch) for mismatch in report.records[0].mismatches]
    assert len(texts) == 2
    for text, what in zip(texts, ("dense_work must be 2", "sparse_work must be 3"), strict=True):
        assert text.startswith(f"conv, evaluation 0: {what}, not ")


def test_a_layer_that_does_not_fit_ends_the_run(monkeypatch, tmp_path):
    """Nothing is left behind."""
    simulate.build(TINY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    call, counts = random_layers.random_call(np.random.default_rng(1), SMALL, channels=(130,),
                                             format=Format.A4U)
    with pytest.raises(ValueError, match="^random: input channel slots must be at most 128 "
                                         "for tiny, not 144: 16 too many$"):
        simulate.simulate([(example(), COUNTS), (call, counts)], TINY)
    assert list(tmp_path.glob("sqdm-simulate-*")) == []


@pytest.mark.parametrize("fields", [{"read_latency": 0}, {"read_stall": 256}, {"seed": 0}])
def test_memory_model_is_checked(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=rf"^{name} must be in \d+\.\.\d+, not {value}$"):
        MemoryModel(**fields)
