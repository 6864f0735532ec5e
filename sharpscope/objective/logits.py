"""The tensor of a model's output that a known loss takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sharpscope.errors import ProblemError


def output_tensor(output: Any) -> Tensor:
    """The tensor of ``output`` that a known loss takes.

    Raises: ProblemError for an output that is no tensor and has none called "logits".
    """
    found = output if isinstance(output, Tensor) else find_logits(output)
    if found is not None:
        return found
    raise ProblemError(
        f"The model must return a tensor, or an object with .logits, for this loss; got {type(output).__name__}. "
        "Pass a loss(output, target) that picks what it needs."
    )


def find_logits(output: Any) -> Tensor | None:
    """The tensor called "logits" in an output that is an object or a mapping, if there is one."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None
