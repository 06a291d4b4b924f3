"""Cores of many configurations on the RTL: every bit against golden, every cycle against the model.

Cycles of computing are those of the model to the cycle, totals with loading are close to it.

The configurations are a fixed list, so that their simulators are built once and then found in the
cache. Each field goes through its values in an order of its own, as often as each other, and what
rules forbid is put right; depths are multiples of the least that a 3x3 layer of 32 outputs needs.
"""

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest

from golden.detector import Costs
from hw.config import Config
from hw.descriptor import Format
from sim import lowering, random_layers, simulate, tiler
from sim.shape import FitError, Shape
from sim.simulate import MemoryModel

COUNT = 54
QUICK = (4, 12, 40)       # run by `make test`, too
BUDGET = 120_000          # multiplications of a random layer
RANDOM = 20               # random layers of a configuration
STALLED = 8               # of them, the last ones, with a memory that stalls
LANES = {16: (4, 8, 16), 32: (8, 16, 32)}
SPARSE_LANES = {16: (16, 32), 32: (32, 64)}
CHOICES = {               # of a field, or of what follows from others: which of its values
    "vector": (16, 16, 16, 16, 32), "dense_pes": (0, 1, 1, 2, 3), "sparse_pes": (0, 1, 1, 2, 3, 4),
    "sparse_rate": (1, 2, 4), "dense_lanes": range(3), "dense_scale_units": range(3),
    "sparse_lanes": range(2), "sparse_scale_units": range(4),
    "tile_channels": (32, 64, 96, 128), "more_channels": (0, 32, 64, 96),
    "tile_outputs": (32, 64, 96), "more_outputs": (0, 32, 64),
    "more_detector": (0, 1, 37, 1000), "address_width": (14, 15, 17, 22, 28),
}
DEPTHS = ("codes_depth", "entry_depth", "record_depth", "weight_depth", "sparse_weight_depth",
          "weight_scale_depth", "partial_depth", "result_depth", "sparse_weight_scale_depth")
DEMANDS = {               # what a job needs of a buffer, and how many jobs the buffer has room for
    "records": ("record_depth", 2), "entries": ("entry_depth", 2),
    "words of codes": ("codes_depth", 2), "words of dense weights": ("weight_depth", 1),
    "words of sparse weights": ("sparse_weight_depth", 1),
    "words of dense weight scales": ("weight_scale_depth", 1),
    "words of sparse weight scales": ("sparse_weight_scale_depth", 1),
    "words of partial sums": ("partial_depth", 1)}
DENSE_LANES, SPARSE_PRODUCTS = 32, 512   # in all PEs, so that simulators are built in seconds
TOTAL_ERROR = 0.02        # share of all cycles by which the model with loading may be wrong,
JOB_CYCLES = 20           # and cycles of a job besides; of these small layers it is most
RESIDUAL_CYCLES = 25      # the same of a job with residuals, which go before loads in bursts


def powers(low, high):
    """Powers of two from ``low`` to ``high``."""
    return [1 << n for n in range(low.bit_length() - 1, high.bit_length())]


def least_depths(config):
    """Depths with which a pixel of 32 outputs of any 3x3 layer just fits, by field."""
    found = dict.fromkeys(DEPTHS, 8)
    for format in (Format.A4U, Format.MX8):
        shape = Shape(format=format, kernel=3, height=3, width=3, channels=(32,), outputs=32,
                      vector=config.vector, residual=False)
        job = tiler.Job(tile=0, slot=0, slots=32, output=0, outputs=32, y=1, x=1, height=1,
                        width=1, accumulate=False, keep_sums=True, keep_weights=False)
        for _, what, need, _ in tiler.job_demands(shape, config, job, 32 // config.vector):
            if what.removesuffix(" of 3 rows") in DEMANDS:
                field, jobs = DEMANDS[what.removesuffix(" of 3 rows")]
                found[field] = max(found[field], 1 << (jobs * need - 1).bit_length())
    found["result_depth"] = max(8, 2 * config.dense_steps, 2 * config.sparse_steps)
    return found


def configuration(number, draw, factors):
    """The configuration that follows from one of each of `CHOICES` and a factor of each depth."""
    fields = {name: value for name, value in draw.items() if not name.startswith("more_")}
    vector = fields["vector"]
    dense_lanes = LANES[vector][draw["dense_lanes"]]
    sparse_lanes = SPARSE_LANES[vector][draw["sparse_lanes"]]
    if not fields["dense_pes"] and not fields["sparse_pes"]:
        fields["sparse_pes"] = 1 + number % 4
    while fields["dense_pes"] * dense_lanes > DENSE_LANES:
        if dense_lanes > LANES[vector][0]:
            dense_lanes //= 2
        else:
            fields["dense_pes"] -= 1
    while fields["sparse_pes"] * sparse_lanes * draw["sparse_rate"] > SPARSE_PRODUCTS:
        fields["sparse_pes"] -= 1
    for side, lanes in (("dense", dense_lanes), ("sparse", sparse_lanes)):
        units = powers(vector // 4, lanes)
        fields |= {f"{side}_lanes": lanes, f"{side}_scale_units":
                   units[draw[f"{side}_scale_units"] % len(units)]}
    # The network's input takes 64 slots at least.
    fields["max_channels"] = max(64, draw["tile_channels"] + draw["more_channels"])
    fields["max_outputs"] = draw["tile_outputs"] + draw["more_outputs"]
    fields["detector_depth"] = fields["max_channels"] + draw["more_detector"]
    config = Config(result_depth=128, **fields)
    depths = {name: value * factors[name] for name, value in least_depths(config).items()}
    sides = "".join(
        f"-{side[0]}{getattr(config, f'{side}_pes')}x{getattr(config, f'{side}_lanes')}"
        f"u{getattr(config, f'{side}_scale_units')}" for side in ("dense", "sparse"))
    name = f"c{number:02}-v{vector}{sides}m{config.sparse_rate}-t{config.tile_channels}"
    return dataclasses.replace(config, name=name, **depths)


def configurations():
    """The list: the same with every version of every package."""
    rng = random.Random(1)

    def order(values):
        found = list(itertools.islice(itertools.cycle(values), COUNT))
        rng.shuffle(found)
        return found

    draws = {name: order(values) for name, values in CHOICES.items()}
    factors = {name: order((1, 1, 2, 4)) for name in DEPTHS}
    return [configuration(number, {name: values[number] for name, values in draws.items()},
                          {name: values[number] for name, values in factors.items()})
            for number in range(COUNT)]


CONFIGS = configurations()


def test_each_field_takes_each_of_its_values():
    assert len({dataclasses.replace(config, name="same") for config in CONFIGS}) == COUNT >= 50
    seen = {name: {getattr(config, name) for config in CONFIGS}
            for name in dataclasses.asdict(CONFIGS[0])}
    for name in ("vector", "dense_pes", "sparse_pes", "sparse_rate", "tile_channels",
                 "tile_outputs", "address_width"):
        assert seen[name] == set(CHOICES[name]), name
    pairs = collections.Counter()
    for config in CONFIGS:
        pairs.update({(name, config.vector, getattr(config, name)) for name in (
            "dense_lanes", "sparse_lanes", "dense_scale_units", "sparse_scale_units")})
        pairs["sides", config.dense_pes > 0, config.sparse_pes > 0] += 1
        pairs["tiles", config.max_channels - config.tile_channels] += 1
        pairs["outputs", config.max_outputs - config.tile_outputs] += 1
        least = least_depths(config)
        pairs.update({(name, getattr(config, name) // least[name]) for name in DEPTHS})
        for side in ("dense", "sparse"):
            pairs[side, "units", getattr(config, f"{side}_steps") > 1] += 1
            pairs[side, "pes", getattr(config, f"{side}_pes")] += 1
    for vector, name in itertools.product((16, 32), ("dense", "sparse")):
        lanes = (LANES if name == "dense" else SPARSE_LANES)[vector]
        for value in lanes:
            assert pairs[f"{name}_lanes", vector, value], (name, vector, value)
        for value in (vector // 4, vector // 2):
            assert pairs[f"{name}_scale_units", vector, value], (name, vector, value)
    for sides in ((True, True), (True, False), (False, True)):
        assert pairs["sides", *sides] >= 5
    for name, factor in itertools.product(DEPTHS, (1, 2, 4)):
        assert pairs[name, factor], (name, factor)
    for rest in CHOICES["more_channels"]:
        assert pairs["tiles", rest], rest
    for rest in CHOICES["more_outputs"]:
        assert pairs["outputs", rest], rest
    plans = [tiler.plan(broad_shape(config), config) for config in CONFIGS]
    assert sum(len({job.tile for job in plan.jobs}) > 1 for plan in plans) >= 30
    assert sum(len(plan.chosen.columns) > 1 for plan in plans) >= 15


def broad_shape(config):
    """A layer of two tiles of channels where there may be, and of columns where sums are many."""
    outputs = min(config.vector + 3, config.sparse_lanes)
    most = min(12, config.partial_depth // -(-outputs // config.quad) + 1)
    return next(shape for shape in (Shape(
        format=Format.A4S, kernel=3, height=2, width=width, outputs=outputs, residual=True,
        channels=(min(config.max_channels, config.tile_channels + config.vector + 1),),
        vector=config.vector) for width in range(most, 0, -1)) if fits(shape, config))


def fits(shape, config):
    """Whether a core has room for a shape."""
    try:
        tiler.plan(shape, config)
    except FitError:
        return False
    return True


def broad_calls(rng, config):
    """Yield calls of a broad layer in threshold mode, then balanced, then balanced otherwise."""
    shape = broad_shape(config)
    fields = {field.name: getattr(shape, field.name) for field in dataclasses.fields(shape)}
    call, counts = random_layers.random_call(
        rng, config, name="broad", **{name: fields[name] for name in fields if name != "vector"})
    yield dataclasses.replace(call, balance=None, threshold=32768, interval=1), counts
    # The core keeps the counts, and with other costs divides the channels at another place.
    for number, costs in enumerate((
            tiler.plan_for(call, config).costs,
            Costs(*map(int, rng.integers(1, (60, 12, 6, 6))))), 1):
        yield dataclasses.replace(call, balance=costs, interval=1,
                                  evaluation=call.evaluation + number), None


def small_calls(rng, config):
    """Yield `RANDOM` random calls that memory has room for."""
    number = 0
    for call, counts in random_layers.random_calls(rng, config, 4 * RANDOM, budget=BUDGET):
        try:
            lowering.lower(call, config)
        except FitError:
            continue
        yield call, counts
        number += 1
        if number == RANDOM:
            return


@pytest.mark.parametrize("config", [
    pytest.param(config, id=config.name, marks=() if number in QUICK else pytest.mark.slow)
    for number, config in enumerate(CONFIGS)])
def test_random_layers(config):
    rng = np.random.default_rng(CONFIGS.index(config))
    with simulate.one_thread():
        calls = [*broad_calls(rng, config), *small_calls(rng, config)]
    steady = len(calls) - STALLED

    def memory(number):
        stalls = () if number < steady else ((0, 128, 230, 0), (230, 0, 0, 128),
                                             (100, 200, 30, 230), (230, 230, 230, 230))[number % 4]
        names = ("read_stall", "response_stall", "write_stall", "answer_stall")
        return MemoryModel(seed=number + 1, **dict(zip(names, stalls, strict=False)))

    report = simulate.simulate(calls, config, memory=memory,
                               placement=lambda number: {"top": number % 2 == 1}, optimize=False)
    assert report.mismatch is None, f"{report.mismatch} on {config}"
    assert len(report.records) == len(calls)
    assert report.different.total() == 0
    for kind in ("compute_cycles", "dense_work", "sparse_work", "saturations"):
        assert report.compared[kind] == len(calls)
    assert {record.format for record in report.records} == set(Format.__members__)
    for (call, _), record in zip(calls[:steady], report.records, strict=False):
        cycles, foreseen = record.convolve["total_cycles"], record.foreseen
        job = JOB_CYCLES + (0 if call.convolution.residual is None else RESIDUAL_CYCLES)
        most = TOTAL_ERROR * cycles + job * record.convolve["jobs"]
        assert abs(cycles - foreseen) <= most, f"{record.layer} on {config}: {cycles}, {foreseen}"
