"""Loss, gradient and curvature products summed over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    loss = torch.zeros((), dtype=wide(block.device), device=block.device)
    weight, spread = torch.zeros_like(loss), torch.zeros_like(loss)
    sums = torch.zeros(1 + len(block), block.shape[1], dtype=block.dtype, device=block.device)
    record = PartwiseRecord(block) if partwise else None
    examples = 0

    def work(part: MicroBatch) -> _Part:
        built = graph(part, len(block) > 0)
        return _Part(built.loss, built.weight, list(built.gradient), built.products(block, last=True), built.examples)

    for part in parts:
        for one in room.run(part, work):
            torch._foreach_add_(views(sums[0], one.gradient), one.gradient)
            sums[1:] += one.rows
            loss += one.loss
            weight += one.weight
            spread += torch.stack(torch._foreach_norm(one.gradient)).to(loss).norm()
            examples += one.examples
            if record is not None:
                record.add(one.weight, one.rows, one.examples)
        if progress is not None:
            progress(examples)
    return Sums(loss, weight, sums[0], sums[1:], spread, examples, record.result() if record else None)
