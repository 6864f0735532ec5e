"""Language models' data, and GPT-2, small enough for a dense Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpscope import Problem, TokenCrossEntropy

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 11, 8


def sentences(count: int, length: int, seed: int, **others: Any) -> dict[str, Tensor]:
    """Token ids 3..10, padded with 0 on the right after a length of its own for each sentence."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=source)
    lengths = torch.randint(2, length + 1, (count, 1), generator=source)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask, **others}


def causal_batches() -> list[dict[str, Tensor]]:
    """Three batches of other sizes and padded lengths; labels are -100 on padding and on a prompt of one token."""
    batches = [sentences(5, 7, 0), sentences(2, 4, 1), sentences(1, 6, 2)]
    for batch in batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, 1] = -100
        batch["labels"] = labels
    return batches


def next_tokens(call: Callable[..., Any], data: Any) -> Tensor:
    """The mean over next tokens, sentence by sentence without its padding."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in data:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            logits = call(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
            for t in range(length - 1):
                if int(labels[t + 1]) != -100:
                    total, count = total - logits[t, int(labels[t + 1])], count + 1
    return total / count


def gpt2() -> Problem:
    """GPT-2 with tied embeddings and dropout, a causal mask and padding."""
    return Problem(
        model=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=8,
                n_embd=WIDTH,
                n_layer=1,
                n_head=2,
                resid_pdrop=0.2,
                embd_pdrop=0.2,
                attn_pdrop=0.2,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        loss=TokenCrossEntropy(shift=True),
        data=causal_batches(),
    )


def drawn(problem: Callable[[], Problem]) -> Any:
    """The problem's model away from its start, where norms are 1 and biases 0; attention is eager, for the oracle."""
    torch.manual_seed(5)
    model: Any = problem().model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model
