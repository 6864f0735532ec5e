"""The one interface of all eigensolvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, nearest
from sharpscope.linalg.lanczos import lanczos
from sharpscope.linalg.operator import on_rows, require_dtype
from sharpscope.linalg.power import power_iteration
from sharpscope.linalg.ritz import Matmat, RitzPairs, SolverProgress

METHODS: dict[str, Callable[..., RitzPairs]] = {"lanczos": lanczos, "power": power_iteration}
WHICH = ("largest", "smallest")


@dataclass(frozen=True)
class Eigenpairs:
    """The k eigenvalues at one end of a symmetric operator's spectrum, with multiplicity.

    Attributes:
        eigenvalues: float64 (k,), ordered from that end inwards.
        eigenvectors: (n, k), orthonormal columns in the dtype of the computation.
        residuals: ``||H v - lambda v||`` (k,), from true products, not from a recurrence; with "lanczos" from one more.
        lower, upper: float64 (k,), an interval for each eigenvalue from its residual and gap, with rounding.
        converged: bool (k,), whether the interval's half-width is at most ``tol |lambda|``, or lambda is zero to
            rounding.
        num_matvecs: products with one vector, in all.
        num_products: products with a block of vectors, in all.
        method: the solver that ran.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    lower: Tensor
    upper: Tensor
    converged: Tensor
    num_matvecs: int
    num_products: int
    method: str


def top_eigenpairs(
    matmat: Matmat,
    n: int,
    k: int = 5,
    *,
    tol: float = 1e-3,
    which: str = "largest",
    method: str = "auto",
    max_basis: int | None = None,
    max_products: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    progress: SolverProgress | None = None,
) -> Eigenpairs:
    """``H v_i = lambda_i v_i`` for the k largest (or smallest) *algebraic* eigenvalues, counted with multiplicity.

    Args:
        matmat: ``V`` (n, b) to ``H V`` (n, b), H symmetric.
        n: the order of H.
        k: number of pairs, 1 <= k <= n.
        tol: relative to each eigenvalue: stop when ``|lambda - theta| <= tol |theta|`` is proved by the residuals.
        which: "largest" or "smallest".
        method: "lanczos" (block Lanczos with thick restart; also "auto") or "power" (deflated power iteration).
        max_basis: vectors of length n that the solver may keep.
        max_products: calls of ``matmat`` after which it gives up (by default 100 for "lanczos", 1000 for "power");
            the result then says what has not converged.
        dtype, device: of the vectors; inner products and small matrices are float64.
        generator: source of the random start, on the CPU; by default one seeded with 0.
        progress: called as ``progress(products, worst)`` with the largest ``bound / |theta|`` so far.

    Raises: ArgumentError for arguments out of range, a matmat with a wrong shape, NaN, or that is not symmetric.
    """
    require_arguments(n, k, tol, method, max_products)
    if which not in WHICH:
        raise ArgumentError(f"which must be one of {', '.join(WHICH)}, got {which!r}.")
    require_dtype(dtype)
    name = "lanczos" if method == "auto" else method
    sign = 1.0 if which == "largest" else -1.0
    pairs = METHODS[name](
        on_rows(matmat, n, dtype, torch.device(device), sign),
        torch.empty(0, n, dtype=dtype, device=device),
        k,
        tol=tol,
        max_basis=max_basis,
        max_products=max_products,
        generator=generator if generator is not None else torch.Generator().manual_seed(0),
        progress=progress,
    )
    result = Eigenpairs(
        eigenvalues=pairs.values,
        eigenvectors=pairs.vectors.T,
        residuals=pairs.residuals,
        lower=pairs.values - pairs.bounds,
        upper=pairs.values + pairs.bounds,
        converged=pairs.converged,
        num_matvecs=pairs.num_matvecs,
        num_products=pairs.num_products,
        method=name,
    )
    if which == "smallest":
        result = replace(result, eigenvalues=-result.eigenvalues, lower=-result.upper, upper=-result.lower)
    return result


def require_arguments(n: int, k: int, tol: float, method: str, max_products: int | None) -> None:
    """What every solver asks of its arguments, to be asked before anything is paid for.

    Raises: ArgumentError.
    """
    if method not in ("auto", *METHODS):
        raise ArgumentError(nearest("method", str(method), ("auto", *METHODS)))
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise ArgumentError(f"k must be at least 1 and at most the number of parameters ({n}), got {k}.")
    if not isinstance(tol, float | int) or not 0 < tol < 1:
        raise ArgumentError(f"tol must be a number between 0 and 1, got {tol!r}.")
    if max_products is not None and max_products < 2:
        raise ArgumentError(f"There must be at least 2 products, a step and its check, got a limit of {max_products}.")
