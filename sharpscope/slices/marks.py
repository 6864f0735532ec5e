"""Other networks on the line or plane of a slice, or beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from sharpscope import params
from sharpscope.errors import ArgumentError
from sharpscope.objective import Objective
from sharpscope.objective.guards import FORWARD
from sharpscope.problem import Problem
from sharpscope.results import Mark
from sharpscope.slices.checkpoint_directions import difference
from sharpscope.slices.direction import Direction, coordinates
from sharpscope.slices.evaluation import Evaluation


def marked(
    problem: Problem,
    lines: Sequence[Sequence[Direction]],
    objectives: Mapping[str, Objective],
    marks: Mapping[str, Problem],
    trajectory: Mapping[str, Problem],
    micro_batch: int,
) -> tuple[Mark, ...]:
    """Where ``marks`` and the steps of ``trajectory`` lie, and the loss of each by itself, with its own buffers.

    Loss, data, mode and weight decay are those of ``problem``. Cost: a forward pass of each network over each split.

    Raises: ArgumentError where there are several lines, ProblemError for another architecture.
    """
    if len(lines) > 1 and (marks or trajectory):
        raise ArgumentError("Networks are shown on one line or plane, got several. Measure one at a time.")
    found = []
    for on_path, networks in ((False, marks), (True, trajectory)):
        for name, other in networks.items():
            vector = difference(problem, other)
            place, distance = coordinates(vector, lines[0])
            beside = _beside(problem, other)
            values = {}
            for split, objective in objectives.items():
                own = replace(problem, model=other.model, data=objective.problem.data)
                kept: int | str = "loader" if objective.keeps_batches else micro_batch
                theirs = Objective(own, dtype=objective.dtype, device=objective.device, micro_batch=kept)
                with theirs.measuring(products=False):
                    values[split] = Evaluation(theirs, micro_batch)()
                objective.charge(FORWARD * (theirs.num_examples or 0))
            losses, accuracies = ({split: value[i] for split, value in values.items()} for i in range(2))
            length = math.hypot(float(torch.linalg.vector_norm(vector)), beside)
            found.append(Mark(name, tuple(place), math.hypot(distance, beside), length, losses, accuracies, on_path))
    return tuple(found)


def _beside(problem: Problem, other: Problem) -> float:
    """How far apart the networks are in the weights that are not selected, which no line or plane moves."""
    chosen = {id(p) for p in params.select(problem.model, problem.params).values()}
    theirs = dict(other.model.named_parameters())
    squares = [
        (theirs[name].detach().cpu().double() - p.detach().cpu().double()).square().sum()
        for name, p in problem.model.named_parameters()
        if id(p) not in chosen and name in theirs and theirs[name].shape == p.shape
    ]
    return math.sqrt(float(sum(squares)))
