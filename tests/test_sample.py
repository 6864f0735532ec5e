"""A sample is drawn once, without replacement, from any data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sharpscope import SharpnessMonitor
from watched import N, Squares, X, Y, net, pieces, problem, sgd, train


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(X[i], Y[i]) for i in range(N)])


SOURCES: dict[str, Callable[[], Any]] = {
    "tuple": lambda: (X, Y),
    "dict": lambda: {"input": X, "target": Y},
    "list": pieces,
    "dataset": Squares,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=7),
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True, generator=torch.Generator()),
    "stream": lambda: DataLoader(Stream(), batch_size=7),
}


def drawn(data: Any, examples: int | None, seed: int = 0) -> SharpnessMonitor:
    return SharpnessMonitor(problem(net(), data=data), examples=examples, seed=seed)


def rows_of(batches: list[Any]) -> list[tuple[float, ...]]:
    inputs = [batch["input"] if isinstance(batch, dict) else batch[0] for batch in batches]
    return [tuple(row) for row in torch.cat(inputs).tolist()]


@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_is_drawn_without_replacement(source: str) -> None:
    """Of any kind of data: as many examples as asked for, all different, each from the data, by the seed."""
    there = {tuple(row): i for i, row in enumerate(X.tolist())}
    found = drawn(SOURCES[source](), 20, seed=1)
    places = [there[row] for row in rows_of(found.sample)]
    assert len(set(places)) == 20
    assert places == sorted(places)
    known = found.result().provenance
    assert (known["num_examples"], known["split_examples"]) == (20, N)
    assert rows_of(drawn(SOURCES[source](), 20, seed=1).sample) == rows_of(found.sample)
    assert rows_of(drawn(SOURCES[source](), 20, seed=2).sample) != rows_of(found.sample)
    whole = drawn(SOURCES[source](), None)
    assert sorted(there[row] for row in rows_of(whole.sample)) == list(range(N))
    assert drawn(SOURCES[source](), 10**6).result().provenance["num_examples"] == N


@pytest.mark.parametrize("source", ["list", "dataset"])
def test_every_example_is_as_likely(source: str) -> None:
    """Over 100 seeds each of 96 examples is drawn as often as chance allows (six standard errors)."""
    counts = dict.fromkeys((tuple(row) for row in X.tolist()), 0)
    for seed in range(100):
        for row in rows_of(drawn(SOURCES[source](), N // 2, seed).sample):
            counts[row] += 1
    assert all(abs(count - 50) < 6 * math.sqrt(100 * 0.5 * 0.5) for count in counts.values())


def test_only_those_drawn_are_read_and_once() -> None:
    """Of a Dataset, by itself or in a shuffling loader, nothing is read but the sample, and in training nothing."""
    for make in (lambda d: d, lambda d: DataLoader(d, batch_size=4, shuffle=True)):
        dataset, model = Squares(), net()
        monitor = SharpnessMonitor(problem(model, data=make(dataset)), every=1, examples=12)
        assert len(dataset.read) == len(set(dataset.read)) == 12
        for _ in train(model, sgd(model), 3):
            monitor.step()
        assert len(dataset.read) == 12


def test_batches_of_unequal_shape_are_drawn_whole() -> None:
    """Where a batch cannot be cut, whole batches are taken until there are enough examples."""
    ragged = [{"input": torch.ones(2, 3 + i), "lengths": torch.ones(5), "target": torch.ones(2)} for i in range(6)]

    class Sums(nn.Linear):
        def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(input.sum(1, keepdim=True))[:, 0]

    monitor = SharpnessMonitor(problem(Sums(1, 1), loss=nn.MSELoss(), data=ragged), examples=5)
    assert len(monitor.sample) == 3
    assert monitor.result().provenance["num_examples"] == 6


def test_a_sample_is_a_copy() -> None:
    """What the user does to his tensors later does not reach it."""
    mine = X.clone()
    found = drawn((mine, Y), None)
    mine.zero_()
    assert torch.equal(found.sample[0][0], X)
