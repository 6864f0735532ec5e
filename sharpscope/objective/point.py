"""Loss and gradient at w from one full pass, and their agreement with the pass before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import AuditError, DataError
from sharpscope.objective.sums import Sums
from sharpscope.objective.terms import LossTerms


@dataclass(frozen=True)
class Point:
    """What one pass over all the data says of w, weight decay included.

    Attributes:
        loss: ``L(w)``.
        gradient: (n,) of L.
        spread: what rounding errors of the gradient are relative to.
        examples: their number.
    """

    loss: float
    gradient: Tensor
    spread: float
    examples: int


def point_of(sums: Sums, terms: LossTerms) -> Point:
    """The means of ``sums``, and weight decay.

    Raises: DataError when there is nothing to take the mean of.
    """
    weight = float(sums.weight)
    if weight <= 0:
        raise DataError(
            f"The loss must have terms of positive total weight, got {weight:g}: every target is ignored, "
            "or the class weights are zero."
        )
    loss, gradient, decay = float(sums.loss) / weight, sums.gradient / weight, terms.problem.weight_decay
    if decay:
        loss += terms.decay()
        gradient += decay * torch.cat([p.detach().reshape(-1) for p in terms.params])
    return Point(loss, gradient, float(sums.spread) / weight, sums.examples)


def require_same_point(before: Point, now: Point) -> None:
    """Two passes over the same data must agree.

    Raises: AuditError.
    """
    if now.examples != before.examples:
        raise AuditError(
            f"Every pass must see the same data, but one had {before.examples} examples and the next "
            f"{now.examples}. Fix the loader's order and length."
        )
    # The order of summation is the same in every pass, so only nondeterministic kernels may differ.
    eps = torch.finfo(now.gradient.dtype).eps
    apart = float(torch.linalg.vector_norm(now.gradient - before.gradient))
    moved = abs(now.loss - before.loss) > 1e-3 * abs(before.loss) + 1e3 * eps
    if moved or apart > 1e3 * eps * max(now.spread, before.spread):
        raise AuditError(
            f"Every pass must see the same loss, but it was {before.loss:.6g} and is {now.loss:.6g} and the gradient "
            f"moved by {apart:.2g}: the data change from pass to pass. Turn off shuffling and augmentation."
        )
