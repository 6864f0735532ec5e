"""Loss, gradient and curvature products summed over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.objective.batches import MicroBatch
from sharpscope.objective.derivatives import Graph
from sharpscope.objective.memory import Room
from sharpscope.objective.partwise import Partwise, PartwiseRecord
from sharpscope.params import views
from sharpscope.precision import wide


@dataclass(frozen=True)
class Sums:
    """Sums over examples, not means.

    Attributes:
        loss: ``sum_i a_i l_i``, and ``weight``: ``sum_i a_i``, both in float64 where the device has it.
        gradient: (n,), and ``products``: (K, n), of the loss.
        spread: the sum of the micro-batches' gradient norms: what rounding errors of the gradient are relative to.
        examples: their number.
        partwise: the same part by part, where asked for.
    """

    loss: Tensor
    weight: Tensor
    gradient: Tensor
    products: Tensor
    spread: Tensor
    examples: int
    partwise: Partwise | None = None

    @property
    def finite(self) -> bool:
        """Whether loss, gradient and products are all finite."""
        return all(bool(torch.isfinite(t).all()) for t in (self.loss, self.gradient, self.products))


@dataclass(frozen=True)
class _Part:
    """What one micro-batch adds to the sums, complete before any of it is added."""

    loss: Tensor
    weight: Tensor
    gradient: list[Tensor]
    rows: Tensor
    examples: int


class PointSum:
    """Loss and gradient (n,) of one micro-batch after another, for vectors like the rows of ``block``."""

    def __init__(self, block: Tensor) -> None:
        self.examples = 0
        self._gradient = torch.zeros(block.shape[1], dtype=block.dtype, device=block.device)
        self._loss = torch.zeros((), dtype=wide(block.device), device=block.device)
        self._weight, self._spread = torch.zeros_like(self._loss), torch.zeros_like(self._loss)

    def add(self, loss: Tensor, weight: Tensor, gradient: Sequence[Tensor], examples: int) -> None:
        """One micro-batch's sums."""
        torch._foreach_add_(views(self._gradient, gradient), list(gradient))
        self._loss += loss
        self._weight += weight
        self._spread += torch.stack(torch._foreach_norm(list(gradient))).to(self._loss).norm()
        self.examples += examples

    def sums(self, products: Tensor, partwise: Partwise | None = None) -> Sums:
        """Everything added so far, beside the products."""
        return Sums(self._loss, self._weight, self._gradient, products, self._spread, self.examples, partwise)


def accumulate(
    graph: Callable[[MicroBatch, bool], Graph],
    parts: Iterable[MicroBatch],
    block: Tensor,
    room: Room,
    progress: Callable[[int], None] | None = None,
    partwise: bool = False,
) -> Sums:
    """Loss, gradient and products with the rows of ``block`` (K, n), summed over ``parts``.

    ``graph(part, keep)`` is built once a part, every row goes through it, and it is freed. Memory: one part's graph,
    and 1 + 2K vectors beside the block, K more for each further lane. A part that does not fit is halved in ``room``;
    ``partwise`` keeps what each says by itself.

    Raises: ProblemError, see ``graph`` and ``Room``.
    """
    total, products = PointSum(block), torch.zeros_like(block)
    record = PartwiseRecord(block) if partwise else None

    def work(part: MicroBatch) -> _Part:
        built = graph(part, len(block) > 0)
        return _Part(built.loss, built.weight, list(built.gradient), built.products(block, last=True), built.examples)

    for part in parts:
        for one in room.run(part, work):
            total.add(one.loss, one.weight, one.gradient, one.examples)
            products += one.rows
            if record is not None:
                record.add(one.weight, one.rows, one.examples)
        if progress is not None:
            progress(total.examples)
    return total.sums(products, record.result() if record else None)
