"""The eigensolvers as functions from a live model to eigenvalues, each counting what it does."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from batching import Batches, batches
from cases import Case
from roster import K

# Gradients (forward and backward) that one product costs: forward, backward and the backward of both, or the tangents
# of forward and backward beside them (3); on a kept graph only the last part (2); two gradients and their difference.
DOUBLE_BACKPROP, FORWARD_OVER_REVERSE, KEPT_GRAPH, FINITE_DIFFERENCE = 3.0, 3.0, 2.0, 2.0


@dataclass(frozen=True)
class Answer:
    """Eigenvalues, descending, and what they took: passes over the data, and gradients over the data."""

    values: list[float]
    passes: float
    gradients: float
    converged: bool | None
    note: str = ""


Work = Callable[[], Answer]


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def prepare(name: str, case: Case, settings: dict[str, Any], accuracy: float) -> Work:
    """The solver ``name``, everything imported, ready to be timed."""
    tool, _, rest = name.partition(" ")
    method = rest.removesuffix(", told").removeprefix("+ ")
    told = rest.endswith(", told")
    if tool == "sharpscope":
        return _sharpscope(case, method, accuracy)
    if tool == "curvlinops":
        return _curvlinops(case, settings, accuracy, told)
    if tool == "eigenthings":
        return _eigenthings(case, settings, accuracy, method, told)
    return _pyhessian(case, settings, accuracy)


def warm_up(name: str, case: Case) -> None:
    """One product of the tool's own on a few examples: what it and torch load late is not the solver's time."""
    few = Case(case.model, case.inputs[:64], case.targets[:64], case.about)
    data, vector = batches(few, 64), torch.ones(case.num_params)
    tool = name.partition(" ")[0]
    if tool == "sharpscope":
        from sharpscope import Objective

        Objective(few.problem()).hvp(vector[:, None])
    elif tool == "curvlinops":
        curvlinops_operator(few, data).matvec(vector.numpy())
    elif tool == "eigenthings":
        eigenthings_operator(few, data, "autograd").matvec(vector)
    else:
        pyhessian_operator(few, 64).dataloader_hv_product([torch.ones_like(p) for p in case.model.parameters()])


def _sharpscope(case: Case, method: str, accuracy: float) -> Work:
    from sharpscope import top_eigenvalues

    def work() -> Answer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what has not converged is in the answer
            result = top_eigenvalues(case.problem(), k=K, tol=accuracy, method=method)
        cost = result.cost
        used = "micro-batch {micro_batch}".format_map(result.provenance)
        return Answer(result.eigenvalues.tolist(), cost.passes, cost.gradients, bool(result.converged.all()), used)

    return work


def curvlinops_operator(case: Case, data: Batches) -> Any:
    """The Hessian as a SciPy operator."""
    from curvlinops import HessianLinearOperator

    count = sum(len(y) for _, y in data)
    params = [p for p in case.model.parameters() if p.requires_grad]
    operator = HessianLinearOperator(case.model, case.loss, params, data, check_deterministic=False, num_data=count)
    return operator.to_scipy()


def start(n: int) -> torch.Tensor:
    """The start vector that eigenthings draws from seed 0; curvlinops is given the same."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


def _curvlinops(case: Case, settings: dict[str, Any], accuracy: float, told: bool) -> Work:
    import curvlinops  # noqa: F401
    from scipy.sparse.linalg import LinearOperator, eigsh

    def work() -> Answer:
        operator = curvlinops_operator(case, batches(case, settings["batch"]))
        matvec = Counted(operator.matvec)
        counted = LinearOperator(operator.shape, matvec=matvec, dtype=operator.dtype)
        options = {"ncv": settings["ncv"], "tol": settings["tol"]} if told else {"tol": accuracy}
        values = eigsh(
            counted, k=K, which="LA", v0=start(operator.shape[0]).double().numpy(), return_eigenvectors=False, **options
        )
        used = f"batch {settings['batch']}" + (f", ncv {settings['ncv']}" if told else "")
        return Answer(
            sorted(values.tolist(), reverse=True), matvec.calls, FORWARD_OVER_REVERSE * matvec.calls, True, used
        )

    return work


def eigenthings_operator(case: Case, data: Batches, method: str, step: float | None = None) -> Any:
    """Its Hessian; ``step`` is that of finite differences, None the tool's own."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(case.model, data, supervised_loss(case.loss), method=method, fd_eps=step)


def _eigenthings(case: Case, settings: dict[str, Any], accuracy: float, method: str, told: bool) -> Work:
    from hessian_eigenthings import deflated_power_iteration, lanczos

    def work() -> Answer:
        data = batches(case, settings["batch"])
        operator = eigenthings_operator(case, data, settings["method"], settings["step"])
        matvec = operator.matvec = Counted(operator.matvec)
        used = f"batch {settings['batch']}, {settings['method']}"
        used += f" with step {operator.fd_eps:g}" if settings["method"] == "finite_difference" else ""
        if method == "power":
            found = deflated_power_iteration(operator, k=K, tol=accuracy, max_iter=1000, seed=0)
        else:
            run = functools.partial(lanczos, operator, k=K, tol=accuracy, which="LA", reorthogonalize=True, seed=0)
            steps = settings["steps"] if told else min(2 * K, operator.size)
            found = run(max_iter=steps)
            while not told and not bool(found.converged.all()) and steps < operator.size:
                steps = min(2 * steps, operator.size)
                found = run(max_iter=steps)
            used += f", {steps} steps"
        each = DOUBLE_BACKPROP if settings["method"] == "autograd" else FINITE_DIFFERENCE
        values = sorted(found.eigenvalues.tolist(), reverse=True)
        flagged = None if told else bool(found.converged.all())
        return Answer(values, matvec.calls, each * matvec.calls, flagged, used)

    return work


def pyhessian_operator(case: Case, size: int | None) -> Any:
    """Its object; ``size`` None is all data as one batch, whose graph it keeps."""
    import pyhessian

    if size is None:
        return pyhessian.hessian(case.model, case.loss, data=(case.inputs, case.targets), cuda=False)
    return pyhessian.hessian(case.model, case.loss, dataloader=batches(case, size), cuda=False)


def _pyhessian(case: Case, settings: dict[str, Any], accuracy: float) -> Work:
    # Not "import pyhessian.hessian": the package has a class of that name in its place.
    module = importlib.import_module("pyhessian.hessian")

    def work() -> Answer:
        torch.manual_seed(0)  # it draws from the global state
        size, tol = settings["batch"], settings["factor"] * accuracy
        operator = pyhessian_operator(case, size)
        if size is None:
            product = module.hessian_vector_product = Counted(module.hessian_vector_product)
        else:
            product = operator.dataloader_hv_product = Counted(operator.dataloader_hv_product)
        values, _ = operator.eigenvalues(maxIter=1000, tol=tol, top_n=K)
        gradients = 1 + KEPT_GRAPH * product.calls if size is None else DOUBLE_BACKPROP * product.calls
        used = f"tol {tol:g}, " + ("one batch, graph kept" if size is None else f"batch {size}")
        # On a kept graph the data are walked once; each product walks the graph.
        passes = 1 if size is None else product.calls
        return Answer(sorted(values, reverse=True), passes, gradients, None, used)

    return work
