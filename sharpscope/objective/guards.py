"""What is wrapped around a micro-batch's graph: readable errors, and the count of its cost.

Each wrapper takes a function ``graph(batch, keep) -> Graph`` and returns another of the same kind, so the core
(``hessian.py`` and the other operators) knows nothing of them; ``Objective.graph`` applies them, in one place.

Three guards stand elsewhere. Running out of memory is handled by ``oom.py`` around the whole use of a graph, whose
memory is free only after the products. The journal of long runs is kept around whole passes over the data, by
``sharpscope.measurement``. Float64 where the model's own code asks for float32 is switched on around each forward
pass, by ``forward.py``, since not every forward pass belongs to a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from sharpscope.errors import DataError, ProblemError
from sharpscope.objective.accumulate import Sums
from sharpscope.objective.cost import GRADIENT, Meter
from sharpscope.objective.data import MicroBatch, leaves
from sharpscope.objective.graph import Graph

# ``graph(batch, keep)``: a micro-batch's graph, kept for products where ``keep``.
GraphOf = Callable[[MicroBatch, bool], Graph]


def readable(graph: GraphOf) -> GraphOf:
    """``graph`` whose autograd errors are ProblemErrors that say what to do."""

    def build(batch: MicroBatch, keep: bool) -> Graph:
        with readable_errors():
            built = graph(batch, keep)

        def products(rows: Tensor, last: bool = False) -> Tensor:
            with readable_errors():
                return built.products(rows, last)

        return replace(built, products=products)

    return build


def billed(graph: GraphOf, meter: Meter, cost: float) -> GraphOf:
    """``graph`` that adds 1 gradient for each example to the bill, and ``cost`` for each product."""

    def build(batch: MicroBatch, keep: bool) -> Graph:
        built = graph(batch, keep)
        meter.example_gradients += batch.size * GRADIENT

        def products(rows: Tensor, last: bool = False) -> Tensor:
            images = built.products(rows, last)
            meter.example_gradients += batch.size * cost * len(rows)
            return images

        return replace(built, products=products)

    return build


@contextmanager
def readable_errors() -> Iterator[None]:
    """Raise ProblemError where torch says that the loss cannot be differentiated, once or twice."""
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


def locate_nonfinite(batches: Iterable[MicroBatch], sums: Callable[[MicroBatch], Sums], products: str) -> None:
    """Raise DataError for the first of ``batches`` whose data, loss or derivatives are not finite.

    Args:
        batches: single examples, or those that the loader keeps.
        sums: loss, gradient and a product of one of them.
        products: what the products are called.
    """
    for batch in batches:
        where = batch.where(0) if batch.size == 1 else f"batch {batch.pieces[0][0]}"
        if any(isinstance(leaf, Tensor) and not bool(torch.isfinite(leaf).all()) for leaf in leaves(batch.batch)):
            raise DataError(f"The data must be finite, but {where} holds NaN or infinity. Drop or mend it.")
        found = sums(batch)
        for name, value in (("loss", found.loss), ("gradient", found.gradient), (products, found.products)):
            if not bool(torch.isfinite(value).all()):
                raise DataError(f"The {name} must be finite, but that of {where} is NaN or infinite at these weights.")
    raise DataError("Loss and derivatives must be finite: those of each example are, but not their sum. Lift dtype.")
