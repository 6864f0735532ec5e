"""Problem: the model, loss and data that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sharpscope.errors import ProblemError

MODES = ("eval", "train")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The loss function whose curvature is measured: ``L(w) = sum_i a_i l_i(w) / sum_i a_i``.

    ``l_i`` is one loss term of ``data`` (an example, a token that is not ignored, an output element) and ``a_i`` its
    weight. L does not depend on the batch size, nor on the size of the last batch.

    Args:
        model: the network, at the weights ``w`` to be measured. It is not changed.
        loss: callable ``loss(output, target)``. ``nn.CrossEntropyLoss``, ``nn.NLLLoss``, ``nn.MSELoss``,
            ``nn.BCEWithLogitsLoss`` and their functional forms (also in ``functools.partial``) are weighted by
            their loss terms, whatever their ``reduction``. Any other callable must return the mean over its
            terms, which are counted by ``loss.terms(batch)`` if it has that method, else as the batch's examples.
        data: a tuple of tensors ``(inputs, target)`` or a dict of tensors, a list of batches, a ``Dataset``, or a
            ``DataLoader`` that neither shuffles nor augments; must be iterable repeatedly.
            A batch is ``(input, ..., target)``, passed as ``model(input, ...)``, or a dict, passed by keyword
            without its target (``target``, ``targets``, ``label``, ``labels`` or ``y``) unless ``model`` names it.
            Inputs may be sparse, an example a row (COO, CSR or CSC); such batches are cut, but not joined.
        params: glob pattern, or several, of the names of the parameters that form ``w``; the others are constants,
            as are frozen parameters.
        mode: "eval", or "train" to measure with dropout and BatchNorm as in training.
        weight_decay: ``c`` adds ``c/2 ||w||^2`` to L, and so ``c`` to each eigenvalue.
        provenance: origin of the problem, copied into results.

    Raises: ProblemError if an argument has the wrong type or value.

    >>> import sharpscope
    >>> import torch
    >>> inputs, targets = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1)
    >>> batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]  # unequal
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> for data in ((inputs, targets), batches):
    ...     problem = sharpscope.Problem(model=model, loss=torch.nn.MSELoss(), data=data)
    ...     print(f"{sharpscope.top_eigenvalues(problem, k=1).lambda_max:.2f}")
    6.00
    6.00
    """

    model: nn.Module
    loss: Callable[..., Any]
    data: Any
    params: str | Sequence[str] = "*"
    mode: str = "eval"
    weight_decay: float = 0.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ProblemError(f"model must be a torch.nn.Module, got {type(self.model).__name__}.")
        if not callable(self.loss):
            raise ProblemError(f"loss must be callable as loss(output, target), got {type(self.loss).__name__}.")
        if not (isinstance(self.weight_decay, int | float) and math.isfinite(self.weight_decay)):
            raise ProblemError(f"weight_decay must be a finite number, got {self.weight_decay!r}.")
        patterns = [self.params] if isinstance(self.params, str) else self.params
        if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ProblemError(f"params must be a pattern or a list of patterns, got {self.params!r}.")
        if self.mode not in MODES:
            raise ProblemError(f"mode must be 'eval' or 'train', got {self.mode!r}.")


def require_problem(given: Any) -> None:
    """Raise ProblemError unless ``given`` is a Problem."""
    if not isinstance(given, Problem):
        raise ProblemError(f"A Problem(model=, loss=, data=) is needed, got {type(given).__name__}.")
