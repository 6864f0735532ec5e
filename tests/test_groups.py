"""Intervals over runs are those of the textbook, and hold the truth as often as they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from sharpscope.errors import DataError
from sharpscope.results import Cost, EigenResult, Measure, SharpnessResult, statistics
from sharpscope.results.comparison import Comparison, Performance, Subject

DRAW = np.random.default_rng(0)


def row_of(paired: bool = False, **groups: Sequence[float]) -> Any:
    """The row of the test loss of groups of runs with these losses, the runs of several in pairs or not."""
    subjects = [
        Subject(
            name=f"{group} {i}",
            group=group,
            pair=str(i) if paired else None,
            performance={"test": Performance(float(loss), None, 10)},
        )
        for group, losses in groups.items()
        for i, loss in enumerate(losses)
    ]
    (row,) = Comparison(subjects=tuple(subjects)).rows
    return row


def spread(losses: Sequence[float]) -> Any:
    """The mean of a group: the geometric one of positive losses."""
    return row_of(a=losses, b=losses).spreads["a"]


def difference(first: Sequence[float], second: Sequence[float], *, paired: bool = False) -> Any:
    """What two groups differ by: a factor of positive losses."""
    return row_of(paired, a=first, b=second).differences["b"]


@pytest.mark.parametrize("runs", [2, 3, 5, 12])
def test_a_mean_has_students_interval(runs: int) -> None:
    """SciPy's t interval of the mean, and of the logarithms' for quantities that range over factors."""
    values = DRAW.lognormal(size=runs)
    for losses, back, kept in ((values - 100, float, values - 100), (values, math.exp, np.log(values))):
        found, interval = spread(losses), stats.ttest_1samp(kept, 0).confidence_interval()
        assert (found.lower, found.upper) == pytest.approx((back(interval.low), back(interval.high)), rel=1e-9)
        assert found.value == pytest.approx(back(kept.mean()))
        assert found.runs == runs


@pytest.mark.parametrize("runs", [2, 3, 5, 12])
def test_pairs_have_the_paired_interval(runs: int) -> None:
    """SciPy's interval of related samples, whatever all the runs of a pair have in common."""
    shared = 10 * DRAW.normal(size=runs) - 100
    first, second = shared + DRAW.normal(size=runs), shared + DRAW.normal(size=runs) + 1
    found = difference(first, second, paired=True)
    expected = stats.ttest_rel(second, first).confidence_interval()
    assert (found.lower, found.upper) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (found.freedom, found.runs) == (runs - 1, runs)


@pytest.mark.parametrize(("one", "two"), [(2, 2), (3, 7), (12, 5)])
def test_unpaired_runs_have_welchs_interval(one: int, two: int) -> None:
    """SciPy's interval for unequal variances, but for degrees of freedom that are rounded down, never up."""
    first, second = DRAW.normal(size=one) - 100, 3 * DRAW.normal(size=two) - 99
    found, theirs = difference(first, second), stats.ttest_ind(second, first, equal_var=False)
    expected = theirs.confidence_interval()
    assert found.freedom == max(1, int(theirs.df))
    error = theirs.statistic and found.value / theirs.statistic
    half = stats.t.ppf(0.975, found.freedom) * error
    assert (found.lower, found.upper) == pytest.approx((found.value - half, found.value + half), rel=1e-9)
    assert found.lower is not None
    assert found.lower <= expected.low + 1e-12


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("ratio", [True, False])
def test_intervals_hold_the_truth_as_often_as_they_say(paired: bool, ratio: bool) -> None:
    """Over 1,000 draws of 5 runs of each kind 95 % do, within four standard errors; scatter differs by a factor 4."""
    draw, held, truth = np.random.default_rng(1), 0, 0.7
    for _ in range(1000):
        shared = draw.normal(size=5) if paired else np.zeros(5)
        first, second = shared + draw.normal(size=5), shared + truth + draw.normal(scale=0.25, size=5)
        if ratio:
            first, second = np.exp(first), np.exp(second)
        found = statistics.difference(first, second, paired=paired, ratio=ratio)
        assert found.lower is not None
        assert found.upper is not None
        held += found.lower <= (math.exp(truth) if ratio else truth) <= found.upper
    reach = 4 * math.sqrt(0.95 * 0.05 / 1000)
    assert held / 1000 > 0.95 - reach
    assert held / 1000 < 0.95 + reach + (0 if paired else 0.02)  # Welch's is wider, freedom being rounded down


@pytest.mark.parametrize("kind", ["shared", "independent", "bound"])
@pytest.mark.parametrize("runs", [2, 3])
@pytest.mark.parametrize("paired", [True, False])
def test_intervals_of_few_runs_count_the_error_of_each_run(kind: str, runs: int, paired: bool) -> None:
    """Sampling errors of any correlation within a group, and numerical bounds all on one side: 95 % hold the truth."""
    draw, held, held_means, trials, truth = np.random.default_rng(2), 0, 0, 400, 3.0
    for _ in range(trials):
        groups = {}
        for name, centre, side in (("a", 10.0, -1), ("b", 10.0 + truth, 1)):
            error = {
                "shared": np.full(runs, draw.normal()),
                "independent": draw.normal(size=runs),
                "bound": np.full(runs, 1.96 * side),
            }[kind]
            groups[name] = centre + draw.normal(scale=0.5, size=runs) + error - 100  # not positive: differences
        subjects = [
            checkpoint(f"{name} {i}", top, 1.96, sampled=kind != "bound", group=name, pair=str(i) if paired else None)
            for name, tops in groups.items()
            for i, top in enumerate(tops)
        ]
        row = next(row for row in Comparison(subjects=tuple(subjects)).rows if row.label == "lambda_max")
        found, mean = row.differences["b"], row.spreads["a"]
        held += found.lower <= truth <= found.upper  # type: ignore[operator]
        held_means += mean.lower <= 10.0 - 100 <= mean.upper  # type: ignore[operator]
        alone = statistics.difference(groups["a"], groups["b"], paired=paired)
        assert found.lower < alone.lower  # type: ignore[operator]
        assert found.upper > alone.upper  # type: ignore[operator]
    reach = 4 * math.sqrt(0.95 * 0.05 / trials)
    assert min(held, held_means) / trials > 0.95 - reach


@pytest.mark.parametrize("log", [False, True])
def test_errors_of_runs_add_in_squares_and_bounds_as_they_are(log: bool) -> None:
    """By hand: 4 and 6 with 1 and 2 at 95 %, or with bounds of 1 and 2, or one standard error of 0.5 and 1."""
    sampled = [statistics.Cell(4.0, 3.0, 5.0, statistics.SAMPLED), statistics.Cell(6.0, 4.0, 8.0, statistics.SUBSETS)]
    probed = [
        statistics.Cell(4.0, 3.5, 4.5, statistics.PROBED),
        statistics.Cell(6.0, 5.0, 7.0, statistics.PROBED_SAMPLED),
    ]
    bounds = [statistics.Cell(c.value, c.lower, c.upper, statistics.NUMERICAL) for c in sampled]
    exact = [statistics.Cell(4.0), statistics.Cell(6.0)]
    to = np.log if log else np.asarray
    own = (to(4.0) - to(3.0) + to(6.0) - to(4.0)) / 2  # the further end of each
    scatter = stats.t.ppf(0.975, 1) * (to(6.0) - to(4.0)) / 2
    for cells, half in (
        (sampled, math.hypot(scatter, own)),
        (probed, math.hypot(scatter, own)),
        (bounds, scatter + own),
        (exact, scatter),
    ):
        found = statistics.spread([4.0, 6.0], log=log, own=statistics.OwnError.of(cells, log=log))
        middle = to([4.0, 6.0]).mean()
        assert to([found.lower, found.upper]) == pytest.approx([middle - half, middle + half], rel=1e-9)


def test_the_sentence_shows_no_difference_that_the_runs_own_errors_cover() -> None:
    """Two groups of two runs, far apart in their scatter: shown with exact numbers, not with wide intervals."""
    said = []
    for half in (1e-6, 0.9):
        tops = {"a": (2.0, 2.001), "b": (2.5, 2.501)}
        subjects = [
            checkpoint(f"{name} {i}", top, half, sampled=True, group=name)
            for name, values in tops.items()
            for i, top in enumerate(values)
        ]
        said.append(next(s for s in Comparison(subjects=tuple(subjects)).findings if s.startswith("lambda_max")))
    assert "no difference is shown" not in said[0]
    assert said[1].endswith("no difference is shown.")


@pytest.mark.parametrize(("right", "examples"), [(0, 10), (3, 10), (10, 10), (9010, 10_000), (1, 1)])
def test_an_accuracy_has_wilsons_interval(right: int, examples: int) -> None:
    """SciPy's score interval, without a continuity correction; it stays within 0 and 1 and holds the share."""
    expected = stats.binomtest(right, examples).proportion_ci(method="wilson")
    one = Subject(name="a", performance={"test": Performance(0.1, right / examples, examples)})
    (cell,) = Comparison(subjects=(one,)).rows[1].cells
    assert cell is not None
    assert (cell.lower, cell.upper) == pytest.approx((expected.low, expected.high), abs=1e-7)
    assert 0 <= cell.lower <= right / examples <= cell.upper <= 1  # type: ignore[operator]


def test_one_run_says_nothing_of_the_scatter() -> None:
    """A mean and a difference without an interval, and a difference without one shows nothing."""
    assert (spread([2.0]).lower, spread([2.0]).upper) == (None, None)
    for found in (difference([2.0], [1.0], paired=True), difference([2.0], [1.0, 3.0])):
        assert (found.lower, found.upper, found.freedom, found.sure) == (None, None, 0, None)
    assert difference([2.0], [1.0]).value == 0.5


def test_runs_without_scatter_have_a_point() -> None:
    """Equal values in each group: the interval is the difference itself, sure where it is not none."""
    found = difference([1.0, 1.0], [2.0, 2.0])
    assert (found.value, found.lower, found.upper, found.sure) == pytest.approx((2, 2, 2, True))
    assert not difference([1.0, 1.0], [1.0, 1.0]).sure


def test_what_has_no_interval_is_refused() -> None:
    """Ratios of what is not positive, pairs of unequal numbers, and nothing at all."""
    for wrong, message in (
        (lambda: statistics.difference([1.0, -1.0], [1.0, 1.0], ratio=True), "positive"),
        (lambda: statistics.spread([0.0], log=True), "positive"),
        (lambda: statistics.difference([1.0], [1.0, 2.0], paired=True), "as many runs"),
        (lambda: statistics.spread([]), "at least one run"),
        (lambda: statistics.difference([], [1.0]), "at least one run"),
    ):
        with pytest.raises(DataError, match=message):
            wrong()


@pytest.mark.parametrize(
    ("second", "paired"),
    [(["1", "0"], True), (["0", "2"], False), (["0", "0"], False), (["0", None], False), (["0", "1", "2"], False)],
)
def test_runs_are_paired_only_where_each_has_its_partner(second: list[str | None], paired: bool) -> None:
    """In any order; a missing, doubled or unknown seed on either side leaves all unpaired."""
    subjects = [Subject(name=f"a{i}", group="a", pair=seed) for i, seed in enumerate(["0", "1"])]
    subjects += [Subject(name=f"b{i}", group="b", pair=seed) for i, seed in enumerate(second)]
    found = Comparison(subjects=tuple(subjects)).paired("a", "b")
    assert (found is not None) == paired
    assert all(one.pair == two.pair for one, two in found or [])


def checkpoint(name: str, top: float, half: float, *, sampled: bool = False, **more: object) -> Subject:
    """A checkpoint with lambda_max = top, known to ``half`` on its examples, or for all the data where sampled."""
    value, reach = np.array([top]), np.array([1e-6 if sampled else half])
    sampling = {"lower": [top - half], "upper": [top + half], "ratio": None} if sampled else None
    converged = np.array([more.pop("converged", True)])
    eigen = EigenResult(
        value, reach, value - reach, value + reach, converged, 0.1, 0.1, Cost(1, 1, 1.0, 1.0), sampling=sampling
    )
    return Subject(name=name, eigen=eigen, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("half", "sampled", "said"),
    [
        (0.2, False, "their numerical bounds do not meet."),
        (0.6, False, "their numerical bounds meet: no difference is shown."),
        (0.2, True, "their 95 % intervals over examples do not meet."),
        (0.6, True, "their 95 % intervals over examples meet: no difference is shown."),
    ],
)
def test_checkpoints_differ_only_where_their_intervals_do_not_meet(half: float, sampled: bool, said: str) -> None:
    """The sampling interval decides where there is one, however small the numerical error; two runs are no rule."""
    two = (checkpoint("a", 2.0, half, sampled=sampled), checkpoint("b", 1.0, half, sampled=sampled))
    first, second = Comparison(subjects=two).findings
    assert first == f"lambda_max of b is 0.5 times that of a; {said}"
    assert second == "One run each: this says nothing of the ways they were trained in general."


def test_what_has_not_converged_or_is_exact_is_said_so() -> None:
    """No interval of a value that has not converged decides; a loss on the same examples has none."""
    performance = {"test": Performance(0.5, None, 100)}
    one = checkpoint("a", 2.0, 0.1, performance=performance)
    two = checkpoint("b", 1.0, 0.1, performance=performance, converged=False)
    first, second, _ = Comparison(subjects=(one, two)).findings
    assert first.endswith("; it has not converged in b, so that nothing is shown.")
    assert second == "test loss of b is 1 times that of a; exact on these examples."


@pytest.mark.parametrize(("scatter", "shown"), [(0.01, True), (1.0, False)])
def test_groups_differ_only_where_the_interval_leaves_one_out(scatter: float, shown: bool) -> None:
    """The ratio and its interval over pairs of seeds; one that holds 1 shows no difference."""
    draw, subjects = np.random.default_rng(3), []
    for group, level in (("sgd", 2.0), ("sam", 1.0)):
        for i, noise in enumerate(np.exp(scatter * draw.normal(size=4))):
            subjects.append(checkpoint(f"{group}{i}", level * noise, 1e-3, group=group, pair=str(i)))
    (said,) = Comparison(subjects=tuple(subjects)).findings
    assert said.startswith("lambda_max: sam/sgd = ")
    assert said.endswith(f"over 4 pairs of seeds{'' if shown else ': no difference is shown'}.")


def test_a_single_subset_is_not_called_exact() -> None:
    """m-sharpness of one subset has no interval, says why, and shows no difference."""
    subjects = []
    for name, value in (("sgd.pt", 0.2), ("sam.pt", 0.1)):
        measure = Measure("m-sharpness", value, settings={"m": 256, "rho": 0.05})
        found = SharpnessResult((measure,), 0.1, 0.1, Cost(1, 0, 1.0, 1.0), {"num_examples": 300})
        subjects.append(Subject(name=name, sharpness=found))
    compared = Comparison(subjects=tuple(subjects))
    (row,) = compared.rows
    assert {cell.interval for cell in row.cells} == {"none: one subset"}
    said = "m-sharpness, rho=0.05 of sam.pt is 0.5 (m=256) times that of sgd.pt; no interval (one subset)"
    assert compared.findings[0].startswith(said)


def test_equal_numbers_say_nothing_of_the_scatter() -> None:
    """Accuracies that are equal in all runs, as of few examples, have no interval and show no difference."""
    groups = {"a": (0.9, 0.8), "b": (0.9 - 1 / 64, 0.8 - 1 / 64), "c": (0.995, 0.995)}
    subjects = [
        Subject(name=f"{g} {i}", group=g, pair=str(i), performance={"test": Performance(0.1, share, 64)})
        for g, shares in groups.items()
        for i, share in enumerate(shares)
    ]
    row = Comparison(subjects=tuple(subjects)).rows[1]
    assert (row.spreads["c"].lower, row.spreads["c"].upper) == (None, None)
    found = row.differences["b"]
    assert (found.value, found.lower, found.sure) == (pytest.approx(-1 / 64), None, None)
