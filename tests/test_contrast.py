"""Of two checkpoints the factor or difference of a number, as far as both intervals tell."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from sharpscope import Comparison, Cost, Estimate, Measure, SharpnessResult, TraceResult
from sharpscope.results.comparison import Performance, Subject

COST = Cost(1, 0, 1.0, 1.0)


def known(value: float, lower: float | None = None, upper: float | None = None, converged: bool = True) -> Subject:
    """A checkpoint whose m-sharpness is ``value``, with 95 % over subsets from ``lower`` to ``upper``."""
    error = None if lower is None else 0.0
    measure = Measure("m-sharpness", value, error, lower, upper, {"m": 8, "converged": converged})
    return Subject(name=str(value), sharpness=SharpnessResult((measure,), 0.1, 0.1, COST))


def exact(loss: float) -> Subject:
    return Subject(name=str(loss), performance={"test": Performance(loss, None, 10)})


def of(one: Subject, two: Subject) -> Any:
    """What the row of the number that both have says of the second against the first."""
    (row,) = Comparison(subjects=(replace(one, name="one"), replace(two, name="two"))).rows
    return row.differences["two"]


def test_a_factor_lies_between_the_quotients_of_opposite_ends() -> None:
    """8 in [6, 12] over 4 in [2, 5] is 2 in [6/5, 12/2]."""
    found = of(known(4.0, 2.0, 5.0), known(8.0, 6.0, 12.0))
    assert (found.value, found.lower, found.upper, found.ratio) == (2.0, 6 / 5, 6.0, True)


def test_a_difference_lies_between_the_differences_of_opposite_ends() -> None:
    """The first accuracy's lowest from the second's highest, and the other way round; accuracies have no factor."""
    one, two = (Subject(name=str(a), performance={"test": Performance(0.1, a, 100)}) for a in (0.5, 0.8))
    row = Comparison(subjects=(one, two)).rows[1]
    first, second = row.cells
    found = row.differences["0.8"]
    assert row.label == "test accuracy"
    assert first is not None
    assert second is not None
    assert (found.value, found.ratio) == (pytest.approx(0.3), False)
    assert (found.lower, found.upper) == (second.lower - first.upper, second.upper - first.lower)  # type: ignore[operator]


@pytest.mark.parametrize("second", [2.0, 3.9, 4.1, 5.0, 6.0, 9.0])
@pytest.mark.parametrize("factor", [True, False])
def test_it_is_sure_where_the_intervals_leave_a_gap(second: float, factor: bool) -> None:
    """4 +-1 and x +-1 are told apart where |x - 4| > 2, by factor and, below zero, by difference."""
    found = of(*(known(x, x - 1, x + 1) for x in (value - (0 if factor else 100) for value in (4.0, second))))
    assert found.ratio is factor
    assert found.sure is (abs(second - 4) > 2)


def test_a_standard_error_counts_twice() -> None:
    """Traces of 4 +-1 and 7 +-1 are not told apart where 1 is a standard error; nor 1 +-1 and 4 +-1, subtracted."""
    for pair, ratio, ends in (((4.0, 7.0), True, (5 / 6, 9 / 2)), ((1.0, 4.0), False, (-1.0, 7.0))):
        found = of(
            *(Subject(name=str(x), trace=TraceResult(Estimate(x, 1.0), Estimate(x, 1.0), 0.1, 0.1, COST)) for x in pair)
        )
        assert (found.sure, found.ratio, (found.lower, found.upper)) == (False, ratio, ends)


@pytest.mark.parametrize(("one", "two"), [((-1.0, 5.0), (6.0, 12.0)), ((2.0, 5.0), (-1.0, 12.0))])
def test_a_number_that_may_be_zero_has_no_factor(one: tuple[float, float], two: tuple[float, float]) -> None:
    """8 against 4 is 4 where either interval reaches zero, for a quotient could then be anything."""
    found = of(known(4.0, *one), known(8.0, *two))
    assert (found.value, found.lower, found.upper, found.ratio) == (4.0, two[0] - one[1], two[1] - one[0], False)


def test_numbers_of_no_factor_are_subtracted() -> None:
    """A value of zero or less has no quotient."""
    assert of(known(-1.0, -2.0, 0.0), known(3.0, 2.0, 4.0)).value == 4.0


def test_without_intervals_nothing_is_said_of_how_surely() -> None:
    """Exact numbers have a factor, and no interval."""
    found = of(exact(4.0), exact(8.0))
    assert (found.value, found.lower, found.upper, found.sure) == (2.0, None, None, None)
    assert str(found) == "x 2"


@pytest.mark.parametrize("other", [None, math.nan, math.inf])
def test_what_is_missing_or_not_finite_is_not_compared(other: float | None) -> None:
    """There is no contrast, and no number made up."""
    two = Subject(name="two") if other is None else replace(exact(other), name="two")
    for pair in ((exact(1.0), two), (two, exact(1.0))):
        (row,) = Comparison(subjects=pair).rows
        assert row.differences == {}


def test_it_is_written_to_the_digits_that_it_supports() -> None:
    """Narrow factors with a half-width, others and differences with both ends, what did not converge with a ?."""
    one, none = known(1.0, 1.0, 1.0), known(0.0, 0.0, 0.0)
    assert str(of(one, known(0.305861, 0.305858, 0.305864))) == "x 0.305861 ±0.000003"
    assert str(of(one, known(0.5, 0.2, 1.3))) == "x 0.5 [0.2, 1.3]"
    assert str(of(none, known(0.0123, -0.02, 0.04))) == "+0.0123 [-0.02, 0.04]"
    assert str(of(known(1.0), known(-2.0, converged=False))) == "-3?"
