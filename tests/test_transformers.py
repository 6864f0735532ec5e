"""Models of Hugging Face's transformers, as save_pretrained leaves them, through the command line."""

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
from dense import dense_hessian, top
from sharpscope import Problem, TokenCrossEntropy

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH = 11, 8
Mean = Callable[[Callable[..., Any], Any], Tensor]


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


def drawn(problem: Callable[[], Problem]) -> Any:
    """The problem's model away from its start, where norms are 1 and biases 0; attention is eager, for the oracle."""
    torch.manual_seed(5)
    model: Any = problem().model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(("problem", "mean"), MODELS)
def test_the_eigenvalues_are_those_of_the_dense_hessian(
    problem: Callable[[], Problem], mean: Mean, tmp_path: Path
) -> None:
    """The folder of save_pretrained, measured with padding and in batches, gives the spectrum without either."""
    model, data = drawn(problem), problem().data
    # Its names of today, not of the files of older versions, which differ for ViT.
    model.save_pretrained(tmp_path / "weights", save_original_format=False)
    exact = top(dense_hessian(model, lambda call: mean(call, data)))
    assert eigenvalues(tmp_path / "weights", problem) == pytest.approx(exact.tolist(), rel=1e-6)


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
        ("sharpness", ("--m", "1")),
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
