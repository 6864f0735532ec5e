"""lambda_max and trace of each diagonal block of a symmetric operator, with as few products as one block takes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import rayleigh_ritz
from sharpscope.linalg.top_eigenpairs import top_eigenpairs_rows
from sharpscope.linalg.trace_and_frobenius import trace_and_frobenius_rows
from sharpscope.linalg.vectors_as_rows import Matmat, norms, rounding_error
from sharpscope.random_streams import stream_from

# Maps ``{l: V_l}`` to ``{l: H_ll V_l}`` for the blocks l that still need products.
Products = Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]


@dataclass(frozen=True)
class DiagonalBlock:
    """lambda_max and trace of one diagonal block.

    Attributes:
        lambda_max: its largest algebraic eigenvalue, ``residual`` ``||H_ll v - lambda v||``, from true products.
        bound: half-width of lambda_max's interval, from the residual and from rounding relative to the largest block
            (the rounding error of a product is relative to the terms that cancel in it).
        converged: whether the bound without that rounding is at most ``tol |lambda_max|``, or all is rounding.
        trace, trace_error: its trace and standard error.
    """

    lambda_max: float = 0.0
    residual: float = 0.0
    bound: float = 0.0
    converged: bool = False
    trace: float = 0.0
    trace_error: float = 0.0


def diagonal_blocks(
    products: Products,
    likes: Sequence[Tensor],
    *,
    tol: float = 1e-3,
    probes: int = 8,
    max_products: int | None = None,
    generator: torch.Generator,
) -> list[DiagonalBlock]:
    """``lambda_max(H_ll)`` by Lanczos and ``tr H_ll`` by XTrace of each block, all in the same calls of ``products``.

    A block of order at most ``2 probes`` is computed whole, from as many products, and exact to rounding.

    Args:
        products: ``{l: V_l}`` to ``{l: H_ll V_l}``, V_l rows (b_l, n_l), of those blocks that still ask.
        likes: (0, n_l) of each block, for size, dtype and device.
        tol: relative tolerance of each lambda_max.
        probes: random vectors a block for its trace, at least 2.
        max_products: calls after which Lanczos gives up, by default 100.
        generator: source of starts and probes, on the CPU.

    Cost: as many calls as the slowest block's Lanczos run, at first with ``probes + 2`` vectors a block, from the
    third on with 2. Memory: at most ``12 + 5 probes`` vectors a block.

    Why XTrace: vectors that do not see the other blocks cost a product a block. One vector for all blocks gives
    ``z_l' (H z)_l`` of each for the price of one, but what couples the blocks scatters in it. At equal numbers of
    products, in the 6 blocks of a trained cnn and mlp of 1,700 and 1,800 parameters, its standard error was 1.3 to 8
    times that of XTrace with 8 probes; that of random signs in each block alone was 1.5 to 8 times. (In models hardly
    trained XTrace was 2 to 4 times worse for the last layer, whose spectrum is flat, and better for the others.)
    """
    shared = _SharedProducts(products)
    programs: list[Callable[[Matmat], DiagonalBlock]] = []
    for block, like in enumerate(likes):
        first, second = stream_from(generator, "start"), stream_from(generator, "probes")
        if like.shape[1] <= 2 * probes:
            programs.append(_dense_program(like, tol, probes, shared))
        else:
            programs += [
                _lambda_max_program(like, tol, max_products, first, shared),
                _trace_program(like, probes, second),
            ]
        shared.owners += [block] * (len(programs) - len(shared.owners))
    found: dict[int, DiagonalBlock] = {}
    for owner, one in zip(shared.owners, lockstep(programs, shared), strict=True):
        # The second of a block's programs knows the trace, and nothing else.
        before = found.get(owner)
        found[owner] = one if before is None else replace(before, trace=one.trace, trace_error=one.trace_error)
    return [
        replace(one, bound=one.bound + floor, trace_error=math.hypot(one.trace_error, floor))
        for block, one in found.items()
        for floor in [torch.finfo(likes[block].dtype).eps * shared.scale]
    ]


@dataclass
class _SharedProducts:
    """Serve the products of all programs; the programs of one block share a product.

    Attributes:
        owners: the block of each program.
        scale: the largest norm of a product so far.
    """

    products: Products
    owners: list[int] = field(default_factory=list)
    scale: float = 0.0

    def __call__(self, asked: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """``{program: rows}`` to ``{program: their products}``."""
        programs: dict[int, list[int]] = {}
        for i in asked:
            programs.setdefault(self.owners[i], []).append(i)
        images = self.products({block: torch.cat([asked[i] for i in both]) for block, both in programs.items()})
        self.scale = max(self.scale, *(float(norms(image).max()) for image in images.values()))
        answers: dict[int, Tensor] = {}
        for block, both in programs.items():
            shares = torch.split(images[block], [len(asked[i]) for i in both])
            copies = [share.clone(memory_format=torch.contiguous_format) for share in shares]
            answers |= dict(zip(both, copies, strict=True))
        return answers


def _dense_program(like: Tensor, tol: float, probes: int, shared: _SharedProducts) -> Callable[[Matmat], DiagonalBlock]:
    """Compute all of a small block; its asymmetry widens the interval."""
    n, dtype = like.shape[1], like.dtype

    def program(rows: Matmat) -> DiagonalBlock:
        unit = torch.eye(n, dtype=dtype, device=like.device)
        images = torch.cat([rows(block) for block in torch.split(unit, probes)])
        half, largest = (images + images.T) / 2, float(norms(images).max())
        pairs = rayleigh_ritz(
            unit, half, next_eigenvalue=float("-inf"), scale=largest, tol=tol, num_matvecs=n, num_products=1
        )
        value, skew = float(pairs.values[0]), math.sqrt(float(norms(images - half).square().sum()))
        return DiagonalBlock(
            lambda_max=value,
            residual=float(pairs.residuals[0]),
            bound=float(pairs.bounds[0]) + skew,
            converged=bool(pairs.converged[0]) and skew <= max(tol * abs(value), rounding_error(shared.scale, dtype)),
            trace=float(images.diagonal().double().sum()),
            trace_error=rounding_error(largest, dtype),
        )

    return program


def _lambda_max_program(
    like: Tensor, tol: float, max_products: int | None, generator: torch.Generator, shared: _SharedProducts
) -> Callable[[Matmat], DiagonalBlock]:
    """lambda_max of a block by Lanczos."""
    n, dtype = like.shape[1], like.dtype

    def program(rows: Matmat) -> DiagonalBlock:
        largest = 0.0

        def noted(block: Tensor) -> Tensor:
            nonlocal largest
            image = rows(block)
            largest = max(largest, float(norms(image).max()))
            return image

        try:
            pairs = top_eigenpairs_rows(
                noted, like, 1, tol=tol, method="lanczos", max_products=max_products, generator=generator
            )
        except ArgumentError:
            # Not symmetric, because all of it is rounding: an attention's key bias has no curvature.
            if largest > rounding_error(shared.scale, dtype):
                raise
            # ||H||_F^2 is on average n ||H x||^2 for random x of length 1.
            return DiagonalBlock(residual=largest, bound=math.sqrt(n) * largest, converged=True)
        value = float(pairs.eigenvalues[0])
        return DiagonalBlock(
            lambda_max=value,
            residual=float(pairs.residuals[0]),
            bound=float(pairs.upper[0]) - value,
            converged=bool(pairs.converged[0]),
        )

    return program


def _trace_program(like: Tensor, probes: int, generator: torch.Generator) -> Callable[[Matmat], DiagonalBlock]:
    """The trace of a block by XTrace."""

    def program(rows: Matmat) -> DiagonalBlock:
        found = trace_and_frobenius_rows(rows, like, probes, generator=generator)
        return DiagonalBlock(trace=found.trace, trace_error=found.trace_error)

    return program


T = TypeVar("T")

Serve = Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]


def lockstep(programs: Sequence[Callable[[Matmat], T]], serve: Serve) -> list[T]:
    """``[program(matmat_i) for i, program in enumerate(programs)]``, with the products of all made at the same time.

    A program is any function of a matmat. It runs until it requests a product and waits until all running programs have
    requested one; then one call of ``serve`` answers them all. So the number of calls is the largest number of products
    of one program, not their sum.

    Each program has its own thread, only for its stack: one runs at a time, in order, so there are no races and results
    are reproducible; ``serve`` runs in the caller's thread.

    Args:
        serve: maps ``{i: V_i}`` of the programs that wait to ``{i: H_i V_i}``.

    Raises: what a program or ``serve`` raises, once all threads have ended.
    """
    threads = [_ProgramThread(program) for program in programs]
    try:
        asked = {i: thread.start() for i, thread in enumerate(threads)}
        while waiting := {i: block for i, block in asked.items() if block is not None}:
            answers = serve(waiting)
            asked = {i: threads[i].resume(answers[i]) for i in waiting}
        return [thread.result() for thread in threads]
    finally:
        for thread in threads:
            thread.close()


class _Closed(BaseException):
    """Ends a program that gets no more products; not an Exception, so that the program does not catch it."""


class _ProgramThread(Generic[T]):
    """One program on its thread, which runs only inside ``start`` and ``resume``."""

    def __init__(self, program: Callable[[Matmat], T]) -> None:
        self._program = program
        self._asks: SimpleQueue[Tensor | None] = SimpleQueue()
        self._answers: SimpleQueue[Tensor | None] = SimpleQueue()
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Tensor | None:
        """Start the program; return the first block to multiply, or None if it has finished."""
        self._thread.start()
        return self._next()

    def resume(self, answer: Tensor) -> Tensor | None:
        """Pass on a product; return the next block to multiply, or None if the program has finished."""
        self._answers.put(answer)
        return self._next()

    def result(self) -> T:
        """The program's return value."""
        return self._results[0]

    def close(self) -> None:
        """End the thread."""
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
        except BaseException as error:  # raised again in the caller's thread
            self._error = error
        self._asks.put(None)

    def _matmat(self, block: Tensor) -> Tensor:
        self._asks.put(block)
        answer = self._answers.get()
        if answer is None:
            raise _Closed
        return answer
