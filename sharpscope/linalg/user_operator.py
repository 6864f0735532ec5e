"""The public boundary: a user's operator on columns as the solvers call it, on rows and checked."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import Matmat
from sharpscope.linalg.vectors import project_out


def on_rows(matmat: Matmat, like: Tensor) -> Matmat:
    """A user's ``V`` (n, b) to ``H V`` as rows (b, n) to rows, with its results checked; ``like`` (0, n).

    The operator gets a copy of its argument and may write into it.

    Raises, when called: ArgumentError as ``checked_rows``.
    """
    return lambda block: checked_rows(matmat(block.T.clone()), like, len(block))


def checked_rows(product: Tensor, like: Tensor, count: int) -> Tensor:
    """A copy of a user's product (n, count) as rows (count, n) of the dtype and device of ``like`` (0, n).

    Raises: ArgumentError for a wrong shape, NaN and infinity.
    """
    n = like.shape[1]
    if not isinstance(product, Tensor) or product.shape != (n, count):
        came = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
        raise ArgumentError(f"matmat must return a tensor of shape ({n}, {count}), got {came}.")
    product = product.detach().to(like.device, like.dtype).T
    if not bool(torch.isfinite(product).all()):
        raise ArgumentError("matmat must return finite numbers, got NaN or infinity.")
    return product.clone().contiguous()


def outside(rows: Matmat, known: Tensor) -> Matmat:
    """``(I - P) H`` on rows, P the projector on the orthonormal rows ``known`` (d, n): symmetric where P x = 0."""
    return lambda block: project_out(rows(block), known)[0]


def require_dtype(dtype: torch.dtype) -> None:
    """Raise ArgumentError unless vectors of this dtype are ones that the solvers take."""
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
