"""sim/lowering.py: layouts there and back, and executed by a reader that knows only the layouts."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import layer, requantizer
from hw import descriptor, registers
from hw.config import SMALL, SMALL_DENSE, TINY
from hw.descriptor import Error, Format, Kind
from sim import lowering, random_layers, tiler
from sim.compare import Comparison, compare_convolve, compare_requantize
from tests import test_sequencer
from tests.interpreter import Interpreter
from tests.strategies import few, many

WIDE = dataclasses.replace(TINY, name="wide", vector=32, dense_lanes=8, dense_scale_units=8,
                           sparse_lanes=32, sparse_scale_units=8, sparse_pes=2)
CONFIGS = (TINY, SMALL, SMALL_DENSE, WIDE)
NAMES = [config.name for config in CONFIGS]

vectors = st.sampled_from([16, 32])
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
sizes = st.integers(1, 5)


@few
@given(generators, st.integers(1, 70), sizes, sizes, vectors)
def test_tensor_there_and_back(rng, channels, height, width, vector):
    tensor = rng.integers(-32768, 32768, (channels, height, width))
    words = lowering.pack_tensor(tensor, vector)
    assert words.shape == (-(-channels // vector) * height * width * 4, vector // 2)
    back = lowering.unpack_tensor(words, height, width, vector)
    assert (back[:channels] == tensor).all()
    assert not back[channels:].any()


@few
@given(generators, st.integers(1, 4), sizes, sizes, vectors, st.sampled_from(Format))
def test_codes_there_and_back(rng, count, height, width, vector, format):
    low, high = {Format.A4U: (0, 15), Format.A4S: (-7, 7)}.get(format, (-128, 127))
    codes = rng.integers(low, high + 1, (count * vector, height, width))
    words = lowering.pack_codes(codes, format, vector)
    planes = 2 if format in (Format.MX8, Format.IN16) else 1
    assert words.shape == (count * height * width * planes, vector // 2)
    assert (lowering.unpack_codes(words, height, width, format, vector) == codes).all()


@few
@given(generators, st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 3]), vectors,
       st.sampled_from(Format))
def test_weights_there_and_back(rng, outputs, count, kernel, vector, format):
    limit = 127 if format in (Format.MX8, Format.IN16) else 7
    codes = rng.integers(-limit, limit + 1, (outputs, count * vector, kernel, kernel))
    words = lowering.pack_weights(codes, format, vector)
    back = lowering.unpack_weights(words, count * vector, kernel, format, vector)
    assert (back[:outputs] == codes).all()
    assert not back[outputs:].any()


@few
@given(generators, st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), vectors)
def test_tables_there_and_back(rng, outputs, taps, groups, vector):
    scales = rng.integers(0, 256, (outputs, taps, groups))
    back = lowering.unpack_weight_scales(
        lowering.pack_weight_scales(scales, vector), taps, groups)
    assert (back[:outputs] == scales).all()
    factor = rng.integers(-1 << 15, 1 << 15, outputs)
    term = rng.integers(-1 << 31, 1 << 31, outputs)
    words = lowering.pack_table(factor, term, vector)
    assert len(words) * vector // 2 == -(-outputs // vector) * vector * 8
    for expected, actual in zip((factor, term), lowering.unpack_table(words), strict=True):
        assert (actual[:outputs] == expected).all()
        assert not actual[outputs:].any()


@few
@given(generators, st.integers(1, 9), sizes, sizes, vectors)
def test_planes_there_and_back(rng, groups, height, width, vector):
    scales = rng.integers(0, 256, (groups, height, width))
    words = lowering.pack_bytes(scales, vector)
    assert (lowering.unpack_bytes(words, scales.shape) == scales).all()
    counts = rng.integers(0, 65536, groups)
    assert (lowering.unpack_halves(lowering.pack_halves(counts, vector), groups) == counts).all()


@few
@given(generators, st.integers(1, 70), vectors, st.integers(0, 256))
def test_list_there_and_back(rng, count, vector, cut):
    slots = rng.permutation(count)
    low, high = sorted(rng.integers(0, count + 1, 2))
    words = lowering.pack_list(slots, low, high, cut, vector)
    assert len(words) == 1 + -(-count // vector) * 4
    sizes, positions = lowering.unpack_list(words, vector)
    assert sizes == {"size": count, "low": low, "high": high, "cut": cut}
    assert (positions[:count] == slots).all()
    assert (positions[count:] == lowering.NO_CHANNEL).all()


def test_halves_of_a_word_are_little_endian():
    """One value of each layout, byte by byte as the memory contract has it."""
    tensor = np.arange(16).reshape(16, 1, 1) * 257 + 1
    assert lowering.pack_tensor(tensor, 16)[0].tolist() == [1, 0, 2, 1, 3, 2, 4, 3]
    codes = np.arange(16).reshape(16, 1, 1)
    assert lowering.pack_codes(codes, Format.A4U, 16).tolist() == [
        [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert lowering.pack_codes(codes - 16, Format.MX8, 16).tolist() == [
        [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], [0xFF] * 8]
    assert lowering.pack_codes(np.arange(64).reshape(32, 1, 2) & 7, Format.A4U, 16).tolist() == [
        [0x20, 0x64, 0x20, 0x64, 0x20, 0x64, 0x20, 0x64]] * 2 + [
        [0x31, 0x75, 0x31, 0x75, 0x31, 0x75, 0x31, 0x75]] * 2
    assert lowering.pack_list([5, 1, 2], 1, 300, 256, 16).tolist() == [
        [3, 0, 1, 0, 44, 1, 0, 1], [5, 0, 1, 0, 2, 0, 255, 255], [255] * 8, [255] * 8, [255] * 8]
    assert lowering.pack_table([-2], [3], 16)[0].tolist() == [3, 0, 0, 0, 254, 255, 0, 0]
    assert lowering.pack_words([0x04030201, 5], 16).tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]


@pytest.mark.parametrize(("pack", "text"), [
    (lambda: lowering.pack_tensor(np.full((1, 1, 1), 32768), 16),
     "tensor must be in -32768..32767, not 32768"),
    (lambda: lowering.pack_codes(np.full((16, 1, 1), -1), Format.A4U, 16),
     "codes must be in 0..15, not -1"),
    (lambda: lowering.pack_weights(np.full((1, 16, 1, 1), -8), Format.A4U, 16),
     "weight_codes must be in -7..7, not -8"),
    (lambda: lowering.pack_table([1], [1 << 31], 16),
     "term must be in -2147483648..2147483647, not 2147483648"),
])
def test_operands_out_of_range(pack, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        pack()


def test_operands_must_be_integers():
    with pytest.raises(TypeError, match="^tensor must be integers, not float64$"):
        lowering.pack_tensor(np.ones((1, 1, 1)), 16)


@many
@given(generators, st.sampled_from(CONFIGS), st.booleans(), st.booleans())
def test_regions_are_apart_and_inside_their_windows(rng, config, loose, top):
    call, _ = random_layers.random_call(rng, config, budget=20_000)
    lowered = lowering.lower(call, config, top=top, rng=rng if loose else None,
                             base=0 if top else int(rng.integers(9)))
    chained = ("permutation", "scales", "codes")
    for pass_ in (lowered.requantize, lowered.convolve):
        regions = sorted(pass_.regions.values(), key=lambda region: region.address)
        for before, after in itertools.pairwise(regions):
            assert before.limit <= after.address
        assert 0 <= regions[0].address
        assert regions[-1].limit <= 1 << config.address_width
        own, fields = pass_.kind.name.lower(), pass_.fields
        assert fields["read_limit"] <= fields["write_base"] or (
            fields["write_limit"] <= fields["read_base"])
        windows = ("read_base", "read_limit", "write_base", "write_limit")
        for other in pass_.descriptors:
            assert all(other[name] == fields[name] for name in windows)
        for side, names in (("read", lowering.READS), ("write", lowering.WRITES)):
            inside = [pass_.regions[name] for name in names[pass_.kind] if name in pass_.regions]
            assert fields[f"{side}_base"] == min(region.address for region in inside)
            assert fields[f"{side}_limit"] == max(region.limit for region in inside)
            assert own not in names[pass_.kind]
    for name in chained:
        assert lowered.requantize.regions[name] == lowered.convolve.regions[name]
    if top:
        assert 1 << config.address_width == max(
            region.limit for pass_ in (lowered.requantize, lowered.convolve)
            for region in pass_.regions.values())


@many
@given(st.sampled_from(Format), st.lists(st.integers(1, 300), min_size=1, max_size=2), vectors,
       st.sampled_from([32, 64, 96]))
def test_tiles_take_every_channel(format, channels, vector, tile_channels):
    """Tiles follow each other, and their positions are the channels, or all slots of MX8."""
    if format == Format.IN16:
        channels = channels[:1]
    shape = lowering.Shape(format=format, kernel=1, height=1, width=1, channels=tuple(channels),
                           outputs=1, vector=vector, residual=False)
    tiles = shape.tiles(32 if shape.mx else tile_channels)
    first = 0
    for slot, slots, positions in tiles:
        assert slot == first
        there = sum(shape.channel(number) is not None for number in range(slot, slot + slots))
        assert positions == (slots if shape.mx else there) > 0
        first += slots
    assert first == shape.slots
    assert shape.slots % (32 if shape.mx else vector) == 0
    if format != Format.IN16:
        _, slots = requantizer.slots(channels, vector, mx=shape.mx)
        assert slots == shape.slots


def execute(machine, call, counts, lowered):
    """Run both passes on ``machine``, compare with golden, and check what was touched."""
    config, shape = machine.config, lowered.shape
    if shape.labelled:
        entries = slice(call.detector_base, call.detector_base + shape.slots)
        if counts is None:
            counts = torch.tensor(machine.counts[entries])
        machine.counts[entries] = counts
    result = layer.run(call, counts, config.vector, config.dense_pes > 0, config.sparse_pes > 0)
    comparison = Comparison(call.name, call.evaluation)
    for pass_ in (lowered.requantize, lowered.convolve):
        for first, words in pass_.load:
            machine.load(first, words)
        machine.clear()
        evaluation = dict(pass_.registers).get(registers.number("evaluation"))
        saturations, chain = machine.run(pass_.descriptor, evaluation)
        assert [{name: value for name, value in fields.items() if value} for fields in chain] == [
            {name: value for name, value in fields.items() if value}
            for fields in pass_.descriptors]
        machine.read[pass_.chain.address:pass_.chain.limit] = False
        touched = np.flatnonzero(machine.read)
        assert pass_.fields["read_base"] == touched[0]
        assert pass_.fields["read_limit"] > touched[-1]
        if "affine" in pass_.regions or pass_.kind == Kind.CONVOLVE:
            assert pass_.fields["read_limit"] == touched[-1] + 1
        touched = np.flatnonzero(machine.written)
        assert pass_.fields["write_base"] == touched[0]
        assert pass_.fields["write_limit"] > touched[-1]
        answer = {"hung": False, "status": 2, "violations": [], "saturations": saturations,
                  "jobs": len(chain)}
        words = machine.dump(pass_.window.address, pass_.window.words)
        if pass_.kind == Kind.REQUANTIZE:
            compare_requantize(comparison, lowered, result, answer, words)
        else:
            compare_convolve(comparison, lowered, result, {}, {}, answer, words)
    assert not comparison.mismatches, str(comparison.mismatches[0])
    return comparison, result


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_lowered_layers_mean_the_same(config):
    """Descriptors, executed by their definition, give golden's results and touch no word more."""
    rng = np.random.default_rng(5)
    machine = Interpreter(config, words=1 << 17)
    calls = itertools.chain(random_layers.random_calls(rng, config, 30, budget=300_000),
                            random_layers.edge_calls(rng, config))
    formats = set()
    for call, counts in calls:
        lowered = lowering.lower(call, config)
        formats.add(lowered.shape.format)
        comparison, _ = execute(machine, call, counts, lowered)
        assert comparison.compared["output"] == call.convolution.multiplier.numel() * np.prod(
            call.requantization.segments[0].shape[1:])
    assert formats == set(Format)


@pytest.fixture(scope="module")
def machine_after_a_layer():
    """A layer with dense and sparse channels, its lowering, golden's result and its images."""
    rng = np.random.default_rng(3)
    call, _ = random_layers.random_call(
        rng, TINY, name="example", evaluation=4, format=Format.A4U, kernel=3, height=4, width=5,
        channels=(20, 9), outputs=18, residual=True)
    call = dataclasses.replace(call, threshold=30000, interval=1, balance=None, tile_channels=32,
                               dense_limit=2)
    counts = torch.tensor(np.tile([0, 20], 24))
    lowered = lowering.lower(call, TINY)
    machine = Interpreter(TINY)
    _, result = execute(machine, call, counts, lowered)
    images = [machine.dump(pass_.window.address, pass_.window.words)
              for pass_ in (lowered.requantize, lowered.convolve)]
    return lowered, result, images


def differences(example, name, address, byte, value):
    """Mismatch texts after a byte of region ``name`` was changed."""
    lowered, result, images = example
    comparison = Comparison("example", 4)
    answer = {"hung": False, "status": 2, "violations": [],
              "saturations": int(result.saturations), "jobs": len(lowered.convolve.descriptors)}
    images = [image.copy() for image in images]
    for pass_, image in zip((lowered.requantize, lowered.convolve), images, strict=True):
        window = pass_.window
        place = pass_.regions[name].address + address - window.address if (
            name in pass_.regions) else -1
        if 0 <= place < window.words:
            image[place, byte] ^= value
    compare_requantize(comparison, lowered, result, answer, images[0])
    compare_convolve(comparison, lowered, result, {}, {}, answer, images[1])
    return [str(mismatch) for mismatch in comparison.mismatches]


@pytest.mark.parametrize(("name", "address", "byte", "value", "text"), [
    ("destination", 7 * 4 + 2, 3, 1,
     "channel 9, pixel (y 1, x 2): output must be "),
    ("destination", (20 + 3) * 4, 4, 1,
     "channel 18, pixel (y 0, x 3): output padding must be 0, not 1 (1 of 280 differ)"),
    # of tile 0: dense slots 0, 2, ... 18, then sparse ones 1, 3, ... 19; of tile 1: 32, ... 40
    ("codes", 2 * 7, 0, 0x10, "channel 2, pixel (y 1, x 2): code must be "),
    ("codes", 2 * 7, 7, 1, "channel 9, pixel (y 1, x 2): code must be "),
    ("codes", 40 + 7, 4, 0x10, "tile 1, position 9 (padding), pixel (y 1, x 2): code must be 0"),
    ("scales", 1, 2, 1, "pixel (y 2, x 0): scale must be "),
    ("counts", 8, 2, 1, "channel 21: zero count must be "),
    ("counts", 5, 2, 1, "slot 21 (padding): zero count must be 20, not 21"),
    ("permutation", 0, 0, 1, "tile 0: list size must be 20, not 21"),
    ("permutation", 0, 3, 1, "tile 0: list low must be 10, not 266"),
    ("permutation", 9, 4, 1, "tile 1: list high must be 5, not 4"),
    ("permutation", 9, 6, 1, "tile 1: list cut must be 0, not 1"),
    ("permutation", 10, 2, 1, "tile 1, position 1 of the list: label must be 2, not 3"),
    ("permutation", 14, 2, 1, "word 362, byte 2: untouched byte must be 15, not 14"),
])
def test_a_difference_is_named(machine_after_a_layer, name, address, byte, value, text):
    found = differences(machine_after_a_layer, name, address, byte, value)
    separator = ": " if "must" in text.split(":")[0] else ", "
    assert len(found) == 1
    assert found[0].startswith(f"example, evaluation 4{separator}{text}")


def test_no_difference_is_named(machine_after_a_layer):
    assert differences(machine_after_a_layer, "destination", 0, 0, 0) == []


def example(config, **chosen):
    fields = {"format": Format.A4U, "kernel": 3, "height": 4, "width": 4, "channels": (16,),
              "outputs": 16, "residual": False} | chosen
    call, _ = random_layers.random_call(np.random.default_rng(0), config, name="conv", **fields)
    return call


def stretched(call, channels=None, outputs=None, height=None, width=None):
    """``call`` with operands of other sizes, all zero."""
    requantization, convolution = call.requantization, call.convolution
    _, h, w = requantization.segments[0].shape
    segment = torch.zeros(channels or len(requantization.segments[0]), height or h, width or w,
                          dtype=torch.int64)
    _, slots = requantizer.slots([len(segment)], 16, mx=requantization.format == Format.MX8)
    taps = convolution.kernel ** 2
    groups = slots // 32 if requantization.format == Format.MX8 else 1
    count = outputs or len(convolution.weight_codes)
    weights = torch.zeros(count, slots, convolution.kernel, convolution.kernel, dtype=torch.int64)
    zeros = torch.zeros(slots, dtype=torch.int64)
    return dataclasses.replace(
        call,
        requantization=dataclasses.replace(
            requantization, segments=[segment], gain=zeros, offset=zeros),
        convolution=dataclasses.replace(
            convolution, weight_codes=weights, bias=torch.zeros(count, dtype=torch.int64),
            weight_scales=torch.zeros(count, taps, groups, dtype=torch.int64),
            multiplier=torch.zeros(count, dtype=torch.int64)))


@pytest.mark.parametrize(("error", "text", "change"), [
    (Error.SHAPE, "pixels must be at most 65535 for tiny, not 65536: 1 too many",
     {"height": 256, "width": 256}),
    (Error.CHANNELS, "input channel slots must be at most 128 for tiny, not 144: 16 too many",
     {"channels": 129}),
    (Error.CHANNELS, "output channels must be at most 128 for tiny, not 129: 1 too many",
     {"outputs": 129}),
    (Error.WINDOW, "words of memory must be at most 65536 for tiny, not ",
     {"height": 100, "width": 100, "outputs": 64}),
])
def test_a_layer_that_does_not_fit(error, text, change):
    with pytest.raises(lowering.FitError, match=f"^conv: {re.escape(text)}") as caught:
        lowering.lower(stretched(example(TINY), **change), TINY)
    assert caught.value.error == error


@pytest.mark.parametrize(("error", "text", "change"), [
    (Error.ACTIVATIONS, "records of 3 rows must be at most 4 for tiny, not 6: 2 too many",
     {"record_depth": 8}),
    (Error.ACTIVATIONS, "entries of 3 rows must be at most 64 for tiny, not 96: 32 too many",
     {"entry_depth": 128}),
    (Error.WEIGHTS, "words of dense weights must be at most 64 for tiny, not 144: 80 too many",
     {"weight_depth": 64, "sparse_pes": 0}),
    (Error.WEIGHTS, "words of sparse weights must be at most 256 for tiny, not 576: 320 too many",
     {"sparse_weight_depth": 256}),
    (Error.SCALES,
     "words of dense weight scales must be at most 32 for tiny, not 36: 4 too many",
     {"weight_scale_depth": 32}),
    (Error.TILES, ("tiles of 16 outputs must divide the 3 sparse PEs of tiny or be a multiple of"
                   " them, not 2"), {"sparse_pes": 3}),
])
def test_no_tile_is_small_enough(error, text, change):
    """The rule is that which the smallest tile breaks: 32 slots, 32 outputs, a column."""
    config = dataclasses.replace(TINY, **change)
    outputs = {Error.TILES: 32, Error.WEIGHTS: 32}.get(error, 16)
    with pytest.raises(lowering.FitError, match=f"^conv: {re.escape(text)}$") as caught:
        lowering.check_fit(stretched(example(TINY), channels=32, outputs=outputs), config)
    assert caught.value.error == error


def test_weights_that_only_fit_the_sparse_side():
    """Where even one word's weights are too many for the dense side, it takes none."""
    config = dataclasses.replace(TINY, weight_depth=32)
    assert lowering.check_fit(example(config, outputs=32), config).dense_limit == 0
    with pytest.raises(lowering.FitError, match="^conv: words of dense weights must be at most 32 "
                                                "for tiny, not 72: 40 too many$"):
        lowering.check_fit(example(TINY, outputs=32), config)


def test_a_plan_must_be_of_the_call():
    call = example(TINY)
    other = lowering.check_fit(example(TINY, outputs=17), TINY)
    with pytest.raises(ValueError, match="^plan must be of the shape of conv, "):
        lowering.lower(call, TINY, plan=other)
    call = dataclasses.replace(example(TINY, channels=(50,)), tile_channels=64)
    with pytest.raises(ValueError, match="^tile_channels of the plan must be those of conv, 64, "
                                         "not 32$"):
        lowering.lower(call, TINY, plan=tiler.plan(
            lowering.Shape.of(call, TINY), TINY, tile_channels=32))


def test_a_detector_that_is_too_small():
    call = dataclasses.replace(example(TINY), detector_base=4081)
    with pytest.raises(lowering.FitError, match="^conv: detector entries must be at most 4096 for "
                                                "tiny, not 4097: 1 too many$"):
        lowering.check_fit(call, TINY)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_the_core_takes_every_job(config):
    """The sequencer accepts every job of random layers, and those of layers around every limit."""
    rng = np.random.default_rng(9)

    def around(limit):
        near = [1, limit // 2, limit - 1, limit, limit + 1, rng.integers(limit) + 1]
        return int(rng.choice(near))

    def shape():
        sides = sorted(2 ** rng.integers(0, 7, 2))
        format = Format(rng.integers(4))
        return lowering.Shape(
            format=format, kernel=int(rng.choice([1, 3])), residual=False, height=int(sides[0]),
            width=int(sides[1] + rng.integers(-1, 2)) or 1, outputs=around(config.tile_outputs),
            channels=(around(config.tile_channels),), vector=config.vector)

    async def body(bench):
        checked = 0
        while checked < 150:
            try:
                plan = tiler.plan(shape(), config)
            except lowering.FitError:
                continue
            for job in plan.jobs[:3]:
                fields = test_sequencer.convolution(
                    config, format=Format.MX8 if plan.shape.mx else plan.shape.format,
                    group=plan.shape.group_size, kernel=plan.shape.kernel,
                    height=plan.shape.height, width=plan.shape.width, channels=job.slots,
                    outputs=job.outputs, tile_y=job.y, tile_x=job.x, tile_height=job.height,
                    tile_width=job.width, dense_limit=plan.dense_limit,
                    share=plan.share if plan.shape.mx else 0, keep_sums=int(job.keep_sums))
                assert await bench.check(descriptor.pack(**fields)) is None, fields
                await bench.finish()
                checked += 1

    test_sequencer.run(config, body)


@pytest.mark.parametrize(("change", "text"), [
    ({"interval": 0}, "interval must be in 1..65535, not 0"),
    ({"convolution": {"align_shift": 32}}, "align_shift must be in 0..31, not 32"),
    ({"convolution": {"scale_shift": -1}}, "scale_shift must be in 0..31, not -1"),
    ({"requantization": {"shift": 32}}, "shift must be in 0..31, not 32"),
    ({"convolution": {"kernel": 2}}, "kernel must be 1 or 3, not 2"),
])
def test_fields_that_the_core_refuses(change, text):
    call = example(TINY)
    for name, value in change.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(call, name), **value)
        call = dataclasses.replace(call, **{name: value})
    with pytest.raises(lowering.FitError, match=f"^conv: {re.escape(text)}$"):
        lowering.check_fit(call, TINY)


def test_results_lie_over_the_input_where_memory_is_short():
    call = stretched(example(TINY), height=62, width=62)
    lowered = lowering.lower(call, dataclasses.replace(TINY, address_width=15))
    source, destination = (lowered.requantize.regions["source"],
                           lowered.convolve.regions["destination"])
    assert source.address == destination.address
    roomy = dataclasses.replace(TINY, address_width=20)
    lowered = lowering.lower(call, roomy)
    assert lowered.convolve.regions["destination"].address >= (
        lowered.requantize.regions["source"].limit)


def test_descriptors_are_what_the_fields_say():
    """They follow each other in memory, and each names the next one."""
    call = stretched(example(TINY), channels=70, outputs=40)
    call = tiler.adjusted(call, tiler.plan(lowering.Shape.of(call, TINY), TINY))
    lowered = lowering.lower(call, TINY)
    assert len(lowered.convolve.descriptors) > 2
    for pass_ in (lowered.requantize, lowered.convolve):
        words = dict(pass_.load)[pass_.descriptor]
        step = 128 // 8
        assert len(words) == step * len(pass_.descriptors)
        for number, fields in enumerate(pass_.descriptors):
            part = words[number * step:(number + 1) * step]
            assert (part == lowering.pack_words(descriptor.pack(**fields), 16)).all()
            last = number + 1 == len(pass_.descriptors)
            assert fields["next"] == (0 if last else pass_.descriptor + (number + 1) * step)
        assert (registers.number("descriptor"), pass_.descriptor) in pass_.registers


def test_cycles_may_be_as_many_more_as_sums_were_held_back(machine_after_a_layer):
    lowered, result, images = machine_after_a_layer
    for stall, cycles, text in ((0, 100, None), (0, 101, "100, not 101"), (0, 99, "100, not 99"),
                                (7, 107, None), (7, 108, "100 to 107, not 108"),
                                (7, 99, "100 to 107, not 99")):
        comparison = Comparison("example", 4)
        answer = {"hung": False, "status": 2, "violations": [], "output_stall": stall,
                  "jobs": len(lowered.convolve.descriptors), "compute_cycles": cycles,
                  "stall_cycles": 12}
        compare_convolve(comparison, lowered, result, {},
                         {"compute_cycles": 100, "stall_cycles": 12}, answer, images[1])
        assert [str(mismatch) for mismatch in comparison.mismatches] == (
            [] if text is None else [f"example, evaluation 4: compute_cycles must be {text}"])
        assert comparison.compared["stall_cycles"] == (stall == 0)
