"""Rayleigh-Ritz pairs from true products, with bounds on their errors: every solver ends here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.missed_eigenvalue_bound import RandomStart
from sharpscope.linalg.vectors import combine, inner, norms

# H times a block of vectors. Inside of this package a block is rows (b, n), and so is the product: a new contiguous
# tensor of the same dtype and device; the argument stays as it was. At the public boundary both are columns (n, b).
Matmat = Callable[[Tensor], Tensor]
SolverProgress = Callable[[int, float], None]


@dataclass(frozen=True)
class RitzPairs:
    """Descending Ritz values (k,) and orthonormal vectors as rows (k, n), with bounds on the values' errors.

    Attributes:
        images: (k, n) the true products of the vectors; ``residuals`` (k,) are ``||H v - theta v||``.
        bounds: (k,) ``|lambda_i - theta_i|`` is at most this, by ``ritz_bounds`` and with rounding.
        next_above: the estimate from above of ``lambda_{k+1}`` that the bounds use, None where they use none.
        scale: the norm of H as far as it is known, to which rounding is relative.
        num_matvecs, num_products: products with one vector, and with a block.
        start: what the solver's random vectors say of eigenvalues that were missed, None where they say nothing.
    """

    values: Tensor
    vectors: Tensor
    images: Tensor
    residuals: Tensor
    bounds: Tensor
    converged: Tensor
    next_above: float | None
    scale: float
    num_matvecs: int
    num_products: int
    start: RandomStart | None = None

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
    next_above: float | None,
    scale: float,
    tol: float,
    num_matvecs: int,
    num_products: int,
    start: RandomStart | None = None,
) -> RitzPairs:
    """The Ritz pairs of the span of orthonormal rows ``vectors``, given their true products ``images``.

    Every solver ends here; ``two_ends`` joins the pairs of two solves, and bounds them anew in the same way. The bound
    on ``|lambda_i - theta_i|`` is that of ``ritz_bounds`` from the residuals and ``next_above``, widened by the
    rounding of a product, ``ROUNDING * eps * scale``.
    """
    projected = inner(vectors, images)
    require_symmetric(projected, scale, vectors.dtype)
    values, rotation = descending(projected)
    vectors, images = combine(rotation.T, vectors), combine(rotation.T, images)
    residuals = residual_vectors(values, vectors, images)
    floor = rounding(scale, vectors.dtype)
    bounds = ritz_bounds(values, inner(residuals, residuals), next_above) + floor
    return RitzPairs(
        values=values,
        vectors=vectors,
        images=images,
        residuals=norms(residuals),
        bounds=bounds,
        converged=within_tolerance(bounds, values, floor, tol),
        next_above=next_above,
        scale=scale,
        num_matvecs=num_matvecs,
        num_products=num_products,
        start=start,
    )


def within_tolerance(bounds: Tensor, values: Tensor, floor: float, tol: float) -> Tensor:
    """Which bounds are at most ``tol |theta|``, or belong to an eigenvalue that is zero to rounding, ``floor``.

    An eigenvalue whose interval holds zero and is as narrow as rounding allows is zero, to rounding.
    """
    return (bounds <= tol * values.abs()) | ((bounds <= 2 * floor) & (values.abs() <= bounds))


def meets(bounds: Tensor, values: Tensor, floor: float, tol: float) -> Tensor:
    """Which bounds, without rounding yet, let a solver stop: within ``tol |theta|`` with it, or below it, ``floor``."""
    return (bounds + floor <= tol * values.abs()) | (bounds <= floor)


def rounding(scale: float, dtype: torch.dtype) -> float:
    """What rounding alone does to an eigenvalue of an operator of norm ``scale``."""
    return ROUNDING * torch.finfo(dtype).eps * scale


def largest_relative(bounds: Tensor, values: Tensor, floor: float, tol: float) -> float:
    """The largest ``bound / |theta|``, to show; what is zero to rounding counts as ``floor / tol``."""
    return float((bounds / values.abs().clamp_min(floor / tol)).max()) if floor else 0.0


def descending(projected: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors (columns) of a small symmetric float64 matrix."""
    if not bool(torch.isfinite(projected).all()):
        raise ArgumentError("Products must be finite, got NaN or infinity. Look for overflow, or lift the dtype.")
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return values.flip(0), vectors.flip(1)


def require_symmetric(projected: Tensor, scale: float, dtype: torch.dtype) -> None:
    """Raise ArgumentError when ``v_i' H v_j`` is not symmetric beyond what rounding explains."""
    require_little_apart(float((projected - projected.T).abs().max()), scale, dtype)


def require_little_apart(apart: float, scale: float, dtype: torch.dtype) -> None:
    """Raise ArgumentError when v'Hu and u'Hv are ``apart`` by more than rounding explains at a norm of ``scale``."""
    if apart > 10 * torch.finfo(dtype).eps ** 0.5 * scale:
        raise ArgumentError(
            f"H must be symmetric, but v'Hu and u'Hv differ by {apart:.2g} at a norm of {scale:.2g}. "
            "Check what makes products change from call to call; where H is much smaller than what it is summed from, "
            "lift the computation to float64."
        )


# Rounding of a product with a vector, in units of eps times the operator's norm: what no residual can undercut.
ROUNDING = 32.0


def ritz_bounds(ritz_values: Tensor, residual_gram: Tensor, next_above: float | None) -> Tensor:
    """``e_i`` (k,) with ``|lambda_i - theta_i| <= e_i``, in exact arithmetic.

    No Ritz value exceeds its eigenvalue (Cauchy), so what is bounded is how far it lies below. Each s from i to k gives
    a bound from the leading s pairs, with residuals ``R = H V - V Theta`` and an estimate rho from above of
    ``lambda_{s+1}``; the smallest is returned.

    - With a gap, rho < theta_s: ``lambda_i <= rho + tau_i``, tau the eigenvalues of ``D + D^-1/2 R'R D^-1/2``,
      ``D = Theta - rho`` (Lehmann 1949; Parlett 1998, ch. 10). For one pair that is Kato's and Temple's
      ``||r||^2 / (theta - rho)``.
    - Without one: ``lambda_i <= max(theta_i, rho) + ||R||`` (Weyl); for s = k, ``theta_i + ||R||``.

    rho is ``theta_{s+1} + ||r_{s+1}||`` for s < k, and ``next_above`` for s = k.

    Args:
        ritz_values: descending, float64 (k,).
        residual_gram: ``R' R`` (k, k), R the residual vectors.
        next_above: an estimate from above of ``lambda_{k+1}`` (a Ritz value and its residual), -inf where there is none
            left; None where there is no estimate: then gaps are not used.

    ``lambda_{s+1}`` within the k is taken to be at most the Ritz value and its residual. The bounds presume that the k
    pairs stand for the k largest eigenvalues: no residual can prove that.
    """
    k = len(ritz_values)
    lengths = residual_gram.diagonal().clamp_min(0).sqrt()
    last = float("-inf") if next_above is None else next_above
    rhos = torch.cat([ritz_values[1:] + lengths[1:], torch.tensor([last], dtype=torch.float64)])
    bounds = torch.full((k,), float("inf"), dtype=torch.float64)
    for s in range(1, k + 1):
        gram, gaps = residual_gram[:s, :s], ritz_values[:s] - rhos[s - 1]  # the gaps are D
        size = torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt()
        found = size + (-gaps).clamp_min(0) if s < k else size.expand(k)
        if next_above is not None and 0 < float(gaps[-1]) < float("inf"):
            scale = gaps.rsqrt()
            # rho + tau_i - theta_i
            moved = torch.linalg.eigvalsh(torch.diag(gaps) + scale[:, None] * gram * scale).flip(0) - gaps
            found = found.minimum(moved.clamp_min(0))
        elif next_above == float("-inf") and s == k:
            found = torch.zeros_like(found)
        bounds[:s] = bounds[:s].minimum(found)
    return bounds
