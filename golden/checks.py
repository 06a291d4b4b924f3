"""Checks of arguments: kind by TypeError, range and shape by ValueError, each naming its rule."""

import math

import torch

__all__ = ["boolean", "integer", "integers", "floats"]


def boolean(name, value):
    """`value` if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {value!r}")
    return value


def integer(name, value, low, high):
    """`value` if it is an int in `low`..`high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, not {value!r}")
    return value


def integers(name, value, low=None, high=None, shape=None):
    """`value` as an int64 tensor, if it is an integer tensor whose elements are in `low`..`high`.

    `shape` is a tuple in which None stands for any size; without it any shape will do.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of integers, not {value!r}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of integers, not {value.dtype!r}")
    check_shape(name, value, shape)
    value = value.to(torch.int64)
    if value.numel() and low is not None:
        for extreme in (int(value.min()), int(value.max())):
            if not low <= extreme <= high:
                raise ValueError(f"{name} must be in {low}..{high}, not {extreme!r}")
    return value


def floats(name, value, shape=None):
    """`value` if it is a tensor of finite floating point numbers."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor of floats, not {value!r}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a tensor of floats, not {value.dtype!r}")
    check_shape(name, value, shape)
    # A finite sum has finite terms, and takes a tenth of the time of looking at each.
    if not math.isfinite(value.detach().sum()) and not torch.isfinite(value).all():
        bad = value[~torch.isfinite(value)].flatten()[0].item()
        raise ValueError(f"{name} must be finite, not {bad!r}")
    return value


def check_shape(name, value, shape):
    """Raise unless `value` has the sizes of `shape`, where None stands for any."""
    if shape is None:
        return
    actual = tuple(value.shape)
    if len(actual) != len(shape) or any(
            size not in (None, given) for size, given in zip(shape, actual, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be of shape ({wanted}), not {actual!r}")
