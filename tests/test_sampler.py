"""The sampler against the equations, a case with a known solution, and its numbering."""

import math

import pytest
import torch

from golden import sampler
from golden.network import Architecture, Precond
from golden.recipes import mnist32


def test_schedule_is_equation_5():
    sigmas = sampler.schedule(18)
    assert len(sigmas) == 19 and sigmas[-1] == 0
    assert math.isclose(sigmas[0], 80) and math.isclose(sigmas[17], 0.002)
    for n in (1, 9, 16):
        expected = (80 ** (1 / 7) + n / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert math.isclose(sigmas[n], expected)


def test_evaluations_are_numbered_in_sampling_order():
    order, sigmas = sampler.evaluations(18), sampler.schedule(18)
    assert [e.index for e in order] == list(range(35))
    assert [e.sigma for e in order[:5]] == [sigmas[0], sigmas[1], sigmas[1], sigmas[2], sigmas[2]]
    assert order[34].sigma == sigmas[17]
    assert len(sampler.evaluations(1)) == 1


def test_calls_match_evaluations():
    seen, levels = [], []

    def denoise(x, sigma):
        assert x.dtype == torch.float32
        levels.append(sigma)
        return x * 0

    noise = sampler.draw_noise(2, mnist32.architecture)
    sampler.sample(denoise, noise, 4, lambda evaluation, x: seen.append(evaluation))
    assert seen == sampler.evaluations(4)
    assert levels == [evaluation.sigma for evaluation in seen]


def test_gaussian_data_has_a_known_solution():
    # For data ~ N(mean, 0.1^2) the denoiser is linear and the flow of the ODE is closed-form.
    mean, deviation = 0.2, 0.1

    def denoise(x, sigma):
        return (deviation ** 2 * x + sigma ** 2 * mean) / (deviation ** 2 + sigma ** 2)

    noise = sampler.draw_noise(4, mnist32.architecture, seed=3)
    total = math.sqrt(80 ** 2 + deviation ** 2)
    exact = mean + (80 * noise - mean) * deviation / total
    errors = [(sampler.sample(denoise, noise, steps) - exact).abs().max().item()
              for steps in (18, 36, 72)]
    # Heun's method is of second order: half the step, a quarter of the error.
    assert errors[0] < 0.05 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


def test_two_steps_equal_the_algorithm_written_out():
    def denoise(x, sigma):
        return torch.tanh(x / (1 + sigma))

    noise = sampler.draw_noise(1, mnist32.architecture)
    t0, t1 = 80.0, 0.002
    x0 = noise.double() * t0
    d0 = (x0 - denoise(x0, t0)) / t0
    x1 = x0 + (t1 - t0) * d0
    d1 = (x1 - denoise(x1, t1)) / t1
    x1 = x0 + (t1 - t0) * (d0 + d1) / 2
    x2 = x1 + (0 - t1) * (x1 - denoise(x1, t1)) / t1
    torch.testing.assert_close(sampler.sample(denoise, noise, 2),
                               x2.float().clamp(-1, 1), rtol=1e-3, atol=1e-3)


def test_euler_is_of_first_order():
    mean, deviation, euler = 0.2, 0.1, sampler.Sampler(solver="euler")

    def denoise(x, sigma):
        return (deviation ** 2 * x + sigma ** 2 * mean) / (deviation ** 2 + sigma ** 2)

    noise = sampler.draw_noise(4, mnist32.architecture, seed=3)
    exact = mean + (80 * noise - mean) * deviation / math.sqrt(80 ** 2 + deviation ** 2)
    errors = [(sampler.sample(denoise, noise, steps, sampler=euler) - exact).abs().max().item()
              for steps in (64, 128, 256)]
    assert errors[1] < errors[0] / 1.6 and errors[2] < errors[1] / 1.6
    assert errors[2] > errors[1] / 3                         # and not of second
    assert [e.sigma for e in sampler.evaluations(4, euler)] == sampler.schedule(4)[:4]


def test_churn_equals_the_algorithm_written_out():
    churned = sampler.Sampler(churn=1.0, churn_min=0.01, churn_max=50, churn_noise=1.1)
    seen, levels = [], []

    def denoise(x, sigma):
        levels.append(sigma)
        return torch.tanh(x / (1 + sigma))

    def remember(evaluation, x):
        seen.append(x)

    noise = sampler.draw_noise(2, mnist32.architecture)
    images = sampler.sample(denoise, noise, 3, remember, sampler=churned, seed=7)
    t0, t1, t2, _ = sampler.schedule(3)
    raised = t1 * (1 + 1 / 3)                                # t0 and t2 are outside the range
    assert levels == pytest.approx([t0, t1, raised, t2, t2])
    assert levels == [e.sigma for e in sampler.evaluations(3, churned)]

    def slope(x, sigma):
        return (x - torch.tanh(x.float() / (1 + sigma)).double()) / sigma

    x0 = noise.double() * t0
    x1 = x0 + (t1 - t0) * (slope(x0, t0) + slope(x0 + (t1 - t0) * slope(x0, t0), t1)) / 2
    added = (seen[2] - x1) / (math.sqrt(raised ** 2 - t1 ** 2) * 1.1)
    assert abs(added.mean().item()) < 0.1 and abs(added.std().item() - 1) < 0.05
    hat = seen[2]
    x2 = hat + (t2 - raised) * (slope(hat, raised)
                                + slope(hat + (t2 - raised) * slope(hat, raised), t2)) / 2
    torch.testing.assert_close(images, (x2 - t2 * slope(x2, t2)).float().clamp(-1, 1))
    one = sampler.sample(denoise, noise[:1], 3, sampler=churned, seed=7)
    assert torch.equal(one, images[:1])                      # image n depends on seed and n alone
    assert not torch.equal(one, sampler.sample(denoise, noise[:1], 3, sampler=churned, seed=8))


def test_sampler_takes_the_range_of_a_model():
    a = Architecture(family="diffusers", prediction="epsilon", norm_group_channels=1)
    model = Precond(a)
    order = sampler.evaluations(5, sampler.Sampler.for_model(model))
    assert math.isclose(order[0].sigma, model.sigma_max)
    assert math.isclose(order[-1].sigma, model.sigma_min)


def test_result_is_clipped():
    noise = sampler.draw_noise(1, mnist32.architecture)
    assert sampler.sample(lambda x, sigma: x * 0 + 3, noise, 2).max() == 1


def test_noise_depends_on_seed_and_number_alone():
    a = mnist32.architecture
    few, many = sampler.draw_noise(2, a, seed=5), sampler.draw_noise(4, a, seed=5)
    assert few.shape == (2, 1, 32, 32) and torch.equal(few, many[:2])
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(few, sampler.draw_noise(2, a, seed=6))


@pytest.mark.parametrize("options, text", [
    ({"solver": "rk4"}, r"^solver must be heun or euler, not 'rk4'$"),
    ({"sigma_min": 90.0}, r"^sigma_min must be positive and below sigma_max, 80\.0, not 90\.0$"),
    ({"churn": -1.0}, r"^churn must be at least 0, not -1\.0$"),
])
def test_sampler_rejects(options, text):
    with pytest.raises(ValueError, match=text):
        sampler.Sampler(**options)


def test_rejects():
    with pytest.raises(ValueError, match=r"^steps must be a positive integer, not 0$"):
        sampler.schedule(0)
    with pytest.raises(ValueError, match=r"^steps must be a positive integer, not 1\.5$"):
        sampler.evaluations(1.5)
    with pytest.raises(ValueError, match=r"^count must be in 1\.\.1048576, not 0$"):
        sampler.draw_noise(0, mnist32.architecture)
    with pytest.raises(ValueError, match=r"^seed must be in 0\.\.4095, not -1$"):
        sampler.draw_noise(1, mnist32.architecture, seed=-1)
    with pytest.raises(ValueError, match=r"^seed must be in 0\.\.4095, not 4096$"):
        sampler.draw_noise(1, mnist32.architecture, seed=4096)
