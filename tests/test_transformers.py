"""Models of Hugging Face's transformers, as save_pretrained leaves them, through the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from command import Mean, eigenvalues
from dense import dense_hessian, top
from language import VOCABULARY, WIDTH, causal_batches, drawn, gpt2, next_tokens, sentences
from sharpscope import Problem, TokenCrossEntropy
from sharpscope.checkpoint import load_weights
from sharpscope.errors import CheckpointError

transformers = pytest.importorskip("transformers")


def llama() -> Problem:
    """Llama with grouped queries, RMSNorm and rotary positions; embeddings and head apart."""
    return Problem(
        model=transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=16,
                attention_dropout=0.2,
            )
        ),
        loss=TokenCrossEntropy(shift=True),
        data=causal_batches(),
    )


def mixtral() -> Problem:
    """Mixtral, which chooses two of three experts for each token."""
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return replace(llama(), model=transformers.MixtralForCausalLM(config))


def mixtral_eager() -> Problem:
    """The same, each expert by itself."""
    problem: Any = mixtral()
    problem.model.set_experts_implementation("eager")
    return problem  # type: ignore[no-any-return]


BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
}


def pairs() -> dict[str, Tensor]:
    """Sentences of two segments each, with a class."""
    source = torch.Generator().manual_seed(4)
    kinds = (torch.arange(6) > torch.randint(1, 5, (9, 1), generator=source)).long()
    return sentences(9, 6, 3, token_type_ids=kinds, labels=torch.randint(0, 3, (9,), generator=source))


def classifier(loss: Callable[..., Any] | None = None) -> Problem:
    """BERT that classifies pairs of sentences."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3))
    return Problem(model=model, loss=loss or nn.CrossEntropyLoss(), data=pairs())


def own_loss() -> Problem:
    """The same, measured by the loss that the model returns itself."""
    return classifier(lambda output, target: output.loss)


def classes(call: Callable[..., Any], data: Any) -> Tensor:
    """The mean over pairs, one by one without padding."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(9):
        length = int(data["attention_mask"][i].sum())
        given = {k: data[k][i : i + 1, :length] for k in ("input_ids", "token_type_ids")}
        total = total - call(**given).logits[0].log_softmax(0)[int(data["labels"][i])]
    return total / 9


def gaps() -> list[dict[str, Tensor]]:
    """Sentences with tokens masked out (id 1), and labels there alone."""
    batches = [sentences(4, 6, 5), sentences(3, 5, 6)]
    for batch in batches:
        hidden = torch.rand(batch["input_ids"].shape, generator=torch.Generator().manual_seed(7)) < 0.4
        hidden &= batch["attention_mask"] == 1
        batch["labels"] = batch["input_ids"].masked_fill(~hidden, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 1)
    return batches


def masked() -> Problem:
    """BERT that fills gaps; its decoder's bias is tied too."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT))
    return Problem(model=model, loss=TokenCrossEntropy(), data=gaps())


def hidden_tokens(call: Callable[..., Any], data: Any) -> Tensor:
    """The mean over gaps."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in data:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            logits = call(input_ids=ids[None, : int(mask.sum())]).logits[0].log_softmax(-1)
            for t in (labels != -100).nonzero()[:, 0].tolist():
                total, count = total - logits[t, int(labels[t])], count + 1
    return total / count


def images() -> dict[str, Tensor]:
    """Images of one channel and three classes."""
    source = torch.Generator().manual_seed(8)
    pixels = torch.randn(10, 1, 8, 8, generator=source)
    return {"pixel_values": pixels, "labels": torch.randint(0, 3, (10,), generator=source)}


def vit() -> Problem:
    """A vision transformer of four patches."""
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    return Problem(model=transformers.ViTForImageClassification(config), loss=nn.CrossEntropyLoss(), data=images())


def image_classes(call: Callable[..., Any], data: Any) -> Tensor:
    """The mean over images, one by one."""
    each = [
        -call(pixel_values=data["pixel_values"][i : i + 1]).logits[0].log_softmax(0)[int(data["labels"][i])]
        for i in range(10)
    ]
    return torch.stack(each).mean()


def translations() -> list[dict[str, Tensor]]:
    """Source sentences, and target ones as labels, of which the model makes its decoder's inputs."""
    batches = [sentences(4, 6, 9), sentences(3, 5, 10)]
    for batch, target in zip(batches, (sentences(4, 5, 11), sentences(3, 4, 12)), strict=True):
        batch["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    return batches


def t5() -> Problem:
    """T5, whose relative positions are learnt."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=8,
        decoder_start_token_id=0,
        dropout_rate=0.2,
    )
    return Problem(model=transformers.T5ForConditionalGeneration(config), loss=TokenCrossEntropy(), data=translations())


def translated(call: Callable[..., Any], data: Any) -> Tensor:
    """The mean over target tokens, the decoder given what is before each."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in data:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            target = labels[labels != -100]
            before = torch.cat([torch.zeros(1, dtype=torch.long), target[:-1]])
            logits = call(input_ids=ids[None, : int(mask.sum())], decoder_input_ids=before[None]).logits[0]
            for t, label in enumerate(target.tolist()):
                total, count = total - logits[t].log_softmax(0)[label], count + 1
    return total / count


MODELS: list[tuple[Callable[[], Problem], Mean]] = [
    (gpt2, next_tokens),
    (llama, next_tokens),
    (classifier, classes),
    (own_loss, classes),
    (masked, hidden_tokens),
    (vit, image_classes),
    (t5, translated),
]


@pytest.mark.parametrize(("problem", "mean"), MODELS)
def test_the_eigenvalues_are_those_of_the_dense_hessian(
    problem: Callable[[], Problem], mean: Mean, tmp_path: Path
) -> None:
    """The folder of save_pretrained, measured with padding and in batches, gives the spectrum without either."""
    model, data = drawn(problem), problem().data
    model.save_pretrained(tmp_path / "weights")  # under the names of older versions, which differ for ViT
    exact = top(dense_hessian(model, lambda call: mean(call, data)))
    assert eigenvalues(tmp_path / "weights", problem) == pytest.approx(exact.tolist(), rel=1e-6)


def test_experts_in_groups_are_those_alone(tmp_path: Path) -> None:
    """torch's grouped product, which it has in float32 alone, is the experts' own in float64 too."""
    model = drawn(mixtral)
    torch.save(model.state_dict(), tmp_path / "mixtral.pt")
    one, two = (
        eigenvalues(tmp_path / "mixtral.pt", problem, "--k", "1", tol="1e-6") for problem in (mixtral, mixtral_eager)
    )
    assert one == pytest.approx(two, rel=1e-9)


def test_weights_that_transformers_would_make_up_are_missing() -> None:
    """What a class of transformers lets its files lack in silence is named, not left at its initial values."""

    class Lenient(transformers.GPT2LMHeadModel):  # type: ignore[misc, name-defined]
        _keys_to_ignore_on_load_missing = ("ln_f",)

    config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    state = transformers.GPT2LMHeadModel(config).state_dict()
    with pytest.raises(CheckpointError, match=r"misses 2 .*ln_f"):
        load_weights(Lenient(config), {key: value for key, value in state.items() if "ln_f" not in key})
