"""What defines a sharpness measure, and what every measure is given to compute itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpscope.linalg import Eigenpairs
from sharpscope.linalg.top_eigenpairs import top_eigenpairs_rows
from sharpscope.objective import Objective, Progress
from sharpscope.random_streams import stream
from sharpscope.results import Measure
from sharpscope.results.statistics import Estimate, student
from sharpscope.resume import Journal
from sharpscope.sampling.rounding_sample import float32_error
from sharpscope.sharpness.maximize import Ascent
from sharpscope.weights.norm_ball import Ball

# Confidence level of the intervals over subsets or draws.
CONFIDENCE = 0.95

# Relative tolerance of lambda_max, and of the eigenvector that gradients are compared with.
EIGENVALUE_TOL = 1e-3


@dataclass(frozen=True)
class Settings:
    """The arguments that measures share; see ``measure_sharpness``."""

    m: tuple[int, ...]
    rho: tuple[float, ...]
    ball: Ball
    ascent: Ascent
    worst_case_ascent: Ascent
    sigma: float
    draws: int
    probes: int
    box: float
    recipe: Mapping[str, Any]


class MeasureContext:
    """The objective, the settings, a random stream for each measure, and eigenpairs that several measures use.

    What is chosen by timing goes through ``journal``, so that a resumed run repeats the choice.
    """

    def __init__(
        self, objective: Objective, settings: Settings, seed: int, progress: Progress | None, journal: Journal
    ) -> None:
        self.objective, self.settings, self.progress, self.journal = objective, settings, progress, journal
        self._seed = seed
        self._top: dict[tuple[str | None, float], Eigenpairs] = {}

    def generator(self, name: str) -> torch.Generator:
        """Return a generator for the measure ``name`` that does not depend on which other measures are computed."""
        return stream(self._seed, name)

    def stage_progress(self, stage: str) -> Progress | None:
        """Return ``progress`` with ``stage`` put before every label."""
        report = self.progress
        return None if report is None else (lambda label, done, total: report(f"{stage}, {label}", done, total))

    def scaled_products(self, ball: Ball, stage: str) -> Callable[[Tensor], Tensor]:
        """Return a function that multiplies rows (K, n) by ``D H D``, D at w. Cost: ``1 + 2K`` gradients."""
        objective, progress = self.objective, self.stage_progress(stage)
        scales = ball.scales(objective.terms.params)
        if scales is None:
            return lambda rows: objective.products(rows, progress)
        d = torch.cat([s.flatten() for s in scales]).to(objective.device, objective.dtype)
        return lambda rows: d * objective.products(d * rows, progress)

    def top_eigenpairs(self, ball: Ball) -> Eigenpairs:
        """``lambda_max(DHD)`` and the next eigenvalue, by block Lanczos; computed once for each D."""
        key = ball.scaling, ball.offset
        if key not in self._top:
            pairs = top_eigenpairs_rows(
                self.scaled_products(ball, "lambda_max"),
                self.objective.empty_block(),
                min(2, self.objective.num_params),
                tol=EIGENVALUE_TOL,
                method="lanczos",
                generator=self.generator("lambda-max"),
            )
            scales = ball.scales(self.objective.terms.params)
            vectors = pairs.eigenvectors
            if scales is not None:
                vectors = torch.cat([s.flatten() for s in scales]).to(vectors)[:, None] * vectors
            error = float32_error(self.objective, vectors, self.generator("float32 rounding"))
            self._top[key] = pairs.widened(error, EIGENVALUE_TOL)
        return self._top[key]

    @property
    def loss_rounding(self) -> float:
        """Rounding error of a difference of two losses, ``eps |L|``; all subsets or draws may share it."""
        return torch.finfo(self.objective.dtype).eps * abs(self.objective.loss or 0.0)


# Largest rounding error of a rise of the loss, relative to the rise, with which it is resolved.
MAX_ROUNDING = 0.1


def unresolved(rounding: float, rise: float) -> dict[str, Any]:
    """Settings of a measure whose ``rise`` of the loss, or whose perturbation, is lost in ``rounding``; else none."""
    resolved = rise == rounding == 0.0 or not rounding > MAX_ROUNDING * rise
    return {} if resolved else {"resolved": False, "rounding": rounding}


@dataclass(frozen=True)
class MeasureSpec:
    """A sharpness measure: its name, how to compute it, and which problems have it.

    Args:
        name: a key of ``DEFINITIONS`` in ``sharpscope/results/sharpness.py``.
        compute: yields one ``Measure`` for each combination of settings.
        requires: raises ArgumentError, with the reason, for a problem that does not have the measure. It is called
            before the first measure is computed, so it should be cheap. None: every problem has it.
    """

    name: str
    compute: Callable[[MeasureContext], Iterator[Measure]]
    requires: Callable[[MeasureContext], object] | None = None


def ball_settings(ball: Ball) -> dict[str, Any]:
    """The ball as ``Measure.settings``."""
    return {"p": "inf" if ball.p == math.inf else 2, "adaptive": ball.scaling, "eta": ball.offset}


def with_interval(estimate: Estimate, count: int, rounding: float = 0.0) -> tuple[float, float, float, float]:
    """Value, standard error and Student's t interval of ``count`` samples, widened by ``rounding``."""
    half = student(CONFIDENCE, count - 1) * estimate.standard_error + rounding
    return estimate.value, estimate.standard_error, estimate.value - half, estimate.value + half
