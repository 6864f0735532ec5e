"""Naming the example whose loss or derivatives are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sharpscope.errors import DataError
from sharpscope.objective.batches import MicroBatch, leaves
from sharpscope.objective.sums import Sums


def blame(parts: Iterable[MicroBatch], work: Callable[[MicroBatch], Sums], curvature: str) -> None:
    """Raise DataError for the first of ``parts`` whose data, or whose sums ``work(part)``, are not finite.

    ``curvature`` is what the products are called.
    """
    for part in parts:
        where = part.where(0) if part.size == 1 else f"batch {part.pieces[0][0]}"
        if any(isinstance(leaf, Tensor) and not bool(torch.isfinite(leaf).all()) for leaf in leaves(part.batch)):
            raise DataError(f"The data must be finite, but {where} holds NaN or infinity. Drop or mend it.")
        sums = work(part)
        for name, value in (("loss", sums.loss), ("gradient", sums.gradient), (curvature, sums.products)):
            if not bool(torch.isfinite(value).all()):
                raise DataError(f"The {name} must be finite, but that of {where} is NaN or infinite at these weights.")
    raise DataError("Loss and derivatives must be finite: those of each example are, but not their sum. Lift dtype.")
