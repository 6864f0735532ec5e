"""Measure several checkpoints with the same settings, step by step, and resume from cached steps."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sharpscope.atomic_io import locked
from sharpscope.comparing.checkpoints import Checkpoint, Checkpoints, CheckpointSet
from sharpscope.comparing.steps import (
    STEPS,
    Level,
    PathLike,
    Settings,
    Step,
    interpolation,
    performance,
    resolve_level,
    sampled,
)
from sharpscope.errors import ArgumentError, DataError, ProblemError
from sharpscope.fingerprint import fingerprint, key_of
from sharpscope.objective import Objective, Progress
from sharpscope.problem import Problem
from sharpscope.results import Comparison, SliceResult
from sharpscope.results.comparison import ANALYSES, Performance, Subject
from sharpscope.results.serialization import (
    FieldError,
    as_json,
    header,
    parse_value,
    read_json,
    without_header,
    write_json,
)
from sharpscope.resume import discard
from sharpscope.sharpness.curvature_measures import edge_from_eigenvalues
from sharpscope.slices.checkpoint_directions import unselected_distance


def compare(
    checkpoints: Checkpoints,
    *,
    test: Any = None,
    level: str | Level = "default",
    seed: int = 0,
    rho: float = 0.05,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Loss, accuracy, eigenvalues, density, trace, m-sharpness and slices of each, and the loss on the lines between.

    All are measured alike: on the same samples, from the same random numbers. Loss and accuracy of all come first: they
    are cheap, and show what has diverged. What one checkpoint cannot have (a line without a weight that may move,
    subsets of batches that cannot be cut) is left out, and its provenance's ``left_out`` says why. Groups are compared
    by their runs, which are paired where both have the same ``provenance["recipe"]["seed"]``.

    Args:
        checkpoints: by name, each a ``Problem`` on the training data, or a function of no argument that returns one,
            so that many need not be in memory at once: it is called again for each pass over the checkpoints. A list of
            these, or a mapping by name, is a group of runs; all are compared with the first.
        test: data of the test split, in any form that ``Problem`` takes. Default: no test numbers.
        level: "quick", "default" or "thorough", or a ``sharpscope.comparing.Level``.
        seed: of samples, starts, probes and directions.
        rho: the radius of m-sharpness.
        dtype, device: as for ``top_eigenvalues``.
        folder: where finished parts are kept, so that the same call goes on after a kill; parts of other weights, data
            or settings give way.
        progress: called as ``progress(stage, done, total)``, the stage with the checkpoint's name before it.

    Cost: of the zoo's cnn on Fashion-MNIST 36 s a checkpoint at "quick", 200 s at "default" and some 1,500 s at
        "thorough", on one core.

    Raises: ArgumentError for checkpoints that cannot be compared, DataError for other data, or weights or a loss that
        are not finite; OutputError where another process has the folder; what the analyses raise.

    >>> import sharpscope
    >>> import torch
    >>> def product(a, b):  # L = (a b - 1)^2, whose Hessian at a b = 1 has the eigenvalues 2 (a^2 + b^2) and 0
    ...     model = torch.nn.Sequential(*(torch.nn.Linear(1, 1, bias=False) for _ in range(2)))
    ...     torch.nn.utils.vector_to_parameters(torch.tensor([a, b]), model.parameters())
    ...     return sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=(torch.ones(1, 1), torch.ones(1, 1)))
    >>> comparison = sharpscope.compare({"even": product(1.0, 1.0), "uneven": product(2.0, 0.5)}, level="quick")
    >>> for subject in comparison.subjects:
    ...     print(f"{subject.name}: {subject.eigen.lambda_max:.2f}")
    even: 4.00
    uneven: 8.50
    """
    if isinstance(test, Problem):
        raise ArgumentError("test must be data, got a Problem. Pass its data.")
    settings = Settings(level=resolve_level(level), test=test, seed=seed, rho=rho, dtype=dtype, device=device)
    with nullcontext() if folder is None else locked(folder):
        return _ComparisonRun(CheckpointSet(checkpoints), settings, StepCache(folder), progress).comparison()


class _ComparisonRun:
    """A comparison in progress."""

    def __init__(
        self, checkpoints: CheckpointSet, settings: Settings, cache: StepCache, progress: Progress | None
    ) -> None:
        self._checkpoints, self._settings, self._cache, self._progress = checkpoints, settings, cache, progress
        self._keys: dict[str, str] = {}

    def comparison(self) -> Comparison:
        """Everything that the level asks for, of each checkpoint and of the lines between them."""
        performances = [self.performance(checkpoint) for checkpoint in self._checkpoints.checkpoints]
        subjects, lines = [], []
        for checkpoint, known in zip(self._checkpoints.checkpoints, performances, strict=True):
            subjects.append(self.subject(checkpoint, known))
            lines += self.interpolation_to(checkpoint)
        return Comparison(subjects=tuple(subjects), between=tuple(lines), level=self._settings.level.name)

    def performance(self, checkpoint: Checkpoint) -> dict[str, Performance]:
        """By split; cheap."""
        problem, settings = self._checkpoints.problem(checkpoint), self._settings
        splits = {"train": problem}
        if settings.test is not None:
            splits["test"] = replace(problem, data=settings.test)

        def measure(journal: PathLike) -> dict[str, Performance]:
            found = {}
            for split, one in splits.items():
                self._report(checkpoint.name, "loss and accuracy")(split, 0, None)
                subset = sampled(one, settings.level.performance_examples, settings.seed)
                found[split] = performance(subset, **settings.dtype_and_device)
            return found

        found: dict[str, Performance] = self._cache.get(
            checkpoint.name, "performance", lambda: self._key(checkpoint, problem, "performance"), measure
        )
        for split, known in found.items():
            if not math.isfinite(known.loss):
                raise DataError(
                    f"Losses must be finite, but {checkpoint.name} has diverged: its {split} loss is {known.loss}. "
                    "Leave it out, and say so."
                )
        return found

    def subject(self, checkpoint: Checkpoint, performances: Mapping[str, Performance]) -> Subject:
        """All analyses of one checkpoint."""
        problem = self._checkpoints.problem(checkpoint)
        found: dict[str, Any] = {}
        left_out: dict[str, str] = {}
        for name, (stage, step) in STEPS.items():
            try:
                found[name] = self._cached(checkpoint, problem, name, step, self._report(checkpoint.name, stage))
            except (ArgumentError, ProblemError, DataError) as error:
                if name == "eigen":
                    raise
                left_out[name] = str(error)
        edge = edge_from_eigenvalues(found["eigen"])
        if edge is not None and "sharpness" in found:
            found["sharpness"] = replace(found["sharpness"], measures=(*found["sharpness"].measures, edge))
        seed = (problem.provenance.get("recipe") or {}).get("seed", problem.provenance.get("pair"))
        return Subject(
            name=checkpoint.name,
            group=checkpoint.group,
            pair=None if seed is None else str(seed),
            performance=performances,
            provenance={**problem.provenance, **({"left_out": left_out} if left_out else {})},
            **found,
        )

    def interpolation_to(self, checkpoint: Checkpoint) -> list[tuple[str, str, SliceResult]]:
        """From the first checkpoint to this one, or of groups from first run to first run; of one architecture."""
        first, *others = self._checkpoints.representatives
        if checkpoint not in others:
            return []
        problem, end = self._checkpoints.problem(first), self._checkpoints.problem(checkpoint)
        if not _connectable(problem, end):
            return []
        report = self._report(f"{first.name} to {checkpoint.name}", "line")
        theirs = fingerprint(dict(end.model.state_dict()))
        step = interpolation(checkpoint.name, end)
        return [
            (
                first.name,
                checkpoint.name,
                self._cached(first, problem, f"to-{checkpoint.name}", step, report, other=theirs),
            )
        ]

    def _cached(
        self, checkpoint: Checkpoint, problem: Problem, part: str, step: Step, report: Progress, **also: Any
    ) -> Any:
        """Return the result of the step, from the cache or measured now."""
        return self._cache.get(
            checkpoint.name,
            part,
            lambda: self._key(checkpoint, problem, part, **also),
            lambda journal: step(problem, self._settings, journal, report),
        )

    def _key(self, checkpoint: Checkpoint, problem: Problem, part: str, **also: Any) -> str:
        """Of all that decides the part's numbers; what the checkpoint's parts share is hashed once, in a walk."""
        if checkpoint.name not in self._keys:
            # Where the file lies is no part of what is in it.
            said = {k: str(v) for k, v in problem.provenance.items() if k != "checkpoint"}
            settings = self._settings
            self._keys[checkpoint.name] = key_of(
                Objective(problem, **settings.dtype_and_device),
                name=checkpoint.name,
                level={**asdict(settings.level), "name": ""},
                seed=settings.seed,
                rho=settings.rho,
                said=said,
                test=settings.test,
            )
        return fingerprint(self._keys[checkpoint.name], part, also)

    def _report(self, name: str, what: str) -> Progress:
        def report(stage: str, done: int, total: int | None) -> None:
            if self._progress is not None:
                self._progress(f"{name}, {what}: {stage}", done, total)

        return report


def _connectable(one: Problem, two: Problem) -> bool:
    """Whether a straight line leads from one network to the other, and the weights that stay are equal."""
    try:
        return unselected_distance(one, two) == 0
    except ProblemError:
        return False


class StepCache:
    """The finished steps of a comparison, one file each, with the key of what determines it.

    A cached result is reused only if its key matches. An interrupted step resumes from its journal.

    Args:
        folder: created with the first file; None disables the cache.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def get(self, name: str, part: str, key: Callable[[], str], measure: Callable[[Path | None], Any]) -> Any:
        """``measure(journal)``, or what it returned under this key; on disk always as it is read back.

        Args:
            name: of the checkpoint.
            part: "performance", a key of ANALYSES, or "to-" and the name of another checkpoint.
            key: the hash of what decides the part, which walks the data.
        """
        if self._folder is None:
            return measure(None)
        now, path = key(), self._folder / f"{_file_name(name)}-{_file_name(part)}.json"
        journal = path.with_suffix(".partial")
        found = _read_cached(path, part, now)
        if found is None:
            write_json(path, {**header("part", {"key": now}), "holds": as_json(measure(journal))})
            found = _read_cached(path, part, now)
            assert found is not None
        discard(journal)  # also one that was left by a kill just here
        return found


def _read_cached(path: Path, part: str, key: str) -> Any:
    """The part at ``path``, None where there is none of this key."""
    try:
        values = without_header(read_json(path), "part")
        if values["key"] != key:
            return None
        if part == "performance":
            return parse_value(Mapping[str, Performance], values["holds"], "holds")
        return (ANALYSES[part].result if part in ANALYSES else SliceResult).from_dict(values["holds"])
    except (DataError, KeyError, FieldError):
        return None


def _file_name(name: str) -> str:
    """Return a name that is safe in a file name; a hash keeps names distinct whose characters were replaced."""
    safe = re.sub(r"[^\w.+-]", "-", name)
    return safe if safe == name else f"{safe}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"
