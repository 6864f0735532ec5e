"""Of two checkpoints the factor or difference of a number, as far as both intervals tell."""

from __future__ import annotations

import math

import pytest

from sharpscope.results.statistics import EXACT, PROBED, SUBSETS, Cell, Difference, contrast


def of(one: Cell, two: Cell, factor: bool = True) -> Difference:
    found = contrast(one, two, factor)
    assert found is not None
    return found


def test_a_factor_lies_between_the_quotients_of_opposite_ends() -> None:
    """8 in [6, 12] over 4 in [2, 5] is 2 in [6/5, 12/2]."""
    found = of(Cell(4.0, 2.0, 5.0, SUBSETS), Cell(8.0, 6.0, 12.0, SUBSETS))
    assert (found.value, found.lower, found.upper, found.ratio) == (2.0, 6 / 5, 6.0, True)


def test_a_difference_lies_between_the_differences_of_opposite_ends() -> None:
    """8 in [6, 12] less 4 in [2, 5] is 4 in [6 - 5, 12 - 2]."""
    found = of(Cell(4.0, 2.0, 5.0, SUBSETS), Cell(8.0, 6.0, 12.0, SUBSETS), factor=False)
    assert (found.value, found.lower, found.upper, found.ratio) == (4.0, 1.0, 10.0, False)


@pytest.mark.parametrize("second", [2.0, 3.9, 4.1, 5.0, 6.0, 9.0])
@pytest.mark.parametrize("factor", [True, False])
def test_it_is_sure_where_the_intervals_leave_a_gap(second: float, factor: bool) -> None:
    """4 +-1 and x +-1 are told apart where |x - 4| > 2, by factor and by difference."""
    found = of(Cell(4.0, 3.0, 5.0, SUBSETS), Cell(second, second - 1, second + 1, SUBSETS), factor=factor)
    assert found.sure is (abs(second - 4) > 2)


def test_a_standard_error_counts_twice() -> None:
    """4 +-1 and 7 +-1 are not told apart where 1 is a standard error."""
    pair = [Cell(x, x - 1, x + 1, PROBED) for x in (4.0, 7.0)]
    assert of(*pair).sure is False
    assert (of(*pair, factor=False).lower, of(*pair, factor=False).upper) == (-1.0, 7.0)


@pytest.mark.parametrize(("one", "two"), [((-1.0, 5.0), (6.0, 12.0)), ((2.0, 5.0), (-1.0, 12.0))])
def test_a_number_that_may_be_zero_has_no_factor(one: tuple[float, float], two: tuple[float, float]) -> None:
    """8 against 4 is 4 where either interval reaches zero, for a quotient could then be anything."""
    found = of(Cell(4.0, *one, SUBSETS), Cell(8.0, *two, SUBSETS))
    assert (found.value, found.lower, found.upper, found.ratio) == (4.0, two[0] - one[1], two[1] - one[0], False)


def test_numbers_of_no_factor_are_subtracted() -> None:
    """A value of zero or less has no quotient."""
    assert of(Cell(-1.0, -2.0, 0.0, SUBSETS), Cell(3.0, 2.0, 4.0, SUBSETS)).value == 4.0


def test_without_intervals_nothing_is_said_of_how_surely() -> None:
    """Exact numbers have a factor, and no interval."""
    found = of(Cell(4.0, interval=EXACT), Cell(8.0, interval=EXACT))
    assert (found.value, found.lower, found.upper, found.sure) == (2.0, None, None, None)
    assert str(found) == "x 2"


@pytest.mark.parametrize("other", [None, Cell(math.nan), Cell(math.inf)])
def test_what_is_missing_or_not_finite_is_not_compared(other: Cell | None) -> None:
    """There is no contrast, and no number made up."""
    assert contrast(Cell(1.0), other, True) is None
    assert contrast(other, Cell(1.0), True) is None


def test_it_is_written_to_the_digits_that_it_supports() -> None:
    """Narrow factors with a half-width, others and differences with both ends, what did not converge with a ?."""
    assert str(Difference(0.305861, 0.305858, 0.305864, True)) == "x 0.305861 ±0.000003"
    assert str(Difference(0.5, 0.2, 1.3, True)) == "x 0.5 [0.2, 1.3]"
    assert str(Difference(0.0123, -0.02, 0.04, False)) == "+0.0123 [-0.02, 0.04]"
    assert str(Difference(-3.0, None, None, False, converged=False)) == "-3?"
