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

    For the leading s Ritz pairs with residuals ``R_s = H V_s - V_s Theta_s``, s >= i, and with the rest of the
    spectrum at most ``mu_s < theta_i``: ``e_i = min(||R_i||, 2 ||R_s||^2 / (g + sqrt(g^2 + 4 ||R_s||^2)))`` with
    ``g = theta_i - mu_s`` (Li and Li 2005, the quadratic bound of Kato and Temple for a cluster), the least over s.

    Args:
        ritz_values: descending, float64 (k,).
        residual_gram: ``R' R`` (k, k), R the residual vectors.
        next_above: an estimate from above of ``lambda_{k+1}`` (a Ritz value and its residual), -inf where there is none
            left; None uses ``||R_i||`` alone.

    The bounds presume that the k pairs stand for the k largest eigenvalues: no residual can prove that.
    """
    k = len(ritz_values)
    spectral = torch.stack(
        [torch.linalg.eigvalsh(residual_gram[:s, :s])[-1].clamp_min(0).sqrt() for s in range(1, k + 1)]
    )
    if next_above is None:
        return spectral
    own = residual_gram.diagonal().clamp_min(0).sqrt()
    rest = torch.cat([ritz_values[1:] + own[1:], torch.tensor([next_above], dtype=torch.float64)])
    bounds = spectral.clone()
    for i in range(k):
        for s in range(i, k):
            gap = float(ritz_values[i] - rest[s])
            size = float(spectral[s])
            if gap > SEPARATION * size:
                quadratic = 2 * size * (size / (gap + math.hypot(gap, 2 * size)))
                bounds[i] = min(float(bounds[i]), quadratic)
    return bounds
