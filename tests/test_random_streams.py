"""Random numbers: each use has a stream of its own, which is none that the user's data or weights may come from."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sharpscope
from sharpscope import Problem, SharpnessMonitor, measure_sharpness, spectral_density, trace
from sharpscope.checkpoint import read_checkpoint, write_checkpoint
from sharpscope.cli import main
from sharpscope.linalg import lanczos_quadrature, top_eigenpairs, trace_and_frobenius
from sharpscope.random_streams import derived_seed, stream, stream_from
from sharpscope.slices import random_directions
from sharpscope.training import Recipe, train
from sharpscope.zoo import load_data, make_model

NOISE = 0.2
PURPOSES = ("examples", "label noise", "weights", "order", "dropout", "directions", "eigenvalues", "trace", "density")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlp of digits, a fifth of whose labels are wrong, all seeds at their defaults."""
    path = tmp_path_factory.mktemp("noisy") / "noisy.pt"
    train(Recipe(model="mlp", model_args={"hidden": (16,)}, epochs=10, label_noise=NOISE), path)
    return path


def wrong(inputs: Tensor, labels: Tensor) -> float:
    """The share of wrong labels, found by looking the images up in the clean data."""
    clean = load_data("digits")
    known = {image.numpy().tobytes(): int(label) for image, label in zip(clean.inputs, clean.targets, strict=True)}
    return float(np.mean([known[x.numpy().tobytes()] != int(y) for x, y in zip(inputs, labels, strict=True)]))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sample_has_its_share_of_wrong_labels(noisy: Path, seed: int) -> None:
    """Of 200 examples with any seed 20 % are wrong within four standard deviations, by load and by the monitor."""
    bound = 4 * (NOISE * (1 - NOISE) / 200) ** 0.5
    assert abs(wrong(*sharpscope.load(noisy, examples=200, seed=seed).data) - NOISE) < bound
    whole = sharpscope.load(noisy)
    optimizer = torch.optim.SGD(whole.model.parameters(), lr=0.1)
    monitor = SharpnessMonitor(whole, optimizer, every=1, examples=200, seed=seed)
    inputs, labels = (torch.cat(part) for part in zip(*monitor.sample, strict=True))
    assert abs(wrong(inputs, labels) - NOISE) < bound


def test_the_command_s_sample_has_the_loss_of_the_data(noisy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``eigen --examples 200`` measures a loss within four standard errors of that of all the data."""
    assert main(["eigen", str(noisy), "--examples", "200", "--k", "1", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["loss"]
    problem = sharpscope.load(noisy)
    inputs, labels = problem.data
    with torch.no_grad():
        losses = nn.functional.cross_entropy(problem.model.eval()(inputs), labels, reduction="none")
    assert abs(measured - float(losses.mean())) < 4 * float(losses.std()) / 200**0.5


def test_no_stream_is_one_of_small_seeds() -> None:
    """No purpose with a seed up to 20 gives the numbers of torch, NumPy or random with a seed up to 2,000."""
    drawn = {tuple(torch.rand(3, generator=stream(s, name)).tolist()) for s in range(21) for name in PURPOSES}
    assert len(drawn) == 21 * len(PURPOSES)
    for seed in range(2001):
        assert tuple(torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()) not in drawn
    small = {float(np.random.default_rng(s).random()) for s in range(2001)} | {
        random.Random(s).random() for s in range(2001)
    }
    assert not small & {
        float(torch.rand((), generator=stream(s, n), dtype=torch.float64)) for s in range(21) for n in PURPOSES
    }


def test_purposes_and_indices_do_not_run_together() -> None:
    """Different seeds, purposes and indices have different seeds, also where their digits are the same."""
    asked = list(itertools.product((0, 1, 11), ("a", "ab", "b"), ((), (0,), (1,), (1, 1), (98,))))
    assert len({derived_seed(seed, name, *index) for seed, name, index in asked}) == len(asked)


def test_one_generator_for_two_analyses_gives_two_streams() -> None:
    """A generator that is passed on moves on: a second call with it draws other numbers, and an equal one the same."""
    shared = torch.Generator().manual_seed(3)
    first, second = (torch.rand(2, generator=stream_from(shared, "probes")).tolist() for _ in range(2))
    again = torch.rand(2, generator=stream_from(torch.Generator().manual_seed(3), "probes")).tolist()
    assert first == again
    assert first != second


class Linear(nn.Module):
    """A sum of squares of ``x @ w``, whose Hessian is ``2/N X'X``."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def drawn_by_the_user(seed: int, rows: int = 8, n: int = 400) -> Problem:
    torch.manual_seed(seed)
    data = torch.randn(rows, n, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    return Problem(model=Linear(n), loss=nn.MSELoss(), data=data)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_probes_are_not_rows_of_data_drawn_with_the_same_seed(seed: int) -> None:
    """On data of ``torch.manual_seed(s)`` trace and density of seed s have the trace within five standard errors."""
    problem = drawn_by_the_user(seed)
    truth = 2 * float(problem.data[0].square().sum()) / len(problem.data[0])
    found = trace(problem, 8, torch.Generator().manual_seed(seed)).trace
    assert abs(found.value - truth) < 5 * found.standard_error
    found = spectral_density(problem, 8, 6, torch.Generator().manual_seed(seed)).trace
    assert abs(found.value - truth) < 5 * found.standard_error
    found = next(iter(measure_sharpness(problem, "trace", torch.Generator().manual_seed(seed), probes=8).measures))
    assert found.standard_error is not None
    assert abs(found.value - truth) < 5 * found.standard_error


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_solvers_own_start_is_not_the_user_s(seed: int) -> None:
    """For H = x x', x of ``torch.manual_seed(s)``, no first block of linalg has a row with a cosine near 1 to x."""
    n = 300
    torch.manual_seed(seed)
    x = torch.randn(n, 1, dtype=torch.float64)
    seen: list[float] = []

    def products(block: Tensor) -> Tensor:
        if not seen or seen[-1] != -1.0:
            seen.append(float((x.T @ block / x.norm() / block.norm(dim=0)).abs().max()))
            seen.append(-1.0)
        return x @ (x.T @ block)

    generator = lambda: torch.Generator().manual_seed(seed)  # noqa: E731
    for analysis in (
        lambda: top_eigenpairs(products, n, 1, generator=generator()),
        lambda: trace_and_frobenius(products, n, 4, generator=generator()),
        lambda: lanczos_quadrature(products, n, 4, 3, generator=generator()),
    ):
        seen.clear()
        analysis()
        assert seen[0] < 0.3


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_random_direction_is_not_the_weights(seed: int) -> None:
    """Weights of ``torch.manual_seed(s)`` or ``make_model(seed=s)`` and a direction of seed s are nearly orthogonal."""
    torch.manual_seed(seed)
    own = nn.Linear(50, 40, bias=False).double()
    with torch.no_grad():
        own.weight.copy_(torch.randn(40, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    bundled = make_model("mlp", seed=seed, hidden=(32,))
    for model in (own, bundled):
        problem = Problem(model=model, loss=nn.MSELoss(), data=(torch.zeros(1, 50), torch.zeros(1, 40)))
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        (direction,) = random_directions(problem, 1, torch.Generator().manual_seed(seed), normalisation="model")
        cosine = float(direction.vector @ weights / direction.vector.norm() / weights.norm())
        assert abs(cosine) < 0.15


def test_wrong_labels_of_earlier_files_stay_theirs(noisy: Path, tmp_path: Path) -> None:
    """A file without ``noise_version``, of 0.1.0, is measured on, and goes on with, the labels that 0.1.0 drew."""
    contents = read_checkpoint(noisy)
    old = tmp_path / "old.pt"
    spec = {"name": "digits", "label_noise": NOISE, "noise_seed": 5}
    write_checkpoint(
        old,
        state_dict=contents.state_dict,
        model="mlp",
        model_args=contents.model_args,
        data=spec,
        recipe=contents.recipe,
    )
    clean, generator = load_data("digits"), torch.Generator().manual_seed(5)
    chosen = torch.randperm(len(clean), generator=generator)[: round(NOISE * len(clean))]
    expected = clean.targets.clone()
    expected[chosen] += torch.randint(1, 10, (len(chosen),), generator=generator)
    assert torch.equal(sharpscope.load(old).data[1], expected % 10)
    assert not torch.equal(load_data("digits", label_noise=NOISE, noise_seed=5).targets, expected % 10)
