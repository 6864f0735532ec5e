"""What would give a quietly wrong number is refused before any work, and what is unusual but right is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from conftest import tiny_mlp
from dense import dense_hessian, top
from sharpscope import Objective, Problem, ProblemError, top_eigenvalues

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))


def net(outputs: int = 3) -> nn.Sequential:
    return tiny_mlp(4, 6, outputs)


def penalty(model: nn.Module) -> Tensor:
    return 0.5 * sum(((p**2).sum() for p in model.parameters()), torch.zeros(()))


class Penalised(nn.Module):
    """A loss module that holds the model it penalises."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + penalty(self.model)


def test_a_loss_that_reads_the_model_is_measured_whole_or_refused() -> None:
    """The curvature of a penalty inside the loss is counted as it stands, and never lost in a float64 copy."""
    model = net()

    def closure(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + penalty(model)

    plain = top(dense_hessian(copy.deepcopy(model), lambda call: F.cross_entropy(call(X.double()), Y)), 2)
    for loss in (closure, Penalised(model)):
        found = top_eigenvalues(Problem(model=model, loss=loss, data=(X, Y)), k=2, tol=1e-4)
        assert torch.allclose(torch.tensor(found.eigenvalues), plain + 1, rtol=1e-4)
    with pytest.raises(ProblemError, match="reads the model's own parameters"):
        top_eigenvalues(Problem(model=model, loss=closure, data=(X, Y)), dtype=torch.float64)
    lifted = top_eigenvalues(
        Problem(model=model, loss=Penalised(model), data=(X, Y)), k=2, tol=1e-9, dtype=torch.float64
    )
    assert torch.allclose(torch.tensor(lifted.eigenvalues), plain + 1, rtol=1e-8)


def test_complex_buffers_keep_their_imaginary_part() -> None:
    """Lifting a model to float64 lifts a complex64 buffer to complex128."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()
            self.register_buffer("c", torch.tensor(1 + 2j))

        def forward(self, x: Tensor) -> Tensor:
            return (self.body(x) * self.c).abs()

    model = Turned()
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y))
    single, double = (top_eigenvalues(problem, k=1, dtype=dtype).lambda_max for dtype in (torch.float32, torch.float64))
    assert abs(single / double - 1) < 1e-4
    assert model.c.dtype == torch.complex64


def test_a_sum_is_refused_where_batches_are_kept_too() -> None:
    """With BatchNorm in train mode, where batches need not add up, a loss that doubles with its batch is no mean."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    data = [(X[i : i + 20], Y[i : i + 20]) for i in (0, 20, 40)]
    total = lambda output, target: F.cross_entropy(output, target, reduction="sum")  # noqa: E731
    with pytest.raises(ProblemError, match="it is a sum"):
        top_eigenvalues(Problem(model=model, loss=total, data=data, mode="train"), k=1)
    mean = lambda output, target: F.cross_entropy(output, target)  # noqa: E731
    known = top_eigenvalues(Problem(model=model, loss=nn.CrossEntropyLoss(), data=data, mode="train"), k=1)
    ours = top_eigenvalues(Problem(model=model, loss=mean, data=data, mode="train"), k=1)
    assert abs(known.lambda_max - ours.lambda_max) < 1e-5


def test_ragged_tokens_far_into_the_data_are_noticed() -> None:
    """A mean over tokens without terms(batch) is refused though its first 300 examples are full."""
    tokens = torch.randint(0, 5, (400, 6), generator=torch.Generator().manual_seed(0))
    target = tokens.clone()
    target[300:, 1:] = -100

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).cumsum(1).tanh()).transpose(1, 2)

    loss = lambda output, target: F.cross_entropy(output, target)  # noqa: E731
    with pytest.raises(ProblemError, match=r"terms\(batch\)"):
        top_eigenvalues(Problem(model=Tagger(), loss=loss, data=(tokens, target)), k=1)
    top_eigenvalues(Problem(model=Tagger(), loss=nn.CrossEntropyLoss(), data=(tokens, target)), k=1)


def test_examples_along_another_dimension_are_noticed() -> None:
    """A time-first LSTM, whose batches must not be cut or joined along dimension 0, is refused."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTM(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x)[0]).transpose(1, 2)

    steps = torch.randn(12, 2, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (12, 2), generator=torch.Generator().manual_seed(1))
    problem = Problem(model=Recurrent(), loss=nn.CrossEntropyLoss(), data=[(steps, labels), (-steps, labels)])
    with pytest.raises(ProblemError, match="micro_batch='loader'"):
        top_eigenvalues(problem, k=1)
    assert top_eigenvalues(problem, k=1, micro_batch="loader").converged.all()


def test_a_gradient_that_is_not_the_losses_is_refused() -> None:
    """A backward that triples the gradient is consistent in itself, and wrong."""

    class Tripled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 3 * gradient

    loss = lambda output, target: Tripled.apply(F.cross_entropy(output, target))  # noqa: E731
    with pytest.raises(ProblemError, match="derivative of the loss"):
        top_eigenvalues(Problem(model=net(), loss=loss, data=(X, Y)), k=1)


def test_spectral_norm_is_measured_in_eval_mode_and_refused_in_train_mode() -> None:
    """Its power iteration moves buffers at every forward in train mode, so the loss is no fixed function."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # with some seeds the iteration has converged to the last bit, and the loss is fixed
        model = nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))
    assert top_eigenvalues(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y)), k=1).converged.all()
    with pytest.raises(Exception, match="changes its own buffers"):
        top_eigenvalues(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y), mode="train"), k=1)


def test_models_may_write_into_their_input_and_the_data_stay() -> None:
    """An in-place model is measured like its out-of-place twin, and the user's tensors keep values and flags."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.mul_(0.5).requires_grad_())

    data = (X.clone(), Y.clone())
    found = top_eigenvalues(Problem(model=InPlace(), loss=nn.CrossEntropyLoss(), data=data), k=1).lambda_max
    wanted = top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X / 2, Y)), k=1).lambda_max
    assert abs(found - wanted) < 1e-6
    assert torch.equal(data[0], X)
    assert not data[0].requires_grad


class Remembering(nn.Module):
    """Fills an empty buffer, adds a new one, and has an expanded one that cannot be written to."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.register_buffer("mean", None)
        self.register_buffer("ones", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = x.mean(0)
        if "seen" not in self._buffers:
            self.register_buffer("seen", torch.ones(()))
        return self.body(x) * self.ones


def test_buffers_that_appear_during_a_measurement_are_gone_after_it() -> None:
    """None stays None, no buffer is added, and a buffer that refuses writing is no obstacle."""
    model = Remembering()
    top_eigenvalues(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(X, Y)), k=1)
    assert model.mean is None
    assert set(model._buffers) == {"mean", "ones"}


class Graph(nn.Module):
    """Nodes, and edges between them: two tensors of unequal length in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.body(x + torch.zeros_like(x).index_add(0, edges[0], x[edges[1]]) / 10)


def test_batches_without_a_common_first_dimension_are_kept_whole() -> None:
    """A graph's nodes and edges, and a class prior beside the examples, are neither cut nor joined."""
    edges = torch.randint(0, 60, (2, 100), generator=torch.Generator().manual_seed(0))
    assert top_eigenvalues(
        Problem(model=Graph(), loss=nn.CrossEntropyLoss(), data=[(X, edges, Y)]), k=1
    ).converged.all()

    class Prior(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor, prior: Tensor) -> Tensor:
            return self.body(x) + prior

    data = [(X[:40], torch.ones(3), Y[:40]), (X[40:], torch.ones(3), Y[40:])]
    found = top_eigenvalues(Problem(model=Prior(), loss=nn.CrossEntropyLoss(), data=data), k=1).lambda_max
    wanted = top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y)), k=1).lambda_max
    assert abs(found / wanted - 1) < 1e-5


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.2, 1.0, 3.0])], ids=["plain", "weighted"])
def test_labels_of_any_integer_type_are_labels(dtype: torch.dtype, weight: Tensor | None) -> None:
    """uint8 labels index the class weights, they do not mask them."""
    loss = nn.CrossEntropyLoss(weight)
    found, wanted = (
        top_eigenvalues(Problem(model=net(), loss=loss, data=(X, labels)), k=1).lambda_max
        for labels in (Y.to(dtype), Y)
    )
    assert found == wanted


@dataclass
class Scaled:
    """A loss that compares by value, and so cannot be hashed."""

    width: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.width * output, target)


def test_a_loss_need_not_be_hashable() -> None:
    """A dataclass with __call__ is a loss like any other."""
    assert top_eigenvalues(Problem(model=net(), loss=Scaled(2.0), data=(X, Y)), k=1).converged.all()


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (lazy, (X, Y), "Run one batch through the model first"),
        (net, list(zip(X, Y, strict=True)), "look like single examples"),
        (net, (X, Y[:, None]), r"must have shape \(60,\), got \(60, 1\)"),
    ],
    ids=["lazy", "examples", "labels"],
)
def test_common_slips_end_in_a_sentence(make: Callable[[], nn.Module], data: Any, message: str) -> None:
    """Lazy modules, single examples and (N, 1) labels are named, not left to torch."""
    with pytest.raises(ProblemError, match=message):
        top_eigenvalues(Problem(model=make(), loss=nn.CrossEntropyLoss(), data=data), k=1)


def test_batch_statistics_are_the_loaders_with_or_without_an_audit() -> None:
    """An Objective by itself measures what top_eigenvalues does when BatchNorm is in train mode."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = [(X[i : i + 20].double(), Y[i : i + 20]) for i in (0, 20, 40)]
    problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=data, mode="train")
    objective = Objective(problem)
    hessian = objective.hvp(torch.eye(objective.num_params, dtype=torch.float64))
    assert abs(float(top(hessian, 1)[0]) - top_eigenvalues(problem, k=1, tol=1e-9).lambda_max) < 1e-9


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"weight_decay": "x"}, "weight_decay"),
        ({"params": 3}, "params"),
    ],
)
def test_a_problem_of_wrong_values_is_refused(parts: dict[str, Any], message: str) -> None:
    """Weight decay and parameter patterns are checked when the Problem is made."""
    with pytest.raises(ProblemError, match=message):
        Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y), **parts)


def test_data_that_do_not_fit_the_model_are_named() -> None:
    """Inputs of a wrong shape, and a model in place of a Problem, end in a ProblemError that shows what came."""
    with pytest.raises(ProblemError, match=r"The model cannot take the data.*\(60, 3\)"):
        top_eigenvalues(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X[:, :3], Y)), k=1)
    with pytest.raises(ProblemError, match="Problem"):
        top_eigenvalues(net())  # type: ignore[arg-type]
