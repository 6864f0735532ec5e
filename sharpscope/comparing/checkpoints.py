"""The checkpoints of a comparison, and what they must have in common to be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, DataError
from sharpscope.objective import Objective
from sharpscope.problem import Problem
from sharpscope.resume.key import fingerprint

Given = Problem | Callable[[], Problem]
Checkpoints = Mapping[str, Given | Sequence[Given] | Mapping[str, Given]]


@dataclass(frozen=True, eq=False)
class Entrant:
    """A checkpoint that takes part.

    Attributes:
        name: by which it is called, unique.
        load: its Problem on the training data; another function for each.
        group: "sgd", "sam", ..., or None where checkpoints stand for themselves.
        numbered: whether the name is its place in the group, for want of a better one.
    """

    name: str
    load: Callable[[], Problem]
    group: str | None = None
    numbered: bool = False


class Field:
    """All that take part, after a look at each: weights that are finite and no other's, one loss, the same data.

    The Problems of the first and of the last that was asked for are held; of many not all may fit into memory.

    Attributes:
        entrants: in order; the runs of a sequence by the names of their files, where all have one of their own.
        ends: the first of each group, or all where there are no groups.

    Cost: each checkpoint is built once, and the data are walked once a checkpoint, without a model.

    Raises: ArgumentError for fewer than one, a checkpoint or a run that comes twice, or other losses; DataError for
        other data, or weights that are not finite.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        given = _entrants(checkpoints)
        self._first = given[0].load, given[0].load()
        self._last = self._first
        self._shared = SharedData("train")
        self._weights: dict[str, str] = {}
        self._runs: dict[tuple[str, str], str] = {}
        self.entrants = _renamed(given, [self._looked_at(entrant, given[0]) for entrant in given])
        firsts: dict[str, Entrant] = {}
        for entrant in self.entrants:
            firsts.setdefault(entrant.name if entrant.group is None else entrant.group, entrant)
        self.ends = tuple(firsts.values())

    def _looked_at(self, entrant: Entrant, first: Entrant) -> str | None:
        """The name of the file of a run that has no other name, after all checks."""
        problem = self._held(entrant)
        _require_finite(entrant.name, problem)
        _require_own(entrant.name, fingerprint(dict(problem.model.state_dict())), self._weights)
        _require_own_run(entrant, problem, self._runs)
        if entrant is not first:
            _require_alike(first.name, self._first[1], entrant.name, problem)
        self._shared.add(entrant.name, problem)
        file = problem.provenance.get("checkpoint")
        return Path(str(file)).name if file and entrant.numbered else None

    def problem(self, entrant: Entrant) -> Problem:
        """The Problem of an entrant on the data that all share."""
        found = self._held(entrant)
        said = {**found.provenance, "split": found.provenance.get("split") or "train"}
        return replace(found, data=self._shared.data, provenance=said)

    def _held(self, entrant: Entrant) -> Problem:
        if entrant.load is self._first[0]:
            return self._first[1]
        if entrant.load is not self._last[0]:
            self._last = self._first  # what was held is let go before the next is built
            self._last = entrant.load, entrant.load()
        return self._last[1]


class SharedData:
    """The data of a split, which all checkpoints must have in common: those of the first that is added.

    Attributes:
        data: of the first; held once, however many checkpoints there are. None before.
    """

    def __init__(self, split: str) -> None:
        self.data: Any = None
        self._split, self._first, self._print = split, "", ""

    def add(self, name: str, problem: Problem) -> None:
        """Raise DataError where the data of ``problem`` are not those of the first. Cost: a walk over both."""
        if not self._first:
            self.data, self._first = problem.data, f"{name} ({_data(problem)})"
        if problem.data is self.data:
            return
        self._print = self._print or fingerprint(self.data)
        if fingerprint(problem.data) != self._print:
            raise DataError(
                f"Checkpoints must be compared on the same data, but the {self._split} data of {self._first} and "
                f"{name} ({_data(problem)}) differ. Name those for all (--data), and let a problem() of your own "
                "return the same examples at every call."
            )


def _entrants(checkpoints: Checkpoints) -> list[Entrant]:
    """Those given, in order; the runs of a sequence by their numbers."""
    found: list[Entrant] = []
    for name, given in checkpoints.items():
        if isinstance(given, str | bytes) or not isinstance(given, Mapping | Sequence):
            found.append(Entrant(str(name), _loader(str(name), given)))
            continue
        numbered = not isinstance(given, Mapping)
        runs = given if isinstance(given, Mapping) else {f"{name} {i}": run for i, run in enumerate(given, start=1)}
        if not runs:
            raise ArgumentError(f"A group must hold at least one run, but {name!r} is empty.")
        found += [Entrant(str(run), _loader(str(run), one), str(name), numbered) for run, one in runs.items()]
    if not found:
        raise ArgumentError("A comparison needs at least one checkpoint, got none.")
    groups = {entrant.group for entrant in found}
    if len(groups) > 1 and None in groups:
        raise ArgumentError("Checkpoints stand for themselves or in groups, got both. Name all in groups, or none.")
    if len(groups) == 1 and None not in groups:
        raise ArgumentError(f"A group needs another to be compared with, got {groups.pop()!r} alone.")
    twice = next((name for name, count in Counter(entrant.name for entrant in found).items() if count > 1), None)
    if twice is not None:
        raise ArgumentError(f"Each checkpoint needs a name of its own, got {twice!r} twice. Name them otherwise.")
    return found


def _loader(name: str, given: Any) -> Callable[[], Problem]:
    """A function of its own that returns the Problem."""
    if not isinstance(given, Problem) and (isinstance(given, nn.Module) or not callable(given)):
        raise ArgumentError(
            f"A checkpoint must be a Problem, a function that returns one, or a list of these as a group, but {name} "
            f"is a {type(given).__name__}. sharpscope.load makes a Problem of a file."
        )
    return partial(_loaded, name, given)


def _loaded(name: str, given: Given) -> Problem:
    found = given if isinstance(given, Problem) else given()
    if not isinstance(found, Problem):
        raise ArgumentError(f"The function of {name} must return a Problem, got {type(found).__name__}.")
    return found


def _renamed(entrants: Sequence[Entrant], files: Sequence[str | None]) -> tuple[Entrant, ...]:
    """The runs of a group by their files' names, where each has one and nothing else is called so."""
    counts = Counter([*(entrant.name for entrant in entrants), *files])
    found = []
    for entrant, file in zip(entrants, files, strict=True):
        group = [f for e, f in zip(entrants, files, strict=True) if e.group == entrant.group]
        clear = file is not None and all(f is not None and counts[f] == 1 for f in group)
        found.append(replace(entrant, name=file) if clear and file is not None else entrant)
    return tuple(found)


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


def _require_alike(one: str, ours: Problem, two: str, theirs: Problem) -> None:
    losses = [Objective(problem).loss_name for problem in (ours, theirs)]
    if losses[0] != losses[1]:
        raise ArgumentError(
            f"Checkpoints must be compared on one loss, but {one} has {losses[0]} and {two} {losses[1]}. "
            "Name one for all (--loss)."
        )
    if theirs.model is ours.model:
        raise ArgumentError(
            f"Each checkpoint needs a model of its own, but {one} and {two} share one, which holds the weights that "
            "came last. Build it inside the function."
        )


def _data(problem: Problem) -> str:
    noise = problem.provenance.get("label_noise")
    wrong = f", {100 * noise:.3g} % wrong labels" if noise else ""
    return f"{problem.provenance.get('data', type(problem.data).__name__)}{wrong}"
