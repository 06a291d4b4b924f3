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
from golden.requantizer import Format, requantize, slots, spread
from hw import descriptor
from hw.config import TINY
from sim import lowering, simulate
from tests import faults

VECTOR = TINY.vector


def tensor(values):
    return torch.from_numpy(np.ascontiguousarray(values, np.int64))


def requantization(rng, format, channels, size, bits):
    """Values of ``bits`` bits, and offsets that leave channels with unlike numbers of zeros."""
    height, width = size
    segments = [tensor(np.rint(rng.standard_normal((count, height, width)) * 2.0 ** bits))
                for count in channels]
    relu = format == Format.A4U
    offset = np.rint(rng.uniform(-2, 0.5, sum(channels)) * 2.0 ** bits * relu)
    gain = rng.integers(12, 21, sum(channels))
    return layer.Requantization(segments, spread(tensor(gain), channels, VECTOR),
                                spread(tensor(offset), channels, VECTOR), 4, relu, format)


def convolution(rng, quantized, kernel, outputs, residual):
    """Results of 17 bits, of which some do not fit."""
    mx = quantized.format == Format.MX8
    count = len(quantized.valid)
    limit, scales, groups = (127, (0, 6), -(-count // 32)) if mx else (7, (0x2C, 0x40), 1)
    weights = rng.integers(-limit, limit + 1, (outputs, count, kernel, kernel))
    weights[:, ~np.asarray(quantized.valid)] = 0
    weights = tensor(weights)
    weight_scales = tensor(rng.integers(*scales, (outputs, kernel * kernel, groups)))
    sums = accumulate(quantized, weights, weight_scales, VECTOR)
    align = max(0, int(sums.abs().max()).bit_length() - 24)
    _, height, width = sums.shape
    return layer.Convolution(
        weights, weight_scales, kernel, tensor(rng.integers(2048, 8192, outputs)),
        tensor(rng.integers(-1 << 24, 1 << 24, outputs)), align, 4,
        tensor(rng.integers(-9999, 9999, (outputs, height, width))) if residual else None,
        16384 if residual else 0)


def call(name, seed, format, *, size, channels, outputs, kernel, bits=9, residual=False,
         evaluation=0, interval=1):
    """A layer call; channels with 60 % zeros or more are sparse."""
    rng = np.random.default_rng(seed)
    first = requantization(rng, format, channels, size, bits)
    quantized = requantize(first.segments, first.gain, first.offset, first.shift, first.relu,
                           format, VECTOR)
    return layer.LayerCall(
        name=name, evaluation=evaluation, requantization=first,
        convolution=convolution(rng, quantized, kernel, outputs, residual),
        threshold=39322, interval=interval, detector_base=7)


def counts(pixels, channels, sparse):
    """Detector counts that make the channels from ``sparse[0]`` on, in these steps, sparse."""
    _, count = slots(channels, VECTOR)
    values = np.zeros(count)
    values[sparse[0]::sparse[1]] = pixels
    return tensor(values)


@functools.cache
def calls():
    """(LayerCall, counts) of a few small layers; "sides" comes at three evaluations."""
    sides = {"size": (4, 5), "channels": (20, 9), "outputs": 18, "kernel": 3, "residual": True,
             "interval": 2}
    return [
        (call("blocks", 1, Format.MX8, size=(2, 3), channels=(33,), outputs=17, kernel=3), None),
        (call("sides", 2, Format.A4U, **sides), counts(20, sides["channels"], (1, 2))),
        (call("sides", 3, Format.A4U, evaluation=1, **sides), None),
        (call("sides", 4, Format.A4U, evaluation=2, **sides), None),
        (call("small values", 5, Format.A4S, size=(3, 4), channels=(17,), outputs=9, kernel=1,
              bits=4), counts(12, (17,), (3, 5))),
        (call("crowded", 6, Format.A4S, size=(5, 5), channels=(64,), outputs=64, kernel=1),
         counts(25, (64,), (8, 1))),
    ]


STALLED = "small values"   # the call whose memory stalls; no fault needs its cycles


def memory(number):
    """How memory behaves in a call."""
    stalls = {"read_stall": 100, "write_stall": 100} if calls()[number][0].name == STALLED else {}
    return simulate.MemoryModel(**stalls)


def run(folder, fault=None, verilog=None):
    """The report of all calls, with a fault; it goes on after differences."""
    if fault is not None:
        faults.choose(fault, folder)
    return simulate.simulate(calls(), TINY, verilog=verilog or faults.verilog(TINY), memory=memory,
                             folder=folder, keep_going=True)


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


TENSORS = ("code", "scale", "zero count", "label")   # of a requantization pass
WORK = ("dense_work", "sparse_work")
CYCLES = ("compute_cycles", "dense_busy", "sparse_busy", "stall_cycles")
EVERYTHING = (*TENSORS, *WORK, *CYCLES, "output", "stored zero count", "saturations",
              "untouched byte", "output padding")

CAUGHT = {
    # addresses
    "weight_mapper_off_by_one": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "activation_mapper_off_by_one": Caught(
        "code", "blocks", right=("scale", "zero count", "label")),
    "pixel_before_its_tap": Caught("output", "blocks", right=(*TENSORS, "dense_work")),
    "border_tap_not_skipped": Caught("dense_work", "blocks", first=False,
                                     right=(*TENSORS, "sparse_work", "sparse_busy")),
    "residual_of_the_pixel_before": Caught("output", "sides", right=(*TENSORS, *WORK, *CYCLES)),
    "read_window_one_word_short": Caught("error code", "blocks", actual="ACCESS"),
    "scale_fills_its_word": Caught("scale", "blocks", right=("code", "zero count", "label")),
    # the sparse side
    "lost_nonzero": Caught("sparse_work", "sides", 1, first=False,
                           right=(*TENSORS, "dense_work")),
    "zero_that_costs_a_cycle": Caught("sparse_work", "sides",
                                      right=(*TENSORS, "output", "dense_work")),
    "codes_to_the_wrong_side": Caught("output", "blocks", right=(*TENSORS, "dense_work")),
    # the dense side
    "other_bank_of_partial_sums": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "low_nibble_taken_as_signed": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "result_credit_lost": Caught("stall_cycles", "crowded", first=False,
                                 right=(*TENSORS, *WORK, "output")),
    "result_credit_too_many": Caught("end of the pass", "crowded", actual="hung",
                                     right=EVERYTHING),
    # numbers
    "code_ties_away_from_even": Caught("code", "blocks", right=("scale", "label", "dense_work")),
    "result_cut_off": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "saturation_wraps": Caught("output", "blocks", right=(*TENSORS, *WORK, *CYCLES)),
    "subnormal_scale_as_normal": Caught("code", "small values", right=("scale", "label")),
    # labels and counts
    "label_one_evaluation_late": Caught(
        "label", "sides", 1, first=False,
        right=("scale", "zero count", "stored zero count", "output")),
    "update_in_spite_of_the_interval": Caught(
        "stored zero count", "sides", 1, right=("scale", "zero count", "output")),
    "channel_on_the_wrong_side": Caught(
        "label", "sides", first=False,
        right=("scale", "zero count", "stored zero count", "output")),
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


@pytest.mark.parametrize("verilog", [simulate.core_verilog, faults.verilog],
                         ids=["generated", "with_faults"])
def test_clean_netlist_passes(verilog, tmp_path):
    """Neither the core as it is nor the netlist with the faults, none chosen, differs anywhere."""
    report = run(tmp_path, verilog=verilog(TINY))
    assert report.mismatch is None, str(report.mismatch)
    assert len(report.records) == len(calls())
    compared = {what for caught in CAUGHT.values() for what in (caught.what, *caught.right)}
    assert compared <= set(report.compared)
    assert report.total("convolve", "stall_cycles") > 0


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


def with_a_short_window(lower, call, config, **keywords):
    """A layer whose convolution may not write its last word, though the bench lets it."""
    lowered = lower(call, config, **keywords)
    whole = lowered.convolve
    fields = whole.fields | {"write_limit": whole.fields["write_limit"] - 1}
    words = lowering.pack_words(descriptor.pack(**fields), config.vector)
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
        differences = {(mismatch.what, mismatch.actual)
                       for record in run(folder, fault).records for mismatch in record.mismatches}
        errors[fault] = differences
    assert errors[None] == {("error code", "ACCESS")}
    assert errors["write_window_one_word_long"] == set()


def test_every_fault_has_a_test():
    assert {*CAUGHT, "write_window_one_word_long"} == set(faults.FAULTS)
