"""Training with EDM's loss (Karras et al. 2022, section 5), resumable at any step."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import pathlib
import subprocess
import time

import rich.progress
import torch

from golden.checkpoint import replace_file, save_model
from golden.data import load, to_float
from golden.network import Precond

P_MEAN, P_STD = -1.2, 1.2
BAD_STEPS = 20      # steps in a row with a loss that is not finite, before giving up


class TrainError(ValueError):
    """Training cannot start or go on; one line."""


def edm_loss(model, images, sigma, noise):
    """EDM's loss of each image: the weighted mean square error of the denoiser.

    The weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 makes the loss of the raw network
    1 at every noise level at the start.

    Parameters
    ----------
    images, noise : (N, C, H, W), images in [-1, 1], unit normal noise
    sigma : (N,)

    Returns (N,).
    """
    weight = (sigma ** 2 + model.sigma_data ** 2) / (sigma * model.sigma_data) ** 2
    denoised = model(images + sigma[:, None, None, None] * noise, sigma)
    return weight * (denoised - images).square().mean((1, 2, 3))


def draw_batch(pixels, recipe, generator):
    """(images, sigma, noise) of one step: random images, lognormal noise levels, unit noise."""
    index = torch.randint(len(pixels), (recipe.batch,), generator=generator)
    images = to_float(pixels[index])
    if recipe.flip:
        mirrored = torch.rand(recipe.batch, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    sigma = (torch.randn(recipe.batch, generator=generator) * P_STD + P_MEAN).exp()
    return images, sigma, torch.randn(images.shape, generator=generator)


def learning_rate(recipe, step, steps):
    """Learning rate of `step` (from 0) of `steps`: linear warm-up, constant, linear fall to 0.

    Before the fall it does not depend on `steps`: a run may be resumed with another number.
    """
    decay = max(1, round(recipe.decay * steps))
    return recipe.learning_rate * min(1, (step + 1) / max(1, recipe.warmup),
                                      (steps - step) / decay)


def ema_weight(recipe, step):
    """Share of the old average that `step` (from 0) keeps."""
    half_life = min(recipe.ema_images, recipe.ema_ramp * (step + 1) * recipe.batch)
    return 0.5 ** (recipe.batch / max(half_life, 1e-8))


def commit_hash():
    """Hash of the commit that this code is at, or None outside git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                              cwd=pathlib.Path(__file__).parent, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class Trainer:
    """The state of a run, and one step of it.

    All random numbers but dropout's come from one CPU generator, so that a run draws the same
    images and noise on every device.

    Members
    -------
    origin : JSON values that the run depends on besides recipe and data, kept in the model's record
    measures : numbers of the last step for the metrics file, besides the loss
    """

    def __init__(self, recipe, pixels, steps, device):
        self.recipe, self.pixels, self.steps, self.device = recipe, pixels, steps, device
        torch.manual_seed(recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.model = Precond(recipe.architecture).to(device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.learning_rate,
                                          betas=(0.9, 0.99))
        self.step = 0
        self.bad_steps = 0
        self.loss = math.nan        # mean with a half-life of about 70 steps
        self.commit = commit_hash()
        self.digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        self.origin, self.measures = {}, {}

    def objective(self, images, sigma, noise):
        """What a step makes smaller, a scalar, and the EDM loss of the batch."""
        loss = edm_loss(self.model, images, sigma, noise).mean()
        return loss, loss

    def advance(self):
        """One step; returns (loss, gradient norm). A step that is not finite changes no weight.

        Raises TrainError after 20 such steps in a row.
        """
        images, sigma, noise = (tensor.to(self.device) for tensor in
                                draw_batch(self.pixels, self.recipe, self.generator))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.step, self.steps)
        # bf16 helps on a GPU; on CPU cores with AVX-512 BF16, float32 measured 1.4 times faster.
        cast = (torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda"
                else contextlib.nullcontext())
        self.model.train()
        with cast:
            objective, loss = self.objective(images.to(memory_format=torch.channels_last), sigma,
                                             noise)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        loss, norm = loss.item(), norm.item()
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.average()
            self.loss = loss if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * loss
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            if self.bad_steps >= BAD_STEPS:
                raise TrainError(f"loss must be finite, not {loss!r} for {BAD_STEPS} steps "
                                 f"up to step {self.step}")
        self.step += 1
        return loss, norm

    @torch.no_grad()
    def average(self):
        """Move the averaged weights towards the present ones."""
        keep = ema_weight(self.recipe, self.step)
        for mean, value in zip(self.ema.parameters(), self.model.parameters()):
            mean.lerp_(value, 1 - keep)

    def identity(self):
        """What a resumed run must share with the saved one, besides the number of steps."""
        fields = dataclasses.asdict(self.recipe)
        del fields["steps"]
        return json.dumps({"recipe": fields, "data": self.digest, **self.origin}, sort_keys=True)

    def own_state(self):
        """What `load_own_state` needs besides weights and generators: tensors by name."""
        return {}

    def load_own_state(self, state):
        """Take over what `own_state` returned."""

    def save_state(self, path):
        """Write everything that `load_state` needs to go on exactly, atomically."""
        state = {
            "identity": self.identity(), "step": self.step, "bad_steps": self.bad_steps,
            "loss": self.loss, "commit": self.commit,
            "model": self.model.state_dict(), "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(), "cpu_random": torch.get_rng_state(),
            "cuda_random": (torch.cuda.get_rng_state(self.device)
                            if self.device.type == "cuda" else None),
            "own": self.own_state(),
        }
        replace_file(path, lambda temporary: torch.save(state, temporary))

    def load_state(self, path):
        """Go on from a state file; TrainError if it is damaged or of another run."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except Exception as error:   # a damaged file can raise anything
            raise TrainError(f"{path}: must be a training state "
                             f"({type(error).__name__})") from None
        if identity != self.identity():
            raise TrainError(f"{path}: must be a state of the same recipe, data and start; "
                             f"choose another folder or train without resuming")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["cpu_random"])
        if state["cuda_random"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
        self.step, self.bad_steps = state["step"], state["bad_steps"]
        self.loss, self.commit = state["loss"], state["commit"]
        self.load_own_state(state["own"])

    def save_average(self, path):
        """Write the averaged weights as a float model."""
        loss = None if math.isnan(self.loss) else round(self.loss, 5)
        save_model(path, self.ema, {
            "recipe": self.recipe.name, "data": self.recipe.dataset, "images": len(self.pixels),
            "steps": self.step, "of_steps": self.steps, "batch": self.recipe.batch,
            "seed": self.recipe.seed, "loss": loss, "commit": self.commit, **self.origin,
        })


def keep_metrics(path, step):
    """Keep the lines of the metrics file `path` up to `step`, as a resumed run repeats the rest."""
    lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept))


def train(recipe, data=None, out="build/train", resume=False, steps=None, device=None,
          save_seconds=300, pixels=None, start=None):
    """Train `recipe` and return the path of the averaged model.

    Writes into the folder ``out/<recipe name>``: ``state.pt`` (to resume from), ``ema.safetensors``
    (the averaged weights so far), both every `save_seconds`, ``metrics.jsonl`` (a line per 20
    steps), and at the end ``<recipe name>.safetensors``. A run that is interrupted with Ctrl-C
    saves its state first. On a CPU a resumed run gives the weights of an uninterrupted one, bit
    for bit.

    Parameters
    ----------
    recipe : Recipe
    data : folder of the data set, or None for SQDM_DATA
    resume : go on from ``state.pt``; without it a state that is there is an error
    steps : number of steps in all, or None for the recipe's
    device : "cpu", "cuda" or None for the GPU if there is one
    pixels : (N, C, H, W) uint8 to train on in place of the recipe's data set
    start : golden.finetune.Start, for a recipe that fine-tunes and for no other

    Raises
    ------
    TrainError
        If the folder already holds a run and `resume` is false, or holds none or another one and
        it is true; if the device is not there; if the loss stays not finite; if the start does not
        fit the recipe.
    DataError
        If the data folder lacks a file.
    """
    steps = recipe.steps if steps is None else steps
    if steps < 1:
        raise TrainError(f"steps must be positive, not {steps!r}")
    if (recipe.finetune is None) != (start is None):
        raise TrainError(f"start must be a model for a recipe that fine-tunes, and for no other: "
                         f"{recipe.name} {'does not' if recipe.finetune is None else 'does'}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainError("device must be cpu: torch finds no GPU here")
    folder = pathlib.Path(out) / recipe.name
    state, average = folder / "state.pt", folder / "ema.safetensors"
    final, metrics = folder / f"{recipe.name}.safetensors", folder / "metrics.jsonl"
    if resume and not state.is_file():
        raise TrainError(f"{state}: must exist to resume from")
    if not resume and state.exists():
        raise TrainError(f"{state}: is there already; resume, or choose another folder")
    if pixels is None:
        pixels = load(recipe.dataset, data).pixels
    check_pixels(recipe, pixels)
    if start is None:
        trainer = Trainer(recipe, pixels, steps, device)
    else:
        from golden.finetune import FineTuner   # which builds on this module

        trainer = FineTuner(recipe, pixels, steps, device, start)
    if resume:
        trainer.load_state(state)
        if trainer.step > steps:
            raise TrainError(f"steps must be at least {trainer.step}, those already done, "
                             f"not {steps!r}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keep_metrics(metrics, trainer.step)
    except OSError as error:
        raise TrainError(f"{folder}: must be a folder to write into ({error.strerror})") from None

    def save():
        trainer.save_state(state)
        trainer.save_average(average)

    columns = (*rich.progress.Progress.get_default_columns(),
               rich.progress.TextColumn("loss {task.fields[loss]:.4f}"))
    saved = mark = time.monotonic()
    with open(metrics, "a") as log, rich.progress.Progress(*columns) as progress:
        task = progress.add_task(recipe.name, total=steps, completed=trainer.step,
                                 loss=trainer.loss)
        try:
            while trainer.step < steps:
                loss, norm = trainer.advance()
                progress.update(task, completed=trainer.step, loss=trainer.loss)
                if trainer.step % 20 == 0 or trainer.step == steps:
                    now = time.monotonic()
                    log.write(json.dumps({
                        "step": trainer.step, "loss": round(loss, 6),
                        "mean_loss": round(trainer.loss, 6), "gradient_norm": round(norm, 4),
                        "learning_rate": learning_rate(recipe, trainer.step - 1, steps),
                        **{name: round(value, 5) for name, value in trainer.measures.items()},
                        "seconds_20_steps": round(now - mark, 2)}) + "\n")
                    log.flush()
                    mark = now
                if time.monotonic() - saved > save_seconds:
                    save()
                    saved = time.monotonic()
        except KeyboardInterrupt:
            save()
            raise
    save()
    trainer.save_average(final)
    return final


def check_pixels(recipe, pixels):
    """Raise a TrainError unless images of the shape of `pixels` enter the recipe's network."""
    a = recipe.architecture
    shape = (a.img_channels, a.resolution, a.resolution)
    if tuple(pixels.shape[1:]) != shape:
        raise TrainError(f"images must be of shape {shape} for this network, "
                         f"not {tuple(pixels.shape[1:])!r}")
