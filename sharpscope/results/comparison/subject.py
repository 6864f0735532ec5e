"""One checkpoint of a comparison: its loss and accuracy, and the result of each analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sharpscope.results.base import Cost, total_cost
from sharpscope.results.density_and_trace import DensityResult, TraceResult
from sharpscope.results.eigen import EigenResult
from sharpscope.results.serialization import MaybeNaN, as_json
from sharpscope.results.sharpness import SharpnessResult
from sharpscope.results.slice import SliceResult


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


@dataclass(frozen=True)
class Performance:
    """Loss (mean over ``examples``) and accuracy (a share of ``answers``, None without labels) on one split.

    ``answers``: the labels that count, of which examples may have none, one or, as tokens, many; None for the examples.
    """

    loss: MaybeNaN
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
        return total_cost(result.cost for result in self.results.values())

    def record(self) -> dict[str, Any]:
        """Everything as plain JSON values, without the analyses that were left out."""
        kept = {field.name: as_json(getattr(self, field.name)) for field in fields(self)}
        return {name: value for name, value in kept.items() if name not in ANALYSES or value is not None}


Interpolation = tuple[str, str, SliceResult]


def group_subjects(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """Return the subjects of each group in order; empty without groups."""
    found: dict[str, list[Subject]] = {}
    for subject in subjects:
        if subject.group is not None:
            found.setdefault(subject.group, []).append(subject)
    return found


def pair_runs(first: Sequence[Subject], second: Sequence[Subject]) -> list[tuple[Subject, Subject]] | None:
    """Pair the runs of two groups by ``pair``; None unless every run of both has a partner."""
    one, two = ({s.pair: s for s in group} for group in (first, second))
    complete = None not in one and set(one) == set(two)
    alone = len(one) == len(first) and len(two) == len(second)
    return [(one[pair], two[pair]) for pair in one] if complete and alone else None
