"""The checkpoints of a comparison, and the checks that they can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import ArgumentError, DataError, SharpscopeError
from sharpscope.fingerprint import fingerprint, state_of
from sharpscope.objective import Objective
from sharpscope.objective.micro_batches import map_tensors
from sharpscope.problem import Problem
from sharpscope.random_streams import derived_seed
from sharpscope.results.measured_alike import differing
from sharpscope.sampling.subsample import count_examples, random_subset

ProblemOrLoader = Problem | Callable[[], Problem]
Checkpoints = Mapping[str, ProblemOrLoader | Sequence[ProblemOrLoader] | Mapping[str, ProblemOrLoader]]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint of the comparison.

    Attributes:
        name: unique.
        load: returns its Problem on the training data; a distinct function for each checkpoint.
        group: "sgd", "sam", ..., or None where checkpoints stand for themselves.
        numbered: whether the name is only its number in the group.
    """

    name: str
    load: Callable[[], Problem]
    group: str | None = None
    numbered: bool = False


class CheckpointSet:
    """All checkpoints, checked: finite and distinct weights, one loss, the same data.

    Only the Problems of the first and of the most recent checkpoint are kept in memory.

    Attributes:
        checkpoints: in order; the runs of a sequence by the names of their files, where all have one of their own.
        representatives: the first of each group, or all where there are no groups.

    Cost: each checkpoint is built once, and the data are walked once a checkpoint, without a model.

    Raises: ArgumentError for fewer than one, a checkpoint or a run that comes twice, or another loss, mode, weight
        decay or choice of parameters; DataError for other data, or weights that are not finite.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        given = _parse_checkpoints(checkpoints)
        self._first = given[0].load, given[0].load()
        self._last = self._first
        self._shared = SharedData("train")
        self._weights: dict[str, str] = {}
        self._runs: dict[tuple[str, str], str] = {}
        self.checkpoints = _named_by_file(given, [self._check(checkpoint, given[0]) for checkpoint in given])
        firsts: dict[str, Checkpoint] = {}
        for checkpoint in self.checkpoints:
            firsts.setdefault(checkpoint.name if checkpoint.group is None else checkpoint.group, checkpoint)
        self.representatives = tuple(firsts.values())

    def _check(self, checkpoint: Checkpoint, first: Checkpoint) -> str | None:
        """Check a checkpoint; return its file name if it is a run that only has a number."""
        problem = self._load(checkpoint)
        _require_finite(checkpoint.name, problem)
        _require_distinct_weights(checkpoint.name, fingerprint(dict(problem.model.state_dict())), self._weights)
        _require_independent_run(checkpoint, problem, self._runs)
        if checkpoint is not first:
            _require_measured_alike(first.name, self._first[1], checkpoint.name, problem)
        self._shared.add(checkpoint.name, problem)
        file = problem.provenance.get("checkpoint")
        return Path(str(file)).name if file and checkpoint.numbered else None

    def problem(self, checkpoint: Checkpoint) -> Problem:
        """Return the Problem of a checkpoint on the shared data."""
        found = self._load(checkpoint)
        provenance = {**found.provenance, "split": found.provenance.get("split") or "train"}
        return replace(found, data=self._shared.data, provenance=provenance)

    def _load(self, checkpoint: Checkpoint) -> Problem:
        if checkpoint.load is self._first[0]:
            return self._first[1]
        if checkpoint.load is not self._last[0]:
            self._last = self._first  # what was held is let go before the next is built
            self._last = checkpoint.load, checkpoint.load()
        return self._last[1]


class SharedData:
    """The data of a split, which all checkpoints must share: those of the first that is added.

    Attributes:
        data: of the first; held once, however many checkpoints there are. None before.
    """

    def __init__(self, split: str) -> None:
        self.data: Any = None
        self._split, self._first, self._fingerprint = split, "", ""

    def add(self, name: str, problem: Problem) -> None:
        """Raise DataError where the data of ``problem`` are not those of the first. Cost: a walk over both."""
        if not self._first:
            self.data, self._first = problem.data, f"{name} ({_describe_data(problem)})"
        if problem.data is self.data:
            return
        self._fingerprint = self._fingerprint or fingerprint(self.data)
        if fingerprint(problem.data) != self._fingerprint:
            raise DataError(
                f"Checkpoints must be compared on the same data, but the {self._split} data of {self._first} and "
                f"{name} ({_describe_data(problem)}) differ. Name those for all (--data), and let a problem() of "
                "your own return the same examples at every call."
            )


def _parse_checkpoints(checkpoints: Checkpoints) -> list[Checkpoint]:
    """Those given, in order; the runs of a sequence by their numbers."""
    parsed: list[Checkpoint] = []
    for name, given in checkpoints.items():
        if isinstance(given, str | bytes) or not isinstance(given, Mapping | Sequence):
            parsed.append(Checkpoint(str(name), _loader(str(name), given)))
            continue
        numbered = not isinstance(given, Mapping)
        runs = given if isinstance(given, Mapping) else {f"{name} {i}": run for i, run in enumerate(given, start=1)}
        if not runs:
            raise ArgumentError(f"A group must hold at least one run, but {name!r} is empty.")
        parsed += [
            Checkpoint(str(run), _loader(str(run), problem), str(name), numbered) for run, problem in runs.items()
        ]
    if not parsed:
        raise ArgumentError("A comparison needs at least one checkpoint, got none.")
    groups = {checkpoint.group for checkpoint in parsed}
    if len(groups) > 1 and None in groups:
        raise ArgumentError("Checkpoints stand for themselves or in groups, got both. Name all in groups, or none.")
    if len(groups) == 1 and None not in groups:
        raise ArgumentError(f"A group needs another to be compared with, got {groups.pop()!r} alone.")
    twice = next((name for name, count in Counter(checkpoint.name for checkpoint in parsed).items() if count > 1), None)
    if twice is not None:
        raise ArgumentError(f"Each checkpoint needs a name of its own, got {twice!r} twice. Name them otherwise.")
    return parsed


def _loader(name: str, given: Any) -> Callable[[], Problem]:
    """Return a distinct function that loads the Problem."""
    if not isinstance(given, Problem) and (isinstance(given, nn.Module) or not callable(given)):
        raise ArgumentError(
            f"A checkpoint must be a Problem, a function that returns one, or a list of these as a group, but {name} "
            f"is a {type(given).__name__}. sharpscope.load makes a Problem of a file."
        )
    return partial(_load_problem, name, given)


def _load_problem(name: str, given: ProblemOrLoader) -> Problem:
    found = given if isinstance(given, Problem) else given()
    if not isinstance(found, Problem):
        raise ArgumentError(f"The function of {name} must return a Problem, got {type(found).__name__}.")
    return found


def _named_by_file(checkpoints: Sequence[Checkpoint], files: Sequence[str | None]) -> tuple[Checkpoint, ...]:
    """The runs of a group by their files' names, where each has one and nothing else is called so."""
    counts = Counter([*(checkpoint.name for checkpoint in checkpoints), *files])
    found = []
    for checkpoint, file in zip(checkpoints, files, strict=True):
        group = [f for e, f in zip(checkpoints, files, strict=True) if e.group == checkpoint.group]
        clear = file is not None and all(f is not None and counts[f] == 1 for f in group)
        found.append(replace(checkpoint, name=file) if clear and file is not None else checkpoint)
    return tuple(found)


def _require_finite(name: str, problem: Problem) -> None:
    for key, value in problem.model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(f"Weights must be finite, but {name} has diverged: {key} is not. Leave it out, and say so.")


def _require_distinct_weights(name: str, weights: str, seen: dict[str, str]) -> None:
    if weights in seen:
        raise ArgumentError(
            f"A comparison needs other weights in each checkpoint, but {seen[weights]} and {name} hold the same. "
            "Name each once."
        )
    seen[weights] = name


def _require_independent_run(checkpoint: Checkpoint, problem: Problem, seen: dict[tuple[str, str], str]) -> None:
    """Two checkpoints of one run are not two runs, and would make an interval too narrow."""
    recipe = problem.provenance.get("recipe")
    if checkpoint.group is None or not recipe:
        return
    run = checkpoint.group, fingerprint({key: str(value) for key, value in recipe.items()})
    if run in seen:
        raise ArgumentError(
            f"A group must hold independent runs, but {seen[run]} and {checkpoint.name} of {checkpoint.group} are of "
            "one recipe and seed. Narrow the pattern to one checkpoint a run."
        )
    seen[run] = checkpoint.name


# Attributes of a Problem.
ALIKE = ("weight_decay", "params", "mode")

# Examples on which the losses of two checkpoints are compared.
LOSS_EXAMPLES = 256


def _require_measured_alike(first: str, first_problem: Problem, second: str, second_problem: Problem) -> None:
    both = [{key: getattr(problem, key) for key in ALIKE} for problem in (first_problem, second_problem)]
    for key in differing(both, ALIKE):
        raise ArgumentError(
            f"Checkpoints must be measured alike, but {first} has {key} {both[0][key]!r} and {second} "
            f"{both[1][key]!r}. Choose one for all."
        )
    losses = [Objective(problem).loss_name for problem in (first_problem, second_problem)]
    if losses[0] != losses[1]:
        raise ArgumentError(
            f"Checkpoints must be compared on one loss, but {first} has {losses[0]} and {second} {losses[1]}. "
            "Name one for all (--loss)."
        )
    if second_problem.model is first_problem.model:
        raise ArgumentError(
            f"Each checkpoint needs a model of its own, but {first} and {second} share one, which holds the weights "
            "that came last. Build it inside the function."
        )
    if second_problem.loss is not first_problem.loss and not _same_loss(first_problem, second_problem):
        raise ArgumentError(
            f"Checkpoints must be compared on one loss, but those of {first} and {second}, both {losses[0]}, differ on "
            "the same outputs and targets. Use the same class weights, label smoothing and factor for all."
        )


def _same_loss(one: Problem, two: Problem) -> bool:
    """Whether the two losses agree on outputs of the first model; True where this cannot be told.

    Cost: a forward pass of LOSS_EXAMPLES examples, drawn at random where they can be counted.
    """
    count = count_examples(one.data)
    if count is not None and count > LOSS_EXAMPLES:  # the first may be of one class
        one = replace(one, data=random_subset(one.data, LOSS_EXAMPLES, derived_seed(0, "loss")))
    ours, theirs = (Objective(problem) for problem in (one, replace(two, data=one.data)))
    known = ours.terms.loss.counts_terms and theirs.terms.loss.counts_terms
    alike = type(one.loss) is type(two.loss) and isinstance(one.loss, nn.Module)
    # Class weights or the ignore_index of a class that the examples lack.
    if known and alike and fingerprint(state_of(one.loss)) != fingerprint(state_of(two.loss)):
        return False
    try:
        with ours.measuring(products=False), theirs.measuring(products=False):
            batch = ours.first_examples(LOSS_EXAMPLES)
            output, target, inputs = ours.terms.forward(batch)
            output = map_tensors(output, lambda t: t.detach())
            (a, b), (c, d) = (o.terms.loss.sums(output, target, inputs, batch.size) for o in (ours, theirs))
    except (SharpscopeError, RuntimeError):
        return True  # for example, a loss that differentiates; one that fails is reported by the first analysis
    if a.requires_grad or c.requires_grad:
        return True  # it reads the model's parameters, which differ
    return all(
        bool(torch.isclose(x.double(), torch.as_tensor(y, device=x.device).double(), rtol=1e-6, atol=0, equal_nan=True))
        for x, y in ((a, c), (torch.as_tensor(b), torch.as_tensor(d)))
    )


def _describe_data(problem: Problem) -> str:
    noise = problem.provenance.get("label_noise")
    wrong = f", {100 * noise:.3g} % wrong labels" if noise else ""
    return f"{problem.provenance.get('data', type(problem.data).__name__)}{wrong}"
