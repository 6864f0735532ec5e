"""A comparison as a table of text and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sharpscope.results.comparison.rows import Row, contrasted
from sharpscope.results.comparison.subject import Subject, groups_of
from sharpscope.results.origin import typed
from sharpscope.results.table import Table


def comparison_table(rows: Sequence[Row], subjects: Sequence[Subject]) -> Table:
    """A row a quantity, a column a checkpoint or a group, then what the quantities are."""
    return Table(_cells(rows, subjects), _notes(rows, subjects))


def _cells(rows: Sequence[Row], subjects: Sequence[Subject]) -> list[list[str]]:
    """With groups their means, since the runs are many, else every checkpoint; and how others differ from the first."""
    groups, (first, others) = list(groups_of(subjects)), contrasted(subjects)
    cells = [["", *(groups or [s.name for s in subjects]), *(f"{name} against {first}" for name in others)]]
    for row in rows:
        numbers = [row.spreads.get(group) for group in groups] if groups else row.readings
        cells.append([row.label, *map(_shown, numbers), *(_shown(row.differences.get(name)) for name in others)])
    return cells


def _shown(number: object) -> str:
    return "-" if number is None else str(number)


def _notes(rows: Sequence[Row], subjects: Sequence[Subject]) -> list[str]:
    groups = groups_of(subjects)
    meant: dict[str, list[str]] = {}
    for row in rows:
        kinds = dict.fromkeys(r.interval for r in row.readings if r is not None)
        # Of groups the columns have intervals over runs.
        of = "" if groups else f". Intervals: {', '.join(kinds)}"
        meant.setdefault(f"{row.definition}{of}", []).append(row.label)
    notes = [f"{_together(labels)}: {said}." for said, labels in meant.items()]
    measured: dict[str, list[str]] = {}
    for row in rows:
        for data in dict.fromkeys(r.data for r in row.readings if r is not None):
            measured.setdefault(data, []).append(row.label)
    notes += [f"On {data}: {_together(labels)}." for data, labels in measured.items() if data]
    for subject in subjects:
        left_out = typed(subject.provenance, "left_out", Mapping) or {}
        notes += [f"{subject.name}: no {what}. {why}" for what, why in left_out.items()]
    if any(r is not None and not r.converged for row in rows for r in row.readings):
        notes.append("? marks what did not converge to its tolerance.")
    if contrasted(subjects)[1] and not groups:
        notes.append(
            "One against the other: a factor (x) or a difference, with what the ends of both intervals leave possible "
            "(of a standard error, two of them)."
        )
    if groups:
        counted = ", ".join(f"{group} {len(runs)}" for group, runs in groups.items())
        notes.append(
            f"Means over runs ({counted}; geometric where groups differ by a factor, x) with 95 % intervals (Student's "
            "t)."
        )
    return notes


def _together(labels: list[str]) -> str:
    """Labels with commas between, each name once whatever its settings."""
    return ", ".join(dict.fromkeys(label.partition(",")[0] for label in labels))
