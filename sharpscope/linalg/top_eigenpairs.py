"""The interface of all eigensolvers: ``top_eigenpairs``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, nearest
from sharpscope.linalg.both_ends import both_ends
from sharpscope.linalg.guided_by_cheap_operator import guided
from sharpscope.linalg.lanczos import lanczos
from sharpscope.linalg.missed_eigenvalues import MissedEigenvalueBound
from sharpscope.linalg.power import power_iteration
from sharpscope.linalg.ritz import RitzPairs, SolverProgress
from sharpscope.linalg.symmetric_operator import Matmat, as_row_operator, require_dtype

METHODS: dict[str, Callable[..., RitzPairs]] = {"guided": guided, "lanczos": lanczos, "power": power_iteration}
TWO_ENDED = ("both", "magnitude")
WHICH = ("largest", "smallest", *TWO_ENDED)

# Blocks in the search space of each solve for both ends. The small eigenvalues of a network are close together: with
# the six blocks of a single solve, many more products are needed.
BLOCKS = 9


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
        tol: relative to each eigenvalue: stop when ``|lambda - theta| <= tol |theta|`` is proved by the residuals.
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
    source = generator if generator is not None else torch.Generator().manual_seed(0)
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
            tol=tol,
            max_basis=max_basis,
            max_products=limit,
            generator=source,
            progress=note,
            **options,
        )

    if which in TWO_ENDED:
        pairs = both_ends(solve, k, which, tol, max_products, progress)
    else:
        sign = 1.0 if which == "largest" else -1.0
        pairs = solve(sign, max_products, progress, float("-inf"))
        pairs = replace(pairs, values=sign * pairs.values)
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
