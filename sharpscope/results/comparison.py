"""Several checkpoints measured alike: everything that was measured of each, and of the way between them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.cost import Cost, total
from sharpscope.results.density import DensityResult
from sharpscope.results.eigen import EigenResult
from sharpscope.results.record import read, refuse_taken, write
from sharpscope.results.sharpness import SharpnessResult
from sharpscope.results.slice import SliceResult
from sharpscope.results.table import Table, as_html, as_pretty, as_text
from sharpscope.results.trace import TraceResult


@dataclass(frozen=True)
class Analysis:
    """What is measured of each checkpoint: its heading in reports, and what holds it, with ``from_dict``."""

    title: str
    result: Any


# By the attribute of Subject; the order is that of measurement and of reports.
ANALYSES = {
    "eigen": Analysis("Largest eigenvalues", EigenResult),
    "trace": Analysis("Trace", TraceResult),
    "density": Analysis("Spectral density", DensityResult),
    "sharpness": Analysis("m-sharpness and measures", SharpnessResult),
    "line": Analysis("Random lines", SliceResult),
    "surface": Analysis("Random planes", SliceResult),
}

_RECORD = ("level", "command", "findings", "rows", "subjects", "between")


@dataclass(frozen=True)
class Performance:
    """Loss (mean over ``examples``) and accuracy (a share of ``answers``, None without labels) on one split.

    ``answers``: the labels that count, of which examples may have none, one or, as tokens, many; None for the examples.
    """

    loss: float
    accuracy: float | None
    examples: int
    answers: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """One checkpoint of a comparison; an analysis that was left out is None.

    Attributes:
        name: by which it is called, unique.
        group: "sgd", "sam", ..., or None where checkpoints stand for themselves.
        pair: what it shares with one run of each other group, as its seed, or None.
        performance: by split, "train" and "test".
        eigen: of the training loss.
        trace: of the Hessian of the training loss.
        density: of its eigenvalues.
        sharpness: m-sharpness for each m, and the edge of stability where the learning rate is known.
        line: along random directions, alike for all.
        surface: over a random plane, alike for all.
        provenance: checkpoint, sha256, model, recipe, epoch and the like.
    """

    name: str
    group: str | None = None
    pair: str | None = None
    performance: Mapping[str, Performance] = field(default_factory=dict)
    eigen: EigenResult | None = None
    trace: TraceResult | None = None
    density: DensityResult | None = None
    sharpness: SharpnessResult | None = None
    line: SliceResult | None = None
    surface: SliceResult | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, Any]:
        """Each analysis that was made, by its attribute's name."""
        return {name: getattr(self, name) for name in ANALYSES if getattr(self, name) is not None}

    @property
    def cost(self) -> Cost:
        """What all of it took; gradients over the examples that each analysis saw."""
        return total(result.cost for result in self.results.values())


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """Checkpoints side by side.

    Attributes:
        subjects: in the order given.
        between: the loss on the straight line from one subject to another, with the names of both.
        level: "quick", "default" or "thorough", or what else was paid for.
        command: how to get the same again on the command line; empty where it was measured from Python.
        provenance: what else is to be kept with it.
    """

    subjects: tuple[Subject, ...]
    between: tuple[tuple[str, str, SliceResult], ...] = ()
    level: str = ""
    command: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, _RECORD)
        names = [subject.name for subject in self.subjects]
        if not names or len(set(names)) < len(names):
            raise DataError(f"A comparison needs subjects with names of their own, got {', '.join(names) or 'none'}.")

    @property
    def findings(self) -> list[str]:
        """What differs, by how much and how surely, in sentences, the first of lambda_max; of one checkpoint none."""
        from sharpscope.results.findings import findings

        return findings(self)

    @property
    def groups(self) -> dict[str, list[Subject]]:
        """The subjects of each group in order; empty where there are no groups."""
        found: dict[str, list[Subject]] = {}
        for subject in self.subjects:
            if subject.group is not None:
                found.setdefault(subject.group, []).append(subject)
        return found

    def paired(self, first: str, second: str) -> list[tuple[Subject, Subject]] | None:
        """The runs of two groups that share what pairs them; None unless every run of both has its partner."""
        one, two = ({s.pair: s for s in self.groups[group]} for group in (first, second))
        complete = None not in one and set(one) == set(two)
        alone = len(one) == len(self.groups[first]) and len(two) == len(self.groups[second])
        return [(one[pair], two[pair]) for pair in one] if complete and alone else None

    def to_dict(self) -> dict[str, Any]:
        """Findings, table and every result whole, as plain JSON values; a number that is not finite is null."""
        from sharpscope.results.comparison_record import record_of

        return record_of(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """The inverse of ``to_dict``; findings and table follow from the results.

        Raises: DataError when a key is missing or it is another analysis.
        """
        from sharpscope.results.comparison_record import comparison_of

        return comparison_of(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to ``path`` as one JSON object, atomically; ``compare.json`` of the command line is one.

        Raises: OutputError when it cannot be written.
        """
        write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what ``save`` or ``sharpscope compare`` wrote.

        Raises: DataError when ``path`` holds something else.
        """
        return cls.from_dict(read(path))

    def table(self) -> Table:
        """The numbers as rows and notes."""
        from sharpscope.results.comparison_table import comparison_table

        return comparison_table(self)

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html
