"""The user's optimizer without what others put around it, and the edges of stability of it as it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from sharpscope.edges import descent_edge, sam_edge
from sharpscope.errors import ArgumentError
from sharpscope.optim import SAM


@dataclass(frozen=True)
class Edges:
    """What lambda_max is held against, as ``MonitorRecord`` has it; NaN where it means nothing."""

    learning_rate: float = math.nan
    two_over_eta: float = math.nan
    momentum_edge: float = math.nan
    sam_edge: float = math.nan


def edges_of(optimizer: Any, gradient_norm: float) -> Edges:
    """The largest learning rate and the lowest edges over the parameter groups, as their options are now."""
    inner = unwrapped(optimizer)
    groups = [] if inner is None else [group for group in inner.param_groups if group["params"]]
    if not groups:
        return Edges()
    rate = max(float(group["lr"]) for group in groups)
    base = inner.base_optimizer if isinstance(inner, SAM) else inner
    descends = type(base) is torch.optim.SGD
    heavy = descends and inner is base and any(group["momentum"] for group in groups)
    aware = descends and isinstance(inner, SAM) and inner.plain
    return Edges(
        learning_rate=rate,
        two_over_eta=descent_edge(rate),
        momentum_edge=min(descent_edge(**_of_sgd(g)) for g in groups) if heavy else math.nan,
        sam_edge=min(sam_edge(rho=g["rho"], gradient_norm=gradient_norm, **_of_sgd(g)) for g in groups)
        if aware
        else math.nan,
    )


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer itself, out of what Lightning and Accelerate put around it; None for None.

    Raises: ArgumentError when there is none in it.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ArgumentError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}.")
    return optimizer


def _of_sgd(group: dict[str, Any]) -> dict[str, Any]:
    return {
        "lr": float(group["lr"]),
        "momentum": float(group["momentum"]),
        "dampening": float(group["dampening"]),
        "nesterov": bool(group["nesterov"]),
    }
