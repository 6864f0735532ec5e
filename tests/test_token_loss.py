"""The loss of a sequence's tokens counts tokens, next ones too, and ignores what is padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import sharpscope
import sharpscope.operators
from dense import dense_hessian, top
from sharpscope import Objective, Problem, TokenCrossEntropy, top_eigenvalues

VOCABULARY, LENGTH = 5, 6


class Tagger(nn.Module):
    """Embeds each token, mixes along the sequence, and scores every class for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, VOCABULARY)

    def forward(self, tokens: Tensor) -> Any:
        found = self.embed(tokens)
        return SimpleNamespace(logits=self.head(torch.tanh(self.mix(found + found.cumsum(1)))))


def sentences(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which every sentence ignores another number."""
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (9, LENGTH), generator=source)
    lengths = torch.randint(1, LENGTH + 1, (9, 1), generator=source)
    return tokens, tokens.masked_fill(torch.arange(LENGTH) >= lengths, -100)


def model(seed: int = 0) -> Tagger:
    torch.manual_seed(seed)
    return Tagger()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("batch", [9, 4, 1])
def test_tokens_are_the_terms(shift: bool, batch: int) -> None:
    """However the sentences are batched, the Hessian is that of the mean over all tokens that are not ignored."""
    tokens, labels = sentences()
    problem = Problem(
        model=model(),
        loss=TokenCrossEntropy(shift=shift),
        data=list(zip(tokens.split(batch), labels.split(batch), strict=True)),
    )
    found = top_eigenvalues(problem, k=5, tol=1e-8, dtype=torch.float64, micro_batch=2)

    def mean(call: Any) -> Tensor:
        total = count = 0
        logits = call(tokens).logits.log_softmax(-1)
        for b in range(9):
            for t in range(LENGTH - shift):
                label = int(labels[b, t + shift])
                if label != -100:
                    total, count = total - logits[b, t, label], count + 1
        return torch.as_tensor(total / count)

    exact = top(dense_hessian(model(), mean))
    assert found.eigenvalues == pytest.approx(exact.numpy(), rel=1e-6)


@pytest.mark.parametrize("operator", ["ggn", "empirical-fisher"])
def test_matrices_on_the_output_see_the_tokens(operator: str) -> None:
    """Gauss-Newton and empirical Fisher are the sums over tokens of J' M J and g g'."""
    tokens, labels = sentences(1)
    network = model(1).double()
    problem = Problem(model=network, loss=TokenCrossEntropy(shift=True), data=(tokens, labels))
    names = dict(network.named_parameters())

    def logits(params: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(network, params, (tokens,)).logits[:, :-1].reshape(-1, VOCABULARY)
        return out

    jacobian = torch.cat([j.flatten(2) for j in jacrev(logits)(names).values()], 2).detach()
    z, target = logits(names).detach(), labels[:, 1:].flatten()
    exact = torch.zeros(jacobian.shape[2], jacobian.shape[2], dtype=torch.float64)
    for i in (target != -100).nonzero()[:, 0]:
        p = z[i].softmax(0)
        if operator == "ggn":
            middle = torch.diag(p) - torch.outer(p, p)
        else:
            g = p - nn.functional.one_hot(target[i], VOCABULARY)
            middle = torch.outer(g, g)
        exact += jacobian[i].T @ middle @ jacobian[i] / int((target != -100).sum())
    objective = Objective(problem, curvature=sharpscope.operators.curvature(operator))
    found = objective.hvp(torch.eye(objective.num_params, dtype=torch.float64))
    assert torch.allclose(found, exact, atol=1e-10)


def test_the_mean_of_one_batch_is_its_forward() -> None:
    """Called by itself the loss is the mean that the Problem has."""
    tokens, labels = sentences(2)
    loss = TokenCrossEntropy(shift=True, label_smoothing=0.1)
    value, _ = Objective(Problem(model=model(), loss=loss, data=(tokens, labels))).loss_and_gradient()
    assert value == pytest.approx(loss(model()(tokens), labels).item(), rel=1e-6)


def test_accuracy_is_of_the_next_token() -> None:
    """The accuracy along a slice counts right next tokens among those that are not ignored."""
    tokens, labels = sentences(3)
    network = model(3)
    problem = Problem(model=network, loss=TokenCrossEntropy(shift=True), data=(tokens, labels))
    result = sharpscope.loss_slice(problem, points=3)
    right, counted = network(tokens).logits[:, :-1].argmax(-1) == labels[:, 1:], labels[:, 1:] != -100
    assert result.accuracy.flatten()[1] == pytest.approx(float((right & counted).sum() / counted.sum()))


def test_another_form_is_named() -> None:
    """Logits without a dimension of tokens end in a sentence that shows both shapes."""
    problem = Problem(model=nn.Linear(3, 2), loss=TokenCrossEntropy(), data=(torch.ones(4, 3), torch.zeros(4).long()))
    with pytest.raises(sharpscope.ProblemError, match=r"logits \(B, T, V\) and labels \(B, T\), got \(4, 2\)"):
        top_eigenvalues(problem, k=1)
