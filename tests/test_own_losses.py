"""Models and losses of other forms: several inputs and outputs, weighted losses, operations of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from command import Call, Mean, cross_entropy, eigenvalues, printed, reference, saved
from sharpscope import Problem, ProblemError, top_eigenvalues

COUNT = 14


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, count: int = COUNT) -> Tensor:
    return torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed))


class TwoInputs(nn.Module):
    """An image and a vector go into a dict of class and value."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(1, 3, 3)
        self.vector = nn.Linear(2, 3)
        self.classes = nn.Linear(3, 3)
        self.value = nn.Linear(3, 1)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        mixed = torch.tanh(self.image(image).mean((2, 3)) * self.vector(vector))
        return {"class": self.classes(mixed), "value": self.value(mixed)[:, 0]}


class Both(nn.Module):
    """Cross-entropy and a tenth of the squared error, each a mean over examples."""

    def forward(self, output: Any, target: Any) -> Tensor:
        output = list(output.values()) if isinstance(output, dict) else output
        label, value = target if isinstance(target, list | tuple) else (target["class"], target["value"])
        return nn.functional.cross_entropy(output[0], label) + 0.1 * nn.functional.mse_loss(output[1], value)


def two_inputs() -> Problem:
    """A dict batch with a dict of targets."""
    batches = [
        {
            "image": drawn(seed, size, 1, 5, 5),
            "vector": drawn(seed + 1, size, 2),
            "target": {"class": labels(seed + 2, size), "value": drawn(seed + 3, size)},
        }
        for seed, size in ((0, 8), (10, 5), (20, 1))
    ]
    return Problem(model=TwoInputs(), loss=Both(), data=batches)


def each_pair(call: Call, data: Any) -> Tensor:
    """The mean over examples, one by one."""
    found = []
    for batch in data:
        for i, label in enumerate(batch["target"]["class"]):
            out = call(batch["image"][i : i + 1], batch["vector"][i : i + 1])
            rest = (out["value"][0] - batch["target"]["value"][i]) ** 2
            found.append(cross_entropy(out["class"][0], label) + 0.1 * rest)
    return torch.stack(found).mean()


class Boxes(nn.Module):
    """Class and box of each image, in a tuple with what no loss sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.box = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)
        self.auxiliary = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = torch.tanh(self.body(x))
        return self.classes(found), self.box(found), self.auxiliary(found)


class WeightedBoxes(nn.Module):
    """Both losses, weighted by example: the weighted mean of a batch, whose terms are its weights."""

    def forward(self, output: Any, target: Any) -> Tensor:
        label, box, weight = target
        each = nn.functional.cross_entropy(output[0], label, reduction="none") + (output[1] - box).square().sum(1)
        return (weight * each).sum() / weight.sum()

    def terms(self, batch: Any) -> Tensor:
        weight: Tensor = batch[-1][-1]
        return weight.sum()


def boxes() -> Problem:
    """A tuple of outputs, a tuple of targets, a head that is not used."""
    batches = [
        (drawn(seed, size, 4), (labels(seed + 1, size), drawn(seed + 2, size, 2), drawn(seed + 3, size).exp()))
        for seed, size in ((30, 9), (40, 4), (50, 1))
    ]
    return Problem(model=Boxes(), loss=WeightedBoxes(), data=batches)


def each_box(call: Call, data: Any) -> Tensor:
    """The weighted mean over examples, one by one."""
    total = weights = torch.zeros(())
    for x, (label, box, weight) in data:
        for i in range(len(x)):
            classes, place, _ = call(x[i : i + 1])
            total = total + weight[i] * (cross_entropy(classes[0], label[i]) + (place[0] - box[i]).square().sum())
            weights = weights + weight[i]
    return total / weights


MODELS: list[tuple[Callable[[], Problem], Mean]] = [(two_inputs, each_pair), (boxes, each_box)]


@pytest.mark.parametrize(("problem", "mean"), MODELS)
def test_several_inputs_and_losses_add_up(problem: Callable[[], Problem], mean: Mean, tmp_path: Path) -> None:
    """The eigenvalues are those of the dense Hessian, whatever the structure of batch and output and their sizes."""
    path = saved(tmp_path, problem)
    exact = reference(path, problem, mean)
    assert eigenvalues(path, problem) == pytest.approx(exact, rel=1e-6)
    assert eigenvalues(path, problem, "--micro-batch", "3") == pytest.approx(exact, rel=1e-6)


class Once(torch.autograd.Function):
    """tanh, whose author says that its backward is not to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := torch.tanh(x))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)


class Detached(torch.autograd.Function):
    """tanh, whose backward takes a saved number for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = torch.tanh(x).detach()
        return ctx.y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.y**2)


class Custom(nn.Module):
    """tanh by an operation of one's own."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.first, self.last, self.operation = nn.Linear(4, 5), nn.Linear(5, 3), operation

    def forward(self, x: Tensor) -> Any:
        return self.last(self.operation.apply(self.first(x)))


def once() -> Problem:
    """Refuses a second derivative."""
    return Problem(model=Custom(Once), loss=nn.CrossEntropyLoss(), data=(drawn(70, COUNT, 4), labels(71)))


def detached() -> Problem:
    """Gives a wrong one."""
    return replace(once(), model=Custom(Detached))


@pytest.mark.parametrize("problem", [once, detached])
def test_operations_without_a_second_derivative_are_told(problem: Callable[[], Problem], tmp_path: Path) -> None:
    """One sentence offers --operator finite-difference, which then has the eigenvalues to nearly its tolerance."""
    path = saved(tmp_path, problem)
    said = printed("eigen", path, problem, status=1)
    assert "--operator finite-difference" in said
    assert len(said.splitlines()) == 1
    weights = {name: value.double() for name, value in torch.load(path).items()}
    x, label = (t.double() if t.is_floating_point() else t for t in once().data)

    def mean(flat: Tensor) -> Tensor:
        a, b, c, d = flat.split([20, 5, 15, 3])
        logits = torch.tanh(x @ a.view(5, 4).T + b) @ c.view(3, 5).T + d
        return torch.stack([cross_entropy(z, y) for z, y in zip(logits, label, strict=True)]).mean()

    flat = torch.cat([value.flatten() for value in weights.values()])
    exact = torch.linalg.eigvalsh(torch.func.hessian(mean)(flat)).flip(0)[:5]
    found = eigenvalues(path, problem, "--operator", "finite-difference", tol="1e-5")
    assert found == pytest.approx(exact.tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "labels", "said"),
    [
        (nn.CrossEntropyLoss(), torch.zeros(6), "Pass labels.long()"),
        (lambda output, target: output.nothing, torch.zeros(6).long(), "has no attribute 'nothing'"),
        (lambda output, target: output[:, 7].mean(), torch.zeros(6).long(), "out of bounds"),
    ],
)
def test_a_loss_that_fails_says_what_it_was_given(loss: Any, labels: Tensor, said: str) -> None:
    """Whatever a loss raises on the first batch ends in one sentence with what it was called on."""
    problem = Problem(model=nn.Linear(3, 4), loss=loss, data=(torch.randn(6, 3), labels))
    with pytest.raises(ProblemError, match=said) as caught:
        top_eigenvalues(problem, k=1)
    assert "(6, 4)" in str(caught.value)


def test_single_examples_in_a_list_are_pointed_to_a_loader() -> None:
    """A list of single examples, taken for batches, ends in a sentence that names the loader."""
    data = [{"tokens": torch.randint(0, 5, (7,)), "labels": torch.randint(0, 5, (7,))} for _ in range(4)]

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(5, 3), nn.LSTM(3, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embed(tokens).transpose(1, 2)

    with pytest.raises(ProblemError, match=r"pass DataLoader\(data"):
        top_eigenvalues(Problem(model=Tagger(), loss=nn.CrossEntropyLoss(), data=data), k=1)
