"""E4M3 scales against a decoder and a search written from the standard."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import a4, e4m3
from tests import naive
from tests.strategies import edges, many

CODES = torch.arange(127)


def test_all_codes_against_the_standard():
    mantissa, exponent = e4m3.decode(CODES)
    assert 0 <= int(mantissa.min()) and int(mantissa.max()) == 15
    assert (int(exponent.min()), int(exponent.max())) == (1, 15)
    for code, m, x, value in zip(CODES.tolist(), mantissa.tolist(), exponent.tolist(),
                                 e4m3.value(CODES).tolist()):
        assert Fraction(value) == naive.e4m3_value(code) == m * Fraction(2) ** (x - 10)


def test_all_bytes_against_torch():
    # The type has 256 codes: these 127, their negatives, and NaN as 0x7F and 0xFF.
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(values[:127], e4m3.value(CODES))
    assert torch.equal(values[128:255], -e4m3.value(CODES))
    assert values.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_limits():
    assert e4m3.value(torch.tensor([0, 1, 7, 8, 0x7E])).tolist() == [
        0, 2**-9, 7 * 2**-9, 2**-6, 448]
    above, below = torch.tensor([448.0, 464, 480, 1e30, torch.inf]), torch.tensor([2**-10, 1e-45])
    assert e4m3.encode(above).tolist() == [0x7E] * 5
    assert e4m3.encode(below).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_encode_at_every_boundary(dtype):
    values = e4m3.value(CODES).to(dtype)
    assert e4m3.encode(values).tolist() == CODES.tolist()
    ties = (values[1:] + values[:-1]) / 2
    even = CODES[:-1] + CODES[:-1] % 2
    assert torch.equal(e4m3.encode(ties), even)
    up, down = torch.tensor(torch.inf, dtype=dtype), torch.tensor(0, dtype=dtype)
    assert torch.equal(e4m3.encode(torch.nextafter(ties, up)), CODES[1:])
    assert torch.equal(e4m3.encode(torch.nextafter(ties, down)), CODES[:-1])


@many
@given(st.lists(st.floats(0, 500, width=32), min_size=1))
def test_encode_against_search(values):
    expected = [naive.e4m3_encode(Fraction(value)) for value in values]
    assert e4m3.encode(torch.tensor(values)).tolist() == expected
    assert e4m3.encode(torch.tensor(values, dtype=torch.float64)).tolist() == expected


def test_encode_against_torch():
    generator = torch.Generator().manual_seed(1)
    values = 2 ** (torch.rand(200_000, generator=generator) * 24 - 14)
    expected = values.clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(e4m3.encode(values), expected.long())
    for dtype in (torch.float16, torch.bfloat16):
        half = values.to(dtype)
        assert torch.equal(e4m3.encode(half), e4m3.encode(half.float()))


@pytest.mark.parametrize("n", [15, 7])
def test_scale_code_at_every_boundary(n):
    """The largest amax of each code and the smallest of the next, ties and saturation included."""
    for code in range(126):
        tie = n * 1024 * (naive.VALUES[code] + naive.VALUES[code + 1]) / 2
        assert tie.denominator == 1
        amax = [int(tie) - 1, int(tie), int(tie) + 1]
        assert e4m3.scale_code(torch.tensor(amax), n).tolist() == [
            code, code + code % 2, code + 1]
        assert [naive.e4m3_encode(Fraction(x, n * 1024)) for x in amax] == [
            code, code + code % 2, code + 1]
    top = [448 * 1024 * n, 464 * 1024 * n, 1 << 23, 1 << 40]
    assert e4m3.scale_code(torch.tensor(top), n).tolist() == [0x7E] * 4
    assert e4m3.scale_code(torch.tensor([0, 1, n - 1, n, n + 1]), n).tolist() == [0, 0, 0, 0, 1]


@many
@given(st.lists(edges(0, 2**23 - 1), min_size=1), st.sampled_from([7, 15]))
def test_scale_code_against_search(amax, n):
    expected = [naive.e4m3_encode(Fraction(x, n * 1024)) for x in amax]
    assert e4m3.scale_code(torch.tensor(amax), n).tolist() == expected


@pytest.mark.parametrize("signed", [False, True])
def test_scale_code_equals_the_float_definition(signed):
    """Rounding amax / n to float32 never crosses a boundary, for every amax of 23 bits."""
    n = a4.largest(signed)
    amax = torch.arange(1 << 23, dtype=torch.int64)
    assert torch.equal(e4m3.scale_code(amax, n), e4m3.encode(amax.float() / (n * 1024)))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: e4m3.decode(torch.tensor([127])), ValueError, r"^code must be in 0\.\.126, not 127$"),
    (lambda: e4m3.value(torch.tensor([-1])), ValueError, r"^code must be in 0\.\.126, not -1$"),
    (lambda: e4m3.encode(torch.tensor([1])), TypeError,
     r"^scale must be a tensor of floats, not tensor\(\[1\]\)$"),
    (lambda: e4m3.encode(torch.tensor([1, -0.5])), ValueError,
     r"^scale must be at least 0, not -0\.5$"),
    (lambda: e4m3.encode(torch.tensor([1, torch.nan])), ValueError,
     r"^scale must be at least 0, not nan$"),
    (lambda: e4m3.scale_code(torch.tensor([-1]), 7), ValueError,
     r"^amax must be in 0\.\.1099511627776, not -1$"),
    (lambda: e4m3.scale_code(torch.tensor([1]), 0), ValueError, r"^n must be in 1\.\.127, not 0$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()
