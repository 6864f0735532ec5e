"""The largest eigenpairs of a symmetric operator, with bounds and a certificate; those at both ends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, nearest
from sharpscope.linalg.block_lanczos import lanczos
from sharpscope.linalg.guided_by_cheap_operator import guided
from sharpscope.linalg.missed_eigenvalues import STEPS, Certificate, MissedEigenvalueBound, certificate
from sharpscope.linalg.power_iteration import power_iteration
from sharpscope.linalg.ritz import ZERO, RitzPairs, SolverProgress, rayleigh_ritz, ritz_bounds, within_tolerance
from sharpscope.linalg.vectors_as_rows import Matmat, as_row_operator, combine, inner, require_dtype, rounding_error
from sharpscope.random_streams import stream_from

METHODS: dict[str, Callable[..., RitzPairs]] = {"guided": guided, "lanczos": lanczos, "power": power_iteration}
TWO_ENDED = ("both", "magnitude")
WHICH = ("largest", "smallest", *TWO_ENDED)

# Blocks in the search space of each solve for both ends. The small eigenvalues of a network are close together: with
# the six blocks of a single solve, many more products are needed.
BLOCKS = 9

# The solvers stop at this tolerance where a larger one is asked for, and half of an interval is then at least WIDEST of
# the eigenvalue (and never more than 0.8 tol). A residual proves an eigenvalue, not which: of 84 random operators with
# close eigenvalues power iteration stopped at 0.05 on another in 11, whose lambda_1 was up to 10 % larger, and at 0.02
# in 3, by up to 3 %; Lanczos in 6 and 5, by up to 5 % and 1 %.
MAX_TOL, WIDEST = 0.02, 0.05


@dataclass(frozen=True)
class Eigenpairs:
    """The k eigenvalues at one end of a symmetric operator's spectrum, with multiplicity, or those at both ends.

    Attributes:
        eigenvalues: float64 (k,), ordered from that end inwards; with "magnitude" by ``|lambda|``, descending; with
            "both" (2k,), descending: the k largest, then the k smallest, the smallest last.
        eigenvectors: (n, k), or (n, 2k), orthonormal columns in the dtype of the computation.
        residuals: ``||H v - lambda v||`` (k,), from true products, not from a recurrence; with "lanczos" from one more.
        lower, upper: float64 (k,), an interval for each eigenvalue from its residual and gap, with rounding
            (``sharpscope.linalg.ritz.ritz_bounds``).
        converged: bool (k,), whether the interval's half-width is at most ``tol |lambda|``, or lambda is zero to
            rounding.
        num_matvecs: products with one vector, in all.
        num_products: products with a block of vectors, in all.
        method: the solver that ran.
        missed_bound: ``missed_bound.probability(above)`` bounds the probability that an eigenvalue above ``above`` was
            missed, from the solver's random vectors; None where they give no bound.
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
    missed_bound: MissedEigenvalueBound | None = None

    @property
    def start(self) -> MissedEigenvalueBound | None:
        """Deprecated name of ``missed_bound``."""
        warnings.warn("Eigenpairs.start is now Eigenpairs.missed_bound.", FutureWarning, stacklevel=2)
        return self.missed_bound

    def widened(self, by: float, tol: float) -> Eigenpairs:
        """Widen each interval by ``by``, an error of the products, and test it against ``tol`` again.

        An eigenvalue within ``by`` of zero is zero to rounding, and counts as converged.
        """
        if not by:
            return self
        lower, upper = self.lower - by, self.upper + by
        size = self.eigenvalues.abs()
        met = ((upper - lower) / 2 <= tol * size) | (size <= by)
        return replace(self, lower=lower, upper=upper, converged=self.converged & met)


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
    guides: Sequence[Matmat] = (),
    initial: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    progress: SolverProgress | None = None,
) -> Eigenpairs:
    """``H v_i = lambda_i v_i`` for the k largest *algebraic* eigenvalues, counted with multiplicity, or others.

    Args:
        matmat: ``V`` (n, b) to ``H V`` (n, b), H symmetric.
        n: the order of H.
        k: number of pairs, 1 <= k <= n; with "both" at each end, 2k <= n.
        tol: relative to each eigenvalue: stop when ``|lambda - theta| <= tol |theta|`` is proved by the residuals, to
            0.02 where tol is larger: the intervals alone are then wider.
        which: "largest", "smallest", "both" (the k largest and the k smallest), or "magnitude" (the k of largest
            ``|lambda|``, +a and -a both counted; of more equals than fit, any). The last two solve for the k largest
            and for the k smallest, one after the other.
        method: "guided" (few products, with guides), "lanczos" (block Lanczos with thick restart) or "power" (deflated
            power iteration); "auto" is "guided" for the largest where there are guides, else "lanczos".
        max_basis: largest number of vectors of length n kept by the solver.
        max_products: largest number of calls of ``matmat`` (by default 100, 1000 for "power", for each end);
            eigenvalues that have not converged by then are marked in ``converged``.
        guides: each ``V`` to ``G V``, G a symmetric operator that resembles H and costs little; the last resembles it
            most, those before it cost less.
        initial: (n, b) to start from, for "guided" and "lanczos" at one end; ``missed_bound`` is then weaker, or None.
        dtype, device: of the vectors; inner products and small matrices are float64.
        generator: source of the random start, on the CPU; by default one seeded with 0.
        progress: called as ``progress(products, worst)`` with the largest ``bound / |theta|`` so far.

    Raises: ArgumentError for arguments out of range, a matmat with a wrong shape, NaN, or that is not symmetric.

    >>> import torch
    >>> from sharpscope.linalg import top_eigenpairs
    >>> diagonal = torch.arange(1.0, 101.0, dtype=torch.float64)[:, None]
    >>> pairs = top_eigenpairs(lambda V: diagonal * V, n=100, k=3, tol=1e-6)
    >>> [round(value, 3) for value in pairs.eigenvalues.tolist()]
    [100.0, 99.0, 98.0]
    >>> bool((pairs.upper - pairs.lower <= 2e-6 * pairs.eigenvalues).all())
    True
    """
    require_arguments(n, k, tol, method, max_products, which)
    require_dtype(dtype)
    like = torch.empty(0, n, dtype=dtype, device=device)
    return top_eigenpairs_rows(
        as_row_operator(matmat, like),
        like,
        k,
        tol=tol,
        which=which,
        method=method,
        max_basis=max_basis,
        max_products=max_products,
        guides=[as_row_operator(guide, like) for guide in guides],
        initial=None if initial is None else initial.to(like).T.contiguous(),
        generator=generator,
        progress=progress,
    )


def top_eigenpairs_rows(
    rows: Matmat,
    like: Tensor,
    k: int = 5,
    *,
    tol: float = 1e-3,
    which: str = "largest",
    method: str = "auto",
    max_basis: int | None = None,
    max_products: int | None = None,
    guides: Sequence[Matmat] = (),
    initial: Tensor | None = None,
    generator: torch.Generator | None = None,
    progress: SolverProgress | None = None,
) -> Eigenpairs:
    """``top_eigenpairs`` of an operator on rows, whose results are not checked.

    Args:
        rows: rows (b, n) to (b, n), a new contiguous tensor like ``like``; it must leave its argument as it was.
        like: (0, n), for n, dtype and device.
        guides, initial: rows too. All else as for ``top_eigenpairs``.
    """
    require_arguments(like.shape[1], k, tol, method, max_products, which)
    if initial is not None and which in TWO_ENDED:
        raise ArgumentError(f"initial is for one end of the spectrum, got which={which!r}. Leave one of them out.")
    name = _solver(method, which, bool(guides), like.shape[1], k)
    if initial is not None and name == "power":
        raise ArgumentError("initial is for 'guided' and 'lanczos', got method='power'. Leave one of them out.")
    source, stop = stream_from(generator, "start"), min(tol, MAX_TOL)
    if max_basis is None and which in TWO_ENDED:
        max_basis = BLOCKS * (k + 1)

    def solve(sign: float, limit: int | None, note: SolverProgress | None, ignore_below: float) -> RitzPairs:
        """The k largest pairs of ``sign * H``."""
        options: dict[str, Any] = {} if initial is None else {"initial": initial}
        if METHODS[name] is guided:
            options["guides"] = [_times(sign, guide) for guide in guides]
        if METHODS[name] is lanczos:
            options["ignore_below"] = ignore_below
        return METHODS[name](
            _times(sign, rows),
            like,
            k,
            tol=stop,
            max_basis=max_basis,
            max_products=limit,
            generator=source,
            progress=note,
            **options,
        )

    if which in TWO_ENDED:
        pairs = both_ends(solve, k, which, stop, max_products, progress)
    else:
        sign = 1.0 if which == "largest" else -1.0
        pairs = solve(sign, max_products, progress, float("-inf"))
        pairs = replace(pairs, values=sign * pairs.values)
    if tol > MAX_TOL:
        pairs = replace(pairs, bounds=pairs.bounds.maximum(min(0.8 * tol, WIDEST) * pairs.values.abs()))
    return _eigenpairs(pairs, name)


def guidable(which: str, n: int, k: int) -> bool:
    """Whether "auto" uses guides if given: in a space of few blocks they save nothing."""
    return which == "largest" and n >= 8 * (k + 1)


def _solver(method: str, which: str, guides: bool, n: int, k: int) -> str:
    """Resolve "auto" to the name of a solver."""
    if method == "guided" and not guides:
        raise ArgumentError("method='guided' needs guides=, cheap operators that resemble H. Pass one, or 'lanczos'.")
    if method != "auto":
        return method
    return "guided" if guides and guidable(which, n, k) else "lanczos"


def _eigenpairs(pairs: RitzPairs, method: str) -> Eigenpairs:
    """The solver's pairs with columns and intervals."""
    return Eigenpairs(
        eigenvalues=pairs.values,
        eigenvectors=pairs.vectors.T,
        residuals=pairs.residuals,
        lower=pairs.values - pairs.bounds,
        upper=pairs.values + pairs.bounds,
        converged=pairs.converged,
        num_matvecs=pairs.num_matvecs,
        num_products=pairs.num_products,
        method=method,
        missed_bound=pairs.missed_bound,
    )


def _times(sign: float, rows: Matmat) -> Matmat:
    """``sign * H`` on rows."""
    return rows if sign > 0 else (lambda block: sign * rows(block))


def require_arguments(
    n: int, k: int, tol: float, method: str, max_products: int | None, which: str = "largest"
) -> None:
    """Raise ArgumentError unless the arguments of a solver are valid; call it before any product."""
    if method not in ("auto", *METHODS):
        raise ArgumentError(nearest("method", str(method), ("auto", *METHODS)))
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise ArgumentError(f"k must be at least 1 and at most the number of parameters ({n}), got {k}.")
    if not isinstance(tol, float | int) or not 0 < tol < 1:
        raise ArgumentError(f"tol must be a number between 0 and 1, got {tol!r}.")
    if max_products is not None and max_products < 2:
        raise ArgumentError(f"There must be at least 2 products, a step and its check, got a limit of {max_products}.")
    if which not in WHICH:
        raise ArgumentError(f"which must be one of {', '.join(WHICH)}, got {which!r}.")
    if which == "both" and 2 * k > n:
        raise ArgumentError(f"k must be at most half the number of parameters ({n}) for both ends, got {k}.")
    if method == "guided" and which in TWO_ENDED:
        raise ArgumentError(f"method='guided' finds one end of the spectrum, got which={which!r}. Use 'lanczos'.")
    if which in TWO_ENDED and max_products is not None and max_products < 4:
        raise ArgumentError(f"There must be at least 4 products for a run at each end, got a limit of {max_products}.")


# The second solve does not refine pairs below this fraction of the first solve's smallest pair. Early bounds may belong
# to a smaller eigenvalue than intended: with 1.0, 3 of 120 random operators did not converge; with 0.5, 1, as without.
IGNORE_BELOW = 0.5

# solve(sign, max_products, progress, ignore_below) returns the k largest eigenpairs of ``sign * H``; pairs below
# ``ignore_below`` need not be accurate.
Solve = Callable[[float, int | None, SolverProgress | None, float], RitzPairs]


def both_ends(
    solve: Solve, k: int, which: str, tol: float, max_products: int | None, progress: SolverProgress | None
) -> RitzPairs:
    """The k largest and the k smallest pairs, descending ("both"), or the k largest by ``|lambda|`` ("magnitude").

    The first solve gets half of ``max_products``, the second what is left. For "magnitude" the second does not refine
    pairs smaller than half the first solve's smallest.
    """
    top = solve(1.0, None if max_products is None else max_products // 2, progress, float("-inf"))
    done = top.num_products
    later = None if progress is None else (lambda products, worst: progress(done + products, worst))
    least = IGNORE_BELOW * float(top.values[-1]) if which == "magnitude" else float("-inf")
    bottom = solve(-1.0, None if max_products is None else max_products - done, later, least)
    if which == "both":
        return merged(top, bottom, tol)
    first, last = split_by_magnitude(top.values, bottom.values, k)
    # The largest magnitude that the bounds allow for a pair that was not selected.
    rivals = [float(end.values[i] + end.bounds[i]) for end, i in ((top, first), (bottom, last)) if i < k]
    pairs = merged(first_pairs(top, first), first_pairs(bottom, last), tol)
    size = pairs.values.abs()
    # An eigenvalue that is zero to rounding displaces no other zero.
    displaced = size * (1 + tol) + ZERO * rounding_error(pairs.scale, pairs.vectors.dtype) < max(rivals)
    order = torch.argsort(size, descending=True, stable=True)
    return _reordered(replace(pairs, converged=pairs.converged & ~displaced), order)


def split_by_magnitude(top: Tensor, bottom: Tensor, k: int) -> tuple[int, int]:
    """Split the k values of largest magnitude: how many are eigenvalues of H, and of -H, both descending.

    Of +a and -a the positive one comes first. No value is counted twice: it is positive in one list only.
    """
    first = last = 0
    for _ in range(k):
        if last >= len(bottom) or (first < len(top) and bool(top[first] >= bottom[last])):
            first += 1
        else:
            last += 1
    return first, last


def first_pairs(pairs: RitzPairs, count: int) -> RitzPairs:
    """The first ``count`` pairs; the next one becomes the estimate ``next_eigenvalue``."""
    if count == len(pairs.values):
        return pairs
    next_eigenvalue = None if pairs.next_eigenvalue is None else float(pairs.values[count] + pairs.residuals[count])
    return replace(_reordered(pairs, torch.arange(count)), next_eigenvalue=next_eigenvalue)


def merged(top: RitzPairs, bottom: RitzPairs, tol: float) -> RitzPairs:
    """Rayleigh-Ritz on the vectors of H's largest pairs and of -H's, without a further product; descending.

    The vectors of the two solves are not orthogonal to each other: they overlap by residual over distance, and
    arbitrarily within a common eigenspace. Orthogonalising them amplifies the rounding of the products by ``||L^-1||``.
    """
    vectors, images = torch.cat([top.vectors, bottom.vectors]), torch.cat([top.images, -bottom.images])
    factor, failed = torch.linalg.cholesky_ex(inner(vectors, vectors))
    if int(failed):
        raise ArgumentError(
            "The vectors of both ends must be independent, but those of one lie in the span of the other's. Raise "
            "max_products, or solve for each end by itself."
        )
    inverse = torch.linalg.inv(factor)
    pairs = rayleigh_ritz(
        combine(inverse, vectors),
        combine(inverse, images),
        next_eigenvalue=None,
        scale=max(top.scale, bottom.scale) * float(torch.linalg.matrix_norm(inverse, 2)),
        tol=tol,
        num_matvecs=top.num_matvecs + bottom.num_matvecs,
        num_products=top.num_products + bottom.num_products,
    )
    values, count = pairs.values, len(top.values)
    gram, floor = inner(rest := pairs.residual_vectors(), rest), rounding_error(pairs.scale, vectors.dtype)
    above = ritz_bounds(values[:count], gram[:count, :count], top.next_eigenvalue)
    below = ritz_bounds(-values[count:].flip(0), gram[count:, count:].flip(0, 1), bottom.next_eigenvalue)
    # The bounds of the two solves plus the shift hold too; they are smaller where a cluster was split between the ends.
    shift = (values - torch.cat([top.values, -bottom.values.flip(0)])).abs()
    own = torch.cat([top.bounds, bottom.bounds.flip(0)]) + shift
    bounds = torch.minimum(torch.cat([above, below.flip(0)]) + floor, own)
    converged = torch.cat([top.converged, bottom.converged.flip(0)]) & within_tolerance(bounds, values, floor, tol)
    return replace(pairs, bounds=bounds, converged=converged)


def _reordered(pairs: RitzPairs, order: Tensor) -> RitzPairs:
    """The pairs at the indices ``order``."""
    on_device = order.to(pairs.vectors.device)
    return replace(
        pairs,
        values=pairs.values[order],
        vectors=pairs.vectors[on_device],
        images=pairs.images[on_device],
        residuals=pairs.residuals[order],
        bounds=pairs.bounds[order],
        converged=pairs.converged[order],
    )


# Missed eigenvalues found by certificates before giving up.
MAX_MISSED = 5


@dataclass(frozen=True)
class CertifiedEigenpairs:
    """Eigenpairs, and the certificate of the last of ``runs`` random-start Lanczos runs.

    ``probability`` bounds the probability of an error in any of the runs; 1 if no run ended.
    """

    pairs: Eigenpairs
    last: Certificate
    runs: int
    probability: float


def certify_eigenpairs(
    hessian: Callable[[Tensor], Tensor],
    pairs: Eigenpairs,
    solve: Callable[..., Eigenpairs],
    eps: float,
    remaining: Callable[[], int | None],
    max_probability: float,
    generator: torch.Generator,
) -> CertifiedEigenpairs:
    """Certify that no eigenvalue above ``lambda_k + eps |lambda_1|`` was missed; improve ``pairs`` if one was.

    If a run finds such an eigenvalue, its vector is passed to the solver, and another run follows the solve. The j-th
    run has the level ``max_probability / 2^j``, so the probability of an error in any of them is at most
    ``max_probability``.

    Args:
        hessian: rows (b, n) to rows (b, n) times H.
        pairs: the k largest eigenpairs found so far.
        solve: the solver, called as ``solve(initial=rows, max_products=most)`` with k + 1 rows.
        eps: in (0, 1).
        remaining: returns the number of products left, None for no limit.
        max_probability: in (0, 1).
        generator: the solver's, in its present state; a new one would repeat the solver's start.
    """
    used_probability = 0.0
    for run in range(1, MAX_MISSED + 2):
        products_left = remaining()
        vectors = pairs.eigenvectors.T.contiguous()
        level = max_probability / 2**run
        above = float(pairs.upper[-1] + eps * pairs.eigenvalues[0].abs())
        if products_left == 0:
            proof = Certificate(1.0, above, 0, -math.inf, None, (), (), vectors.shape[1] - len(vectors), 0.0)
            break
        proof = certificate(
            hessian,
            vectors,
            above=above,
            probability=level,
            max_steps=STEPS if products_left is None else min(STEPS, products_left),
            scale=float(pairs.eigenvalues.abs().max()),
            generator=generator,
        )
        products_left = remaining()
        if proof.vector is None or run > MAX_MISSED or (products_left is not None and products_left < 3):
            break
        used_probability += level
        pairs = solve(initial=torch.cat([vectors, proof.vector[None]]), max_products=products_left)
    return CertifiedEigenpairs(pairs, proof, run, min(1.0, used_probability + proof.probability))
