"""MXINT8 and the 16-bit input: both forms against slow ones, and the bound between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import mxint8
from tests import naive
from tests.strategies import edges, few, integers, many, seeds, shapes

TOP = (1 << 23) - 1


@many
@given(st.lists(edges(-TOP, TOP), min_size=1, max_size=70))
def test_quantize_one_pixel(pixel):
    codes, scales = mxint8.quantize(torch.tensor(pixel)[:, None, None])
    expected = naive.quantize_pixel(pixel, [False] * len(pixel), naive.MX8)
    assert (codes.flatten().tolist(), scales.flatten().tolist()) == expected[:2]


@pytest.mark.parametrize("lead", range(7, 23))
def test_exponent_just_below_a_power_of_two(lead):
    """2^n - 1 has the exponent n - 1 although it rounds to 128 steps of it, and clips to 127."""
    y = torch.tensor([(2 << lead) - 1, 1 << lead, -(2 << lead) + 1])[:, None, None]
    codes, scales = mxint8.quantize(y)
    assert scales.item() == lead - 7
    assert codes.flatten().tolist() == [127, 64, -127]
    if lead < 22:
        codes, scales = mxint8.quantize(y + 1)
        assert (scales.item(), codes[0].item()) == (lead - 6, 64)


def test_window_ends():
    y = torch.tensor([[127, 128, 0, TOP, 255], [1, 1, 0, 1 << 15, 127]])[:, None]
    codes, scales = mxint8.quantize(y)
    assert scales.tolist() == [[[0, 0, 0, 15, 0]]]
    # 127 is below the window; 32768 is half a step of 65536: a tie to the even code 0.
    assert codes.tolist() == [[[0, 64, 0, 127, 127]], [[0, 0, 0, 0, 64]]]
    assert codes[1, 0, 1].item() == naive.round_half_even(1, 1) == 0


def test_short_last_block():
    """Slots beyond the last channel count as zeros and are not returned."""
    y = torch.arange(1, 41)[:, None, None] * 1000
    codes, scales = mxint8.quantize(y)
    assert codes.shape == (40, 1, 1) and scales.shape == (2, 1, 1)
    padded = torch.cat([y, torch.zeros(24, 1, 1, dtype=torch.int64)])
    assert mxint8.quantize(padded)[0][:40].equal(codes)
    assert mxint8.quantize(padded)[1].equal(scales)


@few
@given(seeds, st.integers(1, 70), shapes, st.sampled_from([1.0, 2.0**-5, 2.0**9]))
def test_implementation_equals_definition(rng, channels, shape, fixed):
    """With the same y both forms agree on every bit: 24-bit integers are float32."""
    y = integers(rng, -TOP, TOP, channels, *shape)
    codes, scales = mxint8.quantize(y)
    exponents = scales.repeat_interleave(32, 0)[:channels] + 1
    represented = (codes << exponents).float() * (fixed / 1024)
    defined = mxint8.fake_quantize(y[None].float() * (fixed / 1024),
                                   window=mxint8.window_of(fixed))[0]
    assert torch.equal(represented, defined)


@few
@given(seeds, st.integers(1, 70), st.sampled_from([None, -3, 4]), st.sampled_from([32, 16, 5]))
def test_definition_against_scalars(rng, channels, bottom, block):
    x = torch.from_numpy(rng.standard_normal((2, channels, 2, 1))).float()
    x *= 2.0 ** torch.from_numpy(rng.randint(-8, 22, (2, channels, 2, 1)))
    x[rng.random_sample(x.shape) < 0.2] = 0
    got = mxint8.fake_quantize(x, block=block, window=bottom)
    for image in range(2):
        for pixel in range(2):
            for start in range(0, channels, block):
                part = image, slice(start, start + block), pixel, 0
                codes, exponent = naive.float_block(x[part].tolist(), bottom)
                unit = 0.0 if exponent is None else 2.0 ** (exponent - 6)
                assert got[part].tolist() == [code * unit for code in codes]


@few
@given(seeds, st.integers(1, 4), st.integers(1, 70), st.sampled_from([1, 3]))
def test_weights(rng, outputs, channels, kernel):
    """Codes, exponents and unit are the float definition with the window at the top, exactly."""
    w = torch.from_numpy(rng.standard_normal((outputs, channels, kernel, kernel))).float()
    w *= 2.0 ** torch.from_numpy(rng.randint(-24, 3, (outputs, 1, kernel, kernel)))
    codes, scales, unit = mxint8.quantize_weights(w)
    groups = -(-channels // 32)
    assert codes.shape == w.shape and scales.shape == (outputs, kernel * kernel, groups)
    assert codes.abs().max() <= 127 and 0 <= scales.min() and scales.max() == 15
    exponents = scales.transpose(1, 2).reshape(outputs, groups, kernel, kernel)
    exponents = exponents.repeat_interleave(32, 1)[:, :channels]
    bottom = round(torch.tensor(unit).log2().item()) + 6
    assert 2.0 ** (bottom + 15) <= w.abs().max() < 2.0 ** (bottom + 16)
    assert torch.equal((codes << exponents).float() * unit,
                       mxint8.fake_quantize(w, window=bottom))
    for k in range(outputs):
        for tap in range(kernel * kernel):
            block = w[k, :32, tap // kernel, tap % kernel]
            expected, exponent = naive.float_block(block.tolist(), bottom)
            assert codes[k, :32, tap // kernel, tap % kernel].tolist() == expected
            assert scales[k, tap, 0] == (0 if exponent is None else exponent - bottom)


@pytest.mark.parametrize(("channels", "kernel", "blocks"), [
    (1, 3, 1), (3, 3, 1), (4, 3, 2), (40, 3, 12), (3, 1, 1), (40, 1, 2)])
def test_input_weights(channels, kernel, blocks):
    """One exponent for 32 of (tap, channel), for the high halves and again for the low ones."""
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(4, channels, kernel, kernel, generator=generator)
    w *= 2.0 ** -torch.randint(0, 20, w.shape, generator=generator)
    codes, scales, unit = mxint8.quantize_input_weights(w)
    high, low = codes.chunk(2, 1)
    count = kernel * kernel * channels
    assert codes.shape == (4, 64 * blocks, 1, 1) and scales.shape == (4, 1, 2 * blocks)
    assert high.equal(low) and scales[..., :blocks].equal(scales[..., blocks:])
    assert not high[:, count:].any()
    steps = scales[:, 0, :blocks].repeat_interleave(32, 1)[:, :count]
    values = (high[:, :count, 0, 0] << steps).float() * unit
    defined = mxint8.fake_quantize_input_weights(w)
    for k in range(4):
        row = [w[k, n % channels, n // channels // kernel, n // channels % kernel].item()
               for n in range(count)]
        bottom = round(torch.tensor(unit).log2().item()) + 6
        for start in range(0, count, 32):
            expected, exponent = naive.float_block(row[start:start + 32], bottom)
            assert high[k, start:start + 32][:count - start].flatten().tolist() == expected
            assert scales[k, 0, start // 32] == (0 if exponent is None else exponent - bottom)
        for n in range(count):
            tap, channel = divmod(n, channels)
            assert defined[k, channel, tap // kernel, tap % kernel] == values[k, n]


def test_zero_weights():
    codes, scales, unit = mxint8.quantize_weights(torch.zeros(2, 40, 3, 3))
    assert not codes.any() and not scales.any() and unit > 0


@many
@given(st.lists(st.one_of(edges(-32768, 32767), st.sampled_from(
    [32639, 32640, -32639, -32640, 127, 128, -128, -129, 32512])), min_size=1))
def test_split(values):
    x = torch.tensor(values)[:, None, None]
    codes, scales, clipped = mxint8.split(x)
    blocks = -(-len(x) // 32)
    assert codes.shape == (64 * blocks, 1, 1)
    assert scales.flatten().tolist() == [8] * blocks + [0] * blocks
    high, low = codes.chunk(2)
    assert not high[len(x):].any() and not low[len(x):].any()
    high, low = high[:len(x)], low[:len(x)]
    assert torch.equal(256 * high + low, x.clamp(-32639, 32639))
    assert high.abs().max() <= 127 and low.min() >= -128 and low.max() <= 127
    assert clipped.flatten().tolist() == [abs(value) > 32639 for value in values]
    # Element = code * 2^(scale + 1) units of 2^-10 sA: an input LSB is 2^-9 sA.
    represented = (high << 9) + (low << 1)
    defined = mxint8.fake_quantize_input(x.float() * 2**-9, 1.0)
    assert torch.equal(represented.float() / 1024, defined)


def test_window_scale():
    for amax in (1.0, 1.999, 2.0, 0.3, 5e4):
        scale = mxint8.static_scale(amax)
        # The integer 2^22 stands for the top exponent's power of two.
        assert 2**22 * 2**-10 * scale <= amax < 2**23 * 2**-10 * scale
        y = torch.tensor(round(amax / scale * 1024)).reshape(1, 1, 1)
        assert mxint8.quantize(y.clamp(max=TOP))[1].item() == 15
        assert mxint8.window_of(scale) + 15 == mxint8.exponent_of(amax)
    assert mxint8.static_scale(0.0) == 1.0


def test_input_scale():
    for amax in (1.0, 32639.0, 32640.0, 80.3, 1e-3):
        scale = mxint8.input_scale(amax)
        assert 32639 * scale * 2**-9 >= amax > 32639 * scale * 2**-10
    assert mxint8.input_scale(0.0) == 1.0


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda x: mxint8.quantize(x.long() << 23), ValueError,
     r"^y must be in -8388607\.\.8388607, not 8388608$"),
    (lambda x: mxint8.split(x.long() << 15), ValueError,
     r"^x must be in -32768\.\.32767, not 32768$"),
    (lambda x: mxint8.fake_quantize(x, block=0), ValueError,
     r"^block must be in 1\.\.32768, not 0$"),
    (lambda x: mxint8.fake_quantize(x, window=113), ValueError,
     r"^window must be in -120\.\.112, not 113$"),
    (lambda x: mxint8.fake_quantize(x.long()), TypeError,
     r"^x must be a tensor of floats, not torch\.int64$"),
    (lambda x: mxint8.fake_quantize_input(x.long(), 1.0), TypeError,
     r"^x must be a tensor of floats, not torch\.int64$"),
    (lambda x: mxint8.quantize_weights(x), ValueError,
     r"^w must be of shape \(any, any, any, any\), not \(17, 1, 1\)$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(17, 1, 1))
