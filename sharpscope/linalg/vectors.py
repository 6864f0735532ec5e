"""Inner products, updates and orthonormal blocks of long vectors; vectors are the rows of a (count, n) tensor.

Everything that reads across a whole vector is here, with sums in float64 whatever the vectors' own precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.precision import CHUNK, wide

# Below this multiple of eps times the operator's norm what is left after projection is rounding, no new direction.
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
    out = torch.empty(len(coefficients), rows.shape[1], dtype=rows.dtype, device=rows.device)
    dtype = wide(rows.device)
    weights = coefficients.to(rows.device, dtype)
    for start in range(0, rows.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        out[:, part] = (weights @ rows[:, part].to(dtype)).to(rows.dtype)
    return out


def project_out(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``block`` without its part in the span of the orthonormal ``basis``, and that part's coefficients (m, b).

    Two passes of classical Gram-Schmidt as matrix products: "twice is enough" (Giraud et al. 2005).
    """
    coefficients = torch.zeros(len(basis), len(block), dtype=torch.float64)
    for _ in range(2):
        step = inner(basis, block)
        block = block - combine(step.T, basis)
        coefficients += step
    return block, coefficients


def norms(rows: Tensor) -> Tensor:
    """The 2-norm (m,) of each row, in float64."""
    return torch.stack([inner(row[None], row[None])[0, 0] for row in rows]).sqrt()


def orthonormalise(block: Tensor, basis: Tensor, floor: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal rows ``P`` (p, n), orthogonal to ``basis``, and float64 ``R`` (p, b) with ``block = R.T P``.

    ``block`` (b, n) must be orthogonal to ``basis`` already. A direction with no more than ``floor`` left of it is
    replaced by a random one with a zero row in R, so that the iteration goes on past an invariant subspace; p < b
    only when the space is exhausted.
    """
    count, n = block.shape
    room = min(count, n - len(basis))
    new = torch.empty(room, n, dtype=block.dtype, device=block.device)
    factors = torch.zeros(room, count, dtype=torch.float64)
    filled = 0
    for i in range(count):
        rest, along = project_out(block[i : i + 1], new[:filled])
        factors[:filled, i] = along[:, 0]
        length = float(norms(rest)[0])
        if length > floor and filled < room:
            factors[filled, i] = length
            new[filled] = _polished(rest / length, basis, new[:filled])
            filled += 1
    for i in range(filled, room):
        new[i] = _polished(random_rows(1, block, generator), basis, new[:i])
    return new, factors


def require_orthonormal(rows: Tensor, what: str) -> None:
    """Raise ArgumentError unless ``rows`` are orthonormal to half the digits of their dtype."""
    apart = (inner(rows, rows) - torch.eye(len(rows), dtype=torch.float64)).abs()
    if not bool((apart <= torch.finfo(rows.dtype).eps ** 0.5).all()):
        raise ArgumentError(f"{what} must be orthonormal, but V'V is off by {float(apart.max()):.2g}.")


def random_rows(count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` rows of independent normal numbers, drawn on the CPU so that every device sees the same."""
    return torch.randn(count, like.shape[1], generator=generator, dtype=torch.float64).to(like)


def _polished(row: Tensor, *against: Tensor) -> Tensor:
    """A unit row orthogonal to all of ``against`` to rounding, however little of it was left."""
    for _ in range(2):
        row = row / float(norms(row)[0])
        for basis in against:
            row, _ = project_out(row, basis)
    return (row / float(norms(row)[0]))[0]
