"""What a comparison shows, in sentences: what differs, by how much, and how surely; not which is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sharpscope.results.comparison.rows import Row
from sharpscope.results.comparison.subject import Interpolation, Subject, group_subjects
from sharpscope.results.provenance import typed_value
from sharpscope.results.slice import PENDING, SliceResult
from sharpscope.results.statistics import EXACT, INTERVAL_KINDS, NO_INTERVAL, PAIRS, Cell, Difference

# Twenty intervals of 95 % leave out what they should hold once in the mean.
MANY = 20

# What is asked for first; "" is all else.
_ORDER = ("lambda_max", "trace", "m-sharpness", "")


def findings(rows: Sequence[Row], subjects: Sequence[Subject], between: Sequence[Interpolation] = ()) -> list[str]:
    """Sentences, the first of lambda_max: of groups by their intervals, else of each checkpoint against the first.

    They say what differs and how surely. None says that flatter is better or generalises better.
    """
    groups = list(group_subjects(subjects))
    kept = [row for row in rows if row.label != "edge"]
    kept.sort(key=lambda row: next(i for i, head in enumerate(_ORDER) if row.label.startswith(head)))
    said = _of_groups(groups, kept) if groups else _of_checkpoints(subjects, kept)
    return [*said, *_ways(between), *_warnings(subjects, kept)]


def _of_groups(groups: Sequence[str], rows: Sequence[Row]) -> list[str]:
    first, *others = groups
    said, intervals = [], 0
    for row in rows:
        for group in others:
            found = row.differences.get(group)
            if found is None:
                continue
            intervals += found.lower is not None
            said.append(_difference(row, first, group, found))
    if intervals >= MANY:
        chance = f"{intervals / MANY:.0f}"
        said.append(f"Of {intervals} intervals of 95 % about {chance} would leave out no difference by chance alone.")
    return said


def _difference(row: Row, first: str, group: str, found: Difference) -> str:
    what = f"{group}/{first}" if found.ratio else f"{group} - {first}"
    head = f"{row.label}: {what} = {_number(found.value, found.ratio)}"
    counts = [row.spreads[name].runs for name in (first, group)]
    if (found.lower is None or found.upper is None) and min(counts) > 1:
        return f"{head}, alike in all runs, which says nothing of their scatter: no difference is shown."
    if found.lower is None or found.upper is None:
        runs = "one run each says" if counts == [1, 1] else "a group of one run says"
        return f"{head}; {runs} nothing of the scatter over runs."
    over = f"{found.runs} pairs of seeds" if found.by == PAIRS else f"{counts[0]} and {counts[1]} runs, not paired"
    ends = f"{_number(found.lower, found.ratio)} to {_number(found.upper, found.ratio)}"
    return f"{head}, 95 % interval {ends} over {over}{'' if found.sure else ': no difference is shown'}."


def _number(value: float, ratio: bool) -> str:
    return f"{value:.3g}" if ratio else f"{value:+.3g}"


def _of_checkpoints(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[str]:
    first, *others = subjects
    said = []
    for i, subject in enumerate(others, start=1):
        # Of each m one sentence would be said again: what is shown alike is said once.
        told: dict[tuple[str, str, bool], dict[str, str]] = {}
        for row in rows:
            one, two = row.cells[0], row.cells[i]
            if one is None or two is None:
                continue
            found = row.differences.get(subject.name)
            times = found is not None and found.ratio
            amount = f"{found.value:.3g}" if found and times else f"{two.value:.4g} against {one.value:.4g}"
            sure = None if found is None else found.sure
            m = "" if row.m is None else f"m={row.m}"
            told.setdefault((row.quantity, _shown(one, two, sure, first.name, subject.name), times), {})[m] = amount
        for (quantity, shown, times), amounts in told.items():
            each = ", ".join(f"{amount} ({m})" if m else amount for m, amount in amounts.items())
            than = f" times that of {first.name}" if times else f" in {first.name}"
            said.append(f"{quantity} of {subject.name} is {each}{than}; {shown}.")
    if others:
        general = "SAM" if any(map(_by_sam, subjects)) else "the ways they were trained"
        said.append(f"One run each: this says nothing of {general} in general.")
    return said


def _shown(one: Cell, two: Cell, apart: bool | None, first: str, second: str) -> str:
    """How surely two readings differ, whose intervals lie ``apart``, meet, or are not there."""
    if not (math.isfinite(one.value) and math.isfinite(two.value)):
        return "one of them is not finite"
    if not (one.converged and two.converged):
        return f"it has not converged in {second if one.converged else first}, so that nothing is shown"
    if apart is None:
        if one.interval == two.interval == EXACT:
            return "exact on these examples"
        reasons = [r.interval.removeprefix(NO_INTERVAL) for r in (one, two) if r.interval.startswith(NO_INTERVAL)]
        reason = reasons[0] if reasons else ""
        return f"no interval ({reason}), so that nothing is shown" if reason else "not both have an interval"
    told = INTERVAL_KINDS[one.interval].told(apart)
    return told if apart else f"{told}: no difference is shown"


def _by_sam(subject: Subject) -> bool:
    return (typed_value(subject.provenance, "recipe", Mapping) or {}).get("rho") is not None


def _ways(between: Sequence[Interpolation]) -> list[str]:
    """The barrier on each line between minima, on each split."""
    said = []
    for first, second, way in between:
        grid_values = {split: way.barrier(split) for split in way.splits}
        told = " and ".join(f"{height:.3g} ({split})" for split, height in grid_values.items() if height is not None)
        if told:
            inner = int(((way.axes[0] > 0) & (way.axes[0] < 1)).sum())
            said.append(
                f"Between {first} and {second} the loss rises above the straight line between its ends by at most "
                f"{told}, on {inner} points."
            )
    return said


def _warnings(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[str]:
    """What keeps a sentence above from meaning what it seems to."""
    said = []
    uncertified = [s.name for s in subjects if s.eigen is not None and not s.eigen.certified]
    if uncertified:
        said.append(f"There is no certificate that nothing larger was missed of {', '.join(uncertified)}.")
    if group_subjects(subjects):
        unsure = [
            f"{row.label} of {subject.name}"
            for row in rows
            for subject, cell in zip(subjects, row.cells, strict=True)
            if cell is not None and not cell.converged
        ]
        if unsure:
            said.append(f"Not converged: {'; '.join(unsure)}.")
    unfinished = [s.name for s in subjects if any(map(_pending, (s.line, s.surface)))]
    if unfinished:
        said.append(f"Slices are unfinished of {', '.join(unfinished)}.")
    return said


def _pending(result: SliceResult | None) -> bool:
    return result is not None and bool((result.status == PENDING).any())
