"""The public boundary: a user's operator on columns as the solvers call it, on rows and checked."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import Matmat
from sharpscope.linalg.vectors import project_out


def on_rows(matmat: Matmat, like: Tensor) -> Matmat:
    """A user's ``V`` (n, b) to ``H V`` as rows (b, n) to rows, with its results checked; ``like`` (0, n).

    The operator gets a copy of its argument and may write into it; it may return memory that it writes into again.

    Raises, when called: ArgumentError for a wrong shape, NaN and infinity.
    """
    n = like.shape[1]

    def rows(block: Tensor) -> Tensor:
        product = matmat(block.T.clone())
        if not isinstance(product, Tensor) or product.shape != (n, len(block)):
            came = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
            raise ArgumentError(f"matmat must return a tensor of shape ({n}, {len(block)}), got {came}.")
        product = product.detach().to(like.device, like.dtype).T
        if not bool(torch.isfinite(product).all()):
            raise ArgumentError("matmat must return finite numbers, got NaN or infinity.")
        return product.clone(memory_format=torch.contiguous_format)

    return rows


def outside(rows: Matmat, known: Tensor) -> Matmat:
    """``(I - P) H`` on rows, P the projector on the orthonormal rows ``known`` (d, n): symmetric where P x = 0."""
    return lambda block: project_out(rows(block), known)[0]


def require_dtype(dtype: torch.dtype) -> None:
    """Raise ArgumentError unless vectors of this dtype are ones that the solvers take."""
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
