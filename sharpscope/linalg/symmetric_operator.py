"""Symmetric operators given by their products with vectors: the row interface of the solvers, and checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.vectors import project_out

# H times a block of vectors. Inside this package a block is rows (b, n), and so is the product: a new contiguous tensor
# of the same dtype and device; the argument is not modified. At the public boundary both are columns (n, b).
Matmat = Callable[[Tensor], Tensor]

# The rounding error of a product with a vector, in units of eps times the operator's norm. No residual can be smaller.
ROUNDING = 32.0


def as_row_operator(matmat: Matmat, like: Tensor) -> Matmat:
    """``matmat``, which maps columns (n, b) to columns, as a function of rows (b, n) that checks each product.

    The operator gets a copy of its argument and may write into it. ``like`` (0, n) sets dtype and device.

    Raises, when called: ArgumentError for a product of a wrong shape, NaN or infinity.
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
        return product.clone().contiguous()

    return rows


def deflated(rows: Matmat, known: Tensor) -> Matmat:
    """``(I - P) H`` on rows, P the projector on the orthonormal rows ``known`` (d, n); symmetric where ``P x = 0``."""
    return lambda block: project_out(rows(block), known)[0]


def rounding_error(scale: float, dtype: torch.dtype) -> float:
    """The rounding error of an eigenvalue of an operator of norm ``scale``: ``ROUNDING * eps * scale``."""
    return ROUNDING * torch.finfo(dtype).eps * scale


def require_dtype(dtype: torch.dtype) -> None:
    """Raise ArgumentError unless the solvers support vectors of this dtype."""
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"dtype must be torch.float32 or torch.float64, got {dtype}.")


def require_symmetric(projected: Tensor, scale: float, dtype: torch.dtype) -> None:
    """Raise ArgumentError when the matrix ``v_i' H v_j`` is asymmetric by more than rounding explains."""
    require_small_asymmetry(float((projected - projected.T).abs().max()), scale, dtype)


def require_small_asymmetry(asymmetry: float, scale: float, dtype: torch.dtype) -> None:
    """Raise ArgumentError when ``|v'Hu - u'Hv|`` is larger than rounding explains for an operator of norm ``scale``."""
    if asymmetry > 10 * torch.finfo(dtype).eps ** 0.5 * scale:
        raise ArgumentError(
            f"H must be symmetric, but v'Hu and u'Hv differ by {asymmetry:.2g} at a norm of {scale:.2g}. "
            "Check what makes products change from call to call; where H is much smaller than what it is summed from, "
            "lift the computation to float64."
        )
