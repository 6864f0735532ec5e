"""--examples draws the same examples from whatever form the data have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

import sharpscope
from sharpscope import ArgumentError, Problem

INPUTS, LABELS = torch.arange(30.0).reshape(15, 2), torch.arange(15)
FORMS: dict[str, Any] = {
    "tensors": (INPUTS, LABELS),
    "dict": {"x": INPUTS, "labels": LABELS},
    "batches": list(zip(INPUTS.split([11, 4]), LABELS.split([11, 4]), strict=True)),
    "dicts": [{"x": x, "labels": y} for x, y in zip(INPUTS.split(4), LABELS.split(4), strict=True)],
    "dataset": TensorDataset(INPUTS, LABELS),
    "loader": DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4),
    "loader of a list": DataLoader(list(zip(INPUTS, LABELS, strict=True)), batch_size=4),  # type: ignore[arg-type]
}


Load = Callable[..., Problem]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A checkpoint on ``data=``."""
    path = tmp_path_factory.mktemp("examples") / "w.pt"
    torch.save(nn.Linear(2, 1).state_dict(), path)
    return partial(sharpscope.load, path, model=lambda: nn.Linear(2, 1), loss="mse")


def labels_of(data: Any) -> list[int]:
    """The labels in ``data``, which name its examples."""
    batches = [data] if isinstance(data, tuple | dict) else list(data)
    found = [batch["labels"] if isinstance(batch, dict) else batch[1] for batch in batches]
    return sorted(int(label) for part in found for label in (part if part.dim() else part[None]))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_examples(form: str, load: Load) -> None:
    """A seed means the same examples whether they come as tensors, batches, a Dataset or a loader, each once."""
    data = FORMS[form]
    drawn = load(data=data, examples=6, seed=3)
    assert drawn.provenance["split_examples"] == 15
    found = labels_of(drawn.data)
    assert found == labels_of(load(data=FORMS["tensors"], examples=6, seed=3).data)
    assert len(set(found)) == 6
    assert found != labels_of(load(data=data, examples=6, seed=4).data)
    assert labels_of(load(data=data, examples=15, seed=0).data) == list(range(15))


@pytest.mark.parametrize("form", FORMS)
def test_inputs_stay_with_their_labels(form: str, load: Load) -> None:
    """What is drawn of the inputs belongs to what is drawn of the labels."""
    drawn = load(data=FORMS[form], examples=6, seed=1).data
    for batch in [drawn] if isinstance(drawn, tuple | dict) else list(drawn):
        x, y = batch.values() if isinstance(batch, dict) else batch
        assert torch.equal(torch.atleast_2d(x)[:, 0], 2.0 * torch.atleast_1d(y))


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4, drop_last=True),
        [(INPUTS, 3)],
        (INPUTS, LABELS[:4]),
        iter([(INPUTS, LABELS)]),
    ],
)
def test_data_without_a_known_number_are_refused(data: Any, load: Load) -> None:
    """Where only a walk would tell which examples there are, the sentence says what would do."""
    with pytest.raises(ArgumentError, match="whose number of examples is known"):
        load(data=data, examples=3)


def test_too_many_are_refused(load: Load) -> None:
    """More examples than there are, and none, are errors."""
    for examples in (0, 16):
        with pytest.raises(ArgumentError, match="from 1 to the 15"):
            load(data=FORMS["batches"], examples=examples)


def test_a_list_in_a_loader_is_of_examples(load: Load) -> None:
    """Sequences that a loader puts into batches are drawn whole: their tokens are no examples."""
    texts = [{"input_ids": 10 * i + torch.arange(5), "labels": torch.arange(5)} for i in range(8)]
    data: Any = DataLoader(texts, batch_size=2)  # type: ignore[arg-type]
    found = load(data=data, examples=3)
    assert found.provenance["split_examples"] == 8
    drawn = torch.cat([batch["input_ids"] for batch in found.data])
    assert drawn.shape == (3, 5)
    assert torch.equal(drawn % 10, torch.arange(5).expand(3, 5))


def test_ragged_batches_keep_their_lengths(load: Load) -> None:
    """Sequences of other lengths in other batches are drawn from all of them."""
    batches: list[tuple[Tensor, Tensor]] = [
        (torch.ones(3, 5), torch.zeros(3, 5)),
        (torch.ones(4, 2), torch.zeros(4, 2)),
    ]
    drawn = load(data=batches, examples=5).data
    assert {x.shape[1] for x, _ in drawn} == {5, 2}
    assert sum(len(x) for x, _ in drawn) == 5


class Scaled(DataLoader[Any]):
    """A loader that changes its batches on the way."""

    def __iter__(self) -> Any:
        for inputs, labels in super().__iter__():
            yield 10 * inputs, labels


def test_a_loader_that_changes_its_batches_is_not_passed_by(load: Load) -> None:
    """What a loader's own iteration does to the data, or its sampler leaves out, is not lost with a sample."""
    whole = TensorDataset(INPUTS, LABELS)
    for data in (
        Scaled(whole, batch_size=4),
        DataLoader(whole, batch_size=4, sampler=SequentialSampler(range(5))),
    ):
        assert load(data=data).provenance["split_examples"] is None
        with pytest.raises(ArgumentError, match="whose number of examples is known"):
            load(data=data, examples=3)
