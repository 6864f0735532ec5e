"""A labelled set of images in memory, and label noise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError


# eq=False: == on tensors has no single truth value.
@dataclass(frozen=True, eq=False)
class DataSet:
    """One split of a data set: ``inputs`` float32 (N, C, H, W), ``targets`` int64 (N,) in ``[0, classes)``."""

    inputs: Tensor
    targets: Tensor
    classes: int
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input, (C, H, W)."""
        return tuple(self.inputs.shape[1:])


def with_label_noise(data: DataSet, fraction: float, seed: int) -> DataSet:
    """``data`` with exactly ``round(fraction * N)`` labels replaced, each by another class, uniformly drawn.

    The same seed and fraction always corrupt the same examples in the same way. (Symmetric noise as in Foret et
    al. 2021, section 3.3, except that the count is exact and a replaced label is never the true one.)

    Raises: ArgumentError unless ``0 <= fraction <= 1``.
    """
    if not 0 <= fraction <= 1:
        raise ArgumentError(f"label_noise must be a fraction from 0 to 1, got {fraction!r}.")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data), generator=generator)[: round(fraction * len(data))]
    shift = torch.randint(1, data.classes, (len(chosen),), generator=generator)
    targets = data.targets.clone()
    targets[chosen] = (targets[chosen] + shift) % data.classes
    return dataclasses.replace(data, targets=targets)
