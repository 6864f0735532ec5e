"""Alternate solver and certificate until a missed eigenvalue above a threshold is improbable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg import Eigenpairs
from sharpscope.linalg.missed_eigenvalues import STEPS, Certificate, certificate
from sharpscope.results.eigen import MAX_MISS_PROBABILITY

# Missed eigenvalues found by certificates before giving up.
MAX_MISSED = 5


@dataclass(frozen=True)
class CertifiedEigenpairs:
    """Eigenpairs, and the certificate of the last of ``runs`` random-start Lanczos runs.

    ``probability`` bounds the probability of an error in any of the runs; 1 if no run ended.
    """

    pairs: Eigenpairs
    last: Certificate
    runs: int
    probability: float


def certify_eigenpairs(
    hessian: Callable[[Tensor], Tensor],
    pairs: Eigenpairs,
    solve: Callable[..., Eigenpairs],
    eps: float,
    remaining: Callable[[], int | None],
    generator: torch.Generator,
) -> CertifiedEigenpairs:
    """Certify that no eigenvalue above ``lambda_k + eps |lambda_1|`` was missed; improve ``pairs`` if one was.

    If a run finds such an eigenvalue, its vector is passed to the solver, and another run follows the solve. The j-th
    run has the level ``MAX_MISS_PROBABILITY / 2^j``, so the probability of an error in any of them is at most
    ``MAX_MISS_PROBABILITY``.

    Args:
        hessian: rows (b, n) to rows (b, n) times H.
        pairs: the k largest eigenpairs found so far.
        solve: the solver, called as ``solve(initial=rows, max_products=most)`` with k + 1 rows.
        eps: in (0, 1).
        remaining: returns the number of products left, None for no limit.
        generator: the solver's, in its present state; a new one would repeat the solver's start.
    """
    used_probability = 0.0
    for run in range(1, MAX_MISSED + 2):
        products_left = remaining()
        vectors = pairs.eigenvectors.T.contiguous()
        level = MAX_MISS_PROBABILITY / 2**run
        above = float(pairs.upper[-1] + eps * pairs.eigenvalues[0].abs())
        if products_left == 0:
            proof = Certificate(1.0, above, 0, -math.inf, None, (), (), vectors.shape[1] - len(vectors), 0.0)
            break
        proof = certificate(
            hessian,
            vectors,
            above=above,
            probability=level,
            max_steps=STEPS if products_left is None else min(STEPS, products_left),
            scale=float(pairs.eigenvalues.abs().max()),
            generator=generator,
        )
        products_left = remaining()
        if proof.vector is None or run > MAX_MISSED or (products_left is not None and products_left < 3):
            break
        used_probability += level
        pairs = solve(initial=torch.cat([vectors, proof.vector[None]]), max_products=products_left)
    return CertifiedEigenpairs(pairs, proof, run, min(1.0, used_probability + proof.probability))


def require_certify(certify: float | None, which: str, method: str) -> None:
    """Raise ArgumentError if ``certify`` is invalid or does not fit the method."""
    if certify is not None and method == "power":
        raise ArgumentError(
            "certify needs a solver that can start from what it found, got method='power'. Leave it out."
        )
    if certify is not None and which != "largest":
        raise ArgumentError(f"certify is for which='largest', got which={which!r}. Leave one of them out.")
    if certify is not None and not 0 < certify < 1:
        raise ArgumentError(f"certify must be between 0 and 1, got {certify}.")
