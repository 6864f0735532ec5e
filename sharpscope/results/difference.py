"""By how much one number differs from another, and how surely."""

from __future__ import annotations

from dataclasses import dataclass

from sharpscope.tables import with_bound

# How the interval came about: Student's over pairs of runs, Welch's over runs, or what both numbers' own ends allow.
PAIRS, WELCH, ENDS = "pairs", "Welch", "ends"

# A factor whose interval is wider than this share of it is shown with both ends.
WIDE = 0.1


@dataclass(frozen=True)
class Difference:
    """A second number less a first, or over it; of groups of runs the difference or factor of their means.

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
        """Whether the interval leaves out no difference; None where there is none."""
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
        return "" if "±" in self.head else bracket(self.lower, self.upper)

    def __str__(self) -> str:
        return f"{self.head}{self.ends}"


def bracket(lower: float | None, upper: float | None) -> str:
    """ " [0.431, 0.559]", nothing where there is no interval."""
    return "" if lower is None or upper is None else f" [{lower:.3g}, {upper:.3g}]"
