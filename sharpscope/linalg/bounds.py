"""How far Ritz values can be from the eigenvalues that they stand for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Rounding of a product with a vector, in units of eps times the operator's norm: what no residual can undercut.
ROUNDING = 32.0

# The gap is itself an estimate, from the next Ritz value; where it is not this many times the residual it is not
# trusted. (Seen at tol = 0.1 without this: 4 intervals of 3,200 missed their eigenvalue.)
SEPARATION = 4.0


def ritz_bounds(ritz_values: Tensor, residual_gram: Tensor, next_above: float | None) -> Tensor:
    """``e_i`` (k,) with ``|lambda_i - theta_i| <= e_i``, in exact arithmetic.

    For Ritz pairs a to b, a <= i <= b, with residuals ``R = H V - V Theta`` and the rest of the spectrum at least g
    away from theta_i: ``e_i = 2 ||R||^2 / (g + sqrt(g^2 + 4 ||R||^2))`` (Li and Li 2005, the quadratic bound of Kato
    and Temple for a cluster), the least over all such clusters and ``||R_1..i||``. What is above a cluster is at least
    the Ritz value next to it (Cauchy), what is below at most the next Ritz value and its residual, or ``next_above``.

    Args:
        ritz_values: descending, float64 (k,).
        residual_gram: ``R' R`` (k, k), R the residual vectors.
        next_above: an estimate from above of ``lambda_{k+1}`` (a Ritz value and its residual), -inf where there is none
            left; None uses ``||R_i||`` alone.

    The bounds presume that the k pairs stand for the k largest eigenvalues: no residual can prove that.
    """
    k = len(ritz_values)
    leading = torch.stack(
        [torch.linalg.eigvalsh(residual_gram[:s, :s])[-1].clamp_min(0).sqrt() for s in range(1, k + 1)]
    )
    if next_above is None:
        return leading
    squares = residual_gram.diagonal().clamp_min(0)
    rest = torch.cat([ritz_values[1:] + squares[1:].sqrt(), torch.tensor([next_above], dtype=torch.float64)])
    below = ritz_values[:, None] - rest[None, :]
    bounds = leading.clone()
    for a in range(k):
        # ||R|| of pairs a to b (k - a,); Frobenius' norm, which needs no eigenvalues, where a > 0.
        size = squares[a:].cumsum(0).sqrt() if a else leading
        gap = below[a:, a:].triu().minimum(ritz_values[a - 1] - ritz_values[a:, None] if a else torch.tensor(math.inf))
        quadratic = 2 * size * (size / (gap + torch.hypot(gap, 2 * size)))
        quadratic = torch.where(gap > SEPARATION * size, quadratic, math.inf)
        bounds[a:] = torch.minimum(bounds[a:], quadratic.min(dim=1).values)
    return bounds
