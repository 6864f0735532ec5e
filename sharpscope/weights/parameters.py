"""Selection of parameters, and conversion to and from one flat vector."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sharpscope.errors import ProblemError


def select(model: nn.Module, patterns: str | Sequence[str] = "*") -> dict[str, nn.Parameter]:
    """The trainable parameters of ``model`` that match ``patterns``, by name; tied parameters once, by the first name.

    A parameter is selected if any of its names matches any of ``patterns`` (as for file names). Frozen parameters
    (``requires_grad`` False) are constants of the loss and are never selected.

    Raises: ProblemError when nothing is selected, or a selected parameter is not finite, real and dense, or has a
        gradient hook.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    matching = {
        aliases[0]: parameter
        for parameter, aliases in names.items()
        if any(fnmatch.fnmatchcase(alias, pattern) for alias in aliases for pattern in wanted)
    }
    chosen = {name: parameter for name, parameter in matching.items() if parameter.requires_grad}
    if not chosen:
        some = ", ".join([aliases[0] for aliases in names.values()][:3])
        raise ProblemError(
            f"At least one trainable parameter must match {' '.join(wanted)}; "
            + (
                f"all {len(matching)} that match are frozen. Set requires_grad on them."
                if matching
                else f"none of {len(names)} does ({some}{', ...' if len(names) > 3 else ''})."
            )
        )
    for name, parameter in chosen.items():
        if isinstance(parameter, UninitializedParameter):
            raise ProblemError(f"{name} has no shape yet. Run one batch through the model first.")
        if not parameter.is_floating_point():
            raise ProblemError(f"Parameters must be real floating point, but {name} is {parameter.dtype}.")
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ProblemError(f"Every weight must be finite, but {name} holds NaN or infinity.")
        if parameter._backward_hooks:
            raise ProblemError(f"{name} has a gradient hook, which would change its Hessian. Remove the hook first.")
    _require_no_overlap(chosen)
    return chosen


def _require_no_overlap(chosen: dict[str, nn.Parameter]) -> None:
    """Raise ProblemError where two parameters share memory, since they would count twice."""
    ranges = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in chosen.items()
        if p.numel() and p.is_contiguous()
    )
    for (device, _, stop, one), (other_device, start, _, two) in pairwise(ranges):
        if device == other_device and start < stop:
            raise ProblemError(
                f"{one} and {two} are two parameters on the same memory. Tie them as one: module.weight = other.weight."
            )


def padding_rows(model: nn.Module, params: Sequence[Tensor], *, tied: bool) -> list[tuple[int, int]]:
    """``(i, row)`` of each row of ``params[i]`` that is an embedding's ``padding_idx``.

    torch gives such a row no gradient, though the loss may depend on it: it is a constant of the loss.

    Args:
        model: the model.
        params: its selected parameters.
        tied: include embeddings whose weight is shared with another module, through which the row has a gradient.
    """
    indices = {id(p): i for i, p in enumerate(params)}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    return [
        (indices[id(module.weight)], module.padding_idx)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.padding_idx is not None
        and id(module.weight) in indices
        and (tied or owners[id(module.weight)] == 1)
    ]


@torch.no_grad()
def assign(params: Sequence[Tensor], vector: Tensor) -> None:
    """Write the flat ``vector`` (n,) into the parameters, in place."""
    torch._foreach_copy_(list(params), views(vector, params))


def views(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """The flat ``vector`` (n,) as views with the parameters' shapes, in their order."""
    slices = torch.split(vector, [p.numel() for p in params])
    return [values.view_as(p) for values, p in zip(slices, params, strict=True)]
