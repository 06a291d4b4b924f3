"""Architectures of the published networks, by name, and files of them with random weights.

Sources: Karras et al. 2022 (arXiv 2206.00364), table 7 and the settings published with it for
CIFAR-10, FFHQ and AFHQv2; Dhariwal and Nichol 2021 (arXiv 2105.05233), appendix A, for ADM.

``python -m golden.presets NAME --out FILE`` writes a model with random weights: something to
quantize and profile where no checkpoint is at hand.
"""

import argparse
import dataclasses
import sys

import torch

from golden.checkpoint import save_model
from golden.network import Architecture, Precond

__all__ = ["PRESETS", "random_model"]

DDPMPP = Architecture(
    family="song", img_channels=3, resolution=32, model_channels=128, channel_mult=(2, 2, 2),
    num_blocks=4, attention_resolutions=(16,), middle_attention=True, project_resampled=True,
    activation="silu", dropout=0.13, augment_dim=9)
NCSNPP = dataclasses.replace(
    DDPMPP, embedding="fourier", noise_mult=2, encoder="residual", resample_filter=(1, 3, 3, 1))
DDPMPP_64 = dataclasses.replace(
    DDPMPP, resolution=64, channel_mult=(1, 2, 2, 2), dropout=0.05)
ADM_64 = Architecture(
    family="dhariwal", img_channels=3, resolution=64, model_channels=192,
    channel_mult=(1, 2, 3, 4), num_blocks=3, attention_resolutions=(32, 16, 8),
    middle_attention=True, channels_per_head=64, adaptive_norm=True, norm_eps=1e-5,
    embedding_shift=0, cosine_first=True, activation="silu", dropout=0.10, label_dim=1000)

PRESETS = {
    "mnist32": Architecture(activation="silu"),
    "cifar10-ddpmpp": DDPMPP,
    "cifar10-ncsnpp": NCSNPP,
    "ffhq64-ddpmpp": DDPMPP_64,
    "afhqv2-64": dataclasses.replace(DDPMPP_64, dropout=0.25),
    "imagenet64-adm": ADM_64,
}


def random_model(architecture, seed=0):
    """Precond with random weights of unit gain, in eval mode; no layer starts at zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Precond(architecture)
        for layer in model.unet.layers():
            torch.nn.init.xavier_uniform_(layer.weight)
    return model.eval().requires_grad_(False)


def main(arguments=None):
    """Write a preset's network with random weights; 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m golden.presets",
                                     description="Write a model with random weights.")
    parser.add_argument("name", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--out", required=True, help="model file to write")
    parser.add_argument("--activation", choices=("silu", "relu"), help="in place of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    architecture = PRESETS[options.name]
    if options.activation:
        architecture = dataclasses.replace(architecture, activation=options.activation)
    try:
        save_model(options.out, random_model(architecture, options.seed),
                   {"preset": options.name, "weights": "random", "seed": options.seed})
    except (OSError, ValueError) as error:
        print(f"presets: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
