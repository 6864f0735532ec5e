"""The trace of a sample's Hessian says how far that of all the data may be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sharpscope import Problem, TraceResult, trace
from sharpscope.objective.accumulate import PerBatch
from sharpscope.sampling import trace_error

GENERATOR = torch.Generator().manual_seed(0)
# Curvatures of 20,000 examples along 12 axes, of heavy tails, as those of a trained network are.
POPULATION = torch.randn(20_000, 12, generator=GENERATOR).double().exp()


class Curved(nn.Module):
    """``1/2 w' diag(c) w`` of each example c: Hessian ``diag(c)``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(12, dtype=torch.float64))

    def forward(self, curvatures: Tensor) -> Tensor:
        return 0.5 * (curvatures * self.w.square()).sum(1)


def problem(curvatures: Tensor, weight_decay: float = 0.0) -> Problem:
    ones = torch.ones(len(curvatures), dtype=torch.float64)
    return Problem(
        model=Curved(), loss=lambda out, t: (out * t).mean(), data=(curvatures, ones), weight_decay=weight_decay
    )


def parts(forms: np.ndarray, weights: np.ndarray) -> PerBatch:
    """Micro-batches whose Hessians are (B,) multiples of the identity in one dimension."""
    found = torch.from_numpy(forms)[:, None, None]
    return PerBatch(torch.from_numpy(weights), found, found[:, 0].square(), (1,) * len(forms))


def test_of_one_weight_it_is_the_standard_error_of_a_ratio_of_sums() -> None:
    """With n = 1, ``sqrt(B/(B-1) sum (h_b - A_b T)^2) / sum A_b``; with equal weights std/sqrt(B)."""
    rng = np.random.default_rng(0)
    forms, weights = rng.exponential(1, 30), rng.integers(1, 5, 30).astype(float)
    mean = forms.sum() / weights.sum()
    expected = math.sqrt(30 / 29 * ((forms - weights * mean) ** 2).sum()) / weights.sum()
    assert trace_error(parts(forms, weights), 1) == pytest.approx(expected)
    assert trace_error(parts(forms, np.ones(30)), 1) == pytest.approx(forms.std(ddof=1) / math.sqrt(30))


def test_it_covers_the_trace_of_all_the_data() -> None:
    """Of 60 samples of 400, 85 % or more have the population's trace within two standard errors of the right size."""
    truth = float(POPULATION.mean(0).sum())
    off, stated = [], []
    for seed in range(60):
        chosen = torch.randperm(len(POPULATION), generator=torch.Generator().manual_seed(seed))[:400]
        found = trace(problem(POPULATION[chosen]), 4, torch.Generator().manual_seed(seed), population=True)
        off.append(found.whole.value - truth)
        stated.append(found.whole.standard_error)
    assert (np.abs(off) < 2 * np.array(stated)).sum() >= 51
    assert 0.7 < float(np.std(off) / np.mean(stated)) < 1.4


def test_it_does_not_change_the_trace() -> None:
    """With and without it the estimate is the same, and weight decay, which no example carries, adds nothing."""
    of = POPULATION[:500]
    plain, sampled = (trace(problem(of), 6, population=p) for p in (False, True))
    assert plain.sampling_error is None
    assert sampled.trace.value == pytest.approx(plain.trace.value, rel=1e-12)
    assert sampled.cost.passes == plain.cost.passes
    decayed = trace(problem(of, weight_decay=3.0), 6, population=True)
    assert decayed.sampling_error == pytest.approx(sampled.sampling_error)


def test_few_examples_say_nothing_of_the_rest() -> None:
    """Fewer than ten micro-batches give no standard error, and no number made up."""
    assert trace_error(parts(np.ones(9), np.ones(9)), 1) is None
    assert trace(problem(POPULATION[:9]), 2, population=True).sampling_error is None


def test_micro_batches_without_loss_terms_are_no_units() -> None:
    """Of 60 examples with 5 labels nothing is stated; zeros change nothing where there are enough others."""
    rng = np.random.default_rng(0)
    forms, weights = rng.exponential(1, 60), np.zeros(60)
    weights[:5] = 1
    assert trace_error(parts(forms * weights, weights), 1) is None
    weights[:30] = 1
    some = trace_error(parts((forms * weights)[:30], weights[:30]), 1)
    assert trace_error(parts(forms * weights, weights), 1) == pytest.approx(some)


def test_it_is_saved_and_said() -> None:
    """It comes back from JSON, and the table's note has both errors in one."""
    found = trace(problem(POPULATION[:500]), 6, population=True)
    assert TraceResult.from_dict(found.to_dict()).sampling_error == found.sampling_error
    assert found.sampling_error is not None
    assert found.whole.standard_error == pytest.approx(math.hypot(found.trace.standard_error, found.sampling_error))
    assert f"for all the data of which these are a sample, {found.whole}" in found.summary()
