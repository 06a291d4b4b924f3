"""Tiny networks of every family, with random weights."""

import dataclasses

from golden.presets import PRESETS, random_model

TINY = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "resolution": 8,
        "attention_resolutions": (4,), "dropout": 0.0}
ARCHITECTURES = {
    "relu": dataclasses.replace(PRESETS["mnist32"], **TINY, activation="relu"),
    "silu": dataclasses.replace(PRESETS["mnist32"], **TINY),
    "residual": dataclasses.replace(PRESETS["cifar10-ncsnpp"], **TINY, augment_dim=0),
    "skip": dataclasses.replace(PRESETS["cifar10-ncsnpp"], **TINY, encoder="skip", decoder="skip",
                                augment_dim=0),
    "adm": dataclasses.replace(PRESETS["imagenet64-adm"], **TINY, channels_per_head=8, label_dim=5),
    "diffusers": dataclasses.replace(PRESETS["mnist32"], **TINY, family="diffusers",
                                     prediction="epsilon"),
}


def make(name):
    """A Precond of the architecture `name`."""
    return random_model(ARCHITECTURES[name])
