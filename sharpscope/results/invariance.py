"""Measures before and after a rescaling that leaves the function as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from sharpscope.results.base import Result
from sharpscope.results.cost import Cost
from sharpscope.results.origin import names_of, origin_notes
from sharpscope.results.serialization import Shape
from sharpscope.results.sharpness import Measure
from sharpscope.results.table import Table, stacked


@dataclass(frozen=True)
class InvarianceResult(Result):
    """What each measure says of one function in two sets of coordinates.

    Attributes:
        before, after: the same measures in the same order, with the same draws.
        factor: what the first layer of each pair was multiplied and the second divided by.
        layers: the pairs, by name.
        loss: L(w), the same on both sides.
        cost: of everything.
        provenance: as SharpnessResult's.
    """

    analysis = "invariance"
    derived = ("changes",)

    before: Annotated[tuple[Measure, ...], Shape("measures")]
    after: Annotated[tuple[Measure, ...], Shape("measures")]
    factor: float
    layers: tuple[tuple[str, str], ...]
    loss: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes(self) -> tuple[float, ...]:
        """``|after - before| / |before|`` of each measure."""
        pairs = zip(self.before, self.after, strict=True)
        return tuple(abs(b.value - a.value) / abs(a.value) if a.value else float(b.value != 0) for a, b in pairs)

    @property
    def converged(self) -> bool:
        """Whether every eigenvalue among the measures is known to its tolerance."""
        return all(m.settings.get("converged", True) for m in (*self.before, *self.after))

    def table(self) -> Table:
        """The result as rows and notes."""
        return invariance_table([self])


def invariance_table(results: Sequence[InvarianceResult]) -> Table:
    """A table a result under its name, and the notes of all at the end."""
    names = names_of([r.provenance for r in results])
    *others, last = (Table(_rows(r), title=name) for name, r in zip(names, results, strict=True))
    return stacked([*others, replace(last, notes=_notes(results))])


def _rows(result: InvarianceResult) -> list[list[str]]:
    rows = [["measure", "before", "after", "relative change"]]
    for a, b, change in zip(result.before, result.after, result.changes, strict=True):
        unsure = "" if a.settings.get("converged", True) and b.settings.get("converged", True) else "?"
        rows.append([a.label, f"{a.value:.7g}", f"{b.value:.7g}", f"{change:.1e}{unsure}"])
    return rows


def _notes(results: Sequence[InvarianceResult]) -> list[str]:
    notes = []
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        pairs = ", ".join(f"{a or 'the model'} and {b}" for a, b in r.layers)
        notes += origin_notes(name, r.provenance)
        notes.append(
            f"{name}: the function is the same, with a loss of {r.loss:.6g}; multiplied and divided by {r.factor:g}: "
            f"{pairs}. {r.cost.gradients:.1f} gradients, {r.cost.seconds:.1f} seconds."
        )
    if not all(r.converged for r in results):
        notes.append("? has not converged.")
    return [*notes, "Both sides in float64 with the same subsets, draws and probes; not intervals, but what moves."]
