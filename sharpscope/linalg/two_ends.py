"""Both ends of a spectrum from two solves, one for the largest eigenvalues of H and one for those of -H."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import RitzPairs, SolverProgress, rayleigh_ritz, ritz_bounds, rounding, within_tolerance
from sharpscope.linalg.vectors import combine, inner

# The second solve leaves what is this much smaller than the first's pairs. Early on its bounds may hold for a smaller
# eigenvalue than the one sought: with 1.0 3 of 120 random operators did not converge, with 0.5 one, as without it.
NEGLIGIBLE = 0.5

# solve(sign, max_products, progress, ignore_below): the k largest eigenpairs of ``sign * H`` in at most so many
# products; those below the last argument need not be accurate.
Solve = Callable[[float, int | None, SolverProgress | None, float], RitzPairs]


def two_ends(
    solve: Solve, k: int, which: str, tol: float, max_products: int | None, progress: SolverProgress | None
) -> RitzPairs:
    """The k largest and the k smallest pairs, descending ("both"), or the k largest by ``|lambda|`` ("magnitude").

    The second solve has the products that the first left of ``max_products``, at least half of them. For "magnitude" it
    refines nothing that is smaller than half of all k pairs of the first.
    """
    top = solve(1.0, None if max_products is None else max_products // 2, progress, float("-inf"))
    done = top.num_products
    later = None if progress is None else (lambda products, worst: progress(done + products, worst))
    least = NEGLIGIBLE * float(top.values[-1]) if which == "magnitude" else float("-inf")
    bottom = solve(-1.0, None if max_products is None else max_products - done, later, least)
    if which == "both":
        return joined(top, bottom, tol)
    first, last = shares(top.values, bottom.values, k)
    # The largest magnitude that either end still allows for a pair that was not chosen.
    rivals = [float(end.values[i] + end.bounds[i]) for end, i in ((top, first), (bottom, last)) if i < k]
    pairs = joined(leading(top, first), leading(bottom, last), tol)
    size = pairs.values.abs()
    # Rounding once for the pair's own value and once for its rivals', whose bounds hold it: no zero displaces a zero.
    displaced = size * (1 + tol) + 2 * rounding(pairs.scale, pairs.vectors.dtype) < max(rivals)
    order = torch.argsort(size, descending=True, stable=True)
    return _in_order(replace(pairs, converged=pairs.converged & ~displaced), order)


def shares(top: Tensor, bottom: Tensor, k: int) -> tuple[int, int]:
    """How many of the k values of largest magnitude are at each end: of H and of -H, both descending.

    Of +a and -a the positive one comes first. No value is counted at both ends, since one of its two is not positive.
    """
    first = last = 0
    for _ in range(k):
        if last >= len(bottom) or (first < len(top) and bool(top[first] >= bottom[last])):
            first += 1
        else:
            last += 1
    return first, last


def leading(pairs: RitzPairs, count: int) -> RitzPairs:
    """The first ``count`` of some pairs; the next one bounds the gap."""
    if count == len(pairs.values):
        return pairs
    next_above = None if pairs.next_above is None else float(pairs.values[count] + pairs.residuals[count])
    return replace(_in_order(pairs, torch.arange(count)), next_above=next_above)


def joined(top: RitzPairs, bottom: RitzPairs, tol: float) -> RitzPairs:
    """Rayleigh-Ritz on the vectors of H's largest pairs and of -H's, without a further product; descending.

    Vectors of one solve overlap those of the other by residual over distance, and by anything within an eigenspace
    that both ends share. Orthogonalising them magnifies the rounding of their products by ``||L^-1||``.
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
        next_above=None,
        scale=max(top.scale, bottom.scale) * float(torch.linalg.matrix_norm(inverse, 2)),
        tol=tol,
        num_matvecs=top.num_matvecs + bottom.num_matvecs,
        num_products=top.num_products + bottom.num_products,
    )
    values, count = pairs.values, len(top.values)
    gram, floor = inner(rest := pairs.residual_vectors(), rest), rounding(pairs.scale, vectors.dtype)
    above = ritz_bounds(values[:count], gram[:count, :count], top.next_above)
    below = ritz_bounds(-values[count:].flip(0), gram[count:, count:].flip(0, 1), bottom.next_above)
    # The solves' own bounds hold for the moved values too; they are the better ones where a cluster was cut in two.
    moved = (values - torch.cat([top.values, -bottom.values.flip(0)])).abs()
    own = torch.cat([top.bounds, bottom.bounds.flip(0)]) + moved
    bounds = torch.minimum(torch.cat([above, below.flip(0)]) + floor, own)
    converged = torch.cat([top.converged, bottom.converged.flip(0)]) & within_tolerance(bounds, values, floor, tol)
    return replace(pairs, bounds=bounds, converged=converged)


def _in_order(pairs: RitzPairs, order: Tensor) -> RitzPairs:
    """The pairs that ``order`` names, in its order."""
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
