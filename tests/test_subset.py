"""The weighted sample against dense float64 Hessians of all the data, over many draws."""

from __future__ import annotations

import copy
import functools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from conftest import tiny_mlp
from dense import dense_hessian
from sharpscope import DataError, Objective, Problem
from sharpscope.objective.micro_batches import MicroBatch
from sharpscope.sampling import importance_sample as module
from sharpscope.sampling.importance_sample import ImportanceSample, importance_samples, worthwhile

N = 60


def net(outputs: int = 3, seed: int = 0) -> nn.Sequential:
    return tiny_mlp(2, 3, outputs, seed=seed).double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Examples of very different importance.
X = normal(N, 2) * torch.linspace(0.1, 4, N, dtype=torch.float64)[:, None]
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(1))
SOFT = normal(N, 3, seed=2) * torch.linspace(3, 0.1, N, dtype=torch.float64)[:, None]
BITS = (SOFT > 0).double()
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


class Tokens(nn.Module):
    """Logits (N, 3, T) for inputs (N, T, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).transpose(1, 2)


class Named(nn.Module):
    """A model that takes its input by keyword and answers with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(pixels)}


class Weighted(nn.Module):
    """A loss with terms of its own: each example counts as often as its label plus one."""

    def terms(self, batch: Any) -> Tensor:
        return (batch[1] + 1).sum()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        share = (target + 1) / (target + 1).sum()
        return (F.cross_entropy(output, target, reduction="none") * share).sum()


TOKENS = normal(N, 4, 2, seed=3) * 2
LABELS = torch.randint(0, 3, (N, 4), generator=torch.Generator().manual_seed(4))
LABELS[::3, 1:] = -100
LABELS[7] = -100

# Model, the loss under test, torch's mean of it over everything, inputs and targets.
CASES: dict[str, tuple[nn.Module, Any, Callable[..., Tensor], Tensor, Tensor]] = {
    "cross entropy": (net(), nn.CrossEntropyLoss(), F.cross_entropy, X, Y),
    "class weights": (
        net(),
        nn.CrossEntropyLoss(WEIGHT, ignore_index=1),
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=1),
        X,
        Y,
    ),
    "mse": (net(), nn.MSELoss(), F.mse_loss, X, SOFT),
    "bce": (net(), nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits, X, BITS),
    "nll": (
        nn.Sequential(net(), nn.LogSoftmax(1)),
        nn.NLLLoss(WEIGHT),
        functools.partial(F.nll_loss, weight=WEIGHT),
        X,
        Y,
    ),
    "tokens": (Tokens(), nn.CrossEntropyLoss(), F.cross_entropy, TOKENS, LABELS),
    "custom": (net(), nn.SmoothL1Loss(), F.smooth_l1_loss, X, SOFT),
    "terms": (net(), Weighted(), lambda output, target: Weighted()(output, target), X, Y),
    "no slope in the output": (net(), lambda output, target: output.mean(), lambda output, target: output.mean(), X, Y),
}


def pieces(inputs: Tensor, target: Tensor, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    """A list of batches, the last one smaller."""
    return list(zip(inputs.split(size), target.split(size), strict=True))


def objective(model: nn.Module, loss: Any, data: Any, micro_batch: int = 9, **options: Any) -> Objective:
    return Objective(Problem(model=model, loss=loss, data=data, **options), micro_batch=micro_batch)


def drawn(target: Objective, seed: int = 0, size: int = 20) -> ImportanceSample:
    return importance_samples(target, torch.Generator().manual_seed(seed), size=size)[-1]


def parts(found: ImportanceSample) -> list[MicroBatch]:
    """The micro-batches of a sample that has made no products yet."""
    return found._graphs._rebuilt


def product(found: ImportanceSample, target: Objective, block: Tensor) -> Tensor:
    with target.measuring():
        return found(block.T.contiguous()).T


def unbiased(target: Objective, truth: Tensor, seeds: int = 60, size: int = 20) -> None:
    """Assert that the mean of ``G V`` over draws is ``truth @ V`` within 5 of its standard errors, which are not 0."""
    block = normal(len(truth), 2, seed=9)
    found = torch.stack([product(drawn(target, seed, size), target, block) for seed in range(seeds)])
    error = found.std(0) / seeds**0.5
    off = (found.mean(0) - truth @ block).abs()
    assert bool((off <= 5 * error + 1e-12).all()), float((off / error).max())
    # What is tested is not hidden by noise.
    assert float(error.norm()) < 0.2 * float((truth @ block).norm())
    assert float(error.norm()) > 0


@pytest.mark.parametrize("name", CASES)
def test_the_mean_over_samples_is_the_dense_hessian(name: str) -> None:
    """Over 60 draws of a third of the data the mean of G is the Hessian of the mean loss, whatever the loss's terms."""
    model, loss, mean, inputs, target = CASES[name]
    truth = dense_hessian(model, lambda call: mean(call(inputs), target))
    unbiased(objective(model, loss, pieces(inputs, target)), truth)


@pytest.mark.parametrize("kind", ["tuple", "loader", "dataset", "dict", "dict of one batch"])
def test_all_kinds_of_data_are_sampled(kind: str) -> None:
    """In-memory tensors, loaders, data sets and dict batches give the same mean, and weight decay comes on top."""
    model = Named() if "dict" in kind else net()
    data: Any = {
        "tuple": (X, Y),
        "loader": DataLoader(TensorDataset(X, Y), batch_size=8),
        "dataset": TensorDataset(X, Y),
        "dict": [{"pixels": x, "labels": y} for x, y in pieces(X, Y)],
        "dict of one batch": {"pixels": X, "labels": Y},
    }[kind]
    truth = dense_hessian(net(), lambda call: F.cross_entropy(call(X), Y))
    truth += 0.3 * torch.eye(len(truth), dtype=torch.float64)
    unbiased(objective(model, nn.CrossEntropyLoss(), data, weight_decay=0.3), truth, seeds=40)


def test_every_example_counts_once_on_average() -> None:
    """Over 3000 draws of 8 of 30, of importances from 1/8 to 64, each example's weight has mean 1, and their sum 30."""
    generator = torch.Generator().manual_seed(0)
    importances = torch.exp2(torch.randint(-3, 7, (30,), generator=generator)).double()
    weights = torch.zeros(3000, 30, dtype=torch.float64)
    for row in weights:
        reservoir = module._Reservoir(8, generator)
        for start in range(0, 30, 5):
            place = torch.arange(start, start + 5)
            reservoir.add(MicroBatch((place,), 5, ()), importances[start : start + 5])
        chosen = reservoir.batches(8, 3)
        assert sum(part.size for part in chosen) == 8
        for part in chosen:
            assert part.scale >= 1
            row[part.batch[0]] += part.scale
    error = weights.std(0) / 3000**0.5
    assert bool(((weights.mean(0) - 1).abs() <= 4 * error + 1e-12).all())
    total = weights.sum(1)
    assert abs(float(total.mean()) - 30) <= 4 * float(total.std()) / 3000**0.5
    # Uniform sampling of 8 has a standard deviation of 1.7 a weight.
    assert float(weights[:, importances == 64].std(0).max()) < 0.5


def test_equal_weights_share_micro_batches() -> None:
    """Of each weight all micro-batches but the last are full, and no more weights than powers of 2."""
    for seed in range(5):
        found = parts(drawn(objective(net(), nn.MSELoss(), pieces(X, SOFT)), seed, size=40))
        sizes: dict[float, list[int]] = {}
        for part in found:
            sizes.setdefault(part.scale, []).append(part.size)
        assert sum(map(sum, sizes.values())) == 40
        assert 1 < len(sizes) <= 8
        for of_one in sizes.values():
            assert all(size == 9 for size in of_one[:-1])
        above = sorted(scale for scale in sizes if scale > 1)
        ratios = torch.tensor(above[1:], dtype=torch.float64) / torch.tensor(above[:-1], dtype=torch.float64)
        assert torch.allclose(ratios.log2(), ratios.log2().round(), atol=1e-9)


def test_a_sample_holds_no_example_twice() -> None:
    """A sample of 20 holds 20 different examples, each with its own target; duplicates are as good as others."""
    for seed in range(10):
        found = parts(drawn(objective(net(), nn.MSELoss(), (X, SOFT)), seed))
        rows, targets = (torch.cat([part.batch[i] for part in found]) for i in (0, 1))
        places = [int((row == X).all(1).nonzero()[0]) for row in rows]
        assert len(set(places)) == len(places) == 20
        assert torch.equal(targets, SOFT[places])
    same = parts(drawn(objective(net(), nn.MSELoss(), (X[:1].expand(N, 2), SOFT[:1].expand(N, 3)))))
    assert sum(part.size for part in same) == 20
    assert sum(part.size * part.scale for part in same) == pytest.approx(60, rel=0.6)


@pytest.mark.parametrize("place", [0, 31, N - 1])
def test_an_example_that_alone_curves_the_loss_is_always_there(place: int) -> None:
    """One undecided example among decided ones holds most of the curvature, and is in each of 40 samples of 10."""
    model = nn.Linear(2, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[12.0, 0.0], [-12.0, 0.0]]))
        model.bias.zero_()
    inputs = torch.stack([torch.where(Y > 0, 1.0, -1.0), normal(N)], 1).double()
    inputs[place] = torch.tensor([0.0, 5.0])
    target = (inputs[:, 0] <= 0).long()

    def trace(rows: Any) -> float:
        one = copy.deepcopy(model)
        return float(dense_hessian(one, lambda call: F.cross_entropy(call(inputs[rows]), target[rows])).trace())

    assert trace([place]) > 0.99 * N * trace(slice(None))
    # Importance is in units of the mean so far, which says little before some tens of examples.
    ours = objective(model, nn.CrossEntropyLoss(), pieces(inputs, target), micro_batch=30)
    for seed in range(40):
        found = parts(drawn(ours, seed, size=10))
        there = [part for part in found if bool((part.batch[0] == inputs[place]).all(1).any())]
        assert len(there) == 1
        assert there[0].scale == 1


@pytest.mark.parametrize("kept", [0, "half", 1 << 30])
def test_kept_and_rebuilt_graphs_give_the_same_products_at_the_stated_cost(
    kept: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is kept, products repeat; a later one costs 2K gradients of the sample, and 1 more of what is not."""
    target = objective(net(), nn.CrossEntropyLoss(), pieces(X, Y))
    block = normal(target.num_params, 3)
    expected = product(drawn(target), target, block)
    each = target.graph_bytes(20) // 20
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 10 * each if kept == "half" else kept)
    before, passes = target.cost_counter.example_gradients, target.passes
    found = drawn(target)
    # The first 256, which are all here, then all, and a count of bytes on 24.
    assert target.cost_counter.example_gradients - before == pytest.approx(2 * module.OUTPUT_DERIVATIVES_COST * N + 24)
    assert target.passes == passes + 1
    costs = []
    for _ in range(3):
        before = target.cost_counter.example_gradients
        assert torch.allclose(product(found, target, block), expected, atol=1e-14)
        costs.append(target.cost_counter.example_gradients - before)
    assert costs[0] == pytest.approx(20 * (1 + 2 * 3))
    rebuilt = sum(part.size for part in parts(found))
    assert {0: rebuilt == 20, "half": 0 < rebuilt < 20, 1 << 30: rebuilt == 0}[kept]
    assert costs[1:] == pytest.approx([20 * 2 * 3 + rebuilt] * 2)
    assert target.passes == passes + 1
    assert target.hvps == 0


def test_a_mislabelled_example_is_named() -> None:
    """A label out of range is a DataError with the example's place in the loader's terms."""
    labels = Y.clone()
    labels[37] = 7
    with pytest.raises(DataError, match="got 7 in example 2 of batch 5"):
        drawn(objective(net(), nn.CrossEntropyLoss(), pieces(X, labels)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_is_named(value: float) -> None:
    """NaN or infinity in an input, wherever it is, is a DataError with the example's place."""
    for place in (0, 37, N - 1):
        inputs = X.clone()
        inputs[place, 1] = value
        with pytest.raises(DataError, match=f"example {place % 7} of batch {place // 7}"):
            drawn(objective(net(), nn.MSELoss(), pieces(inputs * 1.0, SOFT + 0 * inputs.sum(1, keepdim=True))))


def test_nothing_is_touched() -> None:
    """Model, buffers, modes, gradients, the data and all random states are bit for bit what they were."""
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    model(X)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    data = pieces(X.clone(), Y.clone())
    before = copy.deepcopy((model.state_dict(), [(x.clone(), y.clone()) for x, y in data]))
    states = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # type: ignore[union-attr]
    target = objective(model, nn.CrossEntropyLoss(), data)
    found = drawn(target)
    product(found, target, normal(target.num_params, 2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert model.training
    assert all(module.training for module in model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    for (x, y), (wanted_x, wanted_y) in zip(data, before[1], strict=True):
        assert torch.equal(x, wanted_x)
        assert torch.equal(y, wanted_y)
        assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0])
    assert bool((np.random.get_state()[1] == states[1]).all())  # type: ignore[index]
    assert random.getstate() == states[2]


def test_a_loader_may_reuse_its_tensors() -> None:
    """A loader that reuses its tensors, as one that preallocates does, changes neither the sample nor the products."""

    class Reusing:
        def __iter__(self) -> Any:
            inputs, target = torch.empty(10, 2, dtype=torch.float64), torch.empty(10, 3, dtype=torch.float64)
            for start in range(0, N, 10):
                inputs.copy_(X[start : start + 10])
                target.copy_(SOFT[start : start + 10])
                yield inputs, target

    for size in (5, 25):
        ours = objective(net(), nn.MSELoss(), Reusing(), micro_batch=size)
        theirs = objective(net(), nn.MSELoss(), pieces(X, SOFT, 10), micro_batch=size)
        block = normal(ours.num_params, 2)
        assert torch.allclose(ours.hvp(block), theirs.hvp(block), atol=1e-14)
        assert torch.allclose(product(drawn(ours), ours, block), product(drawn(theirs), theirs, block), atol=1e-14)


def test_the_same_generator_gives_the_same_sample() -> None:
    """Equal seeds draw the same examples with the same weights, other seeds others, whatever the loader's batches."""

    def weights(seed: int, size: int = 7) -> Counter[tuple[float, ...]]:
        found = parts(drawn(objective(net(), nn.MSELoss(), pieces(X, SOFT, size)), seed))
        return Counter((*row.tolist(), part.scale) for part in found for row in part.batch[0])

    assert weights(0) == weights(0) == weights(0, 13)
    assert weights(0) != weights(1)


def test_the_micro_batch_does_not_change_the_sample() -> None:
    """The size is chosen by timing, so what is drawn must not depend on it, nor the result's cost on chance."""
    eye, found = torch.eye(21, dtype=torch.float64), []
    for size in (1, 7, 60):
        target = Objective(Problem(model=net(), loss=nn.CrossEntropyLoss(), data=(X, Y)), micro_batch=size)
        with target.measuring():
            guides = importance_samples(target, torch.Generator().manual_seed(4), size=20)
            found.append(torch.stack([guide(eye) for guide in guides]))
    assert torch.allclose(found[0], found[1], rtol=1e-10, atol=1e-12)
    assert torch.allclose(found[0], found[2], rtol=1e-10, atol=1e-12)


def test_what_need_not_or_cannot_be_sampled_gives_none() -> None:
    """As many examples as the data have, or batches that cannot be cut, give None; a sample of one less does not."""
    target = objective(net(), nn.MSELoss(), pieces(X, SOFT))
    generator = torch.Generator().manual_seed(0)
    assert importance_samples(target, generator, size=N) == []
    assert importance_samples(target, generator, size=2 * N) == []
    assert importance_samples(target, generator) == []  # the default is no fewer than 512
    assert drawn(target, size=N - 1).num_examples == N - 1

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
            return self.net(nodes)

    tied = [(x, torch.zeros(2, dtype=torch.float64), y) for x, y in pieces(X, SOFT)]
    assert importance_samples(objective(Graph(), nn.MSELoss(), tied), generator, size=20) == []


def test_few_data_or_kept_batches_are_not_worth_a_sample() -> None:
    """Below 4096 examples, of unknown number, or with batches that define the loss, there is nothing to save."""
    many = (torch.zeros(4096, 2).double(), torch.zeros(4096, 3).double())
    assert worthwhile(objective(net(), nn.MSELoss(), many))
    assert not worthwhile(objective(net(), nn.MSELoss(), tuple(t[1:] for t in many)))
    problem = Problem(model=net(), loss=nn.MSELoss(), data=many)
    assert not worthwhile(Objective(problem, micro_batch="loader"))
    batchnorm = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    assert not worthwhile(Objective(Problem(model=batchnorm, loss=nn.MSELoss(), data=many, mode="train")))


def test_a_full_sample_s_eigenvalues_are_near_those_of_all() -> None:
    """Of 2000 examples 400 give the largest eigenvalue to a fifth, in each of ten draws."""
    inputs, target = normal(2000, 2, seed=5), torch.randint(0, 3, (2000,), generator=torch.Generator().manual_seed(6))
    model = net(seed=1)
    truth = torch.linalg.eigvalsh(dense_hessian(model, lambda call: F.cross_entropy(call(inputs), target)))[-1]
    ours = Objective(Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, target)), micro_batch=500)
    for seed in range(10):
        matrix = product(drawn(ours, seed, 400), ours, torch.eye(ours.num_params, dtype=torch.float64))
        assert torch.allclose(matrix, matrix.T, atol=1e-14)
        assert float(torch.linalg.eigvalsh(matrix)[-1]) == pytest.approx(float(truth), rel=0.2)


def test_low_precision_weights_are_lifted() -> None:
    """A bfloat16 model's products are float32, those of the same weights in float32 to its rounding."""
    half = net().to(torch.bfloat16)
    block = normal(21, 2).float()
    found = []
    for model in (half, copy.deepcopy(half).float()):
        target = objective(model, nn.CrossEntropyLoss(), (X.float(), Y))
        found.append(product(drawn(target), target, block))
    assert found[0].dtype == torch.float32
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_progress_reports_the_examples_seen() -> None:
    """progress gets "scouting", the number seen, which ends at all of them, and their number."""
    seen: list[tuple[str, int, int | None]] = []
    target = objective(net(), nn.MSELoss(), pieces(X, SOFT))
    importance_samples(target, torch.Generator().manual_seed(0), lambda *news: seen.append(news), size=20)
    assert {news[0] for news in seen} == {"scouting"}
    assert [news[1] for news in seen] == [min(N, 9 * (i + 1)) for i in range(7)]
    assert {news[2] for news in seen} == {N}
