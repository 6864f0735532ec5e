"""Loss and accuracy on a data set, by bare forward passes."""

from __future__ import annotations

import math

import torch

from sharpscope.objective import Objective
from sharpscope.problem import Problem
from sharpscope.results.comparison import Performance
from sharpscope.slices.evaluation import Evaluation, usual_micro_batch


def performance(
    problem: Problem, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Performance:
    """``L(w)`` and the share of right answers, None for a loss without labels; cost, a forward pass.

    The model and all random states are left bit for bit as they were.

    Raises: ProblemError, DataError, AuditError.
    """
    objective = Objective(problem, dtype=dtype, device=device)
    with objective.measuring(products=False):
        evaluation = Evaluation(objective, usual_micro_batch(objective))
        loss, accuracy = evaluation()
    return Performance(loss, None if math.isnan(accuracy) else accuracy, evaluation.examples, evaluation.answers)
