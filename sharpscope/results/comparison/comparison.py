"""The results of several checkpoints measured with the same settings, and their table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.base import Result
from sharpscope.results.comparison.findings import findings
from sharpscope.results.comparison.rows import Row, comparison_rows, reference_and_others
from sharpscope.results.comparison.subject import Interpolation, Subject, group_subjects, pair_runs
from sharpscope.results.origin import describe_departures, typed_value
from sharpscope.results.serialization import jsonable, parse_value
from sharpscope.results.slice import SliceResult
from sharpscope.results.table import Table

# What the record of every subject has, whatever was measured.
_SUBJECT_KEYS = ("name", "group", "pair", "performance", "provenance")


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison(Result):
    """Checkpoints side by side.

    Attributes:
        subjects: in the order given.
        between: the loss on the straight line from one subject to another, with the names of both.
        level: "quick", "default" or "thorough", or what else was paid for.
        command: how to get the same again on the command line; empty where it was measured from Python.
        provenance: what else is to be kept with it.
    """

    analysis = "comparison"
    derived = ("findings", "rows")

    subjects: tuple[Subject, ...]
    between: tuple[Interpolation, ...] = ()
    level: str = ""
    command: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [subject.name for subject in self.subjects]
        if not names or len(set(names)) < len(names):
            raise DataError(f"A comparison needs subjects with names of their own, got {', '.join(names) or 'none'}.")

    @cached_property
    def rows(self) -> list[Row]:
        """Each quantity with the numbers of all subjects, the means of groups, and how others differ from the first."""
        return comparison_rows(self.subjects)

    @property
    def findings(self) -> list[str]:
        """What differs, by how much and how surely, in sentences, the first of lambda_max; of one checkpoint none."""
        return findings(self.rows, self.subjects, self.between)

    @property
    def groups(self) -> dict[str, list[Subject]]:
        """The subjects of each group in order; empty where there are no groups."""
        return group_subjects(self.subjects)

    def paired(self, first: str, second: str) -> list[tuple[Subject, Subject]] | None:
        """The runs of two groups that share what pairs them; None unless every run of both has its partner."""
        return pair_runs(self.groups[first], self.groups[second])

    def to_dict(self) -> dict[str, Any]:
        """Findings, table and every result whole, as plain JSON values; a number that is not finite is null."""
        return {**super().to_dict(), "between": [_interpolation_record(*line) for line in self.between]}

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        missing = [key for key in cls._json_fields() if key not in values]
        for entry in parse_value(tuple[Mapping[str, Any], ...], values.get("subjects", ()), "subjects"):
            missing += [key for key in _SUBJECT_KEYS if key not in entry]
        if missing:
            raise KeyError(missing[0])
        lines = parse_value(tuple[Mapping[str, Any], ...], values["between"], "between")
        return super()._parse({**values, "between": [_interpolation_values(line) for line in lines]})

    def table(self) -> Table:
        """A row a quantity, a column a checkpoint or a group, then what the quantities are.

        Of groups the means are shown, since the runs are many; and how others differ from the first.
        """
        groups, (first, others) = list(self.groups), reference_and_others(self.subjects)
        columns = groups or [subject.name for subject in self.subjects]
        rows = [["", *columns, *(f"{name} against {first}" for name in others)]]
        for row in self.rows:
            numbers = [row.spreads.get(group) for group in groups] if groups else row.cells
            differences = [row.differences.get(name) for name in others]
            rows.append([row.label, *("-" if cell is None else str(cell) for cell in (*numbers, *differences))])
        return Table(rows, self._notes())

    def _notes(self) -> list[str]:
        groups = self.groups
        labels_by_definition: dict[str, list[str]] = {}
        labels_by_data: dict[str, list[str]] = {}
        for row in self.rows:
            cells = [cell for cell in row.cells if cell is not None]
            kinds = ", ".join(dict.fromkeys(cell.interval for cell in cells))
            # Of groups the columns have intervals over runs.
            definition = row.definition if groups else f"{row.definition}. Intervals: {kinds}"
            labels_by_definition.setdefault(definition, []).append(row.label)
            for data in dict.fromkeys(cell.data for cell in cells):
                labels_by_data.setdefault(data, []).append(row.label)
        notes = [f"{_join_labels(labels)}: {definition}." for definition, labels in labels_by_definition.items()]
        notes += [f"On {data}: {_join_labels(labels)}." for data, labels in labels_by_data.items() if data]
        results = [result for subject in self.subjects for result in subject.results.values()]
        if departures := dict.fromkeys(part for result in results for part in describe_departures(result.provenance)):
            notes.append(f"Measured {', '.join(departures)}.")
        for subject in self.subjects:
            left_out = typed_value(subject.provenance, "left_out", Mapping) or {}
            notes += [f"{subject.name}: no {what}. {why}" for what, why in left_out.items()]
        if any(cell is not None and not cell.converged for row in self.rows for cell in row.cells):
            notes.append("? marks what did not converge to its tolerance.")
        if groups:
            counted = ", ".join(f"{group} {len(runs)}" for group, runs in groups.items())
            notes.append(
                f"Means over runs ({counted}; geometric where groups differ by a factor, x) with 95 % intervals "
                "(Student's t over runs, widened by the error of each run's own number)."
            )
        elif reference_and_others(self.subjects)[1]:
            notes.append(
                "One against the other: a factor (x) or a difference, with what the ends of both intervals leave "
                "possible (of a standard error, two of them)."
            )
        return notes


def _interpolation_record(first: str, second: str, line: SliceResult) -> dict[str, Any]:
    """A line between two subjects, with its barrier on each split."""
    barriers = {split: jsonable(line.barrier(split)) for split in line.splits}
    return {"from": first, "to": second, **line.record(), "barrier": barriers}


def _interpolation_values(record: Mapping[str, Any]) -> list[Any]:
    """The inverse: the two names and the slice's own record."""
    own = {key: value for key, value in record.items() if key not in ("from", "to", "barrier")}
    return [record["from"], record["to"], own]


def _join_labels(labels: list[str]) -> str:
    """Labels with commas between, each name once whatever its settings."""
    return ", ".join(dict.fromkeys(label.partition(",")[0] for label in labels))
