"""Few products with a costly operator, guided by a cheap one that resembles it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.lanczos import PRODUCTS
from sharpscope.linalg.missed_eigenvalue_bound import RandomStart, random_start
from sharpscope.linalg.ritz import (
    Matmat,
    RitzPairs,
    SolverProgress,
    descending,
    largest_relative,
    meets,
    rayleigh_ritz,
    require_symmetric,
    residual_vectors,
    ritz_bounds,
    rounding,
)
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
        return residual_vectors(self.values, self.vectors, self.images)

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

    Residuals come from true products. The bounds that decide when to stop, and those returned (``rayleigh_ritz``), take
    as ``lambda_{k+1}`` the larger of the model's, plus what G was seen to be off on eigenvectors times the part of the
    model's vector that G had a say in, and the (k+1)-th Ritz value plus its residual. Where the guide is of no help the
    corrections are the residuals, and the iteration is a block Lanczos one with thick restart.

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
    search = _Search.start(guides, like, k, limit, generator, initial)
    while True:
        search.expand(matmat)
        ritz = search.assess(tol)
        if progress is not None:
            progress(search.products, largest_relative(ritz.bounds, search.space.values[:k], ritz.floor, tol))
        converged = bool(ritz.met.all()) and search.probes.age >= LEAST and not (ritz.surprised and search.helpful)
        if search.exhausted or search.products >= most or converged:
            return search.pairs(ritz, tol)
        search.choose_block(ritz)


@dataclass(frozen=True)
class _RitzBounds:
    """What is known of the k leading Ritz pairs before they are corrected.

    Attributes:
        residuals: ``H q - theta q`` (q, n) of all pairs of the space, with their ``lengths`` (q,).
        bounds: (k,) by ``ritz_bounds``, ``next_above`` the estimate of ``lambda_{k+1}`` from above in them.
        met: (k,) whether the bound is within tolerance, or at rounding, ``floor``.
        surprised: whether a wanted vector stems from a random vector.
    """

    residuals: Tensor
    lengths: Tensor
    bounds: Tensor
    next_above: float
    met: Tensor
    floor: float
    surprised: bool


@dataclass
class _Probes:
    """Random vectors in the search, which show what the guide does not see.

    Attributes:
        origin: as they were generated, orthonormal rows outside of the search space of that time.
        descendants: the orthonormal rows that came of them, in all blocks since.
        age: products since.
        bound: what they say of eigenvalues that were missed; no longer updated once the search space was ``cut``, since
            the vectors dropped took some of the random vectors with them.
    """

    origin: Tensor
    descendants: Tensor
    age: int = 0
    bound: RandomStart | None = None
    cut: bool = False


@dataclass
class _Search:
    """The state of the iteration: the search space, the next block, and what the guide says of ``lambda_{k+1}``.

    Attributes:
        guide: the last of the guides; ``helpful`` while its corrections bring the residuals down.
        block: what is multiplied next, orthonormal rows; the last ``carried`` of them come of the probes, and
            ``probe_images`` are their products.
        next_guided: the (k+1)-th eigenvalue of the model; ``beyond``: how much of its vector is outside of the space.
        spare: the model's vectors after the first k, a start for the next model.
        guided_images: the guide's products with the first block, less the probes; ``off``: how far H's are from them.
        scale: the norm of H as far as it is known.
        sought: (k,) whose residuals must fall, and ``worst``: the largest of them at the last product.
    """

    guide: Matmat
    k: int
    width: int
    limit: int
    generator: torch.Generator
    space: _Space
    block: Tensor
    carried: int
    probes: _Probes
    next_guided: float
    beyond: float
    spare: Tensor
    guided_images: Tensor
    off: Tensor
    sought: Tensor
    probe_images: Tensor
    helpful: bool = True
    worst: float = float("inf")
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
        """The guide's leading eigenvectors (or ``initial``) and random vectors as the first block."""
        width = min(k + 1, like.shape[1])
        rows, guide = random_rows(width + 1, like, generator), guides[-1]
        for coarse in guides[:-1]:
            rows = _model(coarse, None, rows, width, None, limit, generator).vectors
        model = _model(guide, None, rows, width, None, limit, generator)
        first, guided_images = model.vectors[:k], model.images[:k]
        next_guided, beyond = _next(model, k, like)
        if initial is not None:
            first = _orthonormal(initial, like, generator)
            guided_images = guide(first)
        origin = _orthonormal(random_rows(RANDOM, like, generator), first, generator)
        return cls(
            guide=guide,
            k=k,
            width=width,
            limit=limit,
            generator=generator,
            space=_Space(like, like, torch.zeros(0, dtype=torch.float64)),
            block=torch.cat([first, origin]),
            carried=len(origin),
            probes=_Probes(origin, like),
            next_guided=next_guided,
            beyond=beyond,
            spare=model.vectors[k:],
            guided_images=guided_images,
            off=torch.zeros(len(first), dtype=torch.float64),
            sought=torch.ones(k, dtype=torch.bool),
            probe_images=like,
        )

    @property
    def exhausted(self) -> bool:
        """Whether the search space is the whole space."""
        return len(self.space.values) == self.space.vectors.shape[1]

    def expand(self, matmat: Matmat) -> None:
        """One product of H with the block, and Rayleigh-Ritz on the search space with it."""
        image = matmat(self.block)
        self.products, self.matvecs = self.products + 1, self.matvecs + len(self.block)
        descendants = self.block[len(self.block) - self.carried :]
        self.probes.age += 1
        self.probes.descendants = torch.cat([self.probes.descendants, descendants])
        self.probe_images = image[len(self.block) - self.carried :]
        self.scale = max(self.scale, float(norms(image).max()))
        if self.products == 1:
            self.off = norms(image[: len(self.off)] - self.guided_images)
        self.space = _ritz(self.block, image, self.space if self.products > 1 else None, self.scale)
        self.scale = max(self.scale, float(self.space.values.abs().max()))

    def assess(self, tol: float) -> _RitzBounds:
        """Residuals and bounds of the leading pairs, and what the probes show."""
        k, space, probes = self.k, self.space, self.probes
        values, residuals = space.values, space.residuals
        lengths, floor = norms(residuals), rounding(self.scale, residuals.dtype)
        next_above = self._next_above(lengths)
        gram = inner(residuals, residuals)
        bounds = ritz_bounds(values[:k], gram[:k, :k], next_above)
        if not probes.cut:
            coordinates = inner(space.vectors[k:], probes.origin)
            probes.bound = random_start(coordinates, values, gram, k, residuals.shape[1])
        return _RitzBounds(
            residuals=residuals,
            lengths=lengths,
            bounds=bounds,
            next_above=next_above,
            met=meets(bounds, values[:k], floor, tol),
            floor=floor,
            surprised=bool((inner(space.vectors[:k], probes.descendants).square().sum(1) > SURPRISE).any()),
        )

    def pairs(self, ritz: _RitzBounds, tol: float) -> RitzPairs:
        """The result."""
        return rayleigh_ritz(
            self.space.vectors[: self.k],
            self.space.images[: self.k],
            next_above=ritz.next_above,
            scale=self.scale,
            tol=tol,
            num_matvecs=self.matvecs,
            num_products=self.products,
            start=None if ritz.surprised and not self.exhausted else self.probes.bound,
        )

    def choose_block(self, ritz: _RitzBounds) -> None:
        """The next block: corrections of the pairs that are not met, and what the probes have outside of the space."""
        probe = self.probe_images if self.probes.age == 1 else ritz.residuals[self.k : self.k + 1]
        kth = self.space.values[self.k - 1 : self.k]
        # A space that may become the whole one has no need to be cut.
        if self.limit < self.block.shape[1] and len(self.space.values) + self.width + RANDOM > self.limit:
            self.space, self.probes.cut = self.space.leading(self.limit // 2), True
        was_helpful = self.helpful
        self._judge_guide(ritz)
        block = self._corrections(ritz, kth) if self.helpful else ritz.residuals[: self.k] / self.scale
        if was_helpful and (ritz.surprised or not self.helpful):
            rows = random_rows(RANDOM, self.block, self.generator)
            origin = _orthonormal(rows, self.space.vectors, self.generator)
            self.probes = _Probes(origin, origin[:0])
            block, probe = torch.cat([block, probe / self.scale]), self.scale * origin
        self.block = _orthonormal(torch.cat([block, probe / self.scale]), self.space.vectors, self.generator)
        self.carried = min(len(probe), len(self.block))

    def _next_above(self, lengths: Tensor) -> float:
        """An estimate from above of ``lambda_{k+1}``: by the model and by the (k+1)-th Ritz value, the larger."""
        next_above, values = float("-inf"), self.space.values
        if self.exhausted:
            return next_above
        if self.helpful:
            # What a sample is off along an eigenvector goes like the root of its eigenvalue, as a variance does.
            share = (abs(self.next_guided) / values[: len(self.off)].abs()).clamp_max(1.0).sqrt()
            next_above = self.next_guided + self.beyond * float((self.off * share).max())
        if len(values) > self.k:
            next_above = max(next_above, float(values[self.k] + lengths[self.k]))
        return next_above

    def _judge_guide(self, ritz: _RitzBounds) -> None:
        """Note whether the last corrections brought the residuals down, and whose residuals the next ones must."""
        lengths, met = ritz.lengths[: self.k], ritz.met
        self.helpful = self.helpful and float(lengths[self.sought].max()) < HELP * self.worst
        # Those that are met are not corrected, and their residuals say nothing.
        self.sought = met if bool(met.all()) else ~met
        self.worst = float(lengths[self.sought].max())

    def _corrections(self, ritz: _RitzBounds, kth: Tensor) -> Tensor:
        """The model's leading eigenvectors for the pairs that are not met; ``kth`` (1,) is the k-th Ritz value."""
        k, space = self.k, self.space
        needed = torch.cat([INNER * ritz.lengths[:k], NEXT * kth.abs()])[: self.width]
        rows = torch.cat([ritz.residuals[:k] / self.scale, self.spare])
        model = _model(self.guide, space, rows, self.width, needed, self.limit, self.generator)
        self.next_guided, self.beyond = _next(model, k, space.vectors)
        self.spare = self.spare.new_empty(0, self.spare.shape[1])  # a view would hold the model's vectors
        return model.vectors[:k][(~ritz.met).to(rows.device)]


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
