"""The rivals' best settings, found beforehand with the reference in hand; none of this is timed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batching import Batches, batches, clock, fastest, gradient
from cases import Case
from roster import K
from solvers import curvlinops_operator, eigenthings_operator, pyhessian_operator, start

# Steps after which the search for the smallest number that reaches the accuracy is given up.
MOST_STEPS = 80
# Finite differences cost less than double backprop; their step is the tool's default in float32, and a smaller one,
# since a large one counts the kinks of ReLU as curvature.
EIGENTHINGS_PRODUCTS = (("autograd", None), ("finite_difference", None), ("finite_difference", 5e-4))
# Share of the memory now free that a graph kept over all data may take.
MEMORY_SHARE = 0.6


def error(values: Any, reference: Any) -> float:
    """The largest relative error over the top K."""
    found, true = np.sort(np.asarray(values, float))[::-1][:K], np.asarray(reference, float)[:K]
    return float(np.max(np.abs(found - true) / np.abs(true)))


class Replayed:
    """A product that is worked out once for each place in the sequence of calls.

    A Krylov sequence from one start is the same however many steps are asked for, so longer runs only add to it.
    """

    def __init__(self, matvec: Callable[[Any], Any]) -> None:
        self.matvec, self.kept, self.place, self.most = matvec, [], 0, MOST_STEPS

    def __call__(self, v: Any) -> Any:
        if self.place >= self.most:
            raise TooManyStepsError
        if self.place == len(self.kept):
            self.kept.append(self.matvec(v))
        self.place += 1
        return self.kept[self.place - 1]

    def restart(self, most: int) -> None:
        self.place, self.most = 0, most


class TooManyStepsError(Exception):
    """A solver asked for more products than it was meant to."""


def gradient_batch(case: Case) -> dict[str, Any]:
    """The batch size at which one gradient, the unit of cost, is fastest."""
    return {"batch": fastest(case, lambda data: lambda: gradient(case, data))[0]}


def curvlinops(case: Case, reference: Any, accuracy: float) -> dict[str, Any]:
    """Batch size and the smallest ``ncv``."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    n = case.num_params
    vector = start(n).double().numpy()

    def product(data: Batches) -> Callable[[], Any]:
        operator = curvlinops_operator(case, data)
        return lambda: operator.matvec(vector)

    size, _ = fastest(case, product)
    operator = curvlinops_operator(case, batches(case, size))
    replayed = Replayed(operator.matvec)
    counted = LinearOperator(operator.shape, matvec=replayed, dtype=operator.dtype)
    for ncv in range(K + 2, min(MOST_STEPS, n)):
        replayed.restart(ncv + 1)
        try:
            values = eigsh(counted, k=K, which="LA", ncv=ncv, tol=0.5, v0=vector, return_eigenvectors=False)
        except (TooManyStepsError, ArpackError):
            continue
        if error(values, reference) <= accuracy:
            return {"batch": size, "ncv": ncv, "tol": 0.5}
    raise SystemExit(f"eigsh has not reached {accuracy:g} in {MOST_STEPS} products.")


def eigenthings(case: Case, reference: Any, accuracy: float) -> dict[str, Any]:
    """Batch size, method of the product and the smallest number of steps, for the least time in all."""
    vector = start(case.num_params)
    vector /= vector.norm()
    best: dict[str, Any] = {}
    least = float("inf")
    for method, step in EIGENTHINGS_PRODUCTS:

        def product(data: Batches, method: str = method, step: float | None = step) -> Callable[[], Any]:
            operator = eigenthings_operator(case, data, method, step)
            return lambda: operator.matvec(vector)

        size, each = fastest(case, product)
        most = MOST_STEPS if not best else min(MOST_STEPS, int(least / each))  # more steps than these cannot win
        operator = eigenthings_operator(case, batches(case, size), method, step)
        steps = _eigenthings_steps(operator, reference, accuracy, most)
        if steps is not None and steps * each < least:
            best = {"batch": size, "method": method, "step": step, "steps": steps}
            least = steps * each
    if not best:
        raise SystemExit(f"Lanczos has not reached {accuracy:g} in {MOST_STEPS} steps.")
    return best


def _eigenthings_steps(operator: Any, reference: Any, accuracy: float, most: int) -> int | None:
    from hessian_eigenthings import lanczos

    replayed = operator.matvec = Replayed(operator.matvec)
    for steps in range(K, min(most, operator.size) + 1):
        replayed.restart(steps)
        found = lanczos(operator, k=K, max_iter=steps, which="LA", reorthogonalize=True, seed=0)
        if error(found.eigenvalues, reference) <= accuracy:
            return steps
    return None


def pyhessian(case: Case, reference: Any, accuracy: float) -> dict[str, Any]:
    """Batch size, or None for all data on one kept graph where that fits and is faster."""
    vector = [torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for p in case.model.parameters()]

    def product(data: Batches) -> Callable[[], Any]:
        operator = pyhessian_operator(case, 1)
        operator.data = data
        return lambda: operator.dataloader_hv_product(vector)

    # First, while no freed memory hides what the graph takes.
    taken, _ = _kept_graph(case, min(len(case.targets), 512), vector)
    size, each = fastest(case, product)
    free = _free_memory()
    if free is not None and taken * len(case.targets) < MEMORY_SHARE * free:
        _, kept = _kept_graph(case, len(case.targets), vector)
        if kept < each:
            return {"batch": None}
    return {"batch": size}


def _kept_graph(case: Case, examples: int, vector: list[torch.Tensor]) -> tuple[float, float]:
    """Memory and time an example of a product on one kept graph of so many examples."""
    from pyhessian.utils import hessian_vector_product

    part = Case(case.model, case.inputs[:examples], case.targets[:examples], case.about)
    before = _resident()
    operator = pyhessian_operator(part, None)
    hessian_vector_product(operator.gradsH, operator.params, vector)
    taken = max(_resident() - before, 0)
    seconds = min(clock(lambda: hessian_vector_product(operator.gradsH, operator.params, vector)) for _ in range(2))
    case.model.zero_grad()
    return taken / examples, seconds / examples


def _resident() -> int:
    """Bytes now resident, where the system says (it also says then how many are free)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


TUNERS: dict[str, Callable[[Case, Any, float], dict[str, Any]]] = {
    "curvlinops": curvlinops,
    "eigenthings": eigenthings,
    "pyhessian": pyhessian,
}
