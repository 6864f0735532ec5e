"""What a slice through the loss says, point by point."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError, first_line
from sharpscope.results.cost import Cost
from sharpscope.results.record import (
    UNREADABLE,
    arrays_beside,
    head,
    opened,
    plain,
    read,
    refuse_taken,
    write,
)
from sharpscope.results.table import Table, as_html, as_pretty, as_text

Array = NDArray[np.float64]

PENDING, DONE, DIVERGED = 0, 1, 2
STATUSES = ("pending", "done", "diverged")

_ARRAYS = ("loss", "accuracy", "status", "centre", "slopes", "curvatures")
_GRID = ("loss", "accuracy", "status")
_PLAIN = ("splits", "directions", "marks", "cost")
_TOLD = ("axes", "dimensions", "points", "digest", "infinite")


@dataclass(frozen=True)
class Mark:
    """A network that lies on the line or plane, or beside it.

    Attributes:
        name: of the network.
        coordinates: of the nearest point of the line or plane.
        distance: from there to the network, in units of the weights.
        length: from the centre to the network.
        loss, accuracy: of the network itself by split, with its own buffers; the picture at ``coordinates`` shows
            another network's where ``distance`` is not 0.
        on_path: whether it is a step of a trajectory, in the order of the marks.
    """

    name: str
    coordinates: tuple[float, ...]
    distance: float
    length: float
    loss: Mapping[str, float]
    accuracy: Mapping[str, float]
    on_path: bool = False


@dataclass(frozen=True, eq=False)
class SliceResult:
    """``L(w + sum_k t_k d_k)`` on a grid of a line or a plane, or of several lines or planes with one grid.

    Attributes:
        axes: ascending coordinates ``(x,)`` of a line, ``(x, y)`` of a plane; 0 is w.
        loss: (splits, lines, points of x), or (splits, planes, points of y, points of x); NaN where pending.
        accuracy: the same, as a share; NaN where the loss has no labels.
        status: PENDING, DONE or DIVERGED (the loss is infinite or NaN) of each point (lines, ...).
        splits: the names of the data sets.
        directions: for each line or plane its one or two directions: ``label``, ``length`` and what they depend on.
        centre: loss and accuracy at w (splits, 2).
        slopes: ``g'd`` (lines, 1 or 2) of the first split; NaN where not measured.
        curvatures: ``d'Hd`` (lines, 1 or 2, 1 or 2) of the first split; NaN where not measured.
        marks: other networks on or near the line or plane.
        cost: what it took.
        provenance: as EigenResult's; ``statistics`` is what BatchNorm's running statistics did.
    """

    axes: tuple[Array, ...]
    loss: Array
    accuracy: Array
    status: NDArray[np.int8]
    splits: tuple[str, ...]
    directions: tuple[tuple[Mapping[str, Any], ...], ...]
    centre: Array
    slopes: Array
    curvatures: Array
    cost: Cost
    marks: tuple[Mark, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        refuse_taken(self.provenance, (*_ARRAYS, *_PLAIN, *_TOLD))
        if any(len(line) != self.dimensions for line in self.directions) or not self.directions:
            raise DataError(f"A slice of {self.dimensions} axes needs as many directions for each line or plane.")
        shape = (len(self.directions), *(len(a) for a in reversed(self.axes)))
        if not self.loss.shape == self.accuracy.shape == (len(self.splits), *shape) or self.status.shape != shape:
            raise DataError(
                f"A slice of {len(self.splits)} splits needs losses of shape {(len(self.splits), *shape)}, got "
                f"{self.loss.shape}, accuracies {self.accuracy.shape} and status {self.status.shape}."
            )

    @property
    def dimensions(self) -> int:
        """1 for lines, 2 for planes."""
        return len(self.axes)

    @property
    def complete(self) -> bool:
        """Whether no point is pending."""
        return not bool((self.status == PENDING).any())

    def split(self, name: str | None = None) -> int:
        """The place of a split; of the first without a name.

        Raises: DataError when there is none of that name.
        """
        if name is None:
            return 0
        if name not in self.splits:
            raise DataError(f"The slice must hold the split {name!r}, got {', '.join(self.splits)}. Name one of them.")
        return self.splits.index(name)

    def prediction(self, line: int = 0, axes: Sequence[Array] | None = None) -> Array | None:
        """``L(w) + g't + t'Ht/2`` on the grid, from the first split's slope and curvature; None where not measured.

        ``axes``: of another grid.
        """
        slope, curvature = self.slopes[line], self.curvatures[line]
        if not np.isfinite(curvature).all():
            return None
        t = np.stack(np.meshgrid(*(self.axes if axes is None else axes)), axis=-1)
        rise = t @ slope + np.einsum("...i,ij,...j->...", t, curvature, t) / 2
        return np.asarray(self.centre[0, 0] + rise)

    def barrier(self, split: str | None = None, line: int = 0) -> float | None:
        """``max over 0 <= t <= 1 of L(t) - ((1 - t) L(0) + t L(1))`` (Frankle et al. 2020), on the grid.

        None where the line leads to no other network, has not both ends, or has points that are pending.
        """
        x = self.axes[0]
        if self.dimensions != 1 or self.directions[line][0].get("kind") != "checkpoint" or not {0.0, 1.0} <= set(x):
            return None
        between = (x >= 0) & (x <= 1)
        t, loss = x[between], self.loss[self.split(split), line][between]
        if (self.status[line][between] == PENDING).any():
            return None
        rise = loss - ((1 - t) * loss[0] + t * loss[-1])
        return float(rise.max()) if np.isfinite(rise).all() else float("inf")

    def finished(self) -> SliceResult:
        """The coarser grid whose points are all done or diverged: a preview of an unfinished slice.

        Raises: DataError when there is none with two points on each axis.
        """
        pending = (self.status == PENDING).any(axis=0)
        keep = [np.arange(len(a)) for a in reversed(self.axes)]
        while pending[np.ix_(*keep)].any():
            here = pending[np.ix_(*keep)]
            shares = [here.mean(axis=tuple(j for j in range(here.ndim) if j != i)) for i in range(here.ndim)]
            worst = max(range(here.ndim), key=lambda i: shares[i].max())
            keep[worst] = keep[worst][shares[worst] < shares[worst].max()]
        if any(len(k) < 2 for k in keep):
            raise DataError("Too few points are finished to show them. Let the same command go on.")
        where: Any = (..., *np.ix_(*keep))
        return replace(
            self,
            axes=tuple(a[k] for a, k in zip(self.axes, reversed(keep), strict=True)),
            loss=self.loss[where],
            accuracy=self.accuracy[where],
            status=self.status[where],
        )

    def to_dict(self, *, grid: bool = False) -> dict[str, Any]:
        """Everything but the arrays over the grid, as plain JSON values; a number that is not finite is null.

        ``grid``: those arrays as well, as ``from_dict`` needs them, and which losses are infinite.
        """
        return {
            **head("slice", self.provenance),
            "dimensions": self.dimensions,
            "axes": [a.tolist() for a in self.axes],
            "splits": list(self.splits),
            "directions": plain(self.directions),
            "centre": plain(self.centre.tolist()),
            "slopes": plain(self.slopes.tolist()),
            "curvatures": plain(self.curvatures.tolist()),
            "marks": [plain(asdict(mark)) for mark in self.marks],
            **(self._grid() if grid else {"digest": self._digest()}),
            "points": {name: int((self.status == i).sum()) for i, name in enumerate(STATUSES)},
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SliceResult:
        """The inverse of ``to_dict`` with its grid.

        Raises: DataError when a key is missing, as the arrays over the grid, or it is another analysis.
        """
        rest = opened(values, "slice")
        try:
            arrays: dict[str, Any] = {
                name: np.array(rest.pop(name), np.int8 if name == "status" else float) for name in _ARRAYS
            }
            arrays["loss"].flat[rest.pop("infinite", [])] = np.inf
            axes = tuple(np.array(axis, float) for axis in rest.pop("axes"))
            told = _taken(rest)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"A slice must have the keys of to_dict(grid=True), got: {first_line(error)}.") from error
        return cls(axes=axes, **arrays, **told, provenance=rest)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to ``path`` and the arrays beside it as ``.npz``, each atomically.

        Raises: OutputError when they cannot be written.
        """
        write(path, self.to_dict(), self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SliceResult:
        """Read what ``save`` wrote.

        Raises: DataError when ``path`` holds something else, or its arrays are not beside it.
        """
        rest = opened(read(path), "slice")
        beside = arrays_beside(path)
        try:
            with np.load(beside) as arrays:
                kept: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
                kept["axes"] = tuple(arrays[f"axis{i}"] for i in range(rest.pop("dimensions")))
            digest = rest.pop("digest")
            kept |= _taken(rest)
        except (*UNREADABLE, TypeError) as error:
            raise DataError(
                f"{path} must be a slice with its arrays in {beside.name}; problem: {first_line(error)}."
            ) from error
        result = cls(**kept, provenance=rest)
        if result._digest() != digest:
            raise DataError(f"{beside} must hold the arrays of {path}, but they are of another run. Measure it again.")
        return result

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {f"axis{i}": a for i, a in enumerate(self.axes)} | {name: getattr(self, name) for name in _ARRAYS}

    def _grid(self) -> dict[str, Any]:
        infinite = np.flatnonzero(np.isposinf(self.loss)).tolist()
        return {name: plain(getattr(self, name).tolist()) for name in _GRID} | {"infinite": infinite}

    def _digest(self) -> str:
        """A hash of the arrays, by which their file is known."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def table(self) -> Table:
        """The result as rows and notes."""
        from sharpscope.results.slice_table import slice_table

        return slice_table([self])

    summary = __str__ = as_text
    _repr_pretty_, _repr_html_ = as_pretty, as_html


def _taken(rest: dict[str, Any]) -> dict[str, Any]:
    """What of a record is plain, taken out of it with what it holds beside: the rest is provenance."""
    found: dict[str, Any] = {"splits": tuple(rest.pop("splits")), "cost": Cost(**rest.pop("cost"))}
    found["directions"] = tuple(map(tuple, rest.pop("directions")))
    found["marks"] = tuple(map(_mark, rest.pop("marks")))
    for derived in (*_ARRAYS, *_TOLD):
        rest.pop(derived, None)
    return found


def _mark(entry: Mapping[str, Any]) -> Mark:
    values = {key: {k: np.nan if v is None else v for k, v in entry[key].items()} for key in ("loss", "accuracy")}
    return Mark(**{**entry, **values, "coordinates": tuple(entry["coordinates"])})
