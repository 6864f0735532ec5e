"""The sharpness measures: what each needs, how it is computed, and the function that computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sharpscope.errors import ArgumentError, nearest
from sharpscope.linalg import Eigenpairs
from sharpscope.measurement import Measurement
from sharpscope.objective import Objective, Progress
from sharpscope.problem import Problem
from sharpscope.results import Measure, SharpnessResult
from sharpscope.results.statistics import Estimate, student
from sharpscope.sharpness import hessian
from sharpscope.sharpness.ascent import Ascent
from sharpscope.sharpness.average_case import DROP, average_rise, pac_bayes_sigma
from sharpscope.sharpness.hessian import edge_measure, recipe_of
from sharpscope.sharpness.losses import in_memory, require_classes
from sharpscope.sharpness.worst_case import worst_rises
from sharpscope.weights.norm_ball import Ball

M = (1, 4, 16, 64, 256)
RHO = (0.05,)

# What looks for the worst case of all the data where nothing else is asked for.
WORST = Ascent(20, adaptive=True, restarts=1)


def measure_sharpness(
    problem: Problem,
    measures: str | Sequence[str] = ("m-sharpness",),
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    m: int | Sequence[int] | None = None,
    rho: float | Sequence[float] = RHO,
    p: float = 2,
    adaptive: str | bool | None = None,
    eta: float = 0.0,
    ascent: Ascent | int | str | None = None,
    sigma: float = 0.01,
    draws: int = 8,
    probes: int = 16,
    box: float = 1e-3,
    lr: float | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | None = None,
) -> SharpnessResult:
    """Measures of the sharpness of L at w, each with its definition, cost and, where it is sampled, an interval.

    With D = 1, or the weights' own sizes where ``adaptive``, and H the Hessian of L:

    - "m-sharpness": the mean over disjoint subsets b of m examples of ``max L_b(w + e) - L_b(w)``,
      ``||D^-1 e||_p <= rho``, as far as ``ascent`` finds it; predicted to first order ``rho ||D g_b||_q``.
    - "worst-case": the same of all the data at once, by APGD unless ``ascent`` says otherwise; predicted for p = 2 and
      small rho ``rho^2/2 lambda_max(DHD)``, which at a critical point it is, and bounded, as far as L is quadratic, by
      that plus ``rho ||D g||_2``.
    - "average-case": ``E L(w + e) - L(w)``, ``e ~ N(0, sigma^2 D^2)``; predicted ``sigma^2/2 tr(DHD)``,
      estimated from the same draws.
    - "pac-bayes": ``1/sigma^2`` for the largest sigma whose mean drop of accuracy under ``N(0, sigma^2 I)`` is <= 0.1.
    - "lambda-max" and "trace": of ``DHD``.
    - "relative-flatness": ``sum <w_s, w_s'> tr(H_ss')`` of each weight matrix.
    - "keskar": ``100 (max L - L) / (1 + L)`` over the box ``|e| <= box (|w| + 1)``.
    - "edge": lambda_max over SGD's edge of stability; beside it that of plain SAM, where the recipe is of it.
    - "alignment": |cosine| of the gradient, and of SAM's, with the top eigenvector.

    An eigenvalue that several measures need is billed to the first. The model and all random states are left bit for
    bit as they were.

    Args:
        problem: model, loss and data.
        measures: names, or ("all",): those that the problem has; ``left_out`` in the provenance says why not others.
        generator: source of subsets, restarts, draws and probes; by default one seeded with 0. Each measure draws its
            own sequence, the same whatever else is measured.
        progress: called as ``progress(stage, done, total)``.
        m: of m-sharpness; by default 1, 4, 16, 64 and 256 as far as there are as many examples.
        rho: of m-sharpness, with each m, and worst-case; the largest is SAM's for "alignment".
        p: norm of the ball, 2 or inf.
        adaptive: None, "elementwise" (also True) or "filter", see ``sharpscope.ball``: for m-sharpness, worst and
            average case, lambda-max and trace; the others have no ball, or one of their own.
        eta: added to the weights' sizes there.
        ascent: an Ascent, a number of steps or "apgd"; of m-sharpness one step unless given, of worst-case APGD.
        sigma: of average-case, a standard deviation of each weight (times D).
        draws: pairs of perturbations for average-case, draws for pac-bayes; at least 2.
        probes: of trace and relative flatness; at least 2.
        box: Keskar's epsilon.
        lr: for "edge"; by default that in force when the checkpoint was written.
        dtype, device, micro_batch: as for ``top_eigenvalues``.

    Raises: ArgumentError, ProblemError, DataError, AuditError.
    Sources: see ``Measure.definition``.

    >>> import sharpscope
    >>> import torch
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> _ = torch.nn.init.zeros_(model.weight)  # the minimum
    >>> sharp = sharpscope.measure_sharpness(problem, "lambda-max, worst-case", rho=0.1)
    >>> [round(measure.value, 4) for measure in sharp.measures]  # 6, and rho^2/2 of it
    [6.0, 0.03]
    """
    wanted = tuple(name.strip() for name in measures.split(",")) if isinstance(measures, str) else tuple(measures)
    m, rho, ascent = (m,) if isinstance(m, int) else m, (rho,) if isinstance(rho, int | float) else rho, _ascent(ascent)
    if isinstance(adaptive, bool):
        adaptive = "elementwise" if adaptive else None
    everything = wanted == ("all",)
    chosen = tuple(MEASURES) if everything else tuple(dict.fromkeys(wanted))
    for name in chosen:
        if name not in MEASURES:
            raise ArgumentError(nearest("measure", name, (*MEASURES, "all")))
    for name, values, least in (("m", M if m is None else m, 1), ("rho", rho, 0.0)):
        if not values or not all(least <= v < math.inf and not isinstance(v, bool) for v in values):
            raise ArgumentError(f"{name} must be one or more finite numbers of at least {least}, got {values!r}.")
    if m is not None and not all(isinstance(value, int) for value in m):
        raise ArgumentError(f"m must be whole numbers of examples, got {m!r}.")
    for name, number in (("sigma", sigma), ("box", box), ("lr", 1.0 if lr is None else lr)):
        if not 0 < number < math.inf:
            raise ArgumentError(f"{name} must be positive and finite, got {number!r}.")
    for name, count in (("draws", draws), ("probes", probes)):
        if count < 2:
            raise ArgumentError(f"{name} must be at least 2, for a standard error, got {count!r}.")
    measurement = Measurement(problem, generator, progress, dtype=dtype, device=device, micro_batch=micro_batch)
    objective = measurement.objective
    settings = Settings(
        m=M if m is None else tuple(m),
        rho=tuple(float(r) for r in rho),
        ball=Ball(p, adaptive, eta),
        ascent=ascent or Ascent(),
        worst=ascent or WORST,
        sigma=sigma,
        draws=draws,
        probes=probes,
        box=box,
        recipe=recipe_of(problem.provenance, lr),
    )
    run = Run(objective, settings, int(torch.randint(2**62, (), generator=measurement.generator)), progress)
    with measurement:
        objective.loss_and_gradient(progress)
        if m is None and objective.num_examples is not None:
            run.settings = replace(settings, m=tuple(size for size in M if size <= objective.num_examples))
        found: list[Measure] = []
        left_out: dict[str, str] = {}
        # What is missing is said before the first long measurement.
        for name in chosen:
            try:
                if name in REQUIRES:
                    REQUIRES[name](run)
            except ArgumentError as error:
                if not everything:
                    raise
                left_out[name] = str(error)
        for name in chosen:
            if name not in left_out:
                try:
                    found += tuple(MEASURES[name](run))
                except ArgumentError as error:
                    if not everything:
                        raise
                    left_out[name] = str(error)
    return SharpnessResult(
        measures=tuple(found),
        **measurement.outcome(),
        provenance=measurement.provenance(left_out=left_out),
    )


def _ascent(given: Ascent | int | str | None) -> Ascent | None:
    if given is None or isinstance(given, Ascent):
        return given
    if given == "apgd":
        return WORST
    if isinstance(given, bool) or not isinstance(given, int):
        raise ArgumentError(f"ascent must be an Ascent, a number of steps or 'apgd', got {given!r}.")
    return Ascent(given)


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
            self._top[shape] = hessian.largest_eigenvalue(
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
        found = hessian.scaled_trace(run.objective, s.ball, probes, run.source("trace"), run.stage("trace"))
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
        found = hessian.relative_flatness(
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
        found = hessian.alignment(run.objective, top.eigenvectors[:, 0], rho)
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
    "relative-flatness": lambda run: hessian.require_matrices(run.objective),
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
    if top.missed_bound is None or not bool(top.converged[0]):
        return 1.0
    return float(top.missed_bound.probability(float(top.upper[0] - top.residuals.norm())))


def _vector_error(top: Eigenpairs) -> float:
    """How far the cosine with the first eigenvector may be off: ``sqrt(2) ||r|| / gap`` (Davis and Kahan 1970)."""
    if len(top.eigenvalues) < 2:
        return 0.0
    gap = float(top.lower[0] - top.upper[1])
    return min(1.0, math.sqrt(2) * float(top.residuals[0]) / gap) if gap > 0 else 1.0
