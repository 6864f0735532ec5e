"""Slices as files for other programs: CSV for tables, VTK for ParaView."""

from __future__ import annotations

import csv
import os
import re

import numpy as np

from sharpscope.errors import ArgumentError, DataError
from sharpscope.files import atomic
from sharpscope.results.serialization import Array
from sharpscope.results.slice import PENDING, STATUSES, SliceResult, described


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
            rows.writerow([line, described(result, line), *map(repr, at), STATUSES[status], *cells])


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
    title = f"{result.provenance.get('checkpoint') or 'model'}: {described(result, line)}".replace("\n", " ")[:255]
    text = ["# vtk DataFile Version 3.0", title, "ASCII", "DATASET RECTILINEAR_GRID"]
    text.append(f"DIMENSIONS {' '.join(str(len(a)) for a in axes)}")
    for name, a in zip("XYZ", axes, strict=True):
        text += [f"{name}_COORDINATES {len(a)} double", _numbers(a)]
    text.append(f"POINT_DATA {result.status[line].size}")
    pending = result.status[line] == PENDING
    for split, name in enumerate(result.splits):
        for what, values in (("loss", result.loss), ("accuracy", result.accuracy)):
            scalars = np.where(pending, np.nan, values[split, line])
            text += [f"SCALARS {_word(name)}_{what} double 1", "LOOKUP_TABLE default", _numbers(scalars)]
    text += ["SCALARS status int 1", "LOOKUP_TABLE default", " ".join(str(int(s)) for s in result.status[line].flat)]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(text) + "\n", encoding="ascii", errors="replace")


def _numbers(values: Array) -> str:
    return " ".join(repr(float(v)) for v in values.flat)


def _word(name: str) -> str:
    """A name as VTK takes it, without spaces."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)
