"""A symmetric operator as the solvers see it: checked, on rows, and outside of what is known of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import Matmat
from sharpscope.linalg.vectors import project_out


def on_rows(matmat: Matmat, n: int, dtype: torch.dtype, device: torch.device, sign: float = 1.0) -> Matmat:
    """``sign * matmat`` on rows, (b, n) to (b, n), after a look at what came back.

    Its ArgumentError names a wrong shape, and NaN.
    """

    def rows(block: Tensor) -> Tensor:
        product = matmat(block.T.clone())  # a copy: matmat may write into its argument
        if not isinstance(product, Tensor) or product.shape != (n, len(block)):
            came = tuple(product.shape) if isinstance(product, Tensor) else type(product).__name__
            raise ArgumentError(f"matmat must return a tensor of shape ({n}, {len(block)}), got {came}.")
        product = sign * product.detach().to(device, dtype).T
        if not bool(torch.isfinite(product).all()):
            raise ArgumentError("matmat must return finite numbers, got NaN or infinity.")
        return product.contiguous()

    return rows


def outside(rows: Matmat, known: Tensor) -> Matmat:
    """``(I - P) H`` on rows, P the projector on the orthonormal rows ``known`` (d, n): symmetric where P x = 0."""
    return lambda block: project_out(rows(block), known)[0]


def require_dtype(dtype: torch.dtype) -> None:
    """Raise ArgumentError unless vectors of this dtype are ones that the solvers take."""
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")
