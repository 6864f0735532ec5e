"""Eigensolvers against spectra that are known because the operator was built from them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import quadratic
from sharpscope import ArgumentError
from sharpscope.linalg import METHODS, top_eigenpairs
from sharpscope.linalg.ritz import ritz_bounds
from sharpscope.linalg.vectors_as_rows import inner, orthonormalise, project_out, random_rows

DTYPES = (torch.float64, torch.float32)


def operator(spectrum: list[float], n: int, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with the given eigenvalues, and zeros up to order n, in a random basis."""
    return quadratic([*spectrum, *[0.0] * (n - len(spectrum))], seed)


def product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda block: matrix @ block


# The guide of a guided one: the operator itself but for noise of this share of its norm, nothing,
# or its negative.
SOLVERS = ("lanczos", "power", "guided by 0.03", "guided by 1", "guided by zero", "guided by minus")


def solver(name: str, matrix: Tensor) -> dict[str, Any]:
    """The options of ``top_eigenpairs`` for one of SOLVERS on ``matrix``."""
    method, _, guide = name.partition(" by ")
    if method != "guided":
        return {"method": method}
    if guide in ("zero", "minus"):
        return {"method": method, "guides": [product(-matrix if guide == "minus" else 0 * matrix)]}
    n = len(matrix)
    noise = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(matrix)
    # A symmetric Gaussian matrix with entries of variance 1 has norm 2 sqrt(n).
    size = float(guide) * float(torch.linalg.matrix_norm(matrix, 2)) / (2 * n**0.5)
    return {"method": method, "guides": [product(matrix + size * (noise + noise.T) / 2**0.5)]}


SPECTRA = {
    "triple": ([10, 10, 10, 5, 4], 100),
    "whole space": ([10, 10, 10, 5, 4], 5),
    "above a tail": ([10, 10, 10, 5, 4, *[2 / (1 + i) for i in range(200)]], 300),
    "plus and minus": ([10, -10, 9, -9, 3, 2, 1], 60),
    "rank two": ([7, 3], 80),
    "scale 1e-6": ([5e-6, 4e-6, 3e-6, 2e-6, 1e-6], 80),
    "scale 1e6": ([5e6, 4e6, 3e6, 2e6, 1e6], 80),
    "tight cluster": ([1 + 1e-6, 1, 1 - 1e-6, 0.5, 0.4, 0.3], 200),
    "tight cluster above a tail": ([1 + 1e-6, 1, 1 - 1e-6, 0.9, 0.8, *[0.7 - 0.003 * i for i in range(200)]], 250),
    "zero": ([0.0], 30),
    "negative": ([-1.0 - i for i in range(40)], 40),
    "negative outlier": ([-1000.0, 5, 4, 3, 2, 1, *[0.5 - 0.01 * i for i in range(40)]], 60),
    "power law": ([1 / (1 + i) ** 1.5 for i in range(300)], 300),
}


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_chosen_spectra_come_back_with_their_multiplicity(name: str, dtype: torch.dtype, method: str) -> None:
    """Every value called converged is within tolerance of its eigenvalue and inside its interval, and k come back."""
    spectrum, n = SPECTRA[name]
    matrix = operator(spectrum, n).to(dtype)
    pairs = top_eigenpairs(product(matrix), n, 5, tol=1e-3, dtype=dtype, max_products=300, **solver(method, matrix))
    true = torch.linalg.eigvalsh(matrix.double()).flip(0)[:5]
    rounding = 64 * torch.finfo(dtype).eps * float(true.abs().max().clamp_min(max(map(abs, spectrum))))
    assert len(pairs.eigenvalues) == 5
    off = (pairs.eigenvalues - true).abs()
    assert bool((off <= 1e-3 * true.abs() + rounding)[pairs.converged].all())
    assert bool((pairs.lower <= true)[pairs.converged].all())
    assert bool((true <= pairs.upper)[pairs.converged].all())
    if name != "negative outlier":
        # There the rounding of 1000 in float32 is more than a thousandth of 1, and the shift of 1000 slows the power.
        assert bool(pairs.converged.all())


def few(spectrum: list[float], method: str, k: int = 5) -> Tensor:
    """The k largest eigenvalues of a matrix of order 40 that has this spectrum and zeros, all called converged."""
    matrix = operator(spectrum, 40)
    pairs = top_eigenpairs(product(matrix), 40, k, tol=1e-4, max_products=2000, **solver(method, matrix))
    assert bool(pairs.converged.all())
    return pairs.eigenvalues


@pytest.mark.parametrize("method", SOLVERS)
def test_a_triple_eigenvalue_comes_three_times(method: str) -> None:
    """[10, 10, 10, 5, 4] is found as that, not as [10, 5, 4, 0.1]."""
    assert torch.allclose(few([10, 10, 10, 5, 4], method), torch.tensor([10.0, 10, 10, 5, 4]).double(), rtol=1e-4)


@pytest.mark.parametrize("method", SOLVERS)
def test_a_low_rank_never_gives_fewer_than_k(method: str) -> None:
    """Rank two and k = 5 give five values, three of them zero."""
    expected = torch.tensor([7.0, 3, 0, 0, 0]).double()
    assert torch.allclose(few([7, 3], method), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("method", SOLVERS)
def test_plus_and_minus_ten_are_told_apart(method: str) -> None:
    """The largest of [10, -10, 9, -9] and zeros are 10, 9 and 0, whatever is larger in magnitude."""
    expected = torch.tensor([10.0, 9, 0]).double()
    assert torch.allclose(few([10, -10, 9, -9], method, 3), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("method", SOLVERS)
def test_a_spectrum_of_size_1e_minus_6_is_as_good_as_any(method: str) -> None:
    """Nothing absolute is added: [5, 4, 3, 2, 1] times 1e-6 are found as exactly as [5, 4, 3, 2, 1]."""
    expected = 1e-6 * torch.tensor([5.0, 4, 3, 2, 1]).double()
    assert torch.allclose(few([5e-6, 4e-6, 3e-6, 2e-6, 1e-6], method), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_is_that_of_the_returned_vector(dtype: torch.dtype) -> None:
    """residuals equal ||H v - lambda v|| recomputed here, and the vectors are orthonormal."""
    matrix = operator([1 / (1 + i) for i in range(200)], 200).to(dtype)
    pairs = top_eigenpairs(product(matrix), 200, 5, tol=1e-2, dtype=dtype)
    v = pairs.eigenvectors.double()
    again = torch.linalg.vector_norm(matrix.double() @ v - v * pairs.eigenvalues, dim=0)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(pairs.residuals, again, rtol=1e-3, atol=20 * eps)
    assert torch.allclose(v.T @ v, torch.eye(5, dtype=torch.float64), atol=20 * eps)


@pytest.mark.parametrize("max_basis", [60, 1200], ids=["restarted", "unrestarted"])
def test_no_ghosts_in_a_run_of_200_steps(max_basis: int) -> None:
    """Outliers that converge in few steps stay single while the edge of a dense bulk takes 200 steps to come."""
    spectrum = [100.0, 50.0, 25.0, *[1 - i / 1500 for i in range(1500)]]
    matrix = operator(spectrum, 1503)
    pairs = top_eigenpairs(product(matrix), 1503, 5, tol=1e-13, max_basis=max_basis, max_products=200)
    assert pairs.num_products >= 80  # 200 unless the basis may grow to most of the space
    assert torch.allclose(pairs.eigenvalues, torch.tensor(spectrum[:5], dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(5, dtype=torch.float64), atol=1e-12)


def test_full_depth_lanczos_is_exact() -> None:
    """When the basis spans the space the eigenvalues are those of the matrix, to rounding."""
    matrix = operator([float(i) for i in range(-10, 11)], 21)
    pairs = top_eigenpairs(product(matrix), 21, 21, tol=1e-12)
    assert torch.allclose(pairs.eigenvalues, torch.linalg.eigvalsh(matrix).flip(0), atol=1e-12)
    assert bool(pairs.converged.all())


def test_restart_with_a_bounded_basis_finds_the_same() -> None:
    """The smallest basis allowed gives the eigenvalues of an unbounded one, with more products."""
    matrix = operator([1 / (1 + i) ** 0.5 for i in range(400)], 400)
    wide = top_eigenpairs(product(matrix), 400, 5, tol=1e-6, max_basis=400)
    narrow = top_eigenpairs(product(matrix), 400, 5, tol=1e-6, max_basis=17)
    assert torch.allclose(wide.eigenvalues, narrow.eigenvalues, rtol=2e-6)
    assert narrow.num_matvecs > wide.num_matvecs
    assert bool(narrow.converged.all())


def test_unconverged_is_said() -> None:
    """Too few products for the tolerance give k values, none of which is called converged while it is wrong."""
    matrix = operator([1 - i / 500 for i in range(500)], 500)
    for method in SOLVERS:
        pairs = top_eigenpairs(product(matrix), 500, 5, tol=1e-6, max_products=5, **solver(method, matrix))
        assert len(pairs.eigenvalues) == 5
        assert not bool(pairs.converged.any())
        assert pairs.num_products <= 5


def test_a_tolerance_below_rounding_is_not_called_met() -> None:
    """float32 cannot prove 1e-9; the run ends soon and says so, and float64 can."""
    matrix = operator([10.0, 5.0, 3.0, 2.0, 1.0, 0.5], 50)
    coarse = top_eigenpairs(product(matrix.float()), 50, 5, tol=1e-9, dtype=torch.float32)
    fine = top_eigenpairs(product(matrix), 50, 5, tol=1e-9)
    assert not bool(coarse.converged.any())
    assert coarse.num_products < 20
    assert bool(fine.converged.all())


def test_an_operator_that_changes_never_converges() -> None:
    """An operator that is another one at each product is found out, though its vectors stay the same."""
    matrix = operator([5.0, 4.0, 3.0, 2.0, 1.0], 40)
    generator = torch.Generator().manual_seed(1)

    def noisy(block: Tensor) -> Tensor:
        return (1 + 0.3 * torch.rand((), generator=generator, dtype=torch.float64)) * (matrix @ block)

    for _ in range(10):
        assert not bool(top_eigenpairs(noisy, 40, 5, tol=1e-3, max_products=30).converged.any())


@pytest.mark.parametrize("method", SOLVERS)
def test_smallest_mirrors_largest(method: str) -> None:
    """The smallest eigenvalues of H are the negated largest ones of -H, intervals included."""
    matrix = operator([3.0, 2.0, 1.0, -4.0, -6.0, -8.0], 30)
    options = solver(method, matrix)
    low = top_eigenpairs(product(matrix), 30, 3, which="smallest", **options)
    if "guides" in options:
        options["guides"] = [lambda block, guide=options["guides"][0]: -guide(block)]
    high = top_eigenpairs(product(-matrix), 30, 3, **options)
    assert torch.equal(low.eigenvalues, -high.eigenvalues)
    assert torch.equal(low.lower, -high.upper)
    assert torch.allclose(low.eigenvalues, torch.tensor([-8.0, -6.0, -4.0], dtype=torch.float64), rtol=1e-3)


def wanted(matrix: Tensor, k: int, which: str) -> Tensor:
    """The eigenvalues that ``which`` names, from a dense solver; ties in magnitude with the positive one first."""
    true = torch.linalg.eigvalsh(matrix.double()).flip(0)
    if which == "both":
        return torch.cat([true[:k], true[-k:]])
    if which == "smallest":
        return true.flip(0)[:k]
    return true[torch.argsort(true.abs(), descending=True, stable=True)][:k] if which == "magnitude" else true[:k]


@pytest.mark.parametrize("which", ["both", "magnitude"])
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_come_back_with_their_multiplicity(name: str, which: str) -> None:
    """At two ends, too, what is called converged is within tolerance and inside its interval, in float32, restarted."""
    spectrum, n = SPECTRA[name]
    k = min(5, n // 2)
    matrix = operator(spectrum, n).float()
    pairs = top_eigenpairs(product(matrix), n, k, tol=1e-3, dtype=torch.float32, which=which, max_products=80)
    every = torch.linalg.eigvalsh(matrix.double())
    true = wanted(matrix, k, which)
    rounding = 64 * torch.finfo(torch.float32).eps * float(every.abs().max())
    found = pairs.eigenvalues
    assert len(found) == len(true) == len(pairs.converged)
    if which == "magnitude":
        # Of +a and -a either may come first.
        found, true = found.abs(), true.abs()
        inside = ((pairs.lower[:, None] <= every) & (every <= pairs.upper[:, None])).any(1)
    else:
        inside = (pairs.lower <= true) & (true <= pairs.upper)
    assert bool(((found - true).abs() <= 1e-3 * true.abs() + rounding)[pairs.converged].all())
    assert bool(inside[pairs.converged].all())
    # What float32 rounds by more than a thousandth cannot be proved.
    assert bool(pairs.converged[(true.abs() == 0) | (1e-3 * true.abs() > rounding)].all())
    v = pairs.eigenvectors.double()
    assert torch.allclose(v.T @ v, torch.eye(len(true), dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("name", ["whole space", "rank two", "plus and minus"])
@pytest.mark.parametrize("which", ["both", "magnitude"])
def test_both_methods_find_the_same_at_two_ends(name: str, which: str) -> None:
    """Power iteration agrees with Lanczos on both ends, and the products of both solves are counted."""
    spectrum, n = SPECTRA[name]
    k = 2
    matrix = operator(spectrum, n)
    calls = [0]

    def counted(block: Tensor) -> Tensor:
        calls[0] += 1
        return matrix @ block

    power = top_eigenpairs(counted, n, k, tol=1e-3, which=which, method="power", max_products=2000)
    assert power.num_products == calls[0]
    lanczos = top_eigenpairs(product(matrix), n, k, tol=1e-3, which=which)
    true = wanted(matrix, k, which)
    for pairs in (power, lanczos):
        found = pairs.eigenvalues
        assert torch.allclose(found.abs(), true.abs(), rtol=1e-3, atol=1e-12)
        assert bool(pairs.converged.all())


def test_plus_and_minus_both_count_in_magnitude() -> None:
    """Of [10, 10, -10, -10, -10, 9, -9, 1] the five largest are 10 twice and -10 three times, the next two 9 and -9."""
    spectrum = [10.0, 10, -10, -10, -10, 9, -9, 1]
    for k in (5, 7):
        found = top_eigenpairs(product(operator(spectrum, 60)), 60, k, which="magnitude", tol=1e-6).eigenvalues
        true = torch.tensor(sorted(spectrum, key=abs, reverse=True)[:k], dtype=torch.float64)
        assert torch.allclose(found.sort().values, true.sort().values, rtol=1e-6)
        assert bool((found.abs().diff() <= 1e-6).all())


def test_both_ends_are_what_a_solve_for_each_finds() -> None:
    """Both ends cost a solve for each in 9 (k + 1) vectors, with equal eigenvalues, and all vectors are orthonormal."""
    matrix = operator([*[1 / (1 + i) for i in range(150)], *[-1 / (1 + i) for i in range(150)]], 300)
    both = top_eigenpairs(product(matrix), 300, 3, which="both", tol=1e-6)
    single = [
        top_eigenpairs(product(matrix), 300, 3, which=end, tol=1e-6, max_basis=36) for end in ("largest", "smallest")
    ]
    # The second end starts from other random vectors than a solve by itself.
    assert abs(both.num_products - sum(pairs.num_products for pairs in single)) <= 1
    assert abs(both.num_matvecs - sum(pairs.num_matvecs for pairs in single)) <= 4
    assert torch.allclose(both.eigenvalues[:3], single[0].eigenvalues, rtol=1e-6)
    assert torch.allclose(both.eigenvalues[3:].flip(0), single[1].eigenvalues, rtol=1e-6)
    v = both.eigenvectors
    assert torch.allclose(v.T @ v, torch.eye(6, dtype=torch.float64), atol=1e-13)
    assert torch.allclose((matrix @ v - v * both.eigenvalues).norm(dim=0), both.residuals, rtol=1e-6, atol=1e-13)


def test_an_end_without_large_magnitudes_is_left_early() -> None:
    """With "magnitude" small eigenvalues of the other sign are not refined: two steps and a check show their size."""
    matrix = operator([10.0, 8.0, 6.0, *[-0.1 / (1 + i) for i in range(250)]], 300)
    largest = top_eigenpairs(product(matrix), 300, 3)
    pairs = top_eigenpairs(product(matrix), 300, 3, which="magnitude")
    assert pairs.num_products == largest.num_products + 3
    assert bool(pairs.converged.all())
    assert torch.allclose(pairs.eigenvalues, torch.tensor([10.0, 8.0, 6.0], dtype=torch.float64), rtol=1e-3)


def test_zeros_are_zero_to_rounding_in_the_order_of_magnitude() -> None:
    """Of operators of rank 1 to 3 more pairs than that have eigenvalue zero, at either end, and all have converged."""
    for n, seed, rank in itertools.product((5, 30), range(6), (1, 2, 3)):
        matrix = operator([5.0, -5.0, 2.0][:rank], n, seed=seed)
        for k in (3, 5):
            pairs = top_eigenpairs(product(matrix), n, k, which="magnitude")
            true = torch.tensor(([5.0, 5.0, 2.0][:rank] + [0.0] * k)[:k], dtype=torch.float64)
            assert torch.allclose(pairs.eigenvalues.abs(), true, atol=1e-12)
            assert bool(pairs.converged.all())


def test_a_late_end_is_waited_for_in_the_order_of_magnitude() -> None:
    """-9.6 at the edge of a dense negative bulk is the second largest, not the 9.5 that converges long before."""
    spectrum = [10.0, 9.5, *[-9.6 + 0.004 * i for i in range(1000)], *[0.1] * 98]
    diagonal = torch.tensor(spectrum, dtype=torch.float64)[:, None]
    pairs = top_eigenpairs(lambda block: diagonal * block, 1100, 2, which="magnitude", tol=1e-3)
    off = (pairs.eigenvalues - torch.tensor([10.0, -9.6]).double()).abs()
    assert bool((off <= 1e-2).all() | ~pairs.converged[1])
    few = top_eigenpairs(lambda block: diagonal * block, 1100, 2, which="magnitude", tol=1e-3, max_products=9)
    assert not bool(few.converged[1]) or abs(float(few.eigenvalues[1]) + 9.6) < 1e-2


def test_two_ends_after_a_step_each_are_not_called_converged_too_early() -> None:
    """After a block at each end and its check none of the largest is converged, and of the smallest only true zeros."""
    pairs = top_eigenpairs(product(operator([7.0, 3.0], 80)), 80, 5, which="both", max_products=4)
    assert len(pairs.eigenvalues) == 10
    assert not bool(pairs.converged[:5].any())
    assert bool((pairs.eigenvalues[pairs.converged].abs() < 1e-13).all())


def test_every_end_holds_over_random_spectra() -> None:
    """Over 20 random operators, whichever pairs are wanted, what converged is one of them within its interval."""
    generator = torch.Generator().manual_seed(6)
    for trial in range(20):
        n = int(torch.randint(8, 60, (1,), generator=generator))
        spectrum = (
            torch.randn(n, generator=generator, dtype=torch.float64),
            torch.randint(-3, 4, (n,), generator=generator).double(),
        )[trial % 2]
        matrix = operator(spectrum.tolist(), n, seed=trial)
        for which in ("smallest", "both", "magnitude"):
            basis = None if trial % 3 else 16
            pairs = top_eigenpairs(
                product(matrix), n, 3, tol=1e-3, which=which, generator=generator, max_basis=basis, max_products=400
            )
            true = wanted(matrix, 3, which)
            if which == "magnitude":
                assert torch.allclose(pairs.eigenvalues.abs(), true.abs(), rtol=1e-3, atol=1e-9), (trial, which)
                every = torch.linalg.eigvalsh(matrix)
                inside = ((pairs.lower[:, None] <= every) & (every <= pairs.upper[:, None])).any(1)
            else:
                inside = (pairs.lower <= true) & (true <= pairs.upper)
            assert bool(inside[pairs.converged].all()), (trial, which)
            assert bool(pairs.converged.all()), (trial, which)


def test_the_bound_holds_over_random_spectra() -> None:
    """Over 63 random operators of seven kinds the true eigenvalue lies in the interval of every converged pair."""
    generator = torch.Generator().manual_seed(5)
    for trial in range(63):
        n = int(torch.randint(6, 120, (1,), generator=generator))
        normal = torch.randn(n, generator=generator, dtype=torch.float64)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        kinds = (
            normal,
            normal.round(),
            -normal.abs(),
            normal.pow(3) * 1e-6,
            1 / (1 + torch.arange(n, dtype=torch.float64)) ** (0.5 + trial % 5),
            torch.cat([10 + 1e-5 * uniform[:3], 9 * uniform[3:]]),
            torch.cat([uniform[: n // 2], -uniform[: n - n // 2]]) + 5 * (uniform > 0.9),
        )
        matrix = operator(kinds[trial % 7].tolist(), n, seed=trial)
        tol = (1e-1, 1e-2, 1e-3, 1e-6)[trial // 7 % 4]
        pairs = top_eigenpairs(product(matrix), n, 5, tol=tol, generator=generator)
        true = torch.linalg.eigvalsh(matrix).flip(0)[:5]
        inside = (pairs.lower <= true) & (true <= pairs.upper)
        assert bool(inside[pairs.converged].all()), (trial, tol)


def test_the_bound_is_met_with_equality_by_two_by_two() -> None:
    """For [[a, r], [r, b]], the Ritz vector e_1 and the exact lambda_2 the bound is lambda_1 - a exactly."""
    a, b, r = 3.0, 1.0, 0.2
    low, high = torch.linalg.eigvalsh(torch.tensor([[a, r], [r, b]], dtype=torch.float64)).tolist()
    bound = ritz_bounds(torch.tensor([a], dtype=torch.float64), torch.tensor([[r * r]], dtype=torch.float64), low)
    assert abs(float(bound[0]) - (high - a)) < 1e-14


def rotated(matrix: Tensor, k: int, angle: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ritz values, and the residuals' Gram matrix, of k eigenvectors turned towards random directions by an angle."""
    n = len(matrix)
    leading = torch.linalg.eigh(matrix)[1].flip(1)[:, :k]
    turned = torch.randn(n, k, generator=generator, dtype=torch.float64) / n**0.5
    # Each vector by an angle of its own, so that the worst need not be the last.
    turned = turned * angle * 10 ** (-2 * torch.rand(k, generator=generator, dtype=torch.float64))
    basis, _ = torch.linalg.qr(leading + turned)
    values, rotation = torch.linalg.eigh(basis.T @ matrix @ basis)
    vectors = basis @ rotation.flip(1)
    residuals = matrix @ vectors - vectors * values.flip(0)
    return values.flip(0), residuals.T @ residuals


def test_the_bound_holds_however_far_vectors_are_turned() -> None:
    """Over 600 operators and turned eigenvectors, with lambda_{k+1} exact, each eigenvalue is within its bound.

    One pair that is far off does not spoil those of the others.
    """
    generator = torch.Generator().manual_seed(7)
    for trial in range(600):
        n, k = 6 + trial % 20, 1 + trial % 5
        normal = torch.randn(n, generator=generator, dtype=torch.float64)
        kinds = (normal, normal.abs() ** 3, (2 * normal).round() + 1e-3 * normal, 2.0 ** -torch.arange(n).double())
        matrix = operator(kinds[trial % 4].tolist(), n, seed=trial)
        true = torch.linalg.eigvalsh(matrix).flip(0)
        values, gram = rotated(matrix, k, 0.3 * 10.0 ** -(trial % 7 / 2), generator)
        rounding = 100 * torch.finfo(torch.float64).eps * float(true.abs().max())
        bounds = ritz_bounds(values, gram, float(true[k]))
        assert bool(((values - true[:k]).abs() <= bounds + rounding).all()), trial
    # Residuals 1 and 1e-3 at gaps of 1: the second pair's bound is its own square over its gap.
    apart = ritz_bounds(torch.tensor([10.0, 5.0]).double(), torch.diag(torch.tensor([1.0, 1e-6]).double()), 4.0)
    assert float(apart[1]) == pytest.approx(1e-6, rel=1e-3)


def test_inner_products_are_float64_whatever_the_vectors() -> None:
    """The float32 inner product of vectors longer than a chunk equals the float64 one of the same numbers."""
    rows = random_rows(3, torch.empty(0, 200_003, dtype=torch.float32), torch.Generator().manual_seed(0))
    assert torch.allclose(inner(rows, rows), rows.double() @ rows.double().T, rtol=1e-14)


def test_one_pass_of_gram_schmidt_would_not_do() -> None:
    """A block that is all but 1e-9 in the basis's span comes out orthogonal to it, to rounding of what is left."""
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(0, 500, dtype=torch.float64)
    basis, _ = orthonormalise(random_rows(20, like, generator), like, 0.0, generator)
    block = random_rows(3, basis[:, :20], generator) @ basis + 1e-9 * random_rows(3, like, generator)
    rest, coefficients = project_out(block, basis)
    assert float(inner(basis, rest).abs().max()) < 1e-14 * float(rest.norm())
    assert torch.allclose(coefficients.T @ basis + rest, block, atol=1e-13)


def test_a_block_that_breaks_down_is_filled_with_new_directions() -> None:
    """Dependent rows are replaced by orthonormal ones with no coupling, and the factorisation still holds."""
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(0, 12, dtype=torch.float64)
    basis, _ = orthonormalise(random_rows(4, like, generator), like, 0.0, generator)
    row, _ = project_out(random_rows(1, like, generator), basis)
    block = torch.cat([row, 2 * row, torch.zeros_like(row)])
    new, factors = orthonormalise(block, basis, 1e-10, generator)
    assert torch.allclose(inner(torch.cat([basis, new]), torch.cat([basis, new])), torch.eye(7, dtype=torch.float64))
    assert torch.allclose(factors.T @ new, block, atol=1e-12)
    assert bool((factors[1:] == 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 31}, "at most the number"),
        ({"tol": -1.0}, "tol must be"),
        ({"tol": 0.0}, "tol must be"),
        ({"tol": 2.0}, "tol must be"),
        ({"tol": float("nan")}, "tol must be"),
        ({"method": "lanzcos"}, "Did you mean 'lanczos'"),
        ({"which": "top"}, "largest, smallest, both, magnitude"),
        ({"which": "both", "k": 16}, "half the number"),
        ({"which": "both", "max_basis": 16}, "max_basis must be at least 17"),
        ({"which": "both", "method": "power", "max_products": 3}, "at least 4 products"),
        ({"which": "magnitude", "max_products": 3}, "at least 4 products"),
        ({"which": "both", "initial": torch.ones(30, 1)}, "one end of the spectrum"),
        ({"dtype": torch.bfloat16}, "float32 or torch.float64"),
        ({"max_basis": 3}, "max_basis must be at least"),
        ({"max_products": 1}, "at least 2 products"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    """Each bad argument is an ArgumentError that says what must hold."""
    with pytest.raises(ArgumentError, match=message):
        top_eigenpairs(product(operator([1.0], 30)), 30, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("matmat", "message"),
    [
        (lambda block: block[:-1], "shape"),
        (lambda block: block / 0, "finite"),
        (lambda block: torch.roll(block, 1, 0), "symmetric"),
    ],
)
def test_a_matmat_that_is_no_symmetric_operator_is_refused(matmat: Callable[[Tensor], Tensor], message: str) -> None:
    """A wrong shape, NaN and an unsymmetric product are told apart by name."""
    with pytest.raises(ArgumentError, match=message):
        top_eigenpairs(matmat, 30, 3)


def test_a_matmat_may_write_into_its_argument() -> None:
    """The solver hands out a copy of its block, so a product in place gives the same eigenvalues."""
    diagonal = torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]

    def destroying(block: Tensor) -> Tensor:
        image = diagonal * block
        block.zero_()
        return image

    for method in METHODS:
        for matmat in (destroying, lambda block: block.mul_(diagonal)):
            guides = [destroying] if method == "guided" else []
            pairs = top_eigenpairs(matmat, 200, 2, method=method, guides=guides)
            assert torch.allclose(pairs.eigenvalues, torch.tensor([1, 1 - 2 / 199]).double(), rtol=1e-3)
            assert bool(pairs.converged.all())


@pytest.mark.parametrize("exponent", [-100, -30, 30, 150])
def test_the_scale_of_the_operator_does_not_matter(exponent: int) -> None:
    """Spectra scaled by powers of ten from 1e-100 to 1e150 give scaled eigenvalues, without overflow."""
    scale = 10.0**exponent
    diagonal = scale * torch.linspace(-1, 1, 200, dtype=torch.float64)[:, None]
    pairs = top_eigenpairs(lambda block: diagonal * block, 200, 2)
    assert torch.allclose(pairs.eigenvalues / scale, torch.tensor([1, 1 - 2 / 199]).double(), rtol=1e-3)
    assert bool(pairs.converged.all())


def test_the_same_generator_gives_the_same_bits() -> None:
    """Two runs from equal generators agree bit for bit, and the global random state is not used."""
    matrix = operator([1 / (1 + i) for i in range(100)], 100)
    before = torch.get_rng_state()
    runs = [
        top_eigenpairs(product(matrix), 100, 3, generator=torch.Generator().manual_seed(3)).eigenvalues
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    assert torch.equal(before, torch.get_rng_state())
