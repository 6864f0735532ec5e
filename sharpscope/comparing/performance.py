"""Loss and accuracy on a data set, by bare forward passes."""

from __future__ import annotations

import math

import torch

from sharpscope.measurement import Measurement
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
    m = Measurement(problem, dtype=dtype, device=device, audited=False, products=False)
    with m:
        evaluation = Evaluation(m.objective, usual_micro_batch(m.objective))
        loss, accuracy = evaluation()
    return Performance(loss, None if math.isnan(accuracy) else accuracy, evaluation.examples, evaluation.answers)
