"""Trace and Frobenius norm: the result that holds them, and the table that shows results."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.cost import Cost
from sharpscope.results.estimate import Estimate
from sharpscope.results.record import (
    POINT_AND_PRICE,
    head,
    names_of,
    opened,
    origin_notes,
    point_and_price,
    read,
    refuse_taken,
    write,
)
from sharpscope.results.table import Table, as_html, as_pretty, as_text
from sharpscope.tables import narrower

_ESTIMATES = ("trace", "frobenius")
_MEASURED = (*_ESTIMATES, "loss", "gradient_norm", "cost")


@dataclass(frozen=True)
class TraceResult:
    """Trace and Frobenius norm of the Hessian of a data set's mean loss, each with its standard error.

    Attributes:
        trace: ``tr H``, the sum of all eigenvalues, in units of the loss over squared weights.
        frobenius: ``||H||_F``, the root of the sum of their squares.
        loss: L(w), with the weight decay if it was asked for.
        gradient_norm: ``||grad L(w)||``.
        cost: what it took.
        provenance: as EigenResult's, with ``probes``.
        sampling_error: one standard error of the trace over the examples, where they are a sample of more; else None.
    """

    trace: Estimate
    frobenius: Estimate
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sampling_error: float | None = None

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, (*_MEASURED, "sampling_error"))

    @property
    def whole(self) -> Estimate:
        """The trace for all the data that these examples are a sample of: both standard errors in one."""
        return Estimate(self.trace.value, math.hypot(self.trace.standard_error, self.sampling_error or 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        measured = {key: _value(getattr(self, key)) for key in (*_MEASURED, "sampling_error")}
        return {**head("trace", self.provenance), **measured}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TraceResult:
        """The inverse of ``to_dict``.

        Raises: DataError when a key is missing or it is another analysis.
        """
        rest = opened(values, "trace")
        try:
            measured = {key: rest.pop(key) for key in _MEASURED}
            measured["sampling_error"] = rest.pop("sampling_error", None)
            measured |= {key: Estimate(**measured[key]) for key in _ESTIMATES} | {"cost": Cost(**measured["cost"])}
        except (KeyError, TypeError) as error:
            raise DataError(f"A trace result must have the keys of TraceResult.to_dict(), got: {error}.") from error
        return cls(**measured, provenance=rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to ``path``, atomically.

        Raises: OutputError when it cannot be written.
        """
        write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TraceResult:
        """Read what ``save`` wrote.

        Raises: DataError when ``path`` holds something else.
        """
        return cls.from_dict(read(path))

    def table(self) -> Table:
        """The result as rows and notes."""
        return trace_table([self])

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html


def trace_table(results: Sequence[TraceResult]) -> Table:
    """A row a result, or a column where that is narrower."""
    return Table(narrower(_rows(results)), _notes(results))


def _value(entry: Any) -> Any:
    return asdict(entry) if isinstance(entry, Estimate | Cost) else entry


def _rows(results: Sequence[TraceResult]) -> list[list[str]]:
    rows = [["checkpoint", "trace", "||H||_F", *POINT_AND_PRICE]]
    for r, name in zip(results, names_of([r.provenance for r in results]), strict=True):
        rows.append([name, str(r.trace), str(r.frobenius), *point_and_price(r.loss, r.gradient_norm, r.cost)])
    return rows


def _notes(results: Sequence[TraceResult]) -> list[str]:
    names = names_of([r.provenance for r in results])
    notes = [said for r, name in zip(results, names, strict=True) for said in origin_notes(name, r.provenance)]
    for r, name in zip(results, names, strict=True):
        if r.sampling_error is not None:
            notes.append(f"{name}: for all the data of which these are a sample, {r.whole} (± one standard error).")
    return [*notes, "± is one standard error, over the random vectors."]
