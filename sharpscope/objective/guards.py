"""What is wrapped around a micro-batch's graph: readable errors, the count of its cost, and what memory allows.

``guarded`` takes a function ``graph(batch, keep) -> Graph`` and returns another of the same kind, so the core
(``hessian.py`` and the other operators) knows nothing of its guards; ``Objective.graph`` applies it, in one place.
``OOMHalving`` runs the whole use of a graph, whose memory is free only after the products. Two guards stand elsewhere:
the journal of long runs around whole passes over the data (``sharpscope.measurement``), and float64 where the model's
own code asks for float32 around each forward pass (``forward.py``), since not every forward pass belongs to a graph.
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
from sharpscope.objective.data import MicroBatch
from sharpscope.objective.graph import Graph

T = TypeVar("T")

# The unit of cost: forward and backward, which is also the price of building a kept graph.
GRADIENT = 1.0

# A bare forward pass in gradients, as measured on a small CNN, a WRN, an MLP and a transformer: 0.30 to 0.41.
FORWARD = 0.4


def guarded(
    graph: Callable[[MicroBatch, bool], Graph], meter: Meter, cost: float
) -> Callable[[MicroBatch, bool], Graph]:
    """``graph`` with readable errors, which adds its cost to ``meter``.

    A graph costs 1 gradient for each example, and ``cost`` for each product.
    """

    def build(batch: MicroBatch, keep: bool) -> Graph:
        with readable_errors():
            built = graph(batch, keep)
        meter.example_gradients += batch.size * GRADIENT

        def products(rows: Tensor, last: bool = False) -> Tensor:
            with readable_errors():
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


@dataclass
class Meter:
    """The bill, added to as work is done.

    Attributes:
        passes: full walks over the data, and ``hvps``: products with a vector over all of them.
        example_gradients: everything done, in units of one gradient (forward and backward) of one example.
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
        """Add the block's wall-clock time, however it ends."""
        self._started = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._started = self.seconds, None

    def recall(self, *, passes: int, hvps: int, example_gradients: float, seconds: float) -> None:
        """Restore the counters saved by an interrupted run. Call inside ``timing()``."""
        self.passes, self.hvps, self.example_gradients = passes, hvps, example_gradients
        self._before, self._started = seconds, time.perf_counter()


class OOMHalving:
    """Runs work on micro-batches, halving their size, for later ones too, whenever it runs out of memory.

    Args:
        largest: examples that are tried at once, or None for whatever comes.
        fixed: why no micro-batch may be cut, or "".
        device: where the graphs are.
    """

    def __init__(self, largest: int | None = None, fixed: str = "", device: torch.device | str = "cpu") -> None:
        self.largest = largest
        self.fixed = fixed
        # Older than any graph, see _forget.
        with torch.enable_grad():
            self._old = torch.ones((), device=device, requires_grad=True).exp()

    def run(self, batch: MicroBatch, work: Callable[[MicroBatch], T]) -> Iterator[T]:
        """``work(batch)``, or that of its halves where the whole does not fit; each example is in one of the results.

        Raises: ProblemError when a batch that cannot be cut does not fit.
        """
        pending = [batch]
        while pending:
            now = pending.pop()
            if self.largest is not None and now.size > self.largest and not self.fixed and now.splittable:
                # The rest is cut later: what comes before it may have to be halved again.
                pending.append(now.part(self.largest, now.size))
                now = now.part(0, self.largest)
            try:
                done = work(now)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                self._require_cuttable(now, error)
            else:
                yield done
                del done  # it may hold a graph
                continue
            # Out here the exception is gone, and with it the frames that hold the graph which did not fit.
            self._forget()
            self.largest = (now.size + 1) // 2
            pending.append(now)

    def _forget(self) -> None:
        """Give back what the failed attempt held.

        After an exception autograd's queue keeps operations that it has not come to, and through them a part of the
        graph. It passes over them in its next run, but takes younger ones first: so run one that is older than all.
        """
        self._old.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _require_cuttable(self, batch: MicroBatch, error: BaseException) -> None:
        if batch.size > 1 and not self.fixed and batch.splittable:
            return
        what = batch.where(0) if batch.size == 1 else f"batch {batch.pieces[0][0]} of {batch.size} examples"
        why = "" if batch.size == 1 else f", and it may not be cut: {self.fixed or 'its tensors have unequal lengths'}"
        raise ProblemError(
            f"The graph of {what} must fit into memory, but does not{why} ({first_line(error)}). "
            f"{'Choose' if batch.size == 1 else 'Make the batches smaller, or choose'} a device with more memory, a "
            "narrower dtype, or fewer vectors a block."
        ) from error
