"""A comparison as one JSON object that holds every number, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.comparison import ANALYSES, Comparison, Performance, Subject
from sharpscope.results.readings import rows_of
from sharpscope.results.record import head, opened, plain
from sharpscope.results.slice import SliceResult


def record_of(comparison: Comparison) -> dict[str, Any]:
    """Findings, the rows of the table, every result whole, as plain JSON values; a number not finite is null."""
    return {
        **head("comparison", comparison.provenance),
        "level": comparison.level,
        "command": comparison.command,
        "findings": comparison.findings,
        "rows": [plain(asdict(row)) for row in rows_of(comparison)],
        "subjects": [_subject(subject) for subject in comparison.subjects],
        "between": [{"from": a, "to": b, **whole(way), "barrier": _barriers(way)} for a, b, way in comparison.between],
    }


def comparison_of(values: Mapping[str, Any]) -> Comparison:
    """The inverse of ``record_of``.

    Raises: DataError when a key is missing or it is another analysis.
    """
    rest = {key: value for key, value in opened(values, "comparison").items() if key not in ("findings", "rows")}
    try:
        kept = {key: rest.pop(key) for key in ("level", "command")}
        subjects = tuple(map(_subject_of, rest.pop("subjects")))
        between = tuple((way["from"], way["to"], _way_of(way)) for way in rest.pop("between"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"A comparison must have the keys of Comparison.to_dict(), got: {error}.") from error
    return Comparison(subjects=subjects, between=between, provenance=rest, **kept)


def whole(result: Any) -> dict[str, Any]:
    """A result's record, from which its ``from_dict`` makes it again; of a slice with the values over its grid."""
    found: dict[str, Any] = result.to_dict(grid=True) if isinstance(result, SliceResult) else result.to_dict()
    return found


def performance_record(found: Mapping[str, Performance]) -> dict[str, Any]:
    """Loss and accuracy by split, as plain JSON values."""
    return {split: plain(asdict(one)) for split, one in found.items()}


def performance_of(values: Mapping[str, Any]) -> dict[str, Performance]:
    """The inverse of ``performance_record``; a loss that was not finite comes back as NaN."""
    return {
        split: Performance(**{**one, "loss": float("nan") if one["loss"] is None else one["loss"]})
        for split, one in values.items()
    }


def _subject(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "group": subject.group,
        "pair": subject.pair,
        "performance": performance_record(subject.performance),
        **{name: whole(result) for name, result in subject.results.items()},
        "provenance": plain(subject.provenance),
    }


def _subject_of(values: Mapping[str, Any]) -> Subject:
    known = {key: values[key] for key in ("name", "group", "pair", "provenance")}
    results = {name: one.result.from_dict(values[name]) for name, one in ANALYSES.items() if name in values}
    return Subject(performance=performance_of(values["performance"]), **known, **results)


def _way_of(values: Mapping[str, Any]) -> SliceResult:
    return SliceResult.from_dict({key: value for key, value in values.items() if key not in ("from", "to", "barrier")})


def _barriers(way: SliceResult) -> dict[str, Any]:
    return {split: plain(way.barrier(split)) for split in way.splits}
