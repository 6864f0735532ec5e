"""A small network that is trained and watched, and everything that a monitor must leave as it is."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dense import dense_hessian, top
from sharpscope import Problem

N = 96
TIGHT: dict[str, Any] = {"examples": None, "tol": 1e-4, "max_products": 60}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 5, generator=generator), torch.randint(0, 3, (N,), generator=generator)


X, Y = data()


def net(dropout: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle = [nn.BatchNorm1d(6), nn.Dropout(0.3)] if dropout else []
        return nn.Sequential(nn.Linear(5, 6), *middle, nn.Tanh(), nn.Linear(6, 3))


def problem(model: nn.Module, **options: Any) -> Problem:
    return Problem(**{"model": model, "loss": nn.CrossEntropyLoss(), "data": (X, Y), **options})


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.3, "momentum": 0.5, **options})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Full-batch steps; yields their number."""
    for i in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        yield i + 1


def dense_lambda_max(model: nn.Module, inputs: Tensor = X, targets: Tensor = Y) -> float:
    twin = copy.deepcopy(model)
    loss = nn.CrossEntropyLoss()
    return float(top(dense_hessian(twin, lambda call: loss(call(inputs.double()), targets)), 1)[0])


def everything(model: nn.Module, optimizer: Any, *others: Any) -> dict[str, Any]:
    """All that a run is: tensors as bytes, so that NaN and -0 count."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"grad.{k}": p.grad for k, p in model.named_parameters()}
    for i, slots in enumerate(optimizer.state_dict()["state"].values()):
        state |= {f"optimizer.{i}.{k}": v for k, v in slots.items()}
    random_states = {"torch": torch.get_rng_state(), "numpy": str(np.random.get_state()), "python": random.getstate()}
    modes = {f"mode.{k}": m.training for k, m in model.named_modules()}
    found: dict[str, Any] = {**state, **random_states, **modes}
    for i, other in enumerate(others):
        found[f"other.{i}"] = str(other.state_dict())
    return {
        k: v.contiguous().view(torch.uint8).tolist() if isinstance(v, Tensor) and v.dim() else v
        for k, v in found.items()
    }


def seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def draw_everywhere() -> None:
    torch.rand(1)
    np.random.rand()
    random.random()


class Squares(Dataset[Any]):
    """Examples made one by one, which counts and draws random numbers as an augmentation does."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.read.append(i)
        draw_everywhere()
        return X[i], Y[i]


def pieces() -> list[tuple[Tensor, Tensor]]:
    return [(X[i : i + 10], Y[i : i + 10]) for i in range(0, N, 10)]


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05)
