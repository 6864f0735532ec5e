"""Bounds in float32 hold the rounding of the examples that carry an eigenvalue, wherever they lie in the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from command import printed
from dense import dense_hessian, top
from sharpscope import Problem, measure_sharpness, top_eigenvalues

pytestmark = pytest.mark.filterwarnings("ignore::sharpscope.ConvergenceWarning")
LOSS = nn.CrossEntropyLoss()


def examples(saturated: slice) -> tuple[Tensor, ...]:
    """2,000 examples; the inputs of some are 1,000 along a direction that all logits share."""
    draw = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(2000, 7, generator=draw), torch.randint(3, (2000,), generator=draw)
    inputs[:, 6] = 0
    inputs[saturated, 6] = 1000
    return inputs, labels


def network(seed: int = 0) -> nn.Module:
    """Logits of 1e4, a few apart, where the last input is 1,000."""
    torch.manual_seed(seed)
    model = nn.Linear(7, 3)
    with torch.no_grad():
        model.weight[:, 6] = 10 + 1e-3 * torch.randn(3)
    return model


def truth(model: nn.Module, data: tuple[Tensor, ...], k: int) -> np.ndarray:
    """The k largest eigenvalues of the dense Hessian in float64."""
    inputs, labels = data
    return top(dense_hessian(copy.deepcopy(model), lambda call: LOSS(call(inputs.double()), labels)), k).numpy()


class Walked:
    """Batches that can be walked only."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.batches = list(zip(inputs.split(100), labels.split(100), strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


FORMS: dict[str, Any] = {
    "tensors": lambda x, y: (x, y),
    "loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=64),
    "batches that are walked": Walked,
}


@pytest.mark.parametrize("saturated", [slice(256, None), slice(1000, 1020), slice(1997, None)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_intervals_hold_where_saturated_examples_come_late(form: str, saturated: slice) -> None:
    """Whether 1,744, 20 or 3 of 2,000 examples carry them, lambda_1 and lambda_2 of float64 are in the intervals."""
    data = examples(saturated)
    for seed in (1, 2):
        model = network(seed)
        problem = Problem(model=model, loss=LOSS, data=FORMS[form](*data))
        generator = torch.Generator().manual_seed(seed)
        result = top_eigenvalues(
            problem, 2, tol=1e-5, generator=generator, which="largest" if seed == 1 else "magnitude"
        )
        true = truth(model, data, 2)
        assert (result.lower <= true).all()
        assert (true <= result.upper).all()
        assert result.upper[0] - result.lower[0] < 0.05 * true[0]


def test_the_measured_rounding_repeats_and_costs_little() -> None:
    """Equal seeds give equal bounds, and the examples cost less than one gradient of all the data for k = 2."""
    data = examples(slice(1000, 1020))
    problem = Problem(model=network(), loss=LOSS, data=data)
    one, two = (top_eigenvalues(problem, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert (one.upper == two.upper).all()
    double = top_eigenvalues(problem, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert one.cost.passes == double.cost.passes
    # 224 examples by 1 + 2k gradients in two precisions, and a forward pass.
    assert one.cost.gradients - double.cost.gradients < 224 * 5 * 2 / 2000 + 1 / 3 + 0.01


@pytest.mark.parametrize("form", FORMS)
def test_of_more_examples_a_random_sample_is_measured(form: str) -> None:
    """Of 6,000 examples, a third of which are saturated and come late, the intervals hold the float64 values."""
    data = tuple(part.repeat_interleave(3, 0) for part in examples(slice(1333, None)))
    problem = Problem(model=network(1), loss=LOSS, data=FORMS[form](*data))
    result = top_eigenvalues(problem, 2, tol=1e-5)
    true = truth(network(1), data, 2)
    assert (result.lower <= true).all()
    assert (true <= result.upper).all()


def test_batches_that_are_kept_are_measured_whole() -> None:
    """With the loader's batches kept, of which the last has the saturated examples, the intervals hold."""
    data = examples(slice(1997, None))
    problem = Problem(model=network(2), loss=LOSS, data=FORMS["loader"](*data))
    result = top_eigenvalues(problem, 2, tol=1e-5, micro_batch="loader")
    true = truth(network(2), data, 2)
    assert (result.lower <= true).all()
    assert (true <= result.upper).all()


def late() -> Problem:
    """The problem whose last three examples are saturated."""
    return Problem(model=network(), loss=LOSS, data=examples(slice(1997, None)))


def test_the_command_s_intervals_hold(tmp_path: Path) -> None:
    """``sharpscope eigen`` in float32 has the float64 lambda_1 in its interval."""
    path = tmp_path / "late.pt"
    torch.save(network(2).state_dict(), path)
    told = printed("eigen", path, late, "--k", "2", "--tol", "1e-5", status=3)
    true = truth(network(2), examples(slice(1997, None)), 2)
    assert told["lower"][0] <= true[0] <= told["upper"][0]
    assert told["lower"][1] <= true[1] <= told["upper"][1]


@pytest.mark.parametrize("adaptive", [None, "elementwise"])
@pytest.mark.parametrize("saturated", [slice(256, None), slice(1997, None)], ids=str)
def test_the_measure_lambda_max_holds_it_too(saturated: slice, adaptive: str | None) -> None:
    """lambda_max of H, and of D H D with D = |w|, measured as a sharpness in float32, is in its interval."""
    data, (inputs, labels) = examples(saturated), examples(saturated)
    for seed in (1, 2, 3):
        model = network(seed)
        hessian = dense_hessian(copy.deepcopy(model), lambda call: LOSS(call(inputs.double()), labels))
        scale = torch.cat([p.detach().double().flatten().abs() for p in model.parameters()])
        if adaptive is not None:
            hessian = scale[:, None] * hessian * scale
        problem = Problem(model=model, loss=LOSS, data=data)
        found = measure_sharpness(problem, ("lambda-max",), adaptive=adaptive, eta=0.0).measures[0]
        assert found.lower is not None
        assert found.upper is not None
        assert found.lower <= float(top(hessian, 1)[0]) <= found.upper
