"""The files of a training run: what they are called, and whether a run may go on from them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharpscope.checkpoint import Checkpoint, read_checkpoint
from sharpscope.errors import ArgumentError, CheckpointError, OutputError
from sharpscope.recipe import Recipe


def snapshot_path(out: str | os.PathLike[str], epoch: int) -> Path:
    """Where the weights after ``epoch`` epochs are kept: ``runs/sam.pt`` gives ``runs/sam-epoch3.pt``."""
    path = Path(out)
    return path.with_name(f"{path.stem}-epoch{epoch}{path.suffix}")


def monitor_path(out: str | os.PathLike[str]) -> Path:
    """Where the sharpness along the run is kept: ``runs/sam.pt`` gives ``runs/sam.pt.monitor.json``."""
    path = Path(out)
    return path.with_name(f"{path.name}.monitor.json")


def earlier_run(
    recipe: Recipe, target: Path, beside: Sequence[Path], *, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """The run in ``target`` to go on with, or None to start one, when nothing that must stay would be overwritten.

    ``beside``: the other files that the run is to write.

    Raises: OutputError where a file is there already; ArgumentError and CheckpointError for a run that is not this one.
    """
    if resume and overwrite:
        raise ArgumentError("A run is either resumed or overwritten. Pass one of --resume and --overwrite.")
    present = [path for path in (target, *beside) if path.exists()]
    if present and not resume and not overwrite:
        raise OutputError(f"{present[0]} exists already. Pass --resume to go on with it, or --overwrite.")
    if overwrite or not target.exists():
        return None
    earlier = read_checkpoint(target)
    ours = dataclasses.asdict(recipe)
    # What an older version did not know it did as by default.
    theirs = {**dataclasses.asdict(Recipe()), **earlier.recipe}
    for key, value in ours.items():
        # By way of JSON, in which a tuple and a list of the same sizes are the same recipe.
        if _as_json(theirs[key]) != _as_json(value):
            raise ArgumentError(
                f"A run is resumed by its own recipe, but {key} is {value!r} and in {target} "
                f"{earlier.recipe.get(key, 'missing')!r}. Change it back, or pass --overwrite to start anew."
            )
    if earlier.training is None and earlier.epoch != recipe.epochs:
        raise CheckpointError(f"{target} keeps one epoch's weights and cannot be resumed. Name the run's own file.")
    return earlier


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
