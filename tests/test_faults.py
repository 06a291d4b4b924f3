"""Deliberate faults of the RTL: each is caught by the layer bench, and by the right comparison.

`tests.faults` holds the faults, all in one netlist. Every test runs the same few layer calls, whose
operands are chosen so that each fault shows.
"""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from golden import layer
from golden.convolution import accumulate
from golden.detector import Costs
from golden.requantizer import Format, requantize, slots, spread
from hw import descriptor
from hw.config import TINY
from sim import lowering, simulate, tiler
from tests import faults

VECTOR = TINY.vector


def tensor(values):
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def requantization(rng, format, channels, size, bits):
    """Values of ``bits`` bits, and offsets that leave channels with unlike numbers of zeros."""
    height, width = size
    segments = [tensor(np.rint(rng.standard_normal((count, height, width)) * 2.0 ** bits))
                for count in channels]
    if format == Format.IN16:
        return layer.Requantization(segments, None, None, 0, False, format)
    relu, mx = format == Format.A4U, format == Format.MX8
    offset = np.rint(rng.uniform(-2, 0.5, sum(channels)) * 2.0 ** bits * relu)
    gain = rng.integers(12, 21, sum(channels))
    return layer.Requantization(segments, spread(tensor(gain), channels, VECTOR, mx=mx),
                                spread(tensor(offset), channels, VECTOR, mx=mx), 4, relu, format)


def convolution(rng, quantized, kernel, outputs, residual, scales):
    """Results of 17 bits, of which some do not fit; W4A4's weight scales are in ``scales``."""
    mx = quantized.format in (Format.MX8, Format.IN16)
    count = len(quantized.valid)
    limit, scales, groups = (127, (0, 6), count // 32) if mx else (7, scales, 1)
    weights = rng.integers(-limit, limit + 1, (outputs, count, kernel, kernel))
    weights[:, ~np.asarray(quantized.valid)] = 0
    weight_scales = rng.integers(*scales, (outputs, kernel * kernel, groups))
    if quantized.format == Format.IN16:      # both halves of a value have the same weight
        weights[:, count // 2:] = weights[:, :count // 2]
        weight_scales[:, :, groups // 2:] = weight_scales[:, :, :groups // 2]
    weights, weight_scales = tensor(weights), tensor(weight_scales)
    sums = accumulate(quantized, weights, weight_scales)
    align = max(0, int(sums.abs().max()).bit_length() - 24)
    _, height, width = sums.shape
    return layer.Convolution(
        weights, weight_scales, kernel, tensor(rng.integers(2048, 8192, outputs)),
        tensor(rng.integers(-1 << 24, 1 << 24, outputs)), align, 4,
        tensor(rng.integers(-9999, 9999, (outputs, height, width))) if residual else None,
        16384 if residual else 0)


def call(name, seed, format, *, size, channels, outputs, kernel, bits=9, residual=False,
         evaluation=0, interval=1, scales=(0x2C, 0x40), **division):
    """A layer call; channels with 60 % zeros or more are sparse, unless ``balance`` is given."""
    rng = np.random.default_rng(seed)
    first = requantization(rng, format, channels, size, bits)
    quantized = requantize(first.segments, first.gain, first.offset, first.shift, first.relu,
                           format, VECTOR)
    return layer.LayerCall(
        name=name, evaluation=evaluation, requantization=first,
        convolution=convolution(rng, quantized, kernel, outputs, residual, scales),
        threshold=39322, interval=interval, detector_base=7,
        **{"dense_limit": 4, "tile_channels": 64} | division)


def counts(pixels, channels, sparse):
    """Detector counts that make the channels from ``sparse[0]`` on, in these steps, sparse."""
    _, count = slots(channels, VECTOR)
    values = np.zeros(count)
    values[sparse[0]::sparse[1]] = pixels
    return tensor(values)


@functools.cache
def calls():
    """(LayerCall, counts) of a few small layers; some come at more than one evaluation."""
    sides = {"size": (4, 5), "channels": (20, 9), "outputs": 18, "kernel": 3, "residual": True,
             "interval": 2}
    shared = {"size": (5, 6), "channels": (40, 20), "outputs": 40, "kernel": 3, "residual": True,
              "tile_channels": 32, "dense_limit": 2, "balance": Costs(*COSTS)}
    ramp = np.linspace(0, 30, 80).astype(int)
    return [
        (call("blocks", 1, Format.MX8, size=(2, 3), channels=(33,), outputs=17, kernel=3,
              tile_channels=32), None),
        (call("input", 7, Format.IN16, size=(3, 4), channels=(3,), outputs=9, kernel=3,
              tile_channels=32), None),
        (call("sides", 2, Format.A4U, **sides), counts(20, sides["channels"], (1, 2))),
        (call("sides", 3, Format.A4U, evaluation=1, **sides), None),
        (call("sides", 4, Format.A4U, evaluation=2, **sides), None),
        (call("small values", 5, Format.A4S, size=(3, 4), channels=(17,), outputs=9, kernel=1,
              bits=4), counts(12, (17,), (3, 5))),
        (call("crowded", 6, Format.A4S, size=(5, 5), channels=(64,), outputs=64, kernel=1,
              dense_limit=1, scales=(0x2C, 0x78)), counts(25, (64,), (24, 1))),
        (call("shared", 8, Format.A4U, **shared), tensor(ramp)),
        (call("shared", 9, Format.A4U, evaluation=1, **shared), None),
        (call("runs", 10, Format.A4S, size=(6, 4), channels=(64,), outputs=64, kernel=3),
         counts(24, (64,), (9, 1))),
    ]


COSTS = (18, 3, 2, 0)
CHOSEN = {     # of the division into jobs, whatever the tiler would choose
    "blocks": {"share": 2},
    "input": {"share": 1},
    "crowded": {"outputs": (32, 32)},
    "shared": {"outputs": (32, 8), "rows": (3, 2)},
    "runs": {"outputs": (32, 32), "rows": (5, 1)},
}


@functools.cache
def plans():
    """Plans by layer: as many jobs and runs as each fault needs."""
    found = {}
    for one, _ in calls():
        plan = tiler.plan_for(one, TINY)
        chosen = dataclasses.replace(plan.chosen, **{
            "outputs": (plan.shape.outputs,), "columns": (plan.shape.width,),
            "rows": (plan.shape.height,), "head": 0} | CHOSEN.get(one.name, {}))
        jobs = len(chosen.outputs) * len(chosen.rows) * len(plan.shape.tiles(plan.tile_channels))
        found[one.name] = dataclasses.replace(
            plan, chosen=dataclasses.replace(chosen, jobs=jobs))
    return found


STALLED = "small values"   # the call whose memory stalls; no fault needs its cycles


def memory(number):
    """How memory behaves in a call."""
    stalls = {"read_stall": 100, "write_stall": 100} if calls()[number][0].name == STALLED else {}
    return simulate.MemoryModel(**stalls)


def run(folder, fault=None, verilog=None):
    """The report of all calls, with a fault; it goes on after differences."""
    if fault is not None:
        faults.choose(fault, folder)
    return simulate.simulate(calls(), TINY, plans=plans(), verilog=verilog or faults.verilog(TINY),
                             memory=memory, folder=folder, keep_going=True)


@dataclasses.dataclass(frozen=True)
class Caught:
    """How a fault shows.

    Members
    -------
    what, layer, evaluation : the first difference that is of this kind
    first : whether nothing differs before it
    right : kinds of which nothing may differ: they tell this fault from others
    actual : what the core gives there, or None where it does not matter
    """

    what: str
    layer: str
    evaluation: int = 0
    first: bool = True
    right: tuple = ()
    actual: object = None


LISTS = ("list size", "list low", "list high", "list cut")
TENSORS = ("code", "scale", "zero count", "label", *LISTS)   # of a requantization pass
WORK = ("dense_work", "sparse_work")
CYCLES = ("compute_cycles", "dense_busy", "sparse_busy", "stall_cycles")
RESULTS = ("output", "stored zero count", "saturations", "untouched byte", "output padding")
EVERYTHING = (*TENSORS, *WORK, *CYCLES, *RESULTS)

CAUGHT = {
    # memory
    "weight_rows_too_close": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "tiles_of_codes_on_each_other": Caught("code", "blocks", right=("scale", "label", *LISTS)),
    "codes_do_not_move_on": Caught("code", "blocks", right=("scale", "zero count", "label")),
    "residual_of_the_pixel_before": Caught("output", "sides", right=(*TENSORS, *WORK, *CYCLES)),
    "rows_of_a_job_at_the_top": Caught("output", "shared", right=(*TENSORS, *WORK, *CYCLES)),
    "read_window_one_word_short": Caught("error code", "blocks", actual="ACCESS"),
    "scale_fills_its_word": Caught("scale", "blocks", right=("code", "zero count", "label")),
    # output pixels and taps
    "border_tap_not_skipped": Caught("dense_work", "sides", first=False,
                                     right=(*TENSORS, "sparse_work")),
    "pixel_before_its_tap": Caught("output", "blocks", right=(*TENSORS, "dense_work")),
    "high_split_at_other_pixels": Caught("output", "shared", right=(*TENSORS, "dense_work")),
    "null_pixel_not_skipped": Caught("end of the pass", "shared", actual="hung",
                                     right=EVERYTHING),
    "pixel_of_the_other_side_not_skipped": Caught("sparse_work", "blocks", first=False,
                                                  right=(*TENSORS, "dense_work")),
    "chunks_beyond_the_outputs": Caught("output", "blocks", right=(*TENSORS, "dense_work")),
    "run_begins_a_cycle_late": Caught("compute_cycles", "blocks",
                                      right=(*TENSORS, *WORK, *RESULTS)),
    # groups and their pace
    "early_code_counts_twice": Caught("output", "shared", right=(*TENSORS, *CYCLES)),
    "early_entries_not_left_out": Caught("compute_cycles", "shared",
                                         right=(*TENSORS, *WORK, *RESULTS)),
    "empty_group_has_operands": Caught("sparse_work", "shared",
                                       right=(*TENSORS, *CYCLES, "output", "dense_work")),
    "groups_a_cycle_too_far_apart": Caught("sparse_busy", "blocks", first=False,
                                           right=(*TENSORS, *WORK, *RESULTS)),
    "groups_a_cycle_too_close": Caught("output", "blocks", right=(*TENSORS, *WORK)),
    "result_credit_lost": Caught("stall_cycles", "sides", first=False,
                                 right=(*TENSORS, *WORK, "output")),
    "result_credit_too_many": Caught("output", "sides", right=(*TENSORS, *WORK)),
    # products and scales
    "weights_of_the_next_position": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "dense_weights_a_row_further": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "first_word_of_codes_lost": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "low_nibble_taken_as_signed": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "weights_taken_as_unsigned": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "sum_of_the_group_before": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "weight_scales_of_the_next_step": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "planes_weigh_the_same": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "weight_scale_of_mx_as_e4m3": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "shift_of_two_bytes_lost": Caught("output", "crowded", right=(*TENSORS, *WORK, *CYCLES)),
    "sums_not_cleared": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "sums_do_not_move_on": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    # the codes of a run
    "lost_nonzero": Caught("sparse_work", "blocks", first=False,
                           right=(*TENSORS, "dense_work")),
    "zero_that_costs_a_cycle": Caught("compute_cycles", "blocks",
                                      right=(*TENSORS, *WORK, *RESULTS)),
    "dense_codes_on_both_sides": Caught("sparse_work", "sides", first=False,
                                        right=(*TENSORS, "dense_work")),
    "sparse_codes_on_both_sides": Caught("output", "sides", right=(*TENSORS, *WORK, *CYCLES)),
    "entries_left_out_too_many": Caught("output", "shared", right=(*TENSORS, "dense_work")),
    "row_of_the_run_again": Caught("output", "blocks", right=(*TENSORS, "dense_work")),
    "scale_of_the_next_pixel": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    # tiles, jobs and runs
    "row_of_a_run_off_by_one": Caught("dense_work", "shared", first=False,
                                      right=(*TENSORS, "sparse_work")),
    "run_a_row_short": Caught("dense_busy", "runs", right=(*TENSORS, *WORK, *RESULTS)),
    "half_of_the_run_before": Caught("output", "blocks", right=(*TENSORS, "dense_work")),
    "half_given_back_too_early": Caught("output", "blocks", right=(*TENSORS, "dense_work")),
    "weights_of_two_jobs_on_each_other": Caught(
        "output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "weights_do_not_wait_for_room": Caught(
        "output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "weights_of_the_job_before": Caught("output", "blocks", right=TENSORS),
    "weight_scales_to_the_wrong_side": Caught("output", "blocks",
                                              right=(*TENSORS, *WORK, *CYCLES)),
    "table_of_the_job_before": Caught(
        "output", "sides", 1, right=(*TENSORS, *WORK, *CYCLES)),
    "sums_of_the_tiles_before_lost": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "partial_sum_of_the_chunk_before": Caught(
        "output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "share_one_pixel_early": Caught("output", "blocks", right=(*TENSORS, *WORK)),
    "cut_one_pixel_early": Caught("end of the pass", "shared", actual="hung",
                                  right=EVERYTHING),
    "chain_ends_too_early": Caught("jobs", "blocks", first=False, right=TENSORS),
    "job_begins_while_another_is_loaded": Caught("output", "blocks", right=TENSORS),
    # numbers
    "code_ties_away_from_even": Caught("code", "blocks", right=("scale", "label", "dense_work")),
    "result_cut_off": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "saturation_wraps": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "subnormal_scale_as_normal": Caught("code", "small values", right=("scale", "label")),
    "low_half_is_the_high_one": Caught("code", "input", right=("scale", "label")),
    # labels, lists and counts
    "label_one_evaluation_late": Caught(
        "label", "sides", 1, first=False,
        right=("scale", "zero count", "stored zero count", "output")),
    "update_in_spite_of_the_interval": Caught(
        "stored zero count", "sides", 1, right=("scale", "zero count", "output")),
    "channel_on_the_wrong_side": Caught(
        "label", "sides", first=False,
        right=("scale", "zero count", "stored zero count", "output")),
    "bucket_of_twice_the_width": Caught(
        "label", "shared", 1,
        right=("scale", "zero count", "stored zero count", "output")),
    "cut_too_high": Caught("list cut", "shared",
                           right=("code", "scale", "zero count", "label", "output")),
    "split_one_channel_late": Caught("list low", "sides",
                                     right=("code", "scale", "zero count", "label", "output")),
    "limit_of_the_dense_side_ignored": Caught(
        "list low", "crowded", right=("code", "scale", "zero count", "label")),
    "slots_of_the_whole_tensor": Caught("label", "blocks", right=("code", "scale", "zero count")),
    "entries_cost_nothing_to_fill": Caught(
        "list cut", "shared", right=("code", "scale", "zero count", "label", "output")),
    "zero_count_without_the_end_of_a_row": Caught(
        "zero count", "blocks", right=("scale", "output")),
    # handshakes
    "stuck_ready": Caught("end of the pass", "blocks", actual="hung", right=EVERYTHING),
    "done_before_its_writes": Caught(
        "memory port", "blocks", actual="the pass ended with writes under way", right=EVERYTHING),
    "request_changes_while_it_waits": Caught(
        "memory port", STALLED, actual="a read request changed while it waited",
        right=EVERYTHING),
}


@pytest.fixture(scope="module", autouse=True)
def golden_once():
    """Every run has the same calls: what golden, lowering and the cycle model say is kept."""
    kept = {}

    def once(name, function, key):
        def kept_result(*arguments, **keywords):
            place = name, key(*arguments)
            if place not in kept:
                kept[place] = function(*arguments, **keywords)
            return kept[place]
        return kept_result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "run", once("run", layer.run, lambda call, *_: (
            call.name, call.evaluation)))
        patch.setattr(lowering, "lower", once("lower", lowering.lower, lambda call, *_: (
            call.name, call.evaluation)))
        # Results are kept, so that each is the only object with its identity.
        patch.setattr(simulate, "known_counters", once(
            "counters", simulate.known_counters, lambda plan, result, config: id(result)))
        yield


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """The report of the netlist with the faults, none of them chosen."""
    return run(tmp_path_factory.mktemp("clean"))


@pytest.mark.parametrize("netlist", ["generated", "with_faults"])
def test_clean_netlist_passes(netlist, clean, tmp_path):
    """Neither the core as it is nor the netlist with the faults, none chosen, differs anywhere."""
    report = clean
    if netlist == "generated":
        report = run(tmp_path, verilog=simulate.core_verilog(TINY))
    assert report.mismatch is None, str(report.mismatch)
    assert len(report.records) == len(calls())
    compared = {what for caught in CAUGHT.values() for what in (caught.what, *caught.right)}
    assert compared <= set(report.compared)
    assert report.total("convolve", "stall_cycles") > 0


def test_calls_have_what_the_faults_need(clean):
    """More jobs than one, more runs, kept weights, a shared word and pixels that it leaves out."""
    jobs = {name: plan.jobs for name, plan in plans().items()}
    assert {name: len(found) for name, found in jobs.items()} == {
        "blocks": 2, "input": 2, "sides": 1, "small values": 1, "crowded": 2, "shared": 12,
        "runs": 4}
    assert any(job.keep_weights and job.accumulate is False for job in jobs["runs"])
    call, before = calls()[-1]
    runs = simulate.layer_cycles(plans()["runs"], layer.run(call, before, VECTOR), TINY)["runs"]
    assert [len(found) for found in runs] == [2, 1, 2, 1]
    call, before = calls()[-3]
    splits = [(part.low, part.high, part.cut > 0)
              for part in layer.run(call, before, VECTOR).lists]
    assert splits == [(16, 32, True), (0, 16, True), (0, 4, True)]


@pytest.mark.parametrize("name", CAUGHT)
def test_fault_is_caught(name, tmp_path):
    caught = CAUGHT[name]
    report = run(tmp_path, name)
    mismatches = [mismatch for record in report.records for mismatch in record.mismatches]
    found = next((m for m in mismatches if m.what == caught.what), None)
    assert found is not None, f"{caught.what} must differ, not {dict(report.different)}"
    assert (found.layer, found.evaluation) == (caught.layer, caught.evaluation), str(found)
    assert caught.actual in (None, found.actual), str(found)
    if caught.first:
        assert found is report.mismatch, str(report.mismatch)
    wrong = [str(mismatch) for mismatch in mismatches if mismatch.what in caught.right]
    assert not wrong, wrong[0]


def test_fault_kept_weights_loaded_again_is_caught(clean, tmp_path):
    """Nothing is wrong, but the memory port has more to read."""
    report = run(tmp_path, "kept_weights_loaded_again")
    assert report.mismatch is None, str(report.mismatch)
    more = {wrong.layer for wrong, right in zip(report.records, clean.records, strict=True)
            if wrong.convolve["reads"] > right.convolve["reads"]}
    assert more == {"shared", "runs"}


def with_a_short_window(lower, call, config, **keywords):
    """A layer whose convolution may not write its last word, though the bench lets it."""
    lowered = lower(call, config, **keywords)
    whole = lowered.convolve
    words = np.concatenate([lowering.pack_words(
        descriptor.pack(**fields | {"write_limit": fields["write_limit"] - 1}), config.vector)
        for fields in whole.descriptors])
    convolve = dataclasses.replace(whole, load=[
        (first, words if first == whole.descriptor else part) for first, part in whole.load])
    return dataclasses.replace(lowered, convolve=convolve)


def test_fault_write_window_one_word_long_is_caught(tmp_path, monkeypatch):
    """An access that must be refused is not."""
    monkeypatch.setattr(lowering, "lower", functools.partial(with_a_short_window, lowering.lower))
    errors = {}
    for fault in (None, "write_window_one_word_long"):
        folder = tmp_path / str(fault)
        folder.mkdir()
        errors[fault] = {(mismatch.what, mismatch.actual) for record in run(folder, fault).records
                         for mismatch in record.mismatches}
    assert errors[None] == {("error code", "ACCESS")}
    assert errors["write_window_one_word_long"] == set()


def test_every_fault_has_a_test():
    others = {"write_window_one_word_long", "kept_weights_loaded_again"}
    assert {*CAUGHT, *others} == set(faults.FAULTS)
