"""Results of one kind as one table: the base classes of what is measured of a checkpoint, and ``side_by_side``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from sharpscope.errors import DataError
from sharpscope.formatting import transpose_if_narrower
from sharpscope.results.base import Cost, Result
from sharpscope.results.table import Table, checkpoint_names

Self = TypeVar("Self", bound="CheckpointResult")
SelfRow = TypeVar("SelfRow", bound="RowResult")


class CheckpointResult(Result):
    """What was measured of one checkpoint. Its class says how several such results share a table."""

    _kinds: ClassVar[list[type[CheckpointResult]]] = []

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "analysis" in vars(cls):
            CheckpointResult._kinds.append(cls)

    def table(self) -> Table:
        """Return the result as a table with notes."""
        return self._table([self], checkpoint_names([self.provenance]))

    @classmethod
    @abstractmethod
    def _table(cls: type[Self], results: Sequence[Self], names: Sequence[str]) -> Table:
        """The table of several results, called by ``names``."""

    @abstractmethod
    def _notes(self) -> list[str]:
        """What a reader of the table must know of this result."""

    @classmethod
    def _named_notes(cls: type[Self], results: Sequence[Self], names: Sequence[str]) -> list[str]:
        return [f"{name}: {note}" for name, r in zip(names, results, strict=True) for note in r._notes()]


class RowResult(CheckpointResult):
    """A result that is a row of a table, or a column where that is narrower."""

    loss: float
    gradient_norm: float
    cost: Cost

    @classmethod
    @abstractmethod
    def _columns(cls: type[SelfRow], results: Sequence[SelfRow]) -> dict[str, Sequence[str]]:
        """The cells of each column by its heading, without loss and cost."""

    @classmethod
    def _legend(cls: type[SelfRow], results: Sequence[SelfRow], names: Sequence[str]) -> list[str]:
        """Notes on all results, below those of each."""
        return []

    @classmethod
    def _table(cls: type[SelfRow], results: Sequence[SelfRow], names: Sequence[str]) -> Table:
        columns = {
            "checkpoint": names,
            **cls._columns(results),
            "loss": [f"{r.loss:.4g}" for r in results],
            "|grad|": [f"{r.gradient_norm:.2g}" for r in results],
            "gradients": [f"{r.cost.gradients:.1f}" for r in results],
            "passes": [str(r.cost.passes) for r in results],
            "seconds": [f"{r.cost.seconds:.1f}" for r in results],
        }
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        return Table(transpose_if_narrower(rows), [*cls._named_notes(results, names), *cls._legend(results, names)])


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
    shown = list(results.values() if isinstance(results, Mapping) else results)
    kinds = {type(r) for r in shown}
    if len(kinds) != 1 or not kinds <= set(CheckpointResult._kinds):
        came = ", ".join(sorted(kind.__name__ for kind in kinds)) or "none"
        named = ", ".join(sorted(kind.__name__ for kind in CheckpointResult._kinds))
        raise DataError(f"Results side by side must be of one kind ({named}), got {came}. Show each by itself.")
    origins = [{"checkpoint": name} for name in results] if isinstance(results, Mapping) else None
    table: Table = kinds.pop()._table(shown, checkpoint_names(origins or [r.provenance for r in shown]))
    return table
