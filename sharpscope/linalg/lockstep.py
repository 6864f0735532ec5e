"""Several solvers in step, so that one costly walk over the data serves a product of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from torch import Tensor

from sharpscope.linalg.ritz import Matmat

T = TypeVar("T")

Serve = Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]


def lockstep(programs: Sequence[Callable[[Matmat], T]], serve: Serve) -> list[T]:
    """``[program(matmat_i) for i, program in enumerate(programs)]``, with the products of all made at the same time.

    Each program is any function of a matmat, as ``top_eigenpairs`` is. It runs until it asks for a product and rests
    until all that still run have asked; then one call of ``serve`` answers all. So there are as many calls as the
    program of most products makes, not as many as all of them.

    A program has a thread of its own, for its stack alone: one runs at a time, in their order, so nothing races and
    equal generators give equal bits; ``serve`` runs in the caller's thread.

    Args:
        serve: ``{i: V_i}`` of the programs that asked to ``{i: H_i V_i}``.

    Raises: what a program or ``serve`` raises, once all threads have ended.
    """
    strands = [_Strand(program) for program in programs]
    try:
        asked = {i: strand.start() for i, strand in enumerate(strands)}
        while waiting := {i: block for i, block in asked.items() if block is not None}:
            answers = serve(waiting)
            asked = {i: strands[i].resume(answers[i]) for i in waiting}
        return [strand.result() for strand in strands]
    finally:
        for strand in strands:
            strand.close()


class _Closed(BaseException):
    """Ends a program that will get no more answers; no Exception, so that no handler in it takes it for its own."""


class _Strand(Generic[T]):
    """One program on its thread, which runs only inside ``start`` and ``resume``."""

    def __init__(self, program: Callable[[Matmat], T]) -> None:
        self._program = program
        self._asks: SimpleQueue[Tensor | None] = SimpleQueue()
        self._answers: SimpleQueue[Tensor | None] = SimpleQueue()
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Tensor | None:
        """The first block that it wants multiplied, or None when it needed none."""
        self._thread.start()
        return self._next()

    def resume(self, answer: Tensor) -> Tensor | None:
        """The next block that it wants multiplied, given the last one's product; None when it is done."""
        self._answers.put(answer)
        return self._next()

    def result(self) -> T:
        """What it returned."""
        return self._results[0]

    def close(self) -> None:
        """End it, wherever it is."""
        if self._thread.ident is not None:
            self._answers.put(None)
            self._thread.join()

    def _next(self) -> Tensor | None:
        block = self._asks.get()
        if self._error is not None:
            raise self._error
        return block

    def _run(self) -> None:
        try:
            self._results.append(self._program(self._matmat))
        except BaseException as error:  # goes on in the caller's thread
            self._error = error
        self._asks.put(None)

    def _matmat(self, block: Tensor) -> Tensor:
        self._asks.put(block)
        answer = self._answers.get()
        if answer is None:
            raise _Closed
        return answer
