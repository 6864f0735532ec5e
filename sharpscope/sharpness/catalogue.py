"""Each measure of sharpness: what it needs, how it is taken, and what is written down beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sharpscope.ball import Ball
from sharpscope.errors import ArgumentError
from sharpscope.linalg import Eigenpairs
from sharpscope.objective import Objective, Progress
from sharpscope.results import Measure
from sharpscope.results.estimate import Estimate, student
from sharpscope.sharpness import curvature
from sharpscope.sharpness.ascent import Ascent
from sharpscope.sharpness.average import DROP, average_rise, pac_bayes_sigma
from sharpscope.sharpness.edge import edge_measure
from sharpscope.sharpness.losses import in_memory, require_classes
from sharpscope.sharpness.worst import worst_rises

# Of intervals over subsets or draws.
CONFIDENCE = 0.95

# lambda_max beside other measures is a prediction, or has a vector to be compared with.
TOL = 1e-3

# Points that Keskar's ascent looks at.
STEPS = 20


@dataclass(frozen=True)
class Settings:
    """What the measures share; see ``measure_sharpness``."""

    m: tuple[int, ...]
    rho: tuple[float, ...]
    ball: Ball
    ascent: Ascent
    worst: Ascent
    sigma: float
    draws: int
    probes: int
    box: float
    recipe: Mapping[str, Any]


class Run:
    """What a measure needs: the objective, the settings, a random sequence of its own, and what several share."""

    def __init__(self, objective: Objective, settings: Settings, seed: int, progress: Progress | None) -> None:
        self.objective, self.settings, self.progress = objective, settings, progress
        self._seed = seed
        self._top: dict[tuple[str | None, float], Eigenpairs] = {}

    def source(self, purpose: str) -> torch.Generator:
        """Random numbers for one measure, whatever others were drawn."""
        words = np.random.SeedSequence([self._seed, *purpose.encode()]).generate_state(2, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) >> 1)

    def top(self, ball: Ball) -> Eigenpairs:
        """lambda_max(DHD), once."""
        shape = ball.scaling, ball.offset
        if shape not in self._top:
            self._top[shape] = curvature.largest_eigenvalue(
                self.objective, ball, TOL, self.source("lambda-max"), self.stage("lambda_max")
            )
        return self._top[shape]

    def stage(self, what: str) -> Progress | None:
        report = self.progress
        return None if report is None else (lambda label, done, total: report(f"{what}, {label}", done, total))

    @contextmanager
    def costing(self) -> Iterator[Callable[[], float]]:
        """Gradients over the data since the block began."""
        before = self.objective.gradients
        yield lambda: self.objective.gradients - before


def _m_sharpness(run: Run) -> Iterator[Measure]:
    s, order = run.settings, "random" if in_memory(run.objective.data) else "as loaded"
    for m in s.m:
        with run.costing() as cost:
            # The same subsets at every m that divides another: one order of the examples.
            found = worst_rises(run.objective, m, s.ball, s.rho, s.ascent, run.source("m-sharpness"), run.progress)
            each = cost() / len(s.rho)
        for rho, rises in zip(s.rho, found, strict=True):
            yield Measure(
                "m-sharpness",
                *_interval(np.array(rises.rises), _rounding(run)),
                settings={
                    "m": m,
                    "rho": rho,
                    **_ball(s.ball),
                    "ascent": str(s.ascent),
                    "subsets": len(rises.rises),
                    "order": order,
                    "side by side": rises.side_by_side,
                },
                prediction={"first order": float(np.mean(rises.first_order))},
                gradients=each,
                examples=rises.examples,
            )


def _worst_case(run: Run) -> Iterator[Measure]:
    s = run.settings
    with run.costing() as cost:
        found = worst_rises(run.objective, None, s.ball, s.rho, s.worst, run.source("worst-case"), run.progress)
        each = cost() / len(s.rho)
    for rho, rises in zip(s.rho, found, strict=True):
        prediction, sure, more = {"first order": rises.first_order[0]}, True, 0.0
        if s.ball.p == 2:
            with run.costing() as cost:
                top = run.top(s.ball)
                more = cost()
            curved, sure = rho**2 / 2 * float(top.eigenvalues[0]), bool(top.converged[0])
            prediction = {"small rho": curved, "quadratic bound": curved + rises.first_order[0]}
        yield Measure(
            "worst-case",
            rises.rises[0],
            settings={"rho": rho, **_ball(s.ball), "ascent": str(s.worst), "converged": sure},
            prediction=prediction,
            gradients=each + more,
            examples=rises.examples,
        )


def _average_case(run: Run) -> Iterator[Measure]:
    s = run.settings
    with run.costing() as cost:
        found = average_rise(run.objective, s.ball, s.sigma, s.draws, run.source("average-case"), run.progress)
        price = cost()
    yield Measure(
        "average-case",
        *_of(found.rise, s.draws, _rounding(run)),
        settings={"sigma": s.sigma, "adaptive": s.ball.scaling, "eta": s.ball.offset, "pairs of draws": s.draws},
        prediction={"small sigma": found.second_order.value},
        gradients=price,
        examples=run.objective.num_examples,
    )


def _pac_bayes(run: Run) -> Iterator[Measure]:
    s = run.settings
    with run.costing() as cost:
        found = pac_bayes_sigma(run.objective, s.draws, run.source("pac-bayes"), run.progress)
        price = cost()
    sigma, error = found.sigma.value, found.sigma.standard_error
    yield Measure(
        "pac-bayes",
        *_of(Estimate(1 / sigma**2, 2 * error / sigma**3), s.draws),
        settings={"sigma": sigma, "drop": DROP, "draws": s.draws, "accuracy": found.accuracy},
        gradients=price,
        examples=run.objective.num_examples,
    )


def _lambda_max(run: Run) -> Iterator[Measure]:
    with run.costing() as cost:
        top = run.top(run.settings.ball)
        price = cost()
    yield Measure(
        "lambda-max",
        float(top.eigenvalues[0]),
        lower=float(top.lower[0]),
        upper=float(top.upper[0]),
        settings={
            "adaptive": run.settings.ball.scaling,
            "eta": run.settings.ball.offset,
            "tol": TOL,
            "converged": bool(top.converged[0]),
            "missed_probability": _missed(top),
        },
        gradients=price,
        examples=run.objective.num_examples,
    )


def _trace(run: Run) -> Iterator[Measure]:
    s = run.settings
    probes = min(s.probes, run.objective.num_params)
    with run.costing() as cost:
        found = curvature.scaled_trace(run.objective, s.ball, probes, run.source("trace"), run.stage("trace"))
        price = cost()
    yield Measure(
        "trace",
        *_of(found, probes),
        settings={"adaptive": s.ball.scaling, "eta": s.ball.offset, "probes": probes},
        gradients=price,
        examples=run.objective.num_examples,
    )


def _relative_flatness(run: Run) -> Iterator[Measure]:
    s = run.settings
    with run.costing() as cost:
        found = curvature.relative_flatness(
            run.objective, s.probes, run.source("relative-flatness"), run.stage("relative flatness")
        )
        each = cost() / len(found)
    for name, estimate in found.items():
        yield Measure(
            "relative-flatness",
            *_of(estimate, s.probes),
            settings={"layer": name, "probes": s.probes},
            gradients=each,
            examples=run.objective.num_examples,
        )


def _keskar(run: Run) -> Iterator[Measure]:
    s, ascent = run.settings, Ascent(STEPS, adaptive=True)
    ball = Ball(math.inf, "elementwise", 1.0)
    with run.costing() as cost:
        (found,) = worst_rises(run.objective, None, ball, [s.box], ascent, run.source("keskar"), run.progress)
        price = cost()
    assert run.objective.loss is not None
    yield Measure(
        "keskar",
        100 * found.rises[0] / (1 + run.objective.loss),
        settings={"box": s.box, "ascent": str(ascent)},
        gradients=price,
        examples=found.examples,
    )


def _edge(run: Run) -> Iterator[Measure]:
    recipe, objective = run.settings.recipe, run.objective
    with run.costing() as cost:
        top = run.top(Ball())
        price = cost()
    assert objective.gradient is not None
    yield edge_measure(
        float(top.eigenvalues[0]),
        (float(top.lower[0]), float(top.upper[0])),
        float(torch.linalg.vector_norm(objective.gradient.cpu().double())),
        recipe,
        converged=bool(top.converged[0]),
        gradients=price,
        examples=objective.num_examples,
    )


def _alignment(run: Run) -> Iterator[Measure]:
    rho = max(run.settings.rho)
    with run.costing() as cost:
        top = run.top(Ball())
        found = curvature.alignment(run.objective, top.eigenvectors[:, 0], rho)
        price = cost()
    reach = _vector_error(top)
    for which, value in zip(("gradient", "SAM's gradient"), found, strict=True):
        yield Measure(
            "alignment",
            value,
            lower=max(0.0, value - reach),
            upper=min(1.0, value + reach),
            settings={"of": which, "rho": None if which == "gradient" else rho, "converged": reach < 1.0},
            gradients=price / 2,
            examples=run.objective.num_examples,
        )


MEASURES: dict[str, Callable[[Run], Iterator[Measure]]] = {
    "m-sharpness": _m_sharpness,
    "worst-case": _worst_case,
    "average-case": _average_case,
    "pac-bayes": _pac_bayes,
    "lambda-max": _lambda_max,
    "trace": _trace,
    "relative-flatness": _relative_flatness,
    "keskar": _keskar,
    "edge": _edge,
    "alignment": _alignment,
}


def _ball(ball: Ball) -> dict[str, Any]:
    return {"p": "inf" if ball.p == math.inf else 2, "adaptive": ball.scaling, "eta": ball.offset}


def _rounding(run: Run) -> float:
    """What a difference of two losses is off by, which all subsets or draws may share: the loss times eps."""
    return torch.finfo(run.objective.dtype).eps * abs(run.objective.loss or 0.0)


def _interval(values: np.ndarray, rounding: float) -> tuple[float, float | None, float | None, float | None]:
    """Mean, its standard error, and an interval for the mean over all such subsets (Student's t)."""
    if len(values) < 2 or not np.isfinite(values).all():
        return float(values.mean()), None, None, None
    return _of(Estimate.of(values), len(values), rounding)


def _of(estimate: Estimate, count: int, rounding: float = 0.0) -> tuple[float, float, float, float]:
    half = student(CONFIDENCE, count - 1) * estimate.standard_error + rounding
    return estimate.value, estimate.standard_error, estimate.value - half, estimate.value + half


# What a measure must have; each raises ArgumentError that says what is missing.
REQUIRES: dict[str, Callable[[Run], object]] = {
    "m-sharpness": lambda run: _require_subsets(run),
    "pac-bayes": lambda run: require_classes(run.objective),
    "relative-flatness": lambda run: curvature.require_matrices(run.objective),
    "edge": lambda run: _require_sgd(run.settings.recipe),
}


def _require_subsets(run: Run) -> None:
    count, largest = run.objective.num_examples, max(run.settings.m)
    if count is not None and largest > count:
        raise ArgumentError(f"m must be at most the number of examples ({count}), got {largest}. Lower it.")


def _require_sgd(recipe: Mapping[str, Any]) -> None:
    if not recipe.get("lr"):
        raise ArgumentError("The edge of stability needs the learning rate, which is not in the checkpoint. Pass lr.")
    if recipe.get("optimizer", "sgd") != "sgd":
        raise ArgumentError(f"The edge of stability is SGD's, and the checkpoint was trained by {recipe['optimizer']}.")


def _missed(top: Eigenpairs) -> float:
    """A bound on the probability that a larger eigenvalue was missed, as for ``top_eigenvalues``."""
    if top.start is None or not bool(top.converged[0]):
        return 1.0
    return float(top.start.missed(float(top.upper[0] - top.residuals.norm())))


def _vector_error(top: Eigenpairs) -> float:
    """How far the cosine with the first eigenvector may be off: ``sqrt(2) ||r|| / gap`` (Davis and Kahan 1970)."""
    if len(top.eigenvalues) < 2:
        return 0.0
    gap = float(top.lower[0] - top.upper[1])
    return min(1.0, math.sqrt(2) * float(top.residuals[0]) / gap) if gap > 0 else 1.0
