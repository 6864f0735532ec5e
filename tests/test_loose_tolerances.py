"""Tolerances of a twentieth and more: what has converged is the i-th eigenvalue, not another one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from command import printed, saved
from conftest import quadratic
from sharpscope import Problem, top_eigenvalues
from sharpscope.linalg import top_eigenpairs

CLOSE = torch.cat([torch.tensor([1.0, 0.93, 0.9, 0.86, 0.83, 0.8, 0.77]), torch.linspace(0, 0.75, 53)]).double()


def spectra(n: int, seed: int) -> Iterator[Tensor]:
    """n random eigenvalues with clusters and gaps, of one sign and of both."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=draw, dtype=torch.float64)

    yield uniform(n)
    yield 2 * uniform(n) - 1
    yield torch.cat([1 + 0.1 * uniform(3), 0.7 + 0.1 * uniform(4), 0.3 * uniform(n - 7)])
    yield torch.cat([CLOSE[:7], 0.75 * uniform(n - 7)])
    yield torch.cat([torch.tensor([1, 0.9, 0.85, 0.8, 0.75, 0.7]).double(), -2 * uniform(n - 6)])


@pytest.mark.parametrize("tol", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("method", ["power", "lanczos", "guided"])
@pytest.mark.parametrize("k", [1, 5])
def test_a_pair_that_converged_to_a_loose_tolerance_holds_its_eigenvalue(method: str, tol: float, k: int) -> None:
    """Of random operators of order 60 to 200 all converge, and each interval, at most ``tol`` to either side, holds
    the i-th eigenvalue, at the upper end and at the lower one."""
    for seed, n in ((100, 60), (101, 120), (102, 200)):
        for i, values in enumerate(spectra(n, seed)):
            matrix = quadratic(values, seed - 100)
            noise = quadratic(0.1 * values.abs().max() * torch.linspace(-1, 1, n), seed)
            which = "smallest" if i == 1 and method != "guided" else "largest"
            pairs = top_eigenpairs(
                lambda block, matrix=matrix: matrix @ block,
                n,
                k,
                tol=tol,
                which=which,
                method=method,
                guides=[lambda block, guide=matrix + noise: guide @ block] if method == "guided" else [],
                generator=torch.Generator().manual_seed(seed - 100),
            )
            true = values.sort(descending=which == "largest").values[:k]
            assert bool(pairs.converged.all())
            assert bool(((pairs.lower <= true) & (true <= pairs.upper)).all())
            assert bool((pairs.upper - pairs.lower <= 2 * tol * pairs.eigenvalues.abs() * (1 + 1e-12)).all())


def close() -> Problem:
    """A linear model with the close eigenvalues CLOSE."""
    root = quadratic((CLOSE * len(CLOSE) / 2).sqrt())
    model = nn.Linear(len(CLOSE), 1, bias=False).double()
    return Problem(model=model, loss=nn.MSELoss(), data=(root, torch.zeros(len(CLOSE), 1).double()))


def test_loose_power_iteration_of_a_problem_holds_lambda_1(tmp_path: Path) -> None:
    """Where eight more lie within a quarter, lambda_1 = 1 is in the interval of each seed, by Python and by command."""
    path = saved(tmp_path, close)
    for seed in range(8):
        result = top_eigenvalues(close(), 1, tol=0.3, method="power", generator=torch.Generator().manual_seed(seed))
        assert result.converged.all()
        assert result.lower[0] <= 1 <= result.upper[0]
        if seed < 3:
            told = printed("eigen", path, close, "--k", "1", "--tol", "0.3", "--method", "power", "--seed", str(seed))
            assert told["lower"][0] <= 1 <= told["upper"][0]


def test_a_solver_that_runs_out_of_products_has_not_converged_to_a_loose_tolerance() -> None:
    """After two products power iteration at tol 0.3 is not done, whatever its residuals."""
    matrix = quadratic(CLOSE)
    for seed in range(5):
        pairs = top_eigenpairs(
            lambda block: matrix @ block,
            60,
            1,
            tol=0.3,
            method="power",
            max_products=3,
            generator=torch.Generator().manual_seed(seed),
        )
        assert not bool(pairs.converged.any())
