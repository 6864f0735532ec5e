"""The sampling error over the data: closed forms, invariances, and coverage counted on populations that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from conftest import classifier
from sharpscope import ArgumentError, Objective, Problem, top_eigenvalues
from sharpscope.objective.accumulate import PerBatch
from sharpscope.sampling import sampling_error, sampling_error_of_batches

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(120, 3, generator=GENERATOR).double() * torch.tensor([2.0, 1.2, 0.7]).double()


class Curved(nn.Module):
    """``1/2 w' diag(x^2) w`` of each example x: Hessian ``diag(x^2)``, eigenvectors known."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(count, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x * self.w).square().sum(1)


class Walked:
    """Batches that do not say how many examples they hold."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def first(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).mean()


def problem(inputs: Tensor = INPUTS, weight_decay: float = 0.0, batches: list[int] | None = None) -> Problem:
    """The mean of ``Curved`` over ``inputs``, in loader batches of the sizes given."""
    ones = torch.ones(len(inputs), dtype=torch.float64)
    sizes = batches or [len(inputs)]
    data = list(zip(inputs.split(sizes), ones.split(sizes), strict=True))
    return Problem(model=Curved(inputs.shape[1]), loss=first, data=data, weight_decay=weight_decay)


def measured(of: Problem, confidence: float = 0.95, k: int = 2, **options: int | str) -> tuple[Any, np.ndarray]:
    """The sampling error along the axes, which are the eigenvectors, and the eigenvalues."""
    inputs = torch.cat([x for x, _ in of.data])
    values = inputs.square().mean(0)[:k] + of.weight_decay
    vectors = torch.eye(inputs.shape[1], dtype=torch.float64)[:, :k]
    return sampling_error(Objective(of, **options), vectors, values, confidence), values.numpy()


def parts_of(units: np.ndarray, vectors: np.ndarray, weights: np.ndarray | None = None) -> PerBatch:
    """What units with Hessians (B, n, n) say of ``vectors`` (n, k)."""
    pushed = units @ vectors
    given = np.ones(len(units)) if weights is None else weights
    forms, squares = torch.from_numpy(vectors.T @ pushed), torch.from_numpy((pushed**2).sum(1))
    return PerBatch(torch.from_numpy(given), forms, squares, (1,) * len(units))


def bias_of(values: np.ndarray, mixing: np.ndarray, own: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """The stated bias of eigenvalues ``values`` (k,), k at most 3, where the mean over units of ``v_i'H v_j`` has the
    variance ``mixing`` (k, k) off the diagonal and ``own`` (k,) on it, and R is ``outside`` (k,).
    """
    k, units = len(values), 12
    signs = np.tile([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], (3, 1))  # columns without correlation
    scatter = np.sqrt((units - 1) * mixing) * signs[:, 2, None, None]
    scatter[:, np.arange(k), np.arange(k)] = np.sqrt((units - 1) * own) * signs[:, :k]
    forms = np.diag(values) + scatter
    squares = values**2 + 2 * values * scatter.diagonal(axis1=1, axis2=2) + (scatter**2).sum(2) + (units - 1) * outside
    parts = PerBatch(torch.ones(units), torch.from_numpy(forms), torch.from_numpy(squares), (1,) * units)
    return np.asarray(sampling_error_of_batches(parts).bias)


def sample_of(rows: np.ndarray, chosen: np.ndarray, units: int, k: int) -> tuple[PerBatch, np.ndarray]:
    """Of H = mean of x x' over the ``chosen`` rows: the top k eigenvalues, and what ``units`` parts say of them."""
    x = rows[chosen]
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    parts = x.reshape(units, -1, x.shape[1])
    hessians = parts.transpose(0, 2, 1) @ parts
    return parts_of(hessians, vectors[:, ::-1][:, :k], np.full(units, len(x) / units)), values[::-1][:k]


def test_few_examples_give_the_standard_error_of_a_mean() -> None:
    """Example by example, se is ``std(v'H_i v) / sqrt(n)``, and without any mixing the interval is Student's."""
    inputs = INPUTS[:40, :1] + 3
    result, values = measured(problem(inputs), k=1)
    curvatures = inputs[:, 0].square().numpy()
    assert (result.examples, result.parts) == (40, 40)
    assert result.se[0] == pytest.approx(curvatures.std(ddof=1) / math.sqrt(40))
    assert result.bias[0] == 0
    half = stats.t.ppf(0.975, 39) * result.se[0] / values[0]
    assert result.lower[0] == pytest.approx(values[0] * math.exp(-half))
    assert result.upper[0] == pytest.approx(values[0] * math.exp(half))


def test_confidence_is_of_students_t() -> None:
    """Half-widths at 50 and 95 % are in the ratio of the quantiles."""
    inputs = INPUTS[:30, :1] + 3
    wide, narrow = (
        math.log(float(r.upper[0] / r.lower[0])) for r, _ in (measured(problem(inputs), c, 1) for c in (0.95, 0.5))
    )
    assert wide / narrow == pytest.approx(stats.t.ppf(0.975, 29) / stats.t.ppf(0.75, 29))


def test_the_loaders_batches_do_not_matter() -> None:
    """The same examples in other batches, or in another micro-batch, have the same units and the same error."""
    one, _ = measured(problem())
    many, _ = measured(problem(batches=[7, 50, 1, 62]))
    other, _ = measured(problem(), micro_batch=64)
    assert one.parts == 60
    unsized = problem(batches=[7, 50, 1, 62])
    unsized = replace(unsized, data=Walked(unsized.data))
    walked, _ = measured(unsized)
    for result in (many, other, walked):
        assert result.parts == one.parts
        assert np.allclose(result.se, one.se, rtol=1e-12)
        assert np.allclose(result.upper, one.upper, rtol=1e-12)


def test_a_small_micro_batch_is_kept_and_given_back() -> None:
    """Units are never larger than the micro-batch, and the objective's own is what it was."""
    objective = Objective(problem(), micro_batch=1)
    result = sampling_error(objective, torch.eye(3).double()[:, :1], INPUTS.square().mean(0)[:1])
    assert result.parts == 120
    larger = Objective(problem(), micro_batch=64)
    sampling_error(larger, torch.eye(3).double()[:, :1], INPUTS.square().mean(0)[:1])
    assert larger.micro_batch == 64


def test_kept_batches_are_the_units() -> None:
    """Where the loader's batches define the loss, unequal ones are the units of the ratio estimator."""
    sizes = [10, 5, 15, 10, 5, 15, 10, 5, 15, 30]
    result, values = measured(problem(batches=sizes), micro_batch="loader")
    assert result.parts == len(sizes)
    sums = np.array([part.sum() for part in INPUTS[:, 0].square().split(sizes)])
    off = sums - np.array(sizes) * values[0]
    assert result.se[0] == pytest.approx(math.sqrt(10 / 9 * (off**2).sum()) / 120)


def test_only_relative_weights_matter() -> None:
    """Weights of loss terms all times 8 with curvatures times 8 change nothing."""
    units = np.stack([np.diag(row) for row in INPUTS.square().numpy()])
    weights = np.linspace(0.5, 2, 120)
    plain = sampling_error_of_batches(parts_of(units, np.eye(3)[:, :2], weights))
    scaled = sampling_error_of_batches(parts_of(8 * units, np.eye(3)[:, :2], 8 * weights))
    for name in ("se", "lower", "upper", "bias"):
        assert np.array_equal(getattr(plain, name), getattr(scaled, name))


def test_errors_scale_with_the_loss() -> None:
    """Twice the loss has twice the eigenvalues, errors and intervals, and the same ratio."""
    units = np.stack([np.outer(x, x) for x in INPUTS.numpy()])
    vectors = np.linalg.eigh(units.sum(0))[1][:, ::-1][:, :2]
    plain, double = (sampling_error_of_batches(parts_of(f * units, vectors)) for f in (1, 2))
    for name in ("se", "lower", "upper", "bias"):
        assert np.allclose(2 * getattr(plain, name), getattr(double, name), rtol=1e-12)
    assert plain.ratio is not None
    assert double.ratio is not None
    assert plain.ratio.upper == pytest.approx(double.ratio.upper)


def test_weight_decay_shifts_the_interval() -> None:
    """A decay of 0.5 moves both ends by 0.5 and leaves se and bias; the ratio is that of the shifted values."""
    plain, _ = measured(problem())
    decayed, values = measured(problem(weight_decay=0.5))
    assert np.allclose(decayed.se, plain.se, rtol=1e-12)
    assert np.allclose(decayed.bias, plain.bias, rtol=1e-12)
    assert np.allclose(decayed.lower, plain.lower + 0.5, rtol=1e-12)
    assert np.allclose(decayed.upper, plain.upper + 0.5, rtol=1e-12)
    assert decayed.ratio is not None
    squares = INPUTS.square().numpy()[:, :2]
    # Of two examples a unit.
    rates = (squares / values * [1, -1]).sum(1).reshape(60, 2).sum(1)
    rates -= rates.mean()
    se = math.sqrt(60 / 59 * (rates**2).sum()) / 120
    assert decayed.ratio.se == pytest.approx(values[0] / values[1] * se)


def test_a_common_factor_leaves_the_ratio_sure() -> None:
    """Where every example's Hessian is a multiple of one matrix, eigenvalues scatter and their ratio does not."""
    factors = np.random.default_rng(0).gamma(2.0, size=200)
    result = sampling_error_of_batches(parts_of(factors[:, None, None] * np.diag([9.0, 1.0, 0.2]), np.eye(3)[:, :2]))
    assert result.ratio is not None
    assert result.se[0] > 0.4
    assert result.ratio.se == pytest.approx(0, abs=1e-12)


def test_the_squared_gap_of_a_2_by_2_matrix_is_corrected_exactly() -> None:
    """Over all sign patterns of a random 2 x 2 matrix, corrected squared gaps have the mean matrix's in the mean."""
    mean, step = np.diag([3.0, 1.0]), (0.3, 0.2, 0.4)
    mixing, own = np.array([[0.09, 0.16], [0.16, 0.04]]), np.array([0.09, 0.04])
    squares = []
    for signs in np.ndindex(2, 2, 2):
        a, b, c = (s * (2 * i - 1) for s, i in zip(step, signs, strict=True))
        values = np.linalg.eigvalsh(mean + np.array([[a, c], [c, b]]))[::-1]
        corrected = values - bias_of(values, mixing, own, np.zeros(2))
        squares.append((corrected[0] - corrected[1]) ** 2)
        assert corrected.sum() == pytest.approx(values.sum())
    assert np.mean(squares) == pytest.approx(4.0)


def test_intervals_lie_about_the_corrected_values() -> None:
    """Their logarithms' middle is off by bias / value, their half-width t times se and bias in squares, over value."""
    units = np.stack([np.outer(x, x) for x in INPUTS.numpy()])
    mean = units.mean(0)
    values, vectors = (part[..., ::-1][..., :2] for part in np.linalg.eigh(mean))
    result = sampling_error_of_batches(parts_of(units, vectors))
    t, off = stats.t.ppf(0.975, 119), result.bias / values
    assert (off[0] > 0.01, off[0] != off[1]) == (True, True)
    lower, upper = np.log(result.lower / values), np.log(result.upper / values)
    assert np.allclose((lower + upper) / 2, -off, rtol=1e-10)
    assert np.allclose((upper - lower) / 2, t * np.hypot(result.se, result.bias) / values, rtol=1e-10)
    ratio, value = result.ratio, values[0] / values[1]
    assert ratio is not None
    assert math.sqrt(ratio.lower * ratio.upper) == pytest.approx(value * math.exp(off[1] - off[0]))
    assert ratio.bias == pytest.approx(off[0] - off[1])
    half = t * math.sqrt((ratio.se / value) ** 2 + off @ off)
    assert math.log(ratio.upper / ratio.lower) / 2 == pytest.approx(half)


def test_the_bias_is_bounded_in_a_cluster() -> None:
    """However close eigenvalues are, none is moved past the middle of its gaps; the equal are not moved apart."""
    values = np.array([2.0, 2.0 - 1e-9, 1.0])
    large = np.full((3, 3), 1e6)
    bias = bias_of(values, large, np.full(3, 1e6), np.zeros(3))
    assert np.allclose(bias, [0.5, 0.5, -1.0], atol=1e-8)
    assert np.allclose(bias_of(np.ones(3), large, np.ones(3), np.full(3, 1e9)), 0.5)


def test_wide_gaps_give_second_order_perturbation() -> None:
    """Small against the gaps, the bias is ``sum_j Var M_ij / (lambda_i - lambda_j) + R_i / lambda_i``."""
    values, tiny = np.array([10.0, 4.0, -1.0]), 1e-5
    rng = np.random.default_rng(0)
    mixing = rng.random((3, 3)) * tiny
    mixing = mixing + mixing.T
    outside = rng.random(3) * tiny
    gaps = values[:, None] - values + np.diag([np.inf] * 3)
    wanted = (mixing / gaps).sum(1) + outside / values
    assert np.allclose(bias_of(values, mixing, np.zeros(3), outside), wanted, rtol=1e-4)


def test_the_bias_is_that_of_many_samples() -> None:
    """Over 200 samples of 200 Gaussian examples, the largest eigenvalue is too large by what is estimated."""
    rng = np.random.default_rng(0)
    spread = np.sqrt(np.r_[4.0, np.full(39, 0.5)])
    excess, stated = [], []
    for _ in range(200):
        rows = rng.standard_normal((200, 40)) * spread
        # The projection on the true first direction is the part of the error with mean zero.
        parts, values = sample_of(rows, np.arange(200), 50, 1)
        excess.append(values[0] - (rows[:, 0] ** 2).mean())
        stated.append(sampling_error_of_batches(parts).bias[0])
    assert np.mean(excess) > 0.1
    assert np.mean(stated) == pytest.approx(np.mean(excess), rel=0.25)


@pytest.mark.parametrize("tails", ["light", "heavy", "cluster"])
def test_intervals_cover_the_population(tails: str) -> None:
    """Of 95 % intervals from 100 samples of 400 of 20,000, at least 90 % hold each lambda and the ratio of all.

    The counts' own error is taken off: a coverage of 90 % falls below the bound once in a thousand.
    """
    rng = np.random.default_rng(0)
    top = np.full(4, 4.0) if tails == "cluster" else np.array([9.0, 4.0, 2.2, 2.0])
    rows = rng.standard_normal((20000, 40)) * np.sqrt(np.r_[top, np.linspace(1, 0.1, 36)])
    if tails == "heavy":
        rows *= np.exp(0.5 * rng.standard_normal((20000, 1)))
    true = np.linalg.eigvalsh(rows.T @ rows / 20000)[::-1][:4]
    wanted = np.r_[true, true[0] / true[3]]
    hits = np.zeros(5, int)
    for _ in range(100):
        parts, _ = sample_of(rows, rng.choice(20000, 400, replace=False), 50, 4)
        result = sampling_error_of_batches(parts)
        assert result.ratio is not None
        lower, upper = np.r_[result.lower, result.ratio.lower], np.r_[result.upper, result.ratio.upper]
        hits += (lower <= wanted) & (wanted <= upper)
    assert hits.min() >= stats.binom.ppf(1e-3, 100, 0.9)
    # Not by being endless: the largest, alone above its gap, is not always covered.
    assert tails == "cluster" or hits[0] <= 99


def test_a_real_result_takes_it() -> None:
    """What top_eigenvalues returns goes in as it is, costs 1 + 2k gradients, and comes out as JSON."""
    real = classifier(examples=200, weight_decay=0.01)
    found = top_eigenvalues(real, k=3, vectors=True)
    assert found.eigenvectors is not None
    found.eigenvectors.setflags(write=False)
    objective = Objective(real)
    result = sampling_error(objective, found.eigenvectors, found.eigenvalues)
    assert objective.gradients == pytest.approx(1 + 2 * 3)
    assert result.parts == 50
    assert (result.lower < found.eigenvalues).all()
    stated = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert {"se", "lower", "upper", "examples", "ratio"} <= set(stated)
    assert stated["examples"] == 200


def test_too_few_units_are_said() -> None:
    """Fewer than ten units give no number, but a sentence, and plain JSON."""
    result, _ = measured(problem(INPUTS[:9]))
    assert np.isnan(result.se).all()
    assert result.ratio is None
    assert result.reason is not None
    assert "at least 10 micro-batches" in result.reason
    assert "got 9" in result.reason
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["se"] is None
    assert np.isfinite(measured(problem(INPUTS[:10]))[0].se).all()


def test_a_ratio_to_nothing_is_not_stated() -> None:
    """Where lambda_k may be zero its interval is symmetric, holds zero, and the ratio has a reason instead."""
    units = np.stack([np.diag([9.0 + row[0], row[1]]) for row in INPUTS.numpy()])
    result = sampling_error_of_batches(parts_of(units, np.eye(2)))
    assert result.lower[1] < 0 < result.upper[1]
    value = float(INPUTS[:, 1].mean())
    assert (result.lower[1] + result.upper[1]) / 2 == pytest.approx(value - result.bias[1])
    assert result.ratio is None
    assert result.reason is not None
    assert "lambda_2 reaches zero" in result.reason


def test_what_does_not_fit_is_refused() -> None:
    """Another problem's eigenvalues, blocks of other shapes and a confidence of 95 are named."""
    objective, vectors = Objective(problem()), torch.eye(3).double()[:, :2]
    with pytest.raises(ArgumentError, match="must be those of this objective"):
        sampling_error(objective, vectors, torch.tensor([9.0, 9.0]))
    with pytest.raises(ArgumentError, match=r"got \(3, 2\) and \(3,\)"):
        sampling_error(objective, vectors, torch.ones(3))
    with pytest.raises(ArgumentError, match="between 0 and 1, got 95"):
        sampling_error(objective, vectors, torch.ones(2), confidence=95)
