"""Block power iteration on a shifted operator, for the largest algebraic eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from sharpscope.linalg.ritz import (
    RitzPairs,
    SolverProgress,
    descending,
    largest_relative,
    rayleigh_ritz,
    residual_vectors,
)
from sharpscope.linalg.vectors_as_rows import (
    BREAKDOWN,
    Matmat,
    combine,
    inner,
    norms,
    orthonormalise,
    random_rows,
    rounding_error,
)

# Block products before the solver gives up, by default.
PRODUCTS = 1000


def power_iteration(
    matmat: Matmat,
    like: Tensor,
    k: int,
    *,
    tol: float,
    max_basis: int | None,
    max_products: int | None,
    generator: torch.Generator,
    progress: SolverProgress | None,
) -> RitzPairs:
    """The k largest *algebraic* eigenpairs by power iteration on ``H + s I`` with a block of k + 1 random vectors.

    Orthogonal iteration with Rayleigh-Ritz (Parlett 1998, ch. 14), so multiplicities are found. The shift s keeps the
    most negative eigenvalue from dominating: without it, +10 and -10 never separate. Stops
    when each residual proves ``tol |theta|``. Converges like ``((lambda_{k+2} + s) / (lambda_k + s))^j``: slow, but
    simple enough to check the other solvers with.

    Cost: k + 1 products a step; memory, 3 (k + 1) vectors, whatever ``max_basis``.
    """
    n, dtype = like.shape[1], like.dtype
    width = min(k + 1, n)
    most = PRODUCTS if max_products is None else max_products
    block, _ = orthonormalise(random_rows(width, like, generator), like, 0.0, generator)
    scale, lowest, products = 0.0, 0.0, 0
    while True:
        image = matmat(block)
        products += 1
        values, rotation = descending(inner(block, image))
        block, image = combine(rotation.T, block), combine(rotation.T, image)
        lengths = norms(image)
        scale = max(scale, float(lengths.max()))
        # -||Hv|| is below every eigenvalue seen by the block; it tends to -||H|| if the negative end dominates.
        lowest = min(lowest, float(values[-1]), -float(lengths[-1]) if values[-1] < 0 else 0.0)
        residuals = norms(residual_vectors(values, block, image))
        floor = rounding_error(scale, dtype)
        if progress is not None:
            progress(products, largest_relative(residuals[:k], values[:k], floor, tol))
        # sqrt(k): the bound for k pairs together is the joint norm of their residuals.
        converged = residuals[:k] <= (tol * values[:k].abs() / k**0.5).clamp_min(floor / k)
        if bool(converged.all()) or products >= most:
            return rayleigh_ritz(
                block[:k],
                image[:k],
                next_eigenvalue=None,  # the last Ritz value converges too slowly to estimate a gap
                scale=scale,
                tol=tol,
                num_matvecs=products * width,
                num_products=products,
            )
        image -= 1.1 * lowest * block
        block, _ = orthonormalise(image, like, BREAKDOWN * torch.finfo(dtype).eps * scale, generator)
