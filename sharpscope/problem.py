"""What is measured: a model, a loss and a data set."""

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
    """The function whose curvature is asked for: ``L(w) = sum_i a_i l_i(w) / sum_i a_i``.

    ``l_i`` is the loss of one loss term of ``data`` (an example, a token that is not ignored, an output element)
    and ``a_i`` its weight, so that neither the loader's batch size nor a small last batch changes L.

    Args:
        model: the network at the weights ``w`` to be measured. It is never changed.
        loss: ``loss(output, target)``. ``nn.CrossEntropyLoss``, ``nn.NLLLoss``, ``nn.MSELoss``,
            ``nn.BCEWithLogitsLoss`` and their functional forms (also as ``functools.partial``) are weighted by
            their own loss terms, whatever their ``reduction``. Any other callable must return the mean over its
            terms; their number is ``loss.terms(batch)`` where it has that method, else the examples of the batch.
        data: batches that can be walked again: a tuple of tensors ``(inputs, target)`` (or a dict of tensors) for
            one in-memory set, a list of batches, a ``Dataset``, a ``DataLoader`` that neither shuffles nor augments.
            A batch is ``(input, ..., target)``, passed as ``model(input, ...)``, or a dict, passed by keyword
            without its target (``target``, ``targets``, ``label``, ``labels`` or ``y``) unless ``model`` names it.
        params: patterns (as for file names) of the parameters that form ``w``; frozen ones are constants.
        mode: "eval", or "train" to measure with dropout and BatchNorm as in training.
        weight_decay: ``c`` adds ``c/2 ||w||^2`` to L, that is ``c`` to each eigenvalue; left out by default.
        provenance: where it came from, copied into results.

    Raises: ProblemError when an argument is of the wrong kind.

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
    """Raise ProblemError where ``given`` is no Problem."""
    if not isinstance(given, Problem):
        raise ProblemError(f"A Problem(model=, loss=, data=) is needed, got {type(given).__name__}.")
