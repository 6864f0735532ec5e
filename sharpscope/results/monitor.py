"""lambda_max along a training run, beside the edges of stability: the result that holds it, and its table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.formatting import with_bound
from sharpscope.results.base import CheckpointResult, Cost
from sharpscope.results.origin import origin_notes, typed_value
from sharpscope.results.serialization import MaybeNaN
from sharpscope.results.table import Table, stacked

# Rows of the table, evenly spread over the run, the first and the last among them.
MAX_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class MonitorRecord:
    """One measurement; what is not known or means nothing is NaN.

    Attributes:
        step: optimizer steps that led to the weights.
        lambda_max: the largest eigenvalue of the Hessian of the mean loss of the sample.
        lower, upper: the interval that it is in, taking it that the solver found the largest.
        converged: whether the solver's residual met the tolerance.
        loss, gradient_norm: of the sample.
        learning_rate: eta, the largest of all parameter groups.
        two_over_eta: the edge of stability of gradient descent.
        momentum_edge: that of SGD with its momentum: ``2 (1 + beta) / eta`` without dampening and Nesterov.
        sam_edge: that of SAM around such an SGD, at this gradient norm.
        products: Hessian-vector products.
        gradients: everything done, in units of one gradient over the sample.
        seconds: wall-clock.
        reason: why there is no number, or None.
    """

    step: int
    lambda_max: MaybeNaN = math.nan
    lower: MaybeNaN = math.nan
    upper: MaybeNaN = math.nan
    converged: bool = False
    loss: MaybeNaN = math.nan
    gradient_norm: MaybeNaN = math.nan
    learning_rate: MaybeNaN = math.nan
    two_over_eta: MaybeNaN = math.nan
    momentum_edge: MaybeNaN = math.nan
    sam_edge: MaybeNaN = math.nan
    products: int = 0
    gradients: MaybeNaN = 0.0
    seconds: MaybeNaN = 0.0
    reason: str | None = None


_FLOATS = tuple(f.name for f in fields(MonitorRecord) if f.type == "MaybeNaN")


@dataclass(frozen=True, eq=False)
class MonitorResult(CheckpointResult):
    """The largest eigenvalue of the Hessian of the training loss along a run, measured on one sample of the data.

    Attributes:
        records: in the order in which they were measured.
        provenance: as EigenResult's, with ``every``, and ``split_examples`` that the sample was drawn from.
    """

    analysis = "monitor"
    derived = ("cost",)

    records: tuple[MonitorRecord, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> NDArray[np.int64]:
        """Optimizer steps (r,)."""
        return np.array([record.step for record in self.records], np.int64)

    @property
    def lambda_max(self) -> NDArray[np.float64]:
        """The eigenvalues (r,), NaN where there is none."""
        return self.column("lambda_max")

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Bool (r,), whether the solver's residual met the tolerance."""
        return np.array([record.converged for record in self.records], bool)

    @property
    def cost(self) -> Cost:
        """What all measurements took, in walks over and gradients of the sample."""
        walks, products = len(self.records), sum(record.products for record in self.records)
        return Cost(walks, products, float(self.column("gradients").sum()), float(self.column("seconds").sum()))

    def column(self, name: str) -> NDArray[np.float64]:
        """A number of each record (r,), by its name in ``MonitorRecord``.

        Raises: DataError for another name.
        """
        if name not in _FLOATS:
            raise DataError(f"A column must be one of {', '.join(_FLOATS)}, got {name!r}.")
        return np.array([getattr(record, name) for record in self.records], float)

    @classmethod
    def _table(cls, results: Sequence[MonitorResult], names: Sequence[str]) -> Table:
        """A table a run, one row a record, each with its notes below."""
        return stacked(
            [Table(r._rows(), cls._named_notes([r], [name])) for name, r in zip(names, results, strict=True)]
        )

    def _rows(self) -> list[list[str]]:
        shown: Sequence[MonitorRecord] = self.records
        if len(shown) > MAX_ROWS:
            shown = [shown[round(i * (len(shown) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
        edges = {"2/eta": "two_over_eta", "momentum edge": "momentum_edge", "SAM edge": "sam_edge"}
        known = {title: name for title, name in edges.items() if np.isfinite(self.column(name)).any()}
        rows = [["step", "lambda_max", *known, "loss", "|grad|", "products"]]
        for r in shown:
            value = "none" if math.isnan(r.lambda_max) else with_bound(r.lambda_max, r.lower, r.upper)
            mark = "" if r.converged or r.reason else " ?"
            numbers = [*(getattr(r, name) for name in known.values()), r.loss]
            cells = ["-" if math.isnan(x) else f"{x:.4g}" for x in numbers]
            grad = "-" if math.isnan(r.gradient_norm) else f"{r.gradient_norm:.2g}"
            rows.append([str(r.step), value + mark, *cells, grad, str(r.products)])
        return rows

    def _notes(self) -> list[str]:
        p, cost = self.provenance, self.cost
        notes = origin_notes(p)
        sampled, total = (typed_value(p, key, int) for key in ("num_examples", "split_examples"))
        if sampled and total and sampled < total:
            notes.append(
                f"lambda_max of these {sampled} of {total} examples, often above that of all; intervals are the "
                "solver's alone."
            )
        if len(self.records) > MAX_ROWS:
            notes.append(f"{MAX_ROWS} of {len(self.records)} records; all are in the saved result.")
        unconverged = sum(not r.converged and r.reason is None for r in self.records)
        if unconverged:
            notes.append(f"{unconverged} NOT CONVERGED to the tolerance {p.get('tol', '?')} (marked ?).")
        failed = [r for r in self.records if r.reason is not None]
        if failed:
            notes.append(f"{len(failed)} without a number, first at step {failed[0].step}: {failed[0].reason}")
        return [*notes, f"{cost.gradients:.1f} gradients of the sample, {cost.seconds:.1f} seconds."]
