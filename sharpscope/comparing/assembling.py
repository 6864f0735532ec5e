"""From entrants to a Comparison, part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from sharpscope.comparing import steps
from sharpscope.comparing.entrants import Entrant, Field
from sharpscope.comparing.performance import performance
from sharpscope.comparing.samples import sampled
from sharpscope.comparing.steps import How, Place
from sharpscope.errors import ArgumentError, DataError, ProblemError
from sharpscope.objective import Objective, Progress
from sharpscope.problem import Problem
from sharpscope.results.comparison import Comparison, Performance, Subject
from sharpscope.resume import key_of
from sharpscope.resume.fingerprint import fingerprint

Measure = Callable[[Place], Any]
# ``keep(name, part, key, measure)``: what ``measure(journal)`` returns, or returned before under the same ``key()``.
Keep = Callable[[str, str, Callable[[], str], Measure], Any]


def directly(name: str, part: str, key: Callable[[], str], measure: Measure) -> Any:
    """A ``Keep`` that keeps nothing."""
    return measure(None)


def compare(
    field: Field,
    how: How,
    keep: Keep = directly,
    progress: Progress | None = None,
    *,
    level: str = "default",
    command: str = "",
) -> Comparison:
    """Everything that the level asks for, of each entrant and of the lines between them.

    Loss and accuracy of all come first: they are cheap, and show what has diverged. What one checkpoint cannot have (a
    line without a weight that may move, subsets of batches that cannot be cut) is left out, and its provenance's
    ``left_out`` says why.

    Args:
        field: of ``field_of``.
        how: level and settings.
        keep: decides whether a part is measured or taken from an earlier run.
        progress: called as ``progress(stage, done, total)``, the stage with the entrant's name before it.
        level, command: for the record.

    Raises: DataError where a loss is not finite; what the analyses raise.
    """
    run = _Run(field, how, keep, progress)
    performances = [run.performance(entrant) for entrant in field.entrants]
    subjects = [run.subject(entrant, known) for entrant, known in zip(field.entrants, performances, strict=True)]
    return Comparison(subjects=tuple(subjects), between=tuple(run.between()), level=level, command=command)


class _Run:
    """One comparison at work: its arguments, so that no part has to be handed all of them."""

    def __init__(self, field: Field, how: How, keep: Keep, progress: Progress | None) -> None:
        self._field, self._how, self._keep, self._progress = field, how, keep, progress
        self._keys: dict[str, str] = {}

    def performance(self, entrant: Entrant) -> dict[str, Performance]:
        """By split; cheap."""
        problems = {split: self._field.problem(entrant, split) for split in self._field.data}
        most = self._how.level.performance_examples

        def measure(journal: Place) -> dict[str, Performance]:
            found = {}
            for split, problem in problems.items():
                self._report(entrant.name, "loss and accuracy")(split, 0, None)
                found[split] = performance(sampled(problem, most, self._how.seed), **self._how.computation)
            return found

        found: dict[str, Performance] = self._kept(entrant, "performance", problems["train"], measure)
        for split, one in found.items():
            if not math.isfinite(one.loss):
                raise DataError(
                    f"Losses must be finite, but {entrant.name} has diverged: its {split} loss is {one.loss}. Leave it "
                    "out, and say so."
                )
        return found

    def subject(self, entrant: Entrant, performances: Mapping[str, Performance]) -> Subject:
        """All analyses of one checkpoint."""
        problem, test, how = self._field.problem(entrant), self._field.data.get("test"), self._how
        left_out: dict[str, str] = {}

        def part(name: str, stage: str, step: Callable[..., Any], *given: Any, long: bool = False) -> Any:
            report = self._report(entrant.name, stage)

            def measure(journal: Place) -> Any:
                resumed = {"journal": journal} if long else {}
                return step(problem, *given, **resumed, progress=report)

            try:
                return self._kept(entrant, name, problem, measure)
            except (ArgumentError, ProblemError, DataError) as error:
                if name == "eigen":
                    raise
                left_out[name] = str(error)
                return None

        top = part("eigen", "lambda_max", steps.eigen, how, long=True)
        found = {
            "eigen": top,
            "trace": part("trace", "trace", steps.trace, how),
            "density": part("density", "density", steps.density, how),
            "sharpness": part("sharpness", "m-sharpness", steps.sharpness, how, top),
            "line": part("line", "lines", steps.line, test, how, long=True),
            "surface": part("surface", "surface", steps.surface, how, long=True),
        }
        recipe = problem.provenance.get("recipe") or {}
        seed = recipe.get("seed")
        return Subject(
            name=entrant.name,
            group=entrant.group,
            pair=None if seed is None else str(seed),
            performance=performances,
            provenance={**problem.provenance, **({"left_out": left_out} if left_out else {})},
            **found,
        )

    def between(self) -> list[tuple[str, str, Any]]:
        """From the first entrant to each other one, or of groups from first run to first run; of one architecture."""
        firsts: dict[str, Entrant] = {}
        for entrant in self._field.entrants:
            firsts.setdefault(entrant.name if entrant.group is None else entrant.group, entrant)
        first, *others = firsts.values()
        found = []
        if not others:
            return []
        problem, test = self._field.problem(first), self._field.data.get("test")
        for other in others:
            end = self._field.problem(other)
            report = self._report(f"{first.name} to {other.name}", "line")

            def measure(
                journal: Place, name: str = other.name, end: Problem = end, report: Progress | None = report
            ) -> Any:
                return steps.between(problem, {name: end}, test, self._how, journal, report)

            if not _alike(problem, end):
                continue
            theirs = fingerprint(dict(end.model.state_dict()))
            found.append(
                (first.name, other.name, self._kept(first, f"to-{other.name}", problem, measure, other=theirs))
            )
        return found

    def _kept(self, entrant: Entrant, part: str, problem: Problem, measure: Measure, **also: Any) -> Any:
        def key() -> str:
            return fingerprint(self._key(entrant, problem), part, also)

        return self._keep(entrant.name, part, key, measure)

    def _key(self, entrant: Entrant, problem: Problem) -> str:
        """Of all that decides the entrant's numbers; hashed once, since it walks the data."""
        if entrant.name not in self._keys:
            # Where the file lies is no part of what is in it.
            said = {k: str(v) for k, v in problem.provenance.items() if k != "checkpoint"}
            h = self._how
            self._keys[entrant.name] = key_of(
                Objective(problem, **h.computation),
                name=entrant.name,
                level=asdict(h.level),
                seed=h.seed,
                rho=h.rho,
                said=said,
                test=self._field.data.get("test"),
            )
        return self._keys[entrant.name]

    def _report(self, name: str, what: str) -> Progress:
        def report(stage: str, done: int, total: int | None) -> None:
            if self._progress is not None:
                self._progress(f"{name}, {what}: {stage}", done, total)

        return report


def _alike(one: Problem, two: Problem) -> bool:
    """Whether a straight line leads from one network to the other: weights of the same names and shapes."""
    shapes = [{name: tuple(w.shape) for name, w in p.model.named_parameters()} for p in (one, two)]
    return shapes[0] == shapes[1]
