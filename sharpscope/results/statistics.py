"""Estimates, their confidence intervals, and how values differ: between runs, checkpoints or groups of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sharpscope.errors import DataError
from sharpscope.formatting import with_bound, with_mark
from sharpscope.results.serialization import Array


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate and one standard error of it."""

    value: float
    standard_error: float

    @classmethod
    def of(cls, draws: Array) -> Estimate:
        """The mean of independent draws (K,), K at least 2."""
        return cls(float(draws.mean()), float(draws.std(ddof=1)) / math.sqrt(len(draws)))

    def __str__(self) -> str:
        return with_bound(self.value, self.value - self.standard_error, self.value + self.standard_error)


def wilson(share: float, examples: int) -> tuple[float, float]:
    """The 95 % interval of a share of ``examples`` independent ones (Wilson 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * examples)) / (1 + z * z / examples)
    half = z / (1 + z * z / examples) * math.sqrt(share * (1 - share) / examples + z * z / (4 * examples**2))
    # A share of 1 lies at the interval's end, which rounding must not pull under it.
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def student(confidence: float, freedom: int) -> float:
    """The t with ``P(|T| <= t) = confidence`` for Student's T with ``freedom`` degrees of freedom.

    By bisection of the finite series for whole degrees (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4), since results
    need NumPy alone.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _student_probability(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _student_probability(angle: float, freedom: int) -> float:
    """``P(|T| <= sqrt(freedom) tan(angle))``."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for i in range(2 + odd, freedom - 1, 2):
        term *= (i - 1) / i * math.cos(angle) ** 2
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


# The origin of an interval: Student's over pairs of runs, Welch's over runs, or arithmetic on both intervals.
PAIRS, WELCH, ENDS = "pairs", "Welch", "ends"

# A factor whose interval is wider than this share of it is shown with both ends.
WIDE = 0.1

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """The difference or ratio of two numbers, or of the means of two groups of runs.

    Attributes:
        value: the difference; with ``ratio`` the factor.
        lower, upper: its interval; None where there is none.
        ratio: whether it is a factor, 1 for no difference, and not a difference, 0 for none.
        by: how the interval came about: PAIRS, WELCH or ENDS.
        runs: pairs, or runs of both groups.
        freedom: degrees of freedom of Student's t.
        converged: whether both numbers are.
    """

    value: float
    lower: float | None
    upper: float | None
    ratio: bool
    by: str = ENDS
    runs: int = 2
    freedom: int = 0
    converged: bool = True

    @property
    def sure(self) -> bool | None:
        """Whether the interval excludes "no difference"; None without an interval."""
        if self.lower is None or self.upper is None:
            return None
        none = 1.0 if self.ratio else 0.0
        return not self.lower <= none <= self.upper

    @property
    def head(self) -> str:
        """The value without a wide interval: "x 0.491", "-0.002", or "x 0.305861 ±0.000003"."""
        mark = "" if self.converged else "?"
        if not self.ratio:
            return f"{self.value:+.3g}{mark}"
        if self.lower is None or self.upper is None or self.upper - self.lower > WIDE * self.value:
            return f"x {self.value:.3g}{mark}"
        return f"x {with_bound(self.value, self.lower, self.upper)}{mark}"

    @property
    def ends(self) -> str:
        """The interval where ``head`` does not have it: " [0.431, 0.559]"."""
        return "" if "±" in self.head else interval_text(self.lower, self.upper)

    def __str__(self) -> str:
        return f"{self.head}{self.ends}"


def interval_text(lower: float | None, upper: float | None) -> str:
    """ " [0.431, 0.559]", nothing where there is no interval."""
    return "" if lower is None or upper is None else f" [{lower:.3g}, {upper:.3g}]"


@dataclass(frozen=True)
class Spread:
    """A mean over runs and its 95 % confidence interval, None where the runs do not vary or there is one.

    Attributes:
        value: the mean; of ``log`` quantities the geometric one.
        runs: their number.
    """

    value: float
    lower: float | None
    upper: float | None
    runs: int

    def within(self, least: float, most: float) -> Spread:
        """Clip the interval, for example to [0, 1] for an accuracy."""
        if self.lower is None or self.upper is None:
            return self
        return replace(self, lower=max(self.lower, least), upper=min(self.upper, most))

    @property
    def ends(self) -> str:
        """Its interval: " [4.43, 9.92]", nothing where there is none."""
        return interval_text(self.lower, self.upper)

    def __str__(self) -> str:
        return f"{self.value:.4g}{self.ends}"


@dataclass(frozen=True)
class OwnError:
    """The error of the mean of a group of runs that comes from the errors of the runs' own numbers.

    Runs are measured on the same examples with the same random vectors, so their errors may all have one sign: they are
    averaged, not divided by the square root of the number of runs.

    Attributes:
        bound: mean of the numerical bounds.
        half: mean of the half-widths of the other intervals, at about 95 %.
    """

    bound: float = 0.0
    half: float = 0.0

    @classmethod
    def of(cls, cells: Sequence[Cell], *, log: bool = False) -> OwnError:
        """Of one group; ``log``: of the logarithms of numbers with positive intervals. No interval counts as exact."""
        errors = {True: 0.0, False: 0.0}
        for cell in cells:
            if (ends := interval_95(cell)) is not None:
                value, low, high = (math.log(x) if log else x for x in (cell.value, *ends))
                errors[cell.interval == NUMERICAL] += max(value - low, high - value, 0.0) / len(cells)
        return cls(errors[True], errors[False])


NO_ERROR = OwnError()


def _combined(half: float, *own: OwnError) -> float:
    """Half-width of an interval over runs, widened: independent errors add in squares, numerical bounds as they are."""
    return math.hypot(half, *(error.half for error in own)) + sum(error.bound for error in own)


def spread(values: Sequence[float], *, log: bool = False, own: OwnError = NO_ERROR) -> Spread:
    """Mean of ``values`` and the 95 % interval of the mean that their scatter supports (Student 1908).

    ``log``: of their logarithms, as for quantities that range over factors; they must be positive. ``own`` is the error
    of the values themselves (of their logarithms with ``log``), and widens the interval.

    Raises: DataError without values, or where a logarithm has none.
    """
    found = _logarithms(values) if log else np.asarray(values, dtype=float)
    if len(found) == 0:
        raise DataError("A mean needs at least one run, got none.")
    mean, half = float(found.mean()), None
    if _varies(found):
        half = _combined(student(CONFIDENCE, len(found) - 1) * float(found.std(ddof=1)) / math.sqrt(len(found)), own)
    return Spread(*_interval(mean, half, log), len(found))


def difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    paired: bool = False,
    ratio: bool = False,
    own: tuple[OwnError, OwnError] = (NO_ERROR, NO_ERROR),
) -> Difference:
    """``second`` less ``first``, or over it: of pairs by their differences, else by Welch's interval (1947).

    Welch's degrees of freedom are rounded down, which widens the interval. ``own`` is the error of the values of each
    group themselves (of their logarithms with ``ratio``), and widens it further.

    Raises: DataError where pairs have unequal numbers, there are no values, or a ratio has no logarithm.
    """
    a, b = (_logarithms(v) if ratio else np.asarray(v, dtype=float) for v in (first, second))
    if paired and len(a) != len(b):
        raise DataError(f"Pairs need as many runs in both groups, got {len(a)} and {len(b)}.")
    if min(len(a), len(b)) == 0:
        raise DataError("A difference needs at least one run in each group.")
    mean, freedom, error = float(b.mean() - a.mean()), 0, 0.0
    if paired and _varies(b - a):
        freedom, error = len(a) - 1, float((b - a).std(ddof=1)) / math.sqrt(len(a))
    elif not paired and min(len(a), len(b)) > 1:
        variances = [float(x.var(ddof=1)) / len(x) for x in (a, b)]
        error = math.sqrt(sum(variances))
        weights = sum(variance**2 / (len(x) - 1) for variance, x in zip(variances, (a, b), strict=True))
        freedom = max(1, int(sum(variances) ** 2 / weights)) if weights else min(len(a), len(b)) - 1
    known = freedom and _varies(np.concatenate([a, b]))
    half = _combined(student(CONFIDENCE, freedom) * error, *own) if known else None
    runs, by = (len(a), PAIRS) if paired else (len(a) + len(b), WELCH)
    return Difference(*_interval(mean, half, ratio), ratio, by, runs, freedom)


def _interval(mean: float, half: float | None, log: bool) -> tuple[float, float | None, float | None]:
    """A value with the ends of its interval, if any; ``log``: from the mean of logarithms."""
    back = math.exp if log else float
    return (back(mean), None, None) if half is None else (back(mean), back(mean - half), back(mean + half))


def _varies(values: Array) -> bool:
    """Whether the values vary: equal accuracies on few examples do not show the variance of the runs."""
    return len(values) > 1 and float(np.ptp(values)) > 1e-12 * float(np.abs(values).max())


def _logarithms(values: Sequence[float]) -> Array:
    found: Array = np.asarray(values, dtype=np.float64)
    if not (found > 0).all():
        raise DataError(f"A ratio needs positive values, got {float(found.min()):g}. Take differences.")
    logarithms: Array = np.log(found)
    return logarithms


def contrast(one: Cell | None, two: Cell | None, factor: bool) -> Difference | None:
    """The second reading over the first, where ``factor`` and both are surely positive, or less it.

    Its interval is what the ends of both leave possible, each widened to about 95 %; where both are of 95 %, it holds
    with at least 90 %. None where a reading is missing or not finite.
    """
    if one is None or two is None or not (math.isfinite(one.value) and math.isfinite(two.value)):
        return None
    first, second, lower, upper = interval_95(one), interval_95(two), None, None
    ratio = factor and surely_positive(one) and surely_positive(two)
    value = two.value / one.value if ratio else two.value - one.value
    if first is not None and second is not None:
        (low, high), (lowest, highest) = first, second
        lower, upper = (lowest / high, highest / low) if ratio else (lowest - high, highest - low)
    return Difference(value, lower, upper, ratio, converged=one.converged and two.converged)


def surely_positive(cell: Cell) -> bool:
    """Whether a number and its interval are positive, so that its logarithm has an error."""
    ends = interval_95(cell)
    return (cell.value if ends is None else min(cell.value, ends[0])) > 0


def interval_95(cell: Cell) -> tuple[float, float] | None:
    """Return the interval, widened to about 95 %, or the bound."""
    if cell.lower is None or cell.upper is None:
        return None
    reach = INTERVAL_KINDS[cell.interval].reach if cell.interval in INTERVAL_KINDS else 1.0
    return cell.value - reach * (cell.value - cell.lower), cell.value + reach * (cell.upper - cell.value)


NUMERICAL = "bound on the numerical error"
SAMPLED = "95 % over examples, for all the data"
PROBED = "one standard error over random probes"
PROBED_SAMPLED = "one standard error over random probes and examples, for all the data"
SUBSETS = "95 % over subsets"
BINOMIAL = "95 % over examples (Wilson 1927)"
EXACT = "exact on these examples"
# Where a number has no interval, this and the reason.
NO_INTERVAL = "none: "
ONE_SUBSET = f"{NO_INTERVAL}one subset"


# Widens one standard error to about 95 %.
STANDARD_ERROR_FACTOR = 2.0


@dataclass(frozen=True)
class IntervalKind:
    """A kind of interval.

    Attributes:
        meaning: the glossary entry.
        ends: the plural noun for two of them in a finding.
        reach: the factor that widens it to about 95 %.
    """

    meaning: str
    ends: str = ""
    reach: float = 1.0

    def describe(self, apart: bool) -> str:
        """Describe two numbers whose intervals are disjoint (``apart``) or overlap."""
        if self.reach == STANDARD_ERROR_FACTOR:
            return f"they are {'more than' if apart else 'within'} two standard errors of each{' apart' * apart}"
        return f"their {self.ends} {'do not ' * apart}meet"


INTERVAL_KINDS = {
    NUMERICAL: IntervalKind(
        "holds the exact value on these examples: from residuals, or from interlacing where that is tighter",
        "numerical bounds",
    ),
    SAMPLED: IntervalKind(
        "these examples stand for more; the interval is of the whole they were drawn from",
        "95 % intervals over examples",
    ),
    PROBED: IntervalKind(
        "how far an estimate by random vectors scatters; about two thirds of such intervals hold the exact value",
        reach=STANDARD_ERROR_FACTOR,
    ),
    PROBED_SAMPLED: IntervalKind(
        "that scatter and that of the sample of examples, added in squares; of the whole it was drawn from",
        reach=STANDARD_ERROR_FACTOR,
    ),
    SUBSETS: IntervalKind(
        "how far the mean over disjoint subsets of the examples scatters", "95 % intervals over subsets"
    ),
    BINOMIAL: IntervalKind(
        "examples as independent draws from where the data come from", "95 % intervals over examples"
    ),
    EXACT: IntervalKind("no random choice and no iteration that could stop early; rounding alone"),
    ONE_SUBSET: IntervalKind("a single subset of the examples was measured, and nothing says how another would differ"),
}


@dataclass(frozen=True)
class Cell:
    """One number of one checkpoint.

    Attributes:
        value: the number.
        lower, upper: its interval, or None.
        interval: what the interval is, of ``INTERVAL_KINDS``; or "none: " and the reason.
        converged: False where the interval does not meet the tolerance.
        origin: data, examples, precision; and ``price``: what it took.
        more: further things to know of it.
        data: the examples alone, alike for all that were measured on the same.
    """

    value: float
    lower: float | None = None
    upper: float | None = None
    interval: str = EXACT
    converged: bool = True
    origin: str = ""
    price: str = ""
    more: str = ""
    data: str = ""

    def __str__(self) -> str:
        return with_mark(self.value, self.lower, self.upper, self.converged)
