"""Unwrap the user's model and optimizer, and compute the optimizer's edges of stability."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sharpscope.edge_of_stability import descent_edge, sam_edge
from sharpscope.errors import ArgumentError, ProblemError
from sharpscope.optim import SAM
from sharpscope.problem import Problem


def without_wrappers(problem: Problem) -> Problem:
    """``problem`` with the module inside DataParallel, DistributedDataParallel and ``torch.compile``.

    Their forward pass has extra hooks and collectives, and a compiled graph has no second derivative. The weights are
    the same tensors; ``params`` may include the wrappers' prefix or not.

    Raises: ProblemError for a model that is sharded over several processes.
    """
    model, prefix = problem.model, ""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model, prefix = model.module, f"{prefix}module."
        elif "_orig_mod" in model._modules and type(model).__name__ == "OptimizedModule":
            model, prefix = model._modules["_orig_mod"], f"{prefix}_orig_mod."  # type: ignore[assignment]
        else:
            break
    sharded = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if sharded or any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ProblemError(
            "The monitor needs the whole model on one process, but its parameters are sharded. Measure its "
            "checkpoints instead."
        )
    given = problem.params
    params = given.removeprefix(prefix) if isinstance(given, str) else [p.removeprefix(prefix) for p in given]
    return replace(problem, model=model, params=params)


@dataclass(frozen=True)
class StabilityEdges:
    """Learning rate and edges of stability of an optimizer, as in ``MonitorRecord``; NaN if not applicable."""

    learning_rate: float = math.nan
    two_over_eta: float = math.nan
    momentum_edge: float = math.nan
    sam_edge: float = math.nan


def stability_edges(optimizer: Any, gradient_norm: float) -> StabilityEdges:
    """The largest learning rate and the lowest edges over the parameter groups, with their current options."""
    inner = unwrapped(optimizer)
    groups = [] if inner is None else [group for group in inner.param_groups if group["params"]]
    if not groups:
        return StabilityEdges()
    rate = max(float(group["lr"]) for group in groups)
    base = inner.base_optimizer if isinstance(inner, SAM) else inner
    is_sgd = type(base) is torch.optim.SGD
    has_momentum = is_sgd and inner is base and any(group["momentum"] for group in groups)
    is_plain_sam = is_sgd and isinstance(inner, SAM) and inner.plain
    return StabilityEdges(
        learning_rate=rate,
        two_over_eta=descent_edge(rate),
        momentum_edge=min(descent_edge(**_sgd_options(g)) for g in groups) if has_momentum else math.nan,
        sam_edge=min(sam_edge(rho=g["rho"], gradient_norm=gradient_norm, **_sgd_options(g)) for g in groups)
        if is_plain_sam
        else math.nan,
    )


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside the wrappers of Lightning and Accelerate; None for None.

    Raises: ArgumentError if there is none.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}.")
    return optimizer


def _sgd_options(group: dict[str, Any]) -> dict[str, Any]:
    return {
        "lr": float(group["lr"]),
        "momentum": float(group["momentum"]),
        "dampening": float(group["dampening"]),
        "nesterov": bool(group["nesterov"]),
    }
