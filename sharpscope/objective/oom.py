"""Running out of memory: micro-batches are halved until their graphs fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from sharpscope.errors import ProblemError, first_line
from sharpscope.objective.data import MicroBatch

T = TypeVar("T")

# How the allocators that have no exception of their own say it: CPU, older CPU, MPS.
SAYINGS = ("can't allocate memory", "not enough memory", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocator's, on whatever device."""
    if isinstance(error, MemoryError | getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in SAYINGS)


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

        Raises: ProblemError when a part that cannot be cut does not fit.
        """
        if self.largest is not None and batch.size > self.largest and not self.fixed and batch.splittable:
            start = 0
            while start < batch.size:
                # Read anew each time: a piece before this one may have had to be halved again.
                stop = min(start + self.largest, batch.size)
                yield from self._halving(batch.part(start, stop), work)
                start = stop
        else:
            yield from self._halving(batch, work)

    def _halving(self, batch: MicroBatch, work: Callable[[MicroBatch], T]) -> Iterator[T]:
        try:
            done = work(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._require_cuttable(batch, error)
        else:
            yield done
            return
        # Out here the exception is gone, and with it the frames that hold the graph which did not fit.
        self._forget()
        self.largest = (batch.size + 1) // 2
        yield from self.run(batch, work)

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
