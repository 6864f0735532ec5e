"""The base classes of results, which save, load and display them from their fields; their cost; ``side_by_side``."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

from sharpscope.errors import DataError
from sharpscope.formatting import transpose_if_narrower
from sharpscope.results.origin import checkpoint_names
from sharpscope.results.serialization import (
    IN_NPZ,
    annotations_of,
    as_json,
    header,
    jsonable,
    metadata_of,
    noun_phrase,
    parse_fields,
    read_json,
    reject_reserved_keys,
    require_shapes,
    translate_errors,
    without_header,
    write_json,
)
from sharpscope.results.table import Table

Self = TypeVar("Self", bound="Result")
SelfCheckpoint = TypeVar("SelfCheckpoint", bound="CheckpointResult")
SelfRow = TypeVar("SelfRow", bound="RowResult")


class Result(ABC):
    """The base of all results. A subclass is a frozen dataclass: its fields are the keys of its JSON.

    ``from_dict`` checks each field against its annotation, which may be float, int, bool, str, an array, a dataclass,
    or a tuple, mapping or option of these. ``Shape`` names dimensions that must agree. ``MaybeNaN`` reads null as NaN.
    A field annotated with IN_NPZ is left out of the JSON. A field with a default may be missing, as in files of older
    versions. The keys of the provenance are stored next to the fields.

    Attributes:
        analysis: the value of the key "analysis" in the JSON.
        derived: names of attributes that are written to the JSON too, and computed again after reading.
    """

    analysis: ClassVar[str]
    derived: ClassVar[tuple[str, ...]] = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    provenance: Mapping[str, Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # IPython searches each class of the MRO for _repr_pretty_ or __repr__, and dataclass gives every subclass the
        # latter.
        cls._repr_pretty_ = Result._repr_pretty_  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        reject_reserved_keys(self.provenance, self._json_keys())
        require_shapes(self, noun_phrase(self.analysis))

    @classmethod
    def _json_fields(cls) -> list[str]:
        """The fields that are in the JSON, without the provenance."""
        hints = annotations_of(cls)
        return [f.name for f in fields(cls) if f.name != "provenance" and IN_NPZ not in metadata_of(hints[f.name])]

    @classmethod
    def _json_keys(cls) -> tuple[str, ...]:
        """The keys of the JSON that are not provenance."""
        return (*(f.name for f in fields(cls) if f.name != "provenance"), *cls.derived)

    def _derived_values(self) -> dict[str, Any]:
        """The values of ``derived``."""
        return {name: getattr(self, name) for name in self.derived}

    def record(self) -> dict[str, Any]:
        """Return everything that ``from_dict`` needs, as plain JSON values."""
        return self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values; a number that is not finite is null."""
        values = {name: getattr(self, name) for name in self._json_fields()}
        return {**header(self.analysis, self.provenance), **as_json({**values, **self._derived_values()})}

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """Build a result from the dictionary of ``to_dict``.

        Unknown keys become provenance; null stands for NaN where NaN is possible.

        Raises: DataError when a key is missing, a value has another type or length, or it is another analysis.
        """
        with translate_errors(noun_phrase(cls.analysis), f"{cls.__name__}.to_dict()"):
            values_without_header = without_header(values, cls.analysis)
            own = cls._json_keys()
            rest = {key: value for key, value in values_without_header.items() if key not in own}
            return cls(**{**cls._parse(values_without_header), "provenance": jsonable(rest)})

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a JSON object."""
        return parse_fields(cls, cls._json_fields(), values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to ``path`` as JSON, atomically.

        Raises: OutputError when it cannot be written.
        """
        write_json(path, self.to_dict())

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Read what ``save`` wrote.

        Raises: DataError when ``path`` holds something else, or is damaged.
        """
        return cls.from_dict(read_json(path))

    @abstractmethod
    def table(self) -> Table:
        """Return the result as a table with notes."""

    def summary(self) -> str:
        """Return the table as text."""
        return str(self.table())

    def __str__(self) -> str:
        return self.summary()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The text for IPython, whose notebooks save it next to the HTML."""
        self.table()._repr_pretty_(printer, cycle)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@dataclass(frozen=True)
class Cost:
    """The cost of a measurement.

    Attributes:
        passes: passes over the whole data set.
        hvps: Hessian-vector products over the whole data set.
        gradients: everything done, audit included, in units of one gradient (forward and backward) over the data set.
        seconds: wall-clock time.
    """

    passes: int
    hvps: int
    gradients: float
    seconds: float


def total_cost(costs: Iterable[Cost]) -> Cost:
    """Add up costs."""
    costs_list = list(costs)
    return Cost(
        passes=sum(c.passes for c in costs_list),
        hvps=sum(c.hvps for c in costs_list),
        gradients=sum(c.gradients for c in costs_list),
        seconds=sum(c.seconds for c in costs_list),
    )


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
    def _table(cls: type[SelfCheckpoint], results: Sequence[SelfCheckpoint], names: Sequence[str]) -> Table:
        """The table of several results, called by ``names``."""

    @abstractmethod
    def _notes(self) -> list[str]:
        """What a reader of the table must know of this result."""

    @classmethod
    def _named_notes(cls: type[SelfCheckpoint], results: Sequence[SelfCheckpoint], names: Sequence[str]) -> list[str]:
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
