"""Eigenpairs of an expensive operator in few products, guided by a cheap operator that approximates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.block_lanczos import PRODUCTS
from sharpscope.linalg.missed_eigenvalues import MissedEigenvalueBound
from sharpscope.linalg.ritz import (
    RitzPairs,
    SolverProgress,
    descending,
    largest_relative,
    may_stop,
    rayleigh_ritz,
    residual_vectors,
    ritz_bounds,
)
from sharpscope.linalg.vectors_as_rows import (
    BREAKDOWN,
    Matmat,
    combine,
    inner,
    norms,
    orthonormalise,
    project_out,
    random_rows,
    require_symmetric,
    rounding_error,
)

# The eigenvectors of a guide are computed to residuals of this fraction of its k-th eigenvalue. The Hessian of some
# thousand examples is itself off by 3 to 10 % (measured on a small CNN), so a smaller residual gains nothing.
GUIDE_TOL = 0.08

# Each correction is solved to this fraction of the residual it corrects: the guide's error leaves 5 to 15 % anyway.
CORRECTION_TOL = 0.1

# The (k+1)-th eigenvector is used for the gap only, and is computed to this fraction of the k-th eigenvalue.
GAP_TOL = 0.15

# The guide is dropped once a pass leaves the largest residual above this fraction of the one before.
MIN_REDUCTION = 0.5

# Products before the solver may stop: the random probes give no evidence before they have been multiplied twice.
MIN_PRODUCTS = 2

# Random probe vectors in the block; each costs 2 gradients in each of the first two passes. Of 100 guides that were
# accurate except that they lacked lambda_5, 16 led the solver to miss it with one probe and none with two; of 100 that
# lacked lambda_3, 7 and 1. A weighted sample of the data lacks none; the probability that remains is reported
# (MissedEigenvalueBound) and can be lowered (certificate).
NUM_PROBES = 1

# If more than this share of a Ritz vector (squared norm) lies in the span of the probes, the probes found it. They then
# have nothing left of that eigenspace to reveal a further copy of the eigenvalue, so new probes are drawn.
PROBE_SHARE = 0.1


@dataclass(frozen=True)
class _RitzSpace:
    """Ritz vectors (q, n) of a search space, their images under H (q, n), and Ritz values (q,), descending."""

    vectors: Tensor
    images: Tensor
    values: Tensor

    @property
    def residuals(self) -> Tensor:
        """``H q - theta q`` (q, n)."""
        return residual_vectors(self.values, self.vectors, self.images)

    def largest(self, count: int) -> _RitzSpace:
        """The pairs of the ``count`` largest Ritz values."""
        return _RitzSpace(self.vectors[:count], self.images[:count], self.values[:count])


def guided(
    matmat: Matmat,
    like: Tensor,
    k: int,
    *,
    guides: Sequence[Matmat],
    tol: float,
    max_basis: int | None,
    max_products: int | None,
    generator: torch.Generator,
    progress: SolverProgress | None,
    initial: Tensor | None = None,
) -> RitzPairs:
    """The k largest eigenpairs of H in few block products, given a cheap operator G that approximates H.

    1. Compute the largest eigenvectors of G, the last of ``guides``, by block Lanczos to the accuracy GUIDE_TOL. Start
       from those of the guide before it, and for the first guide from random vectors.
    2. Multiply k of them and NUM_PROBES random vectors by H; apply Rayleigh-Ritz.
    3. Define the model operator M, equal to H on the search space and to G on its orthogonal complement: the smallest
       change of G that agrees with all products of H so far. The components of the largest eigenvectors of M orthogonal
       to the search space are the corrections; to second order they are those of Jacobi-Davidson (Sleijpen and van der
       Vorst 1996). The next block consists of the corrections of the pairs that have not converged and, for the probes,
       of their images (later only the residual of pair k + 1). Multiply by H and repeat Rayleigh-Ritz.

    Residuals come from true products. The stopping test and the bounds returned (``rayleigh_ritz``) estimate
    ``lambda_{k+1}`` from above by the larger of two numbers: the (k+1)-th Ritz value plus its residual, and the
    (k+1)-th eigenvalue of M plus the observed error of G times the norm of the component of the eigenvector of M
    orthogonal to the search space. If the guide does not help, the corrections are the residuals, and the method is
    block Lanczos with thick restart.

    Cost: k + NUM_PROBES products with H in the first pass (one more for each row of ``initial`` beyond k), at most as
    many in the second and k + 1 in each later one, plus NUM_PROBES whenever probes are drawn again; at least two
    passes; about 25 products with each guide.

    Args: as ``top_eigenpairs``; ``like`` (0, n) sets n, dtype and device; ``guides`` map rows to rows, as ``matmat``
        does; ``initial``: rows (b, n) of the first block, in place of the guide's eigenvectors.
    """
    n = like.shape[1]
    width = min(k + 1, n)
    limit = min(n, 8 * width) if max_basis is None else min(n, max_basis)
    if limit < min(n, 4 * width):
        raise ArgumentError(f"max_basis must be at least {4 * width} for k = {k} (four blocks), got {max_basis}.")
    limit_products = PRODUCTS if max_products is None else max_products
    search = _Search.start(guides, like, k, limit, generator, initial)
    while True:
        search.expand(matmat)
        ritz = search.assess(tol)
        if progress is not None:
            progress(search.products, largest_relative(ritz.bounds, search.space.values[:k], ritz.floor, tol))
        probes_pending = search.probes.num_products < MIN_PRODUCTS or (ritz.probe_hit and search.guide_helps)
        converged = bool(ritz.converged.all()) and not probes_pending
        if search.exhausted or search.products >= limit_products or converged:
            return search.pairs(ritz, tol)
        search.choose_block(ritz)


@dataclass(frozen=True)
class _RitzBounds:
    """Residuals and error bounds of the Ritz pairs of the search space.

    Attributes:
        residuals: ``H q - theta q`` (q, n) of all q pairs, with their norms ``residual_norms`` (q,).
        bounds: (k,) by ``ritz_bounds``, with ``next_eigenvalue`` as the upper estimate of ``lambda_{k+1}``.
        converged: (k,) whether the bound is within the tolerance, or at rounding error, ``floor``.
        probe_hit: whether the probes found one of the k Ritz vectors (PROBE_SHARE).
    """

    residuals: Tensor
    residual_norms: Tensor
    bounds: Tensor
    next_eigenvalue: float
    converged: Tensor
    floor: float
    probe_hit: bool


@dataclass
class _Probes:
    """Random vectors in the search space, evidence against eigenvalues that the guide lacks.

    Attributes:
        initial: the random vectors, orthonormal rows orthogonal to the search space at the time.
        derived: the orthonormal rows computed from them, in all blocks since.
        num_products: products since they were drawn.
        missed_bound: on the probability of a missed eigenvalue. Not updated once the search space was ``truncated``,
            which removes components of the random vectors.
    """

    initial: Tensor
    derived: Tensor
    num_products: int = 0
    missed_bound: MissedEigenvalueBound | None = None
    truncated: bool = False


@dataclass
class _Search:
    """The state of the iteration.

    Attributes:
        guide: the last of the guides; ``guide_helps`` while its corrections reduce the residuals.
        space: the search space.
        block: orthonormal rows to multiply next; the last ``num_probe_rows`` of them come from the probes, and
            ``probe_images`` are their products with H.
        model_next: the (k+1)-th eigenvalue of the model operator, and ``model_next_outside``: the norm of the component
            of its eigenvector orthogonal to the search space.
        model_extra: the model's eigenvectors after the first k, which help to start the next model.
        guide_images: the guide's products with the first block, without probes; ``guide_errors``: ``||H v - G v||``.
        scale: the largest known norm of a product with H.
        corrected: (k,) which residuals the next pass should reduce; ``largest_residual``: their largest norm so far.
    """

    guide: Matmat
    k: int
    width: int
    limit: int
    generator: torch.Generator
    space: _RitzSpace
    block: Tensor
    num_probe_rows: int
    probes: _Probes
    model_next: float
    model_next_outside: float
    model_extra: Tensor
    guide_images: Tensor
    guide_errors: Tensor
    corrected: Tensor
    probe_images: Tensor
    guide_helps: bool = True
    largest_residual: float = float("inf")
    scale: float = 0.0
    products: int = 0
    matvecs: int = 0

    @classmethod
    def start(
        cls,
        guides: Sequence[Matmat],
        like: Tensor,
        k: int,
        limit: int,
        generator: torch.Generator,
        initial: Tensor | None,
    ) -> _Search:
        """Make the first block of the guide's largest eigenvectors (or ``initial``) and the random probes."""
        width = min(k + 1, like.shape[1])
        rows, guide = random_rows(width + 1, like, generator), guides[-1]
        for coarse in guides[:-1]:
            rows = _model_ritz_pairs(coarse, None, rows, width, None, limit, generator).vectors
        model = _model_ritz_pairs(guide, None, rows, width, None, limit, generator)
        first, guide_images = model.vectors[:k], model.images[:k]
        model_next, model_next_outside = _next_pair(model, k, like)
        if initial is not None:
            first = _orthonormal_to(initial, like, generator)
            guide_images = guide(first)
        initial_probes = _orthonormal_to(random_rows(NUM_PROBES, like, generator), first, generator)
        return cls(
            guide=guide,
            k=k,
            width=width,
            limit=limit,
            generator=generator,
            space=_RitzSpace(like, like, torch.zeros(0, dtype=torch.float64)),
            block=torch.cat([first, initial_probes]),
            num_probe_rows=len(initial_probes),
            probes=_Probes(initial_probes, like),
            model_next=model_next,
            model_next_outside=model_next_outside,
            model_extra=model.vectors[k:],
            guide_images=guide_images,
            guide_errors=torch.zeros(len(first), dtype=torch.float64),
            corrected=torch.ones(k, dtype=torch.bool),
            probe_images=like,
        )

    @property
    def exhausted(self) -> bool:
        """Whether the search space is the whole space."""
        return len(self.space.values) == self.space.vectors.shape[1]

    def expand(self, matmat: Matmat) -> None:
        """Multiply the block by H, append it to the search space and apply Rayleigh-Ritz."""
        image = matmat(self.block)
        self.products, self.matvecs = self.products + 1, self.matvecs + len(self.block)
        derived = self.block[len(self.block) - self.num_probe_rows :]
        self.probes.num_products += 1
        self.probes.derived = torch.cat([self.probes.derived, derived])
        self.probe_images = image[len(self.block) - self.num_probe_rows :]
        self.scale = max(self.scale, float(norms(image).max()))
        if self.products == 1:
            self.guide_errors = norms(image[: len(self.guide_errors)] - self.guide_images)
        self.space = _extended(self.block, image, self.space if self.products > 1 else None, self.scale)
        self.scale = max(self.scale, float(self.space.values.abs().max()))

    def assess(self, tol: float) -> _RitzBounds:
        """Compute residuals and error bounds of the Ritz pairs, and update the missed-eigenvalue bound."""
        k, space, probes = self.k, self.space, self.probes
        values, residuals = space.values, space.residuals
        residual_norms, floor = norms(residuals), rounding_error(self.scale, residuals.dtype)
        next_eigenvalue = self._next_eigenvalue(residual_norms)
        gram = inner(residuals, residuals)
        bounds = ritz_bounds(values[:k], gram[:k, :k], next_eigenvalue)
        if not probes.truncated:
            coordinates = inner(space.vectors[k:], probes.initial)
            n = residuals.shape[1]
            probes.missed_bound = MissedEigenvalueBound.from_ritz_pairs(coordinates, values, gram, k, n)
        return _RitzBounds(
            residuals=residuals,
            residual_norms=residual_norms,
            bounds=bounds,
            next_eigenvalue=next_eigenvalue,
            converged=may_stop(bounds, values[:k], floor, tol),
            floor=floor,
            probe_hit=bool((inner(space.vectors[:k], probes.derived).square().sum(1) > PROBE_SHARE).any()),
        )

    def pairs(self, ritz: _RitzBounds, tol: float) -> RitzPairs:
        """The k largest pairs; without a missed-eigenvalue bound if the probes were used up by an eigenvector found."""
        return rayleigh_ritz(
            self.space.vectors[: self.k],
            self.space.images[: self.k],
            next_eigenvalue=ritz.next_eigenvalue,
            scale=self.scale,
            tol=tol,
            num_matvecs=self.matvecs,
            num_products=self.products,
            missed_bound=None if ritz.probe_hit and not self.exhausted else self.probes.missed_bound,
        )

    def choose_block(self, ritz: _RitzBounds) -> None:
        """Set the next block: corrections of the unconverged pairs, and the continuation of the probes."""
        probe = self.probe_images if self.probes.num_products == 1 else ritz.residuals[self.k : self.k + 1]
        kth = self.space.values[self.k - 1 : self.k]
        # No truncation if the limit admits the whole space.
        if self.limit < self.block.shape[1] and len(self.space.values) + self.width + NUM_PROBES > self.limit:
            self.space, self.probes.truncated = self.space.largest(self.limit // 2), True
        guide_helped = self.guide_helps
        self._assess_guide(ritz)
        block = self._corrections(ritz, kth) if self.guide_helps else ritz.residuals[: self.k] / self.scale
        if guide_helped and (ritz.probe_hit or not self.guide_helps):
            rows = random_rows(NUM_PROBES, self.block, self.generator)
            initial_probes = _orthonormal_to(rows, self.space.vectors, self.generator)
            self.probes = _Probes(initial_probes, initial_probes[:0])
            block, probe = torch.cat([block, probe / self.scale]), self.scale * initial_probes
        self.block = _orthonormal_to(torch.cat([block, probe / self.scale]), self.space.vectors, self.generator)
        self.num_probe_rows = min(len(probe), len(self.block))

    def _next_eigenvalue(self, residual_norms: Tensor) -> float:
        """Upper estimate of ``lambda_{k+1}``: the model's, or the (k+1)-th Ritz value plus residual if larger."""
        next_eigenvalue, values = float("-inf"), self.space.values
        if self.exhausted:
            return next_eigenvalue
        if self.guide_helps:
            # A sample's error along an eigenvector scales with the square root of the eigenvalue (it is a variance).
            ratio = (abs(self.model_next) / values[: len(self.guide_errors)].abs()).clamp_max(1.0).sqrt()
            next_eigenvalue = self.model_next + self.model_next_outside * float((self.guide_errors * ratio).max())
        if len(values) > self.k:
            next_eigenvalue = max(next_eigenvalue, float(values[self.k] + residual_norms[self.k]))
        return next_eigenvalue

    def _assess_guide(self, ritz: _RitzBounds) -> None:
        """Update ``guide_helps``, ``corrected`` and ``largest_residual``."""
        residual_norms, converged = ritz.residual_norms[: self.k], ritz.converged
        reduced = float(residual_norms[self.corrected].max()) < MIN_REDUCTION * self.largest_residual
        self.guide_helps = self.guide_helps and reduced
        # Converged pairs are not corrected, so their residuals do not measure the guide.
        self.corrected = converged if bool(converged.all()) else ~converged
        self.largest_residual = float(residual_norms[self.corrected].max())

    def _corrections(self, ritz: _RitzBounds, kth: Tensor) -> Tensor:
        """The model's eigenvectors for the unconverged pairs; ``kth`` (1,) is the k-th Ritz value."""
        k, space = self.k, self.space
        needed = torch.cat([CORRECTION_TOL * ritz.residual_norms[:k], GAP_TOL * kth.abs()])[: self.width]
        rows = torch.cat([ritz.residuals[:k] / self.scale, self.model_extra])
        model = _model_ritz_pairs(self.guide, space, rows, self.width, needed, self.limit, self.generator)
        self.model_next, self.model_next_outside = _next_pair(model, k, space.vectors)
        # Not a view: it would keep the model's vectors in memory.
        self.model_extra = self.model_extra.new_empty(0, self.model_extra.shape[1])
        return model.vectors[:k][(~ritz.converged).to(rows.device)]


def _model_ritz_pairs(
    guide: Matmat,
    space: _RitzSpace | None,
    rows: Tensor,
    width: int,
    needed: Tensor | None,
    limit: int,
    generator: torch.Generator,
) -> _RitzSpace:
    """The ``width`` largest Ritz pairs of the model operator, equal to H on ``space`` and to the guide G outside it.

    ``M = Q Q' H + H Q Q' - Q Q' H Q Q' + P G P``, Q the search space, ``P = I - Q Q'``. Its eigenvectors are computed
    in Q and further basis vectors: first ``rows``, then the residuals of the pairs, until every residual norm is at
    most ``needed`` (width,), by default GUIDE_TOL times the last but one Ritz value, or there are ``limit`` vectors.
    """
    basis, images = (rows[:0], rows[:0]) if space is None else (space.vectors, space.images)
    inside = torch.diag(space.values) if space is not None else torch.zeros(0, 0, dtype=torch.float64)
    outside = products = rows[:0]
    block = _orthonormal_to(rows, basis, generator)
    while True:
        outside, products = torch.cat([outside, block]), torch.cat([products, guide(block)])
        coupling, own = inner(outside, images), inner(outside, products)
        upper = torch.cat([inside, coupling.T], 1)
        values, rotation = descending(torch.cat([upper, torch.cat([coupling, (own + own.T) / 2], 1)]))
        values, rotation = values[:width], rotation[:, :width]
        in_space, in_outside = rotation[: len(basis)].T, rotation[len(basis) :].T
        vectors = combine(in_space, basis) + combine(in_outside, outside)
        model_images, _ = project_out(combine(in_outside, products), basis)
        model_images += combine(in_space, images) + combine(in_outside @ coupling, basis)
        pairs = _RitzSpace(vectors, model_images, values)
        residuals = pairs.residuals
        residual_norms = norms(residuals)
        tolerance = GUIDE_TOL * values[max(len(values) - 2, 0)].abs() if needed is None else needed
        unconverged = residuals[(residual_norms > tolerance).to(rows.device)]
        free = limit - len(basis) - len(outside)
        if not len(unconverged) or free <= 0:
            return pairs
        rows = unconverged[:free] / float(residual_norms.max())
        block = _orthonormal_to(rows, torch.cat([basis, outside]), generator)
        if not len(block):
            return pairs


def _extended(block: Tensor, image: Tensor, space: _RitzSpace | None, scale: float) -> _RitzSpace:
    """Rayleigh-Ritz on the search space extended by an orthonormal block with its true image."""
    vectors, images = block, image
    if space is not None:
        vectors, images = torch.cat([space.vectors, block]), torch.cat([space.images, image])
    projected = inner(vectors, images)
    require_symmetric(projected, scale, block.dtype)
    values, rotation = descending(projected)
    return _RitzSpace(combine(rotation.T, vectors), combine(rotation.T, images), values)


def _orthonormal_to(rows: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormalise unit-scale ``rows`` against ``basis``; dependent rows are replaced by random directions."""
    rest, _ = project_out(rows, basis)
    return orthonormalise(rest, basis, BREAKDOWN * torch.finfo(rows.dtype).eps, generator)[0]


def _next_pair(pairs: _RitzSpace, k: int, basis: Tensor) -> tuple[float, float]:
    """The (k+1)-th Ritz value (-inf without one) and the norm of its vector's component orthogonal to ``basis``."""
    if len(pairs.values) <= k:
        return float("-inf"), 0.0
    return float(pairs.values[k]), float(norms(project_out(pairs.vectors[k : k + 1], basis)[0]))
