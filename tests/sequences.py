"""Random sequences with their labels, few and short enough for a dense Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

COUNT, LENGTH, WIDTH, CLASSES = 12, 5, 3, 3


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, *shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def lengths(seed: int) -> Tensor:
    return torch.randint(1, LENGTH + 1, (COUNT,), generator=torch.Generator().manual_seed(seed))


def tokens() -> tuple[Tensor, Tensor]:
    found = labels(10, COUNT, LENGTH, classes=6) + 1
    return found.masked_fill(torch.arange(LENGTH) >= lengths(11)[:, None], 0), labels(12, COUNT)
