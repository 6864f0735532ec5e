"""The cross-entropy of a sequence's tokens, as language models and token classifiers have it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sharpscope.errors import ArgumentError
from sharpscope.objective.logits import output_tensor


class TokenCrossEntropy(nn.Module):
    """``-log softmax(z_bt)[y_bt]`` (nats), the mean over the tokens t of all sequences b that are not ignored.

    Takes logits (B, T, V), or an output with ``.logits``, and labels (B, T), on which torch's own cross-entropy wants
    (B, V, T). A batch counts by its tokens that are not ignored, whatever the padding.

    Args:
        shift: compare the logits of a token with the label of the next, as a causal language model does whose labels
            are its input; the first label is then no loss term.
        ignore_index: the label that is no loss term.
        label_smoothing: as in ``torch.nn.CrossEntropyLoss``.

    Raises: ArgumentError for a smoothing outside 0..1.

    >>> import sharpscope
    >>> import torch
    >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]])
    >>> sharpscope.TokenCrossEntropy()(logits, labels)  # log 4: four words, all as likely
    tensor(1.3863)
    """

    def __init__(self, shift: bool = False, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"label_smoothing must be from 0 to 1, got {label_smoothing}.")
        self.shift, self.ignore_index, self.label_smoothing = shift, ignore_index, label_smoothing

    def forward(self, output: Any, target: Tensor) -> Tensor:
        """The mean over the tokens of one batch."""
        flat, labels = output_tensor(output).flatten(0, -2), self.aligned(target).flatten()
        return F.cross_entropy(flat, labels, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing)

    def aligned(self, target: Tensor) -> Tensor:
        """The label (B, T) of each of the logits: with ``shift`` that of the next token, and none for the last."""
        return F.pad(target[:, 1:], (0, 1), value=self.ignore_index) if self.shift else target
