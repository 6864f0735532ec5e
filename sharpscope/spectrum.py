"""From a problem to the ends of its Hessian's spectrum."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sharpscope.audit import audit
from sharpscope.errors import ArgumentError, ConvergenceWarning
from sharpscope.linalg import Eigenpairs, require_arguments, top_eigenpairs
from sharpscope.linalg.certificate import Certificate, certificate, kuczynski_wozniakowski, missed_probability
from sharpscope.objective import Objective, Progress
from sharpscope.operators import curvature
from sharpscope.problem import Problem
from sharpscope.provenance import provenance, seeded
from sharpscope.results import Cost, EigenResult
from sharpscope.resume import open_journal, resumable
from sharpscope.sampling import sampling_error
from sharpscope.subset import FEWEST, Subset, sample, worthwhile

# What a certificate leaves of a chance that an eigenvalue was missed.
CERTAIN = 0.01

# Eigenvalues that were missed and found by a certificate's probe, after which it gives up.
SURPRISES = 5


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
            the caller's to remove (``Journal.finish``) once the result is safe; ``seconds`` are the last run's.

    Cost: "guided", at k = 5 and tol 1e-3 typically 2 passes of 11 to 13 gradients, half a gradient for a forward pass
    and 3 to 4 for the subset; "lanczos", 1 + 2 (k + 1) gradients a pass, 5 to 12 passes.

    Raises: ArgumentError, ProblemError, DataError, AuditError.
    """
    source, seed = seeded(generator)
    settings = {"k": k, "tol": tol, "method": method, "which": which, "certify": certify, "max_basis": max_basis}
    objective = Objective(
        problem, dtype=dtype, device=device, micro_batch=micro_batch, curvature=curvature(operator, source)
    )
    n = objective.num_params
    require_arguments(n, k, tol, method, max_passes, which)
    if certify is not None and (which != "largest" or not 0 < certify < 1):
        raise ArgumentError(f"certify must be between 0 and 1, with which='largest', got {certify} and {which!r}.")
    state = open_journal(journal, objective, **settings, max_passes=max_passes, seed=source.get_state())
    worst = [float("inf")]

    def stage(label: str, done: int, total: int | None) -> None:
        if progress is not None:
            sure = f"bound {worst[0]:.0e}, wanted {tol:.0e}" if worst[0] < 1e9 else f"wanted bound {tol:.0e}"
            progress(f"{label}, {sure}", done, total)

    def note(products: int, bound: float) -> None:
        worst[0] = bound

    with objective.measuring():
        audit(objective, torch.Generator().manual_seed(source.initial_seed()))
        matmat = resumable(objective, state, stage)
        memory = _memory(objective, k, max_basis)
        stage(f"about {max(1, sum(memory.values()) >> 20)} MB", 0, objective.num_examples)
        guides = _guides(objective, method, which, k, source, stage)
        options: dict[str, Any] = {
            "tol": tol,
            "which": which,
            "max_basis": max_basis,
            "max_products": max_passes,
            "method": "lanczos" if not guides and method == "auto" else method,
            "guides": guides,
            "dtype": objective.dtype if objective.curvature.exact else torch.float32,
            "device": basis_device if basis_device is not None else objective.device,
            "generator": source,
            "progress": note,
        }
        pairs = top_eigenpairs(matmat, n, k, **options)
        proof = None
        for _ in range(0 if certify is None else SURPRISES):
            assert certify is not None
            above = float(pairs.upper[-1] + certify * pairs.eigenvalues[0].abs())
            found = pairs.eigenvectors.T.contiguous()
            proof = certificate(
                lambda rows: matmat(rows.T).T.contiguous().to(rows),
                found,
                above=above,
                probability=CERTAIN,
                generator=source,
            )
            if proof.vector is None:
                break
            pairs = top_eigenpairs(matmat, n, k, **options, initial=torch.cat([found, proof.vector[None]]).T)
        sampling = None
        if population:
            sampling = sampling_error(objective, pairs.eigenvectors, pairs.eigenvalues, progress=stage).to_dict()
    assert objective.loss is not None
    assert objective.gradient is not None
    if not bool(pairs.converged.all()):
        missing = [i + 1 for i in range(len(pairs.converged)) if not pairs.converged[i]]
        warnings.warn(
            f"Eigenvalues {missing} have not converged to tol={tol:g} in {objective.passes} passes. Raise max_passes "
            f"or tol{', or pass dtype=torch.float64' if objective.dtype == torch.float32 else ''}.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return EigenResult(
        eigenvalues=pairs.eigenvalues.numpy(),
        residuals=pairs.residuals.numpy(),
        lower=pairs.lower.numpy(),
        upper=pairs.upper.numpy(),
        converged=pairs.converged.numpy(),
        missed_probability=_missed(pairs, proof, which),
        sampling=sampling,
        loss=objective.loss,
        gradient_norm=float(torch.linalg.vector_norm(objective.gradient)),
        cost=Cost(objective.passes, objective.hvps, objective.gradients, objective.seconds),
        provenance=provenance(
            problem,
            objective,
            seed,
            tol=tol,
            method=pairs.method,
            which=which,
            operator=operator,
            memory=memory,
            subset=guides[-1].num_examples if guides else None,
            certificate=None if proof is None else _stated(proof, certify),
        ),
        eigenvectors=pairs.eigenvectors.cpu().numpy() if vectors else None,
    )


def _guides(
    objective: Objective, method: str, which: str, k: int, generator: torch.Generator, progress: Progress
) -> list[Subset]:
    """The subsets that guide the solver, where that is asked for or pays."""
    if method not in ("auto", "guided") or which not in ("largest", "smallest"):
        return []
    if method == "auto" and (which == "smallest" or not worthwhile(objective)):
        return []
    found = sample(objective, generator, progress)
    if not found and method == "guided":
        raise ArgumentError(
            f"method='guided' needs more than {FEWEST} examples, in batches that may be cut. Pass method='lanczos'."
        )
    return found


def _memory(objective: Objective, k: int, max_basis: int | None) -> dict[str, int]:
    """Bytes that the solver's vectors and one micro-batch's graph will take at most, known before the start.

    A search space has as many images; a block, its product and its sums are beside it. Graphs of a subset that are kept
    come to KEPT at most.
    """
    limit = 8 * (k + 1) if max_basis is None else max_basis
    each = objective.num_params * torch.finfo(objective.dtype).bits // 8
    return {"vectors": each * (2 * limit + 6 * (k + 1)), "graph": objective.graph_bytes()}


def _missed(pairs: Eigenpairs, proof: Certificate | None, which: str) -> NDArray[np.float64]:
    """For each eigenvalue a bound on the probability that one beyond it was missed."""
    sign = -1.0 if which == "smallest" else 1.0
    beyond = (pairs.upper if sign > 0 else -pairs.lower).tolist()
    said = [1.0 if pairs.start is None else pairs.start.missed(t) for t in beyond]
    if proof is not None:
        again = [missed_probability(proof.alphas, proof.betas, proof.order, t - proof.rounding) for t in beyond]
        said = [min(pair) for pair in zip(said, again, strict=True)]
    return np.array(said)


def _stated(proof: Certificate, eps: float | None) -> dict[str, Any]:
    """What a certificate's run supports, for the record."""
    assert eps is not None
    return {
        "eps": eps,
        "above": proof.above,
        "probability": proof.probability,
        "steps": proof.steps,
        # Of the spread of what is left, before the run.
        "kuczynski_wozniakowski": kuczynski_wozniakowski(proof.order, proof.steps, eps),
    }
