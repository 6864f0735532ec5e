"""Results of one kind in one table, for a notebook and as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.density import DensityResult, density_html, density_table
from sharpscope.results.eigen import EigenResult
from sharpscope.results.eigen_table import eigen_html, table
from sharpscope.results.sharpness import SharpnessResult
from sharpscope.results.sharpness_table import sharpness_html, sharpness_table
from sharpscope.results.slice import SliceResult
from sharpscope.results.slice_table import slice_html, slice_table
from sharpscope.results.trace import TraceResult, trace_html, trace_table

Show = Callable[[Any], str]

SHOWN: dict[type, tuple[Show, Show]] = {
    EigenResult: (table, eigen_html),
    DensityResult: (density_table, density_html),
    TraceResult: (trace_table, trace_html),
    SharpnessResult: (sharpness_table, sharpness_html),
    SliceResult: (slice_table, slice_html),
}


@dataclass(frozen=True)
class Table:
    """A table that a notebook shows by itself and ``print`` as text."""

    text: str
    html: str

    def __str__(self) -> str:
        return self.text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.text)

    def _repr_html_(self) -> str:
        return self.html


def side_by_side(results: Sequence[Any] | Mapping[str, Any]) -> Table:
    """The table that ``sharpscope`` prints of several checkpoints, of results that are in memory.

    Args:
        results: of one kind: eigenvalues, densities, traces, measures of sharpness or slices. By name where they are a
            mapping, else by their checkpoints' names.

    Raises: DataError where there is none, or they are not of one such kind.

    >>> import sharpscope
    >>> import torch
    >>> data = torch.tensor([[3.0, 2.0, 1.0]]), torch.zeros(1, 1)
    >>> model = torch.nn.Linear(3, 1, bias=False)  # H = 2 x x', of trace 28
    >>> problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    >>> one, two = (sharpscope.trace(problem, probes=probes) for probes in (2, 3))
    >>> print(str(sharpscope.side_by_side({"first": one, "again": two})).splitlines()[0].split())
    ['checkpoint', 'first', 'again']
    """
    if isinstance(results, Mapping):
        results = [replace(r, provenance={**r.provenance, "checkpoint": name}) for name, r in results.items()]
    kinds = {type(r) for r in results}
    if len(kinds) != 1 or not kinds <= set(SHOWN):
        came = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        named = ", ".join(kind.__name__ for kind in SHOWN)
        raise DataError(f"Results side by side must be of one kind ({named}), got {came}. Show each by itself.")
    as_text, as_html = SHOWN[kinds.pop()]
    return Table(as_text(results), as_html(results))
