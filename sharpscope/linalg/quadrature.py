"""Stochastic Lanczos quadrature: the spectral density of an operator from a few random vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.vectors_as_rows import (
    BREAKDOWN,
    Matmat,
    as_row_operator,
    deflated,
    norms,
    orthogonal_unit_row,
    project_out,
    random_rows,
    require_dtype,
    require_orthonormal,
    require_small_asymmetry,
    rounding_error,
)
from sharpscope.random_streams import stream_from

# What known eigenpairs leave of the image of a vector orthogonal to them, where it is rounding alone, in units of their
# products' rounding error over sqrt(n). Measured on dense operators of order 20 to 200: 0.003 to 0.03.
NOISE = 0.125


@dataclass(frozen=True)
class Quadrature:
    """``v' f(H) v ~ sum_j weights_j f(nodes_j)`` for each probe v; on average over probes that is ``tr f(H) / n``.

    Attributes:
        nodes: float64 (K, d + s). In each row the d known eigenvalues, then the Ritz values of that probe, ascending.
        weights: float64 (K, d + s), not negative, each row's sum 1: 1/n for a known eigenvalue, and (n - d)/n times the
            squared first components of T's eigenvectors for the others. If a run ended before s steps, the row
            is padded with copies of a node of weight 0.
        probes: (K, n), the starting unit vectors, orthogonal to the known eigenvectors.
        images: (K, n), ``(I - P) H`` of the probes, P the projector on the known eigenvectors, for a trace
            estimate.
        num_products: products with a block of vectors, and ``num_matvecs``: with one vector.
    """

    nodes: Tensor
    weights: Tensor
    probes: Tensor
    images: Tensor
    num_products: int
    num_matvecs: int


def lanczos_quadrature(
    matmat: Matmat,
    n: int,
    probes: int = 6,
    steps: int = 32,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Quadrature:
    """Gauss quadratures of the spectral measures of ``probes`` independent random vectors (Golub and Meurant 2010).

    Each probe, uniform on the sphere, has its own Lanczos run with full reorthogonalisation against its own basis; all
    runs advance together, so a step is one product with a block of at most ``probes`` vectors. A run whose
    next vector is rounding error has found an invariant subspace: its quadrature is exact, and it leaves the block.

    Args:
        matmat: ``V`` (n, b) to ``H V`` (n, b), H symmetric.
        n: the order of H.
        probes: independent vectors K.
        steps: of Lanczos, s: a row is exact for polynomials up to degree 2s - 1; at most n - d are taken.
        known: eigenvalues (d,) and orthonormal eigenvectors (n, d) that are deflated and added exactly with weight
            1/n each. The rest of the spectrum is then resolved on its own scale.
        dtype, device: of the vectors; inner products and small matrices are float64.
        generator: source of the probes, on the CPU; by default one seeded with 0.

    Cost: ``steps`` products with a block; memory, ``probes * steps`` vectors.

    Raises: ArgumentError for arguments out of range, a matmat with a wrong shape, NaN, or that is not symmetric.

    >>> import torch
    >>> from sharpscope.linalg import lanczos_quadrature
    >>> diagonal = torch.tensor([5.0, 2.0, 2.0, 2.0], dtype=torch.float64)[:, None]
    >>> rule = lanczos_quadrature(lambda V: diagonal * V, n=4, probes=2, steps=2)
    >>> rule.nodes.round(decimals=6).tolist()  # two steps find two eigenvalues
    [[2.0, 5.0], [2.0, 5.0]]
    >>> [round(total, 6) for total in rule.weights.sum(1).tolist()]
    [1.0, 1.0]
    """
    require_dtype(dtype)
    like = torch.empty(0, n, dtype=dtype, device=device)
    return lanczos_quadrature_rows(
        as_row_operator(matmat, like), like, probes, steps, known=_known_as_rows(known, like), generator=generator
    )


def lanczos_quadrature_rows(
    rows: Matmat,
    like: Tensor,
    probes: int = 6,
    steps: int = 32,
    *,
    known: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Quadrature:
    """``lanczos_quadrature`` of an operator on rows, whose results are not checked.

    Args:
        rows: rows (b, n) to (b, n), a new contiguous tensor like ``like``; it must leave its argument as it was.
        like: (0, n), for n, dtype and device.
        known: eigenvalues (d,), float64 on the CPU, and orthonormal eigenvectors as rows (d, n).
    """
    n = like.shape[1]
    require_probes(n, probes, steps)
    source = stream_from(generator, "probes")
    values, vectors = known_pairs(known, like)
    operator = deflated(rows, vectors)
    start = block = images = random_unit_rows(probes, like, vectors, source)
    noise = rounding_error(float(values.abs().max()), like.dtype) if len(values) else 0.0
    runs = _LanczosRuns.start(probes, min(steps, n - len(vectors)), vectors, noise)
    while len(block):
        image = operator(block)
        if not runs.steps:
            images = image
        block = runs.advance(block, image)
    rules = [runs.rule(probe) for probe in range(probes)]
    share = (n - len(values)) / n
    return Quadrature(
        nodes=torch.stack([torch.cat([values, nodes]) for nodes, _ in rules]),
        weights=torch.stack([torch.cat([torch.full_like(values, 1 / n), share * w]) for _, w in rules]),
        probes=start,
        images=images,
        num_products=runs.steps,
        num_matvecs=runs.matvecs,
    )


@dataclass
class _LanczosRuns:
    """Lanczos runs from K vectors, advanced together, each with its own basis.

    Attributes:
        bases: (K, depth, n).
        alphas, betas: (K, depth), float64: the runs' Jacobi matrices.
        lengths: steps of each run, ``depth`` at most.
        running: indices of the runs that have not ended.
        known: (d, n), to which every basis stays orthogonal; ``noise``: rounding error of their products, which is in
            the rest of each product.
        steps: products with a block, and ``matvecs``: with one vector.
    """

    bases: Tensor
    alphas: Tensor
    betas: Tensor
    lengths: list[int]
    running: list[int]
    known: Tensor
    noise: float
    steps: int = 0
    matvecs: int = 0
    scale: float = 0.0

    @classmethod
    def start(cls, count: int, depth: int, known: Tensor, noise: float) -> _LanczosRuns:
        """``count`` runs of at most ``depth`` steps."""
        alphas, betas = (torch.zeros(count, depth, dtype=torch.float64) for _ in range(2))
        bases = known.new_empty(count, depth, known.shape[1])
        return cls(bases, alphas, betas, [depth] * count, list(range(count)), known, noise)

    def advance(self, block: Tensor, image: Tensor) -> Tensor:
        """Advance each run by one step, given the products; return the next vectors of the runs that continue."""
        step, depth, dtype = self.steps, self.bases.shape[1], block.dtype
        self.steps, self.matvecs = step + 1, self.matvecs + len(block)
        self.scale = max(self.scale, float(norms(image).max()))
        breakdown = max(BREAKDOWN * torch.finfo(dtype).eps * self.scale, NOISE * self.noise / image.shape[1] ** 0.5)
        next_rows, still_running = [block[:0]], []
        for row, probe in enumerate(self.running):
            self.bases[probe, step] = block[row]
            rest, coefficients = project_out(image[row : row + 1], self.bases[probe, : step + 1])
            beta = float(self.betas[probe, step - 1]) if step else 0.0
            _require_three_terms(coefficients[:, 0], beta, self.scale, dtype, self.noise)
            self.alphas[probe, step] = coefficients[step, 0]
            length = float(norms(rest)[0])
            if length <= breakdown or step + 1 == depth:
                self.lengths[probe] = step + 1
                continue
            self.betas[probe, step] = length
            rest = rest / length
            if len(self.known):  # a short remainder, divided by its length, has lost its orthogonality to them
                rest = orthogonal_unit_row(rest, self.known, self.bases[probe, : step + 1])[None]
            next_rows.append(rest)
            still_running.append(probe)
        self.running = still_running
        return torch.cat(next_rows)

    def rule(self, probe: int) -> tuple[Tensor, Tensor]:
        """The Gauss quadrature of one run."""
        size = self.lengths[probe]
        return _gauss_rule(self.alphas[probe, :size], self.betas[probe, : size - 1], self.bases.shape[1])


def require_probes(n: int, probes: int, steps: int = 1) -> None:
    """Raise ArgumentError unless ``probes`` and ``steps`` are valid; call it before any product."""
    if not isinstance(probes, int) or isinstance(probes, bool) or not 2 <= probes <= n:
        raise ArgumentError(
            f"probes must be at least 2, or nothing says how far they scatter, and at most the number of parameters "
            f"({n}), got {probes}."
        )
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(f"steps must be at least 1, got {steps}.")


def _known_as_rows(known: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Convert eigenvalues (d,) and eigenvectors (n, d) to float64 on the CPU and to rows (d, n) like ``like`` (0, n).

    Raises: ArgumentError if their shapes do not match.
    """
    if known is None:
        return None
    values, n = known[0].detach().cpu().double(), like.shape[1]
    if values.dim() != 1 or known[1].shape != (n, len(values)) or len(values) >= n:
        came = f"{tuple(values.shape)} and {tuple(known[1].shape)}"
        raise ArgumentError(f"Known pairs must be of shapes (d,) and ({n}, d) with d < {n}, got {came}.")
    return values, known[1].detach().T.to(like).contiguous()


def known_pairs(known: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Known eigenvalues (d,) and eigenvectors, rows (d, n), none by default.

    Raises: ArgumentError when the vectors are not orthonormal.
    """
    if known is None:
        return torch.zeros(0, dtype=torch.float64), like
    require_orthonormal(known[1], "Known eigenvectors")
    return known


def random_unit_rows(count: int, like: Tensor, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """``count`` independent rows, uniform on the unit sphere of the orthogonal complement of ``vectors``."""
    rows, _ = project_out(random_rows(count, like, generator), vectors)
    return rows / norms(rows).to(rows)[:, None]


def _gauss_rule(alphas: Tensor, betas: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a Jacobi matrix (Golub and Welsch 1969), padded to ``depth`` with weight 0."""
    values, vectors = torch.linalg.eigh(torch.diag(alphas) + torch.diag(betas, 1) + torch.diag(betas, -1))
    weights = vectors[0].square()
    missing = depth - len(values)
    return torch.cat([values, values[-1:].expand(missing)]), torch.cat([weights / weights.sum(), torch.zeros(missing)])


def _require_three_terms(coefficients: Tensor, beta: float, scale: float, dtype: torch.dtype, noise: float) -> None:
    """Raise ArgumentError unless ``q_{j-1}' H q_j = beta_{j-1}`` and ``q_i' H q_j = 0`` for i < j - 1 (H symmetric)."""
    before = coefficients[:-1].clone()
    if len(before):
        before[-1] -= beta
        require_small_asymmetry(float(before.abs().max()), scale, dtype, noise)
