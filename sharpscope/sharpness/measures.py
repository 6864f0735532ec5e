"""Sharpness measures by name, and the function that computes them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from sharpscope.errors import ArgumentError, nearest
from sharpscope.measurement import Measurement
from sharpscope.objective import Progress
from sharpscope.problem import Problem
from sharpscope.results import Measure, SharpnessResult
from sharpscope.results.sharpness import DEFINITIONS
from sharpscope.sharpness import average_case, curvature_measures, worst_case
from sharpscope.sharpness.curvature_measures import training_recipe
from sharpscope.sharpness.maximize import Ascent
from sharpscope.sharpness.measure_context import MeasureContext, MeasureSpec, Settings
from sharpscope.weights.norm_ball import Ball
from sharpscope.weights.perturbation import require_length

# Defaults of ``measure_sharpness``; WORST is the ascent of the measure "worst-case".
M = (1, 4, 16, 64, 256)
RHO = (0.05,)
WORST = Ascent(20, adaptive=True, restarts=1)

# In the order of DEFINITIONS, which is the order of "all".
MEASURES: dict[str, MeasureSpec] = {
    spec.name: spec
    for spec in sorted(
        (*worst_case.MEASURES, *average_case.MEASURES, *curvature_measures.MEASURES),
        key=lambda spec: list(DEFINITIONS).index(spec.name),
    )
}


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
    journal: str | os.PathLike[str] | None = None,
) -> SharpnessResult:
    """Compute sharpness measures of L at w, with their definitions, costs and, if sampled, 95 % intervals.

    H is the Hessian of L; D is the identity or, with ``adaptive``, the diagonal of the weights' magnitudes:

    - "m-sharpness": mean over disjoint subsets b of m examples of ``max L_b(w + e) - L_b(w)`` over
      ``||D^-1 e||_p <= rho``; first-order prediction ``rho ||D g_b||_q``.
    - "worst-case": ``max L(w + e) - L(w)`` over the same ball, on all the data. Prediction for p = 2:
      ``rho^2/2 lambda_max(DHD)``, exact for quadratic L at a critical point; elsewhere a quadratic L exceeds it by at
      most ``rho ||D g||_2``.
    - "average-case": ``E L(w + e) - L(w)``, ``e ~ N(0, sigma^2 D^2)``; prediction ``sigma^2/2 tr(DHD)``,
      estimated from the same draws.
    - "pac-bayes": ``1/sigma^2`` for the largest sigma with a mean loss of accuracy <= 0.1 under ``N(0, sigma^2 I)``.
    - "lambda-max", "trace": of ``DHD``.
    - "relative-flatness": ``sum <w_s, w_s'> tr(H_ss')`` of each weight matrix.
    - "keskar": ``100 (max L - L) / (1 + L)`` over the box ``|e| <= box (|w| + 1)``.
    - "edge": lambda_max divided by SGD's edge of stability; the edge of SAM is in its settings if trained with plain
      SAM.
    - "alignment": |cosine| with the top eigenvector of the gradient, and of SAM's gradient.

    A rise of the loss that rounding (of the losses, and of ``w + e``) may change by more than a tenth has the setting
    ``resolved`` False, with ``rounding``, and is not ``converged``; intervals hold this rounding. dtype=torch.float64
    or a larger radius helps. The maxima are lower bounds, found by ``ascent``. An eigenvalue that several measures need
    is counted in the cost of the first. The model and all random states are preserved, bit for bit.

    Args:
        problem: model, loss and data.
        measures: one or more names, as a sequence or separated by commas; "all" for those that the problem supports,
            with the reasons for the others in ``provenance["left_out"]``.
        generator: source of subsets, restarts, draws and probes; by default seeded with 0. The random numbers of a
            measure do not depend on which others are computed.
        progress: called as ``progress(stage, done, total)``.
        m: subset sizes of m-sharpness; by default those of 1, 4, 16, 64 and 256 that do not exceed the data.
        rho: radii of m-sharpness (each with each m) and worst-case; the largest is SAM's radius for "alignment".
        p: norm of the ball, 2 or inf.
        adaptive: None, "elementwise" (or True) or "filter", see ``sharpscope.weights.norm_ball``; applies to
            m-sharpness, worst-case, average-case, lambda-max and trace.
        eta: constant added to the magnitudes of an adaptive ball.
        ascent: an Ascent, a number of steps, or "apgd"; by default one step for m-sharpness and APGD for worst-case.
        sigma: standard deviation of average-case, in units of the weights (of D if ``adaptive``).
        draws: antithetic pairs of perturbations for average-case, perturbations for pac-bayes; at least 2.
        probes: random vectors for trace and relative flatness; at least 2.
        box: Keskar's epsilon.
        lr: learning rate for "edge"; by default that at which the checkpoint was written.
        dtype, device, micro_batch: as for ``top_eigenvalues``.
        journal: folder for what was chosen by timing (the micro-batch, and whether subsets are evaluated together), so
            that the same call after a kill gives the same bits. Delete it when the result is safe.

    Raises: ArgumentError, ProblemError, DataError, AuditError; OutputError if the journal cannot be written.
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
    settings = Settings(
        m=M if m is None else tuple(m),
        rho=tuple(float(r) for r in rho),
        ball=Ball(p, adaptive, eta),
        ascent=ascent or Ascent(),
        worst_case_ascent=ascent or WORST,
        sigma=sigma,
        draws=draws,
        probes=probes,
        box=box,
        recipe=training_recipe(problem.provenance, lr),
    )
    measurement = Measurement(
        problem,
        generator,
        progress,
        "sharpness",
        dtype=dtype,
        device=device,
        micro_batch=micro_batch,
        journal=journal,
        settings={"measures": chosen, **asdict(replace(settings, recipe={}))},
    )
    objective = measurement.objective
    for name, number in (("rho", max(rho)), ("sigma", sigma), ("box", box)):
        require_length(name, number, objective.dtype)
    seed = int(torch.randint(2**62, (), generator=measurement.generator))
    with measurement:
        context = MeasureContext(objective, settings, seed, progress, measurement.journal)
        objective.loss_and_gradient(progress)
        if m is None and objective.num_examples is not None:
            context.settings = replace(settings, m=tuple(size for size in M if size <= objective.num_examples))
        found: list[Measure] = []
        left_out: dict[str, str] = {}

        @contextmanager
        def optional(name: str) -> Iterator[None]:
            """With "all", leave out the measure ``name`` if the problem does not support it."""
            try:
                yield
            except ArgumentError as error:
                if not everything:
                    raise
                left_out[name] = str(error)

        # All requirements first, so that they do not fail after a long measurement.
        for name in chosen:
            if (requires := MEASURES[name].requires) is not None:
                with optional(name):
                    requires(context)
        for name in chosen:
            if name not in left_out:
                with optional(name):
                    found += tuple(MEASURES[name].compute(context))
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
