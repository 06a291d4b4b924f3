"""sim/sampling.py: which layer calls a sampling run gives, and from where their labels come."""

import dataclasses

import pytest
import torch

from golden import detector, trace
from golden.quantized_network import evaluate
from golden.sampler import draw_noise, sample
from hw import config
from sim import sampling
from sim.shape import FitError, Shape


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.mark.parametrize(("text", "numbers"), [
    ("0", [0]), ("5,2, 5", [2, 5]), ("0-2,6", [0, 1, 2, 6]), ("all", list(range(7))),
])
def test_parse_evaluations(text, numbers, model):
    assert sampling.parse_evaluations(text, model) == numbers


@pytest.mark.parametrize("text", ["", "x", "1-", "-1", "0,,1", "1.5"])
def test_evaluations_must_be_numbers(text, model):
    with pytest.raises(ValueError, match=r"^evaluations must be numbers like 0,9,17 or 0-3, or all"
                                         rf", not '{text}'$"):
        sampling.parse_evaluations(text, model)


@pytest.mark.parametrize("text", ["7", "0-9", "3-2"])
def test_evaluations_must_exist(text, model):
    with pytest.raises(ValueError, match=rf"^evaluations must be in 0\.\.6, not '{text}'$"):
        sampling.parse_evaluations(text, model)


def test_select_layers(model):
    assert sampling.select_layers("*", model) == list(model.layers)
    assert sampling.select_layers("last, first", model) == ["first", "last"]
    chosen = sampling.select_layers("encoder.*.conv1", model)
    assert chosen == [name for name in model.layers
                      if name.startswith("encoder.") and name.endswith(".conv1")]


def test_layers_must_match(model):
    with pytest.raises(ValueError, match=r"^layers must match some of first, .*, not 'absent\*'$"):
        sampling.select_layers("first,absent*", model)


def test_states_are_those_of_a_whole_run(model):
    seen = {}
    sample(model, draw_noise(1, model.architecture, 3), model.steps,
           lambda evaluation, x: seen.setdefault(evaluation.index, x.float()))
    found = sampling.states(model, {0, 4}, seed=3)
    assert sorted(found) == [0, 4]
    assert all(torch.equal(found[index], seen[index]) for index in found)


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_labels_follow_the_evaluation_before(interval, model):
    """Whatever is left out, the counts are those of a run through every evaluation."""
    inputs = sampling.states(model, set(range(7)))
    state = model.detector()
    expected = {}
    for index in range(7):
        before = state.counts.clone()
        calls = evaluate(model, inputs[index], index, state, interval=interval).calls
        for call in calls:
            size = model.layers[call.name].slots(config.TINY.vector)
            expected[call.name, index] = before[call.detector_base:call.detector_base + size]
    for wanted in ([0, 3, 4], [2], [6]):
        names = list(model.layers)
        found = list(sampling.layer_calls(model, config.TINY, wanted, names, interval=interval))
        assert [(call.name, call.evaluation) for call, _ in found] == [
            (name, index) for index in wanted for name in names]
        for call, counts in found:
            if model.layers[call.name].sparse_capable:
                assert torch.equal(counts, expected[call.name, call.evaluation])
            else:
                assert counts is None


def test_chosen_layers_take_entries_one_after_the_other(model):
    names = sampling.select_layers("*conv1", model)
    bases = [call.detector_base for call, counts in
             sampling.layer_calls(model, config.TINY, [0], names) if counts is not None]
    sizes = [model.layers[name].slots(config.TINY.vector) for name in names
             if model.layers[name].sparse_capable]
    assert bases == [sum(sizes[:n]) for n in range(len(sizes))]


def test_thresholds(model):
    limits = sampling.thresholds_for(model, config.SMALL, 0.25)
    assert {limits[name] for name, item in model.layers.items() if item.sparse_capable} == {16384}
    with pytest.raises(ValueError, match=r"^threshold must be in 0\.\.1, not 1\.5$"):
        sampling.thresholds_for(model, config.SMALL, 1.5)


def test_layers_that_do_not_fit_are_refused_first(model):
    core = dataclasses.replace(config.TINY, name="narrow", max_channels=32, tile_channels=32)
    calls = sampling.layer_calls(model, core, [0], list(model.layers))
    with pytest.raises(FitError, match=r" must be at most \d+ for narrow, not \d+: \d+ too many$"):
        next(calls)


def test_calls_have_the_tiles_and_costs_of_their_plans(model):
    names = list(model.layers)
    found = sampling.plans(model, config.SMALL, names)
    assert list(found) == names
    for thresholds in (None, sampling.thresholds_for(model, config.SMALL, 0.3)):
        for call, _ in sampling.layer_calls(model, config.SMALL, [0], names,
                                            thresholds=thresholds):
            plan = found[call.name]
            assert plan.shape == Shape.of(call, config.SMALL)
            assert call.tile_channels == plan.tile_channels
            assert call.dense_limit == plan.dense_limit
            balanced = thresholds is None and plan.shape.labelled
            assert call.balance == (plan.costs if balanced else None)


def test_plans_know_how_many_zeros_there_are(model):
    found = sampling.plans(model, config.SMALL)
    densities = {plan.density for name, plan in found.items()
                 if model.layers[name].sparse_capable}
    assert len(densities) > 1
    for name, plan in found.items():
        item = model.layers[name]
        if item.sparse_capable:
            zeros = item.zeros.double().mean() / (item.height * item.width)
            assert plan.density == (pytest.approx(1 - float(zeros), abs=0.01),)


def test_thresholds_suit_the_core(model):
    """All dense: never sparse. Else those that balance both sides, or one fraction for all."""
    capable = {name for name, item in model.layers.items() if item.sparse_capable}
    found = sampling.thresholds_for(model, config.SMALL)
    assert {name for name, value in found.items() if value <= 65536} <= capable
    assert any(found[name] <= 65536 for name in capable)
    assert set(sampling.thresholds_for(model, config.SMALL_DENSE).values()) == {detector.NEVER}
    halves = sampling.thresholds_for(model, config.SMALL, 0.5)
    assert halves == {name: 32768 if name in capable else detector.NEVER for name in model.layers}
    call, _ = next(sampling.layer_calls(model, config.SMALL, [0], sorted(capable)[:1],
                                        thresholds=halves))
    assert call.threshold == 32768


@pytest.mark.parametrize("fraction", [-0.1, 1.01, float("nan")])
def test_thresholds_are_fractions(fraction, model):
    with pytest.raises(ValueError, match=rf"^threshold must be in 0\.\.1, not {fraction}$"):
        sampling.thresholds_for(model, config.SMALL, fraction)


def test_chosen_layers_follow_each_other_in_the_detector(model):
    """A part of a network that is too large for a core's detector can run on it."""
    names = [name for name, item in model.layers.items() if item.sparse_capable][-2:]
    calls = [call for call, _ in sampling.layer_calls(model, config.TINY, [1], names)]
    assert [call.detector_base for call in calls] == [0, model.layers[names[0]].slots(16)]


@pytest.fixture(scope="module")
def counted(model):
    """An exact trace of seed 0."""
    return trace.record(model, exact=True)


@pytest.mark.parametrize("interval", [1, 3])
def test_a_trace_gives_the_same_labels(interval, model, counted, monkeypatch):
    """And nothing is replayed for them."""
    runs = []
    honest = sampling.evaluate
    monkeypatch.setattr(sampling, "evaluate", lambda model, x, index, *rest, **options: (
        runs.append(index), honest(model, x, index, *rest, **options))[1])
    names = list(model.layers)
    for wanted in ([0, 3, 4], [6]):
        replayed, traced = (
            list(sampling.layer_calls(model, config.TINY, wanted, names, interval=interval,
                                      trace=given)) for given in (None, counted))
        assert runs[-len(wanted):] == wanted
        for (call, counts), (other, others) in zip(replayed, traced, strict=True):
            assert (call.name, call.evaluation) == (other.name, other.evaluation)
            assert (counts is None) == (others is None)
            assert counts is None or torch.equal(counts, others)


def test_a_trace_of_something_else_is_refused(model, counted):
    names = list(model.layers)
    with pytest.raises(trace.TraceError, match=r"^seed of the trace must be 5, not 0: record it "):
        next(sampling.layer_calls(model, config.TINY, [1], names, seed=5, trace=counted))
    wide = dataclasses.replace(config.SMALL, name="wide", vector=32)
    with pytest.raises(trace.TraceError, match=r"^vector of the trace must be 32, not 16: record"):
        next(sampling.layer_calls(model, wide, [1], names, trace=counted))
