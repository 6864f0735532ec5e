"""top_eigenvalues where a subset of many data guides it, and what it says of what it may have missed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import tiny_mlp
from dense import dense_hessian, top
from sharpscope import ArgumentError, ConvergenceWarning, EigenResult, Problem, top_eigenvalues

N = 6000


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def trained(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network trained on noisy labels of 6,000 points, and its data, in float64."""
    draw = generator(seed)
    inputs = torch.randn(N, 8, generator=draw, dtype=torch.float64)
    scores = inputs @ torch.randn(8, 4, generator=draw, dtype=torch.float64)
    labels = (scores + torch.randn(N, 4, generator=draw, dtype=torch.float64)).argmax(1)
    model = tiny_mlp(8, 12, 4, seed=seed).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        chosen = torch.randint(N, (256,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, inputs, labels


def problem(seed: int = 0) -> Problem:
    model, inputs, labels = trained(seed)
    return Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, labels))


@cache
def dense(seed: int = 0) -> Tensor:
    model, inputs, labels = trained(seed)
    return dense_hessian(model, lambda call: F.cross_entropy(call(inputs), labels))


@cache
def truth(seed: int = 0) -> np.ndarray:
    return top(dense(seed)).numpy()


def inside(result: EigenResult, wanted: np.ndarray) -> bool:
    return bool(((result.lower <= wanted) & (wanted <= result.upper))[result.converged].all())


@pytest.mark.parametrize("seed", range(4))
def test_many_examples_are_measured_in_few_passes(seed: int) -> None:
    """The default on 6,000 examples agrees with the dense Hessian, in fewer gradients than Lanczos takes."""
    guided = top_eigenvalues(problem(seed), generator=generator(seed))
    lanczos = top_eigenvalues(problem(seed), method="lanczos", generator=generator(seed))
    for result in (guided, lanczos):
        assert result.converged.all()
        assert inside(result, truth(seed))
    assert (guided.provenance["method"], guided.provenance["subset"]) == ("guided", 512)
    assert guided.cost.gradients < lanczos.cost.gradients


def planted(seed: int, count: int = 60_000) -> Problem:
    """A linear classifier at zero weights, of whose examples four far-out ones carry lambda_max: 2.2, else 0.4."""
    draw = generator(seed)
    inputs = torch.randn(count, 10, generator=draw)
    far = torch.randn(10, generator=draw)
    inputs[torch.randperm(count, generator=draw)[:4]] = 320 * far / far.norm()
    model = nn.Linear(10, 3)
    nn.init.zeros_(model.weight)
    labels = torch.randint(3, (count,), generator=draw)
    return Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs, labels))


@pytest.mark.parametrize("seed", range(5))
def test_four_of_sixty_thousand_examples_that_carry_lambda_max_are_not_missed(seed: int) -> None:
    """The default finds what its subset most often has not: every example looks alike in the output."""
    made = planted(seed)
    inputs, labels = made.data
    exact = dense_hessian(made.model, lambda call: F.cross_entropy(call(inputs.double()), labels))
    made.model.float()
    result = top_eigenvalues(made, k=2, generator=generator(seed))
    wanted = top(exact, 2).numpy()
    assert wanted[0] > 4 * np.linalg.eigvalsh(exact.numpy())[-5]
    assert result.provenance["method"] == "guided"
    assert result.converged.all()
    assert inside(result, wanted)


def test_a_certificate_holds_or_finds_what_was_missed() -> None:
    """With certify, no eigenvalue above lambda_k + eps lambda_max is missing, and the probability is said."""
    result = top_eigenvalues(problem(), k=3, certify=0.05)
    proof = result.certificate
    assert proof is not None
    assert result.certified
    assert proof["probability"] <= 0.01
    assert proof["above"] == pytest.approx(result.upper[-1] + 0.05 * result.lambda_max)
    assert inside(result, truth()[:3])
    assert result.missed_probability is not None
    assert (np.diff(result.missed_probability) >= 0).all()
    assert "certificate" in result.summary()


def test_a_certificate_takes_in_what_the_solver_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guide that is blind to lambda_2 is made good: the probe finds it, and the values are the true ones."""
    from sharpscope.spectrum import eigenvalues

    vector = torch.linalg.eigh(dense())[1][:, -2]
    blind = dense() - truth()[1] * torch.outer(vector, vector)

    class Blind:
        num_examples = 0

        def __call__(self, rows: Tensor) -> Tensor:
            return rows @ blind

    monkeypatch.setattr(eigenvalues, "importance_samples", lambda *_: [Blind()])
    missed = 0
    for seed in range(8):
        plain = top_eigenvalues(problem(), k=2, tol=0.05, generator=generator(seed))
        missed += not inside(plain, truth()[:2])
        sure = top_eigenvalues(problem(), k=2, tol=0.05, generator=generator(seed), certify=0.02)
        assert inside(sure, truth()[:2])
    assert missed  # else this shows nothing


def test_what_was_missed_is_a_probability() -> None:
    """Every result of the largest says one for each eigenvalue; power iteration, which drew nothing that counts, 1."""
    guided, lanczos, power = (
        top_eigenvalues(problem(), k=2, tol=1e-2, method=method).missed_probability
        for method in ("guided", "lanczos", "power")
    )
    for said in (guided, lanczos):
        assert said is not None
        assert ((said > 0) & (said <= 1)).all()
        assert said[0] < 0.5
    assert power is not None
    assert (power == 1).all()


def test_a_sample_of_the_data_comes_with_intervals() -> None:
    """population=True brings se, lower and upper for each eigenvalue, around it, and the table shows them."""
    model, inputs, labels = trained()
    part = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs[:1000], labels[:1000]))
    result = top_eigenvalues(part, k=3, population=True)
    assert result.sampling is not None
    assert result.sampling["examples"] == 1000
    lower, upper = (np.array(result.sampling[name]) for name in ("lower", "upper"))
    assert ((lower < truth()[:3]) & (truth()[:3] < upper)).all()
    assert "of which these are 1000 examples" in result.summary()
    assert EigenResult.from_dict(result.to_dict()).to_dict() == result.to_dict()


def test_guided_needs_enough_examples() -> None:
    """Asked for by name on few examples it is refused; by itself the solver is Lanczos there."""
    model, inputs, labels = trained()
    few = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs[:400], labels[:400]))
    assert top_eigenvalues(few, k=1).provenance["method"] == "lanczos"
    with pytest.raises(ArgumentError, match="more than 512 examples"):
        top_eigenvalues(few, k=1, method="guided")


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, float("nan")])
def test_certify_out_of_range_is_refused(value: float) -> None:
    """certify is a fraction, and of the largest eigenvalues."""
    with pytest.raises(ArgumentError, match="between 0 and 1"):
        top_eigenvalues(problem(), certify=value)
    with pytest.raises(ArgumentError, match="which='largest'"):
        top_eigenvalues(problem(), certify=0.1, which="smallest")


@pytest.mark.parametrize("which", ["smallest", "both", "magnitude"])
def test_other_ends_agree_with_the_dense_hessian(which: str) -> None:
    """The smallest, both ends, and the largest in magnitude are those of the dense Hessian, by their names."""
    model, inputs, labels = trained()
    part = inputs[:600], labels[:600]
    exact = dense_hessian(model, lambda call: F.cross_entropy(call(part[0]), part[1]))
    spectrum = torch.linalg.eigvalsh(exact).numpy()
    measured = Problem(model=model, loss=nn.CrossEntropyLoss(), data=part)
    result = top_eigenvalues(measured, k=2, which=which, max_passes=300)
    wanted = {
        "smallest": spectrum[:2],
        "both": spectrum[[-1, -2, 1, 0]],
        "magnitude": sorted(spectrum, key=abs)[::-1][:2],
    }[which]
    assert np.abs(result.eigenvalues - wanted).max() < 2e-3 * np.abs(spectrum).max()
    names = {"smallest": "lambda_min", "both": "lambda_n-1", "magnitude": "lambda_(1)"}
    assert names[which] in result.summary()


def test_a_certificate_that_cannot_be_had_is_said() -> None:
    """Where passes run out before the proof, the result says so and a warning too; passes stay within the limit."""
    with pytest.warns(ConvergenceWarning, match="No certificate"):
        result = top_eigenvalues(problem(), k=2, certify=0.001, max_passes=9, micro_batch=256)
    assert not result.certified
    assert result.certificate is not None
    assert result.certificate["probability"] > 0.01
    assert result.converged.all()
    assert result.cost.passes <= 10  # one of them forward only
    assert "NO CERTIFICATE" in result.summary()


def test_only_the_largest_have_a_sampled_ratio() -> None:
    """lambda_max/lambda_k has an interval over the data where both are among the largest, else none."""
    model, inputs, labels = trained()
    part = Problem(model=model, loss=nn.CrossEntropyLoss(), data=(inputs[:1000], labels[:1000]))
    for which, there in (("both", True), ("smallest", False)):
        result = top_eigenvalues(part, k=2, which=which, population=True)
        assert result.sampling is not None
        assert (result.sampling["ratio"] is not None) is there
        if there:
            assert result.ratio.value is not None
            assert result.sampling["ratio"]["lower"] < result.ratio.value < result.sampling["ratio"]["upper"]
