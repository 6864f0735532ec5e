"""Eigenpairs at both ends of a spectrum from two solves, for the largest eigenvalues of H and of -H."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import RitzPairs, SolverProgress, rayleigh_ritz, ritz_bounds, within_tolerance
from sharpscope.linalg.symmetric_operator import rounding_error
from sharpscope.linalg.vectors import combine, inner

# The second solve does not refine pairs below this fraction of the first solve's smallest pair. Early bounds may belong
# to a smaller eigenvalue than intended: with 1.0, 3 of 120 random operators did not converge; with 0.5, 1, as without.
IGNORE_BELOW = 0.5

# solve(sign, max_products, progress, ignore_below) returns the k largest eigenpairs of ``sign * H``; pairs below
# ``ignore_below`` need not be accurate.
Solve = Callable[[float, int | None, SolverProgress | None, float], RitzPairs]


def both_ends(
    solve: Solve, k: int, which: str, tol: float, max_products: int | None, progress: SolverProgress | None
) -> RitzPairs:
    """The k largest and the k smallest pairs, descending ("both"), or the k largest by ``|lambda|`` ("magnitude").

    The first solve gets half of ``max_products``, the second what is left. For "magnitude" the second does not refine
    pairs smaller than half the first solve's smallest.
    """
    top = solve(1.0, None if max_products is None else max_products // 2, progress, float("-inf"))
    done = top.num_products
    later = None if progress is None else (lambda products, worst: progress(done + products, worst))
    least = IGNORE_BELOW * float(top.values[-1]) if which == "magnitude" else float("-inf")
    bottom = solve(-1.0, None if max_products is None else max_products - done, later, least)
    if which == "both":
        return merged(top, bottom, tol)
    first, last = split_by_magnitude(top.values, bottom.values, k)
    # The largest magnitude that the bounds allow for a pair that was not selected.
    rivals = [float(end.values[i] + end.bounds[i]) for end, i in ((top, first), (bottom, last)) if i < k]
    pairs = merged(first_pairs(top, first), first_pairs(bottom, last), tol)
    size = pairs.values.abs()
    # Two rounding errors, the pair's and its rival's: an eigenvalue that is zero to rounding displaces no other zero.
    displaced = size * (1 + tol) + 2 * rounding_error(pairs.scale, pairs.vectors.dtype) < max(rivals)
    order = torch.argsort(size, descending=True, stable=True)
    return _reordered(replace(pairs, converged=pairs.converged & ~displaced), order)


def split_by_magnitude(top: Tensor, bottom: Tensor, k: int) -> tuple[int, int]:
    """Split the k values of largest magnitude: how many are eigenvalues of H, and of -H, both descending.

    Of +a and -a the positive one comes first. No value is counted twice: it is positive in one list only.
    """
    first = last = 0
    for _ in range(k):
        if last >= len(bottom) or (first < len(top) and bool(top[first] >= bottom[last])):
            first += 1
        else:
            last += 1
    return first, last


def first_pairs(pairs: RitzPairs, count: int) -> RitzPairs:
    """The first ``count`` pairs; the next one becomes the estimate ``next_eigenvalue``."""
    if count == len(pairs.values):
        return pairs
    next_eigenvalue = None if pairs.next_eigenvalue is None else float(pairs.values[count] + pairs.residuals[count])
    return replace(_reordered(pairs, torch.arange(count)), next_eigenvalue=next_eigenvalue)


def merged(top: RitzPairs, bottom: RitzPairs, tol: float) -> RitzPairs:
    """Rayleigh-Ritz on the vectors of H's largest pairs and of -H's, without a further product; descending.

    The vectors of the two solves are not orthogonal to each other: they overlap by residual over distance, and
    arbitrarily within a common eigenspace. Orthogonalising them amplifies the rounding of the products by ``||L^-1||``.
    """
    vectors, images = torch.cat([top.vectors, bottom.vectors]), torch.cat([top.images, -bottom.images])
    factor, failed = torch.linalg.cholesky_ex(inner(vectors, vectors))
    if int(failed):
        raise ArgumentError(
            "The vectors of both ends must be independent, but those of one lie in the span of the other's. Raise "
            "max_products, or solve for each end by itself."
        )
    inverse = torch.linalg.inv(factor)
    pairs = rayleigh_ritz(
        combine(inverse, vectors),
        combine(inverse, images),
        next_eigenvalue=None,
        scale=max(top.scale, bottom.scale) * float(torch.linalg.matrix_norm(inverse, 2)),
        tol=tol,
        num_matvecs=top.num_matvecs + bottom.num_matvecs,
        num_products=top.num_products + bottom.num_products,
    )
    values, count = pairs.values, len(top.values)
    gram, floor = inner(rest := pairs.residual_vectors(), rest), rounding_error(pairs.scale, vectors.dtype)
    above = ritz_bounds(values[:count], gram[:count, :count], top.next_eigenvalue)
    below = ritz_bounds(-values[count:].flip(0), gram[count:, count:].flip(0, 1), bottom.next_eigenvalue)
    # The bounds of the two solves plus the shift hold too; they are smaller where a cluster was split between the ends.
    shift = (values - torch.cat([top.values, -bottom.values.flip(0)])).abs()
    own = torch.cat([top.bounds, bottom.bounds.flip(0)]) + shift
    bounds = torch.minimum(torch.cat([above, below.flip(0)]) + floor, own)
    converged = torch.cat([top.converged, bottom.converged.flip(0)]) & within_tolerance(bounds, values, floor, tol)
    return replace(pairs, bounds=bounds, converged=converged)


def _reordered(pairs: RitzPairs, order: Tensor) -> RitzPairs:
    """The pairs at the indices ``order``."""
    on_device = order.to(pairs.vectors.device)
    return replace(
        pairs,
        values=pairs.values[order],
        vectors=pairs.vectors[on_device],
        images=pairs.images[on_device],
        residuals=pairs.residuals[order],
        bounds=pairs.bounds[order],
        converged=pairs.converged[order],
    )
