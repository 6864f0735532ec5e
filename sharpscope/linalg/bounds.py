"""How far Ritz values can be from the eigenvalues that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

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
