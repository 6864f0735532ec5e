"""Slices through the loss, point by point, and their table."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from sharpscope.errors import DataError
from sharpscope.results.base import CheckpointResult, Cost
from sharpscope.results.origin import origin_notes, typed_value
from sharpscope.results.serialization import (
    IN_NPZ,
    Array,
    FieldError,
    MaybeNaN,
    MaybeNaNs,
    arrays_path,
    as_json,
    parse_fields,
    parse_value,
    read_arrays,
    read_json,
    without_header,
    write_json,
)
from sharpscope.results.table import Table

PENDING, DONE, DIVERGED = 0, 1, 2
STATUSES = ("pending", "done", "diverged")

_ARRAYS = ("loss", "accuracy", "status", "centre", "slopes", "curvatures")
_GRID_ARRAYS = ("loss", "accuracy", "status")


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
    distance: MaybeNaN
    length: MaybeNaN
    loss: Mapping[str, MaybeNaN]
    accuracy: Mapping[str, MaybeNaN]
    on_path: bool = False


@dataclass(frozen=True, eq=False)
class SliceResult(CheckpointResult):
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

    analysis = "slice"
    derived = ("dimensions", "points")

    axes: tuple[Array, ...]
    loss: Annotated[MaybeNaNs, IN_NPZ]
    accuracy: Annotated[MaybeNaNs, IN_NPZ]
    status: Annotated[NDArray[np.int8], IN_NPZ]
    splits: tuple[str, ...]
    directions: tuple[tuple[Mapping[str, Any], ...], ...]
    centre: MaybeNaNs
    slopes: MaybeNaNs
    curvatures: MaybeNaNs
    cost: Cost
    marks: tuple[Mark, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        q, splits, lines = self.dimensions, len(self.splits), len(self.directions)
        if any(len(line) != q for line in self.directions) or not self.directions:
            raise DataError(f"A slice of {q} axes needs as many directions for each line or plane. Measure it again.")
        if q not in (1, 2) or any("label" not in entry for line in self.directions for entry in line):
            raise DataError(f"A slice needs 1 or 2 axes, and directions with labels, got {q} axes. Measure it again.")
        grid = tuple(len(axis) for axis in reversed(self.axes))
        shapes = {"loss": (splits, lines, *grid), "accuracy": (splits, lines, *grid), "status": (lines, *grid)}
        shapes |= {"centre": (splits, 2), "slopes": (lines, q), "curvatures": (lines, q, q)}
        for name, shape in shapes.items():
            got = getattr(self, name).shape
            if got != shape:
                what = {"loss": "losses", "accuracy": "accuracies"}.get(name, f"{name!r}")
                of = f"{splits} splits and {lines} lines or planes"
                raise DataError(f"A slice of {of} needs {what} of shape {shape}, got {got}. Measure it again.")
        if not np.isin(self.status, (PENDING, DONE, DIVERGED)).all():
            raise DataError("A slice needs 0, 1 or 2 in 'status', got other numbers. Measure it again.")
        for mark in self.marks:
            if len(mark.coordinates) != q or any({*self.splits} - set(found) for found in (mark.loss, mark.accuracy)):
                raise DataError(
                    f"A slice's mark needs {q} coordinates, and loss and accuracy on {', '.join(self.splits)}, got "
                    f"{len(mark.coordinates)} and {', '.join(mark.loss)} for {mark.name}. Measure it again."
                )

    @classmethod
    def _json_keys(cls) -> tuple[str, ...]:
        return (*super()._json_keys(), "digest", "infinite")

    @property
    def dimensions(self) -> int:
        """1 for lines, 2 for planes."""
        return len(self.axes)

    @property
    def points(self) -> dict[str, int]:
        """The number of points of each status."""
        return {name: int((self.status == i).sum()) for i, name in enumerate(STATUSES)}

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
        """The slice itself where no point is pending, else the coarser grid that is done, which previews it.

        Raises: DataError when there is none with two points on each axis.
        """
        if self.complete:
            return self
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

    def record(self) -> dict[str, Any]:
        """All that ``from_dict`` needs: the values over the grid as well."""
        return self.to_dict(grid=True)

    def to_dict(self, *, grid: bool = False) -> dict[str, Any]:
        """Everything but the arrays over the grid, as plain JSON values; a number that is not finite is null.

        ``grid``: those arrays as well, as ``from_dict`` needs them, and which losses are infinite.
        """
        values = super().to_dict()
        if not grid:
            return {**values, "digest": self._digest()}
        arrays = {name: as_json(getattr(self, name)) for name in _GRID_ARRAYS}
        return {**values, **arrays, "infinite": np.flatnonzero(np.isposinf(self.loss)).tolist()}

    @classmethod
    def _parse(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in _GRID_ARRAYS if name not in values]
        if missing:
            raise DataError(
                f"A slice result must have the keys of SliceResult.to_dict(grid=True), got none named {missing[0]!r}. "
                "Load its file, next to which its arrays are."
            )
        fields_read = super()._parse(values) | parse_fields(cls, _GRID_ARRAYS, values)
        if parse_value(int, values["dimensions"], "dimensions") != len(fields_read["axes"]):
            raise FieldError(f"needs the number of axes in 'dimensions', got {values['dimensions']}")
        infinite = parse_value(tuple[int, ...], values.get("infinite", ()), "infinite")
        if any(not 0 <= i < fields_read["loss"].size for i in infinite):
            raise FieldError(
                f"needs places of losses in 'infinite', got others than 0 to {fields_read['loss'].size - 1}"
            )
        fields_read["loss"].flat[list(infinite)] = np.inf
        return fields_read

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to ``path`` and the arrays beside it as ``.npz``, each atomically.

        Raises: OutputError when they cannot be written.
        """
        write_json(path, self.to_dict(), self._arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SliceResult:
        """Read what ``save`` wrote.

        Raises: DataError when ``path`` holds something else, or its arrays are not beside it.
        """
        values, arrays_file = read_json(path), arrays_path(path)
        without_header(values, cls.analysis)
        arrays = read_arrays(arrays_file, [*_ARRAYS, "axis0"])
        axes = tuple(arrays[name] for name in ("axis0", "axis1") if name in arrays)
        result = cls.from_dict({**values, **{name: arrays[name] for name in _ARRAYS}, "axes": axes})
        if result._digest() != values.get("digest"):
            raise DataError(
                f"{arrays_file} must hold the arrays of {path}, but they are of another run. Measure it again."
            )
        return result

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {f"axis{i}": a for i, a in enumerate(self.axes)} | {name: getattr(self, name) for name in _ARRAYS}

    def _digest(self) -> str:
        """A hash of the arrays, by which their file is known."""
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @classmethod
    def _table(cls, results: Sequence[SliceResult], names: Sequence[str]) -> Table:
        """A row a line or plane and split, and beside them the networks on or near it."""
        barriers = any(r.barrier(line=i) is not None for r in results for i in range(len(r.directions)))
        curved = any(np.isfinite(r.curvatures).all() for r in results)
        head = ["", "split", "direction", "loss at w", "accuracy", "lowest", "at", "highest", "at"]
        head += ["barrier"] * barriers + ["curvature"] * curved + ["diverged"]
        rows = [row for name, r in zip(names, results, strict=True) for row in r._rows(name, barriers, curved)]
        notes = cls._named_notes(results, names)
        if barriers:
            notes.append(
                "barrier: the most by which the loss lies above the straight line between its ends, on these points."
            )
        marks = [row for r in results for row in r._mark_rows()]
        return Table([head, *rows], list(dict.fromkeys(notes)), beside=[_MARK_COLUMNS, *marks] if marks else [])

    def _rows(self, name: str, barriers: bool, curved: bool) -> list[list[str]]:
        rows = []
        for line in range(len(self.directions)):
            curvature = np.diagonal(self.curvatures[line])
            bends = ", ".join(f"{c:.4g}" for c in curvature) if np.isfinite(curvature).all() else ""
            diverged = str(int((self.status[line] == DIVERGED).sum()))
            for s, split in enumerate(self.splits):
                barrier = self.barrier(split, line)
                row = [name, split, describe_directions(self, line)]
                row += [f"{self.centre[s, 0]:.4g}", _percent(self.centre[s, 1])]
                row += [*self._extreme(s, line, np.nanargmin), *self._extreme(s, line, np.nanargmax)]
                row += ["" if barrier is None else f"{barrier:.4g}"] * barriers
                row += [bends if s == 0 else ""] * curved
                rows.append([*row, diverged])
        return rows

    def _extreme(self, split: int, line: int, which: Any) -> list[str]:
        loss = np.where(np.isfinite(self.loss[split, line]), self.loss[split, line], np.nan)
        if np.isnan(loss).all():
            return ["?", ""]
        place = np.unravel_index(which(loss), loss.shape)
        at = [float(a[i]) for a, i in zip(self.axes, reversed(place), strict=True)]
        return [f"{loss[place]:.4g}", ", ".join(f"{c:.3g}" for c in at)]

    def _mark_rows(self) -> list[list[str]]:
        return [
            [
                mark.name,
                split,
                ", ".join(f"{c:.4g}" for c in mark.coordinates),
                f"{mark.distance:.3g}",
                f"{mark.length:.3g}",
                f"{mark.loss[split]:.4g}",
                _percent(mark.accuracy[split]),
            ]
            for mark in self.marks
            for split in self.splits
        ]

    def _notes(self) -> list[str]:
        grid = " x ".join(f"{len(a)} points from {a[0]:.3g} to {a[-1]:.3g}" for a in self.axes)
        kept = typed_value(self.provenance, "repeated", int) or 0
        known = f", {kept} of them from disk" if kept else ""
        lines = f"{len(self.directions)} lines of " if len(self.directions) > 1 else ""
        notes = [
            *origin_notes(self.provenance),
            f"{lines}{grid}{known}; {self.cost.passes} passes over the data, {self.cost.seconds:.1f} seconds; "
            f"{describe_mode(self)}.",
        ]
        if pending := self.points["pending"]:
            notes.append(f"{pending} points are still to be measured; the same command goes on with them.")
        cosine = typed_value(self.provenance, "cosine", int | float)
        if cosine is not None and abs(cosine) > 1e-6:
            notes.append(f"the axes have a cosine of {cosine:.3g}, and a picture draws them at right angles.")
        if keeps_centre_statistics(self):
            notes.append(
                "BatchNorm's running statistics stay those of the centre, so that away from it this is the loss of a "
                "network that nobody would use. Pass --batchnorm recalibrate (batchnorm='recalibrate')."
            )
        return notes


_MARK_COLUMNS = ["network", "split", "coordinates", "distance to the picture", "distance to w", "its loss", "accuracy"]


def describe_directions(result: SliceResult, line: int = 0) -> str:
    """The directions of a line or plane in a few words."""
    labels = [str(d["label"]) for d in result.directions[line]]
    kinds = {str(d.get("kind")) for d in result.directions[line]}
    if kinds == {"random"}:
        seeds = ", ".join(dict.fromkeys(str(d.get("seed")) for d in result.directions[line]))
        size = result.directions[line][0].get("normalisation")
        sized = "not normalised" if size == "none" else f"{size}-normalised"
        return f"random, {sized}, seed {seeds}"
    return " x ".join(labels)


def keeps_centre_statistics(result: SliceResult) -> bool:
    """Whether BatchNorm normalises everywhere by the statistics of the centre."""
    return (
        result.provenance.get("batchnorm") == "running statistics" and result.provenance.get("statistics") == "frozen"
    )


def describe_mode(result: SliceResult) -> str:
    """What a caption must say of how weights and statistics moved."""
    parts = [f"{result.provenance.get('mode', '?')} mode"]
    fixed = [d.get("one_dimensional") for line in result.directions for d in line]
    if "fixed" in fixed:
        parts.append("biases and norms fixed")
    if result.provenance.get("batchnorm") == "running statistics":
        parts.append(f"BatchNorm {result.provenance.get('statistics')}")
    return ", ".join(parts)


def _percent(value: float) -> str:
    return f"{value:.2%}" if np.isfinite(value) else "-"
