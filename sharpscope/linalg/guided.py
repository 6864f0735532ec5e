"""Few products with a costly operator, guided by a cheap one that resembles it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.bounds import ritz_bounds
from sharpscope.linalg.lanczos import PRODUCTS
from sharpscope.linalg.ritz import (
    Matmat,
    RitzPairs,
    SolverProgress,
    descending,
    largest_relative,
    rayleigh_ritz,
    require_symmetric,
    rounding,
)
from sharpscope.linalg.missed_eigenvalue_bound import random_start
from sharpscope.linalg.vectors import BREAKDOWN, combine, inner, norms, orthonormalise, project_out, random_rows

# A guide's own eigenvectors are found to residuals of this fraction of the k-th eigenvalue: a subset of some thousand
# examples is itself off by 3 to 10 % (seen on a small CNN), so more would be wasted.
START = 0.08

# Inner residuals fall to this fraction of the outer ones: the guide's error leaves 5 to 15 % of them anyway.
INNER = 0.1

# The (k+1)-th eigenvector serves the gap alone, so a rough one does.
NEXT = 0.15

# A guide that does not bring the worst residual below this fraction in a pass is no help.
HELP = 0.5

# Products before it may stop: the random vectors that ride along have shown nothing before their second.
LEAST = 2

# Their number; each costs 2 gradients in each of the first two passes. Of 100 guides that were good but blind to
# lambda_5, 16 hid it from one random vector and none from two; of 100 blind to lambda_3, 7 and 1. A weighted sample of
# the data is not blind, and what one vector leaves open is stated (RandomStart), and can be paid for (certificate).
RANDOM = 1

# The share of a wanted vector that may stem from a random vector. One that does was found by it, and takes all that the
# random vector has in its eigenspace: of further copies it shows nothing any more, and another one must be drawn.
SURPRISE = 0.1


@dataclass(frozen=True)
class _Space:
    """Ritz vectors (q, n) of a search space, their images (q, n), and their values (q,), descending."""

    vectors: Tensor
    images: Tensor
    values: Tensor

    @property
    def residuals(self) -> Tensor:
        """``H q - theta q`` (q, n)."""
        return self.images - self.values.to(self.vectors)[:, None] * self.vectors

    def leading(self, count: int) -> _Space:
        """The first ``count`` pairs."""
        return _Space(self.vectors[:count], self.images[:count], self.values[:count])


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
    """The k largest eigenpairs of H in few block products, given a cheap operator G that resembles it.

    1. The leading eigenvectors of G, the last of ``guides``, to the accuracy that G deserves, by block Lanczos from
       those of the guide before it; of the first, from random vectors.
    2. One product of H with k of them and RANDOM random vectors; Rayleigh-Ritz.
    3. The model: the operator that is H on the search space and G outside of it (the least change of G that agrees with
       every product of H so far). What its leading eigenvectors have outside of the search space are the corrections,
       to second order those of Jacobi and Davidson (Sleijpen and van der Vorst 1996). Those of the pairs whose bound is
       not met, and what the random vectors' images have outside, are the next block; after that of the random ones only
       the residual of pair k + 1. Back to Rayleigh-Ritz.

    Residuals come from true products. Bounds take as ``lambda_{k+1}`` the larger of the model's, plus what G was seen
    to be off on eigenvectors times the part of the model's vector that G had a say in, and the (k+1)-th Ritz value plus
    its residual. Where the guide is of no help the corrections are the residuals, and the iteration is a block Lanczos
    one with thick restart.

    Cost: k + RANDOM products with H in the first pass (one more for each row of ``initial`` beyond k), at most as many
    in the second and k + 1 in each later one, RANDOM more where a random vector is drawn anew; two passes at the least;
    some 25 products with each guide.

    Args: as ``top_eigenpairs``; ``like`` (0, n) carries n, dtype and device; ``guides`` take and give rows, as
        ``matmat`` does; ``initial``: rows (b, n) for the first block in place of the guide's eigenvectors.
    """
    n = like.shape[1]
    width = min(k + 1, n)
    limit = min(n, 8 * width) if max_basis is None else min(n, max_basis)
    if limit < min(n, 4 * width):
        raise ArgumentError(f"max_basis must be at least {4 * width} for k = {k} (four blocks), got {max_basis}.")
    most = PRODUCTS if max_products is None else max_products

    rows, guide = random_rows(width + 1, like, generator), guides[-1]
    for coarse in guides[:-1]:
        rows = _model(coarse, None, rows, width, None, limit, generator).vectors
    start = _model(guide, None, rows, width, None, limit, generator)
    (next_guided, beyond), spare = _next(start, k, like), start.vectors[k:]
    first, guided_images = start.vectors[:k], start.images[:k]
    if initial is not None:
        first = _orthonormal(initial, like, generator)
        guided_images = guide(first)
    origin = _orthonormal(random_rows(RANDOM, like, generator), first, generator)
    block, space, carried = torch.cat([first, origin]), None, len(origin)
    products, matvecs, scale, worst, helpful, restarted, said = 0, 0, 0.0, float("inf"), True, False, None
    off = torch.zeros(len(first), dtype=torch.float64)
    sought = torch.ones(k, dtype=torch.bool)  # whose residuals must fall
    # Products since the random vectors were drawn, and what has come of them.
    age, drawn = 0, like
    while True:
        image = matmat(block)
        products, matvecs, age = products + 1, matvecs + len(block), age + 1
        drawn = torch.cat([drawn, block[len(block) - carried :]])
        probe = image[len(block) - carried :]
        scale = max(scale, float(norms(image).max()))
        if space is None:
            off = norms(image[: len(first)] - guided_images)
        space = _ritz(block, image, space, scale)
        values, residuals = space.values, space.residuals
        scale = max(scale, float(values.abs().max()))
        outer, floor, whole = norms(residuals), rounding(scale, like.dtype), len(values) == n
        next_above = float("-inf")
        if helpful and not whole:
            # What a sample is off along an eigenvector goes like the root of its eigenvalue, as a variance does.
            share = (abs(next_guided) / values[: len(off)].abs()).clamp_max(1.0).sqrt()
            next_above = next_guided + beyond * float((off * share).max())
        if len(values) > k and not whole:
            next_above = max(next_above, float(values[k] + outer[k]))
        gram = inner(residuals, residuals)
        bounds = ritz_bounds(values[:k], gram[:k, :k], next_above)
        if not restarted:
            said = random_start(inner(space.vectors[k:], origin), values, gram, k, n)
        if progress is not None:
            progress(products, largest_relative(bounds, values[:k], floor, tol))
        surprised = bool((inner(space.vectors[:k], drawn).square().sum(1) > SURPRISE).any())
        met = (bounds + floor <= tol * values[:k].abs()) | (bounds <= floor)
        done = bool(met.all()) and age >= LEAST and not (surprised and helpful)
        if whole or products >= most or done:
            return rayleigh_ritz(
                space.vectors[:k],
                space.images[:k],
                next_above=next_above,
                scale=scale,
                tol=tol,
                num_matvecs=matvecs,
                num_products=products,
                start=None if surprised and not whole else said,
            )
        if age > 1:
            probe = residuals[k : k + 1]
        if len(values) + width + RANDOM > limit:
            # What is let go took part of the random vector with it.
            space, restarted = space.leading(limit // 2), True
        before, helpful = helpful, helpful and float(outer[:k][sought].max()) < HELP * worst
        # Those that are met are not corrected, and their residuals say nothing.
        sought = met if bool(met.all()) else ~met
        worst = float(outer[:k][sought].max())
        if helpful:
            needed = torch.cat([INNER * outer[:k], NEXT * values[k - 1 : k].abs()])[:width]
            rows = torch.cat([residuals[:k] / scale, spare])
            model = _model(guide, space, rows, width, needed, limit, generator)
            (next_guided, beyond), spare = _next(model, k, space.vectors), like
            block = model.vectors[:k][(~met).to(like.device)]
        else:
            block = residuals[:k] / scale
        if before and (surprised or not helpful):
            origin = _orthonormal(random_rows(RANDOM, like, generator), space.vectors, generator)
            age, drawn, said, restarted = 0, like, None, False
            block, probe = torch.cat([block, probe / scale]), scale * origin
        block = _orthonormal(torch.cat([block, probe / scale]), space.vectors, generator)
        carried = min(len(probe), len(block))


def _model(
    guide: Matmat,
    space: _Space | None,
    rows: Tensor,
    width: int,
    needed: Tensor | None,
    limit: int,
    generator: torch.Generator,
) -> _Space:
    """The ``width`` leading Ritz pairs of the operator that is H on ``space`` and the guide outside of it.

    ``M = Q Q' H + H Q Q' - Q Q' H Q Q' + P G P``, Q the space, ``P = I - Q Q'``. The space outside is spanned from
    ``rows`` by residuals until each is at most ``needed`` (width,), by default START times the last value but one, or
    ``limit`` vectors are there.
    """
    basis, images = (rows[:0], rows[:0]) if space is None else (space.vectors, space.images)
    inside = torch.diag(space.values) if space is not None else torch.zeros(0, 0, dtype=torch.float64)
    outside = products = rows[:0]
    block = _orthonormal(rows, basis, generator)
    while True:
        outside, products = torch.cat([outside, block]), torch.cat([products, guide(block)])
        coupling, own = inner(outside, images), inner(outside, products)
        upper = torch.cat([inside, coupling.T], 1)
        values, rotation = descending(torch.cat([upper, torch.cat([coupling, (own + own.T) / 2], 1)]))
        values, rotation = values[:width], rotation[:, :width]
        within, beyond = rotation[: len(basis)].T, rotation[len(basis) :].T
        vectors = combine(within, basis) + combine(beyond, outside)
        found, _ = project_out(combine(beyond, products), basis)
        found += combine(within, images) + combine(beyond @ coupling, basis)
        pairs = _Space(vectors, found, values)
        residuals = pairs.residuals
        size = norms(residuals)
        enough = START * values[max(len(values) - 2, 0)].abs() if needed is None else needed
        missing = residuals[(size > enough).to(rows.device)]
        room = limit - len(basis) - len(outside)
        if not len(missing) or room <= 0:
            return pairs
        known = torch.cat([basis, outside])
        block = _orthonormal(missing[:room] / float(size.max()), known, generator)
        if not len(block):
            return pairs


def _ritz(block: Tensor, image: Tensor, space: _Space | None, scale: float) -> _Space:
    """Rayleigh-Ritz on the space and a further orthonormal block with its true image."""
    vectors, images = block, image
    if space is not None:
        vectors, images = torch.cat([space.vectors, block]), torch.cat([space.images, image])
    projected = inner(vectors, images)
    require_symmetric(projected, scale, block.dtype)
    values, rotation = descending(projected)
    return _Space(combine(rotation.T, vectors), combine(rotation.T, images), values)


def _orthonormal(rows: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal rows outside of the orthonormal ``basis``; of rows whose rounding is that of 1, random where lost."""
    rest, _ = project_out(rows, basis)
    return orthonormalise(rest, basis, BREAKDOWN * torch.finfo(rows.dtype).eps, generator)[0]


def _next(pairs: _Space, k: int, basis: Tensor) -> tuple[float, float]:
    """The (k+1)-th value, -inf where there is none, and how much of its vector is outside of the ``basis``."""
    if len(pairs.values) <= k:
        return float("-inf"), 0.0
    return float(pairs.values[k]), float(norms(project_out(pairs.vectors[k : k + 1], basis)[0]))
