"""sim/lowering.py: layouts there and back, and executed by a reader that knows only the layouts."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import detector, layer
from hw import descriptor, registers
from hw.config import SMALL, SMALL_DENSE, TINY
from hw.descriptor import Error, Format, Kind
from sim import lowering, random_layers
from sim.compare import Comparison, compare_convolve, compare_requantize
from tests import test_sequencer
from tests.interpreter import Interpreter
from tests.strategies import few, many

WIDE = dataclasses.replace(TINY, name="wide", vector=32, dense_lanes=8)
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
@given(generators, st.integers(1, 70), vectors)
def test_permutation_there_and_back(rng, slots, vector):
    sparse = rng.random(slots) < rng.random()
    lists = np.flatnonzero(~sparse), np.flatnonzero(sparse)
    words = lowering.pack_permutation(*lists, vector)
    dense, count, positions = lowering.unpack_permutation(words, vector)
    assert (dense, count) == (len(lists[0]), len(lists[1]))
    expected = detector.positions(*map(torch.tensor, lists), vector)
    assert (positions == np.asarray(expected)).all()


def test_halves_of_a_word_are_little_endian():
    """One value of each layout, byte by byte as the memory contract has it."""
    tensor = np.arange(16).reshape(16, 1, 1) * 257 + 1
    assert lowering.pack_tensor(tensor, 16)[0].tolist() == [1, 0, 2, 1, 3, 2, 4, 3]
    codes = np.arange(16).reshape(16, 1, 1)
    assert lowering.pack_codes(codes, Format.A4U, 16).tolist() == [
        [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert lowering.pack_codes(codes - 16, Format.MX8, 16).tolist() == [
        [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], [0xFF] * 8]
    assert lowering.pack_permutation([5], [1, 2], 16)[:6].tolist() == [
        [1, 0, 2, 0, 0, 0, 0, 0], [5, 0, *[255] * 6], [255] * 8, [255] * 8, [255] * 8,
        [1, 0, 2, 0, 255, 255, 255, 255]]
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
        fields = pass_.fields
        assert fields["read_limit"] <= fields["write_base"] or (
            fields["write_limit"] <= fields["read_base"])
        own = pass_.kind.name.lower()
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


@pytest.mark.parametrize("vector", [16, 32])
def test_code_words_are_the_worst_case(vector):
    """No split of n channels into two lists needs more words than a region has, and one does."""
    for count in range(1, 3 * vector):
        shape = lowering.Shape(
            format=Format.A4U, kernel=1, height=1, width=1, channels=(count,), outputs=1,
            vector=vector, sparse=True, residual=False)
        needed = max(-(-dense // vector) + -(-(count - dense) // vector)
                     for dense in range(count + 1))
        assert shape.code_words == needed


def execute(machine, call, counts, lowered):
    """Run both passes on ``machine``, compare with golden, and check what was touched."""
    config, shape = machine.config, lowered.shape
    entries = slice(call.detector_base, call.detector_base + shape.slots)
    if counts is None:
        counts = torch.tensor(machine.counts[entries])
    machine.counts[entries] = counts
    labels = counts if shape.sparse else torch.zeros(shape.slots, dtype=torch.bool)
    result = layer.run(call, labels, config.vector)
    lists = detector.permutation(result.labels, result.codes.valid, config.vector,
                                 natural=shape.mx)
    comparison = Comparison(call.name, call.evaluation)
    for pass_ in (lowered.requantize, lowered.convolve):
        for first, words in pass_.load:
            machine.load(first, words)
        machine.clear()
        evaluation = dict(pass_.registers).get(registers.number("evaluation"))
        saturations = machine.run(pass_.descriptor, evaluation)
        machine.read[pass_.descriptor:pass_.descriptor + 128 // machine.width] = False
        touched = np.flatnonzero(machine.read)
        assert pass_.fields["read_base"] == touched[0]
        assert pass_.fields["read_limit"] > touched[-1]
        if "affine" in pass_.regions or pass_.kind == Kind.CONVOLVE:
            assert pass_.fields["read_limit"] == touched[-1] + 1
        touched = np.flatnonzero(machine.written)
        assert pass_.fields["write_base"] == touched[0]
        assert pass_.fields["write_limit"] > touched[-1]
        answer = {"hung": False, "status": 2, "violations": [], "saturations": saturations,
                  "dense_work": 1, "sparse_work": 2}
        words = machine.dump(pass_.window.address, pass_.window.words)
        if pass_.kind == Kind.REQUANTIZE:
            compare_requantize(comparison, lowered, result, lists, answer, words)
        else:
            compare_convolve(comparison, lowered, result, (1, 2), None, answer, words)
    assert not comparison.mismatches, str(comparison.mismatches[0])
    return comparison


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
        comparison = execute(machine, call, counts, lowered)
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
    call = dataclasses.replace(call, threshold=30000, interval=1)
    counts = torch.tensor(np.tile([0, 20], 24))
    lowered = lowering.lower(call, TINY)
    machine = Interpreter(TINY)
    execute(machine, call, counts, lowered)
    result = layer.run(call, counts, 16)
    lists = detector.permutation(result.labels, result.codes.valid, 16)
    images = [machine.dump(pass_.window.address, pass_.window.words)
              for pass_ in (lowered.requantize, lowered.convolve)]
    return lowered, result, lists, images


def differences(example, name, address, byte, value):
    """Mismatch texts after a byte of region ``name`` was changed."""
    lowered, result, lists, images = example
    comparison = Comparison("example", 4)
    answer = {"hung": False, "status": 2, "violations": [],
              "saturations": int(result.saturations), "dense_work": 1, "sparse_work": 2}
    images = [image.copy() for image in images]
    for pass_, image in zip((lowered.requantize, lowered.convolve), images, strict=True):
        window = pass_.window
        place = pass_.regions[name].address + address - window.address if (
            name in pass_.regions) else -1
        if 0 <= place < window.words:
            image[place, byte] ^= value
    compare_requantize(comparison, lowered, result, lists, answer, images[0])
    compare_convolve(comparison, lowered, result, (1, 2), None, answer, images[1])
    return [str(mismatch) for mismatch in comparison.mismatches]


@pytest.mark.parametrize(("name", "address", "byte", "value", "text"), [
    ("destination", 7 * 4 + 2, 3, 1,
     "channel 9, pixel (y 1, x 2): output must be "),
    ("destination", (20 + 3) * 4, 4, 1,
     "channel 18, pixel (y 0, x 3): output padding must be 0, not 1 (1 of 280 differ)"),
    # dense list: slots 0, 2, ... 18, 32, 34, ...; the word after it has the sparse one: 1, 3, ...
    ("codes", 7, 0, 0x10, "channel 2, pixel (y 1, x 2): code must be "),
    ("codes", 20 + 7, 1, 1, "channel 5, pixel (y 1, x 2): code must be "),
    ("codes", 20 + 7, 7, 0x10, "position 31 (padding), pixel (y 1, x 2): code must be 0, not 1"),
    ("scales", 1, 2, 1, "pixel (y 2, x 0): scale must be "),
    ("counts", 8, 2, 1, "channel 21: zero count must be "),
    ("counts", 5, 2, 1, "slot 21 (padding): zero count must be 20, not 21"),
    ("permutation", 0, 0, 1, "dense channels must be 15, not 14"),
    ("permutation", 1, 2, 1, "position 1 of the permutation: label must be 2, not 3"),
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
    slots = -(-len(segment) // 16) * 16
    taps = convolution.kernel ** 2
    groups = -(-slots // 32) if requantization.format == Format.MX8 else 1
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
    (Error.CHANNELS, "input channel slots must be at most 64 for tiny, not 80: 16 too many",
     {"channels": 65}),
    (Error.CHANNELS, "output channels must be at most 64 for tiny, not 65: 1 too many",
     {"outputs": 65}),
    (Error.ACTIVATIONS,
     "words of activation codes must be at most 1024 for tiny, not 1056: 32 too many",
     {"height": 33, "width": 32}),
    (Error.WEIGHTS, "words of dense weights must be at most 512 for tiny, not 576: 64 too many",
     {"channels": 64, "outputs": 64}),
    (Error.WINDOW, "words of memory must be at most 8192 for tiny, not 10",
     {"height": 32, "width": 32, "outputs": 32}),
])
def test_a_layer_that_does_not_fit(error, text, change):
    with pytest.raises(lowering.FitError, match=f"^conv: {re.escape(text)}") as caught:
        lowering.lower(stretched(example(TINY), **change), TINY)
    assert caught.value.error == error


def test_scales_that_do_not_fit():
    config = dataclasses.replace(TINY, scale_depth=15)
    with pytest.raises(lowering.FitError, match="^conv: activation scales must be at most 15 "
                                                "for tiny, not 16: 1 too many$"):
        lowering.check_fit(example(TINY), config)
    config = dataclasses.replace(TINY, weight_scale_depth=71)
    with pytest.raises(lowering.FitError, match="^conv: words of dense weight scales must be at "
                                                "most 71 for tiny, not 72: 1 too many$"):
        lowering.check_fit(example(TINY), config)


def test_weights_that_only_fit_the_dense_side():
    config = dataclasses.replace(TINY, sparse_weight_depth=143)
    with pytest.raises(lowering.FitError, match="^conv: words of sparse weights must be at most "
                                                "143 for tiny, not 144: 1 too many$"):
        lowering.check_fit(example(TINY), config)
    lowering.check_fit(example(TINY, format=Format.MX8), config)
    lowering.check_fit(example(TINY), dataclasses.replace(config, sparse_pes=0))


def test_a_detector_that_is_too_small():
    call = dataclasses.replace(example(TINY), detector_base=2033)
    with pytest.raises(lowering.FitError, match="^conv: detector entries must be at most 2048 for "
                                                "tiny, not 2049: 1 too many$"):
        lowering.check_fit(call, TINY)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_the_core_refuses_the_same_layers(config):
    """For sizes around every limit, `check_shape` and the sequencer give the same error."""
    rng = np.random.default_rng(9)

    def around(limit):
        near = [1, limit // 2, limit - 1, limit, limit + 1, rng.integers(limit) + 1]
        return int(rng.choice(near))

    def refusal(shape, detector_base):
        try:
            lowering.check_shape("layer", shape, config, detector_base)
        except lowering.FitError as error:
            return error.error
        return None

    async def body(bench):
        errors = set()
        for _ in range(400):
            format = Format(rng.integers(4))
            sides = sorted(2 ** rng.integers(0, 7, 2))
            channels = around(config.vector if format == Format.IN16 else config.max_channels)
            second = around(config.vector) if format != Format.IN16 and rng.random() < 0.3 else 0
            shape = lowering.Shape(
                format=format, kernel=int(rng.choice([1, 3])), residual=False,
                height=int(sides[0]), width=int(sides[1] + rng.integers(-1, 2)) or 1,
                channels=(channels, second)[:1 + (second > 0)], outputs=around(config.max_outputs),
                vector=config.vector,
                sparse=config.sparse_pes > 0 and format in (Format.A4U, Format.A4S))
            detector_base = around(config.detector_depth - shape.slots)
            expected = refusal(shape, detector_base)
            if expected == Error.WINDOW:     # of the memory as a whole, which no descriptor shows
                continue
            make = test_sequencer.requantization if expected == Error.DETECTOR else (
                test_sequencer.convolution)
            fields = make(
                config, format=format, group=shape.group_size, height=shape.height,
                width=shape.width, channels=channels, channels_second=second,
                outputs=shape.outputs, kernel=shape.kernel, detector=detector_base, interval=1,
                relu=int(make is test_sequencer.requantization and format == Format.A4U))
            assert await bench.check(descriptor.pack(**fields)) == expected, fields
            if expected is None:
                await bench.finish()
            errors.add(expected)
        assert errors >= {None, Error.CHANNELS, Error.ACTIVATIONS, Error.WEIGHTS, Error.DETECTOR}

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
    call = stretched(example(TINY), height=31, width=32)
    lowered = lowering.lower(call, TINY)
    source, destination = (lowered.requantize.regions["source"],
                           lowered.convolve.regions["destination"])
    assert source.address == destination.address
    roomy = dataclasses.replace(TINY, address_width=20)
    lowered = lowering.lower(call, roomy)
    assert lowered.convolve.regions["destination"].address >= (
        lowered.requantize.regions["source"].limit)


def test_descriptor_is_what_the_fields_say():
    lowered = lowering.lower(example(TINY), TINY)
    for pass_ in (lowered.requantize, lowered.convolve):
        words = dict(pass_.load)[pass_.descriptor]
        assert (words == lowering.pack_words(descriptor.pack(**pass_.fields), 16)).all()
        assert (registers.number("descriptor"), pass_.descriptor) in pass_.registers
