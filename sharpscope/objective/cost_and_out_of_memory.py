"""Wrappers around a micro-batch's graph: error messages, cost counting, and recovery from out-of-memory errors.

``guarded`` wraps a function ``graph(batch, keep) -> Graph``, so that ``double_backprop.py`` and the other operators
need not know their guards; ``Objective.graph`` is the one place that applies it. ``OOMHalving`` runs all that uses a
graph, because the graph's memory is free only after the products. Two other guards are elsewhere:
``sharpscope.measurement`` journals whole passes over the data, and ``forward_loss.py`` runs each forward pass in
``float64_mode``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sharpscope.errors import ProblemError, first_line, out_of_memory
from sharpscope.objective.curvature_interface import Graph
from sharpscope.objective.micro_batches import MicroBatch

T = TypeVar("T")

# The unit of cost: forward and backward pass. Building a kept graph costs the same.
GRADIENT = 1.0

# Cost of a forward pass without graph in gradients: measured 0.30 to 0.41 on a small CNN, a WRN, an MLP, a transformer.
FORWARD = 0.4


def guarded(
    graph: Callable[[MicroBatch, bool], Graph], counter: CostCounter, cost: float
) -> Callable[[MicroBatch, bool], Graph]:
    """Wrap ``graph`` with readable errors and cost counting.

    Args:
        graph: differentiates a micro-batch.
        counter: gets 1 gradient per example for each graph, and ``cost`` per example for each product.
        cost: of a product, in gradients.
    """

    def build(batch: MicroBatch, keep: bool) -> Graph:
        with readable_errors():
            built = graph(batch, keep)
        counter.example_gradients += batch.size * GRADIENT

        def products(rows: Tensor, last: bool = False) -> Tensor:
            with readable_errors():
                images = built.products(rows, last)
            counter.example_gradients += batch.size * cost * len(rows)
            return images

        return replace(built, products=products)

    return build


@contextmanager
def readable_errors() -> Iterator[None]:
    """Raise ProblemError with a remedy where torch reports that the loss cannot be differentiated once or twice."""
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


@dataclass
class CostCounter:
    """Counters of the work done so far.

    Attributes:
        passes: full passes over the data.
        hvps: products with a vector over all the data.
        example_gradients: the cost of all work, in units of one gradient (forward and backward) of one example.
    """

    passes: int = 0
    hvps: int = 0
    example_gradients: float = 0.0
    _before: float = 0.0
    _started: float | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock time inside ``timing()`` so far."""
        return self._before + (0.0 if self._started is None else time.perf_counter() - self._started)

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Add the block's wall-clock time, also on exceptions."""
        self._started = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._started = self.seconds, None

    def restore(self, *, passes: int, hvps: int, example_gradients: float, seconds: float) -> None:
        """Restore the counters saved by an interrupted run. Call inside ``timing()``."""
        self.passes, self.hvps, self.example_gradients = passes, hvps, example_gradients
        self._before, self._started = seconds, time.perf_counter()


class OOMHalving:
    """Run work on micro-batches, halving the micro-batch size whenever the work runs out of memory.

    Args:
        largest: largest number of examples to try at once, None for no limit.
        fixed: the reason why micro-batches must not be cut, "" if they may be.
        device: where the graphs are.
    """

    def __init__(self, largest: int | None = None, fixed: str = "", device: torch.device | str = "cpu") -> None:
        self.largest = largest
        self.fixed = fixed
        # A node that is older than any graph, see _release_memory.
        with torch.enable_grad():
            self._oldest = torch.ones((), device=device, requires_grad=True).exp()

    def run(self, batch: MicroBatch, work: Callable[[MicroBatch], T]) -> Iterator[T]:
        """Yield ``work(batch)``, or the results of smaller parts where the whole does not fit into memory.

        Each example is in exactly one part.

        Raises: ProblemError when a batch that cannot be cut does not fit.
        """
        pending = [batch]
        while pending:
            current = pending.pop()
            if self.largest is not None and current.size > self.largest and not self.fixed and current.splittable:
                # The rest is cut later, since its first part may have to be halved again.
                pending.append(current.slice(self.largest, current.size))
                current = current.slice(0, self.largest)
            try:
                result = work(current)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._require_cuttable(current, error)
            else:
                yield result
                del result  # it may hold a graph
                continue
            # Outside of the except block the exception is gone, and with it the frames that hold the failed graph.
            self._release_memory()
            self.largest = (current.size + 1) // 2
            pending.append(current)

    def _release_memory(self) -> None:
        """Free the memory of the failed attempt.

        After an exception autograd's queue still holds operations that were not run, and through them part of the
        graph. The next backward pass drops them, but runs newer nodes first; so run a node that is older than all.
        """
        self._oldest.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _require_cuttable(self, batch: MicroBatch, error: BaseException) -> None:
        if batch.size > 1 and not self.fixed and batch.splittable:
            return
        what = batch.where(0) if batch.size == 1 else f"batch {batch.sources[0][0]} of {batch.size} examples"
        why = "" if batch.size == 1 else f", and it may not be cut: {self.fixed or 'its tensors have unequal lengths'}"
        raise ProblemError(
            f"The graph of {what} must fit into memory, but does not{why} ({first_line(error)}). "
            f"{'Choose' if batch.size == 1 else 'Make the batches smaller, or choose'} a device with more memory, a "
            "narrower dtype, or fewer vectors a block."
        ) from error
