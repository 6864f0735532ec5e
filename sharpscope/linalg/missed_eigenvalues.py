"""Bound the probability that an eigenvalue larger than those found was missed.

A residual proves that an eigenvalue is near a Ritz value (``ritz.ritz_bounds``), but not that the k eigenvalues found
are the k largest. A random starting vector gives evidence: it has a component of known distribution along every
eigenvector, so a Lanczos run from it that shows no large Ritz value makes a large eigenvalue improbable.

- ``certificate``: a separate Lanczos run, orthogonal to the eigenvectors found.
- ``MissedEigenvalueBound``: the same from the random vectors in the search space of a solver, without further products.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from scipy.special import betainc, betaincinv, betaln
from torch import Tensor

from sharpscope.errors import ArgumentError
from sharpscope.linalg.ritz import SolverProgress, descending
from sharpscope.linalg.vectors_as_rows import (
    BREAKDOWN,
    Matmat,
    combine,
    norms,
    orthonormalise,
    project_out,
    random_rows,
    require_orthonormal,
    require_symmetric,
    rounding_error,
)

# Lanczos steps before the run gives up, by default.
STEPS = 50

# Below this log d, the first term of the incomplete Beta integral is exact in float64 (and d^2 soon underflows).
LOG_SMALL = -50.0

# About the log of the smallest positive float64. Positive probabilities are rounded up to it, never down to 0.
LOG_TINY = -744.0

# ``MissedEigenvalueBound`` is evaluated at t and beyond, up to 100 times its distance from the largest Ritz value: the
# bound decreases with the eigenvalue in a Krylov space, and nearly so in other search spaces.
GRID = torch.logspace(0, 2, 33, dtype=torch.float64) - 1


@dataclass(frozen=True)
class Certificate:
    """The evidence of one Lanczos run, started at random and orthogonal to k vectors, about ``lambda_{k+1}``.

    Attributes:
        probability: an upper bound, for any operator, on the probability of such a run if there is a (k+1)-th
            eigenvalue above ``above``. 1 if the run found one, or supports nothing; 0 only if the run exhausted the
            space or met an invariant subspace exactly.
        above: the threshold t.
        steps: products with one vector.
        largest_ritz: the largest Ritz value of the deflated operator, -inf without a step.
        vector: its Ritz vector (n,) if the Ritz value is above t, else None. Add it to the block and solve again.
        alphas, betas: the tridiagonal matrix of the run; the last beta is the norm of the last remainder.
        order: n - k, the dimension of the deflated operator.
        rounding: the rounding error of an eigenvalue; the threshold and the limits are shifted by it to the safe side.
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

    def upper_limit(self, probability: float) -> float:
        """Return an upper confidence limit on ``lambda_{k+1}``, exceeded with at most this probability."""
        return upper_limit(self.alphas, self.betas, self.order, probability) + self.rounding


def certificate(
    matmat: Matmat,
    eigenvectors: Tensor,
    *,
    above: float,
    probability: float = 0.01,
    max_steps: int | None = None,
    scale: float = 0.0,
    generator: torch.Generator,
    progress: SolverProgress | None = None,
) -> Certificate:
    """Bound the probability that an eigenvalue above t was missed, by Lanczos on ``P H P`` from a random start.

    ``P = I - V' V``, V the k orthonormal rows ``eigenvectors``. They may be approximate: for any V,
    ``lambda_{k+1}(H) <= lambda_max(P H P)`` (Cauchy interlacing). The run stops when ``missed_probability`` is at most
    ``probability``, or when a Ritz value above t proves that ``P H P`` has an eigenvalue there. Choosing the step at
    which to stop does not weaken the bound: it fails, at any step, only if the component of the start along the missed
    eigenvector is too small, which is one and the same event. If runs are repeated, their probabilities add up.

    Args:
        matmat: maps rows (b, n) to H times these rows; called with one row.
        eigenvectors: (k, n), k >= 0, in the dtype and on the device of the computation.
        above: the threshold t. ``lambda_k`` certifies the k largest eigenvalues, but takes many steps if
            ``lambda_{k+1}`` is close; ``(1 + eps) lambda_k`` takes fewer.
        probability: the level at which to stop, in (0, 1).
        max_steps: largest number of products, by default 50. Memory: k + max_steps vectors.
        scale: the largest known norm of a product with H, which sets the rounding error.
        generator: source of the start, on the CPU. The start must be independent of ``eigenvectors``: pass the
            generator that the solver used, in its present state, not a new one of the same seed. A solver that missed
            an eigenvector had no component along it in its start, and neither would an equal start here.
        progress: called as ``progress(steps, probability)`` after each step.

    Cost: one product with one vector a step.

    Raises: ArgumentError for rows that are not orthonormal, arguments out of range, an H that is not symmetric.
    """
    _require_arguments(eigenvectors, above, probability, max_steps)
    order = eigenvectors.shape[1] - len(eigenvectors)
    run = _LanczosRun.start(eigenvectors, min(STEPS if max_steps is None else max_steps, order), scale, generator)
    largest, bound, vector = float("-inf"), 0.0 if order == 0 else 1.0, None
    while run.steps < run.max_steps:
        run.multiply(matmat)
        values, rotation = descending(_tridiagonal(run.alphas, run.betas))
        largest = float(values[0])
        if largest - run.rounding > above:
            bound, vector = 1.0, combine(rotation[:, :1].T, run.basis)[0]
        else:
            bound = missed_probability(run.alphas, run.betas, order, above - run.rounding)
        if progress is not None:
            progress(run.steps, bound)
        if vector is not None or bound <= probability or run.broke_down or run.steps == run.max_steps:
            break
        run.extend()
    return Certificate(
        probability=bound,
        above=above,
        steps=run.steps,
        largest_ritz=largest,
        vector=vector,
        alphas=tuple(run.alphas),
        betas=tuple(run.betas),
        order=order,
        rounding=run.rounding,
    )


@dataclass
class _LanczosRun:
    """Lanczos on ``P H P`` from one random vector, reorthogonalised against its basis and the k eigenvectors.

    Attributes:
        rows: (k + max_steps, n), the k eigenvectors, then the basis.
        projected: (max_steps, max_steps), the upper triangle of ``Q' H Q`` as computed and the betas below the
            diagonal, to check symmetry.
        alphas, betas: of the steps so far.
        remainder: the last product, orthogonalised (1, n), with its norm ``remainder_norm``.
    """

    rows: Tensor
    k: int
    max_steps: int
    scale: float
    generator: torch.Generator
    projected: Tensor
    remainder: Tensor
    remainder_norm: float = 0.0
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, eigenvectors: Tensor, max_steps: int, scale: float, generator: torch.Generator) -> _LanczosRun:
        """Draw a random unit vector orthogonal to ``eigenvectors``, unless ``max_steps`` is 0."""
        k, n = eigenvectors.shape
        rows = eigenvectors.new_empty(k + max_steps, n)
        rows[:k] = eigenvectors
        if max_steps:
            start, _ = project_out(random_rows(1, eigenvectors, generator), eigenvectors)
            rows[k : k + 1], _ = orthonormalise(start, eigenvectors, 0.0, generator)
        projected = torch.zeros(max_steps, max_steps, dtype=torch.float64)
        return cls(rows, k, max_steps, scale, generator, projected, eigenvectors[:0])

    @property
    def steps(self) -> int:
        """The number of products."""
        return len(self.alphas)

    @property
    def basis(self) -> Tensor:
        """The orthonormal vectors multiplied so far (steps, n)."""
        return self.rows[self.k : self.k + self.steps]

    @property
    def rounding(self) -> float:
        """The rounding error of an eigenvalue."""
        return rounding_error(self.scale, self.rows.dtype)

    @property
    def breakdown(self) -> float:
        """The norm up to which a remainder is rounding error."""
        return BREAKDOWN * torch.finfo(self.rows.dtype).eps * self.scale

    @property
    def broke_down(self) -> bool:
        """Whether the last remainder is rounding error: the basis spans an invariant subspace."""
        return self.remainder_norm <= self.breakdown

    def multiply(self, matmat: Matmat) -> None:
        """Multiply the last basis vector; append alpha and beta."""
        j, end = self.steps, self.k + self.steps + 1
        image = matmat(self.rows[end - 1 : end])
        self.scale = max(self.scale, float(norms(image)[0]))
        self.remainder, coefficients = project_out(image, self.rows[:end])
        self.projected[: j + 1, j] = coefficients[self.k :, 0]
        require_symmetric(self.projected[: j + 1, : j + 1], self.scale, self.rows.dtype)
        self.alphas.append(float(self.projected[j, j]))
        self.remainder_norm = float(norms(self.remainder)[0])
        if not math.isfinite(self.remainder_norm):
            raise ArgumentError("matmat must return finite numbers, got NaN or infinity.")
        # A remainder below the breakdown threshold is rounding error, which may be as large as the threshold.
        exhausted = j + 1 == self.rows.shape[1] - self.k
        self.betas.append(0.0 if exhausted else max(self.remainder_norm, self.breakdown))

    def extend(self) -> None:
        """Append the normalised remainder to the basis."""
        j, end = self.steps, self.k + self.steps
        self.projected[j, j - 1] = self.remainder_norm
        self.rows[end : end + 1], _ = orthonormalise(self.remainder, self.rows[:end], 0.0, self.generator)


@dataclass(frozen=True)
class MissedEigenvalueBound:
    """Evidence about missed eigenvalues from the random vectors in a solver's search space.

    V is the k Ritz vectors found, W the other Ritz vectors of the search space, and X an orthonormal basis of the
    random vectors in W. With ``P = I - V' V``, the deflated operator ``A = P H P`` has a largest eigenvalue of at least
    ``lambda_{k+1}`` (Cauchy interlacing), and ``A W = W S + R``.

    Attributes:
        values: Ritz values (w,), the diagonal of S.
        gram: ``R' R`` (w, w).
        coordinates: of X in the basis W, (w, s) for s random vectors.
        order: n - k.
    """

    values: Tensor
    gram: Tensor
    coordinates: Tensor
    order: int

    @classmethod
    def from_ritz_pairs(
        cls, coordinates: Tensor, values: Tensor, gram: Tensor, k: int, n: int
    ) -> MissedEigenvalueBound | None:
        """Return the bound from all Ritz pairs of a search space, the first k being those found; None if w = 0.

        Args:
            coordinates: of the random rows in the other Ritz vectors (w, s).
            values: Ritz values (k + w,).
            gram: ``R' R`` (k + w, k + w), R the residual vectors.
        """
        if len(values) <= k:
            return None
        return cls(values[k:], gram[k:, k:], torch.linalg.qr(coordinates)[0], n - k)

    def probability(self, above: float) -> float:
        """Upper bound on the probability of this run's outcome, assuming a (k+1)-th eigenvalue above ``above``.

        Let (mu, u) be an eigenpair of A, ``||u|| = 1``, with components ``c = W'u`` and e orthogonal to W. Then
        ``c (mu - S) = e'R``, so ``||X'u||^2 <= X' N (1 + N)^-1 X`` with ``N = (mu - S)^-1 R'R (mu - S)^-1``. For X
        uniform in n - k dimensions ``||X'u||^2`` is Beta(s/2, (n - k - s)/2). In the Krylov space of one vector the
        bound equals ``missed_probability``, except that ``||X'u||^2`` is at least eps. The bound is 1 unless
        ``above`` exceeds every Ritz value. It treats V as given, although V comes from the same run.
        """
        num_random = self.coordinates.shape[1]
        if self.order <= 0 or not num_random:
            return 0.0 if self.order <= 0 else 1.0
        distance = above - float(self.values.max())
        if not distance > 0:
            return 1.0
        # Smaller values are rounding errors of the differences they come from, of either sign.
        eps = torch.finfo(torch.float64).eps
        largest = max(eps, *(self._largest_component(above + distance * float(step)) for step in GRID))
        if largest >= 1 or self.order <= num_random:
            return 1.0
        return float(betainc(num_random / 2, (self.order - num_random) / 2, largest))

    def missed(self, above: float) -> float:
        """Deprecated name of ``probability``."""
        warnings.warn("missed() is now probability().", FutureWarning, stacklevel=2)
        return self.probability(above)

    def _largest_component(self, mu: float) -> float:
        """The largest possible ``||X'u||^2`` for an eigenvalue mu."""
        shift = mu - self.values
        scaled = self.gram / shift[:, None] / shift[None, :]
        rest = torch.linalg.solve(torch.eye(len(shift), dtype=shift.dtype) + scaled, scaled @ self.coordinates)
        return float(torch.linalg.eigvalsh(self.coordinates.T @ rest)[-1])


def missed_probability(alphas: Sequence[float], betas: Sequence[float], order: int, above: float) -> float:
    """Upper bound on the probability of this Lanczos run if A has an eigenvalue mu above t = ``above``.

    Let ``q_0 = 1, q_1, ..., q_j`` be the orthonormal polynomials of the run; ``q_i(A) x`` is its i-th Lanczos vector.
    For an eigenpair (mu, u) and any coefficients c, ``|sum_i c_i q_i(mu)| |<u, x>| <= ||c||``. With the best c,
    ``<u, x>^2 <= 1 / sum_i q_i(mu)^2 <= 1 / sum_i q_i(t)^2 =: d^2``, since each q_i increases beyond its largest root.
    For x uniform on the sphere, ``<u, x>^2`` has the distribution Beta(1/2, (order - 1)/2), so
    ``P(|<u, x>| <= d)`` is about ``d sqrt(2 order / pi)``.

    Van Dorsselaer, Hochstenbach and van der Vorst (2000) use q_j alone: ``d = beta_1 ... beta_j / prod (t - theta_i)``.
    The sum over i (the Christoffel function) is never a weaker bound, does not grow with j, and is the best possible
    for the data of one run.

    Args:
        alphas, betas: j of each. ``betas[i]`` is the norm of the remainder at step i + 1; the last one is not an entry
            of the tridiagonal matrix. x must be uniform on the sphere and independent of the operator.
        order: the dimension in which x was drawn (n - k if k vectors are projected out).
        above: the threshold t. The bound is 1 if t is below a Ritz value.

    Raises: ArgumentError for numbers that are not finite.
    """
    if not all(map(math.isfinite, (*alphas, *betas, above))):
        raise ArgumentError(f"alphas, betas and the threshold must be finite, got {above} for the threshold.")
    return _component_cdf(_log_max_component(alphas, betas, above), order)


def upper_limit(alphas: Sequence[float], betas: Sequence[float], order: int, probability: float) -> float:
    """Upper confidence limit on the largest eigenvalue: the least t with ``missed_probability(..., t) <= probability``.

    It is above the largest Ritz value, is rounded up by 1e-12 of its distance from it, and is inf without a step.
    Arguments as for ``missed_probability``.

    Raises: ArgumentError unless the probability is between 0 and 1.
    """
    if not 0 < probability < 1:
        raise ArgumentError(f"probability must be between 0 and 1, got {probability}.")
    if not alphas or order <= 1:
        return alphas[0] if alphas else (float("-inf") if order == 0 else float("inf"))
    top = float(descending(_tridiagonal(alphas, betas))[0][0])
    if min(betas) == 0:
        return top
    log_quantile = _log_quantile(probability, order)
    # The bound by q_j alone, with every Ritz value replaced by the largest, brackets t from above.
    low, high = 0.0, math.exp((sum(map(math.log, betas)) - log_quantile) / len(betas))
    while high - low > 1e-12 * high and top + low < top + high:
        middle = (low + high) / 2
        if _log_max_component(alphas, betas, top + middle) <= log_quantile:
            high = middle
        else:
            low = middle
    return math.nextafter(top + high, math.inf)


def kuczynski_wozniakowski(order: int, steps: int, fraction: float) -> float:
    """``P(lambda_max - theta_1 > eps (lambda_max - lambda_min)) <= 1.648 sqrt(n) exp(-sqrt(eps) (2 j - 1))``, a priori.

    For j = ``steps`` of Lanczos from a random start in dimension n = ``order``, with eps = ``fraction`` in (0, 1); 0
    for j >= n, where Lanczos is exact. Kuczynski and Wozniakowski (1992) state it for positive definite operators; it
    extends to others by a shift.

    Raises: ArgumentError for a fraction out of range.
    """
    if not 0 < fraction < 1:
        raise ArgumentError(f"fraction must be between 0 and 1, got {fraction}.")
    if steps >= order:
        return 0.0
    if steps < 1:
        return 1.0
    return min(1.0, math.exp(math.log(1.648) + math.log(order) / 2 - math.sqrt(fraction) * (2 * steps - 1)))


def _log_max_component(alphas: Sequence[float], betas: Sequence[float], above: float) -> float:
    """``log d``, ``d^-2 = sum_i q_i(t)^2``: the largest component that the start can have along a missed eigenvector.

    Consecutive polynomials have the ratio ``q_i / q_{i-1} = p_i / beta_i`` with the pivots
    ``p_i = t - alpha_i - beta_{i-1}^2 / p_{i-1}`` of ``t - T``, which are all positive iff t is above every Ritz value.
    """
    log, logs = 0.0, [0.0]
    pivot, coupling = 1.0, 0.0
    for alpha, beta in zip(alphas, betas, strict=True):
        pivot = above - alpha - coupling * (coupling / pivot)
        if pivot < 0 or (pivot == 0 and beta > 0):
            return 0.0
        if beta == 0:
            # An invariant subspace: it contains every eigenvector along which the start has a component.
            return -math.inf
        log += math.log(pivot) - math.log(beta)
        logs.append(log)
        coupling = beta
    largest = max(logs)
    return -largest - math.log(math.fsum(math.exp(2 * (value - largest)) for value in logs)) / 2


def _component_cdf(log: float, order: int) -> float:
    """``P(|<u, x>| <= exp(log))`` for x uniform on the unit sphere in dimension ``order``."""
    if log >= 0 and order > 0:
        return 1.0
    if log == -math.inf or order <= 1:
        return 0.0
    if log > LOG_SMALL:
        return float(betainc(0.5, (order - 1) / 2, math.exp(2 * log)))
    return math.exp(max(log + math.log(2) - float(betaln(0.5, (order - 1) / 2)), LOG_TINY))


def _log_quantile(probability: float, order: int) -> float:
    """``log d`` with ``P(|<u, x>| <= d) = probability``."""
    first_term = math.log(probability) - math.log(2) + float(betaln(0.5, (order - 1) / 2))
    return first_term if first_term < LOG_SMALL else math.log(float(betaincinv(0.5, (order - 1) / 2, probability))) / 2


def _tridiagonal(alphas: Sequence[float], betas: Sequence[float]) -> Tensor:
    """The tridiagonal matrix T (j, j), float64, of a Lanczos run."""
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    for i, beta in enumerate(betas[: len(alphas) - 1]):
        matrix[i, i + 1] = matrix[i + 1, i] = beta
    return matrix


def _require_arguments(eigenvectors: Tensor, above: float, probability: float, max_steps: int | None) -> None:
    """Raise ArgumentError unless the arguments of ``certificate`` are valid."""
    if (
        eigenvectors.dim() != 2
        or len(eigenvectors) > eigenvectors.shape[1]
        or eigenvectors.dtype not in (torch.float32, torch.float64)
    ):
        came = f"{tuple(eigenvectors.shape)} in {eigenvectors.dtype}"
        raise ArgumentError(f"eigenvectors must be rows (k, n) in float32 or float64 with k <= n, got {came}.")
    require_orthonormal(eigenvectors, "The eigenvectors")
    if not math.isfinite(above):
        raise ArgumentError(f"The threshold must be finite, got {above}.")
    if not 0 < probability < 1:
        raise ArgumentError(f"probability must be between 0 and 1, got {probability}.")
    if max_steps is not None and max_steps < 1:
        raise ArgumentError(f"max_steps must be at least 1, got {max_steps}.")
