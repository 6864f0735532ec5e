"""The true eigenvalue is inside the stated interval every time, and nothing that is called converged is missing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense import dense_hessian, top
from sharpscope import Problem, top_eigenvalues
from sharpscope.linalg import top_eigenpairs

K = 5
TERMS = 1200


def quadratic(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A Hessian that is a mean over TERMS rank-one terms, that of a sample of 100 to 600 of them, its eigenvalues.

    Every other one has lambda_4 to lambda_7 within some percent of each other, where a gap is hard to prove.
    """
    draw = torch.Generator().manual_seed(seed)
    n = int(torch.randint(60, 160, (), generator=draw))
    slope = 0.4 + 1.2 * torch.rand((), generator=draw)
    scales = torch.arange(1, n + 1, dtype=torch.float64) ** -slope
    if seed % 2:
        scales[3:7] = scales[3] * (1 - 0.02 * torch.arange(4))
    basis = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
    rows = torch.randn(TERMS, n, generator=draw, dtype=torch.float64) * scales.sqrt() @ basis
    signs = torch.where(torch.rand(TERMS, generator=draw) < 0.1, -1.0, 1.0).double()
    matrix = rows.T @ (signs[:, None] * rows) / TERMS
    chosen = torch.randperm(TERMS, generator=draw)[: int(torch.randint(100, 600, (), generator=draw))]
    guide = rows[chosen].T @ (signs[chosen, None] * rows[chosen]) / len(chosen)
    return matrix, guide, top(matrix, K)


@pytest.mark.parametrize("start", range(0, 80, 20))
def test_eighty_random_quadratics_are_inside_their_intervals(start: int) -> None:
    """Guided by a sample or by Lanczos, at tolerances from 1e-2 to 1e-5, all five converge and hold the truth."""
    for seed in range(start, start + 20):
        matrix, guide, true = quadratic(seed)
        tol = 10.0 ** -(2 + seed % 4)
        for guides in ([lambda block, g=guide: g @ block], []):
            pairs = top_eigenpairs(
                lambda block, h=matrix: h @ block,
                len(matrix),
                K,
                tol=tol,
                guides=guides,
                generator=torch.Generator().manual_seed(seed),
            )
            assert bool(pairs.converged.all()), seed
            rounding = 16 * torch.finfo(torch.float64).eps * true.abs().max()
            assert bool((pairs.lower - rounding <= true).all() and (true <= pairs.upper + rounding).all()), seed
            assert bool(((pairs.upper - pairs.lower) / 2 <= tol * pairs.eigenvalues.abs() + rounding).all()), seed


def network(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network of some width, depth and activation, trained for a while on noisy labels, in float64."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TERMS, 6, generator=draw, dtype=torch.float64)
    noise = torch.randn(TERMS, 4, generator=draw, dtype=torch.float64)
    labels = (inputs @ torch.randn(6, 4, generator=draw, dtype=torch.float64) + noise).argmax(1)
    activation = (nn.Tanh, nn.GELU, nn.ReLU, nn.SiLU)[seed % 4]
    widths = [6, *((5 + seed % 6,) * (1 + seed % 2)), 4]
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    model = nn.Sequential(*layers[:-1]).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(20 * (seed % 5)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, inputs, labels


@pytest.mark.parametrize("seed", range(10))
def test_ten_small_networks_are_inside_their_intervals(seed: int) -> None:
    """Guided by a subset of the data or by Lanczos, from the start of training to its end, all five hold the truth."""
    model, inputs, labels = network(seed)
    true = top(dense_hessian(model, lambda call: F.cross_entropy(call(inputs), labels)), K).numpy()
    for method in ("guided", "lanczos"):
        problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, labels))
        result = top_eigenvalues(
            problem, tol=10.0 ** -(2 + seed % 4), method=method, generator=torch.Generator().manual_seed(seed)
        )
        assert result.converged.all()
        rounding = 16 * torch.finfo(torch.float64).eps * abs(true).max()
        assert (result.lower - rounding <= true).all()
        assert (true <= result.upper + rounding).all()
