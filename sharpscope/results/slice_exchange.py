"""Slices in other programs' files: write CSV and VTK, read those of loss-landscape."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from sharpscope.atomic_io import atomic
from sharpscope.errors import ArgumentError, DataError
from sharpscope.results.base import Cost
from sharpscope.results.serialization import Array
from sharpscope.results.slice import DIVERGED, DONE, PENDING, STATUSES, SliceResult, describe_directions


def to_csv(result: SliceResult, path: str | os.PathLike[str]) -> None:
    """Write a row a point: line, direction, coordinates, status, and loss and accuracy of each split.

    All digits are kept. A cell is empty where a point is pending or an accuracy is unknown; a diverged point has its
    ``inf`` or ``nan``.

    Raises: OutputError when ``path`` cannot be written.
    """
    axes = "xy" if result.dimensions == 2 else "t"
    columns = [f"{split}_{what}" for split in result.splits for what in ("loss", "accuracy")]
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["line", "direction", *axes, "status", *columns])
        for place in np.ndindex(result.status.shape):
            line, *indices = place
            at = [float(a[i]) for a, i in zip(result.axes, reversed(indices), strict=True)]
            status = int(result.status[place])
            cells = []
            for split in range(len(result.splits)):
                loss, accuracy = (float(values[split][place]) for values in (result.loss, result.accuracy))
                cells += ["" if status == PENDING else repr(loss), repr(accuracy) if np.isfinite(accuracy) else ""]
            rows.writerow([line, describe_directions(result, line), *map(repr, at), STATUSES[status], *cells])


def to_vtk(result: SliceResult, path: str | os.PathLike[str], line: int | None = None) -> None:
    """Write a line or plane as a legacy ASCII VTK rectilinear grid, x fastest, which ParaView opens.

    Its point data are ``{split}_loss`` and ``{split}_accuracy``, NaN where pending, and ``status`` (0 pending, 1 done,
    2 diverged). A diverged point keeps its infinity or NaN.

    Raises: OutputError when ``path`` cannot be written; ArgumentError when there is no such line.
    """
    if result.dimensions == 1 and len(result.directions) > 1 and line is None:
        raise DataError(f"A VTK file holds one line, got {len(result.directions)}. Name one (line=), or write a CSV.")
    line = line or 0
    if not 0 <= line < len(result.directions):
        raise ArgumentError(f"line must be from 0 to {len(result.directions) - 1}, got {line}.")
    axes = [*result.axes, *[np.zeros(1)] * (3 - result.dimensions)]
    # The format's title is one line of at most 256 characters.
    title = f"{result.provenance.get('checkpoint') or 'model'}: {describe_directions(result, line)}".replace("\n", " ")
    text = ["# vtk DataFile Version 3.0", title[:255], "ASCII", "DATASET RECTILINEAR_GRID"]
    text.append(f"DIMENSIONS {' '.join(str(len(a)) for a in axes)}")
    for name, a in zip("XYZ", axes, strict=True):
        text += [f"{name}_COORDINATES {len(a)} double", _numbers(a)]
    text.append(f"POINT_DATA {result.status[line].size}")
    pending = result.status[line] == PENDING
    for split, name in enumerate(result.splits):
        for what, values in (("loss", result.loss), ("accuracy", result.accuracy)):
            scalars = np.where(pending, np.nan, values[split, line])
            # A name has no spaces in this format.
            column = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}_{what}"
            text += [f"SCALARS {column} double 1", "LOOKUP_TABLE default", _numbers(scalars)]
    text += ["SCALARS status int 1", "LOOKUP_TABLE default", " ".join(str(int(s)) for s in result.status[line].flat)]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="ascii", errors="replace")


def _numbers(values: Array) -> str:
    return " ".join(repr(float(v)) for v in values.flat)


SPLITS = ("train", "test")
_KEYS = {"xcoordinates", "ycoordinates", *(f"{split}_{what}" for split in SPLITS for what in ("loss", "acc"))}


def read_loss_landscape(path: str | os.PathLike[str]) -> SliceResult:
    """The line or plane in an h5 file of ``plot_surface.py``.

    Its 2D data sets have the shape (len(x), len(y)), but are filled in the flat order of ``np.meshgrid(x, y)``, which
    is that of (len(y), len(x)): ``scheduler.py`` numbers the points of the mesh and ``crunch`` writes each to that
    place of ``losses.ravel()``. So they are read here, and planes that are not square come out right.

    A loss of -1 is pending, as there; a point is pending where any split that has begun lacks it, and a split that has
    not begun is left out. The file says neither the data nor the seed, and nor does the result; what it knows of the
    directions is read from their file's name.

    Raises: ArgumentError where h5py is not installed; DataError when ``path`` holds something else.
    """
    try:
        import h5py
    except ImportError as error:
        raise ArgumentError("Reading .h5 files needs h5py. Run pip install 'sharpscope[h5]'.") from error
    try:
        with h5py.File(path, "r") as file:
            arrays = {key: np.asarray(file[key][()], dtype=np.float64) for key in file if key in _KEYS}
            directions_file = file["dir_file"][()] if "dir_file" in file else b""
    except (OSError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} must be an h5 file of loss-landscape; problem: {error}.") from error
    if "xcoordinates" not in arrays:
        raise DataError(f"{path} must be an h5 surface of loss-landscape, but it has no xcoordinates.")
    axes = tuple(arrays[key] for key in ("xcoordinates", "ycoordinates") if key in arrays)
    shape = tuple(len(a) for a in reversed(axes))
    splits = [s for s in SPLITS if (arrays.get(f"{s}_loss", np.full(1, -1.0)) != -1).any()]
    if not splits:
        raise DataError(f"{path} must hold a train_loss or test_loss with a finished point, but has none.")
    if any(a.ndim != 1 or len(a) < 2 or not (np.diff(a) > 0).all() for a in axes):
        raise DataError(f"{path} must have at least two ascending coordinates on each axis.")
    loss = np.stack([_grid(arrays[f"{s}_loss"], shape, path) for s in splits])[:, None]
    missing = np.full(shape, -100.0)
    accuracy = np.stack([_grid(arrays.get(f"{s}_acc", missing), shape, path) for s in splits])[:, None] / 100
    pending = (loss == -1).any(axis=0)
    status = np.where(pending, PENDING, np.where(np.isfinite(loss).all(axis=0), DONE, DIVERGED)).astype(np.int8)
    loss[:, pending] = np.nan
    accuracy[(accuracy < 0) | np.broadcast_to(pending, accuracy.shape)] = np.nan
    name = directions_file.decode(errors="replace") if isinstance(directions_file, bytes) else str(directions_file)
    checkpoint, directions = _parse_file_name(Path(name).name, len(axes))
    q = len(axes)
    return SliceResult(
        axes=axes,
        loss=loss,
        accuracy=accuracy,
        status=status,
        splits=tuple(splits),
        directions=(tuple(directions),),
        centre=_centre(axes, loss, accuracy),
        slopes=np.full((1, q), np.nan),
        curvatures=np.full((1, q, q), np.nan),
        cost=Cost(0, 0, 0.0, 0.0),
        provenance={
            "checkpoint": checkpoint or Path(path).name,
            "source": f"loss-landscape, {Path(path).name}",
            # evaluation.py calls net.eval().
            "mode": "eval",
        },
    )


def _grid(values: Array, shape: tuple[int, ...], path: Any) -> Array:
    if values.size != np.prod(shape):
        raise DataError(
            f"{path} must hold a value for each of {' x '.join(map(str, shape))} points, got {values.size}."
        )
    return np.array(values.ravel().reshape(shape))


def _centre(axes: tuple[Array, ...], loss: Array, accuracy: Array) -> Array:
    """Loss and accuracy (splits, 2) at 0; NaN where the grid does not hold it."""
    where = [np.flatnonzero(a == 0) for a in reversed(axes)]
    if not all(len(w) for w in where):
        return np.full((len(loss), 2), np.nan)
    place: Any = (slice(None), 0, *(int(w[0]) for w in where))
    return np.stack([loss[place], accuracy[place]], axis=1)


def _parse_file_name(name: str, count: int) -> tuple[str, list[dict[str, Any]]]:
    """The checkpoint and the directions, from a name such as ``model.t7_weights_xignore=biasbn_xnorm=filter.h5``."""
    found = re.match(r"(.+?)_(?:weights|states)(?=[_.])", name)
    directions = []
    for axis in "xy"[:count]:
        norm, ignored = (re.search(rf"_{axis}{what}=([a-z]+)", name) for what in ("norm", "ignore"))
        direction: dict[str, Any] = {"label": f"direction {axis}", "length": None, "kind": "unknown"}
        # Only a random direction has a norm beside it: one towards another model is named after that.
        if norm is not None:
            fixed = "fixed" if ignored and ignored[1] == "biasbn" else "copied"
            direction |= {"label": f"random direction {axis}", "kind": "random", "normalisation": norm[1]}
            direction |= {"seed": "unknown", "one_dimensional": fixed}
        directions.append(direction)
    return (found[1] if found else ""), directions
