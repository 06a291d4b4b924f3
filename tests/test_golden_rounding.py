"""Golden's narrowing functions against Python's exact arithmetic."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import rounding
from tests import naive
from tests.strategies import edges, many


@many
@given(st.lists(edges(-2**60, 2**60), min_size=1), st.integers(0, 62))
def test_round_half_even(values, n):
    expected = [naive.round_half_even(x, n) for x in values]
    assert rounding.round_half_even(torch.tensor(values), n).tolist() == expected
    shifts = torch.full((len(values),), n)
    assert rounding.round_half_even(torch.tensor(values), shifts).tolist() == expected


def test_ties_go_to_even():
    x = torch.tensor([-6, -5, -3, -2, -1, 0, 1, 2, 3, 5, 6, 7, 9, 10])
    assert rounding.round_half_even(x, 1).tolist() == [-3, -2, -2, -1, 0, 0, 0, 1, 2, 2, 3, 4, 4, 5]
    assert rounding.round_half_even(x, 2).tolist() == [-2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert rounding.round_half_even(x, 0).tolist() == x.tolist()


@many
@given(st.lists(st.tuples(edges(0, 2**62 - 1), edges(1, 2**62 - 1)), min_size=1))
def test_quotient(pairs):
    x, divisor = torch.tensor(pairs).T
    expected = [round(naive.Fraction(*pair)) for pair in pairs]
    assert rounding.round_half_even_quotient(x, divisor).tolist() == expected


@many
@given(st.integers(0, 2**30), st.integers(1, 2**30))
def test_quotient_at_ties(quotient, half):
    tie = 2 * half * quotient + half
    x = torch.tensor([tie - 1, tie, tie + 1])
    low = quotient if half > 1 else round(naive.Fraction(tie - 1, 2))
    high = quotient + 1 if half > 1 else round(naive.Fraction(tie + 1, 2))
    even = quotient + quotient % 2
    got = rounding.round_half_even_quotient(x, torch.tensor(2 * half)).tolist()
    assert got == [low, even, high]


@many
@given(st.lists(edges(-2**62, 2**62), min_size=1), st.integers(1, 63))
def test_saturate(values, bits):
    expected = [naive.clip(x, -2 ** (bits - 1), 2 ** (bits - 1) - 1) for x in values]
    assert rounding.saturate(torch.tensor(values), bits).tolist() == expected


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: rounding.round_half_even(1.5, 1), TypeError,
     r"^x must be a tensor of integers, not 1\.5$"),
    (lambda: rounding.round_half_even(torch.tensor(1.5), 1), TypeError,
     r"^x must be a tensor of integers, not torch\.float32$"),
    (lambda: rounding.round_half_even(torch.tensor(1), 1.0), TypeError,
     r"^n must be an integer, not 1\.0$"),
    (lambda: rounding.round_half_even(torch.tensor(1), 63), ValueError,
     r"^n must be in 0\.\.62, not 63$"),
    (lambda: rounding.round_half_even(torch.tensor(1), torch.tensor([-1])), ValueError,
     r"^n must be in 0\.\.62, not -1$"),
    (lambda: rounding.round_half_even_quotient(torch.tensor(-1), torch.tensor(1)), ValueError,
     r"^x must be in 0\.\.4611686018427387903, not -1$"),
    (lambda: rounding.round_half_even_quotient(torch.tensor(1), torch.tensor(0)), ValueError,
     r"^divisor must be in 1\.\.4611686018427387903, not 0$"),
    (lambda: rounding.saturate(torch.tensor(True), 8), TypeError,
     r"^x must be a tensor of integers, not torch\.bool$"),
    (lambda: rounding.saturate(torch.tensor(1), 64), ValueError,
     r"^bits must be in 1\.\.63, not 64$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call()
