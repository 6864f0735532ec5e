"""From a problem to the top of its Hessian's spectrum."""

from __future__ import annotations

import platform
import warnings
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from sharpscope.audit import audit
from sharpscope.errors import ConvergenceWarning
from sharpscope.linalg import require_arguments, top_eigenpairs
from sharpscope.objective import Objective, Progress
from sharpscope.problem import Problem
from sharpscope.results import Cost, EigenResult
from sharpscope.version import __version__


def top_eigenvalues(
    problem: Problem,
    k: int = 5,
    tol: float = 1e-3,
    method: str = "auto",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    micro_batch: int | str | None = None,
    max_basis: int | None = None,
    max_passes: int | None = None,
    vectors: bool = False,
) -> EigenResult:
    """``lambda_1 >= ... >= lambda_k``, the largest algebraic eigenvalues of the Hessian of L(w) of ``problem``.

    The audit runs first; then block Lanczos on the whole data set until each eigenvalue's bound is at most
    ``tol |lambda|``; loss and gradient norm come with it. What has not converged is marked in the result and warned of.
    The model and all random states are left bit for bit as they were.

    Args:
        problem: model, loss and data.
        k: number of eigenvalues, with multiplicity.
        tol: relative tolerance of each.
        method: "auto", "lanczos" or "power".
        generator: source of the random start; by default one seeded with 0.
        progress: called as ``progress(stage, done, total)`` in examples; total is None until the first pass has ended.
        dtype: torch.float32 or torch.float64; by default the parameters' own, at least float32.
        device: where to compute; by default where the parameters are.
        micro_batch: examples a graph; "loader" keeps the loader's batches; by default chosen by measuring.
        max_basis: vectors kept by the solver.
        max_passes: passes over the data after which the solver gives up.
        vectors: keep the eigenvectors in the result.

    Cost: 1 + 2 (k + 1) gradients a pass with "lanczos", typically 5 to 12 passes at tol 1e-3.

    Raises: ArgumentError, ProblemError, DataError, AuditError.
    """
    objective = Objective(problem, dtype=dtype, device=device, micro_batch=micro_batch)
    n = objective.num_params
    require_arguments(n, k, tol, method, max_passes)
    source = generator if generator is not None else torch.Generator().manual_seed(0)
    seed = source.initial_seed()
    # A generator that has been drawn from does not start where its seed says, so the seed would not repeat the run.
    fresh = torch.equal(source.get_state(), torch.Generator().manual_seed(seed).get_state())
    with objective.measuring():
        audit(objective, torch.Generator().manual_seed(seed))
        worst = [float("inf")]

        def stage(label: str, done: int, total: int | None) -> None:
            if progress is not None:
                sure = f"bound {worst[0]:.0e}, wanted {tol:.0e}" if worst[0] < 1e9 else f"wanted bound {tol:.0e}"
                progress(f"{label}, {sure}", done, total)

        def matmat(block: Tensor) -> Tensor:
            return objective.hvp(block, stage)

        def note(products: int, bound: float) -> None:
            worst[0] = bound

        pairs = top_eigenpairs(
            matmat,
            n,
            k,
            tol=tol,
            method=method,
            max_basis=max_basis,
            max_products=max_passes,
            dtype=objective.dtype,
            device=objective.device,
            generator=source,
            progress=note,
        )
    assert objective.loss is not None
    assert objective.gradient is not None
    if not bool(pairs.converged.all()):
        missing = [i + 1 for i in range(k) if not pairs.converged[i]]
        warnings.warn(
            f"Eigenvalues {missing} have not converged to tol={tol:g} in {objective.passes} passes. Raise max_passes "
            f"or tol{', or pass dtype=torch.float64' if objective.dtype == torch.float32 else ''}.",
            ConvergenceWarning,
            stacklevel=2,
        )
    given: dict[str, Any] = dict(problem.provenance)
    return EigenResult(
        eigenvalues=pairs.eigenvalues.numpy(),
        residuals=pairs.residuals.numpy(),
        lower=pairs.lower.numpy(),
        upper=pairs.upper.numpy(),
        converged=pairs.converged.numpy(),
        loss=objective.loss,
        gradient_norm=float(torch.linalg.vector_norm(objective.gradient)),
        cost=Cost(objective.passes, objective.hvps, objective.gradients, objective.seconds),
        provenance={
            "checkpoint": given.pop("checkpoint", None),
            "sha256": given.pop("sha256", None),
            **given,
            "num_params": n,
            "params": problem.params if isinstance(problem.params, str) else list(problem.params),
            "num_examples": objective.num_examples,
            "loss_function": objective.loss_name,
            "weight_decay": problem.weight_decay,
            "tol": tol,
            "method": pairs.method,
            "dtype": str(objective.dtype).removeprefix("torch."),
            "device": str(objective.device),
            "mode": problem.mode,
            "batchnorm": objective.batchnorm,
            "micro_batch": objective.micro_batch,
            "seed": seed if fresh else None,
            "versions": {
                "sharpscope": __version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "scipy": scipy.__version__,
                "python": platform.python_version(),
            },
        },
        eigenvectors=pairs.eigenvectors.cpu().numpy() if vectors else None,
    )
