"""PyTorch's own layers of sequences, from a state dict on disk through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from command import Call, Mean, cross_entropy, each_class, eigenvalues, reference, saved
from sequences import CLASSES, COUNT, LENGTH, WIDTH, drawn, labels, lengths, tokens
from sharpscope import Problem, TokenCrossEntropy


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


MODELS: list[tuple[Callable[[], Problem], Mean]] = [
    (lstm, each_class),
    (gru, each_token),
    (packed_lstm, each_packed_token),
    (packed_gru, each_packed),
    (encoder, each_unpadded),
    (nested_encoder, each_unpadded),
    (attention, each_class),
]


@pytest.mark.parametrize(("problem", "mean"), MODELS)
def test_the_eigenvalues_are_those_of_the_dense_hessian(
    problem: Callable[[], Problem], mean: Mean, tmp_path: Path
) -> None:
    """At the file's weights, with masks and packing, from a state that forward makes."""
    path = saved(tmp_path, problem)
    exact = reference(path, problem, mean)
    found = eigenvalues(path, problem)
    assert found == pytest.approx(exact, rel=1e-6)
