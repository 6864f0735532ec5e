"""Top Hessian eigenvalues: from a problem to an EigenResult."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharpscope.errors import ArgumentError, ConvergenceWarning
from sharpscope.linalg import Eigenpairs
from sharpscope.linalg.missed_eigenvalues import STEPS, kuczynski_wozniakowski
from sharpscope.linalg.top_eigenpairs import (
    MAX_TOL,
    CertifiedEigenpairs,
    certify_eigenpairs,
    guidable,
    require_arguments,
    top_eigenpairs_rows,
)
from sharpscope.measurement import Measurement
from sharpscope.objective import Progress
from sharpscope.objective.accumulate import MAX_CACHED_BYTES
from sharpscope.precision import available_device
from sharpscope.problem import Problem
from sharpscope.random_streams import stream
from sharpscope.results import EigenResult
from sharpscope.results.eigen import MAX_MISS_PROBABILITY
from sharpscope.resume import once_with_cost
from sharpscope.sampling.importance_sample import (
    MIN_SIZE,
    ImportanceSample,
    default_size,
    importance_samples,
    worthwhile,
)
from sharpscope.sampling.rounding_sample import float32_error
from sharpscope.sampling.sampling_error import sampling_error


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
    norm come with it. What has not converged is marked in the result and warned of. The model and all random states are
    left bit for bit as they were.

    The bounds come from residuals and gaps (``sharpscope.linalg.ritz.ritz_bounds``) of true products, with rounding
    (``linalg.ritz.rayleigh_ritz``). In float32 they are then widened by what float32 does to the model itself, as some
    examples show in float64 (``_float32_error``), and held to ``tol`` again.

    Args:
        problem: model, loss and data.
        k: number of eigenvalues, with multiplicity.
        tol: relative tolerance of each; the solvers stop at 0.02 where it is larger, and the intervals are wider.
        method: "guided" (few passes: a weighted subset of the data guides the solver), "lanczos" (block Lanczos),
            "power", or "auto": "guided" for the largest eigenvalues of 4,096 examples or more, else "lanczos".
        generator: source of the random start and the subset; by default one seeded with 0.
        progress: called as ``progress(stage, done, total)`` in examples; total is None until the first pass has ended.
        which: "largest", "smallest", "both" (2k: the k largest, then the k smallest) or "magnitude" (largest
            ``|lambda|``); the last two solve for both ends, one after the other.
        operator: "hessian", or another curvature matrix: "ggn", "fisher", "empirical-fisher" (per loss term),
            "finite-difference"; see ``sharpscope.operators.curvature``.
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

    Raises: ArgumentError, ProblemError, DataError, AuditError; OutputError where the journal cannot be written, or
        another process has it.

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
    settings = {"k": k, "tol": tol, "method": method, "which": which, "certify": certify, "max_basis": max_basis}
    computation: dict[str, Any] = {"dtype": dtype, "device": device, "micro_batch": micro_batch}
    m = Measurement(
        problem,
        generator,
        progress,
        "eigenvalues",
        operator=operator,
        journal=journal,
        settings=settings,
        **computation,
    )
    require_arguments(m.num_params, k, tol, method, max_passes, which)
    _require_certify(certify, which, method)
    like = _solver_vectors(m, basis_device)
    with m:
        guided = _is_guided(m, method, which, k)
        memory = _memory(m, k, max_basis, guided, certify is not None)
        m.report(f"memory {max(1, sum(memory.values()) >> 20)} MB", 0, m.objective.num_examples)
        guides = _guides(m, method) if guided else []
        hessian = _as_solver_operator(like, m.products, m)
        solve = partial(
            top_eigenpairs_rows,
            hessian,
            like,
            k,
            tol=tol,
            which=which,
            method=method,
            max_basis=max_basis,
            guides=[_as_solver_operator(like, guide, m) for guide in guides],
            generator=m.generator,
            progress=partial(_report_bound, m, min(tol, MAX_TOL)),
        )
        before = m.objective.passes
        pairs, proof = solve(max_products=max_passes), None
        if certify is not None:
            left = None if max_passes is None else max_passes + before
            proof = certify_eigenpairs(
                hessian, pairs, solve, certify, lambda: _remaining(m, left), MAX_MISS_PROBABILITY, m.generator
            )
            pairs = proof.pairs
        pairs = pairs.widened(_float32_error(m, pairs), tol)
        sampling = _sampling(m, pairs, which, k) if population else None
    _warn(m, pairs, proof, tol)
    return EigenResult(
        eigenvalues=pairs.eigenvalues.numpy(),
        residuals=pairs.residuals.numpy(),
        lower=pairs.lower.numpy(),
        upper=pairs.upper.numpy(),
        converged=pairs.converged.numpy(),
        missed_probability=_missed_probability(pairs, which),
        certificate=None if proof is None else _certificate(proof, certify),
        sampling=sampling,
        eigenvectors=pairs.eigenvectors.cpu().numpy() if vectors else None,
        **m.outcome(),
        provenance=m.provenance(
            tol=tol,
            method=pairs.method,
            which=which,
            operator=operator,
            memory=memory,
            subset=guides[-1].num_examples if pairs.method == "guided" else None,
        ),
    )


def _solver_vectors(m: Measurement, basis_device: torch.device | str | None) -> Tensor:
    """An empty block (0, n) in the dtype and on the device of the solver's vectors."""
    # Finite differences in float64 have the digits of float32.
    dtype = m.objective.dtype if m.objective.curvature.exact else torch.float32
    device = m.objective.device if basis_device is None else available_device(basis_device)
    return torch.empty(0, m.num_params, dtype=dtype, device=device)


def _as_solver_operator(
    like: Tensor, operator: Callable[[Tensor], Tensor], m: Measurement
) -> Callable[[Tensor], Tensor]:
    """``operator``, which computes in the objective's dtype and device, as a function of rows like ``like``."""
    return lambda rows: operator(rows.to(m.objective.device, m.objective.dtype)).to(like)


def _is_guided(m: Measurement, method: str, which: str, k: int) -> bool:
    """Whether a weighted sample of the data guides the solver: if asked for, or if it saves time."""
    if method != "auto":
        return method == "guided"
    return guidable(which, m.num_params, k) and worthwhile(m.objective)


def _guides(m: Measurement, method: str) -> list[ImportanceSample]:
    """Draw the guiding samples, the smallest first; none if the loader's batches must be kept."""
    found = [] if m.objective.keeps_batches else importance_samples(m.objective, m.generator, m.report)
    if not found and method == "guided":
        raise ArgumentError(
            f"method='guided' needs more than {MIN_SIZE} examples, in batches that may be cut. Pass method='lanczos'."
        )
    return found


def _memory(m: Measurement, k: int, max_basis: int | None, guided: bool, certify: bool) -> dict[str, int]:
    """Upper bound on the bytes of vectors and graphs, known before the start.

    A search space has as many images; a block, its product and its sums come on top. A certificate keeps its basis.
    """
    limit = 8 * (k + 1) if max_basis is None else max_basis
    each = m.num_params * torch.finfo(m.objective.dtype).bits // 8
    held = 2 * limit + 6 * (k + 1)
    if certify:
        held = max(held, 2 * k + STEPS + 8)
    bytes_of = {"vectors": each * held, "graph": m.objective.graph_bytes()}
    if guided:
        bytes_of["subset"] = min(MAX_CACHED_BYTES, m.objective.graph_bytes(default_size(m.objective)))
    return bytes_of


def _report_bound(m: Measurement, tol: float, products: int, bound: float) -> None:
    """Show the largest relative error bound so far and the target."""
    m.status = f", error {bound:.0e}, target {tol:.0e}" if bound < 1e9 else f", target error {tol:.0e}"


def _remaining(m: Measurement, last: int | None) -> int | None:
    """The number of passes left; None for no limit."""
    return None if last is None else max(0, last - m.objective.passes)


def _float32_error(m: Measurement, pairs: Eigenpairs) -> float:
    """Error of an eigenvalue from float32 arithmetic in the model, beyond the rounding of products; 0 in float64.

    Cost: ``1 + 2k`` gradients of at most 256 examples, twice; the outputs of up to 4,096.
    """
    source = stream(m.generator.initial_seed(), "float32 rounding")
    if m.objective.dtype != torch.float32:
        return 0.0
    error = m.objective.curvature.float32_error * float(pairs.eigenvalues.abs().max())
    if m.objective.curvature.exact:
        seen = once_with_cost(
            m.objective,
            m.journal,
            "float32 error",
            lambda: {"of": float32_error(m.objective, pairs.eigenvectors, source)},
        )
        error += seen["of"]
    return error


def _sampling(m: Measurement, pairs: Eigenpairs, which: str, k: int) -> dict[str, Any]:
    """Intervals for the eigenvalues of the population that the data are a sample of; cost ``1 + 2k`` gradients."""
    ratio = k if which in ("largest", "both") else 0
    found = sampling_error(m.objective, pairs.eigenvectors, pairs.eigenvalues, progress=m.report, ratio=ratio)
    return found.to_dict()


def _missed_probability(pairs: Eigenpairs, which: str) -> NDArray[np.float64]:
    """Upper bound, for each eigenvalue, on the probability that an eigenvalue beyond it was missed.

    H has an eigenvalue beyond t only if ``P H P`` has one beyond ``t - ||R||``, R the residual vectors (Weyl).
    """
    if not bool(pairs.converged.all()):
        return np.ones(len(pairs.converged))  # a missed eigenvector may be mixed into an unconverged one
    outer = pairs.upper if which == "largest" else -pairs.lower
    beyond = outer - pairs.residuals.norm()
    return np.array([1.0 if pairs.missed_bound is None else pairs.missed_bound.probability(float(t)) for t in beyond])


def _certificate(proof: CertifiedEigenpairs, eps: float | None) -> dict[str, Any]:
    """The certificate as a field of the result."""
    last = proof.last
    assert eps is not None
    return {
        "eps": eps,
        "above": last.above,
        "probability": proof.probability,
        "runs": proof.runs,
        "steps": last.steps,
        # The a-priori bound: missing by eps times the spread of the deflated spectrum.
        "kuczynski_wozniakowski": kuczynski_wozniakowski(last.order, last.steps, eps),
    }


def _warn(m: Measurement, pairs: Eigenpairs, proof: CertifiedEigenpairs | None, tol: float) -> None:
    """Warn of unconverged eigenvalues and of a certificate that was not reached."""
    if not bool(pairs.converged.all()):
        missing = [i + 1 for i in range(len(pairs.converged)) if not pairs.converged[i]]
        warnings.warn(m.unconverged(f"Eigenvalues {missing} have", tol), ConvergenceWarning, stacklevel=3)
    if proof is not None and proof.probability > MAX_MISS_PROBABILITY:
        warnings.warn(
            f"No certificate: an eigenvalue above {proof.last.above:.4g} may have been missed with probability "
            f"{proof.probability:.2g} after {proof.runs} runs. Raise max_passes or certify.",
            ConvergenceWarning,
            stacklevel=3,
        )


def _require_certify(certify: float | None, which: str, method: str) -> None:
    """Raise ArgumentError if ``certify`` is invalid or does not fit the method."""
    if certify is not None and method == "power":
        raise ArgumentError(
            "certify needs a solver that can start from what it found, got method='power'. Leave it out."
        )
    if certify is not None and which != "largest":
        raise ArgumentError(f"certify is for which='largest', got which={which!r}. Leave one of them out.")
    if certify is not None and not 0 < certify < 1:
        raise ArgumentError(f"certify must be between 0 and 1, got {certify}.")
