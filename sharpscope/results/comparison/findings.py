"""What a comparison shows, in sentences: what differs, by how much, and how surely; not which is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sharpscope.results.comparison.rows import Row
from sharpscope.results.comparison.subject import Interpolation, Subject, group_subjects
from sharpscope.results.origin import typed_value
from sharpscope.results.statistics import EXACT, INTERVAL_KINDS, NO_INTERVAL, PAIRS, Cell, Difference

# Twenty intervals of 95 % leave out what they should hold once in the mean.
INTERVALS_PER_MISS = 20

# What is asked for first; "" is all else.
_ROW_ORDER = ("lambda_max", "trace", "m-sharpness", "")


def findings(rows: Sequence[Row], subjects: Sequence[Subject], between: Sequence[Interpolation] = ()) -> list[str]:
    """Sentences, the first of lambda_max: of groups by their intervals, else of each checkpoint against the first.

    They say what differs and how surely. None says that flatter is better or generalises better.
    """
    groups = list(group_subjects(subjects))
    kept = [row for row in rows if row.label != "edge"]
    kept.sort(key=lambda row: next(i for i, start in enumerate(_ROW_ORDER) if row.label.startswith(start)))
    sentences = _group_findings(groups, kept) if groups else _checkpoint_findings(subjects, kept)
    return [*sentences, *_barrier_findings(between), *_warnings(subjects, kept)]


def _group_findings(groups: Sequence[str], rows: Sequence[Row]) -> list[str]:
    first, *others = groups
    sentences, intervals = [], 0
    for row in rows:
        for group in others:
            found = row.differences.get(group)
            if found is None:
                continue
            intervals += found.lower is not None
            sentences.append(_difference_sentence(row, first, group, found))
    if intervals >= INTERVALS_PER_MISS:
        chance = f"{intervals / INTERVALS_PER_MISS:.0f}"
        sentences.append(
            f"Of {intervals} intervals of 95 % about {chance} would leave out no difference by chance alone."
        )
    return sentences


def _difference_sentence(row: Row, first: str, group: str, found: Difference) -> str:
    what = f"{group}/{first}" if found.ratio else f"{group} - {first}"
    start = f"{row.label}: {what} = {_number(found.value, found.ratio)}"
    counts = [row.spreads[name].runs for name in (first, group)]
    if (found.lower is None or found.upper is None) and min(counts) > 1:
        return f"{start}, alike in all runs, which says nothing of their scatter: no difference is shown."
    if found.lower is None or found.upper is None:
        runs = "one run each says" if counts == [1, 1] else "a group of one run says"
        return f"{start}; {runs} nothing of the scatter over runs."
    over = f"{found.runs} pairs of seeds" if found.by == PAIRS else f"{counts[0]} and {counts[1]} runs, not paired"
    ends = f"{_number(found.lower, found.ratio)} to {_number(found.upper, found.ratio)}"
    return f"{start}, 95 % interval {ends} over {over}{'' if found.sure else ': no difference is shown'}."


def _number(value: float, ratio: bool) -> str:
    return f"{value:.3g}" if ratio else f"{value:+.3g}"


def _checkpoint_findings(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[str]:
    first, *others = subjects
    sentences = []
    for i, subject in enumerate(others, start=1):
        # Of each m one sentence would be said again: what is shown alike is said once.
        amounts_by_claim: dict[tuple[str, str, bool], dict[str, str]] = {}
        for row in rows:
            one, two = row.cells[0], row.cells[i]
            if one is None or two is None:
                continue
            found = row.differences.get(subject.name)
            is_ratio = found is not None and found.ratio
            amount = f"{found.value:.3g}" if found and is_ratio else f"{two.value:.4g} against {one.value:.4g}"
            significant = None if found is None else found.sure
            m = "" if row.m is None else f"m={row.m}"
            amounts_by_claim.setdefault(
                (row.quantity, _certainty(one, two, significant, first.name, subject.name), is_ratio), {}
            )[m] = amount
        for (quantity, certainty, is_ratio), amounts in amounts_by_claim.items():
            each = ", ".join(f"{amount} ({m})" if m else amount for m, amount in amounts.items())
            relation = f" times that of {first.name}" if is_ratio else f" in {first.name}"
            sentences.append(f"{quantity} of {subject.name} is {each}{relation}; {certainty}.")
    if others:
        recipes = [typed_value(subject.provenance, "recipe", Mapping) or {} for subject in subjects]
        by_sam = any(recipe.get("rho") is not None for recipe in recipes)
        general = "SAM" if by_sam else "the ways they were trained"
        sentences.append(f"One run each: this says nothing of {general} in general.")
    return sentences


def _certainty(one: Cell, two: Cell, significant: bool | None, first: str, second: str) -> str:
    """How surely two readings differ, whose intervals lie ``apart``, meet, or are not there."""
    if not (math.isfinite(one.value) and math.isfinite(two.value)):
        return "one of them is not finite"
    if not (one.converged and two.converged):
        return f"it has not converged in {second if one.converged else first}, so that nothing is shown"
    if significant is None:
        if one.interval == two.interval == EXACT:
            return "exact on these examples"
        reasons = [r.interval.removeprefix(NO_INTERVAL) for r in (one, two) if r.interval.startswith(NO_INTERVAL)]
        reason = reasons[0] if reasons else ""
        return f"no interval ({reason}), so that nothing is shown" if reason else "not both have an interval"
    relation = INTERVAL_KINDS[one.interval].describe(significant)
    return relation if significant else f"{relation}: no difference is shown"


def _barrier_findings(between: Sequence[Interpolation]) -> list[str]:
    """The barrier on each line between minima, on each split."""
    sentences = []
    for first, second, line in between:
        heights = {split: line.barrier(split) for split in line.splits}
        barriers = " and ".join(f"{height:.3g} ({split})" for split, height in heights.items() if height is not None)
        if barriers:
            inner = int(((line.axes[0] > 0) & (line.axes[0] < 1)).sum())
            sentences.append(
                f"Between {first} and {second} the loss rises above the straight line between its ends by at most "
                f"{barriers}, on {inner} points."
            )
    return sentences


def _warnings(subjects: Sequence[Subject], rows: Sequence[Row]) -> list[str]:
    """What keeps a sentence above from meaning what it seems to."""
    sentences = []
    uncertified = [s.name for s in subjects if s.eigen is not None and not s.eigen.certified]
    if uncertified:
        sentences.append(f"There is no certificate that nothing larger was missed of {', '.join(uncertified)}.")
    if group_subjects(subjects):
        unsure = [
            f"{row.label} of {subject.name}"
            for row in rows
            for subject, cell in zip(subjects, row.cells, strict=True)
            if cell is not None and not cell.converged
        ]
        if unsure:
            sentences.append(f"Not converged: {'; '.join(unsure)}.")
    unfinished = [s.name for s in subjects if any(r is not None and not r.complete for r in (s.line, s.surface))]
    if unfinished:
        sentences.append(f"Slices are unfinished of {', '.join(unfinished)}.")
    return sentences
