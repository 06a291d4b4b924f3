"""Named recipes: which network is trained on which data, for how long and how."""

import dataclasses

from golden.network import Architecture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights, besides the data and the machine's arithmetic."""

    name: str
    dataset: str                  # "mnist" or "cifar10"
    architecture: Architecture
    batch: int                    # images a step
    steps: int
    learning_rate: float
    warmup: int                   # steps of linear growth of the learning rate
    decay: float                  # share of the steps, at the end, in which it falls to 0
    ema_images: float             # half-life of the weights' average, in images
    ema_ramp: float               # the half-life is at most this share of the images seen
    flip: bool = False            # mirror half of the images
    clip: float = 1.0             # largest norm of the gradient
    seed: int = 0

    def __post_init__(self):
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}")
        for name in ("decay", "ema_ramp"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1 and not 0, not {getattr(self, name)!r}")


# Trains on 2 CPU cores in about 45 minutes. At 32x32 no layer has more than 128 channels in or 64
# out, which is what the buffers of the preset `small` hold.
mnist32 = Recipe(
    name="mnist32",
    dataset="mnist",
    architecture=Architecture(img_channels=1, model_channels=32, channel_mult=(1, 2, 2),
                              num_blocks=1),
    batch=64, steps=4000, learning_rate=1e-3, warmup=100, decay=0.4,
    ema_images=16_000, ema_ramp=0.1,
)

# EDM's network for CIFAR-10 with ReLU; for one GPU.
cifar10 = Recipe(
    name="cifar10",
    dataset="cifar10",
    architecture=Architecture(img_channels=3, model_channels=128, channel_mult=(2, 2, 2),
                              num_blocks=4, attention_resolutions=(16,), middle_attention=True,
                              dropout=0.13),
    batch=512, steps=100_000, learning_rate=1e-3, warmup=5000, decay=0.2,
    ema_images=500_000, ema_ramp=0.05, flip=True,
)

RECIPES = {recipe.name: recipe for recipe in (mnist32, cifar10)}
