"""What random vectors that a solver started from, or carried along, say of eigenvalues that it missed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import betainc
from torch import Tensor

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
        ``missed_probability``, but never less than of ``||X'u||^2`` = eps. 1 where t is not above every Ritz value.

        It takes V as given, though V came from the same run.
        """
        starts = self.coordinates.shape[1]
        if self.order <= 0 or not starts:
            return 0.0 if self.order <= 0 else 1.0
        reach = above - float(self.values.max())
        if not reach > 0:
            return 1.0
        # Below eps the differences that it is made of are rounding, of either sign.
        least = torch.finfo(torch.float64).eps
        most = max(least, *(self._component(above + reach * float(step)) for step in GRID))
        if most >= 1 or self.order <= starts:
            return 1.0
        return float(betainc(starts / 2, (self.order - starts) / 2, most))

    def _component(self, mu: float) -> float:
        """The most that ``||X'u||^2`` can be for an eigenvalue mu."""
        shift = mu - self.values
        scaled = self.gram / shift[:, None] / shift[None, :]
        rest = torch.linalg.solve(torch.eye(len(shift), dtype=shift.dtype) + scaled, scaled @ self.coordinates)
        return float(torch.linalg.eigvalsh(self.coordinates.T @ rest)[-1])


def random_start(coordinates: Tensor, values: Tensor, gram: Tensor, k: int, n: int) -> RandomStart | None:
    """That of all Ritz pairs of a search space, of which the first k are what was found.

    Args:
        coordinates: of the random rows in the others (w, s).
        values: Ritz values (k + w,), and ``gram``: ``R' R`` (k + w, k + w) of the residuals.
    """
    if len(values) <= k:
        return None
    return RandomStart(values[k:], gram[k:, k:], torch.linalg.qr(coordinates)[0], n - k)
