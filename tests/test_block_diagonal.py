"""Several solvers in step, and lambda_max and trace of the diagonal blocks of matrices of chosen spectra."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dense import top
from sharpscope import ArgumentError
from sharpscope.linalg import top_eigenpairs, trace_and_frobenius
from sharpscope.linalg.diagonal_blocks import diagonal_blocks, lockstep


def likes(*sizes: int) -> list[Tensor]:
    """An empty block of rows of each size."""
    return [torch.empty(0, n, dtype=torch.float64) for n in sizes]


def test_blocks_of_chosen_spectra_are_found() -> None:
    """Of 120 random matrices, 4 at a time, each lambda_max is in its interval, and 118 traces within 4 errors."""
    source, beyond = torch.Generator().manual_seed(3), 0
    for _ in range(30):
        sizes = torch.randint(1, 61, (4,), generator=source).tolist()
        matrices = [torch.randn(n, n, generator=source, dtype=torch.float64) for n in sizes]
        matrices = [10 ** float(torch.randn((), generator=source)) * (m + m.T) for m in matrices]
        found = diagonal_blocks(
            lambda asked, held=matrices: {i: rows @ held[i] for i, rows in asked.items()},
            likes(*sizes),
            generator=source,
        )
        for one, matrix in zip(found, matrices, strict=True):
            assert one.converged
            assert abs(one.lambda_max - float(top(matrix, 1))) <= one.bound <= 1e-3 * abs(one.lambda_max) + 1e-12
            beyond += abs(one.trace - float(matrix.trace())) > 4 * one.trace_error
    assert beyond <= 2


def test_an_operator_that_is_not_symmetric_is_refused() -> None:
    """Only what is below the rounding of the largest block may lack symmetry."""
    skew = torch.randn(60, 60, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="symmetric"):
        diagonal_blocks(
            lambda asked: {i: rows @ skew.T for i, rows in asked.items()},
            likes(60),
            generator=torch.Generator().manual_seed(0),
        )


def test_a_small_block_that_is_not_symmetric_is_told() -> None:
    """Its interval is as wide as what lacks symmetry, and it has not converged."""
    skew = torch.randn(6, 6, dtype=torch.float64)
    (found,) = diagonal_blocks(
        lambda asked: {i: rows @ skew.T for i, rows in asked.items()},
        likes(6),
        generator=torch.Generator().manual_seed(0),
    )
    assert not found.converged
    assert found.bound >= float((skew - skew.T).norm()) / 2


def test_programs_in_step_give_what_they_give_alone() -> None:
    """The same bits as one after another, in as many calls as the longest makes, and no thread outlives them."""
    matrices = [torch.diag(torch.linspace(-1, 3, n, dtype=torch.float64)) for n in (20, 60, 90)]
    programs = [partial(top_eigenpairs, n=len(m), k=2) for m in matrices]
    alone = [program(lambda v, m=m: m @ v) for program, m in zip(programs, matrices, strict=True)]
    calls = 0

    def serve(asked: Any) -> dict[int, Tensor]:
        nonlocal calls
        calls += 1
        return {i: matrices[i] @ v for i, v in asked.items()}

    before = threading.active_count()
    for one, other in zip(lockstep(programs, serve), alone, strict=True):
        assert torch.equal(one.eigenvalues, other.eigenvalues)
        assert torch.equal(one.eigenvectors, other.eigenvectors)
    assert calls == max(one.num_products for one in alone)
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_no_thread_outlives_an_error(error: type[BaseException]) -> None:
    """What ``serve`` or a program raises comes out as it is, and all threads have ended."""
    before = threading.active_count()

    def interrupted(asked: Any) -> Any:
        raise error("stop")

    def failing(matmat: Any) -> Any:
        matmat(torch.zeros(50, 1))
        raise error("stop")

    working = partial(trace_and_frobenius, n=50)
    for programs, serve in (([working, working], interrupted), ([working, failing, working], dict)):
        with pytest.raises(error, match="stop"):
            lockstep(programs, serve)
        assert threading.active_count() == before
