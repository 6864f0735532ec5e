"""Which bundled model a state dict is of, told by its names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sharpscope.errors import ArgumentError
from sharpscope.zoo import make_model, model_arguments

Shapes = Mapping[str, tuple[int, ...]]

# One input, and the number of classes, of each bundled data set: Fashion-MNIST's files need not be here.
INPUTS: dict[str, tuple[tuple[int, int, int], int]] = {"digits": ((1, 8, 8), 10), "fashion-mnist": ((1, 28, 28), 10)}


@dataclass(frozen=True)
class ZooModel:
    """``make_model(name, **args)`` for each data set in ``data``; ``args`` are those that are not the default."""

    name: str
    args: Mapping[str, Any]
    data: tuple[str, ...]

    @property
    def options(self) -> list[str]:
        """The command line's options for the first of the data sets."""
        given = [f"{key}={_option(value)}" for key, value in self.args.items()]
        return ["--model", self.name, *(["--model-args", *given] if given else []), "--data", self.data[0]]


def recognised(shapes: Shapes) -> ZooModel | None:
    """The bundled model that has exactly these names and shapes for some bundled data set, None where none has."""
    for name, guess in GUESSES.items():
        try:
            args = guess(shapes)
        except (LookupError, ValueError):
            continue
        fitting = tuple(data for data, (shape, classes) in INPUTS.items() if _fits(name, args, shape, classes, shapes))
        if fitting:
            default = model_arguments(name)
            return ZooModel(name, {key: value for key, value in args.items() if value != default[key]}, fitting)
    return None


def _fits(name: str, args: Mapping[str, Any], shape: tuple[int, ...], classes: int, shapes: Shapes) -> bool:
    try:
        with torch.device("meta"):  # shapes alone: no numbers are made
            built = make_model(name, shape=shape, classes=classes, **args).state_dict()
    except ArgumentError:
        return False
    return {key: tuple(value.shape) for key, value in built.items()} == dict(shapes)


def _mlp(shapes: Shapes) -> dict[str, Any]:
    return {"hidden": tuple(shape[0] for key, shape in shapes.items() if key.endswith("weight"))[:-1]}


def _cnn(shapes: Shapes) -> dict[str, Any]:
    kernels = [shape for shape in shapes.values() if len(shape) == 4]
    first_linear, *_ = [shape for shape in shapes.values() if len(shape) == 2]
    return {"channels": tuple(shape[0] for shape in kernels), "hidden": first_linear[0]}


def _wide_resnet(shapes: Shapes) -> dict[str, Any]:
    base = shapes["stem.weight"][0]
    widen = shapes["blocks.0.conv1.weight"][0] // base
    blocks = sum(key.endswith("conv1.weight") for key in shapes)
    return {
        "depth": 2 * blocks + 4,
        "widen": widen,
        "norm": "batch" if "norm.weight" in shapes else "none",
        "base": base,
    }


GUESSES: dict[str, Callable[[Shapes], dict[str, Any]]] = {"mlp": _mlp, "cnn": _cnn, "wide_resnet": _wide_resnet}


def _option(value: Any) -> str:
    """``value`` as ``--model-args`` takes it: (8,) as "8,", which the shell leaves alone."""
    if isinstance(value, tuple) and value:
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value)
