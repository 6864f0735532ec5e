"""Block Lanczos with full reorthogonalisation and thick restart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.missed_eigenvalues import MissedEigenvalueBound
from sharpscope.linalg.ritz import (
    RitzPairs,
    SolverProgress,
    descending,
    largest_relative,
    may_stop,
    rayleigh_ritz,
    ritz_bounds,
)
from sharpscope.linalg.vectors_as_rows import (
    BREAKDOWN,
    Matmat,
    combine,
    norms,
    orthonormalise,
    project_out,
    random_rows,
    require_symmetric,
    rounding_error,
)

# Failed verifications by true products after which the solver accepts that noise in the operator limits the accuracy.
VERIFICATIONS = 3

# Consecutive steps at which the bounds must meet the tolerance. One is not enough: after few steps a copy of a multiple
# eigenvalue may still be missing (1 in 50 random spectra of order 13 with a triple eigenvalue at tol 1e-2).
CONFIRMED = 2

# Block products before the solver gives up, by default.
PRODUCTS = 100


def lanczos(
    matmat: Matmat,
    like: Tensor,
    k: int,
    *,
    tol: float,
    max_basis: int | None,
    max_products: int | None,
    generator: torch.Generator,
    progress: SolverProgress | None,
    initial: Tensor | None = None,
    ignore_below: float = float("-inf"),
) -> RitzPairs:
    """The k largest eigenpairs by block Lanczos (Golub and Underwood 1977) with thick restart (Wu and Simon 2000).

    The block has k + 1 random vectors, so that an eigenvalue of multiplicity up to k is found with it, and one more.
    Each step multiplies the block, takes Ritz pairs of the basis so far (``_Krylov``), and bounds their errors by
    ``ritz_bounds``. Once the bounds meet ``tol``, one product with the k Ritz vectors gives their true
    residuals, from which the bounds returned come. Cost: k + 1 products a step, k for the last.

    Args: as ``top_eigenpairs_rows``; ``initial``: rows (b, n) to start from; random ones fill the block.
        ``ignore_below``: a pair whose bound shows that its eigenvalue is below this need not meet ``tol``.
    """
    n = like.shape[1]
    width = min(k + 1, n)
    limit = _basis_limit(n, k, max_basis)
    limit_products = PRODUCTS if max_products is None else max_products
    rows = random_rows(width, like, generator)
    if initial is not None:
        rows = torch.cat([initial, rows])[:width]
    block, _ = orthonormalise(rows, like, 0.0, generator)
    krylov = _Krylov(matmat, generator, like.new_empty(limit, n), block)
    recurrence_tol, streak, failures, restarted, missed_bound = tol, 0, 0, False, None
    while True:
        krylov.expand()
        ritz = krylov.ritz(k)
        floor = rounding_error(krylov.scale, like.dtype)
        if initial is None and not restarted:
            missed_bound = MissedEigenvalueBound.from_ritz_pairs(
                ritz.rotation[:width, k:].T, ritz.values, ritz.residuals.T @ ritz.residuals, k, n
            )
        if progress is not None:
            progress(krylov.products, largest_relative(ritz.bounds, ritz.values[:k], floor, tol))
        streak = streak + 1 if ritz.meets_tolerance(recurrence_tol, floor, ignore_below) else 0
        if streak >= CONFIRMED or krylov.size == n or krylov.products + 1 >= limit_products:
            pairs = krylov.verified(ritz, tol)
            failures += 1
            exhausted = krylov.size == n or krylov.products >= limit_products
            at_rounding = bool((ritz.bounds <= floor).all())
            all_converged = bool((pairs.converged | (pairs.values + pairs.bounds < ignore_below)).all())
            if all_converged or exhausted or at_rounding or failures == VERIFICATIONS:
                return replace(pairs, missed_bound=missed_bound)
            recurrence_tol /= 10
        if krylov.size + len(krylov.block) > limit:
            restarted = True  # the basis no longer contains all of the random start
            krylov.restart(ritz, max(k + 1, (limit - width) // 2))


@dataclass(frozen=True)
class _Ritz:
    """All m Ritz values of a basis, descending, with error estimates from the recurrence.

    ``rotation`` (m, m): the Ritz vectors' coordinates in the basis, as columns; ``residuals`` (b, m): those of
    ``H y - theta y`` in the next block; ``bounds`` (k,): on the errors of the k largest values; ``next_eigenvalue``:
    an upper estimate of the (k+1)-th eigenvalue.
    """

    values: Tensor
    rotation: Tensor
    residuals: Tensor
    bounds: Tensor
    next_eigenvalue: float

    def meets_tolerance(self, tol: float, floor: float, ignore_below: float) -> bool:
        """Whether every bound is within the relative tolerance or at rounding, or shows an eigenvalue to ignore."""
        leading, bounds = self.values[: len(self.bounds)], self.bounds
        return bool((may_stop(bounds, leading, floor, tol) | (leading + bounds + floor < ignore_below)).all())


@dataclass
class _Krylov:
    """The state of the iteration, ``H Q = Q T + P S`` with vectors as columns here and as rows in the fields.

    Attributes:
        basis: (limit, n), its first ``size`` rows are the orthonormal Q.
        block: P (b, n), orthonormal and orthogonal to Q, multiplied in the next step.
        projected: T (size, size), float64, computed as inner products with the basis.
        coupling: S (b, size), float64; nonzero only in the columns of the last block.
        scale: the largest known norm of a product with H, to which rounding is relative.
        products, matvecs: numbers of products with a block, and with one vector.
    """

    matmat: Matmat
    generator: torch.Generator
    basis: Tensor
    block: Tensor
    size: int = 0
    projected: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    coupling: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    scale: float = 0.0
    products: int = 0
    matvecs: int = 0

    def product(self, rows: Tensor) -> Tensor:
        """Multiply rows by H and count the product."""
        self.products, self.matvecs = self.products + 1, self.matvecs + len(rows)
        return self.matmat(rows)

    def expand(self) -> None:
        """Append the block to the basis; its product, orthonormalised against the basis, is the next block."""
        image = self.product(self.block)
        dtype = image.dtype
        self.scale = max(self.scale, float(norms(image).max()))
        previous, self.size = self.size, self.size + len(self.block)
        self.basis[previous : self.size] = self.block
        basis = self.basis[: self.size]
        rest, coefficients = project_out(image, basis)
        require_symmetric(coefficients[previous:], self.scale, dtype)
        self.projected = torch.cat([torch.cat([self.projected, coefficients[:previous]], 1), coefficients.T], 0)
        breakdown = BREAKDOWN * torch.finfo(dtype).eps * self.scale
        self.block, factors = orthonormalise(rest, basis, breakdown, self.generator)
        self.coupling = torch.zeros(len(self.block), self.size, dtype=torch.float64)
        self.coupling[:, previous:] = factors

    def ritz(self, k: int) -> _Ritz:
        """The Ritz values of the basis, with bounds on the k largest."""
        values, rotation = descending(self.projected)
        residuals = self.coupling @ rotation
        self.scale = max(self.scale, float(values.abs().max()))
        next_eigenvalue = float(values[k] + residuals[:, k].norm()) if self.size > k else float("-inf")
        bounds = ritz_bounds(values[:k], residuals[:, :k].T @ residuals[:, :k], next_eigenvalue)
        return _Ritz(values, rotation, residuals, bounds, next_eigenvalue)

    def ritz_vectors(self, ritz: _Ritz, count: int) -> Tensor:
        """The Ritz vectors of the ``count`` largest values (count, n)."""
        # A copy of the coordinates, not a view: the layout decides how BLAS rounds.
        return combine(ritz.rotation[:, torch.arange(count)].T, self.basis[: self.size])

    def verified(self, ritz: _Ritz, tol: float) -> RitzPairs:
        """The k largest pairs from a true product with their vectors, converged only if the recurrence agrees."""
        k = len(ritz.bounds)
        rows = self.ritz_vectors(ritz, k)
        # Each restart loses some eps of orthogonality, which would enter the Rayleigh quotient twice.
        vectors, _ = orthonormalise(rows, rows[:0], 0.0, self.generator)
        images = self.product(vectors)
        pairs = rayleigh_ritz(
            vectors,
            images,
            next_eigenvalue=ritz.next_eigenvalue,
            scale=self.scale,
            tol=tol,
            num_matvecs=self.matvecs,
            num_products=self.products,
        )
        # If the operator is fixed, the values agree; if it changes from call to call, they do not. The recurrence's
        # values carry the rounding of all steps and restarts (measured: 1.2 times that of one product after 37).
        slack = 8 * rounding_error(self.scale, vectors.dtype)
        same = (pairs.values - ritz.values[:k]).abs() <= ritz.bounds + pairs.bounds + slack
        return replace(pairs, converged=pairs.converged & same)

    def restart(self, ritz: _Ritz, count: int) -> None:
        """Keep the ``count`` largest Ritz pairs as the basis; the next block is already orthogonal to them."""
        self.basis[:count] = self.ritz_vectors(ritz, count)
        self.projected, self.size = torch.diag(ritz.values[:count]), count


def _basis_limit(n: int, k: int, max_basis: int | None) -> int:
    """Return the number of basis vectors at which to restart. Default: six blocks; a restart keeps half of them."""
    width = min(k + 1, n)
    limit = min(n, 6 * width if max_basis is None else max_basis)
    least = min(n, 2 * width + k)
    if limit < least:
        raise ArgumentError(f"max_basis must be at least {least} for k = {k} (two blocks and {k}), got {max_basis}.")
    return limit
