"""A run that is killed goes on where it was."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import processes
from conftest import classifier
from sharpscope import Objective, Problem, top_eigenvalues
from sharpscope.fingerprint import key_of, probe
from sharpscope.operators import curvature
from sharpscope.resume import Journal, journaled_hvp
from sharpscope.training import Recipe, train


def entries(folder: Path) -> int:
    return len(list(folder.glob("[0-9]*.entry")))


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_three_times_the_command_ends_with_the_same_values(tmp_path: Path) -> None:
    """kill -9 at three random moments: the same eigenvalues bit for bit, and the state is gone when all is done."""
    checkpoint, plain, killed = tmp_path / "a.pt", tmp_path / "plain.json", tmp_path / "killed.json"
    train(Recipe(model="cnn", model_args={"channels": (3, 4), "hidden": 8}, epochs=2), checkpoint)
    state = killed.with_name("killed.json.partial")
    measured = ["eigen", str(checkpoint), "--examples", "300", "--tol", "1e-5", "--out"]
    processes.finished(*measured, str(plain))
    draw, before = random.Random(0), 0
    for _ in range(3):
        run = processes.command(*measured, str(killed))
        wanted = before + 1 + draw.randrange(2)
        while entries(state) < wanted and run.is_alive():
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        run.kill()
        run.join()
        assert not killed.exists()
        assert entries(state) >= wanted  # what was finished is not lost
        before = entries(state)
    processes.finished(*measured, str(killed))
    first, second = (json.loads(path.read_text()) for path in (plain, killed))
    for name in ("eigenvalues", "residuals", "lower", "upper", "loss", "gradient_norm"):
        assert first[name] == second[name], name
    assert {k: v for k, v in first["cost"].items() if k != "seconds"} == {
        k: v for k, v in second["cost"].items() if k != "seconds"
    }
    assert not state.exists()


def test_no_finished_pass_is_repeated_and_nothing_else_reused(tmp_path: Path) -> None:
    """A second call with the same journal walks the data for key, audit and memory alone; other weights start anew."""
    base = classifier(examples=300)
    walks = 0

    class Counting:
        def __iter__(self):  # type: ignore[no-untyped-def]
            nonlocal walks
            walks += 1
            return iter([base.data])

    def measured() -> tuple[list[float], int]:
        nonlocal walks
        walks = 0
        problem = replace(base, data=Counting())
        return top_eigenvalues(problem, k=2, journal=tmp_path / "state").eigenvalues.tolist(), walks

    first, again = measured(), measured()
    assert first[0] == again[0]
    assert again[1] == 5 < first[1]  # key, probe, audit twice, memory
    with torch.no_grad():
        next(base.model.parameters()).mul_(1.5)
    changed = measured()
    assert changed[0] != first[0]
    assert changed[1] > 5


def test_another_loss_of_the_same_name_reuses_nothing(tmp_path: Path) -> None:
    """What a loss computes decides, not what it is called: label smoothing and a factor in a closure are seen."""
    base = classifier(examples=300)

    def times(factor: float):  # type: ignore[no-untyped-def]
        return lambda output, target: factor * nn.functional.cross_entropy(output, target)

    weighted = (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, w])) for w in (1.0, 50.0))
    base.data[1][:260] = torch.randint(2, (260,))  # the probe's examples have no label 2
    smoothed = (nn.CrossEntropyLoss(label_smoothing=s) for s in (0.0, 0.3))
    for one, other in (tuple(weighted), tuple(smoothed), (times(1.0), times(3.0))):
        state = tmp_path / "state"
        top_eigenvalues(replace(base, loss=one), k=1, journal=state)
        alone = top_eigenvalues(replace(base, loss=other), k=1)
        again = top_eigenvalues(replace(base, loss=other), k=1, journal=state)
        assert again.eigenvalues.tolist() == alone.eigenvalues.tolist()
        assert again.loss == alone.loss


def test_a_forward_pass_of_other_code_reuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same weights and attributes, a changed forward pass starts anew; unchanged, the passes are used."""
    model, data = network(), classes()

    def tops() -> list[float]:
        problem = Problem(model=model, loss=nn.CrossEntropyLoss(), data=data)
        return top_eigenvalues(problem, k=1, journal=tmp_path).eigenvalues.tolist()

    first, written = tops(), entries(tmp_path)
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    assert tops() == first
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == stamps
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: torch.sin(3 * x))
    changed = tops()
    assert written >= 2
    assert changed == top_eigenvalues(Problem(model=model, loss=nn.CrossEntropyLoss(), data=data), k=1).eigenvalues
    assert changed != pytest.approx(first, rel=1e-2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


def classes() -> tuple[Tensor, Tensor]:
    """300 examples, of which the first 260 have no label 2."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=draw)
    labels[:260] %= 2
    return torch.randn(300, 4, generator=draw), labels


class Weighted:
    """A loss that is no module, with a weight of the label 2."""

    def __init__(self, rare: float) -> None:
        self._options = {"weights": [1.0, 1.0, rare]}

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return (torch.tensor(self._options["weights"])[target] * losses).mean()

    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target)


class Around:
    """A loss that is no module, around one."""

    def __init__(self, rare: float) -> None:
        self.inner = nn.CrossEntropyLoss(weight=weights(rare))

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.inner(output, target)


def weights(rare: float) -> Tensor:
    return torch.tensor([1.0, 1.0, rare])


def enclosing(rare: float) -> Callable[[Tensor, Tensor], Tensor]:
    weight = [1.0, 1.0, rare]
    return lambda output, target: nn.functional.cross_entropy(output, target, weight=torch.tensor(weight))


HELD: dict[str, Callable[[float], dict[str, Any]]] = {
    "a module": lambda x: {"loss": nn.CrossEntropyLoss(weight=weights(x))},
    "an option": lambda x: {"loss": nn.CrossEntropyLoss(ignore_index=int(-x))},
    "a partial": lambda x: {"loss": partial(nn.functional.cross_entropy, weight=weights(x))},
    "an object": lambda x: {"loss": Weighted(x)},
    "an object's module": lambda x: {"loss": Around(x)},
    "a method": lambda x: {"loss": Weighted(x).method},
    "a layer": lambda x: {"model": with_attribute(lambda layer: setattr(layer, "p", 0.1 / x))},
    "an array": lambda x: {"model": with_attribute(lambda layer: setattr(layer, "_scale", np.array([1.0, x])))},
    "a NumPy number": lambda x: {"model": with_attribute(lambda layer: setattr(layer, "_scale", np.float32(x)))},
    "a record": lambda x: {"model": with_attribute(lambda layer: setattr(layer, "_config", SimpleNamespace(rare=x)))},
    "a set": lambda x: {"model": with_attribute(lambda layer: setattr(layer, "_classes", {x}))},
    "a variable of a function": lambda x: {"loss": enclosing(x)},
    "a buffer": lambda x: {"model": with_attribute(lambda m: m.register_buffer("own", weights(x), persistent=False))},
}


def with_attribute(change: Callable[[nn.Module], Any]) -> nn.Module:
    model = network()
    change(model[2])
    return model


@pytest.mark.parametrize("what", HELD)
def test_a_value_that_no_probe_example_needs_changes_the_key(what: str) -> None:
    """Attributes and tensors of model and loss are part of the key though the probe computes the same numbers."""

    def made(value: float) -> Objective:
        return Objective(
            Problem(**{"model": network(), "loss": nn.CrossEntropyLoss(), "data": classes(), **HELD[what](value)})
        )

    one, same, other = (made(x) for x in (1.0, 1.0, 50.0))
    assert all(torch.equal(a, b) for a, b in zip(probe(one), probe(other), strict=True))
    assert key_of(one) == key_of(same) != key_of(other)


@pytest.mark.parametrize("operator", ["hessian", "ggn", "finite-difference"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_probe_leaves_no_trace(operator: str, dtype: torch.dtype | None) -> None:
    """Cost, micro-batch, weights, buffers, modes and random states are those of before, within measuring() too."""
    model = nn.Sequential(network(), nn.BatchNorm1d(3))
    objective = Objective(
        Problem(model=model, loss=nn.CrossEntropyLoss(), data=classes()), dtype=dtype, curvature=curvature(operator)
    )
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    loss, weight, gradient, products = probe(objective)
    with objective.measuring():
        again = probe(objective)
    assert all(torch.equal(a, b) for a, b in zip((loss, weight, gradient, products), again, strict=True))
    assert (float(weight), gradient.shape, products.shape) == (32, (objective.num_params,), (1, objective.num_params))
    assert float(products.norm()) > 0
    assert (objective.passes, objective.hvps, objective.gradients) == (0, 0, 0)
    assert (objective.micro_batch, objective.last_pass, objective.loss) == (None, None, None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not torch.are_deterministic_algorithms_enabled()


class Once(torch.autograd.Function):
    """Twice its input, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("derivative for twice_backward is not implemented")
        return 2 * grad


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda x: x, [True, True, True, True]),
        (Once.apply, [True, True, True, False]),
        (lambda x: x.detach(), [True, True]),
        (lambda x: x[:, :0], []),
    ],
    ids=["all", "no second derivative", "no derivative", "no loss"],
)
def test_a_probe_sees_what_the_model_can_give(change: Callable[[Tensor], Tensor], found: list[bool]) -> None:
    """Without a product loss and gradient tell codes apart, without a gradient the loss does."""

    def probed(factor: float) -> list[Tensor]:
        def loss(output: Tensor, target: Tensor) -> Tensor:
            return nn.functional.cross_entropy(factor * change(output), target)

        return probe(Objective(Problem(model=network(), loss=loss, data=classes())))

    one, other = probed(1.0), probed(1.5)
    assert [tensor.numel() > 0 for tensor in one] == found
    assert found == [] or not torch.equal(one[0], other[0])


def test_a_stored_pass_leaves_the_objective_as_the_computed_one(tmp_path: Path) -> None:
    """Product, loss, gradient, cost and micro-batch come back, and a computed pass goes on from them."""

    def measured(blocks: int) -> tuple[list[Tensor], Objective, list[str]]:
        problem, stages = Problem(model=network(), loss=nn.CrossEntropyLoss(), data=classes()), []
        objective = Objective(problem)
        journal = Journal(tmp_path, key_of(objective))
        with objective.measuring():
            product = journaled_hvp(objective, journal, lambda stage, done, total: stages.append(stage))
            draw = torch.Generator().manual_seed(0)
            found = [product(torch.randn(2, objective.num_params, generator=draw)) for _ in range(blocks)]
        return found, objective, stages

    (first,), one, _ = measured(1)
    (stored, fresh), two, stages = measured(2)
    (whole, after), three, _ = measured(2)
    assert torch.equal(first, stored)
    assert torch.equal(stored, whole)
    assert torch.equal(fresh, after)
    assert first.stride() == stored.stride()
    assert one.gradient is not None
    assert two.gradient is not None
    assert torch.equal(one.gradient, two.gradient)
    assert one.loss == two.loss == three.loss
    assert (one.passes, two.passes, three.passes) == (1, 2, 2)
    assert two.gradients == three.gradients > one.gradients
    assert one.micro_batch == two.micro_batch
    assert "pass 1 is on disk" in stages
    assert "pass 2 is on disk" not in stages


def test_of_several_checkpoints_the_finished_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second of two, the same command finishes both, though the first result is there already."""
    import sharpscope
    from sharpscope.cli import main

    checkpoints = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for seed, path in enumerate(checkpoints):
        train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1, seed=seed), path)
    measure, calls = sharpscope.top_eigenvalues, 0

    def interrupted(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(sharpscope, "top_eigenvalues", interrupted)
    command = ["eigen", *map(str, checkpoints), "--k", "2", "--out", str(tmp_path / "results")]
    assert main(command) == 130
    assert (tmp_path / "results" / "a.json").exists()
    assert main(command) == 0
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["a.json", "b.json"]


def test_more_passes_go_on_with_a_result_that_has_not_converged(tmp_path: Path) -> None:
    """Its passes are kept, no --overwrite is needed, and it ends with the values of a run that was never short."""
    from sharpscope.cli import main

    checkpoint, whole, short = tmp_path / "a.pt", tmp_path / "whole.json", tmp_path / "short.json"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=2), checkpoint)
    command = ["eigen", str(checkpoint), "--tol", "1e-4", "--out"]
    assert main([*command, str(whole)]) == 0
    assert main([*command, str(short), "--max-passes", "3"]) == 3
    kept = entries(tmp_path / "short.json.partial")
    assert kept >= 3
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1), tmp_path / "other.pt")
    before = short.read_bytes()
    assert main(["eigen", str(tmp_path / "other.pt"), "--out", str(short)]) == 1  # another checkpoint's is not its own
    assert short.read_bytes() == before
    assert entries(tmp_path / "short.json.partial") == kept
    assert not json.loads(short.read_text())["converged"][-1]
    assert main([*command, str(short), "--max-passes", "50"]) == 0
    first, second = (json.loads(path.read_text()) for path in (whole, short))
    for name in ("eigenvalues", "residuals", "lower", "upper", "loss"):
        assert first[name] == second[name], name
    assert first["cost"]["gradients"] == second["cost"]["gradients"]
    assert not (tmp_path / "short.json.partial").exists()


def test_a_step_costs_the_same_wherever_it_was_run(tmp_path: Path) -> None:
    """Taken from disk a pass, and the check of float32, still count the time and the gradients that they took."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(300, 4), torch.randint(3, (300,))

    class Slow:
        def __iter__(self):  # type: ignore[no-untyped-def]
            time.sleep(0.05)
            return iter([(inputs, labels)])

    problem = Problem(model=nn.Linear(4, 3), loss=nn.CrossEntropyLoss(), data=Slow())
    first, again = (top_eigenvalues(problem, k=2, journal=tmp_path / "state").cost for _ in range(2))
    assert first.seconds > 0.05 * first.passes
    assert again.seconds > 0.05 * first.passes
    assert (again.passes, again.hvps, again.gradients) == (first.passes, first.hvps, first.gradients)


def test_vectors_written_before_a_kill_are_the_runs_own(tmp_path: Path) -> None:
    """Killed between the .npz and the .json, the same command goes on; without its passes neither is replaced."""
    from sharpscope.cli import main

    checkpoint, out = tmp_path / "a.pt", tmp_path / "r.json"
    train(Recipe(model="mlp", model_args={"hidden": (8,)}, epochs=1), checkpoint)
    command = ["eigen", str(checkpoint), "--k", "2", "--vectors", "--out", str(out)]
    assert main([*command, "--max-passes", "2"]) == 3
    out.unlink()
    assert main(command) == 0
    out.unlink()
    assert main(command) == 1
