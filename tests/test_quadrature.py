"""Quadrature and trace against spectra that are known because the operator was built from them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import scipy.stats
import torch
from torch import Tensor

from conftest import quadratic
from sharpscope import ArgumentError
from sharpscope.linalg import TraceEstimate, lanczos_quadrature, trace_and_frobenius
from sharpscope.linalg.trace_and_frobenius import trace_from_images

DTYPES = (torch.float64, torch.float32)


def product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda block: matrix @ block


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padded(*values: float, n: int = 60) -> Tensor:
    return torch.cat([torch.tensor(values), torch.zeros(n - len(values))])


SPECTRA = {
    "flat": torch.linspace(1, 3, 60),
    "both signs": torch.linspace(-1, 1, 60),
    "negative": torch.linspace(-3, -1, 60),
    "power law": 1 / torch.arange(1, 61) ** 2.0,
    "geometric": 0.7 ** torch.arange(60),
    "low rank": padded(5, 4, 3, -2),
    "step": padded(*[1] * 20),
    "outliers": torch.cat([torch.tensor([5.0, 4, 3, 2, 1]), torch.linspace(-0.1, 0.1, 55)]),
    "scale 1e-6": 1e-6 * torch.linspace(-1, 3, 60),
    "identity": torch.full((60,), 2.0),
    "zero": torch.zeros(60),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_full_depth_run_is_exact(name: str, dtype: torch.dtype) -> None:
    """After n steps ``sum_j w_j f(node_j)`` is ``v' f(H) v`` for each probe v, whatever smooth f."""
    matrix = quadratic(SPECTRA[name]).to(dtype)
    values, vectors = torch.linalg.eigh(matrix.double())
    rule = lanczos_quadrature(product(matrix), 60, 3, 60, dtype=dtype, generator=seeded(1))
    scale = float(values.abs().max()) or 1.0
    shares = (rule.probes.double() @ vectors).square()
    for f in (torch.ones_like, torch.sin, torch.exp, lambda t: t**5):
        exact = (shares * f(values / scale)).sum(1)
        found = (rule.weights * f(rule.nodes / scale)).sum(1)
        assert float((found - exact).abs().max()) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_weights_are_shares(name: str, dtype: torch.dtype) -> None:
    """Weights are real, not negative, and each probe's sum 1; nodes lie within the spectrum."""
    matrix = quadratic(SPECTRA[name]).to(dtype)
    rule = lanczos_quadrature(product(matrix), 60, 3, 12, dtype=dtype)
    assert rule.nodes.dtype == rule.weights.dtype == torch.float64
    assert rule.nodes.shape == rule.weights.shape == (3, 12)
    assert bool((rule.weights >= 0).all())
    assert torch.allclose(rule.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(matrix.double())
    slack = 50 * torch.finfo(dtype).eps * float(values.abs().max())
    assert float(values[0]) - slack <= float(rule.nodes.min())
    assert float(rule.nodes.max()) <= float(values[-1]) + slack


def test_s_steps_are_exact_to_degree_2s_minus_1() -> None:
    """Five steps give ``v' H^9 v`` to rounding, and not ``v' H^10 v``."""
    values = SPECTRA["both signs"].double()
    matrix = quadratic(values)
    rule = lanczos_quadrature(product(matrix), 60, 4, 5)
    for power in range(11):
        exact = (rule.probes @ torch.linalg.matrix_power(matrix, power) * rule.probes).sum(1)
        off = float(((rule.weights * rule.nodes**power).sum(1) - exact).abs().max())
        assert off > 1e-6 if power == 10 else off < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_invariant_subspace_is_no_trouble(scale: float, dtype: torch.dtype) -> None:
    """With five distinct eigenvalues, at any scale, all weight is on these after 40 steps; with one, one step is it."""
    values = scale * torch.tensor([-2.0, 0, 1, 3, 7], dtype=torch.float64).repeat_interleave(12)
    matrix = quadratic(values).to(dtype)
    rule = lanczos_quadrature(product(matrix), 60, 3, 40, dtype=dtype)
    shares = (rule.probes.double() @ torch.linalg.eigh(matrix.double())[1]).square().reshape(3, 5, 12).sum(2)
    near = (rule.nodes[:, None] / scale - torch.tensor([-2.0, 0, 1, 3, 7])[:, None]).abs() < 100 * torch.finfo(
        dtype
    ).eps
    assert torch.allclose((rule.weights[:, None] * near).sum(2), shares, rtol=0, atol=100 * torch.finfo(dtype).eps)
    alone = lanczos_quadrature(lambda block: scale * block, 60, 3, 40, dtype=dtype)
    assert (alone.num_products, alone.num_matvecs) == (1, 3)
    assert torch.allclose(alone.nodes, torch.tensor(scale, dtype=torch.float64), rtol=4 * torch.finfo(dtype).eps)


def test_a_step_is_one_product_for_all_probes() -> None:
    """The runs advance together: as many products as steps, each with a column for each probe that still runs."""
    matrix, widths = quadratic(SPECTRA["flat"]), []

    def counted(block: Tensor) -> Tensor:
        widths.append(block.shape[1])
        return matrix @ block

    rule = lanczos_quadrature(counted, 60, 5, 8)
    assert widths == [5] * 8
    assert (rule.num_products, rule.num_matvecs) == (8, 40)


def test_the_same_seed_gives_the_same_bits() -> None:
    """Equal generators give equal nodes and weights, another seed others; torch's own random state stays."""
    matrix, before = quadratic(SPECTRA["outliers"]), torch.get_rng_state()
    one, again, other = (lanczos_quadrature(product(matrix), 60, 5, 8, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(one.nodes, again.nodes)
    assert torch.equal(one.weights, again.weights)
    assert not torch.equal(one.nodes, other.nodes)
    assert torch.equal(torch.get_rng_state(), before)


def test_known_eigenpairs_are_put_back_exactly() -> None:
    """With the five outliers taken out each has weight 1/n at its place, and the rest is resolved within its range."""
    matrix = quadratic(SPECTRA["outliers"])
    values, vectors = torch.linalg.eigh(matrix)
    known = values[-5:], vectors[:, -5:]
    rule = lanczos_quadrature(product(matrix), 60, 3, 8, known=known)
    assert torch.equal(rule.nodes[:, :5], known[0].expand(3, 5))
    assert torch.equal(rule.weights[:, :5], torch.full((3, 5), 1 / 60, dtype=torch.float64))
    assert float(rule.nodes[:, 5:].abs().max()) <= 0.1 + 1e-12
    assert torch.allclose(rule.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float((rule.probes @ known[1]).abs().max()) < 1e-14


def test_what_is_not_symmetric_is_refused() -> None:
    """A product with a non-symmetric matrix, or with one that changes, raises, as does a known vector too long."""
    skew = torch.randn(60, 60, generator=seeded(0), dtype=torch.float64)
    with pytest.raises(ArgumentError, match="symmetric"):
        lanczos_quadrature(product(skew), 60, 2, 5)
    with pytest.raises(ArgumentError, match="finite"):
        lanczos_quadrature(lambda block: block / 0, 60, 2, 5)
    with pytest.raises(ArgumentError, match="orthonormal"):
        lanczos_quadrature(product(quadratic(SPECTRA["flat"])), 60, known=(torch.ones(1), 2 * torch.eye(60)[:, :1]))
    for wrong in ({"probes": 1}, {"probes": 61}, {"steps": 0}, {"probes": True}):
        with pytest.raises(ArgumentError, match="at least"):
            lanczos_quadrature(product(skew), 60, **wrong)


def errors(matrix: Tensor, probes: int, seeds: int) -> Tensor:
    """Over seeds: error of the trace and its standard error, error of the squared norm and its (seeds, 4)."""
    truth = float(matrix.trace()), float(matrix.square().sum())

    def row(r: TraceEstimate) -> list[float]:
        return [r.trace - truth[0], r.trace_error, r.squared - truth[1], r.squared_error]

    n = len(matrix)
    runs = [trace_and_frobenius(product(matrix), n, probes, generator=seeded(seed)) for seed in range(seeds)]
    return torch.tensor([row(r) for r in runs], dtype=torch.float64)


@pytest.mark.parametrize("name", SPECTRA)
def test_trace_and_squared_norm_are_unbiased_and_their_errors_cover(name: str) -> None:
    """Over 100 seeds the mean error is within 4 of its own; 2 errors of t cover 95 %, and the squared one is no less.

    The least of 100 that a true 95 % interval covers, but for one chance in 10,000, is 87.
    """
    runs = errors(quadratic(SPECTRA[name]), 6, 100)
    for off, stated in ((runs[:, 0], runs[:, 1]), (runs[:, 2], runs[:, 3])):
        # Where the estimate is exact what is left is rounding, which is not random; the stated error holds it.
        assert abs(float(off.mean())) <= 4 * float(off.std()) / 10 + float(stated.min())
        assert int((off.abs() <= scipy.stats.t.ppf(0.975, 5) * stated).sum()) >= 87
        # Efron and Stein: the jackknife's variance is no smaller on average; 1.5 for the scatter over 100 seeds.
        assert float(off.square().mean()) <= 1.5 * float(stated.square().mean())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_operator_of_lower_rank_than_probes_is_exact(dtype: torch.dtype) -> None:
    """Rank 4 and 8 probes give trace 10 and squared norm 54, and errors, that are rounding only."""
    found = trace_and_frobenius(product(quadratic(SPECTRA["low rank"]).to(dtype)), 60, 8, dtype=dtype)
    assert abs(found.trace - 10) < 4 * found.trace_error < 1e4 * torch.finfo(dtype).eps
    assert abs(found.squared - 54) < 4 * found.squared_error < 1e5 * torch.finfo(dtype).eps


def test_as_many_probes_as_dimensions_give_all_of_it() -> None:
    """Four probes in four dimensions leave one direction at a time to chance, and none of the trace."""
    found = trace_and_frobenius(product(quadratic(torch.tensor([5.0, 4, 3, -2]))), 4, 4)
    assert abs(found.trace - 10) < 1e-10
    assert abs(found.squared - 54) < 1e-10


def test_known_eigenpairs_leave_the_trace_of_the_rest() -> None:
    """Where the rest is a multiple of the identity nothing is left to chance: 5 + 4 - 3 + 57 * 0.5, and the squares."""
    matrix = quadratic(torch.cat([torch.tensor([5.0, 4, -3]), torch.full((57,), 0.5)]))
    values, vectors = torch.linalg.eigh(matrix)
    pick = [0, 58, 59]
    known = values[pick], vectors[:, pick]
    rule = lanczos_quadrature(product(matrix), 60, 4, 3, known=known)
    known = values[pick], vectors[:, pick].T.contiguous()
    found = trace_from_images(lambda rows: rows @ matrix, rule.probes, rule.images, known=known, generator=seeded(0))
    assert abs(found.trace - 34.5) < 1e-12
    assert abs(found.squared - 64.25) < 1e-12
    assert found.trace_error < 1e-12


def test_a_negative_trace_is_no_reason_to_stop() -> None:
    """With outliers of both signs and a negative sum, the trace is as unbiased as any; zero has trace zero."""
    values = torch.cat([torch.tensor([10.0, -14, 6, -9]), torch.linspace(-0.2, 0.1, 56)])
    runs = errors(quadratic(values), 8, 30)
    assert abs(float(runs[:, 0].mean())) < 4 * float(runs[:, 0].std()) / 30**0.5
    assert trace_and_frobenius(torch.zeros_like, 60, 8) == TraceEstimate(0.0, 0.0, 0.0, 0.0, 1, 8)


def test_fast_decay_makes_it_far_better_than_a_plain_mean() -> None:
    """On a geometric spectrum 12 probes reach a tenth of the error of the mean of as many ``v'Hv``."""
    matrix = quadratic(SPECTRA["geometric"])
    mine = errors(matrix, 12, 20)[:, 0].square().mean().sqrt()
    probes = torch.randn(200, 60, generator=seeded(0), dtype=torch.float64)
    plain = (60 * (probes @ matrix * probes).sum(1) / probes.square().sum(1)).std() / 24**0.5
    assert float(mine) < float(plain) / 10
