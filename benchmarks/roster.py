"""Which solvers are compared, with which settings. No torch here: the process that starts the others stays small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Eigenvalues compared.
K = 5


@dataclass(frozen=True)
class Entry:
    """One solver.

    Attributes:
        stops: "certified" (own proof of the accuracy), "own tolerance", or "told" (its cheapest setting that reaches
            the accuracy was found beforehand, untimed, with the reference in hand: no user could have it).
        settings: what it runs with and why, for the report.
        slow: power iterations; run once, after the others, and given up when they take too many times as long.
        tuned: the name under which its settings are found beforehand.
        rungs: settings tried in turn until the accuracy is reached, or the error is not halved; the last is reported.
    """

    stops: str
    settings: str
    slow: bool = False
    tuned: str | None = None
    rungs: tuple[dict[str, Any], ...] = ({},)


# Products as found beforehand, then exact ones, should finite differences be too coarse when it stops later.
EIGENTHINGS_RUNGS: tuple[dict[str, Any], ...] = ({}, {"method": "autograd", "step": None})
OURS = "tol = the accuracy, everything else as it comes; audit, bounds and choice of micro-batch are inside the time"

ROSTER: dict[str, Entry] = {
    "sharpscope auto": Entry("certified", OURS),
    "sharpscope lanczos": Entry("certified", OURS),
    "sharpscope power": Entry("certified", OURS, slow=True),
    "curvlinops + eigsh": Entry(
        "own tolerance",
        "HessianLinearOperator(check_deterministic=False, num_data=N) in SciPy's eigsh(k=5, which='LA', tol = the "
        "accuracy), ncv 20 as it comes, reverse communication in float64, products in float32",
        tuned="curvlinops",
    ),
    "curvlinops + eigsh, told": Entry(
        "told",
        "the same with the smallest ncv whose first ncv products reach the accuracy, and tol = 0.5, so that ARPACK "
        "stops after just those",
        tuned="curvlinops",
    ),
    "eigenthings lanczos": Entry(
        "own tolerance",
        "lanczos(which='LA', reorthogonalize=True, tol = the accuracy) with 10 steps (its default, 2k), then 20, 40, "
        "... anew until all five are flagged converged: it cannot go on from where it was. Products as when told, or "
        "exact ones should those be too coarse",
        tuned="eigenthings",
        rungs=EIGENTHINGS_RUNGS,
    ),
    "eigenthings lanczos, told": Entry(
        "told",
        "the same with the smallest max_iter that reaches the accuracy; double backprop or finite differences (with "
        "its default step or a tenth of it), whichever is faster to it",
        tuned="eigenthings",
    ),
    "eigenthings power": Entry(
        "own tolerance",
        "deflated_power_iteration(tol = the accuracy, max_iter=1000); momentum 0, since the best one needs lambda_2",
        slow=True,
        tuned="eigenthings",
        rungs=EIGENTHINGS_RUNGS,
    ),
    "pyhessian power": Entry(
        "own tolerance",
        "eigenvalues(top_n=5, maxIter=1000), its only solver for them; tol from the accuracy down by tens until the "
        "result is that accurate; the whole data as one batch on a kept graph where that fits in memory and is "
        "faster, else a list of batches",
        slow=True,
        tuned="pyhessian",
        rungs=({"factor": 1.0}, {"factor": 0.1}, {"factor": 0.01}, {"factor": 0.001}),
    ),
}
TUNED = sorted({entry.tuned for entry in ROSTER.values() if entry.tuned})
