"""What holds for every test, and the models that many of them share."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn

from sharpscope import DataError, Problem
from sharpscope.zoo import load_data

# Figures are drawn, never shown.
matplotlib.use("Agg")

# Of several processes each has one thread, and so have those that it starts.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def tiny_mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers of these widths with tanh between them; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def classifier(seed: int = 0, examples: int = 40, **given: Any) -> Problem:
    """A tiny_mlp of three classes on random inputs and labels, the same for every seed."""
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(examples, 4, generator=draw), torch.randint(3, (examples,), generator=draw)
    return Problem(**{"model": tiny_mlp(4, 5, 3, seed=seed), "loss": nn.CrossEntropyLoss(), "data": data, **given})


def quadratic(eigenvalues: Sequence[float] | Tensor, seed: int | torch.Generator = 0) -> Tensor:
    """The Hessian of a quadratic with these eigenvalues in a random basis, dense, in float64."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=draw, dtype=torch.float64))
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


# A search for garbage takes half a second where all test files and what they need are imported: none meanwhile, and
# later not through what was imported.
gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Models that a test makes are the same at every run, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture
def _fashion_mnist() -> None:
    """The real Fashion-MNIST is here; in CI it must be, elsewhere the test is skipped and pytest says why."""
    try:
        load_data("fashion-mnist", "test")
    except DataError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
