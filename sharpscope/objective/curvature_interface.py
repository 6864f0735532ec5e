"""The interface between operators and everything else: one micro-batch as loss, gradient and products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sharpscope.objective.forward_loss import ForwardLoss
    from sharpscope.objective.micro_batches import MicroBatch


class Products(Protocol):
    """``products(rows, last=False)``: the matrix times each row of ``rows`` (K, n), as a new tensor (K, n).

    ``last`` frees the graph during the call, which saves memory; the graph cannot be used again.
    """

    def __call__(self, rows: Tensor, last: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Graph:
    """One micro-batch, differentiated once and kept, to multiply with any number of vectors. Sums, not means.

    Attributes:
        loss: ``sum_i a_i l_i``, times the micro-batch's scale.
        weight: ``sum_i a_i``, times the micro-batch's scale.
        gradient: of ``loss``, a tensor for each parameter.
        products: multiplies the curvature of ``loss`` with the rows of a block.
    """

    loss: Tensor
    weight: Tensor
    gradient: Sequence[Tensor]
    products: Products


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix that is a sum over loss terms, as a function of one micro-batch.

    Attributes:
        name: the value of the argument ``operator``.
        title: the name in sentences.
        graph: ``graph(terms, batch, keep)`` differentiates a micro-batch; ``keep`` if products will be asked for.
        cost: of a product on a kept graph, in gradients.
        uses_second_derivatives: whether the matrix depends on the model's second derivative.
        tangent: ``tangent(terms, batch, vector)`` gives the model's output and J v, J its Jacobian; None where J is
            not used.
        dtype: the default precision; None for the parameters' own.
        exact: whether products are exact up to rounding; False marks results as approximate.
        float32_error: the error of a product in float32 beyond rounding, relative to the matrix's norm.
    """

    name: str
    title: str
    graph: Callable[[ForwardLoss, MicroBatch, bool], Graph]
    cost: float
    uses_second_derivatives: bool = False
    tangent: Callable[[ForwardLoss, MicroBatch, Tensor], tuple[Tensor, Tensor]] | None = None
    dtype: torch.dtype | None = None
    exact: bool = True
    float32_error: float = 0.0


def zero_graph(terms: ForwardLoss, loss: Tensor, weight: Tensor) -> Graph:
    """The all-zero graph of a micro-batch without loss terms, whose loss may not depend on the parameters."""

    def products(rows: Tensor, last: bool = False) -> Tensor:
        return torch.zeros_like(rows)

    return Graph(loss.detach(), weight, [torch.zeros_like(p) for p in terms.params], products)
