"""From point to point: the weights moved, the loss taken, the values kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sharpscope.objective import Objective
from sharpscope.objective.guards import FORWARD
from sharpscope.params import views
from sharpscope.perturbation import Perturbation
from sharpscope.slices.direction import Direction
from sharpscope.slices.evaluation import Evaluation
from sharpscope.slices.running_statistics import Statistics


class Walk:
    """Loss and accuracy of each split at points ``w + sum_k c_k d_k``.

    To be used within ``measuring()`` of each objective. Each point is written from the stored centre, so nothing
    drifts. Memory: each direction once more.

    Args:
        objectives: by the name of the split, of one model.
        lines: the directions of each line or plane.
        batchnorm: see ``Statistics``.
        micro_batch: examples a forward pass.
        moved: of the weights, whose owner puts them back.
    """

    def __init__(
        self,
        objectives: Mapping[str, Objective],
        lines: Sequence[Sequence[Direction]],
        batchnorm: str,
        micro_batch: int,
        moved: Perturbation,
    ) -> None:
        self._objectives = list(objectives.values())
        first = self._objectives[0]
        self._terms = first.terms
        self._evaluations = [Evaluation(objective, micro_batch) for objective in self._objectives]
        changes = [[d.statistics for d in line] for line in lines]
        self._statistics = [Statistics(first.terms.model, batchnorm, change, first.problem.mode) for change in changes]
        self._lines = [[self._moves(d) for d in line] for line in lines]
        self._moved = moved

    def at(self, line: int, coefficients: Sequence[float]) -> list[float]:
        """Loss and accuracy of each split, in turn; cost, a forward pass over each, another with "recalibrate"."""
        self._move(line, coefficients)
        statistics = self._statistics[line]
        statistics.move_to(coefficients, self._evaluations[0].run)
        values = [value for evaluation in self._evaluations for value in evaluation()]
        for objective, evaluation in zip(self._objectives, self._evaluations, strict=True):
            objective.num_examples = evaluation.examples
            objective.charge(FORWARD * evaluation.examples)
            objective.meter.passes += 1
        if statistics.treatment == "recalibrate":
            self._objectives[0].charge(FORWARD * self._evaluations[0].examples)
            self._objectives[0].meter.passes += 1
        return values

    def _moves(self, direction: Direction) -> list[Tensor]:
        """d as tensors like the weights."""
        return views(direction.vector.to(self._terms.device, self._terms.dtype), self._terms.params)

    @torch.no_grad()
    def _move(self, line: int, coefficients: Sequence[float]) -> None:
        moves = [(d, c) for d, c in zip(self._lines[line], coefficients, strict=True) if c]
        if not moves:
            self._moved.restore()
            return
        (direction, scale), *others = moves
        self._moved.move_to(direction, scale)
        for direction, scale in others:
            self._moved.add(self._moved.weights, direction, scale)
