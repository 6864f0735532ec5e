"""Norms, dropout and embeddings of PyTorch itself, from a state dict on disk through the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from command import Call, Mean, each_class, eigenvalues, reference, saved
from sequences import CLASSES, COUNT, drawn, labels, tokens
from sharpscope import Problem


def norms() -> Problem:
    """BatchNorm in 1 and 2 dimensions, GroupNorm, LayerNorm, weight norm, spectral norm, dropout."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.GroupNorm(2, 4),
        nn.Dropout2d(0.4),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 6)),
        nn.LayerNorm(6),
        nn.Tanh(),
        nn.Dropout(0.4),
        nn.BatchNorm1d(6),
        nn.Linear(6, CLASSES),
    )
    data = (drawn(15, COUNT, 1, 6, 6), labels(16, COUNT))
    return Problem(model=network, loss=nn.CrossEntropyLoss(), data=data)


def each_normed(call: Call, data: Any) -> Tensor:
    """The mean over examples: torch's own weight norm has no derivative forward over reverse."""

    def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
        return v * g / v.flatten(1).norm(dim=1).view_as(g)

    with patch.object(torch, "_weight_norm", weight_norm):
        return each_class(call, data)


class Padded(nn.Module):
    """An embedding whose padding is summed with the rest, and a head, tied to it or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0, sparse=not tied)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.mix(self.embed(ids).sum(1))))
        return found


def tied() -> Problem:
    """Tied embeddings with padding."""
    return Problem(model=Padded(True), loss=nn.CrossEntropyLoss(), data=(tokens()[0], labels(17, COUNT, classes=7)))


def untied() -> Problem:
    """The same with a head of its own, and sparse gradients."""
    return replace(tied(), model=Padded(False))


def each_padded(call: Call, data: Any) -> Tensor:
    """The mean over sentences; padding is the constant 0, as torch has it in the embedding but not in the head."""

    def embedding(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return weight[ids] * (ids != 0)[..., None]

    with patch.object(F, "embedding", embedding):
        return each_class(call, data)


def bags() -> Problem:
    """Bags of embeddings."""
    model = nn.Sequential(nn.EmbeddingBag(7, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 7))
    return Problem(model=model, loss=nn.CrossEntropyLoss(), data=tied().data)


def each_bag(call: Call, data: Any) -> Tensor:
    """The mean over bags, each a mean of rows: torch's own has no second derivative."""

    def embedding_bag(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([weight[row[row != 0]].mean(0) for row in ids])

    with patch.object(F, "embedding_bag", embedding_bag):
        return each_class(call, data)


MODELS: list[tuple[Callable[[], Problem], Mean]] = [
    (norms, each_normed),
    (tied, each_padded),
    (untied, each_padded),
    (bags, each_bag),
]


@pytest.mark.parametrize(("problem", "mean"), MODELS)
def test_the_eigenvalues_are_those_of_the_dense_hessian(
    problem: Callable[[], Problem], mean: Mean, tmp_path: Path
) -> None:
    """At the file's weights, whatever layers do in training and torch's kernels lack."""
    path = saved(tmp_path, problem)
    exact = reference(path, problem, mean)
    found = eigenvalues(path, problem)
    assert found == pytest.approx(exact, rel=1e-6)


def test_differences_hold_padding_still(tmp_path: Path) -> None:
    """A step along a row that has no gradient would show the loss's slope in it, which is no part of the Hessian."""
    path = saved(tmp_path, untied)
    found = eigenvalues(path, untied, "--operator", "finite-difference", tol="1e-5")
    assert found == pytest.approx(reference(path, untied, each_padded), rel=1e-5)
