"""The bundled architectures and data sets, by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from sharpscope.errors import ArgumentError, nearest
from sharpscope.zoo.data import DataSet, digits, fashion_mnist, with_label_noise
from sharpscope.zoo.networks import cnn, mlp, wide_resnet

__all__ = ["DATASETS", "MODELS", "DataSet", "load_data", "make_model", "model_arguments"]

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn, "wide_resnet": wide_resnet}
DATASETS: dict[str, Callable[[str, str | os.PathLike[str] | None], DataSet]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
}
SPLITS = ("train", "test")

Entry = TypeVar("Entry")


def model_arguments(name: str, /, **args: Any) -> dict[str, Any]:
    """Every argument that ``make_model(name, **args)`` builds with, defaults filled in, sequences as tuples.

    Raises: ArgumentError for an unknown model, an argument it does not take, or a value of the wrong kind.
    """
    parameters = inspect.signature(_look_up("model", MODELS, name)).parameters
    for key in args:
        if key not in parameters:
            raise ArgumentError(f"Model {name!r} has no argument {key!r}; it takes {', '.join(parameters)}.")
    return {key: _checked(name, key, args.get(key, p.default), p.default) for key, p in parameters.items()}


def make_model(name: str, /, *, seed: int | None = None, **args: Any) -> nn.Module:
    """The bundled model ``name``, freshly initialised; the global random state is left as it was.

    Args:
        name: a key of ``MODELS``.
        seed: seeds the initial weights; None draws them from the global random state as it stands, without
            moving it on.
        args: arguments of the architecture; what is missing has its default.

    Raises: ArgumentError for an unknown model, an argument it does not take, or a value that it cannot have.
    """
    full = model_arguments(name, **args)
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            # Not torch.manual_seed, which would reseed the accelerators, whose state is not forked here.
            torch.default_generator.manual_seed(seed)
        return MODELS[name](**full)


def load_data(
    name: str,
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    label_noise: float = 0.0,
    noise_seed: int = 0,
) -> DataSet:
    """One split of the bundled data set ``name``.

    Args:
        name: a key of ``DATASETS``.
        split: "train" or "test".
        root: the folder to read from, for a set that is read from files.
        label_noise: the fraction of training labels replaced by another class; the test labels stay true.
        noise_seed: decides which labels are replaced, and by what.

    Raises: ArgumentError for an unknown name or split, or a fraction outside [0, 1]; DataError when the set is
        missing or damaged.
    """
    loader = _look_up("data set", DATASETS, name)
    if split not in SPLITS:
        raise ArgumentError(f"split must be 'train' or 'test', got {split!r}.")
    data = loader(split, root)
    return with_label_noise(data, label_noise, noise_seed) if split == "train" and label_noise else data


def _look_up(kind: str, table: Mapping[str, Entry], name: str) -> Entry:
    if name not in table:
        raise ArgumentError(nearest(kind, str(name), table))
    return table[name]


def _checked(model: str, key: str, value: Any, default: Any) -> Any:
    """``value`` if it is of its default's kind: a name, a size of at least 1, or several sizes."""
    if isinstance(default, str):
        wanted, valid = "a name", isinstance(value, str)
    elif isinstance(default, int):
        wanted, valid = "an integer of at least 1", _is_size(value)
    else:
        wanted, valid = "integers of at least 1", isinstance(value, (tuple, list)) and all(map(_is_size, value))
        if key == "shape":
            wanted, valid = "three integers (channels, height, width)", valid and len(value) == 3
    if not valid:
        raise ArgumentError(f"{key} of model {model!r} must be {wanted}, got {value!r}.")
    return tuple(value) if isinstance(value, (tuple, list)) else value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
