"""Bundled models and data sets, by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from sharpscope.errors import ArgumentError, nearest
from sharpscope.random_streams import derived_seed
from sharpscope.zoo.data import NOISE_VERSION, DataSet, digits, fashion_mnist, with_label_noise
from sharpscope.zoo.networks import cnn, mlp, wide_resnet

__all__ = ["DATASETS", "MODELS", "NOISE_VERSION", "DataSet", "load_data", "make_model", "model_arguments"]

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn, "wide_resnet": wide_resnet}
DATASETS: dict[str, Callable[[str, str | os.PathLike[str] | None], DataSet]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
}
SPLITS = ("train", "test")

Entry = TypeVar("Entry")


def model_arguments(name: str, /, **args: Any) -> dict[str, Any]:
    """Return all arguments of ``make_model(name, **args)``, including defaults, with sequences as tuples.

    Raises: ArgumentError for an unknown model, an argument it does not take, or a value of the wrong type.
    """
    parameters = inspect.signature(_look_up("model", MODELS, name)).parameters
    for key in args:
        if key not in parameters:
            raise ArgumentError(f"Model {name!r} has no argument {key!r}; it takes {', '.join(parameters)}.")
    return {key: _checked(name, key, args.get(key, p.default), p.default) for key, p in parameters.items()}


def make_model(name: str, /, *, seed: int | None = None, **args: Any) -> nn.Module:
    """Create the bundled model ``name`` with initial weights; the global random state is preserved.

    Args:
        name: a key of ``MODELS``.
        seed: seed of the initial weights; None draws them from the current global random state.
        args: arguments of the architecture.

    Raises: ArgumentError for an unknown model, an argument it does not take, or an invalid value.
    """
    full = model_arguments(name, **args)
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            # torch.manual_seed would also reseed the accelerators, whose state is not forked here.
            torch.default_generator.manual_seed(derived_seed(seed, "weights"))
        return MODELS[name](**full)


def load_data(
    name: str,
    split: str = "train",
    *,
    root: str | os.PathLike[str] | None = None,
    label_noise: float = 0.0,
    noise_seed: int = 0,
    noise_version: int = NOISE_VERSION,
) -> DataSet:
    """Load one split of the bundled data set ``name``.

    Args:
        name: a key of ``DATASETS``.
        split: "train" or "test".
        root: folder of a data set that is read from files.
        label_noise: fraction of training labels replaced by another class; test labels are not changed.
        noise_seed: seed of the label noise.
        noise_version: how the noise is drawn; 1 for the labels of sharpscope 0.1.0.

    Raises: ArgumentError for an unknown name or split, or a fraction outside [0, 1]; DataError if the data set is
        missing or damaged.
    """
    loader = _look_up("data set", DATASETS, name)
    if split not in SPLITS:
        raise ArgumentError(f"split must be 'train' or 'test', got {split!r}.")
    data = loader(split, root)
    return with_label_noise(data, label_noise, noise_seed, noise_version) if split == "train" and label_noise else data


def _look_up(kind: str, table: Mapping[str, Entry], name: str) -> Entry:
    if name not in table:
        raise ArgumentError(nearest(kind, str(name), table))
    return table[name]


def _checked(model: str, key: str, value: Any, default: Any) -> Any:
    """Return ``value``, a sequence as a tuple, if it has the type of ``default``: a name, a size >= 1, or sizes."""
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
