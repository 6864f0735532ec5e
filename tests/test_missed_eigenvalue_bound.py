"""What random starts say of missed eigenvalues, against closed forms, simulation and known operators."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conftest import quadratic
from sharpscope.linalg import top_eigenpairs
from sharpscope.linalg.missed_eigenvalues import MissedEigenvalueBound, missed_probability

Matrix = Callable[[torch.Generator], Tensor]


def unit_rows(count: int, n: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis, as rows, of a random subspace."""
    return torch.linalg.qr(torch.randn(n, count, generator=generator, dtype=torch.float64))[0].T


def ritz(matrix: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz vectors (rows), values and residuals of the span of orthonormal rows."""
    values, rotation = torch.linalg.eigh(basis @ matrix @ basis.T)
    vectors = rotation.flip(1).T @ basis
    return vectors, values.flip(0), vectors @ matrix - values.flip(0)[:, None] * vectors


def start_of(matrix: Tensor, origin: Tensor, basis: Tensor) -> MissedEigenvalueBound:
    """What the random rows ``origin``, which lie in the span of ``basis``, say where nothing has been found."""
    vectors, values, residuals = ritz(matrix, basis)
    start = MissedEigenvalueBound.from_ritz_pairs(vectors @ origin.T, values, residuals @ residuals.T, 0, len(matrix))
    assert start is not None
    return start


def lanczos(matrix: Tensor, row: Tensor, steps: int) -> tuple[list[float], list[float], Tensor]:
    """Coefficients and orthonormal basis of the Krylov space of one unit row, with full reorthogonalisation."""
    alphas, betas, basis = [], [], row[None]
    for _ in range(steps):
        image = basis[-1] @ matrix
        alphas.append(float(image @ basis[-1]))
        for _ in range(2):
            image = image - (basis @ image) @ basis
        betas.append(float(image.norm()))
        basis = torch.cat([basis, image[None] / image.norm()])
    return alphas, betas, basis[:-1]


def spectrum(trial: int, n: int, generator: torch.Generator) -> Tensor:
    """Normal, one-sided, decaying, and outliers above a bulk, in turn."""
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    return (
        torch.randn(n, generator=generator, dtype=torch.float64),
        -uniform,
        1 / (1 + torch.arange(n, dtype=torch.float64)),
        uniform + 4 * (uniform > 0.9),
    )[trial % 4]


def test_in_a_krylov_space_of_one_vector_it_is_the_certificate() -> None:
    """For 80 random runs of 1 to 8 steps the bound is ``missed_probability`` of the recurrence, to a millionth."""
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for trial in range(80):
        n, steps = (int(torch.randint(*range_, (1,), generator=generator)) for range_ in ((12, 120), (1, 9)))
        values = spectrum(trial, n, generator) * 10.0 ** (trial % 13 - 6)
        matrix = torch.diag(values)
        alphas, betas, basis = lanczos(matrix, unit_rows(1, n, generator)[0], steps)
        if min(betas) < 1e-6 * float(values.abs().max()):
            continue
        start = start_of(matrix, basis[:1], basis)
        spread = float(values.max() - values.min())
        for beyond in (1e-3, 0.03, 0.3, 3.0):
            above = float(start.values.max()) + beyond * spread
            expected = missed_probability(alphas, betas, n, above)
            assert start.probability(above) == pytest.approx(expected, rel=1e-6, abs=1e-6), (trial, n, steps, beyond)
            compared += 1
    assert compared > 280


def test_what_was_found_is_left_out() -> None:
    """With k exact eigenvectors in front, the bound is that of the rest of the operator in dimension n - k."""
    generator = torch.Generator().manual_seed(1)
    values = spectrum(3, 60, generator).sort(descending=True).values
    rest = torch.diag(values[4:])
    alphas, betas, basis = lanczos(rest, unit_rows(1, 56, generator)[0], 3)
    alone = start_of(rest, basis[:1], basis)
    inside = torch.cat([torch.zeros(3, 4, dtype=torch.float64), basis], 1)
    vectors, theta, residuals = ritz(torch.diag(values), inside)
    found = torch.eye(60, dtype=torch.float64)[:4]
    # A start that has a part in what was found says as much: only its direction outside of that is uniform.
    every = torch.cat([0 * found, residuals])
    for origin in (inside[:1], 0.6 * inside[:1] + 0.8 * found[:1]):
        start = MissedEigenvalueBound.from_ritz_pairs(
            vectors @ origin.T, torch.cat([values[:4], theta]), every @ every.T, 4, 60
        )
        assert start is not None
        assert start.order == 56
        for above in (float(values[4]), float(values[4]) + 1):
            assert start.probability(above) == pytest.approx(alone.probability(above), rel=1e-9)
            assert start.probability(above) == pytest.approx(missed_probability(alphas, betas, 56, above), rel=1e-6)


@pytest.mark.parametrize("starts", [1, 2, 5])
def test_the_claim_is_as_strong_as_can_be(starts: int) -> None:
    """On a rank-one operator, t at its eigenvalue, the claim after one product with s vectors is uniform on (0, 1)."""
    generator = torch.Generator().manual_seed(starts)
    matrix = torch.zeros(20, 20, dtype=torch.float64)
    matrix[7, 7] = 1.0
    runs = 300
    claims = []
    for _ in range(runs):
        basis = unit_rows(starts, 20, generator)
        claims.append(start_of(matrix, basis, basis).probability(1.0))
    expected = (torch.arange(runs, dtype=torch.float64) + 0.5) / runs
    # Kolmogorov's distance at the level 0.001 is 1.95 / sqrt(N).
    assert float((torch.tensor(claims).double().sort().values - expected).abs().max()) < 1.95 / math.sqrt(runs)


def krylov(matrix: Tensor, origin: Tensor, generator: torch.Generator) -> Tensor:
    """Two steps of block Lanczos."""
    return torch.linalg.qr(torch.cat([origin, origin @ matrix]).T)[0].T


def residual(matrix: Tensor, origin: Tensor, generator: torch.Generator) -> Tensor:
    """The start, its first Ritz residual, and directions that have nothing to do with either."""
    _, _, rest = ritz(matrix, origin)
    free = torch.randn(6, len(matrix), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([origin, rest[:1], free]).T)[0].T


def near(matrix: Tensor, origin: Tensor, generator: torch.Generator) -> Tensor:
    """The start, its image, and rough eigenvectors of the operator's other eigenvalues."""
    _, vectors = torch.linalg.eigh(matrix)
    rough = vectors.T[-7:-1] + 0.05 * torch.randn(6, len(matrix), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([origin, origin @ matrix, rough]).T)[0].T


@pytest.mark.parametrize("starts", [1, 2])
@pytest.mark.parametrize("space", [krylov, residual, near])
def test_no_more_runs_miss_than_they_claim(space: Callable[..., Tensor], starts: int) -> None:
    """Of 300 random operators with an eigenvalue hardly above t, at most p of the runs claim at level p there is none.

    A claim of 1, wherever t is not above every Ritz value, is no claim.
    """
    generator = torch.Generator().manual_seed(2)
    wrong = {0.5: 0, 0.2: 0, 0.05: 0}
    for trial in range(300):
        n = int(torch.randint(20, 50, (1,), generator=generator))
        values = spectrum(trial, n, generator)
        values[0] = values.max() + 0.1 * (trial % 7)
        matrix = quadratic(values, generator)
        origin = unit_rows(starts, n, generator)
        claim = start_of(matrix, origin, space(matrix, origin, generator)).probability(float(values[0]) - 1e-9)
        for level in wrong:
            wrong[level] += claim <= level
    for level, count in wrong.items():
        assert count <= 300 * level + 3 * math.sqrt(300 * level)


def test_nothing_is_claimed_below_a_ritz_value() -> None:
    """The bound is 1 up to and at the largest Ritz value, falls above it, and is never 0 after a few products."""
    generator = torch.Generator().manual_seed(3)
    for trial in range(20):
        matrix = quadratic(spectrum(trial, 40, generator), generator)
        origin = unit_rows(1 + trial % 3, 40, generator)
        start = start_of(matrix, origin, krylov(matrix, origin, generator))
        largest = float(start.values.max())
        assert start.probability(largest - 0.1) == start.probability(largest) == 1
        claims = [start.probability(largest + beyond) for beyond in (1e-9, 0.1, 1.0, 10.0, 1e6, 1e12)]
        assert claims == sorted(claims, reverse=True)
        assert 0 < claims[-1] < claims[0] <= 1


def test_rounding_is_no_certainty() -> None:
    """Far above a long run's Ritz values, where all is cancellation, the claim is a probability, positive and tiny."""
    generator = torch.Generator().manual_seed(7)
    for trial in range(24):
        matrix = torch.diag(spectrum(trial, 60, generator))
        _, _, basis = lanczos(matrix, unit_rows(1, 60, generator)[0], 4 + trial % 8)
        start = start_of(matrix, basis[:1], basis)
        for above in (1e1, 1e3, 1e6, 1e12):
            assert 0 < start.probability(float(start.values[0]) + above) < 1e-3


def test_several_starts_support_more_than_one_of_them() -> None:
    """Two products with each of s vectors claim less, on the average of 50 runs, the larger s is."""
    generator = torch.Generator().manual_seed(4)
    values = torch.cat([torch.ones(1), torch.linspace(0, 0.2, 79)]).double()
    means = []
    for starts in (1, 2, 3):
        claims = []
        for _ in range(50):
            origin = unit_rows(starts, 80, generator)
            start = start_of(torch.diag(values), origin, krylov(torch.diag(values), origin, generator))
            claims.append(start.probability(2.0))
        means.append(sum(claims) / 50)
    assert means[0] > 1.5 * means[1] > 2 * means[2]


def test_nothing_left_is_certain_and_no_start_supports_nothing() -> None:
    """All n vectors found leave 0; without a random vector, or with as many as dimensions, nothing is claimed."""
    empty = torch.zeros(0, 0, dtype=torch.float64)
    assert MissedEigenvalueBound(torch.zeros(0).double(), empty, empty, 0).probability(1.0) == 0
    one = torch.ones(1, 1, dtype=torch.float64)
    assert MissedEigenvalueBound(torch.zeros(1).double(), one, one[:, :0], 10).probability(1.0) == 1
    assert MissedEigenvalueBound(torch.zeros(1).double(), one, one, 1).probability(1.0) == 1


@pytest.mark.parametrize("exponent", [-100, -30, 30, 100])
def test_the_scale_does_not_matter(exponent: int) -> None:
    """Operator and threshold scaled by powers of ten from 1e-100 to 1e100 give the same bound."""
    generator = torch.Generator().manual_seed(5)
    matrix = quadratic(spectrum(3, 40, generator), generator)
    origin = unit_rows(2, 40, generator)
    basis = krylov(matrix, origin, generator)
    above = float(torch.linalg.eigvalsh(matrix)[-1])
    expected = start_of(matrix, origin, basis).probability(above)
    assert 0 < expected < 1
    scale = 10.0**exponent
    assert start_of(scale * matrix, origin, basis).probability(scale * above) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["guided", "lanczos"])
def test_after_a_restart_the_claim_is_that_of_before(method: str) -> None:
    """A run whose basis was cut no longer spans its random vectors: it claims what it did before, less than a whole."""
    generator = torch.Generator().manual_seed(8)
    matrix = quadratic(1 / (1 + torch.arange(100, dtype=torch.float64)) ** 0.5, generator)
    runs = [
        top_eigenpairs(
            lambda block: matrix @ block,
            100,
            2,
            tol=1e-8,
            method=method,
            guides=[torch.zeros_like],
            max_basis=basis,
        )
        for basis in (12, 100)
    ]
    cut, whole = (pairs.missed_bound for pairs in runs)
    assert cut is not None
    assert whole is not None
    assert all(bool(pairs.converged.all()) for pairs in runs)
    above = float(whole.values.max()) + 1
    assert 1 > cut.probability(above) > 5 * whole.probability(above)


def test_the_guided_solver_s_start_is_that_of_its_random_vector() -> None:
    """Of 60 runs whose guide hides the largest eigenvalue, at most p miss it and claim at level p that they did not.

    The threshold is that eigenvalue; a claim counts as wrong only where the run did not find it.
    """
    generator = torch.Generator().manual_seed(6)
    wrong = {0.5: 0, 0.2: 0, 0.05: 0}
    for _ in range(60):
        values = torch.cat([torch.tensor([1.0, 3.0, 2.5, 2.0]), 0.3 * torch.rand(56, generator=generator)]).double()
        vectors = unit_rows(60, 60, generator)
        matrix = (vectors.T * values) @ vectors
        guide = matrix - values[0] * torch.outer(vectors[0], vectors[0])
        pairs = top_eigenpairs(
            lambda block, matrix=matrix: matrix @ block,  # type: ignore[misc]
            60,
            4,
            tol=1e-1,
            method="guided",
            guides=[lambda block, guide=guide: guide @ block],  # type: ignore[misc]
            generator=generator,
        )
        assert pairs.missed_bound is not None
        assert pairs.missed_bound.order == 56
        claim = pairs.missed_bound.probability(1.0 - 1e-9)
        missed = abs(float(pairs.eigenvalues[3]) - 1.0) > 0.1
        for level in wrong:
            wrong[level] += missed and claim <= level
    for level, count in wrong.items():
        assert count <= 60 * level + 3 * math.sqrt(60 * level)
