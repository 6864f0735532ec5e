"""Measures before and after a rescaling that leaves the function as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.cost import Cost
from sharpscope.results.record import (
    head,
    names_of,
    opened,
    origin_notes,
    plain,
    read,
    refuse_taken,
    write,
)
from sharpscope.results.sharpness import Measure, measure_from
from sharpscope.results.table import Table, as_html, as_pretty, as_text, stacked

_MEASURED = ("before", "after", "factor", "layers", "loss", "cost")


@dataclass(frozen=True)
class InvarianceResult:
    """What each measure says of one function in two sets of coordinates.

    Attributes:
        before, after: the same measures in the same order, with the same draws.
        factor: what the first layer of each pair was multiplied and the second divided by.
        layers: the pairs, by name.
        loss: L(w), the same on both sides.
        cost: of everything.
        provenance: as SharpnessResult's.
    """

    before: tuple[Measure, ...]
    after: tuple[Measure, ...]
    factor: float
    layers: tuple[tuple[str, str], ...]
    loss: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, (*_MEASURED, "changes"))

    @property
    def changes(self) -> tuple[float, ...]:
        """``|after - before| / |before|`` of each measure."""
        pairs = zip(self.before, self.after, strict=True)
        return tuple(abs(b.value - a.value) / abs(a.value) if a.value else float(b.value != 0) for a, b in pairs)

    @property
    def converged(self) -> bool:
        """Whether every eigenvalue among the measures is known to its tolerance."""
        return all(m.settings.get("converged", True) for m in (*self.before, *self.after))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; a number that is not finite is null."""
        return {
            **head("invariance", self.provenance),
            "before": [plain(asdict(m)) for m in self.before],
            "after": [plain(asdict(m)) for m in self.after],
            "changes": plain(list(self.changes)),
            "factor": self.factor,
            "layers": [list(pair) for pair in self.layers],
            "loss": self.loss,
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InvarianceResult:
        """The inverse of ``to_dict``; infinity comes back as NaN.

        Raises: DataError when a key is missing or it is another analysis.
        """
        rest = {key: value for key, value in opened(values, "invariance").items() if key != "changes"}
        try:
            kept = {key: rest.pop(key) for key in _MEASURED}
            for side in ("before", "after"):
                kept[side] = tuple(measure_from(entry) for entry in kept[side])
            kept |= {"layers": tuple((one, two) for one, two in kept["layers"]), "cost": Cost(**kept["cost"])}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"An invariance result must have the keys of to_dict(), got: {error}.") from error
        return cls(**kept, provenance=rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to ``path``, atomically.

        Raises: OutputError when it cannot be written.
        """
        write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InvarianceResult:
        """Read what ``save`` wrote.

        Raises: DataError when ``path`` holds something else.
        """
        return cls.from_dict(read(path))

    def table(self) -> Table:
        """The result as rows and notes."""
        return invariance_table([self])

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html


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
