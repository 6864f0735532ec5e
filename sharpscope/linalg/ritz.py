"""Ritz pairs from true products, and the bounds on their errors (``ritz_bounds``) that become intervals.

Every solver of ``METHODS`` ends in ``rayleigh_ritz``. The monitor's solver (``warm_lanczos.py``) makes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.vectors_as_rows import combine, inner, norms, require_symmetric, rounding_error

if TYPE_CHECKING:
    from sharpscope.linalg.missed_eigenvalues import MissedEigenvalueBound

SolverProgress = Callable[[int, float], None]


@dataclass(frozen=True)
class RitzPairs:
    """Descending Ritz values (k,) and orthonormal vectors as rows (k, n), with bounds on the values' errors.

    Attributes:
        images: (k, n) the true products of the vectors; ``residuals`` (k,) are ``||H v - theta v||``.
        bounds: (k,) ``|lambda_i - theta_i|`` is at most this, by ``ritz_bounds`` and with rounding.
        next_eigenvalue: the upper estimate of ``lambda_{k+1}`` used by the bounds, None if they use none.
        scale: the largest known norm of a product with H, to which rounding is relative.
        num_matvecs, num_products: products with one vector, and with a block.
        missed_bound: on the probability of a missed eigenvalue, from the solver's random vectors; None without one.
    """

    values: Tensor
    vectors: Tensor
    images: Tensor
    residuals: Tensor
    bounds: Tensor
    converged: Tensor
    next_eigenvalue: float | None
    scale: float
    num_matvecs: int
    num_products: int
    missed_bound: MissedEigenvalueBound | None = None

    def residual_vectors(self) -> Tensor:
        """``H v - theta v`` (k, n)."""
        return residual_vectors(self.values, self.vectors, self.images)


def residual_vectors(values: Tensor, vectors: Tensor, images: Tensor) -> Tensor:
    """``H v - theta v`` (k, n) of rows ``vectors`` (k, n) with their images, for float64 ``values`` (k,)."""
    return images - values.to(vectors)[:, None] * vectors


def rayleigh_ritz(
    vectors: Tensor,
    images: Tensor,
    *,
    next_eigenvalue: float | None,
    scale: float,
    tol: float,
    num_matvecs: int,
    num_products: int,
    missed_bound: MissedEigenvalueBound | None = None,
) -> RitzPairs:
    """The Ritz pairs of the span of orthonormal rows ``vectors``, given their true products ``images``.

    The bound on ``|lambda_i - theta_i|`` is that of ``ritz_bounds`` from the residuals and ``next_eigenvalue``, widened
    by the rounding error of a product, ``ROUNDING * eps * scale``. ``top_eigenpairs`` makes intervals of the bounds.
    """
    projected = inner(vectors, images)
    require_symmetric(projected, scale, vectors.dtype)
    values, rotation = descending(projected)
    vectors, images = combine(rotation.T, vectors), combine(rotation.T, images)
    residuals = residual_vectors(values, vectors, images)
    floor = rounding_error(scale, vectors.dtype)
    bounds = ritz_bounds(values, inner(residuals, residuals), next_eigenvalue) + floor
    return RitzPairs(
        values=values,
        vectors=vectors,
        images=images,
        residuals=norms(residuals),
        bounds=bounds,
        converged=within_tolerance(bounds, values, floor, tol),
        next_eigenvalue=next_eigenvalue,
        scale=scale,
        num_matvecs=num_matvecs,
        num_products=num_products,
        missed_bound=missed_bound,
    )


# Largest bound of an eigenvalue that counts as zero, in rounding errors. Zeros have no gap, so their bound is ``||R||``
# of all k pairs, and a converged larger pair can have a residual of a few rounding errors. With 2 instead of 4, six of
# 1,440 operators of rank 1 to 3 had zeros that were not reported as converged.
ZERO = 4


def within_tolerance(bounds: Tensor, values: Tensor, floor: float, tol: float) -> Tensor:
    """Which bounds are at most ``tol |theta|``, or belong to an eigenvalue that is zero to rounding, ``floor``.

    An eigenvalue whose interval holds zero and is as narrow as rounding allows is zero, to rounding.
    """
    return (bounds <= tol * values.abs()) | ((bounds <= ZERO * floor) & (values.abs() <= bounds))


def may_stop(bounds: Tensor, values: Tensor, floor: float, tol: float) -> Tensor:
    """Which bounds, rounding not yet included, let a solver stop: ``bound + floor <= tol |theta|`` or ``<= floor``."""
    return (bounds + floor <= tol * values.abs()) | (bounds <= floor)


def largest_relative(bounds: Tensor, values: Tensor, floor: float, tol: float) -> float:
    """The largest ``bound / |theta|``, to show; what is zero to rounding counts as ``floor / tol``."""
    return float((bounds / values.abs().clamp_min(floor / tol)).max()) if floor else 0.0


def descending(projected: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors (columns) of a small symmetric float64 matrix."""
    if not bool(torch.isfinite(projected).all()):
        raise ArgumentError("Products must be finite, got NaN or infinity. Look for overflow, or lift the dtype.")
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return values.flip(0), vectors.flip(1)


def ritz_bounds(ritz_values: Tensor, residual_gram: Tensor, next_eigenvalue: float | None) -> Tensor:
    """``e_i`` (k,) with ``theta_i <= lambda_i <= theta_i + e_i``, in exact arithmetic.

    The lower end is Cauchy's: no Ritz value exceeds its eigenvalue. The interval that is returned to the user is
    ``theta_i -/+ e_i`` with rounding, so that it stays valid for a value that stands in for another eigenvalue.

    For lambda_1 alone (k = 1), with the residual ``r = H v - theta v`` and an estimate rho of lambda_2 from above,
    ``e_1`` is the smaller of ``||r||`` and, if rho < theta, ``||r||^2 / (theta - rho)`` (Kato 1949; Temple 1928).

    For k pairs, the leading s = i, ..., k pairs each give a bound on ``lambda_i``, with the residuals
    ``R = H V - V Theta`` of these s pairs and an estimate rho of ``lambda_{s+1}`` from above. ``e_i`` is the smallest.

    - With a gap, rho < theta_s: ``lambda_i <= rho + tau_i``, tau the eigenvalues of ``D + D^-1/2 R'R D^-1/2``,
      ``D = Theta - rho`` (Lehmann 1949; Parlett 1998, ch. 10).
    - Without one: ``lambda_i <= max(theta_i, rho) + ||R||`` (Weyl); for s = k, ``theta_i + ||R||``.

    rho is ``theta_{s+1} + ||r_{s+1}||`` for s < k, and ``next_eigenvalue`` for s = k.

    Args:
        ritz_values: descending, float64 (k,).
        residual_gram: ``R' R`` (k, k), float64.
        next_eigenvalue: an estimate of ``lambda_{k+1}`` from above: a Ritz value plus its residual, of H or, with the
            guided solver, of the operator that guides it. -inf if k is the order of H, where the pairs are exact. None
            if there is no estimate: gaps are then not used.

    ``lambda_{s+1}`` within the k is taken to be at most the Ritz value and its residual. The bounds presume that the k
    pairs stand for the k largest eigenvalues: no residual can prove that.
    """
    k = len(ritz_values)
    lengths = residual_gram.diagonal().clamp_min(0).sqrt()
    last = float("-inf") if next_eigenvalue is None else next_eigenvalue
    rhos = torch.cat([ritz_values[1:] + lengths[1:], torch.tensor([last], dtype=torch.float64)])
    bounds = torch.full((k,), float("inf"), dtype=torch.float64)
    for s in range(1, k + 1):
        gram, gaps = residual_gram[:s, :s], ritz_values[:s] - rhos[s - 1]  # gaps: D of the docstring
        size = torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()
        # max(theta_i, rho) + ||R|| - theta_i
        candidate = size + (-gaps).clamp_min(0) if s < k else size.expand(k)
        if next_eigenvalue is not None and 0 < float(gaps[-1]) < float("inf"):
            scale = gaps.rsqrt()
            # rho + tau_i - theta_i
            shifted = torch.linalg.eigvalsh(torch.diag(gaps) + scale[:, None] * gram * scale).flip(0) - gaps
            candidate = candidate.minimum(shifted.clamp_min(0))
        elif next_eigenvalue == float("-inf") and s == k:
            candidate = torch.zeros_like(candidate)
        bounds[:s] = bounds[:s].minimum(candidate)
    return bounds
