"""Trace and Frobenius norm: the result that holds them, and the table that shows results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sharpscope.formatting import narrower
from sharpscope.results.base import Cost, Result
from sharpscope.results.estimate import Estimate
from sharpscope.results.provenance import LOSS_AND_COST, checkpoint_names, loss_and_cost_cells, origin_notes
from sharpscope.results.table import Table


@dataclass(frozen=True)
class TraceResult(Result):
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

    analysis = "trace"

    trace: Estimate
    frobenius: Estimate
    loss: float
    gradient_norm: float
    cost: Cost
    provenance: Mapping[str, Any] = field(default_factory=dict)
    sampling_error: float | None = None

    @property
    def whole(self) -> Estimate:
        """The trace for all the data that these examples are a sample of: both standard errors in one."""
        return Estimate(self.trace.value, math.hypot(self.trace.standard_error, self.sampling_error or 0.0))

    def table(self) -> Table:
        """The result as rows and notes."""
        return trace_table([self])


def trace_table(results: Sequence[TraceResult]) -> Table:
    """A row a result, or a column where that is narrower."""
    return Table(narrower(_rows(results)), _notes(results))


def _rows(results: Sequence[TraceResult]) -> list[list[str]]:
    rows = [["checkpoint", "trace", "||H||_F", *LOSS_AND_COST]]
    for r, name in zip(results, checkpoint_names([r.provenance for r in results]), strict=True):
        rows.append([name, str(r.trace), str(r.frobenius), *loss_and_cost_cells(r.loss, r.gradient_norm, r.cost)])
    return rows


def _notes(results: Sequence[TraceResult]) -> list[str]:
    names = checkpoint_names([r.provenance for r in results])
    notes = [said for r, name in zip(results, names, strict=True) for said in origin_notes(name, r.provenance)]
    for r, name in zip(results, names, strict=True):
        if r.sampling_error is not None:
            notes.append(f"{name}: for all the data of which these are a sample, {r.whole} (± one standard error).")
    return [*notes, "± is one standard error, over the random vectors."]
