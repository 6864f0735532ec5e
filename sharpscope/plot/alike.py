"""What several slices must share to stand in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results import SliceResult


def require_alike(results: Sequence[SliceResult], *, grid: bool) -> None:
    """Raise DataError unless the results are of the same data, measured alike along directions made alike.

    Args:
        results: to stand in one figure.
        grid: whether they must have one grid too.
    """
    if not results:
        raise DataError("A figure needs at least one result, got none.")
    if len({r.dimensions for r in results}) > 1:
        raise DataError("Lines and planes cannot share a figure. Draw them apart.")
    found: dict[str, list[Any]] = {
        **{key: [r.provenance.get(key) for r in results] for key in ("data", "split", "num_examples")},
        "subset of the data": [r.provenance.get("examples_seed") for r in results],
        "splits": [r.splits for r in results],
        "loss": [r.provenance.get("loss_function") for r in results],
        "mode": [r.provenance.get("mode") for r in results],
        "BatchNorm statistics": [(r.provenance.get("batchnorm"), r.provenance.get("statistics")) for r in results],
        "other data": [r.provenance.get("also") for r in results],
    }
    if grid:
        found["grid"] = [[a.tolist() for a in r.axes] for r in results]
    kinds = [[d.get("kind") for line in r.directions for d in line] for r in results]
    if grid or all(k == kinds[0] for k in kinds):
        found |= {
            "kind of direction": kinds,
            "normalisation": [_settings(r, "normalisation") for r in results],
            "biases and norms": [_settings(r, "one_dimensional") for r in results],
            "seed": [_settings(r, "seed") for r in results],
            "index of the direction": [_settings(r, "index") for r in results],
        }
    differ = [name for name, values in found.items() if any(v != values[0] for v in values)]
    if differ:
        first = found[differ[0]]
        came = "" if differ[0] == "grid" else f" ({' against '.join(dict.fromkeys(_told(v) for v in first))})"
        raise DataError(
            f"Slices in one figure must be alike, but the {', '.join(differ)} differ{'' if differ[1:] else 's'}{came}. "
            "Measure them in one call."
        )


def _settings(result: SliceResult, key: str) -> list[Any]:
    return [d.get(key) for line in result.directions for d in line]


def _told(value: Any) -> str:
    return "unknown" if value is None else str(value)
