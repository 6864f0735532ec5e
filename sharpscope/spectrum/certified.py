"""Solving and certifying in turn, until an eigenvalue above a threshold is improbable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg import Eigenpairs
from sharpscope.linalg.certificate import STEPS, Certificate, certificate
from sharpscope.results.eigen import MAX_MISS_PROBABILITY

# Eigenvalues that were missed and found by a probe, after which it gives up.
SURPRISES = 5


@dataclass(frozen=True)
class Certified:
    """Eigenpairs, and what the last of ``runs`` random-start runs says of ``lambda_{k+1}``.

    ``probability`` bounds the chance of an error in any of the runs; 1 where no run came to an end.
    """

    pairs: Eigenpairs
    last: Certificate
    runs: int
    probability: float


def certified(
    hessian: Callable[[Tensor], Tensor],
    pairs: Eigenpairs,
    solve: Callable[..., Eigenpairs],
    eps: float,
    remaining: Callable[[], int | None],
    generator: torch.Generator,
) -> Certified:
    """``pairs``, or better ones, until an eigenvalue above ``lambda_k + eps |lambda_1|`` is improbable.

    A run that finds one there hands its vector to the solver, and another run follows: it ends on a run, never on a
    solve. The j-th run is held to ``CERTAIN / 2^j``, so that all of them together err with CERTAIN at most.

    Args:
        hessian: rows (b, n) to rows (b, n) times H.
        pairs: the k largest as far as is known.
        solve: the solver, called as ``solve(initial=rows, max_products=most)`` with k + 1 rows.
        eps: in (0, 1).
        remaining: products that may still be made, None for as many as it takes.
        generator: the one that the solver drew from, which goes on: a fresh one would repeat its start.
    """
    spent = 0.0
    for run in range(1, SURPRISES + 2):
        left = remaining()
        found = pairs.eigenvectors.T.contiguous()
        level = MAX_MISS_PROBABILITY / 2**run
        above = float(pairs.upper[-1] + eps * pairs.eigenvalues[0].abs())
        if left == 0:
            proof = Certificate(1.0, above, 0, -math.inf, None, (), (), found.shape[1] - len(found), 0.0)
            break
        proof = certificate(
            hessian,
            found,
            above=above,
            probability=level,
            max_steps=STEPS if left is None else min(STEPS, left),
            scale=float(pairs.eigenvalues.abs().max()),
            generator=generator,
        )
        left = remaining()
        if proof.vector is None or run > SURPRISES or (left is not None and left < 3):
            break
        spent += level
        pairs = solve(initial=torch.cat([found, proof.vector[None]]), max_products=left)
    return Certified(pairs, proof, run, min(1.0, spent + proof.probability))


def require_certify(certify: float | None, which: str, method: str) -> None:
    """Raise ArgumentError where a certificate cannot be asked for."""
    if certify is not None and method == "power":
        raise ArgumentError(
            "certify needs a solver that can start from what it found, got method='power'. Leave it out."
        )
    if certify is not None and which != "largest":
        raise ArgumentError(f"certify is for which='largest', got which={which!r}. Leave one of them out.")
    if certify is not None and not 0 < certify < 1:
        raise ArgumentError(f"certify must be between 0 and 1, got {certify}.")
