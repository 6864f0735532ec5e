"""GPT-2 on disk in every form, in any batches, by any command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from command import eigenvalues, printed
from dense import top
from language import causal_batches, drawn, gpt2, next_tokens
from sharpscope import Problem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 in one file, in several, and as older versions wrote it."""
    place, model = tmp_path_factory.mktemp("gpt2"), drawn(gpt2)
    model.save_pretrained(place / "one")
    model.save_pretrained(place / "sharded", max_shard_size="2KB")
    (place / "old").mkdir()
    torch.save(model.state_dict(), place / "old" / "pytorch_model.bin")
    return place


@pytest.fixture(scope="module")
def values(folder: Path) -> list[float]:
    """The top five of GPT-2."""
    return eigenvalues(folder / "one", gpt2)


@pytest.mark.parametrize("form", ["sharded", "old"])
def test_the_form_of_the_folder_changes_nothing(form: str, folder: Path, values: list[float]) -> None:
    """Several files with an index, and a pickled one, hold the same weights."""
    assert form == "old" or len(list((folder / form).glob("*.safetensors"))) > 1
    assert eigenvalues(folder / form, gpt2) == pytest.approx(values, rel=1e-9)


def gpt2_one_by_one() -> Problem:
    """The same sentences in batches of one, each as long as it is."""
    batches = []
    for batch in causal_batches():
        for i in range(len(batch["labels"])):
            length = int(batch["attention_mask"][i].sum())
            batches.append({name: value[i : i + 1, :length] for name, value in batch.items()})
    return replace(gpt2(), data=batches)


@pytest.mark.parametrize(("problem", "options"), [(gpt2, ("--micro-batch", "2")), (gpt2_one_by_one, ())])
def test_neither_batches_nor_padding_change_the_number(
    problem: Callable[[], Problem], options: tuple[str, ...], folder: Path, values: list[float]
) -> None:
    """Two sentences a graph, or each sentence alone and without padding."""
    assert eigenvalues(folder / "one", problem, *options) == pytest.approx(values, rel=1e-8)


def gpt2_own_loss() -> Problem:
    """GPT-2 with the mean over tokens that it returns itself."""
    return replace(gpt2(), loss=lambda output, target: output.loss)


class OwnLoss(nn.Module):
    """What the model returns, with the number of its terms."""

    def forward(self, output: Any, target: Tensor) -> Tensor:
        return output.loss  # type: ignore[no-any-return]

    def terms(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())


def gpt2_counted() -> Problem:
    """The same, counted."""
    return replace(gpt2(), loss=OwnLoss())


def test_a_models_own_mean_over_tokens_must_be_counted(folder: Path, values: list[float]) -> None:
    """Its loss is refused where batches count by their sentences, and right with terms(batch)."""
    assert "terms(batch)" in printed("eigen", folder / "one", gpt2_own_loss, status=1)
    assert eigenvalues(folder / "one", gpt2_counted) == pytest.approx(values, rel=1e-8)


def test_gauss_newton_is_that_of_the_tokens(folder: Path) -> None:
    """--operator ggn gives the eigenvalues of the mean over tokens of J' (diag p - pp') J."""
    network = drawn(gpt2).double().eval()
    weights = {name: p.detach() for name, p in network.named_parameters()}
    matrix = torch.zeros(sum(p.numel() for p in weights.values()), dtype=torch.float64)
    matrix, count = torch.diag(matrix), 0
    for batch in gpt2_one_by_one().data:
        labels = batch["labels"][0, 1:]

        def logits(given: dict[str, Tensor], ids: Tensor = batch["input_ids"]) -> Tensor:
            found: Tensor = functional_call(network, given, (), {"input_ids": ids}).logits[0, :-1]
            return found

        jacobians = torch.cat([j.detach().flatten(2) for j in jacrev(logits)(weights).values()], 2)
        for t in (labels != -100).nonzero()[:, 0].tolist():
            p = logits(weights)[t].detach().softmax(0)
            matrix += jacobians[t].T @ (torch.diag(p) - torch.outer(p, p)) @ jacobians[t]
            count += 1
    found = eigenvalues(folder / "one", gpt2, "--operator", "ggn")
    assert found == pytest.approx(top(matrix / count).tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("slice", ("--points", "3", "--seeds", "1")),
        ("sharpness", ()),
        ("density", ("--probes", "2", "--steps", "3")),
    ],
)
def test_other_commands_have_the_loss_at_the_weights(command: str, options: tuple[str, ...], folder: Path) -> None:
    """Slices, sharpness and density of GPT-2 start from the mean over its tokens."""
    with torch.no_grad():
        exact = float(next_tokens(drawn(gpt2).double().eval(), causal_batches()))
    found = printed(command, folder / "one", gpt2, "--dtype", "float64", *options)
    at = found["centre"][0][0] if command == "slice" else found["loss"]
    assert at == pytest.approx(exact, rel=1e-6)
