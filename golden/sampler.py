"""EDM's deterministic sampler: Heun's 2nd-order method (Karras et al. 2022, algorithm 1)."""

import dataclasses

import torch

from golden.network import Precond

RHO = 7
STEPS = 18


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser: its number from 0 in sampling order, and its noise level."""

    index: int
    sigma: float


def schedule(steps=STEPS):
    """Noise levels of the step boundaries, `steps` + 1 floats from 80 to 0.002 and 0 (equation 5).

    Raises ValueError unless `steps` is an integer of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, not {steps!r}")
    high, low = Precond.sigma_max ** (1 / RHO), Precond.sigma_min ** (1 / RHO)
    return [(high + n / max(1, steps - 1) * (low - high)) ** RHO for n in range(steps)] + [0.0]


def evaluations(steps=STEPS):
    """The 2 `steps` - 1 evaluations of a run: two a step, the last step only one."""
    sigmas = schedule(steps)
    levels = [sigma for pair in zip(sigmas[:-1], sigmas[1:]) for sigma in pair][:-1]
    return [Evaluation(index, sigma) for index, sigma in enumerate(levels)]


def draw_noise(count, architecture, seed=0):
    """Unit normal noise (count, C, H, W), float32, on the CPU.

    Image n depends on `seed` and n alone, so that runs of different lengths share their images.
    Raises ValueError unless `count` is at least 1 and `seed` at least 0.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count!r}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, not {seed!r}")
    a = architecture
    shape = (a.img_channels, a.resolution, a.resolution)
    return torch.stack([
        torch.randn(shape, generator=torch.Generator().manual_seed((seed << 20) + n))
        for n in range(count)])


@torch.no_grad()
def sample(denoise, noise, steps=STEPS, on_evaluation=None):
    """Images from unit noise.

    Parameters
    ----------
    denoise : callable (x, sigma) -> image, x of the shape of `noise`, sigma a float
    noise : (N, C, H, W), unit normal
    steps : Heun steps; 18 make 35 evaluations
    on_evaluation : callable (Evaluation, x) called before each evaluation, or None

    Returns (N, C, H, W) float32, nominally in [-1, 1], clipped to it.
    """
    sigmas, order = schedule(steps), iter(evaluations(steps))

    def slope(x, sigma):
        evaluation = next(order)
        if on_evaluation is not None:
            on_evaluation(evaluation, x)
        return (x - denoise(x.float(), evaluation.sigma).double()) / sigma

    x = noise.double() * sigmas[0]    # float64, as rounding of x - D is amplified by 1 / sigma
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        x = euler
        if following:
            x = euler + (following - sigma) * (slope(euler, following) - first) / 2
    return x.float().clamp(-1, 1)
