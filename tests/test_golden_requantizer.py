"""The requantization pass against loops over pixels, and the bound to the float definition."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import a4, e4m3, mxint8, requantizer
from golden.requantizer import Format, requantize
from tests import naive
from tests.strategies import few, integers, seeds, shapes

LIMIT = requantizer.Y_LIMIT


def operands(rng, channels, shape, format, vector):
    """Arguments of `requantize` with values at both ends of their ranges among them."""
    segments = [integers(rng, -32768, 32767, count, *shape) for count in channels]
    _, slots = requantizer.slots(channels, vector, Format[format].mx)
    relu = {"A4U": True, "IN16": False}.get(format, bool(rng.randint(2)))
    return (segments, integers(rng, -32768, 32767, slots), integers(rng, -2**31, 2**31 - 1, slots),
            int(rng.randint(32)), relu, Format[format], vector)


def check(arguments):
    """Compare all fields with the naive form; return the Codes."""
    segments, gain, offset, *rest = arguments
    got = requantize(*arguments)
    expected = naive.requantize([s.tolist() for s in segments], gain.tolist(), offset.tolist(),
                                *rest)
    for name, value in expected.items():
        field = getattr(got, name)
        assert (field if name == "saturations" else field.tolist()) == value, name
    assert (got.format, got.vector) == (rest[2], rest[3])
    return got


@few
@given(seeds, st.integers(1, 40), st.integers(0, 40), shapes, st.sampled_from([16, 32]),
       st.sampled_from(["A4U", "A4S", "MX8"]))
def test_against_loops(rng, first, second, shape, vector, format):
    channels = [first, second] if second else [first]
    check(operands(rng, channels, shape, format, vector))


@few
@given(seeds, st.integers(1, 70), shapes, st.sampled_from([16, 32]))
def test_network_input(rng, channels, shape, vector):
    got = check(operands(rng, [channels], shape, "IN16", vector))
    assert len(got.codes) == 64 * -(-channels // 32) and not got.zero_counts.any()


def test_slots_of_two_segments():
    order, slots = requantizer.slots([5, 17], 16)
    assert slots == 48
    assert order.tolist() == [*range(5), *range(16, 33)]
    x = torch.arange(1, 23)
    spread = requantizer.spread(x, [5, 17], 16)
    assert spread[order].equal(x) and int(spread.sum()) == int(x.sum())
    for vector, first, total in ((16, 16, 64), (32, 32, 64)):     # 8 bits: whole blocks
        padded, slots = requantizer.slots([5, 17], vector, mx=True)
        assert slots == total and padded.tolist() == [*range(5), *range(first, first + 17)]
    w = torch.rand(3, 22, 3, 3)
    assert requantizer.spread(w, [5, 17], 16, dim=1)[:, order].equal(w)


def test_tables_of_slots_without_a_channel_do_not_matter():
    x = [torch.full((3, 2, 2), 100)]
    table = torch.full((16,), 1 << 10)
    got = requantize(x, table, table, 0, True, Format.A4U, 16)
    assert not got.codes[3:].any() and got.codes[:3].all()
    assert got.valid.tolist() == [True] * 3 + [False] * 13
    assert got.zero_counts.tolist() == [0] * 3 + [4] * 13


@pytest.mark.parametrize(("format", "relu", "saturations"), [
    ("A4U", True, 3), ("A4S", False, 3), ("MX8", False, 4)])
def test_saturations_are_counted_by_group(format, relu, saturations):
    """Both ends count, before ReLU; a pixel is one group of A4 and two blocks of MX8 here."""
    x = torch.zeros(64, 1, 4, dtype=torch.int64)
    x[[0, 1, 40], :, 0] = 32767     # two blocks
    x[40, :, 1] = -32768            # one block, negative
    x[3, :, 2] = 32767
    x[3, :, 3] = 1
    gain = torch.full((64,), 32767)
    got = requantize([x], gain, torch.zeros(64, dtype=torch.int64), 0, relu, Format[format], 16)
    assert got.saturations == saturations


def test_affine_rounds_and_clips():
    x = torch.tensor([1, 3, 5, -1, -3, 32767, -32768, 0]).reshape(-1, 1, 1)
    gain = torch.tensor([1, 1, 1, 1, 1, 32767, 32767, 0])
    offset = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2**31 - 1])
    y, clipped = requantizer.affine(x, gain, offset, 1)
    assert y.flatten().tolist() == [0, 2, 2, 0, -2, LIMIT, -LIMIT, LIMIT]
    assert clipped.flatten().tolist() == [False] * 5 + [True] * 3
    exact = torch.tensor([LIMIT, LIMIT + 1, -LIMIT, -LIMIT - 1]).reshape(-1, 1, 1)
    offset = exact.flatten()
    y, clipped = requantizer.affine(torch.zeros_like(exact), offset * 0, offset, 0)
    assert y.flatten().tolist() == [LIMIT, LIMIT, -LIMIT, -LIMIT]
    assert clipped.flatten().tolist() == [False, True, False, True]


def test_order_of_channels_does_not_matter():
    """A permutation of channels permutes A4's codes and counts and nothing else."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-32768, 32768, (48, 5, 4), generator=generator)
    gain = torch.randint(-32768, 32768, (48,), generator=generator)
    offset = torch.randint(-1 << 20, 1 << 20, (48,), generator=generator)
    order = torch.randperm(48, generator=generator)
    for format in (Format.A4U, Format.A4S):
        relu = format == Format.A4U
        one = requantize([x], gain, offset, 9, relu, format, 16)
        other = requantize([x[order]], gain[order], offset[order], 9, relu, format, 16)
        assert other.codes.equal(one.codes[order]) and other.scales.equal(one.scales)
        assert other.zero_counts.equal(one.zero_counts[order])


@dataclasses.dataclass
class Affine:
    """A float affine in units of y, its integer tables, and how far they are apart."""

    gain: torch.Tensor      # (C,) float64
    offset: torch.Tensor

    def __post_init__(self):
        self.shift = min(31, math.floor(math.log2(32767 / self.gain.abs().max().item())))
        self.tables = ((self.gain * 2 ** self.shift).round().long(), self.offset.round().long())

    def real(self, x):
        return x * self.gain[:, None, None] + self.offset[:, None, None]

    def distance(self, x):
        """|x| / 2 LSBs of the gain, and half a unit each for offset and product."""
        return x.abs() * 2.0 ** -(self.shift + 1) + 1


def example(rng, channels, fixed):
    """Random x, an affine like a GroupNorm's, and the real result in units of y."""
    x = torch.from_numpy(rng.standard_normal((channels, 16, 16)) * 3000).round().long()
    gain = torch.from_numpy(rng.uniform(0.2, 2, channels) * rng.choice([-1, 1], channels))
    affine = Affine(gain * 2.0 ** rng.randint(2, 7), torch.from_numpy(
        rng.uniform(-200_000, 200_000, channels)))
    return x, affine, affine.real(x.double())


@few
@given(seeds, st.sampled_from([8, 40]), st.booleans(), st.sampled_from([1.0, 0.0123]))
def test_bound_between_a4_definition_and_implementation(rng, channels, signed, fixed):
    """The two forms see y that differ by at most `delta`; codes differ at boundaries only.

    With d = delta + 2^-21 |y| (the float form's own rounding) and n the largest code:

    - a scale code differs by one at most, and only where amax / n is within d / n of a midpoint;
    - under equal scales a code differs by one at most, and only where y is within d of a boundary;
    - the values differ by at most a step under equal scales, otherwise by the larger step, d and
      n / 2 times the difference of the steps (what the smaller scale clips);
    - less than 1 % of all codes differ.
    """
    x, affine, real = example(rng, channels, fixed)
    n = a4.largest(signed)
    real = real if signed else real.clamp(min=0)
    tables = [torch.cat([table, table.new_zeros(-channels % 16)]) for table in affine.tables]
    got = requantize([x], *tables, affine.shift, not signed,
                     Format.A4S if signed else Format.A4U, 16)
    assert got.saturations == 0
    codes = got.codes[:channels]

    values = a4.fake_quantize((real * fixed / 1024).float()[None], signed, fixed)[0]
    amax = real.abs().amax(0, keepdim=True)
    defined = e4m3.encode((amax / 1024 * fixed).float() / (n * torch.tensor(fixed)))
    defined_step = step_of(defined)
    defined_codes = (values / (defined_step / 1024 * fixed).float()).nan_to_num().round()

    d = affine.distance(x) + real.abs() * 2**-21
    step, worst = step_of(got.scales), d.amax(0, keepdim=True)
    unequal = got.scales != defined
    assert ((got.scales - defined).abs() <= 1).all()
    between = (step + defined_step) / 2
    assert ((amax / n - between).abs() <= worst / n)[unequal].all()

    same = ~unequal.expand_as(codes)
    difference = (codes - defined_codes).abs()
    assert (difference[same] <= 1).all()
    quotient = real.abs() / step
    boundary = (quotient - quotient.floor() - 0.5).abs() * step
    assert (boundary <= d)[same & (difference > 0)].all()

    error = (codes * step - defined_codes * defined_step).abs()
    bound = torch.where(same, step, torch.maximum(step, defined_step) + d
                        + (step - defined_step).abs() * n / 2)
    assert (error <= bound * 1.000001).all()
    assert (codes != defined_codes).double().mean() < 0.01


def step_of(scales):
    """Step of a code in units of y, float64."""
    mantissa, exponent = e4m3.decode(scales)
    return (mantissa << exponent).double()


@few
@given(seeds, st.sampled_from([8, 40]))
def test_bound_between_mxint8_definition_and_implementation(rng, channels):
    """As for A4, d = delta + 2^-21 |y|; exponents differ only where amax is within d of 2^n.

    Values differ by at most a step and d; where the exponents differ, by twice the larger step
    and d; a block at the window's bottom may be lost, which is 128 units and d. Less than 1 % of
    all values differ.
    """
    x, affine, real = example(rng, channels, 1.0)
    tables = [torch.cat([table, table.new_zeros(-channels % 32)]) for table in affine.tables]
    got = requantize([x], *tables, affine.shift, False, Format.MX8, 16)
    defined = mxint8.fake_quantize((real / 1024).float()[None], window=mxint8.window_of(1.0))[0]
    d = affine.distance(x) + real.abs() * 2**-21

    step = (2.0 ** (got.scales + 1)).repeat_interleave(32, 0)[:channels]
    grouped = mxint8.blocks(real).abs().amax(1)
    lead = mxint8.floor_log2(grouped)
    exponent = (lead - 7).clamp(min=0)
    worst = mxint8.blocks(d).amax(1)
    unequal = exponent != got.scales
    power = 2.0 ** (torch.maximum(got.scales, exponent) + 7)
    assert ((got.scales - exponent).abs() <= 1).all()
    assert ((grouped - power).abs() <= worst)[unequal].all()

    different = unequal.repeat_interleave(32, 0)[:channels]
    lost = (lead < 8).repeat_interleave(32, 0)[:channels]
    larger = torch.where(different, 2 * step.maximum(
        (2.0 ** (exponent + 1)).repeat_interleave(32, 0)[:channels]), step)
    error = (got.codes[:channels] * step - defined * 1024).abs()
    assert (error <= torch.where(lost, larger.clamp(min=128), larger) + d).all()
    assert (error > 0).double().mean() < 0.01


@few
@given(seeds, st.integers(1, 40), shapes)
def test_input_definition_equals_implementation(rng, channels, shape):
    """The network input has no affine: there is no difference."""
    x = integers(rng, -32768, 32767, channels, *shape)
    got = requantize([x], None, None, 0, False, Format.IN16, 16)
    high, low = got.codes.chunk(2)
    value = ((high << 9) + (low << 1))[:channels]
    defined = mxint8.fake_quantize_input(x.float() * 2**-9, 1.0)
    assert torch.equal(value.float() / 1024, defined)


def call(segments=None, gain=None, offset=None, shift=0, relu=True, format=Format.A4U, vector=16):
    """`requantize` with operands that are right unless given."""
    segments = [torch.ones(3, 2, 2, dtype=torch.int64)] if segments is None else segments
    table = torch.ones(16, dtype=torch.int64)
    return requantize(segments, table if gain is None else gain,
                      table if offset is None else offset, shift, relu, format, vector)


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({"segments": torch.ones(3, 2, 2)}, ValueError,
     r"^segments must be a list of one or two tensors, not tensor\("),
    ({"segments": [torch.ones(3, 2, 2)]}, TypeError,
     r"^segments\[0\] must be a tensor of integers, not torch\.float32$"),
    ({"segments": [torch.full((3, 2, 2), 1 << 15)]}, ValueError,
     r"^segments\[0\] must be in -32768\.\.32767, not 32768$"),
    ({"segments": [torch.ones(3, 2, 2).long(), torch.ones(3, 2, 1).long()]}, ValueError,
     r"^segments\[1\] must be of the first one's height and width and not empty, not \(3, 2, 1\)$"),
    ({"segments": [torch.ones(3, 2, 2).long()] * 2, "format": Format.IN16, "relu": False},
     ValueError, r"^segments must be one for IN16, not \[3, 3\]$"),
    ({"gain": torch.full((16,), 1 << 15)}, ValueError,
     r"^gain must be in -32768\.\.32767, not 32768$"),
    ({"gain": torch.ones(3).long()}, ValueError, r"^gain must be of shape \(16\), not \(3,\)$"),
    ({"offset": torch.full((16,), 1 << 31)}, ValueError,
     r"^offset must be in -2147483648\.\.2147483647, not 2147483648$"),
    ({"shift": 32}, ValueError, r"^shift must be in 0\.\.31, not 32$"),
    ({"relu": 1}, TypeError, r"^relu must be a bool, not 1$"),
    ({"relu": False}, ValueError, r"^relu must be True for A4U, not False$"),
    ({"format": Format.IN16}, ValueError, r"^relu must be False for IN16, not True$"),
    ({"format": 4}, ValueError, r"^format must be one of A4U, A4S, MX8, IN16, not 4$"),
    ({"vector": 8}, ValueError, r"^vector must be 16 or 32, not 8$"),
])
def test_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        call(**arguments)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: requantizer.slots([], 16), ValueError,
     r"^channels must be of one or two segments, not \[\]$"),
    (lambda: requantizer.slots([0], 16), ValueError, r"^channels must be in 1\.\.32768, not 0$"),
    (lambda: requantizer.spread(torch.ones(3), [4], 16), ValueError,
     r"^x must have 4 channels, not 3$"),
])
def test_arguments_of_slots(call, error, text):
    with pytest.raises(error, match=text):
        call()
