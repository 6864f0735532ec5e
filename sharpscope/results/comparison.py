"""Several checkpoints measured alike: everything that was measured of each, and of the way between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.cost import Cost, total
from sharpscope.results.density import DensityResult
from sharpscope.results.eigen import EigenResult
from sharpscope.results.sharpness import SharpnessResult
from sharpscope.results.slice import SliceResult
from sharpscope.results.table import Table, as_html, as_pretty, as_text
from sharpscope.results.trace import TraceResult


@dataclass(frozen=True)
class Performance:
    """Loss (mean over ``examples``) and accuracy (a share, None without labels) on one split."""

    loss: float
    accuracy: float | None
    examples: int


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
        named = {name: getattr(self, name) for name in ("eigen", "trace", "density", "sharpness", "line", "surface")}
        return {name: result for name, result in named.items() if result is not None}

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
        level: "quick", "default" or "thorough".
        command: how to get the same again.
    """

    subjects: tuple[Subject, ...]
    between: tuple[tuple[str, str, SliceResult], ...] = ()
    level: str = "default"
    command: str = ""

    def __post_init__(self) -> None:
        names = [subject.name for subject in self.subjects]
        if not names or len(set(names)) < len(names):
            raise DataError(f"A comparison needs subjects with names of their own, got {', '.join(names) or 'none'}.")

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

    def table(self) -> Table:
        """The numbers as rows and notes."""
        from sharpscope.results.comparison_table import comparison_table

        return comparison_table(self)

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html
