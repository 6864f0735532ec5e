"""Several results of one kind as one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results.density import DensityResult, TraceResult, density_table, trace_table
from sharpscope.results.eigen import EigenResult, eigen_table
from sharpscope.results.layerwise import BlockResult, block_table
from sharpscope.results.monitor import MonitorResult, monitor_table
from sharpscope.results.sharpness import InvarianceResult, SharpnessResult, invariance_table, sharpness_table
from sharpscope.results.slice import SliceResult, slice_table
from sharpscope.results.table import Table

SHOWN: dict[type, Callable[[Any], Table]] = {
    EigenResult: eigen_table,
    DensityResult: density_table,
    TraceResult: trace_table,
    BlockResult: block_table,
    SharpnessResult: sharpness_table,
    InvarianceResult: invariance_table,
    SliceResult: slice_table,
    MonitorResult: monitor_table,
}


def side_by_side(results: Sequence[Any] | Mapping[str, Any]) -> Table:
    """The table that ``sharpscope`` prints of several checkpoints, of results that are in memory.

    Args:
        results: of one kind, whichever. By name where they are a mapping, else by their checkpoints' names. Blocks,
            rescalings and monitored runs are a table each, one below the other.

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
    kinds = {type(r) for r in (results.values() if isinstance(results, Mapping) else results)}
    if len(kinds) != 1 or not kinds <= set(SHOWN):
        came = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        named = ", ".join(kind.__name__ for kind in SHOWN)
        raise DataError(f"Results side by side must be of one kind ({named}), got {came}. Show each by itself.")
    which = {r.which for r in (results.values() if isinstance(results, Mapping) else results) if hasattr(r, "which")}
    if len(which) > 1:
        raise DataError(
            f"Eigenvalues side by side must be of the same end of the spectrum, got {', '.join(sorted(which))}. Show "
            "each by itself."
        )
    if isinstance(results, Mapping):
        results = [replace(r, provenance={**r.provenance, "checkpoint": name}) for name, r in results.items()]
    return SHOWN[kinds.pop()](results)
