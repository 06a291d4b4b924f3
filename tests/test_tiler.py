"""sim/tiler.py: every output is made once, every job fits, and the reasons are told."""

import collections
import dataclasses
import itertools
import re
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import detector, network, requantizer
from golden.presets import PRESETS
from hw.config import LARGE, MEDIUM, SMALL, SMALL_DENSE, TINY, ConfigError
from hw.descriptor import Error, Format
from sim import tiler
from sim.cycles import layer_cycles
from sim.shape import FitError, Shape
from tests.strategies import many

CLAIMED = (SMALL, MEDIUM, LARGE)   # they run any published network

powers = st.integers(3, 12).map(lambda n: 1 << n)


@st.composite
def configs(draw):
    """Cores of all kinds, with buffers from far too small to plenty."""
    fields = {name: draw(powers) for name in (
        "codes_depth", "entry_depth", "record_depth", "weight_depth", "sparse_weight_depth",
        "weight_scale_depth", "sparse_weight_scale_depth", "partial_depth")}
    fields |= {"dense_pes": draw(st.integers(0, 3)), "sparse_pes": draw(st.integers(0, 4)),
               "tile_channels": draw(st.sampled_from([32, 64, 128])),
               "tile_outputs": draw(st.sampled_from([32, 64, 128])),
               "sparse_lanes": draw(st.sampled_from([16, 32])), "sparse_scale_units": 4}
    try:
        return dataclasses.replace(TINY, name="any", **fields)
    except ConfigError:
        return dataclasses.replace(TINY, name="any", **fields | {"sparse_pes": 1})


@st.composite
def shapes(draw, vector=16, most=128):
    format = draw(st.sampled_from(Format))
    channels = draw(st.lists(st.integers(1, most // 2 - 16), min_size=1, max_size=2))
    return Shape(
        format=format, kernel=draw(st.sampled_from([1, 3])), height=draw(st.integers(1, 40)),
        width=draw(st.integers(1, 40)), channels=tuple(channels[:1 + (format != Format.IN16)]),
        outputs=draw(st.integers(1, most)), vector=vector, residual=draw(st.booleans()))


def check(plan):
    """Every output takes every tile of channels once, one after the other, and every job fits."""
    shape, config = plan.shape, plan.config
    tiles = shape.tiles(plan.tile_channels)
    seen = np.zeros((shape.outputs, shape.height, shape.width), np.int64)
    kept, before = None, None
    for job in plan.jobs:
        place = (job.output, job.outputs, job.y, job.x, job.height, job.width)
        assert (job.slot, job.slots) == tiles[job.tile][:2]
        assert job.output % 32 == 0
        assert job.accumulate == (kept is not None)
        if kept is None:
            kept = place, set()
        assert kept[0] == place
        assert job.tile not in kept[1]
        kept[1].add(job.tile)
        assert job.keep_sums == (len(kept[1]) < len(tiles))
        if not job.keep_sums:
            seen[job.output:job.output + job.outputs, job.y:job.y + job.height,
                 job.x:job.x + job.width] += 1
            kept = None
        loaded = (job.tile, job.output, job.outputs)
        assert job.keep_weights == (before == loaded)
        before = loaded
        for error, what, need, have in tiler.job_demands(shape, config, job, plan.dense_limit):
            assert need <= have, (error, what)
        assert tiler.sparse_tiles_fit(job.outputs, config)
    assert kept is None
    assert (seen == 1).all()
    assert len(plan.jobs) == plan.chosen.jobs
    assert plan.chosen in plan.candidates
    assert plan.cycles <= 1.05 * min(candidate.cycles for candidate in plan.candidates)
    if shape.mx:
        assert plan.share <= min(plan.chosen.columns)
        assert (plan.share == 1) >= (not config.sparse_pes)
        assert (plan.share == 0) >= (not config.dense_pes)


@many
@given(configs(), shapes())
def test_every_output_is_made_once(config, shape):
    try:
        plan = tiler.plan(shape, config)
    except FitError as error:
        assert re.fullmatch(r".+ must .+, not \d+(: \d+ too many)?", str(error))
        assert error.error in (Error.CHANNELS, Error.ACTIVATIONS, Error.WEIGHTS, Error.SCALES,
                               Error.PARTIALS, Error.TILES)
        return
    check(plan)


def network_shapes(name, vector):
    """Shapes of a published network's layers in the mixed formats, each once."""
    with torch.device("meta"):
        unet = network.build(PRESETS[name])
    found = {}
    layers = network.layer_shapes(unet)
    for layer in layers:
        first = layer is layers[0]
        for format in (Format.IN16,) if first else (Format.A4U, Format.MX8):
            shape = Shape(
                format=format, kernel=layer.kernel, height=layer.height, width=layer.width,
                channels=layer.segments, outputs=layer.cout, vector=vector, residual=True)
            found[shape] = layer.name
    return found


@pytest.mark.parametrize("config", CLAIMED, ids=[config.name for config in CLAIMED])
def test_layers_of_published_networks_have_plans(config):
    """Up to 64 x 64 pixels, 1536 input and 768 output channels."""
    largest = Shape(format=Format.A4U, kernel=3, height=64, width=64, channels=(768, 768),
                    outputs=768, vector=config.vector, residual=True)
    shapes = {largest}
    for name in PRESETS:
        shapes |= network_shapes(name, config.vector).keys()
    assert len(shapes) > 150
    for shape in shapes:
        if shape.outputs > config.max_outputs:    # queries, keys and values at once
            assert shape.kernel == 1
            with pytest.raises(FitError, match="^output channels must be at most"):
                tiler.plan(shape, config)
            continue
        plan = tiler.plan(shape, config)
        assert plan.chosen.compute > 0
        bound = shape.pixels * shape.taps * sum(shape.channels) * shape.outputs
        rate = config.multipliers / (4 if shape.mx else 1)
        assert plan.cycles > bound / rate / 20
    check(tiler.plan(dataclasses.replace(largest, height=8, width=8), config))


def plan(format=Format.A4U, config=MEDIUM, density=None, **fields):
    fields = {"kernel": 3, "height": 32, "width": 32, "channels": (256,), "outputs": 256,
              "residual": False} | fields
    return tiler.plan(Shape(format=format, vector=config.vector, **fields), config, density)


def test_channel_tiles_run_to_and_fro():
    """So the weights that end a place begin the next one."""
    found = plan()
    tiles = found.shape.tiles(found.tile_channels)
    places = collections.Counter((job.output, job.y, job.x) for job in found.jobs)
    assert set(places.values()) == {len(tiles)}
    kept = sum(job.keep_weights for job in found.jobs)
    outputs = len(found.chosen.outputs)
    assert kept == len(places) - outputs > 0


def test_weights_stay_where_channels_are_one_tile():
    found = plan(channels=(64,), height=64, width=64, outputs=32)
    assert len(found.jobs) > 1
    assert [job.keep_weights for job in found.jobs] == [False] + [True] * (len(found.jobs) - 1)


def test_the_first_job_is_short():
    """Where another run can be loaded while it is computed, and its weights stay."""
    found = plan(channels=(64,), outputs=32)
    head, rest = found.jobs[:2]
    assert (head.y, rest.y, rest.y + rest.height) == (0, head.height, 32)
    assert 0 < head.height == found.chosen.head < found.chosen.run_rows[0]
    assert not head.keep_weights
    assert rest.keep_weights
    assert plan().chosen.head == 0
    assert "the first one" in found.explain()


def test_mx8_pixels_are_shared_by_rates():
    """The dense side takes more pixels the more non-zero nibbles there are, and never all."""
    def dense(density):
        share = plan(Format.MX8, density=density).share
        return 1 / share if share else 0

    shares = [dense((part, part)) for part in (0.1, 0.4, 0.7, 1.0)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] < 1
    assert plan(Format.MX8, SMALL_DENSE).share == 1
    assert plan(Format.MX8, dataclasses.replace(SMALL, dense_pes=0)).share == 0


@pytest.mark.parametrize("pes", [1, 2, 3, 4])
def test_no_sparse_pe_has_all_pixels_of_the_dense_side(pes):
    config = dataclasses.replace(SMALL, sparse_pes=pes)
    share = plan(Format.MX8, config, outputs=32, channels=(32,)).share
    assert share > 1
    owners = {number % pes for number in range(share - 1, share * pes * 4, share)}
    assert owners == set(range(pes))


def test_costs_are_cycles_of_both_sides():
    """For 32 outputs of medium: 4 dense tiles on one PE, 1 sparse tile on three."""
    costs = plan(channels=(64,), outputs=32).costs
    # word 4, non-zero 1/3/4, a group 3/8 of a sparse issue for rounding up: times 24
    assert dataclasses.astuple(costs) == (96, 2, 3, 0)


def test_balance_follows_the_outputs():
    """Half of the sparse lanes idle: the dense side is worth more."""
    def ratio(outputs):
        costs = plan(config=SMALL, channels=(64,), outputs=outputs).costs
        return costs.word / costs.nonzero

    assert ratio(16) == ratio(32) / 2


def test_the_objective_may_be_computing_alone():
    """Then tiles of channels are as large as weights allow, whatever their loading costs."""
    shape = plan().shape
    total, compute = (tiler.plan(shape, MEDIUM, objective=name) for name in ("total", "compute"))
    assert compute.chosen.compute < total.chosen.compute
    assert compute.chosen.cycles > total.chosen.cycles
    assert compute.tile_channels > total.tile_channels
    assert compute.chosen.compute == min(other.compute for other in compute.candidates)
    with pytest.raises(ValueError, match="^objective must be total or compute, not 'area'$"):
        tiler.plan(shape, MEDIUM, objective="area")


def test_more_buffers_never_cost():
    for format, config in itertools.product((Format.A4U, Format.MX8), (SMALL, MEDIUM)):
        found = plan(format, config)
        for field, cycles in found.what_if().items():
            assert cycles <= 1.02 * found.chosen.cycles, field


def test_explain():
    """Text names sizes, limits, all candidates, the port's words and what would help."""
    found = plan()
    text = found.explain("conv")
    assert text.startswith("conv: A4U 3x3, 32x32, 256->256 on medium\n")
    chosen = found.chosen
    assert f"  {chosen}\n" in text
    assert text.count(" cycles in ") == 1 + len(found.candidates)
    assert len(re.findall(r"^    \* ", text, re.MULTILINE)) == 1
    assert "rows of a job: limited by partial_depth, 1024 words" in text
    assert re.search(r"port words: weights [\d,]+, codes [\d,]+, ", text)
    for field in found.what_if():
        assert re.search(rf"^    {field}: [\d,]+ cycles \([+-][\d.]+%\)$", text, re.MULTILINE)
    mixed = plan(Format.MX8).explain()
    assert re.search(r"every \d+\. pixel dense, at 55% and 45% non-zero low and high nib", mixed)


def test_given_tiles_are_kept():
    shape = plan().shape
    found = tiler.plan(shape, MEDIUM, tile_channels=32, dense_limit=1)
    assert (found.tile_channels, found.dense_limit) == (32, 1)
    with pytest.raises(FitError, match="^slots of a tile of channels must be at most 128 for "
                                       "medium, not 160: 32 too many$"):
        tiler.plan(shape, MEDIUM, tile_channels=160)


def test_density():
    shape = plan().shape
    assert tiler.density(shape, 0.347) == (0.35,)
    assert tiler.density(dataclasses.replace(shape, format=Format.MX8), 0.5) == (0.47, 0.4)
    assert tiler.density(dataclasses.replace(shape, format=Format.IN16), 0.5) is None


@pytest.mark.parametrize(("density", "taken", "left"), [
    (0.5, 0, 0.5), (0.5, 1, 0), (0.5, 0.5, 0.125), (1, 0.25, 0.75), (0.75, 0, 0.75)])
def test_nonzeros_left(density, taken, left):
    assert tiler.nonzeros_left(taken, density) == pytest.approx(left)


@pytest.mark.parametrize("config", [SMALL, MEDIUM, SMALL_DENSE], ids=["small", "medium", "dense"])
@pytest.mark.parametrize("format", [Format.A4U, Format.MX8])
def test_estimates_are_near_the_cycle_model(config, format):
    """For channels as unlike as supposed; exact cycles are those of `sim.cycles`."""
    rng = np.random.default_rng(4)
    shape = Shape(format=format, kernel=3, height=16, width=16, channels=(64,), outputs=64,
                  vector=config.vector, residual=False)
    shares = rng.permutation(np.linspace(1, 0, 64))[:, None, None]
    filled = rng.random((64, 16, 16)) < shares
    codes = torch.from_numpy(rng.integers(1, 16, filled.shape) * 17 % 128 * filled)
    if not shape.mx:
        codes = codes % 16
    nonzero = float((codes != 0).double().mean())
    found = tiler.plan(shape, config, tiler.density(shape, nonzero))
    valid = torch.ones(64, dtype=torch.bool)
    tensor = requantizer.Codes(codes, torch.zeros(1, 16, 16, dtype=torch.int64),
                               (codes == 0).sum((1, 2)), 0, valid, requantizer.Format(format), 16)
    if shape.mx:
        lists = detector.natural_lists(valid)
    else:
        lists = detector.balanced_lists(tensor.zero_counts, 256, found.costs, valid, 16,
                                        found.tile_channels, found.dense_limit, True,
                                        config.sparse_pes > 0)
    exact = layer_cycles(found, types.SimpleNamespace(codes=tensor, lists=lists), config)
    assert found.chosen.compute == pytest.approx(exact["compute_cycles"], rel=0.15)
