"""Blocks of vectors as rows, (K, n): inner products and orthonormal bases in float64; symmetric operators on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.precision import CHUNK, wide

# A remainder after projection below this multiple of eps times the operator's norm is rounding error, not a direction.
BREAKDOWN = 50.0


def inner(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` (a, b) in float64 on the CPU, for rows (a, n) and (b, n)."""
    if left.dtype == torch.float64:
        return (left @ right.T).cpu()
    dtype = wide(left.device)
    total = torch.zeros(len(left), len(right), dtype=dtype, device=left.device)
    for start in range(0, left.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        total += left[:, part].to(dtype) @ right[:, part].to(dtype).T
    return total.cpu().double()


def combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """``coefficients @ rows`` (a, n) in the rows' dtype, for float64 coefficients (a, m) and rows (m, n)."""
    dtype = wide(rows.device)
    weights = coefficients.to(rows.device, dtype)
    if rows.dtype == dtype and rows.shape[1] <= CHUNK:
        return weights @ rows
    out = torch.empty(len(coefficients), rows.shape[1], dtype=rows.dtype, device=rows.device)
    for start in range(0, rows.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        out[:, part] = (weights @ rows[:, part].to(dtype)).to(rows.dtype)
    return out


def project_out(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Project ``block`` onto the orthogonal complement of ``basis``; return it and the coefficients removed (m, b).

    Two passes of classical Gram-Schmidt as matrix products: "twice is enough" (Giraud et al. 2005).
    """
    coefficients = torch.zeros(len(basis), len(block), dtype=torch.float64)
    for _ in range(2 if len(basis) else 0):
        step = inner(basis, block)
        block = block - combine(step.T, basis)
        coefficients += step
    return block, coefficients


def norms(rows: Tensor) -> Tensor:
    """The 2-norm (m,) of each row, in float64."""
    return torch.stack([inner(row[None], row[None])[0, 0] for row in rows]).sqrt()


def orthonormalise(block: Tensor, basis: Tensor, floor: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal rows ``P`` (p, n), orthogonal to ``basis``, and float64 ``R`` (p, b) with ``block = R.T P``.

    ``block`` (b, n) must already be orthogonal to ``basis``. A row of remaining norm ``floor`` or less is replaced by a
    random one with a zero row in R, so that the iteration continues past an invariant subspace; p < b only when the
    space is exhausted.
    """
    count, n = block.shape
    available = min(count, n - len(basis))
    new = torch.empty(available, n, dtype=block.dtype, device=block.device)
    factors = torch.zeros(available, count, dtype=torch.float64)
    filled = 0
    for i in range(count):
        rest, along = project_out(block[i : i + 1], new[:filled])
        factors[:filled, i] = along[:, 0]
        length = float(norms(rest)[0])
        if length > floor and filled < available:
            factors[filled, i] = length
            new[filled] = orthogonal_unit_row(rest / length, basis, new[:filled])
            filled += 1
    for i in range(filled, available):
        new[i] = orthogonal_unit_row(random_rows(1, block, generator), basis, new[:i])
    return new, factors


def require_orthonormal(rows: Tensor, what: str) -> None:
    """Raise ArgumentError unless ``rows`` are orthonormal to half the digits of their dtype."""
    error = (inner(rows, rows) - torch.eye(len(rows), dtype=torch.float64)).abs()
    if not bool((error <= torch.finfo(rows.dtype).eps ** 0.5).all()):
        raise ArgumentError(f"{what} must be orthonormal, but V'V is off by {float(error.max()):.2g}.")


def random_rows(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` rows of independent normal numbers, generated on the CPU, so that they are the same on every device."""
    return torch.randn(count, like.shape[1], generator=generator, dtype=torch.float64).to(like)


def orthogonal_unit_row(row: Tensor, *against: Tensor) -> Tensor:
    """Normalise ``row`` and make it orthogonal to ``against`` to rounding, however small it is."""
    for _ in range(2):
        row = row / float(norms(row)[0])
        for basis in against:
            row, _ = project_out(row, basis)
    return (row / float(norms(row)[0]))[0]


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


def require_small_asymmetry(asymmetry: float, scale: float, dtype: torch.dtype, noise: float = 0.0) -> None:
    """Raise ArgumentError when ``|v'Hu - u'Hv|`` is larger than rounding explains for an operator of norm ``scale``.

    ``noise``: the rounding error of the products, where they are the rest of larger ones.
    """
    if asymmetry > 10 * torch.finfo(dtype).eps ** 0.5 * scale + noise:
        raise ArgumentError(
            f"H must be symmetric, but v'Hu and u'Hv differ by {asymmetry:.2g} at a norm of {scale:.2g}. "
            "Check what makes products change from call to call; where H is much smaller than what it is summed from, "
            "lift the computation to float64."
        )
