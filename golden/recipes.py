"""Named recipes: which network is trained on which data, for how long and how."""

import dataclasses

from golden.network import Architecture
from golden.presets import PRESETS

__all__ = ["FineTune", "Recipe", "RECIPES", "changed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune:
    """How a trained network becomes the one of a recipe.

    Members
    -------
    start : recipe whose result is the start, unless the user names a model
    quantized : whether the forward pass rounds weights and activations to the accelerator's formats
    zeros : share of zero codes that the conversion aims at and below which training is penalized,
        over the 4-bit layers, weighted by MACs; None: take what comes
    strength : of that penalty, in EDM losses for one missing code in one
    teacher : weight of the distance to the start's denoised images, beside that to the images
    """

    start: str
    quantized: bool = True
    zeros: float | None = None
    strength: float = 3.0
    teacher: float = 1.0

    def __post_init__(self):
        if self.zeros is not None and not 0 < self.zeros < 1:
            raise ValueError(f"zeros must be in 0..1, both excluded, not {self.zeros!r}")
        if self.zeros is not None and not self.quantized:
            raise ValueError("zeros must be without a target where nothing is quantized")
        for name in ("strength", "teacher"):
            if not 0 <= getattr(self, name) <= 1e3:
                raise ValueError(f"{name} must be in 0..1000, not {getattr(self, name)!r}")


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
    finetune: FineTune | None = None      # from a trained network; None: from random weights

    def __post_init__(self):
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}")
        for name in ("decay", "ema_ramp"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1 and not 0, not {getattr(self, name)!r}")


def relu(architecture):
    """`architecture` with ReLU in place of its activation."""
    return dataclasses.replace(architecture, activation="relu")


def changed(recipe, architecture=None, **changes):
    """`recipe` with fields of its own, of its `FineTune` or of its architecture replaced.

    `architecture` is that of a user's model, which keeps the recipe's activation. Of `changes`,
    "activation" belongs to the architecture; None leaves a field as it is. Without ``quantized``
    there is no target of zeros; ``zeros`` 0 stands for none too.

    Raises ValueError if a recipe that does not fine-tune is given a field of `FineTune`.
    """
    changes = {name: value for name, value in changes.items() if value is not None}
    if architecture is not None:
        recipe = dataclasses.replace(recipe, architecture=dataclasses.replace(
            architecture, activation=recipe.architecture.activation))
    if "activation" in changes:
        recipe = dataclasses.replace(recipe, architecture=dataclasses.replace(
            recipe.architecture, activation=changes.pop("activation")))
    fields = {field.name for field in dataclasses.fields(FineTune)}
    how = {name: changes.pop(name) for name in fields & set(changes)}
    if how:
        if recipe.finetune is None:
            raise ValueError(f"{sorted(how)[0]} must be left out: {recipe.name} trains from random "
                             f"weights")
        if how.get("zeros") == 0 or not how.get("quantized", recipe.finetune.quantized):
            how["zeros"] = None
        recipe = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, **how))
    return dataclasses.replace(recipe, **changes)


# At 32x32 no layer has more than 128 channels in or 64 out, which is what the buffers of the preset
# `small` hold.
mnist32_silu = Recipe(
    name="mnist32-silu",
    dataset="mnist",
    architecture=PRESETS["mnist32"],
    batch=64, steps=3000, learning_rate=1e-3, warmup=100, decay=0.4,
    ema_images=16_000, ema_ramp=0.1,
)

mnist32 = dataclasses.replace(
    mnist32_silu, name="mnist32", architecture=relu(mnist32_silu.architecture),
    steps=400, learning_rate=5e-4, warmup=20, decay=0.7,
    finetune=FineTune(start="mnist32-silu", zeros=0.67),
)

# EDM's DDPM++ for CIFAR-10 at half its width: 14 M parameters and 5 million images, which half an
# hour of one large GPU carries. At full width the same time gives a quarter of the images.
cifar10_silu = Recipe(
    name="cifar10-silu",
    dataset="cifar10",
    architecture=dataclasses.replace(PRESETS["cifar10-ddpmpp"], model_channels=64, augment_dim=0),
    batch=512, steps=10_000, learning_rate=1e-3, warmup=500, decay=0.4,
    ema_images=500_000, ema_ramp=0.05, flip=True,
)

cifar10 = dataclasses.replace(
    cifar10_silu, name="cifar10", architecture=relu(cifar10_silu.architecture),
    steps=1500, learning_rate=3e-4, warmup=50, decay=0.7,
    finetune=FineTune(start="cifar10-silu", zeros=0.67),
)

RECIPES = {recipe.name: recipe for recipe in (mnist32_silu, mnist32, cifar10_silu, cifar10)}
