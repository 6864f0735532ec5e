"""The sharpness measures by name, and the function that computes them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

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
from sharpscope.sharpness.spec import MeasureContext, MeasureSpec, Settings
from sharpscope.weights.norm_ball import Ball

# Defaults of ``measure_sharpness``; WORST is the ascent of the worst case over all the data.
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
        adaptive: None, "elementwise" (also True) or "filter", see
            ``sharpscope.weights.norm_ball``: for m-sharpness, worst and
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
        worst_case_ascent=ascent or WORST,
        sigma=sigma,
        draws=draws,
        probes=probes,
        box=box,
        recipe=training_recipe(problem.provenance, lr),
    )
    seed = int(torch.randint(2**62, (), generator=measurement.generator))
    context = MeasureContext(objective, settings, seed, progress)
    with measurement:
        objective.loss_and_gradient(progress)
        if m is None and objective.num_examples is not None:
            context.settings = replace(settings, m=tuple(size for size in M if size <= objective.num_examples))
        found: list[Measure] = []
        left_out: dict[str, str] = {}

        @contextmanager
        def optional(name: str) -> Iterator[None]:
            """Of "all" measures, leave out ``name`` if the problem does not have it."""
            try:
                yield
            except ArgumentError as error:
                if not everything:
                    raise
                left_out[name] = str(error)

        # All requirements first: a missing one must not be found only after a long measurement.
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
