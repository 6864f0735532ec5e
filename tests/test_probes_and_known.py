"""Random vectors that leave nothing to chance, known eigenpairs that leave little or nothing, and spectra of zeros."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from command import printed, saved
from conftest import quadratic, tiny_mlp
from dense import dense_hessian
from sharpscope import ArgumentError, Problem, measure_sharpness, spectral_density, top_eigenvalues, trace
from sharpscope.linalg import lanczos_quadrature, trace_and_frobenius

DTYPES = (torch.float64, torch.float32)


def linear(values: Tensor, seed: int = 0) -> Problem:
    """A linear model with the Hessian ``2/n X'X`` of these eigenvalues (none negative) in a random basis."""
    n = len(values)
    root = quadratic((values.double() * n / 2).sqrt(), seed)
    model = nn.Linear(n, 1, bias=False).double()
    return Problem(model=model, loss=nn.MSELoss(), data=(root, torch.zeros(n, 1, dtype=torch.float64)))


def decaying(n: int) -> Tensor:
    return 1 / torch.arange(1, n + 1, dtype=torch.float64) ** 2


def regression() -> Problem:
    """A network of 21 weights, whose Hessian has eigenvalues of both signs."""
    draw = torch.Generator().manual_seed(3)
    data = torch.randn(30, 2, generator=draw, dtype=torch.float64), torch.randn(30, 1, generator=draw).double()
    return Problem(model=tiny_mlp(2, 5, 1).double(), loss=nn.MSELoss(), data=data)


def rank_one() -> Problem:
    """A linear model of one example, whose Hessian has one eigenvalue, 28, and 11 zeros."""
    row = torch.tensor([[3.0, 2.0, 1.0] + [0.0] * 9], dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return Problem(
        model=nn.Linear(12, 1, bias=False).double(), loss=nn.MSELoss(), data=(row @ turn, torch.zeros(1, 1).double())
    )


def true_sums(problem: Problem) -> tuple[float, float]:
    """Trace and Frobenius norm of the dense Hessian."""
    inputs, targets = problem.data
    hessian = dense_hessian(problem.model, lambda call: (call(inputs) - targets).square().mean())
    return float(hessian.trace()), float(hessian.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "probes"), [(4, 2), (10, 5), (10, 6), (11, 6), (33, 20), (10, 9), (8, 8)])
def test_as_many_products_as_dimensions_give_trace_and_norm_exactly(n: int, probes: int, dtype: torch.dtype) -> None:
    """With ``2 probes >= n`` both are right to rounding, their errors are rounding and hold it, whatever the seed."""
    values = torch.cat([torch.tensor([6.0, -3.0]), torch.linspace(-0.5, 1, n - 2)]).double()
    matrix = quadratic(values).to(dtype)
    for seed in range(5):
        found = trace_and_frobenius(
            lambda block: matrix @ block, n, probes, dtype=dtype, generator=torch.Generator().manual_seed(seed)
        )
        assert found.exact
        assert abs(found.trace - float(values.sum())) <= found.trace_error < 1e4 * torch.finfo(dtype).eps
        assert abs(found.squared - float(values.square().sum())) <= found.squared_error < 1e5 * torch.finfo(dtype).eps
        assert (found.num_products, found.num_matvecs) == (2, 2 * probes)
    assert not trace_and_frobenius(lambda block: quadratic(values) @ block, n, 2).exact or n == 4


def test_trace_density_and_sharpness_with_few_parameters_are_exact_and_say_so(tmp_path: Path) -> None:
    """Of 21 weights ``trace``, ``spectral_density``, the measure "trace" and the command give the dense sums."""
    problem = regression()
    total, norm = true_sums(problem)
    n = sum(p.numel() for p in problem.model.parameters())
    probes = (n + 1) // 2
    for result in (trace(problem, probes), spectral_density(problem, probes, 4)):
        assert result.trace.value == pytest.approx(total, rel=1e-10)
        assert result.frobenius.value == pytest.approx(norm, rel=1e-10)
        assert result.trace.standard_error < 1e-10 * norm
        assert result.frobenius.standard_error < 1e-10 * norm
        assert result.exact
        assert "exact" in result.summary()
        assert type(result).from_dict(result.to_dict()).exact
    fewer = trace(problem, probes - 1)
    assert not fewer.exact
    assert "exact" not in fewer.summary()
    assert fewer.trace.standard_error > 1e-6 * norm
    measure = measure_sharpness(problem, measures=["trace"], probes=probes).measures[0]
    assert measure.value == pytest.approx(total, rel=1e-10)
    path = saved(tmp_path, regression)
    told = printed("density", path, regression, "--probes", str(probes), "--steps", "4")
    at_file = regression()
    at_file.model.load_state_dict(torch.load(path))
    total, _ = true_sums(at_file)
    assert told["exact"] is True
    assert told["trace"]["value"] == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize(("n", "steps", "seeds"), [(34, 32, [8]), (36, 32, [3, 6]), (43, 40, [0]), (50, 48, [0, 1])])
def test_a_density_outside_of_known_pairs_is_of_a_symmetric_matrix(n: int, steps: int, seeds: list[int]) -> None:
    """Taken out with their five largest pairs to 1e-3, decaying spectra of order 34 to 50 end in no refusal, and every
    node of the rest lies in its range, through a matvec and through a problem."""
    values = decaying(n)
    for seed in seeds:
        matrix = quadratic(values, seed)
        problem = linear(values, seed)
        known = top_eigenvalues(problem, k=5, vectors=True)
        assert known.eigenvectors is not None
        pair = torch.from_numpy(known.eigenvalues.copy()), torch.from_numpy(known.eigenvectors.copy())
        rule = lanczos_quadrature(lambda block, matrix=matrix: matrix @ block, n, 6, steps, known=pair)
        result = spectral_density(problem, 6, steps, known=known)
        for nodes in (rule.nodes[:, 5:].numpy(), result.nodes[:, 5:]):
            assert nodes.min() > -1e-6
            assert nodes.max() < 1.01 * float(values[5])
        assert abs(result.trace.value - float(values.sum())) <= 4 * result.trace.standard_error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [1e3, 1e6])
def test_what_is_rounding_is_judged_by_what_known_pairs_leave(largest: float, dtype: torch.dtype) -> None:
    """Beside eigenvalues of 1e3 and 1e6 a rest in [-1, 1] is resolved as far as the products' rounding allows."""
    matrix = quadratic(torch.cat([torch.tensor([largest, largest / 2]), torch.linspace(-1, 1, 38)]).double())
    values, vectors = torch.linalg.eigh(matrix)
    lifted = matrix.to(dtype)
    rule = lanczos_quadrature(
        lambda block: lifted @ block, 40, 4, 32, known=(values[-2:], vectors[:, -2:]), dtype=dtype
    )
    noise = torch.finfo(dtype).eps * largest
    assert float(rule.nodes[:, 2:].abs().max()) < 1 + noise
    if noise < 0.01:
        assert float(rule.nodes[:, 2:].max()) > 0.99
        assert float(rule.nodes[:, 2:].min()) < -0.99


def test_known_pairs_too_rough_for_what_they_leave_are_refused() -> None:
    """A vector off by 3 % beside an eigenvalue of 1000 moves one of the rest, up to 0.1, by 0.9: it is refused."""
    values = torch.cat([torch.tensor([1000.0]), torch.linspace(0, 0.1, 29)]).double()
    problem = linear(values)
    exact = top_eigenvalues(problem, k=1, tol=1e-8, vectors=True)
    assert exact.eigenvectors is not None
    aside = torch.linalg.eigh(quadratic(values))[1][:, :1].numpy()
    tilted = exact.eigenvectors + 0.03 * aside
    rough = type(exact).from_dict(exact.to_dict())
    object.__setattr__(rough, "eigenvectors", tilted / np.linalg.norm(tilted))
    with pytest.raises(ArgumentError, match="accurate enough"):
        spectral_density(problem, known=rough)
    assert spectral_density(problem, known=exact).nodes[:, 1:].max() < 0.1 + 1e-6


def test_the_negative_mass_of_zero_is_zero(tmp_path: Path) -> None:
    """Of a loss linear in the weights, of a rest that known pairs leave at rounding, and of zeros among positive
    eigenvalues, no share is negative, and all zeros are near zero; also from the command line."""
    flat = Problem(model=nn.Linear(6, 1), loss=lambda output, target: output.mean(), data=(torch.randn(8, 6),) * 2)
    one = rank_one()
    known = top_eigenvalues(one, k=1, tol=1e-8, vectors=True)
    found = [
        (spectral_density(flat, 2), 1.0),
        (spectral_density(one, 6), 11 / 12),
        (spectral_density(one, 6, known=known), 11 / 12),
        (spectral_density(linear(torch.cat([torch.zeros(20), torch.linspace(0.5, 1, 10)])), 6), 2 / 3),
    ]
    for result, zeros in found:
        assert result.negative_mass.value < 1e-100
        assert abs(result.near_zero_mass.value - zeros) <= 4 * result.near_zero_mass.standard_error + 1e-12
    path, eigen = saved(tmp_path, rank_one), tmp_path / "eigen.json"
    printed("eigen", path, rank_one, "--k", "1", "--tol", "1e-8", "--vectors", "--out", str(eigen))
    for option in ((), ("--eigen", str(eigen))):
        told = printed("density", path, rank_one, *option)
        assert told["negative_mass"]["value"] < 1e-100
