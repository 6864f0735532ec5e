"""The checkpoints of a comparison, and what they must have in common to be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, DataError
from sharpscope.objective import Objective
from sharpscope.problem import Problem
from sharpscope.resume.fingerprint import fingerprint

SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Entrant:
    """A checkpoint that takes part.

    Attributes:
        name: by which it is called, unique.
        load: its Problem by split, "train" or "test"; None where there are no such data.
        group: "sgd", "sam", ..., or None where checkpoints stand for themselves.
    """

    name: str
    load: Callable[[str], Problem | None]
    group: str | None = None


@dataclass(frozen=True, eq=False)
class Field:
    """All that take part, known to be measured alike.

    Attributes:
        entrants: in order.
        data: by split, those of all of them; held once, however many checkpoints there are.
    """

    entrants: tuple[Entrant, ...]
    data: Mapping[str, Any]

    def problem(self, entrant: Entrant, split: str = "train") -> Problem:
        """The Problem of an entrant on the data that all share."""
        found = entrant.load(split)
        assert found is not None
        return replace(found, data=self.data[split])


def field_of(entrants: Sequence[Entrant]) -> Field:
    """The entrants, after a look at each: weights that are finite and no other's, one loss, the same data.

    Cost: each checkpoint is read, and the data are walked once a checkpoint, without a model.

    Raises: ArgumentError for fewer than one, a checkpoint or a run that comes twice, or other losses; DataError for
        other data, or weights that are not finite.
    """
    if not entrants:
        raise ArgumentError("A comparison needs at least one checkpoint, got none.")
    data: dict[str, Any] = {}
    first: tuple[Entrant, Problem, dict[str, str]] | None = None
    weights: dict[str, str] = {}
    runs: dict[tuple[str, str], str] = {}
    for entrant in entrants:
        problems = {split: problem for split in SPLITS if (problem := entrant.load(split)) is not None}
        train = problems["train"]
        _require_finite(entrant.name, train)
        _require_own(entrant.name, fingerprint(dict(train.model.state_dict())), weights)
        _require_own_run(entrant, train, runs)
        prints = {split: fingerprint(problem.data) for split, problem in problems.items()}
        if first is None:
            first = entrant, train, prints
            data = {split: problem.data for split, problem in problems.items()}
        else:
            _require_alike(first, (entrant, train, prints))
    return Field(tuple(entrants), data)


def _require_finite(name: str, problem: Problem) -> None:
    for key, value in problem.model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"Weights must be finite, but {name} has diverged: {key} is not. Leave it out, and say so.")


def _require_own(name: str, weights: str, seen: dict[str, str]) -> None:
    if weights in seen:
        raise ArgumentError(
            f"A comparison needs other weights in each checkpoint, but {seen[weights]} and {name} hold the same. "
            "Name each once."
        )
    seen[weights] = name


def _require_own_run(entrant: Entrant, problem: Problem, seen: dict[tuple[str, str], str]) -> None:
    """Two checkpoints of one run are not two runs, and would make an interval too narrow."""
    recipe = problem.provenance.get("recipe")
    if entrant.group is None or not recipe:
        return
    run = entrant.group, fingerprint({key: str(value) for key, value in recipe.items()})
    if run in seen:
        raise ArgumentError(
            f"A group must hold independent runs, but {seen[run]} and {entrant.name} of {entrant.group} are of one "
            f"recipe and seed. Narrow the pattern to one checkpoint a run."
        )
    seen[run] = entrant.name


def _require_alike(
    first: tuple[Entrant, Problem, dict[str, str]], other: tuple[Entrant, Problem, dict[str, str]]
) -> None:
    (one, ours, known), (two, theirs, found) = first, other
    losses = [Objective(problem).loss_name for problem in (ours, theirs)]
    if losses[0] != losses[1]:
        raise ArgumentError(
            f"Checkpoints must be compared on one loss, but {one.name} has {losses[0]} and {two.name} {losses[1]}. "
            "Name one for all (--loss)."
        )
    for split in SPLITS:
        if known.get(split) != found.get(split):
            raise DataError(
                f"Checkpoints must be compared on the same data, but the {split} data of {one.name} "
                f"({_data(ours)}) and {two.name} ({_data(theirs)}) differ. Name those for all (--data), and let a "
                "problem() of your own return the same examples at every call."
            )


def _data(problem: Problem) -> str:
    noise = problem.provenance.get("label_noise")
    wrong = f", {100 * noise:.3g} % wrong labels" if noise else ""
    return f"{problem.provenance.get('data', type(problem.data).__name__)}{wrong}"
