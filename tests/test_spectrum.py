"""top_eigenvalues on the bundled models against the dense float64 Hessian."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense import dense_hessian, top
from sharpscope import ConvergenceWarning, EigenResult, Problem, top_eigenvalues
from sharpscope.zoo import load_data, make_model

# Small enough for a dense Hessian: 200 to 500 parameters.
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": (6,)},
    "cnn": {"channels": (3, 4), "hidden": 6},
    "wide_resnet, batch norm": {"depth": 10, "widen": 1, "base": 1, "norm": "batch"},
    "wide_resnet, no norm": {"depth": 10, "widen": 1, "base": 1, "norm": "none"},
}

FEW = 40  # examples, which 7, 13 and 16 do not divide


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_data("digits")
    return data.inputs[:100].double(), data.targets[:100]


def small(name: str) -> nn.Module:
    """A copy of the small model in eval mode after some SGD steps."""
    return copy.deepcopy(stepped(name))


@cache
def stepped(name: str) -> nn.Module:
    """The model that ``small`` copies: at a zero-initialised branch the Hessian is special, hence the steps."""
    model = make_model(name.split(",")[0], seed=1, **SMALL[name]).double()
    inputs, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


@cache
def truth(name: str) -> Tensor:
    inputs, labels = digits()
    return top(dense_hessian(small(name), lambda call: F.cross_entropy(call(inputs), labels)))


@cache
def in_one_batch(name: str) -> EigenResult:
    return top_eigenvalues(problem(name, examples=FEW))


def problem(name: str, loader: int = 100, model: nn.Module | None = None, examples: int = 100) -> Problem:
    inputs, labels = (tensor[:examples] for tensor in digits())
    data = list(zip(torch.split(inputs, loader), torch.split(labels, loader), strict=True))
    return Problem(model=small(name) if model is None else model, loss=nn.CrossEntropyLoss(), data=data)


@pytest.mark.parametrize("name", SMALL)
def test_five_eigenvalues_agree_with_the_dense_hessian(name: str) -> None:
    """In float64 all five agree to 1e-8 relative, and the true ones lie in their intervals."""
    result = top_eigenvalues(problem(name), tol=1e-9)
    wanted = truth(name).numpy()
    assert np.abs(result.eigenvalues / wanted - 1).max() < 1e-8
    assert result.converged.all()
    assert ((result.lower <= wanted) & (wanted <= result.upper)).all()


@pytest.mark.parametrize("name", SMALL)
def test_float32_agrees_to_four_digits(name: str) -> None:
    """A float32 model on float32 data gives the float64 eigenvalues to 1e-4 relative."""
    model = small(name).float()
    result = top_eigenvalues(problem(name, model=model), tol=1e-4)
    assert result.provenance["dtype"] == "float32"
    assert np.abs(result.eigenvalues / truth(name).numpy() - 1).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "loader", "micro_batch"),
    [("mlp", 7, 1), *itertools.product(["mlp", "cnn"], [7, 16, FEW], [13, FEW])],
)
def test_batch_sizes_do_not_change_the_eigenvalues(name: str, loader: int, micro_batch: int) -> None:
    """Every loader and micro-batch size gives the same five eigenvalues to 1e-10 in float64."""
    result = top_eigenvalues(problem(name, loader, examples=FEW), micro_batch=micro_batch)
    assert np.abs(result.eigenvalues / in_one_batch(name).eigenvalues - 1).max() < 1e-10


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_both_methods_agree(method: str) -> None:
    """Block Lanczos and power iteration find the same three eigenvalues within their tolerance."""
    result = top_eigenvalues(problem("mlp"), k=3, tol=1e-2, method=method)
    wanted = truth("mlp")[:3].numpy()
    assert result.converged.all()
    assert np.abs(result.eigenvalues / wanted - 1).max() < 1e-2


def test_the_result_says_where_it_came_from() -> None:
    """Provenance holds parameters, examples, mode, dtype, device, seed and versions; loss and gradient are L's."""
    model = small("mlp")
    inputs, labels = digits()
    result = top_eigenvalues(problem("mlp"), k=2, generator=torch.Generator().manual_seed(7), vectors=True)
    loss = F.cross_entropy(model(inputs), labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert abs(result.loss - loss.item()) < 1e-13
    assert abs(result.gradient_norm - float(torch.cat([g.reshape(-1) for g in grads]).norm())) < 1e-12
    said = {k: result.provenance[k] for k in ("num_examples", "mode", "dtype", "device", "seed", "params", "batchnorm")}
    assert said == {
        "num_examples": 100,
        "mode": "eval",
        "dtype": "float64",
        "device": "cpu",
        "seed": 7,
        "params": "*",
        "batchnorm": "none",
    }
    assert set(result.provenance["versions"]) == {"sharpscope", "torch", "numpy", "scipy", "python"}
    assert result.eigenvectors is not None
    assert np.allclose(result.eigenvectors.T @ result.eigenvectors, np.eye(2), atol=1e-13)


def test_not_converged_is_warned_of_and_marked() -> None:
    """Too few passes end in a ConvergenceWarning, converged False, and a marked table."""
    with pytest.warns(ConvergenceWarning, match=r"\[1, 2, 3, 4, 5\] have not converged"):
        result = top_eigenvalues(problem("cnn"), tol=1e-9, max_passes=2)
    assert not result.converged.any()
    assert "NOT CONVERGED" in result.summary()
    assert result.cost.passes == 2
    assert len(result.eigenvalues) == 5


def test_progress_counts_examples_and_never_goes_back() -> None:
    """The memory is told first; then each stage counts up to the number of examples."""
    seen: dict[str, list[int]] = {}

    def progress(stage: str, done: int, total: int | None) -> None:
        assert total == 100
        seen.setdefault(stage, []).append(done)

    result = top_eigenvalues(problem("mlp", 64), k=1, progress=progress, micro_batch=25)
    first = next(iter(seen))
    assert first.startswith("memory ")
    assert seen.pop(first) == [0]
    assert len(seen) == result.cost.passes
    assert all(counts == [25, 50, 75, 100] for counts in seen.values())


def test_the_recorded_seed_repeats_the_run() -> None:
    """A generator that has been drawn from does not start where its seed says, so no seed is recorded."""
    used = torch.Generator().manual_seed(7)
    first, second = (top_eigenvalues(problem("mlp"), k=1, generator=used).provenance["seed"] for _ in range(2))
    assert (first, second) == (7, None)


def test_the_same_seed_gives_the_same_bits() -> None:
    """Two runs with equal generators and micro-batch agree bit for bit; another seed agrees within the intervals."""
    runs = [top_eigenvalues(problem("cnn"), generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert np.array_equal(runs[0].eigenvalues, runs[1].eigenvalues)
    assert (np.abs(runs[0].eigenvalues - runs[2].eigenvalues) <= 1e-3 * runs[0].eigenvalues).all()


def test_results_survive_the_journey_to_json(tmp_path: Any) -> None:
    """save and load give back every number, the provenance and, when asked, the eigenvectors."""
    result = top_eigenvalues(problem("mlp"), k=2, vectors=True)
    result.save(tmp_path / "r.json", vectors=True)
    again = EigenResult.load(tmp_path / "r.json")
    assert again.to_dict() == result.to_dict()
    assert again.eigenvectors is not None
    assert np.array_equal(again.eigenvectors, result.eigenvectors)
    result.save(tmp_path / "plain.json")
    assert EigenResult.load(tmp_path / "plain.json").eigenvectors is None
