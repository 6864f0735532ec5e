"""The seam of the objective: one micro-batch, differentiated, as loss, gradient and products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sharpscope.objective.data import MicroBatch
    from sharpscope.objective.forward import LossTerms


class Products(Protocol):
    """``products(rows, last=False)``: the matrix times each row of ``rows`` (K, n), as a new tensor (K, n).

    ``last`` frees the graph on the way, which saves memory; the graph cannot be used again.
    """

    def __call__(self, rows: Tensor, last: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Graph:
    """One micro-batch, differentiated once and kept, so that any number of vectors can be multiplied. Sums, not means.

    Attributes:
        loss: ``sum_i a_i l_i``, and ``weight``: ``sum_i a_i``, both times the micro-batch's scale.
        gradient: of ``loss``, a tensor for each parameter.
        products: with the rows of a block, of the curvature of ``loss``.
    """

    loss: Tensor
    weight: Tensor
    gradient: Sequence[Tensor]
    products: Products


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix that is a sum over loss terms, as a function of one micro-batch.

    Attributes:
        name: what to call it as an argument, and ``title``: in a sentence.
        graph: ``graph(terms, batch, keep)`` differentiates a micro-batch; ``keep`` says that products will be wanted.
        cost: gradients a product on a kept graph.
        twice: whether the model's second derivative enters.
        tangent: ``tangent(terms, batch, vector)`` is the model's output and J v, J its Jacobian, where J is used.
        dtype: the precision that it is computed in where none is asked for, None for the parameters' own.
        exact: whether a product is right to rounding, so that a result need not be called approximate.
        single: what a product in float32 may be off by beyond rounding, relative to the matrix's norm.
    """

    name: str
    title: str
    graph: Callable[[LossTerms, MicroBatch, bool], Graph]
    cost: float
    twice: bool = False
    tangent: Callable[[LossTerms, MicroBatch, Tensor], tuple[Tensor, Tensor]] | None = None
    dtype: torch.dtype | None = None
    exact: bool = True
    single: float = 0.0


def without_terms(terms: LossTerms, loss: Tensor, weight: Tensor) -> Graph:
    """The graph of a micro-batch without loss terms, which need not depend on the parameters: all zeros."""

    def products(rows: Tensor, last: bool = False) -> Tensor:
        return torch.zeros_like(rows)

    return Graph(loss.detach(), weight, [torch.zeros_like(p) for p in terms.params], products)
