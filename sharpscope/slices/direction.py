"""A direction in weight space, and planes that directions span."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.files import atomic
from sharpscope.results.serialization import UNREADABLE, plain

# Less than this share of a vector left outside the others is rounding: it lies in their span.
INDEPENDENT = 1e-6


@dataclass(frozen=True, eq=False)
class Direction:
    """``d`` of the line ``w + t d``.

    Attributes:
        vector: d (n,), float64 on the CPU, in the parameters' flat order.
        label: what its axis is called.
        settings: everything that it depends on beside the weights: kind, normalisation, seed, ...
        statistics: by the name of the buffer, by how much BatchNorm's running statistics change at t = 1; empty where
            the direction leads to no other network.

    >>> import torch
    >>> from sharpscope.slices import Direction
    >>> Direction(torch.tensor([3.0, 4.0], dtype=torch.float64), "mine").length
    5.0
    """

    vector: Tensor
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vector.dim() != 1 or self.vector.dtype != torch.float64 or self.vector.device.type != "cpu":
            came = f"{self.vector.dtype} {tuple(self.vector.shape)} on {self.vector.device}"
            raise ArgumentError(f"A direction must be a float64 vector on the CPU, got {came}. Use .cpu().double().")
        if not 0 < self.length < math.inf:
            raise ArgumentError(f"The direction {self.label} must be finite and not zero, got length {self.length:g}.")

    @property
    def length(self) -> float:
        """``||d||_2``."""
        return float(torch.linalg.vector_norm(self.vector))


def cosine(one: Direction, two: Direction) -> float:
    """The cosine of the angle between two directions."""
    return float(one.vector / one.length @ (two.vector / two.length))


def orthonormal(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Orthonormal float64 vectors, the first k of which span what the first k given span.

    Gram-Schmidt, twice: "twice is enough" (Giraud et al. 2005).

    Raises: ArgumentError where one lies in the span of those before it.
    """
    done: list[Tensor] = []
    for i, vector in enumerate(vectors):
        length = float(torch.linalg.vector_norm(vector))
        rest = vector.double() / length if length else vector
        for _ in range(2):
            for axis in done:
                rest = rest - (axis @ rest) * axis
            left = float(torch.linalg.vector_norm(rest))
            if not left > INDEPENDENT:
                raise ArgumentError(
                    f"Directions must not lie in each other's span, but direction {i + 1} is "
                    f"{'zero' if not length else 'a combination of those before it'}. Name others."
                )
            rest = rest / left
        done.append(rest)
    return done


def signed(vector: Tensor) -> Tensor:
    """``vector`` or its negative, whichever has its largest component positive: the same picture on every machine."""
    return vector if float(vector[vector.abs().argmax()]) > 0 else -vector


def orthonormalised(directions: Sequence[Direction]) -> list[Direction]:
    """The same plane with axes of length 1 at right angles, the first along the first of ``directions``.

    A line to a network no longer ends at it at t = 1, and is no longer called so.

    Raises: ArgumentError where one lies in the span of those before it.

    >>> import torch
    >>> from sharpscope.slices import Direction, orthonormalised
    >>> pair = [Direction(v, "mine") for v in torch.tensor([[2.0, 0.0], [1.0, 3.0]], dtype=torch.float64)]
    >>> [d.vector.tolist() for d in orthonormalised(pair)]
    [[1.0, 0.0], [0.0, 1.0]]
    """
    axes = orthonormal([d.vector for d in directions])
    return [
        replace(
            d,
            vector=axis,
            label=d.label if i == 0 else f"{d.label}, across",
            settings={
                **d.settings,
                "kind": "plane" if d.settings.get("kind") == "checkpoint" else d.settings.get("kind"),
            },
            statistics={},
        )
        for i, (d, axis) in enumerate(zip(directions, axes, strict=True))
    ]


def coordinates(vector: Tensor, directions: Sequence[Direction]) -> tuple[list[float], float]:
    """The ``c`` that makes ``||vector - sum_k c_k d_k||_2`` least, and that distance.

    The directions need be neither orthogonal nor of length 1.
    """
    lengths = [d.length for d in directions]
    basis = torch.stack([d.vector / length for d, length in zip(directions, lengths, strict=True)])
    scaled = torch.linalg.solve(basis @ basis.T, basis @ vector)
    rest = vector - scaled @ basis
    return [float(c) / length for c, length in zip(scaled, lengths, strict=True)], float(torch.linalg.vector_norm(rest))


def write_directions(path: str | os.PathLike[str], directions: Sequence[Direction], asked: Mapping[str, Any]) -> None:
    """Keep ``directions`` in the file ``path``, unless another process has kept its own for the same ``asked``.

    Raises: OutputError when it cannot be written.

    >>> import torch
    >>> from sharpscope.slices import Direction, read_directions, write_directions
    >>> write_directions("kept.npz", [Direction(torch.ones(2, dtype=torch.float64), "mine")], {"seed": 0})
    >>> [d.label for d in read_directions("kept.npz", {"seed": 0})]
    ['mine']
    """
    place = Path(path)
    about = [{"label": d.label, "settings": dict(d.settings)} for d in directions]
    text = np.frombuffer(json.dumps({"asked": _plain(asked), "directions": _plain(about)}).encode(), np.uint8)
    mine = place.with_name(f"{place.stem}-{os.getpid()}.npz")
    try:
        with atomic(mine) as temporary, open(temporary, "wb") as file:
            np.savez(file, text, *(d.vector.numpy() for d in directions))
        if place.exists() and read_directions(place, asked) is None:
            os.replace(mine, place)
            return
        with contextlib.suppress(FileExistsError):
            os.link(mine, place)  # which, unlike a rename, leaves the file of whoever was first
    finally:
        mine.unlink(missing_ok=True)


def read_directions(path: str | os.PathLike[str], asked: Mapping[str, Any]) -> list[Direction] | None:
    """What ``write_directions`` kept for ``asked``; None where there is nothing, or of something else.

    >>> import torch
    >>> from sharpscope.slices import Direction, read_directions, write_directions
    >>> write_directions("kept.npz", [Direction(torch.ones(2, dtype=torch.float64), "mine")], {"seed": 0})
    >>> read_directions("kept.npz", {"seed": 1}) is None
    True
    """
    try:
        with np.load(path) as arrays:
            kept = json.loads(arrays["arr_0"].tobytes())
            if kept["asked"] != _plain(asked):
                return None
            vectors = [torch.from_numpy(arrays[f"arr_{i + 1}"]) for i in range(len(kept["directions"]))]
    except (*UNREADABLE, UnicodeDecodeError):
        return None
    return [Direction(v, d["label"], d["settings"]) for v, d in zip(vectors, kept["directions"], strict=True)]


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    return json.loads(json.dumps(plain(value)))
