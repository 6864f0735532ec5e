"""Sums over the same examples must agree, however often they are taken and wherever the batches are cut."""

from __future__ import annotations

import torch
from torch import nn

from sharpscope.errors import AuditError, ProblemError
from sharpscope.objective import Objective
from sharpscope.objective.accumulate import Sums
from sharpscope.objective.data import MicroBatch


def require_repeatable(objective: Objective, one: Sums, two: Sums, tolerance: float) -> None:
    """Two sums over the same examples must agree, or the loss is no fixed function of the weights.

    Raises: AuditError naming the likely cause.
    """
    moved = float(torch.linalg.vector_norm(one.gradient - two.gradient))
    changed = abs(float(one.loss - two.loss)) > tolerance * max(abs(float(one.loss)), float(one.spread))
    if not changed and moved <= tolerance * float(one.spread):
        both = min(len(one.products), len(two.products))
        p, q = one.products[:both], two.products[:both]
        if float((p - q).norm()) > tolerance * float(p.norm()):
            raise AuditError(
                f"Products with the {objective.curvature.title} must repeat, but two with the same vector differ while "
                "the losses agree. Turn on torch.use_deterministic_algorithms."
            )
        return
    dropout = nn.modules.dropout._DropoutNd
    dropping = [name for name, m in objective.terms.model.named_modules() if isinstance(m, dropout) and m.training]
    cause = (
        f"dropout is on in {dropping[0]} ({len(dropping)} in all). Measure in mode 'eval', or set its p to 0"
        if dropping
        else "the model draws random numbers, as F.dropout without training=self.training does, or changes its "
        "own buffers. Turn that off"
    )
    raise AuditError(
        f"The same batch must give the same loss twice, but it gave {float(one.loss):.6g} and {float(two.loss):.6g} in "
        f"sum and the gradient moved by {moved:.2g}: {cause}."
    )


def require_additive(
    objective: Objective, whole: MicroBatch, tolerance: float, block: torch.Tensor | None = None
) -> None:
    """Loss, gradient and products of a batch must be the sums over its halves, or micro-batches would change them.

    Raises: ProblemError.
    """
    if not whole.splittable or whole.size < 2:
        return
    block = objective.no_vectors() if block is None else block
    half = whole.size // 2
    one = objective.accumulate([whole], block)
    two = objective.accumulate([whole.part(0, half), whole.part(half, whole.size)], block)
    require_same(one, two, "halves", tolerance)


def require_same(one: Sums, two: Sums, parts: str, tolerance: float) -> None:
    """Two sums over the same examples, cut differently, must give one mean loss, gradient and curvature.

    Raises: ProblemError.
    """
    if not float(one.weight) or not float(two.weight):
        return
    (a, g), (b, h) = ((float(s.loss / s.weight), s.gradient / s.weight) for s in (one, two))
    spread = max(float(s.spread / s.weight) for s in (one, two))
    if abs(a - b) > tolerance * max(abs(a), 1e-3) or float((g - h).norm()) > tolerance * spread:
        raise ProblemError(
            f"The mean loss of a batch must be the weighted mean over its parts, but over the same examples it is "
            f"{a:.9g} and, cut into other {parts}, {b:.9g}. If the loss is a sum, or a mean over tokens, give it a "
            "terms(batch) method and return the mean; if examples in a batch depend on each other, or do not lie along "
            "its first dimension, pass micro_batch='loader'."
        )
    (p, q) = (s.products / s.weight for s in (one, two))
    if float((p - q).norm()) > tolerance * max(float(p.norm()), float(q.norm())):
        raise ProblemError(
            "The curvature of a batch must be the weighted mean over its parts, but products with it change when it is "
            "cut. If examples in a batch depend on each other, pass micro_batch='loader'."
        )
