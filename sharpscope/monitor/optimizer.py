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
    rates = [float(group["lr"]) for group in groups]
    heavy, aware = type(inner) is torch.optim.SGD and any(g["momentum"] for g in groups), isinstance(inner, SAM)
    with_sam = [sam_edge(lr, g["rho"], gradient_norm) for lr, g in zip(rates, groups, strict=True) if aware]
    return Edges(
        learning_rate=max(rates),
        two_over_eta=descent_edge(max(rates)),
        momentum_edge=min(map(_heavy_ball, groups)) if heavy else math.nan,
        sam_edge=min(with_sam) if aware and inner.plain else math.nan,
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


def _heavy_ball(group: dict[str, Any]) -> float:
    options = {name: group[name] for name in ("dampening", "nesterov")}
    return descent_edge(float(group["lr"]), float(group["momentum"]), **options)
