"""Block Lanczos with full reorthogonalisation and thick restart."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ends import End, joined, ranked, rival, wanted_ends
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
from sharpscope.linalg.missed_eigenvalue_bound import random_start
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
    which: str = "largest",
    initial: Tensor | None = None,
) -> RitzPairs:
    """The k largest eigenpairs by block Lanczos (Golub and Underwood 1977) with thick restart (Wu and Simon 2000).

    The block has k + 1 random vectors, so that an eigenvalue of multiplicity up to k is found with it, and one more.
    The projected matrix is computed from the products themselves, not from a recurrence, in float64; the state is
    ``H Q = Q T + P S`` with Q the basis, P the next block. Cost: k + 1 products a step; the last step is a product
    with the k Ritz vectors, from which residuals and bounds come.

    Args: as ``top_eigenpairs``; ``like`` (0, n) carries n, dtype and device. ``which`` is "largest", "both" (2k pairs,
        descending) or "magnitude" (by ``|lambda|``): one Krylov space serves both ends, and a restart keeps both.
        ``initial``: rows (b, n) to start from; random ones fill the block.
    """
    n, dtype = like.shape[1], like.dtype
    width = min(k + 1, n)
    ends_kept, pairs_wanted = (1, k) if which == "largest" else (2, 2 * k)
    # Six blocks before a restart, of which half are kept: more costs memory, fewer costs products. Nine for two ends.
    limit = min(n, 3 * (ends_kept + 1) * width) if max_basis is None else min(n, max_basis)
    if limit < min(n, 2 * width + pairs_wanted):
        least = min(n, 2 * width + pairs_wanted)
        raise ArgumentError(
            f"max_basis must be at least {least} for k = {k} (two blocks and {pairs_wanted}), got {max_basis}."
        )
    most = PRODUCTS if max_products is None else max_products
    basis = torch.empty(limit, n, dtype=dtype, device=like.device)
    size, scale, products, matvecs, failures, streak, restarted = 0, 0.0, 0, 0, 0, 0, False
    projected = torch.zeros(0, 0, dtype=torch.float64)
    rows = random_rows(width, like, generator)
    if initial is not None:
        rows = torch.cat([initial, rows])[:width]
    block, _ = orthonormalise(rows, like, 0.0, generator)
    inner_tol, start = tol, None
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
        ends = wanted_ends(values, residuals, k, which)
        if which == "largest" and initial is None and not restarted:
            start = random_start(rotation[:width, k:].T, values, residuals.T @ residuals, k, n)
        chosen, bounds = torch.cat([end.values for end in ends]), torch.cat([end.bounds for end in ends])
        if progress is not None:
            progress(products, largest_relative(bounds, chosen, floor, tol))
        met = (bounds + floor <= inner_tol * chosen.abs()) | (bounds <= floor)
        most_missed = rival(values, residuals, ends, k) if which == "magnitude" else float("-inf")
        enough = size >= len(chosen)  # else the two ends share Ritz pairs
        settled = enough and most_missed <= float(chosen.abs().min()) * (1 + tol) + floor
        streak = streak + 1 if settled and bool(met.all()) else 0
        if streak >= CONFIRMED or size == n or products + 1 >= most:
            # Restarts wear the basis down by some eps each, which a Rayleigh quotient would feel twice.
            ritz = [combine(rotation[:, end.columns].T, basis[:size]) for end in ends]
            vectors = torch.cat([orthonormalise(rows, like, 0.0, generator)[0] for rows in ritz])
            products, matvecs = products + 1, matvecs + len(vectors)
            pairs = _verified(vectors, matmat(vectors), ends, which, scale, tol, matvecs, products)
            pairs = ranked(pairs, most_missed if enough else float("inf"), tol, floor)
            failures += 1
            stuck = (settled and bool((bounds <= floor).all())) or failures == VERIFICATIONS
            if bool(pairs.converged.all()) or size == n or stuck or products >= most:
                return replace(pairs, start=start)
            inner_tol /= 10
        if size + len(block) > limit:
            restarted = True  # what is let go took part of the random start with it
            kept = _kept(size, max(pairs_wanted + ends_kept, (limit - width) // 2), ends_kept)
            basis[: len(kept)] = combine(rotation[:, kept].T, basis[:size])
            projected, size = torch.diag(values[kept]), len(kept)
            coupling = residuals[:, kept]


def _verified(
    vectors: Tensor,
    images: Tensor,
    ends: list[End],
    which: str,
    scale: float,
    tol: float,
    num_matvecs: int,
    num_products: int,
) -> RitzPairs:
    """The pairs of every end from true products, held against what the recurrence said of them."""
    parts, start = [], 0
    for end in ends:
        own = slice(start, start + len(end.values))
        start = own.stop
        pairs = rayleigh_ritz(
            vectors[own],
            end.sign * images[own],
            next_above=end.next_above,
            scale=scale,
            tol=tol,
            num_matvecs=num_matvecs,
            num_products=num_products,
        )
        # A fixed operator gives the same values again; one that changes betrays itself here. The recurrence's values
        # carry the rounding of all its steps and restarts (seen: 1.2 times that of one product after 37).
        slack = 8 * rounding(scale, vectors.dtype)
        same = (pairs.values - end.values).abs() <= end.bounds + pairs.bounds + slack
        parts.append((end.sign, replace(pairs, converged=pairs.converged & same)))
    return joined(parts, which)


def _kept(size: int, count: int, ends: int) -> Tensor:
    """Which of ``size`` descending Ritz values outlive a restart: the ``count`` at the first end, or half at each."""
    first = count if ends == 1 else (count + 1) // 2
    return torch.cat([torch.arange(first), torch.arange(size - (count - first), size)])
