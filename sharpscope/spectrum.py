"""From a problem to the ends of its Hessian's spectrum."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharpscope.audit import audit, rounding_of
from sharpscope.certify import Certified, certified
from sharpscope.errors import ArgumentError, ConvergenceWarning
from sharpscope.guide.subset import FEWEST, Subset, sample, usual_size, worthwhile
from sharpscope.linalg import Eigenpairs, top_eigenpairs
from sharpscope.linalg.certificate import STEPS, kuczynski_wozniakowski
from sharpscope.linalg.top_eigenpairs import guidable, require_arguments
from sharpscope.objective import Objective, Progress
from sharpscope.objective.kept import KEPT
from sharpscope.operators import curvature
from sharpscope.precision import usable
from sharpscope.problem import Problem
from sharpscope.provenance import measured, provenance, seeded
from sharpscope.results import EigenResult
from sharpscope.results.record import CERTAIN
from sharpscope.resume import open_journal, resumable
from sharpscope.sampling import sampling_error

# Intervals are longer by so many times the rounding in float32 that some examples show, since others may show more.
ROUNDED = 4.0


def top_eigenvalues(
    problem: Problem,
    k: int = 5,
    tol: float = 1e-3,
    method: str = "auto",
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    which: str = "largest",
    operator: str = "hessian",
    certify: float | None = None,
    population: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    basis_device: torch.device | str | None = None,
    micro_batch: int | str | None = None,
    max_basis: int | None = None,
    max_passes: int | None = None,
    vectors: bool = False,
    journal: str | os.PathLike[str] | None = None,
) -> EigenResult:
    """``lambda_1 >= ... >= lambda_k``, the largest algebraic eigenvalues of the Hessian of L(w) of ``problem``.

    The audit runs first; then the solver, until each eigenvalue's bound is at most ``tol |lambda|``; loss and gradient
    norm come with it. What has not converged is marked in the result and warned of. The model and all random states
    are left bit for bit as they were.

    Args:
        problem: model, loss and data.
        k: number of eigenvalues, with multiplicity.
        tol: relative tolerance of each.
        method: "guided" (few passes: a weighted subset of the data guides the solver), "lanczos" (block Lanczos),
            "power", or "auto": "guided" for the largest eigenvalues of 4,096 examples or more, else "lanczos".
        generator: source of the random start and the subset; by default one seeded with 0.
        progress: called as ``progress(stage, done, total)`` in examples; total is None until the first pass has ended.
        which: "largest", "smallest", "both" (2k: the k largest, then the k smallest) or "magnitude" (largest
            ``|lambda|``).
        operator: "hessian", or another curvature matrix: "ggn", "fisher", "empirical-fisher", "finite-difference"; see
            ``sharpscope.operators.curvature``.
        certify: eps: pay for a random-start Lanczos run on all the data, outside of what was found, until an eigenvalue
            above ``lambda_k + eps lambda_max`` was missed with a probability of at most 1 %. One it finds is taken in.
        population: the data are a sample of what is meant: state the eigenvalues' sampling errors, at one more pass.
        dtype: torch.float32 or torch.float64; by default the parameters' own, at least float32.
        device: where to compute; by default where the parameters are.
        basis_device: where the solver's vectors live; by default ``device``.
        micro_batch: examples a graph; "loader" keeps the loader's batches; by default chosen by measuring.
        max_basis: vectors kept by the solver.
        max_passes: products with all the data after which the solver gives up.
        vectors: keep the eigenvectors in the result.
        journal: a folder for the state of a long run: the same call after a kill goes on with the passes in it. It is
            the caller's to delete once the result is safe. More ``max_passes`` than before go on with them too.

    Cost: "guided", at k = 5 and tol 1e-3 typically 2 passes of 11 to 13 gradients, 0.45 for a forward pass
    and 3 to 4 for the subset; "lanczos", 1 + 2 (k + 1) gradients a pass, 5 to 12 passes.

    Raises: ArgumentError, ProblemError, DataError, AuditError; OutputError where the journal cannot be written.

    >>> import sharpscope
    >>> import torch
    >>> data = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = diag(6, 8/3, 2/3)
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> result = sharpscope.top_eigenvalues(problem, k=2)
    >>> result.eigenvalues.round(2), result.converged
    (array([6.  , 2.67]), array([ True,  True]))
    >>> bool(result.lower[0] <= 6 <= result.upper[0])
    True
    """
    source, seed = seeded(generator)
    settings = {"k": k, "tol": tol, "method": method, "which": which, "certify": certify, "max_basis": max_basis}
    objective = Objective(
        problem, dtype=dtype, device=device, micro_batch=micro_batch, curvature=curvature(operator, source)
    )
    n = objective.num_params
    home = objective.device if basis_device is None else usable(basis_device)
    require_arguments(n, k, tol, method, max_passes, which)
    if certify is not None and which != "largest":
        raise ArgumentError(f"certify is for which='largest', got which={which!r}. Leave one of them out.")
    if certify is not None and not 0 < certify < 1:
        raise ArgumentError(f"certify must be between 0 and 1, got {certify}.")
    state = open_journal(journal, objective, **settings, seed=source.get_state())
    worst = [float("inf")]

    def stage(label: str, done: int, total: int | None) -> None:
        if progress is not None:
            sure = f"bound {worst[0]:.0e}, wanted {tol:.0e}" if worst[0] < 1e9 else f"wanted bound {tol:.0e}"
            progress(f"{label}, {sure}", done, total)

    def note(products: int, bound: float) -> None:
        worst[0] = bound

    with objective.measuring():
        seen = audit(objective, torch.Generator().manual_seed(source.initial_seed()))
        matmat = resumable(objective, state, seen, stage)
        guided = _guided(objective, method, which, k)
        memory = _memory(objective, k, max_basis, guided, certify is not None)
        stage(f"about {max(1, sum(memory.values()) >> 20)} MB", 0, objective.num_examples)
        guides = _guides(objective, method, source, stage) if guided else []
        options: dict[str, Any] = {
            "tol": tol,
            "which": which,
            "max_basis": max_basis,
            "max_products": max_passes,
            "method": method,
            "guides": guides,
            "dtype": objective.dtype if objective.curvature.exact else torch.float32,
            "device": home,
            "generator": source,
            "progress": note,
        }
        before = objective.passes
        pairs = top_eigenpairs(matmat, n, k, **options)
        proof = None
        if certify is not None:

            def remaining() -> int | None:
                return None if max_passes is None else max(0, max_passes - objective.passes + before)

            def solve(initial: Tensor, most: int | None) -> Eigenpairs:
                return top_eigenpairs(matmat, n, k, **{**options, "initial": initial, "max_products": most})

            proof = certified(matmat, pairs, solve, certify, remaining=remaining, generator=source)
            pairs = proof.pairs
        if objective.dtype == torch.float32:
            off = objective.curvature.single * float(pairs.eigenvalues.abs().max())
            if objective.curvature.exact:
                vs = pairs.eigenvectors
                off += ROUNDED * state.once("rounding", lambda: {"of": rounding_of(objective, vs)})["of"]
            pairs = pairs.widened(off, tol)
        sampling = None
        if population:
            ratio = k if which in ("largest", "both") else 0
            vs, values = pairs.eigenvectors, pairs.eigenvalues
            sampling = sampling_error(objective, vs, values, progress=stage, ratio=ratio).to_dict()
    if not bool(pairs.converged.all()):
        missing = [i + 1 for i in range(len(pairs.converged)) if not pairs.converged[i]]
        warnings.warn(
            f"Eigenvalues {missing} have not converged to tol={tol:g} in {objective.passes} passes. Raise max_passes "
            f"or tol{', or pass dtype=torch.float64' if objective.dtype == torch.float32 else ''}.",
            ConvergenceWarning,
            stacklevel=2,
        )
    if proof is not None and proof.probability > CERTAIN:
        warnings.warn(
            f"No certificate: an eigenvalue above {proof.last.above:.4g} may have been missed with probability "
            f"{proof.probability:.2g} after {proof.runs} runs. Raise max_passes or certify.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return EigenResult(
        eigenvalues=pairs.eigenvalues.numpy(),
        residuals=pairs.residuals.numpy(),
        lower=pairs.lower.numpy(),
        upper=pairs.upper.numpy(),
        converged=pairs.converged.numpy(),
        missed_probability=_missed(pairs, which),
        certificate=None if proof is None else _stated(proof, certify),
        sampling=sampling,
        **measured(objective),
        provenance=provenance(
            problem,
            objective,
            seed,
            tol=tol,
            method=pairs.method,
            which=which,
            operator=operator,
            memory=memory,
            subset=guides[-1].num_examples if pairs.method == "guided" else None,
        ),
        eigenvectors=pairs.eigenvectors.cpu().numpy() if vectors else None,
    )


def _guided(objective: Objective, method: str, which: str, k: int) -> bool:
    """Whether a subset is to guide the solver: where that is asked for, or pays."""
    if method != "auto":
        return method == "guided"
    return guidable(which, objective.num_params, k) and worthwhile(objective)


def _guides(objective: Objective, method: str, generator: torch.Generator, progress: Progress) -> list[Subset]:
    """The subsets, the coarse one first; none where "auto" meets batches that cannot be cut."""
    found = [] if objective.keeps_batches else sample(objective, generator, progress)
    if not found and method == "guided":
        raise ArgumentError(
            f"method='guided' needs more than {FEWEST} examples, in batches that may be cut. Pass method='lanczos'."
        )
    return found


def _memory(objective: Objective, k: int, max_basis: int | None, guided: bool, certify: bool) -> dict[str, int]:
    """Bytes that vectors and graphs will take at most, known before the start.

    A search space has as many images; a block, its product and its sums are beside it, and a product for each lane. A
    certificate's run keeps its steps.
    """
    limit = 8 * (k + 1) if max_basis is None else max_basis
    each = objective.num_params * torch.finfo(objective.dtype).bits // 8
    held = 2 * limit + (5 + objective.lanes) * (k + 1)
    if certify:
        held = max(held, 2 * k + STEPS + 8)
    bytes_of = {"vectors": each * held, "graph": objective.graph_bytes()}
    if guided:
        bytes_of["subset"] = min(KEPT, objective.graph_bytes(usual_size(objective)))
    return bytes_of


def _missed(pairs: Eigenpairs, which: str) -> NDArray[np.float64]:
    """For each eigenvalue a bound on the probability that one beyond it was missed.

    H has one beyond t only if ``P H P`` has one beyond ``t - ||R||``, R the residuals of what was found (Weyl).
    """
    if not bool(pairs.converged.all()):
        return np.ones(len(pairs.converged))  # what has not converged may hide in what was found
    outer = pairs.upper if which == "largest" else -pairs.lower
    beyond = outer - pairs.residuals.norm()
    return np.array([1.0 if pairs.start is None else pairs.start.missed(float(t)) for t in beyond])


def _stated(proof: Certified, eps: float | None) -> dict[str, Any]:
    """What a certificate's runs support, for the record."""
    last = proof.last
    assert eps is not None
    return {
        "eps": eps,
        "above": last.above,
        "probability": proof.probability,
        "runs": proof.runs,
        "steps": last.steps,
        # The bound that needs no look at the run, of missing by eps of the spread of what is left.
        "kuczynski_wozniakowski": kuczynski_wozniakowski(last.order, last.steps, eps),
    }
