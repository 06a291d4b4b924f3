"""EDM's samplers: Heun's 2nd-order method, with or without churn, and Euler's.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2, equation 5.
"""

import dataclasses
import itertools
import math
import zlib

import torch

__all__ = ["RHO", "STEPS", "Sampler", "HEUN", "Evaluation", "schedule", "evaluations", "draw_noise",
           "sample"]

RHO = 7
STEPS = 18


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a sampling run goes, besides its number of steps.

    Churn adds noise before a step whose level lies in `churn_min`..`churn_max`: the level grows by
    the factor 1 + min(churn / steps, sqrt(2) - 1), the new noise has the deviation `churn_noise`.
    """

    solver: str = "heun"          # or "euler": one evaluation a step
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0

    def __post_init__(self):
        if self.solver not in ("heun", "euler"):
            raise ValueError(f"solver must be heun or euler, not {self.solver!r}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min must be positive and below sigma_max, "
                             f"{self.sigma_max!r}, not {self.sigma_min!r}")
        for name in ("churn", "churn_min", "churn_max", "churn_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)!r}")

    @classmethod
    def for_model(cls, model, **options):
        """A sampler over the noise levels that the Precond `model` is trained for."""
        return cls(sigma_min=model.sigma_min, sigma_max=model.sigma_max, **options)

    def raised(self, sigma, steps):
        """Noise level that churn makes of `sigma`."""
        if not self.churn_min <= sigma <= self.churn_max:
            return sigma
        return sigma * (1 + min(self.churn / steps, math.sqrt(2) - 1))


HEUN = Sampler()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser: its number from 0 in sampling order, and its noise level."""

    index: int
    sigma: float


def schedule(steps=STEPS, sampler=HEUN):
    """Noise levels of the step boundaries, `steps` + 1 floats from sigma_max to sigma_min and 0.

    Raises ValueError unless `steps` is an integer of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, not {steps!r}")
    high, low = sampler.sigma_max ** (1 / RHO), sampler.sigma_min ** (1 / RHO)
    return [(high + n / max(1, steps - 1) * (low - high)) ** RHO for n in range(steps)] + [0.0]


def evaluations(steps=STEPS, sampler=HEUN):
    """The evaluations of a run: 2 `steps` - 1 with Heun, whose last step has one, else `steps`."""
    levels = []
    for sigma, following in itertools.pairwise(schedule(steps, sampler)):
        levels.append(sampler.raised(sigma, steps))
        if following and sampler.solver == "heun":
            levels.append(following)
    return [Evaluation(index, sigma) for index, sigma in enumerate(levels)]


def draw_noise(count, architecture, seed=0):
    """Unit normal noise (count, C, H, W), float32, on the CPU.

    Image n depends on `seed` and n alone, so that runs of different lengths share their images.
    Raises ValueError unless `count` is in 1..2^20 and `seed` in 0..4095 (torch's generator takes
    32 bits).
    """
    if not 1 <= count <= 1 << 20:
        raise ValueError(f"count must be in 1..{1 << 20}, not {count!r}")
    if not 0 <= seed < 4096:
        raise ValueError(f"seed must be in 0..4095, not {seed!r}")
    a = architecture
    shape = (a.img_channels, a.resolution, a.resolution)
    return torch.stack([unit_noise(shape, (seed << 20) + n) for n in range(count)])


def unit_noise(shape, seed):
    """Unit normal noise of `shape` from 32 bits of `seed`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(denoise, noise, steps=STEPS, on_evaluation=None, *, sampler=HEUN, seed=0):
    """Images from unit noise.

    Parameters
    ----------
    denoise : callable (x, sigma) -> image, x of the shape of `noise`, sigma a float
    noise : (N, C, H, W), unit normal
    steps : of the solver; 18 of Heun make 35 evaluations
    on_evaluation : callable (Evaluation, x) called before each evaluation, or None
    sampler : Sampler
    seed : of the noise that churn adds to image n, besides n and the step

    Returns (N, C, H, W) float32, nominally in [-1, 1], clipped to it.
    """
    order = iter(evaluations(steps, sampler))

    def slope(x, sigma):
        evaluation = next(order)
        if on_evaluation is not None:
            on_evaluation(evaluation, x)
        return (x - denoise(x.float(), evaluation.sigma).double()) / sigma

    sigmas = schedule(steps, sampler)
    x = noise.double() * sigmas[0]    # float64, as rounding of x - D is amplified by 1 / sigma
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        raised = sampler.raised(sigma, steps)
        if raised > sigma:
            added = torch.stack([unit_noise(x.shape[1:], zlib.crc32(f"{seed} {step} {n}".encode()))
                                 for n in range(len(x))]).to(x)
            x = x + math.sqrt(raised ** 2 - sigma ** 2) * sampler.churn_noise * added
        first = slope(x, raised)
        euler = x + (following - raised) * first
        x = euler
        if following and sampler.solver == "heun":
            x = euler + (following - raised) * (slope(euler, following) - first) / 2
    return x.float().clamp(-1, 1)
