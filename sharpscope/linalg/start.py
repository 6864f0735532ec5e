"""What random vectors that a solver started from, or carried along, say of eigenvalues that it missed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.special import betainc
from torch import Tensor

from sharpscope.linalg.vectors import inner

# Thresholds above t at which the bound is looked at, up to this many times beyond it: it falls with the eigenvalue in
# a Krylov space, and elsewhere nearly.
GRID = torch.logspace(0, 2, 33, dtype=torch.float64) - 1


@dataclass(frozen=True)
class RandomStart:
    """A search space W outside of the k vectors V found, in which lies the random subspace X it was started from.

    With ``P = I - V' V`` and ``A = P H P``, whose largest eigenvalue is at least ``lambda_{k+1}`` (Cauchy):
    ``A W = W S + R``.

    Attributes:
        values: the Ritz values (w,), S being diagonal.
        gram: ``R' R`` (w, w).
        coordinates: of an orthonormal basis of X in W, (w, s).
        order: n - k.
    """

    values: Tensor
    gram: Tensor
    coordinates: Tensor
    order: int

    def missed(self, above: float) -> float:
        """A bound on the probability of what was seen if H has a (k+1)-th eigenvalue above t.

        An eigenpair (mu, u) of A, u of length 1, has parts ``c = W'u`` in W and e outside with
        ``c (mu - S) = e'R``, so ``||X'u||^2 <= X' N (1 + N)^-1 X``, ``N = (mu - S)^-1 R'R (mu - S)^-1``. For X uniform
        in n - k dimensions ``||X'u||^2`` is Beta(s/2, (n - k - s)/2). In a Krylov space of one vector that is
        ``missed_probability``. 1 where t is not above every Ritz value.

        It takes V as given, though V came from the same run.
        """
        starts = self.coordinates.shape[1]
        if self.order <= 0 or not starts:
            return 0.0 if self.order <= 0 else 1.0
        reach = above - float(self.values.max())
        if not reach > 0:
            return 1.0
        most = max(self._component(above + reach * float(step)) for step in GRID)
        if most >= 1 or self.order <= starts:
            return 1.0
        return float(max(betainc(starts / 2, (self.order - starts) / 2, most), math.ulp(0.0)))

    def _component(self, mu: float) -> float:
        """The most that ``||X'u||^2`` can be for an eigenvalue mu."""
        shift = mu - self.values
        scaled = self.gram / shift[:, None] / shift[None, :]
        rest = torch.linalg.solve(torch.eye(len(shift), dtype=shift.dtype) + scaled, scaled @ self.coordinates)
        return float(torch.linalg.eigvalsh(self.coordinates.T @ rest)[-1])


def random_start(origin: Tensor, vectors: Tensor, values: Tensor, residuals: Tensor, k: int) -> RandomStart:
    """That of Ritz pairs (``vectors`` (q, n) and so on) whose span holds the random rows ``origin``."""
    coordinates = inner(vectors[k:], origin)
    return RandomStart(
        values=values[k:],
        gram=inner(residuals[k:], residuals[k:]),
        coordinates=torch.linalg.qr(coordinates)[0],
        order=vectors.shape[1] - k,
    )
