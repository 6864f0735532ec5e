"""What a Lanczos run from a random start supports about eigenvalues that were missed.

The bounds on the eigenvalues that were found are in ``ritz.py`` (``ritz_bounds``).

No residual proves that the k eigenvalues found are the k largest. A start x that was drawn at random, independently of
what was found, has a part of known distribution along whatever is left, and a run from it that shows no trace of a
large eigenvalue makes one improbable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scipy.special import betainc, betaincinv, betaln
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import Matmat, SolverProgress, descending, require_symmetric, rounding
from sharpscope.linalg.vectors import (
    BREAKDOWN,
    combine,
    norms,
    orthonormalise,
    project_out,
    random_rows,
    require_orthonormal,
)

# Steps after which it gives up, unless told otherwise.
STEPS = 50

# Below this log the Beta integral is its first term: d^2 has no room for the next one, and soon none for itself.
SMALL = -50.0

# The log of about the least positive float64: what is improbable beyond it is still not impossible.
LEAST = -744.0


@dataclass(frozen=True)
class Certificate:
    """What one run from a random start orthogonal to ``found`` supports about ``lambda_{k+1}``.

    Attributes:
        probability: of a run as this one while an eigenvalue above ``above`` is left: at most this, whatever the
            operator. 1 where one was found, or nothing can be said; 0 only where the run exhausted the space or met an
            invariant subspace exactly.
        above: the threshold t.
        steps: products with one vector that were made.
        largest_ritz: the largest Ritz value of what is left, -inf without a step.
        vector: its Ritz vector (n,), where it is above the threshold: take it into the block and go on. Else None.
        alphas, betas: the run's tridiagonal matrix, and as the last beta the norm of what was left.
        order: n - k, the order of what is left.
        rounding: what rounding does to an eigenvalue; ``above`` and the limits are moved by it to the safe side.
    """

    probability: float
    above: float
    steps: int
    largest_ritz: float
    vector: Tensor | None = field(repr=False)
    alphas: tuple[float, ...] = field(repr=False)
    betas: tuple[float, ...] = field(repr=False)
    order: int
    rounding: float

    def limit(self, probability: float) -> float:
        """The least t such that no eigenvalue above t is left, but for that probability."""
        return upper_limit(self.alphas, self.betas, self.order, probability) + self.rounding


def certificate(
    matmat: Matmat,
    found: Tensor,
    *,
    above: float,
    probability: float = 0.01,
    max_steps: int | None = None,
    scale: float = 0.0,
    generator: torch.Generator,
    progress: SolverProgress | None = None,
) -> Certificate:
    """``P(an eigenvalue above t was missed)``, by Lanczos on ``P H P``, ``P = I - V' V``, from a random start.

    V = ``found``, k orthonormal rows, approximate eigenvectors: whatever their accuracy,
    ``lambda_{k+1}(H) <= lambda_max(P H P)`` (Cauchy). The run stops when the bound ``missed_probability`` reaches
    ``probability``, or a Ritz value above t proves that ``P H P`` has an eigenvalue there. Stopping when it suits does
    not weaken the bound: it errs, at whatever step, only if x has a component along the missed eigenvector that is too
    small, and that is one event. Runs repeated until one succeeds add their probabilities.

    Args:
        matmat: rows (b, n) to rows (b, n) times H, called with one row.
        found: (k, n), k >= 0, with the dtype and device of the computation.
        above: t. ``lambda_k`` itself asks for k eigenvalues that are the largest, and costs the more the closer
            ``lambda_{k+1}`` is; ``(1 + eps) lambda_k`` is cheaper.
        probability: when to stop, in (0, 1).
        max_steps: products after which to stop anyhow, by default 50. Memory: k + max_steps vectors.
        scale: the norm of H as far as it is known, for the rounding of its products.
        generator: source of the start, on the CPU. What it gives now must be independent of ``found``: pass the
            generator that the solver drew from, which goes on, never one of the same seed started again. A start that
            the solver had has no part along what the solver missed, and would certify just that.
        progress: called as ``progress(steps, probability)`` with what is supported so far.

    Cost: one product with one vector a step.

    Raises: ArgumentError for rows that are not orthonormal, arguments out of range, an H that is not symmetric.
    """
    _require(found, above, probability, max_steps)
    order = found.shape[1] - len(found)
    run = _Run.start(found, min(STEPS if max_steps is None else max_steps, order), scale, generator)
    largest, supported, vector = float("-inf"), 0.0 if order == 0 else 1.0, None
    while run.steps < run.most:
        run.multiply(matmat)
        values, rotation = descending(_tridiagonal(run.alphas, run.betas))
        largest = float(values[0])
        if largest - run.floor > above:
            supported, vector = 1.0, combine(rotation[:, :1].T, run.basis)[0]
        else:
            supported = missed_probability(run.alphas, run.betas, order, above - run.floor)
        if progress is not None:
            progress(run.steps, supported)
        if vector is not None or supported <= probability or run.broke_down or run.steps == run.most:
            break
        run.extend()
    return Certificate(
        probability=supported,
        above=above,
        steps=run.steps,
        largest_ritz=largest,
        vector=vector,
        alphas=tuple(run.alphas),
        betas=tuple(run.betas),
        order=order,
        rounding=run.floor,
    )


@dataclass
class _Run:
    """Lanczos on ``P H P`` from one random vector, with full reorthogonalisation against it all and what was found.

    Attributes:
        rows: (k + most, n), the k rows found, then the basis.
        projected: (most, most), ``Q' H Q`` above the diagonal as computed, and the betas below: to check symmetry.
        alphas, betas: of the steps made.
        rest: the remainder of the last product, whose norm is ``left``.
    """

    rows: Tensor
    num_found: int
    most: int
    scale: float
    generator: torch.Generator
    projected: Tensor
    rest: Tensor
    left: float = 0.0
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, found: Tensor, most: int, scale: float, generator: torch.Generator) -> _Run:
        """A random unit vector orthogonal to ``found``, where there is a step to make."""
        k, n = found.shape
        rows = found.new_empty(k + most, n)
        rows[:k] = found
        if most:
            start, _ = project_out(random_rows(1, found, generator), found)
            rows[k : k + 1], _ = orthonormalise(start, found, 0.0, generator)
        projected = torch.zeros(most, most, dtype=torch.float64)
        return cls(rows, k, most, scale, generator, projected, found[:0])

    @property
    def steps(self) -> int:
        """Products made."""
        return len(self.alphas)

    @property
    def basis(self) -> Tensor:
        """The orthonormal vectors multiplied so far (steps, n)."""
        return self.rows[self.num_found : self.num_found + self.steps]

    @property
    def floor(self) -> float:
        """What rounding does to an eigenvalue."""
        return rounding(self.scale, self.rows.dtype)

    @property
    def breakdown(self) -> float:
        """The norm below which a remainder is rounding."""
        return BREAKDOWN * torch.finfo(self.rows.dtype).eps * self.scale

    @property
    def broke_down(self) -> bool:
        """Whether the last remainder is rounding: the basis spans an invariant subspace."""
        return self.left <= self.breakdown

    def multiply(self, matmat: Matmat) -> None:
        """The product with the last basis vector: alpha, beta, and the remainder."""
        j, end = self.steps, self.num_found + self.steps + 1
        image = matmat(self.rows[end - 1 : end])
        self.scale = max(self.scale, float(norms(image)[0]))
        self.rest, coefficients = project_out(image, self.rows[:end])
        self.projected[: j + 1, j] = coefficients[self.num_found :, 0]
        require_symmetric(self.projected[: j + 1, : j + 1], self.scale, self.rows.dtype)
        self.alphas.append(float(self.projected[j, j]))
        self.left = float(norms(self.rest)[0])
        if not math.isfinite(self.left):
            raise ArgumentError("matmat must return finite numbers, got NaN or infinity.")
        # What is left of a residual after a breakdown is rounding, so it counts as large as rounding can make it.
        whole = j + 1 == self.rows.shape[1] - self.num_found
        self.betas.append(0.0 if whole else max(self.left, self.breakdown))

    def extend(self) -> None:
        """The remainder, orthonormalised, becomes the next basis vector."""
        j, end = self.steps, self.num_found + self.steps
        self.projected[j, j - 1] = self.left
        self.rows[end : end + 1], _ = orthonormalise(self.rest, self.rows[:end], 0.0, self.generator)


def missed_probability(alphas: Sequence[float], betas: Sequence[float], order: int, above: float) -> float:
    """A bound on the probability of such a run if A has an eigenvalue mu above t; 1 for t below a Ritz value.

    With ``q_0 = 1, q_1, ..., q_j`` the run's orthonormal polynomials, ``q_i(A) x`` is the i-th Lanczos vector, so for
    an eigenpair (mu, u) and any coefficients c, ``|sum c_i q_i(mu)| |<u, x>| <= ||c||``; the best of them says
    ``<u, x>^2 <= 1 / sum_i q_i(mu)^2 <= 1 / sum_i q_i(t)^2 =: d^2``, since each q_i grows beyond its largest root.
    For x uniform on the sphere, ``<u, x>^2`` is Beta(1/2, (order - 1)/2), so ``P(|<u, x>| <= d)`` is about
    ``d sqrt(2 order / pi)``.

    Van Dorsselaer, Hochstenbach and van der Vorst (2000) use q_j alone, ``d = beta_1 ... beta_j / prod (t - theta_i)``.
    The sum (Christoffel's function) gives never more, does not grow with j, and is the best that a run can support.

    Args:
        alphas, betas: j of each; ``betas[i]`` is the norm of what was left at step i + 1, so the last one is not in the
            tridiagonal matrix. x must be uniform on the sphere and must not have chosen the operator.
        order: the dimension in which x was drawn (n - k where k vectors are projected out).
        above: t.

    Raises: ArgumentError for numbers that are not finite.
    """
    if not all(map(math.isfinite, (*alphas, *betas, above))):
        raise ArgumentError(f"alphas, betas and the threshold must be finite, got {above} for the threshold.")
    return _within(_log_component(alphas, betas, above), order)


def upper_limit(alphas: Sequence[float], betas: Sequence[float], order: int, probability: float) -> float:
    """The least t, above the largest Ritz value, with ``missed_probability(alphas, betas, order, t) <= probability``.

    A confidence bound on the largest eigenvalue, rounded up by 1e-12 of its distance from the Ritz value; inf without a
    step. Arguments as for ``missed_probability``.

    Raises: ArgumentError unless the probability is between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ArgumentError(f"probability must be between 0 and 1, got {probability}.")
    if not alphas or order <= 1:
        return alphas[0] if alphas else (float("-inf") if order == 0 else float("inf"))
    top = float(descending(_tridiagonal(alphas, betas))[0][0])
    if min(betas) == 0:
        return top
    wanted = _log_quantile(probability, order)
    # q_j alone, with every Ritz value moved to the largest.
    wide = math.exp((sum(map(math.log, betas)) - wanted) / len(betas))
    low, high = 0.0, wide
    while high - low > 1e-12 * high and top + low < top + high:
        middle = (low + high) / 2
        if _log_component(alphas, betas, top + middle) <= wanted:
            high = middle
        else:
            low = middle
    return math.nextafter(top + high, math.inf)


def kuczynski_wozniakowski(order: int, steps: int, fraction: float) -> float:
    """``P(lambda_max - theta_1 > eps (lambda_max - lambda_min)) <= 1.648 sqrt(n) exp(-sqrt(eps) (2 j - 1))``.

    Before any run, for j = ``steps`` of it in dimension n = ``order``, eps = ``fraction`` in (0, 1); exact, so 0, for
    j >= n. Kuczynski and Wozniakowski 1992, for positive definite operators; a shift extends it to others.

    Raises: ArgumentError for a fraction out of range.
    """
    if not 0 < fraction < 1:
        raise ArgumentError(f"fraction must be between 0 and 1, got {fraction}.")
    if steps >= order:
        return 0.0
    if steps < 1:
        return 1.0
    return min(1.0, math.exp(math.log(1.648) + math.log(order) / 2 - math.sqrt(fraction) * (2 * steps - 1)))


def _log_component(alphas: Sequence[float], betas: Sequence[float], above: float) -> float:
    """``log d``, ``d^-2 = sum_i q_i(t)^2``: the most of itself that a missed eigenvector can have left in the start.

    The ratio of one polynomial to the next is ``q_i / q_{i-1} = p_i / beta_i`` with the pivots
    ``p_i = t - alpha_i - beta_{i-1}^2 / p_{i-1}`` of ``t - T``, all positive just if t is above every Ritz value.
    """
    log, logs = 0.0, [0.0]
    pivot, coupling = 1.0, 0.0
    for alpha, beta in zip(alphas, betas, strict=True):
        pivot = above - alpha - coupling * (coupling / pivot)
        if pivot < 0 or (pivot == 0 and beta > 0):
            return 0.0
        if beta == 0:
            # An invariant subspace: it holds a part of each eigenvector that the start has any part of.
            return -math.inf
        log += math.log(pivot) - math.log(beta)
        logs.append(log)
        coupling = beta
    most = max(logs)
    return -most - math.log(math.fsum(math.exp(2 * (value - most)) for value in logs)) / 2


def _within(log: float, order: int) -> float:
    """``P(|<u, x>| <= exp(log))`` for x uniform on the unit sphere in dimension ``order``."""
    if log >= 0 and order > 0:
        return 1.0
    if log == -math.inf or order <= 1:
        return 0.0
    if log > SMALL:
        return float(betainc(0.5, (order - 1) / 2, math.exp(2 * log)))
    return math.exp(max(log + math.log(2) - float(betaln(0.5, (order - 1) / 2)), LEAST))


def _log_quantile(probability: float, order: int) -> float:
    """The log of the d with ``P(|<u, x>| <= d) = probability``."""
    first = math.log(probability) - math.log(2) + float(betaln(0.5, (order - 1) / 2))
    return first if first < SMALL else math.log(float(betaincinv(0.5, (order - 1) / 2, probability))) / 2


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    """The matrix of the run (j, j), float64."""
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    for i, beta in enumerate(betas[: len(alphas) - 1]):
        matrix[i, i + 1] = matrix[i + 1, i] = beta
    return matrix


def _require(found: Tensor, above: float, probability: float, max_steps: int | None) -> None:
    """What ``certificate`` asks of its arguments."""
    if found.dim() != 2 or len(found) > found.shape[1] or found.dtype not in (torch.float32, torch.float64):
        came = f"{tuple(found.shape)} in {found.dtype}"
        raise ArgumentError(f"found must be rows (k, n) in float32 or float64 with k <= n, got {came}.")
    require_orthonormal(found, "The rows of found")
    if not math.isfinite(above):
        raise ArgumentError(f"The threshold must be finite, got {above}.")
    if not 0 < probability < 1:
        raise ArgumentError(f"probability must be between 0 and 1, got {probability}.")
    if max_steps is not None and max_steps < 1:
        raise ArgumentError(f"max_steps must be at least 1, got {max_steps}.")
