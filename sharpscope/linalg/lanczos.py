"""Block Lanczos with full reorthogonalisation and thick restart."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.bounds import ritz_bounds
from sharpscope.linalg.ritz import (
    Matmat,
    RitzPairs,
    SolverProgress,
    descending,
    largest_relative,
    rayleigh_ritz,
    require_symmetric,
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
) -> RitzPairs:
    """The k largest eigenpairs by block Lanczos (Golub and Underwood 1977) with thick restart (Wu and Simon 2000).

    The block has k + 1 random vectors, so that an eigenvalue of multiplicity up to k is found with it, and one more.
    The projected matrix is computed from the products themselves, not from a recurrence, in float64; the state is
    ``H Q = Q T + P S`` with Q the basis, P the next block. Cost: k + 1 products a step; the last step is a product
    with the k Ritz vectors, from which residuals and bounds come.

    Args: as ``top_eigenpairs``; ``like`` (0, n) carries n, dtype and device.
    """
    n, dtype = like.shape[1], like.dtype
    width = min(k + 1, n)
    # Six blocks before a restart, of which half are kept: more costs memory, fewer costs products.
    limit = min(n, 6 * width) if max_basis is None else min(n, max_basis)
    if limit < min(n, 2 * width + k):
        least = min(n, 2 * width + k)
        raise ArgumentError(f"max_basis must be at least {least} for k = {k} (two blocks and k), got {max_basis}.")
    most = PRODUCTS if max_products is None else max_products
    basis = torch.empty(limit, n, dtype=dtype, device=like.device)
    size, scale, products, matvecs, failures, streak = 0, 0.0, 0, 0, 0, 0
    projected = torch.zeros(0, 0, dtype=torch.float64)
    block, _ = orthonormalise(random_rows(width, like, generator), like, 0.0, generator)
    inner_tol = tol
    while True:
        image = matmat(block)
        products, matvecs = products + 1, matvecs + len(block)
        scale = max(scale, float(norms(image).max()))
        end = size + len(block)
        basis[size:end] = block
        rest, coefficients = project_out(image, basis[:end])
        require_symmetric(coefficients[size:], scale, dtype)
        projected = torch.cat([torch.cat([projected, coefficients[:size]], 1), coefficients.T], 0)
        previous, size = size, end
        block, factors = orthonormalise(rest, basis[:size], BREAKDOWN * torch.finfo(dtype).eps * scale, generator)
        coupling = torch.zeros(len(block), size, dtype=torch.float64)
        coupling[:, previous:] = factors

        values, rotation = descending(projected)
        scale = max(scale, float(values.abs().max()))
        floor = rounding(scale, dtype)
        residuals = coupling @ rotation
        rest_above = float(values[k] + residuals[:, k].norm()) if size > k else float("-inf")
        bounds = ritz_bounds(values[:k], residuals[:, :k].T @ residuals[:, :k], rest_above)
        if progress is not None:
            progress(products, largest_relative(bounds, values[:k], floor, tol))
        met = (bounds + floor <= inner_tol * values[:k].abs()) | (bounds <= floor)
        streak = streak + 1 if bool(met.all()) else 0
        if streak >= CONFIRMED or size == n or products + 1 >= most:
            vectors = combine(rotation[:, :k].T, basis[:size])
            products, matvecs = products + 1, matvecs + k
            pairs = rayleigh_ritz(
                vectors,
                matmat(vectors),
                next_above=rest_above,
                scale=scale,
                tol=tol,
                num_matvecs=matvecs,
                num_products=products,
            )
            # A fixed operator gives the same values again; one that changes betrays itself here.
            same = (pairs.values - values[:k]).abs() <= bounds + pairs.bounds
            pairs = replace(pairs, converged=pairs.converged & same)
            failures += 1
            stuck = bool((bounds <= floor).all()) or failures == VERIFICATIONS
            if bool(pairs.converged.all()) or size == n or stuck or products >= most:
                return pairs
            inner_tol /= 10
        if size + len(block) > limit:
            kept = max(k + 1, (limit - width) // 2)
            basis[:kept] = combine(rotation[:, :kept].T, basis[:size])
            projected, size = torch.diag(values[:kept]), kept
            coupling = residuals[:, :kept]
