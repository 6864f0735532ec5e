"""Block Lanczos with full reorthogonalisation and thick restart."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.missed_eigenvalue_bound import random_start
from sharpscope.linalg.ritz import (
    Matmat,
    RitzPairs,
    SolverProgress,
    descending,
    largest_relative,
    meets,
    rayleigh_ritz,
    require_symmetric,
    ritz_bounds,
    rounding,
)
from sharpscope.linalg.vectors import BREAKDOWN, combine, norms, orthonormalise, project_out, random_rows

# Verifications by true products that may fail before the operator's noise is taken for what it is.
VERIFICATIONS = 3

# Steps in a row at which the bounds must meet the tolerance. One is not enough: after few steps a copy of a multiple
# eigenvalue may not have shown yet (1 in 50 random spectra of order 13 with a triple eigenvalue at tol 1e-2).
CONFIRMED = 2

# Products with a block after which it gives up, unless told otherwise.
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
    most = PRODUCTS if max_products is None else max_products
    rows = random_rows(width, like, generator)
    if initial is not None:
        rows = torch.cat([initial, rows])[:width]
    block, _ = orthonormalise(rows, like, 0.0, generator)
    krylov = _Krylov(matmat, generator, like.new_empty(limit, n), block)
    inner_tol, streak, failures, restarted, start = tol, 0, 0, False, None
    while True:
        krylov.expand()
        ritz = krylov.ritz(k)
        floor = rounding(krylov.scale, like.dtype)
        if initial is None and not restarted:
            start = random_start(ritz.rotation[:width, k:].T, ritz.values, ritz.residuals.T @ ritz.residuals, k, n)
        if progress is not None:
            progress(krylov.products, largest_relative(ritz.bounds, ritz.values[:k], floor, tol))
        streak = streak + 1 if ritz.met(inner_tol, floor, ignore_below) else 0
        if streak >= CONFIRMED or krylov.size == n or krylov.products + 1 >= most:
            pairs = krylov.verified(ritz, tol)
            failures += 1
            exhausted = krylov.size == n or krylov.products >= most
            at_rounding = bool((ritz.bounds <= floor).all())
            settled = bool((pairs.converged | (pairs.values + pairs.bounds < ignore_below)).all())
            if settled or exhausted or at_rounding or failures == VERIFICATIONS:
                return replace(pairs, start=start)
            inner_tol /= 10
        if krylov.size + len(krylov.block) > limit:
            restarted = True  # the vectors dropped took some of the random start with them
            krylov.restart(ritz, max(k + 1, (limit - width) // 2))


@dataclass(frozen=True)
class _Ritz:
    """All m Ritz values of a basis, descending, with what is known of them before any product with a Ritz vector.

    ``rotation`` (m, m): the Ritz vectors' coordinates in the basis, as columns; ``residuals`` (b, m): those of
    ``H y - theta y`` in the next block; ``bounds`` (k,): on the errors of the k leading values, ``next_above`` an
    estimate from above of the (k+1)-th eigenvalue.
    """

    values: Tensor
    rotation: Tensor
    residuals: Tensor
    bounds: Tensor
    next_above: float

    def met(self, tol: float, floor: float, ignore_below: float) -> bool:
        """Whether every bound is within the relative tolerance or at rounding, or shows an eigenvalue to ignore."""
        leading, bounds = self.values[: len(self.bounds)], self.bounds
        return bool((meets(bounds, leading, floor, tol) | (leading + bounds + floor < ignore_below)).all())


@dataclass
class _Krylov:
    """The state of the iteration, ``H Q = Q T + P S`` with vectors as columns here and as rows in the fields.

    Attributes:
        basis: (limit, n), its first ``size`` rows are the orthonormal Q.
        block: P (b, n), orthonormal, orthogonal to Q: what is multiplied next.
        projected: T (size, size), float64, from the products themselves and not from a recurrence.
        coupling: S (b, size), float64; only the columns of the last block multiplied are not zero.
        scale: the norm of H as far as it is known.
        products, matvecs: with a block, and with one vector.
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
        """H times some rows, counted."""
        self.products, self.matvecs = self.products + 1, self.matvecs + len(rows)
        return self.matmat(rows)

    def expand(self) -> None:
        """Take the block into the basis; the remainder of its product, orthonormalised, is the next block."""
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
        next_above = float(values[k] + residuals[:, k].norm()) if self.size > k else float("-inf")
        bounds = ritz_bounds(values[:k], residuals[:, :k].T @ residuals[:, :k], next_above)
        return _Ritz(values, rotation, residuals, bounds, next_above)

    def ritz_vectors(self, ritz: _Ritz, count: int) -> Tensor:
        """The leading Ritz vectors (count, n)."""
        # A copy of the coordinates, not a view: the layout decides how BLAS rounds.
        return combine(ritz.rotation[:, torch.arange(count)].T, self.basis[: self.size])

    def verified(self, ritz: _Ritz, tol: float) -> RitzPairs:
        """The leading pairs from a true product with their vectors, converged only if the recurrence agrees."""
        k = len(ritz.bounds)
        rows = self.ritz_vectors(ritz, k)
        # Restarts wear the basis down by some eps each, which a Rayleigh quotient would feel twice.
        vectors, _ = orthonormalise(rows, rows[:0], 0.0, self.generator)
        images = self.product(vectors)
        pairs = rayleigh_ritz(
            vectors,
            images,
            next_above=ritz.next_above,
            scale=self.scale,
            tol=tol,
            num_matvecs=self.matvecs,
            num_products=self.products,
        )
        # A fixed operator gives the same values again; one that changes betrays itself here. The recurrence's values
        # carry the rounding of all its steps and restarts (seen: 1.2 times that of one product after 37).
        slack = 8 * rounding(self.scale, vectors.dtype)
        same = (pairs.values - ritz.values[:k]).abs() <= ritz.bounds + pairs.bounds + slack
        return replace(pairs, converged=pairs.converged & same)

    def restart(self, ritz: _Ritz, count: int) -> None:
        """Keep the ``count`` leading Ritz vectors as the basis; the next block is orthogonal to them already."""
        self.basis[:count] = self.ritz_vectors(ritz, count)
        self.projected, self.size = torch.diag(ritz.values[:count]), count


def _basis_limit(n: int, k: int, max_basis: int | None) -> int:
    """The number of basis vectors at which to restart.

    Six blocks by default, of which half are kept: more costs memory, fewer costs products.
    """
    width = min(k + 1, n)
    limit = min(n, 6 * width if max_basis is None else max_basis)
    least = min(n, 2 * width + k)
    if limit < least:
        raise ArgumentError(f"max_basis must be at least {least} for k = {k} (two blocks and {k}), got {max_basis}.")
    return limit
