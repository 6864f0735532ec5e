"""A sample is drawn once, without replacement, from any data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sharpscope import SharpnessMonitor
from sharpscope.monitor.monitor import draw_sample
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


def rows_of(batches: list[Any]) -> list[tuple[float, ...]]:
    inputs = [batch["input"] if isinstance(batch, dict) else batch[0] for batch in batches]
    return [tuple(row) for row in torch.cat(inputs).tolist()]


@pytest.mark.parametrize("source", SOURCES)
def test_a_sample_is_drawn_without_replacement(source: str) -> None:
    """Of any kind of data: as many examples as asked for, all different, each from the data, by the seed."""
    there = {tuple(row): i for i, row in enumerate(X.tolist())}
    found = draw_sample(SOURCES[source](), 20, torch.Generator().manual_seed(1))
    places = [there[row] for row in rows_of(found.batches)]
    assert len(set(places)) == 20
    assert places == sorted(places)
    assert (found.examples, found.drawn_from) == (20, N)
    again = draw_sample(SOURCES[source](), 20, torch.Generator().manual_seed(1))
    assert rows_of(again.batches) == rows_of(found.batches)
    other = draw_sample(SOURCES[source](), 20, torch.Generator().manual_seed(2))
    assert rows_of(other.batches) != rows_of(found.batches)
    whole = draw_sample(SOURCES[source](), None, torch.Generator())
    assert sorted(there[row] for row in rows_of(whole.batches)) == list(range(N))
    assert draw_sample(SOURCES[source](), 10**6, torch.Generator()).examples == N


@pytest.mark.parametrize("source", ["list", "dataset"])
def test_every_example_is_as_likely(source: str) -> None:
    """Over 300 seeds each of 96 examples is drawn as often as chance allows (six standard errors)."""
    counts = dict.fromkeys((tuple(row) for row in X.tolist()), 0)
    for seed in range(300):
        for row in rows_of(draw_sample(SOURCES[source](), 24, torch.Generator().manual_seed(seed)).batches):
            counts[row] += 1
    assert all(abs(count - 75) < 6 * math.sqrt(300 * 0.25 * 0.75) for count in counts.values())


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
    found = draw_sample(ragged, 5, torch.Generator().manual_seed(0))
    assert len(found.batches) == 3
    assert found.examples == 6


def test_a_sample_is_a_copy() -> None:
    """What the user does to his tensors later does not reach it."""
    mine = X.clone()
    found = draw_sample((mine, Y), None, torch.Generator())
    mine.zero_()
    assert torch.equal(found.batches[0][0], X)
