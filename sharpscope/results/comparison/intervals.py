"""A number of a checkpoint with its interval, and the kinds of interval: what each covers, and when two differ."""

from __future__ import annotations

from dataclasses import dataclass

from sharpscope.tables import with_bound

NUMERICAL = "bound on the numerical error"
SAMPLED = "95 % over examples, for all the data"
PROBED = "one standard error over random probes"
PROBED_SAMPLED = "one standard error over random probes and examples, for all the data"
SUBSETS = "95 % over subsets"
BINOMIAL = "95 % over examples (Wilson 1927)"
EXACT = "exact on these examples"
# Where a number has no interval, this and the reason.
NONE = "none: "
ONE_SUBSET = f"{NONE}one subset"


# A standard error reaches so many times as far for about 95 %.
TWICE = 2.0


@dataclass(frozen=True)
class Kind:
    """A kind of interval.

    Attributes:
        meaning: for a glossary.
        ends: what two of them are called, that meet or do not.
        reach: how many times as wide it is taken, for about 95 %.
    """

    meaning: str
    ends: str = ""
    reach: float = 1.0

    def told(self, apart: bool) -> str:
        """What is said of two numbers whose intervals leave a gap, or do not."""
        if self.reach == TWICE:
            return f"they are {'more than' if apart else 'within'} two standard errors of each{' apart' * apart}"
        return f"their {self.ends} {'do not ' * apart}meet"


KINDS = {
    NUMERICAL: Kind(
        "holds the exact value on these examples: from residuals, or from interlacing where that is tighter",
        "numerical bounds",
    ),
    SAMPLED: Kind(
        "these examples stand for more; the interval is of the whole they were drawn from",
        "95 % intervals over examples",
    ),
    PROBED: Kind(
        "how far an estimate by random vectors scatters; about two thirds of such intervals hold the exact value",
        reach=TWICE,
    ),
    PROBED_SAMPLED: Kind(
        "that scatter and that of the sample of examples, added in squares; of the whole it was drawn from",
        reach=TWICE,
    ),
    SUBSETS: Kind("how far the mean over disjoint subsets of the examples scatters", "95 % intervals over subsets"),
    BINOMIAL: Kind("examples as independent draws from where the data come from", "95 % intervals over examples"),
    EXACT: Kind("no random choice and no iteration that could stop early; rounding alone"),
    ONE_SUBSET: Kind("a single subset of the examples was measured, and nothing says how another would differ"),
}


@dataclass(frozen=True)
class Reading:
    """One number of one checkpoint.

    Attributes:
        value: the number.
        lower, upper: its interval, or None.
        interval: what the interval is, of ``KINDS``; or "none: " and the reason.
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
        mark = "" if self.converged else "?"
        if self.lower is None or self.upper is None:
            return f"{self.value:.4g}{mark}"
        return f"{with_bound(self.value, self.lower, self.upper)}{mark}"
