"""Networks as people write them in PyTorch itself, from a state dict on disk through the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from command import Call, Mean, cross_entropy, each_class, eigenvalues, reference, saved
from sharpscope import Problem, TokenCrossEntropy

COUNT, LENGTH, WIDTH, CLASSES = 12, 5, 3, 3


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, *shape: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def lengths(seed: int) -> Tensor:
    return torch.randint(1, LENGTH + 1, (COUNT,), generator=torch.Generator().manual_seed(seed))


def each_token(call: Call, data: Any) -> Tensor:
    """The mean over all tokens that have a label."""
    *inputs, target = data
    found = []
    for i in range(len(target)):
        logits = call(*(t[i : i + 1] for t in inputs))[0]
        found += [cross_entropy(logits[t], target[i, t]) for t in range(LENGTH) if int(target[i, t]) != -100]
    return torch.stack(found).mean()


class Recurrent(nn.Module):
    """Two layers in both directions, from a state that forward makes; packed if it is told lengths."""

    def __init__(self, kind: type[nn.RNNBase], every: bool) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, 4, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.head = nn.Linear(8, CLASSES)
        self.every = every

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        state: Any = torch.zeros(4, len(x), 4)
        state = (state, torch.zeros(4, len(x), 4)) if isinstance(self.rnn, nn.LSTM) else state
        if lengths is None:
            found, _ = self.rnn(x, state)
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            found, _ = pad_packed_sequence(self.rnn(packed, state)[0], batch_first=True, total_length=LENGTH)
        logits: Tensor = self.head(found if self.every else found.sum(1))
        return logits


def lstm() -> Problem:
    """Many to one."""
    data = (drawn(0, COUNT, LENGTH, WIDTH), labels(1, COUNT))
    return Problem(model=Recurrent(nn.LSTM, False), loss=nn.CrossEntropyLoss(), data=data)


def gru() -> Problem:
    """Many to many."""
    data = (drawn(2, COUNT, LENGTH, WIDTH), labels(3, COUNT, LENGTH))
    return Problem(model=Recurrent(nn.GRU, True), loss=TokenCrossEntropy(), data=data)


def packed_lstm() -> Problem:
    """Many to many, packed."""
    sizes = lengths(4)
    target = labels(5, COUNT, LENGTH).masked_fill(torch.arange(LENGTH) >= sizes[:, None], -100)
    data = (drawn(6, COUNT, LENGTH, WIDTH), sizes, target)
    return Problem(model=Recurrent(nn.LSTM, True), loss=TokenCrossEntropy(), data=data)


def packed_gru() -> Problem:
    """Many to one, packed."""
    data = (drawn(7, COUNT, LENGTH, WIDTH), lengths(8), labels(9, COUNT))
    return Problem(model=Recurrent(nn.GRU, False), loss=nn.CrossEntropyLoss(), data=data)


def each_packed(call: Call, data: Any) -> Tensor:
    """The mean over sequences, each cut to its length before it is run."""
    x, sizes, target = data
    found = [cross_entropy(call(x[i : i + 1, : int(sizes[i])])[0], target[i]) for i in range(COUNT)]
    return torch.stack(found).mean()


def each_packed_token(call: Call, data: Any) -> Tensor:
    """The mean over tokens of sequences cut to their length before they are run."""
    x, sizes, target = data
    found = []
    for i, size in enumerate(sizes.tolist()):
        logits = call(x[i : i + 1, :size])[0]
        found += [cross_entropy(logits[t], target[i, t]) for t in range(size)]
    return torch.stack(found).mean()


class Encoder(nn.Module):
    """torch's own encoder with a key padding mask."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.2, batch_first=True)
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        found = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        logits: Tensor = self.head(found.masked_fill(padding[..., None], 0).sum(1))
        return logits


def tokens() -> tuple[Tensor, Tensor]:
    found = labels(10, COUNT, LENGTH, classes=6) + 1
    return found.masked_fill(torch.arange(LENGTH) >= lengths(11)[:, None], 0), labels(12, COUNT)


def encoder() -> Problem:
    """Without nested tensors."""
    return Problem(model=Encoder(False), loss=nn.CrossEntropyLoss(), data=tokens())


def nested_encoder() -> Problem:
    """With them, as is the default."""
    return Problem(model=Encoder(True), loss=nn.CrossEntropyLoss(), data=tokens())


def each_unpadded(call: Call, data: Any) -> Tensor:
    """The mean over sentences, each without its padding."""
    ids, target = data
    found = [cross_entropy(call(ids[i, ids[i] != 0][None])[0], target[i]) for i in range(COUNT)]
    return torch.stack(found).mean()


class Attention(nn.Module):
    """MultiheadAttention whose weights are averaged into the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=WIDTH, vdim=WIDTH, batch_first=True, add_bias_kv=True)
        self.query = nn.Parameter(torch.randn(1, 2, 4))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found, weights = self.attention(self.query.expand(len(x), -1, -1), x, x)
        logits: Tensor = self.head(found.flatten(1)) * weights.square().sum((1, 2))[:, None]
        return logits


def attention() -> Problem:
    """Attention by a learnt query."""
    data = (drawn(13, COUNT, LENGTH, WIDTH), labels(14, COUNT))
    return Problem(model=Attention(), loss=nn.CrossEntropyLoss(), data=data)


def norms() -> Problem:
    """BatchNorm in 1 and 2 dimensions, GroupNorm, LayerNorm, weight norm, spectral norm, dropout."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.GroupNorm(2, 4),
        nn.Dropout2d(0.4),
        nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 6)),
        nn.LayerNorm(6),
        nn.Tanh(),
        nn.Dropout(0.4),
        nn.BatchNorm1d(6),
        nn.Linear(6, CLASSES),
    )
    data = (drawn(15, COUNT, 1, 6, 6), labels(16, COUNT))
    return Problem(model=network, loss=nn.CrossEntropyLoss(), data=data)


def each_normed(call: Call, data: Any) -> Tensor:
    """The mean over examples: torch's own weight norm has no derivative forward over reverse."""

    def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
        return v * g / v.flatten(1).norm(dim=1).view_as(g)

    with patch.object(torch, "_weight_norm", weight_norm):
        return each_class(call, data)


class Padded(nn.Module):
    """An embedding whose padding is summed with the rest, and a head, tied to it or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0, sparse=not tied)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.mix(self.embed(ids).sum(1))))
        return found


def tied() -> Problem:
    """Tied embeddings with padding."""
    return Problem(model=Padded(True), loss=nn.CrossEntropyLoss(), data=(tokens()[0], labels(17, COUNT, classes=7)))


def untied() -> Problem:
    """The same with a head of its own, and sparse gradients."""
    return replace(tied(), model=Padded(False))


def each_padded(call: Call, data: Any) -> Tensor:
    """The mean over sentences; padding is the constant 0, as torch has it in the embedding but not in the head."""

    def embedding(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return weight[ids] * (ids != 0)[..., None]

    with patch.object(F, "embedding", embedding):
        return each_class(call, data)


def bags() -> Problem:
    """Bags of embeddings."""
    model = nn.Sequential(nn.EmbeddingBag(7, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 7))
    return Problem(model=model, loss=nn.CrossEntropyLoss(), data=tied().data)


def each_bag(call: Call, data: Any) -> Tensor:
    """The mean over bags, each a mean of rows: torch's own has no second derivative."""

    def embedding_bag(ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([weight[row[row != 0]].mean(0) for row in ids])

    with patch.object(F, "embedding_bag", embedding_bag):
        return each_class(call, data)


MODELS: list[tuple[Callable[[], Problem], Mean]] = [
    (lstm, each_class),
    (gru, each_token),
    (packed_lstm, each_packed_token),
    (packed_gru, each_packed),
    (encoder, each_unpadded),
    (nested_encoder, each_unpadded),
    (attention, each_class),
    (norms, each_normed),
    (tied, each_padded),
    (untied, each_padded),
    (bags, each_bag),
]


@pytest.mark.parametrize(("problem", "mean"), MODELS)
def test_the_eigenvalues_are_those_of_the_dense_hessian(
    problem: Callable[[], Problem], mean: Mean, tmp_path: Path
) -> None:
    """At the file's weights, whatever the kernels, masks and layers that behave otherwise in training."""
    path = saved(tmp_path, problem)
    exact = reference(path, problem, mean)
    found = eigenvalues(path, problem)
    assert found == pytest.approx(exact, rel=1e-6)


def test_differences_hold_padding_still(tmp_path: Path) -> None:
    """A step along a row that has no gradient would show the loss's slope in it, which is no part of the Hessian."""
    path = saved(tmp_path, untied)
    found = eigenvalues(path, untied, "--operator", "finite-difference", tol="1e-5")
    assert found == pytest.approx(reference(path, untied, each_padded), rel=1e-5)
