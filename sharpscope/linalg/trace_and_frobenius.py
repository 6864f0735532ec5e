"""Trace and Frobenius norm of an operator from a few random vectors, by XTrace with jackknife standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.linalg.quadrature import known_pairs, random_unit_rows, require_probes
from sharpscope.linalg.vectors_as_rows import (
    BREAKDOWN,
    Matmat,
    as_row_operator,
    combine,
    deflated,
    inner,
    norms,
    orthonormalise,
    project_out,
    random_rows,
    require_dtype,
    rounding_error,
)
from sharpscope.random_streams import stream_from


@dataclass(frozen=True)
class TraceEstimate:
    """Estimates and standard errors.

    Attributes:
        trace, trace_error: ``tr H``, unbiased.
        squared, squared_error: ``||H||_F^2 = tr H^2``, unbiased.
        num_products: products with a block of vectors, and ``num_matvecs``: with one vector.
        exact: the products determine all of H; the errors are rounding alone.
    """

    trace: float
    trace_error: float
    squared: float
    squared_error: float
    num_products: int
    num_matvecs: int
    exact: bool = False


def trace_and_frobenius(
    matmat: Matmat,
    n: int,
    probes: int = 16,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> TraceEstimate:
    """``tr H`` and ``||H||_F^2`` by XTrace (Epperly, Tropp and Webber 2024), both from the same 2K products.

    With ``2 probes >= n`` these are products with a basis: both are exact, and their errors rounding.

    Args: as ``lanczos_quadrature``.

    Cost: two products with a block of at most ``probes`` vectors; memory, four such blocks.

    Raises: ArgumentError for arguments out of range, a matmat with a wrong shape, or NaN.

    >>> import torch
    >>> from sharpscope.linalg import trace_and_frobenius
    >>> diagonal = torch.tensor([3.0, 4.0] + [0.0] * 98, dtype=torch.float64)[:, None]
    >>> found = trace_and_frobenius(lambda V: diagonal * V, n=100, probes=4)
    >>> round(found.trace, 6), round(found.squared, 6)  # exact, since of rank 2 < 4
    (7.0, 25.0)
    """
    require_dtype(dtype)
    like = torch.empty(0, n, dtype=dtype, device=device)
    return trace_and_frobenius_rows(as_row_operator(matmat, like), like, probes, generator=generator)


def trace_and_frobenius_rows(
    rows: Matmat, like: Tensor, probes: int = 16, *, generator: torch.Generator | None = None
) -> TraceEstimate:
    """``trace_and_frobenius`` of an operator on rows, whose results are not checked.

    Args: as ``lanczos_quadrature_rows``.
    """
    require_probes(like.shape[1], probes)
    source = stream_from(generator, "probes")
    start = random_unit_rows(probes, like, like, source)
    return trace_from_images(rows, start, rows(start), generator=source)


def trace_from_images(
    rows: Matmat,
    probes: Tensor,
    images: Tensor,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator,
) -> TraceEstimate:
    """XTrace given the products with the probes; cost: one more product with a block.

    With 2K >= n - d, no estimate: the second product is with a basis of what the first n - d - K probes leave.

    With Q_i a basis of the images of all probes but the i-th, and ``x_i`` the i-th probe's component orthogonal to it,
    scaled to the squared length ``n - d - rank Q_i`` of a normal vector there, each of
    ``tr(Q_i' H Q_i) + x_i' H x_i``  and  ``||H Q_i||_F^2 + ||H x_i||^2``
    is unbiased for ``tr H`` and ``||H||_F^2``; the estimate is their mean over i. No value's sign or size stops
    anything early. The K values share most of their bases, so their scatter over sqrt(K), the source's error estimate,
    is too small: by a factor of 2 for 20 equal eigenvalues of 100 and 16 probes. The standard error here is the
    jackknife's, the whole estimate repeated without each probe; its square is, on average, at least the variance with
    K - 1 probes (Efron and Stein 1981).

    Departures from the source: the standard error; ||H||_F from the same products; bases without one image from small
    QR factorisations in place of R^-1, so that an operator of low rank is no special case.

    Args:
        probes: (K, n), independent, uniform on the unit sphere orthogonal to ``known``.
        images: (K, n), ``(I - P) H`` of them, P the projector on ``known``, as ``Quadrature`` has them.
        known: eigenvalues (d,) and eigenvectors as rows (d, n), added exactly.
        generator: source of random directions, where an operator of low rank has none.
    """
    n, dtype = probes.shape[1], probes.dtype
    values, vectors = known_pairs(known, probes[:0])
    space, count = n - len(values), len(probes)
    largest = float(values.abs().max()) if len(values) else 0.0
    if 2 * count >= space:
        return _from_a_basis(rows, probes, images, values, vectors, largest, generator)
    floor = BREAKDOWN * torch.finfo(dtype).eps * float(norms(images).max())
    basis, factors = orthonormalise(images, vectors, floor, generator)
    genuine = factors.abs().sum(1) > 0
    basis, factors = basis[genuine.to(basis.device)], factors[genuine]
    basis_images = deflated(rows, vectors)(basis) if len(basis) else basis
    within, squares = inner(basis, basis_images), inner(basis_images, basis_images)
    # factors = Q'Y = R; since Y = QR, Y'HQ = R'(Q'HQ) needs no product of its own.
    coordinates = _ProbeCoordinates(
        factors=factors,
        along=inner(basis, probes),
        within=(within + within.T) / 2,
        squares=squares,
        direct=inner(probes, images).diagonal(),
        lengths=norms(images).square(),
        space=space,
    )
    estimate, error = _jackknife(coordinates)
    # With rank below K the estimates agree to rounding, which is then the standard error.
    scale = float(torch.linalg.matrix_norm(coordinates.within, 2)) if len(basis) else 0.0
    least = rounding_error(max(scale, largest), dtype)
    return TraceEstimate(
        trace=float(estimate[0] + values.sum()),
        trace_error=math.hypot(float(error[0]), least),
        squared=float(estimate[1] + values.square().sum()),
        squared_error=math.hypot(float(error[1]), 2 * max(scale, largest) * least),
        num_products=2 if len(basis) else 1,
        num_matvecs=count + len(basis),
    )


def _from_a_basis(
    rows: Matmat,
    probes: Tensor,
    images: Tensor,
    values: Tensor,
    vectors: Tensor,
    largest: float,
    generator: torch.Generator,
) -> TraceEstimate:
    """The sums over an orthonormal basis: of the first n - d - K probes, with their images, and K vectors beside them.

    So few random vectors, half of the dimension at most, are far from dependent: their rounding grows by 1/s, s their
    smallest singular value, about 0.3.
    """
    space, count = probes.shape[1] - len(values), len(probes)
    second = min(count, space)
    first, factor = orthonormalise(probes[: space - second], vectors, 0.0, generator)
    inverse = torch.linalg.inv(factor.T)
    rest, _ = project_out(random_rows(second, probes, generator), torch.cat([vectors, first]))
    basis, _ = orthonormalise(rest, torch.cat([vectors, first]), 0.0, generator)
    basis_images = torch.cat([combine(inverse, images[: space - second]), deflated(rows, vectors)(basis)])
    within = inner(torch.cat([first, basis]), basis_images)
    scale = max(float(torch.linalg.matrix_norm(within, 2)), largest)
    growth = float(torch.linalg.matrix_norm(inverse, 2)) if len(first) else 1.0
    error = growth * rounding_error(scale, probes.dtype)
    return TraceEstimate(
        trace=float(within.trace() + values.sum()),
        trace_error=error,
        squared=float(norms(basis_images).square().sum() + values.square().sum()),
        squared_error=2 * scale * error,
        num_products=2,
        num_matvecs=count + second,
        exact=True,
    )


@dataclass(frozen=True)
class _ProbeCoordinates:
    """The inner products that XTrace needs, in the basis Q (r, n) of all images.

    ``factors`` Q'Y, ``along`` Q' of the probes (both r, K), ``within`` Q'HQ, ``squares`` (HQ)'HQ, ``direct`` and
    ``lengths`` v'Hv and ||Hv||^2 of each probe (K,), ``space`` the dimension that the probes fill.
    """

    factors: Tensor
    along: Tensor
    within: Tensor
    squares: Tensor
    direct: Tensor
    lengths: Tensor
    space: int

    def values(self, of: tuple[int, ...], without: tuple[int, ...]) -> Tensor:
        """The estimates (2, len(of)) by the probes ``of``, with the basis of the images of all but ``without``."""
        kept = [j for j in range(len(self.direct)) if j not in without]
        reduced, _ = torch.linalg.qr(self.factors[:, kept])
        rank, inside = reduced.shape[1], reduced @ reduced.T
        trace, squared = (inside * self.within).sum(), (inside * self.squares).sum()
        out = torch.zeros(2, len(of), dtype=torch.float64)
        for column, i in enumerate(of):
            # c: the probe's coordinates in the basis; then x'Hx and ||Hx||^2 of its orthogonal component x.
            c, r = inside @ self.along[:, i], self.factors[:, i]
            left_over = 1 - float(c @ c)
            stretch = (self.space - rank) / left_over if self.space > rank and left_over > 0 else 0.0
            form = self.direct[i] - 2 * r @ c + c @ self.within @ c
            square = self.lengths[i] - 2 * r @ self.within @ c + c @ self.squares @ c
            out[0, column], out[1, column] = trace + stretch * form, squared + stretch * square
        return out


def _jackknife(coordinates: _ProbeCoordinates) -> tuple[Tensor, Tensor]:
    """XTrace's two estimates (2,), and their standard errors by leaving each probe out of everything once."""
    count = len(coordinates.direct)
    estimate = torch.stack([coordinates.values((i,), (i,))[:, 0] for i in range(count)]).mean(0)
    fewer = torch.zeros(2, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1, count):
            pair = coordinates.values((i, j), (i, j))
            fewer[:, j] += pair[:, 0] / (count - 1)
            fewer[:, i] += pair[:, 1] / (count - 1)
    return estimate, (fewer.var(1) * (count - 1) ** 2 / count).sqrt()
