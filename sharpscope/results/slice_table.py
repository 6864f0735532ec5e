"""The table of slices, and their directions in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sharpscope.results.record import names_of, origin_notes
from sharpscope.results.slice import DIVERGED, PENDING, SliceResult
from sharpscope.results.table import Table


def slice_table(results: Sequence[SliceResult]) -> Table:
    """A row a line or plane and split, and beside them the networks on or near it."""
    marks = [row for r in results for row in _marks(r)]
    return Table(_rows(results), _notes(results), beside=[_MARKS, *marks] if marks else [])


def described(result: SliceResult, line: int = 0) -> str:
    """The directions of a line or plane in a few words."""
    labels = [str(d["label"]) for d in result.directions[line]]
    kinds = {str(d.get("kind")) for d in result.directions[line]}
    if kinds == {"random"}:
        seeds = ", ".join(dict.fromkeys(str(d.get("seed")) for d in result.directions[line]))
        size = result.directions[line][0].get("normalisation")
        sized = "not normalised" if size == "none" else f"{size}-normalised"
        return f"random, {sized}, seed {seeds}"
    return " x ".join(labels)


def _rows(results: Sequence[SliceResult]) -> list[list[str]]:
    barriers = any(r.barrier(line=i) is not None for r in results for i in range(len(r.directions)))
    curved = any(np.isfinite(r.curvatures).all() for r in results)
    head = ["", "split", "direction", "loss at w", "accuracy", "lowest", "at", "highest", "at"]
    rows = [head + ["barrier"] * barriers + ["curvature"] * curved + ["diverged"]]
    for name, r in zip(names_of([r.provenance for r in results]), results, strict=True):
        for line in range(len(r.directions)):
            for s, split in enumerate(r.splits):
                row = [name, split, described(r, line), f"{r.centre[s, 0]:.4g}", _share(r.centre[s, 1])]
                row += [*_extreme(r, s, line, np.nanargmin), *_extreme(r, s, line, np.nanargmax)]
                barrier = r.barrier(split, line)
                row += [("" if barrier is None else f"{barrier:.4g}")] * barriers
                bends = np.diagonal(r.curvatures[line])
                row += [", ".join(f"{c:.4g}" for c in bends) if s == 0 and np.isfinite(bends).all() else ""] * curved
                rows.append([*row, str(int((r.status[line] == DIVERGED).sum()))])
    return rows


_MARKS = ["network", "split", "coordinates", "distance to the picture", "distance to w", "its loss", "accuracy"]


def _marks(result: SliceResult) -> list[list[str]]:
    return [
        [
            mark.name,
            split,
            ", ".join(f"{c:.4g}" for c in mark.coordinates),
            f"{mark.distance:.3g}",
            f"{mark.length:.3g}",
            f"{mark.loss[split]:.4g}",
            _share(mark.accuracy[split]),
        ]
        for mark in result.marks
        for split in result.splits
    ]


def _notes(results: Sequence[SliceResult]) -> list[str]:
    notes = []
    for name, r in zip(names_of([r.provenance for r in results]), results, strict=True):
        notes += origin_notes(name, r.provenance)
        grid = " x ".join(f"{len(a)} points from {a[0]:.3g} to {a[-1]:.3g}" for a in r.axes)
        kept = r.provenance.get("repeated") or 0
        known = f", {kept} of them from disk" if kept else ""
        lines = f"{len(r.directions)} lines of " if len(r.directions) > 1 else ""
        notes.append(
            f"{name}: {lines}{grid}{known}; {r.cost.passes} passes over the data, {r.cost.seconds:.1f} seconds; "
            f"{also_said(r)}."
        )
        pending = int((r.status == PENDING).sum())
        if pending:
            notes.append(f"{name}: {pending} points are still to be measured; the same command goes on with them.")
        cosine = r.provenance.get("cosine")
        if cosine is not None and abs(cosine) > 1e-6:
            notes.append(f"{name}: the axes have a cosine of {cosine:.3g}, and a picture draws them at right angles.")
        if misleads(r):
            notes.append(f"{name}: {MISLEADS}")
    if any(r.barrier(line=i) is not None for r in results for i in range(len(r.directions))):
        notes.append(
            "barrier: the most by which the loss lies above the straight line between its ends, on these points."
        )
    return list(dict.fromkeys(notes))


MISLEADS = (
    "BatchNorm's running statistics stay those of the centre, so that away from it this is the loss of a network that "
    "nobody would use. Pass --batchnorm recalibrate (batchnorm='recalibrate')."
)


def misleads(result: SliceResult) -> bool:
    """Whether BatchNorm normalises everywhere by the statistics of the centre."""
    return (
        result.provenance.get("batchnorm") == "running statistics" and result.provenance.get("statistics") == "frozen"
    )


def also_said(result: SliceResult) -> str:
    """What a caption must say of how weights and statistics moved."""
    said = [f"{result.provenance.get('mode', '?')} mode"]
    fixed = [d.get("one_dimensional") for line in result.directions for d in line]
    if "fixed" in fixed:
        said.append("biases and norms fixed")
    if result.provenance.get("batchnorm") == "running statistics":
        said.append(f"BatchNorm {result.provenance.get('statistics')}")
    return ", ".join(said)


def _extreme(r: SliceResult, split: int, line: int, which: Any) -> list[str]:
    loss = np.where(np.isfinite(r.loss[split, line]), r.loss[split, line], np.nan)
    if np.isnan(loss).all():
        return ["?", ""]
    place = np.unravel_index(which(loss), loss.shape)
    at = [float(a[i]) for a, i in zip(r.axes, reversed(place), strict=True)]
    return [f"{loss[place]:.4g}", ", ".join(f"{c:.3g}" for c in at)]


def _share(value: float) -> str:
    return f"{value:.2%}" if np.isfinite(value) else "-"
