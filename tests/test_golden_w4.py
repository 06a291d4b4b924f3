"""W4: the float definition against scalars, and the integers against it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import e4m3, w4
from tests import naive
from tests.strategies import few, seeds


def weights(rng, outputs, channels, kernel):
    """Float32 weights whose output channels have different magnitudes."""
    w = torch.from_numpy(rng.standard_normal((outputs, channels, kernel, kernel))).float()
    return w * 2.0 ** torch.from_numpy(rng.randint(-18, 3, (outputs, 1, 1, 1)))


@few
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 3]),
       st.sampled_from([None, 16, 32]), st.booleans())
def test_definition_against_scalars(rng, outputs, channels, kernel, group, shared_taps):
    w = weights(rng, outputs, channels, kernel)
    got = w4.fake_quantize(w, group=group, shared_taps=shared_taps)
    fixed = w4.static_scale(w)
    for k in range(outputs):
        for start in range(0, channels, group or channels):
            part = slice(start, start + (group or channels))
            every = [(slice(None), slice(None))] if shared_taps else [
                (slice(y, y + 1), slice(x, x + 1)) for y in range(kernel) for x in range(kernel)]
            for rows, columns in every:
                members = w[k, part, rows, columns]
                codes, step = naive.float_codes(members.flatten().tolist(), 7, False, fixed)
                expected = torch.tensor(codes).float() * torch.tensor(float(step))
                assert torch.equal(got[k, part, rows, columns].flatten(), expected)


@few
@given(seeds, st.integers(1, 5), st.integers(1, 40), st.sampled_from([1, 3]))
def test_codes_times_steps_are_the_definition(rng, outputs, channels, kernel):
    """The integer form is not an approximation: the difference is zero."""
    w = weights(rng, outputs, channels, kernel)
    codes, scales, fixed = w4.quantize(w)
    assert codes.shape == w.shape and scales.shape == (outputs, kernel * kernel, 1)
    assert codes.dtype == scales.dtype == torch.int64
    step = (e4m3.value(scales) * fixed).reshape(outputs, 1, kernel, kernel)
    assert torch.equal(codes * step, w4.fake_quantize(w))
    assert codes.abs().max() <= 7 and scales.max() == 0x7E
    # A group whose scale is zero has zero codes.
    assert not (codes.abs().amax(1).flatten(1) * (scales[..., 0] == 0)).any()


def test_zero_weights():
    codes, scales, fixed = w4.quantize(torch.zeros(2, 3, 1, 1))
    assert not codes.any() and not scales.any() and fixed == 1.0
    assert not w4.fake_quantize(torch.zeros(2, 3, 1, 1)).any()


def test_small_groups_become_zero():
    """A group below 2^-10 of the largest scale's units has the scale zero."""
    w = torch.tensor([448.0, 2**-10, 2**-9, 1.5 * 2**-9]).reshape(4, 1, 1, 1) * 7
    codes, scales, fixed = w4.quantize(w)
    assert fixed == 1.0
    assert scales.flatten().tolist() == [0x7E, 0, 1, 2]
    assert codes.flatten().tolist() == [7, 0, 7, 5]    # 5.25 steps


def test_other_scales():
    w = torch.tensor([7.0, 3.0, -3.5, 0.4]).reshape(2, 2, 1, 1)
    assert w4.fake_quantize(w, scale="fp32").flatten().tolist() == pytest.approx([7, 3, -3.5, 0.5])
    assert w4.fake_quantize(w, scale="power_of_two", tensor_scale=1.0).flatten().tolist() == [
        7, 3, -3.5, 0.5]
    each = w4.fake_quantize(w, tensor_scale=torch.tensor([1.0, 0.5]))
    assert each.flatten().tolist() == [7, 3, -3.5, 0.5]


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda w: w4.quantize(w[0]), ValueError,
     r"^w must be of shape \(any, any, any, any\), not \(2, 3, 3\)$"),
    (lambda w: w4.quantize(w / 0), ValueError, r"^w must be finite, not inf$"),
    (lambda w: w4.fake_quantize(w.long(), tensor_scale=1.0), TypeError,
     r"^w must be a tensor of floats, not torch\.int64$"),
    (lambda w: w4.fake_quantize(w, group=0), ValueError, r"^group must be in 1\.\.32768, not 0$"),
    (lambda w: w4.fake_quantize(w, shared_taps=1), TypeError,
     r"^shared_taps must be a bool, not 1$"),
    (lambda w: w4.fake_quantize(w, tensor_scale=-1.0), ValueError,
     r"^tensor_scale must be positive, not -1\.0$"),
    (lambda w: w4.fake_quantize(w, scale="e5m2"), ValueError,
     r"^scale must be one of e4m3, power_of_two, int4, fp32, not 'e5m2'$"),
])
def test_arguments(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(1, 2, 3, 3))
