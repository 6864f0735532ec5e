"""A comparison as one JSON object that holds every number."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sharpscope.results.comparison import Comparison, Subject
from sharpscope.results.findings import findings
from sharpscope.results.readings import rows_of
from sharpscope.results.record import FORMAT, plain
from sharpscope.results.slice import SliceResult


def record_of(comparison: Comparison) -> dict[str, Any]:
    """Findings, the rows of the table, every result whole, as plain JSON values; a number not finite is null."""
    return {
        "format": FORMAT,
        "analysis": "comparison",
        "level": comparison.level,
        "command": comparison.command,
        "findings": findings(comparison),
        "rows": [plain(asdict(row)) for row in rows_of(comparison)],
        "subjects": [_subject(subject) for subject in comparison.subjects],
        "between": [{"from": a, "to": b, **_whole(way), "barrier": _barriers(way)} for a, b, way in comparison.between],
    }


def _subject(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "group": subject.group,
        "pair": subject.pair,
        "performance": {split: plain(asdict(found)) for split, found in subject.performance.items()},
        **{name: _whole(result) for name, result in subject.results.items()},
        "provenance": plain(subject.provenance),
    }


def _whole(result: Any) -> dict[str, Any]:
    """A result's record; of a slice with the values over its grid, which it keeps beside it on disk."""
    found: dict[str, Any] = result.to_dict()
    if isinstance(result, SliceResult):
        found |= {name: plain(getattr(result, name).tolist()) for name in ("loss", "accuracy", "status")}
    return found


def _barriers(way: SliceResult) -> dict[str, Any]:
    return {split: plain(way.barrier(split)) for split in way.splits}
