"""Gradient and Hessian products of one micro-batch, by double backprop on a graph that is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sharpscope.errors import ProblemError
from sharpscope.objective.batches import MicroBatch
from sharpscope.objective.terms import LossTerms
from sharpscope.params import views

# The unit of cost is a gradient (forward and backward), which is also the price of building a kept graph.
GRADIENT = 1.0


class Products(Protocol):
    """``products(block, last=False)``: those of a kept graph with the rows of ``block`` (K, n), as a new (K, n).

    ``last`` frees the graph on the way, which saves memory; the graph cannot be used again.
    """

    def __call__(self, block: Tensor, last: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class Graph:
    """One micro-batch, differentiated once and kept, so that vectors can be pushed through it. Sums, not means.

    Attributes:
        loss: ``sum_i a_i l_i``, and ``weight``: ``sum_i a_i``, both times the micro-batch's scale.
        gradient: of ``loss``, a tensor for each parameter.
        products: with the rows of a block, of the curvature of ``loss``.
        examples: their number.
    """

    loss: Tensor
    weight: Tensor
    gradient: Sequence[Tensor]
    products: Products
    examples: int


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix that is a sum over loss terms, as a function of one micro-batch.

    Attributes:
        name: what to call it as an argument, and ``title``: in a sentence.
        graph: ``graph(terms, part, keep)`` differentiates a micro-batch; ``keep`` says that products will be wanted.
        cost: gradients a product on a kept graph.
        twice: whether the model's second derivative enters.
        tangent: ``tangent(terms, part, vector)`` is the model's output and J v, J its Jacobian, where J is used.
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


def hessian(terms: LossTerms, part: MicroBatch, keep: bool) -> Graph:
    """The graph of gradient and products ``(sum_i a_i H_i) v``; cost 1 gradient, and 2 a product.

    Pearlmutter 1994, as the gradient of ``g'v``.

    Raises: ProblemError when an operation has no second derivative, or the loss does not depend on the parameters.
    """
    with derivative_errors():
        value, weight = terms.sums(part)
        if not value.requires_grad and not float(weight):
            return nothing(terms, part, value, weight)
        # materialize_grads: a parameter that the loss does not use has zero curvature, it is no error.
        grads = torch.autograd.grad(value, terms.params, create_graph=keep, materialize_grads=True)
    live = [i for i, g in enumerate(grads) if g.requires_grad]

    def products(block: Tensor, last: bool = False) -> Tensor:
        if not live:
            return torch.zeros_like(block)
        rows = torch.empty_like(block)
        for k in range(len(block)):
            vector = views(block[k], terms.params)
            with derivative_errors():
                found = torch.autograd.grad(
                    [grads[i] for i in live],
                    terms.params,
                    [vector[i] for i in live],
                    retain_graph=not last or k + 1 < len(block),
                    materialize_grads=True,
                )
            torch._foreach_copy_(views(rows[k], terms.params), list(found))
        return rows

    return Graph(value.detach(), weight, [g.detach() for g in grads], products, part.size)


HESSIAN = Curvature("hessian", "Hessian", hessian, cost=2.0, twice=True)


def nothing(terms: LossTerms, part: MicroBatch, value: Tensor, weight: Tensor) -> Graph:
    """The graph of a micro-batch without loss terms, which need not depend on the parameters."""

    def products(block: Tensor, last: bool = False) -> Tensor:
        return torch.zeros_like(block)

    return Graph(value.detach(), weight, [torch.zeros_like(p) for p in terms.params], products, part.size)


@contextmanager
def derivative_errors() -> Iterator[None]:
    """What torch says of a model that cannot be differentiated twice, as a ProblemError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "does not require grad" in text:
            raise ProblemError(
                "The loss must depend on the chosen parameters, but it does not. Check params=, and that neither model "
                "nor loss runs under no_grad or detaches its output."
            ) from error
        if "derivative for" in text or "once_differentiable" in text or "double backward" in text.lower():
            raise ProblemError(
                f"The model must have a second derivative, but torch says: {text.splitlines()[0]} "
                "Replace that operation by one that can be differentiated twice, or pass operator='finite-difference' "
                "(--operator finite-difference)."
            ) from error
        raise
