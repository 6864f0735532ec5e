"""Recipes and the training loop."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import processes
from sharpscope.checkpoint import Checkpoint, read_checkpoint
from sharpscope.errors import ArgumentError, CheckpointError, DataError, OutputError, SharpscopeError
from sharpscope.results import MonitorResult
from sharpscope.training import (
    Recipe,
    evaluate,
    learning_rate,
    make_optimizer,
    monitor_path,
    parse_epochs,
    snapshot_path,
    train,
)
from sharpscope.zoo import DataSet, load_data, make_model

LINEAR = {"model": "mlp", "model_args": {"hidden": ()}}
WHOLE = 1437  # one batch an epoch


def small(**changes: Any) -> Recipe:
    return Recipe(**{"model": "mlp", "model_args": {"hidden": (8,)}, "epochs": 3, "batch_size": 256, **changes})


def by_hand(recipe: Recipe, direction: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Full-batch heavy-ball descent in float64 on one flat vector, ``direction(w, gradient)`` entering momentum."""
    data = load_data(recipe.data)
    model = make_model(recipe.model, seed=recipe.seed, **recipe.model_args).double()
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def gradient(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        parts = torch.split(w, [math.prod(shape) for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = torch.func.functional_call(model, weights, (data.inputs.double(),))
        return torch.autograd.grad(nn.functional.cross_entropy(logits, data.targets), w)[0]

    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    velocity = torch.zeros_like(w)
    for step in range(recipe.epochs):
        lr = recipe.lr * (1 + math.cos(math.pi * step / recipe.epochs)) / 2
        g = gradient(w)
        if recipe.rho is not None:
            g = gradient(w + recipe.rho * (g / g.norm() if recipe.p == 2 else g.sign()))
        velocity = (recipe.momentum or 0.0) * velocity + direction(w, g)
        shrunk = w * (1 - lr * recipe.weight_decay) if recipe.decoupled else w
        w = shrunk - lr * velocity
    return w


def flat(checkpoint: Checkpoint) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in checkpoint.state_dict.values()])


@pytest.mark.parametrize("sam", [{}, {"rho": 0.5}, {"rho": 0.01, "p": math.inf}], ids=["plain", "sam", "sam-inf"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_training_follows_its_equations(tmp_path: Path, sam: dict[str, float], decoupled: bool) -> None:
    """SGD with momentum, cosine rate, weight decay at w (Eq. 1) or decoupled, and SAM, match a float64 computation."""
    recipe = small(batch_size=WHOLE, epochs=8, lr=0.5, weight_decay=0.1, decoupled=decoupled, **sam)
    expected = by_hand(recipe, lambda w, g: g if decoupled else g + recipe.weight_decay * w)
    actual = flat(train(recipe, tmp_path / "run.pt"))
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-6)


def test_each_example_counts_once_an_epoch(tmp_path: Path) -> None:
    """With frozen weights each epoch's mean over uneven batches is that of the whole set, in another order."""
    seen: list[tuple[int, int, dict[str, float]]] = []
    recipe = small(lr=1e-20, batch_size=100, epochs=2, schedule="constant")
    checkpoint = train(recipe, tmp_path / "run.pt", progress=lambda *step: seen.append(step))
    assert [(done, total) for done, total, _ in seen] == [(i + 1, 30) for i in range(30)]
    for last in (14, 29):
        assert seen[last][2]["loss"] == pytest.approx(checkpoint.metrics["train_loss"], rel=1e-6)
        assert seen[last][2]["accuracy"] == pytest.approx(checkpoint.metrics["train_accuracy"], abs=1e-12)
    assert seen[0][2]["loss"] != seen[15][2]["loss"]


def test_learning_rates_match_torch() -> None:
    """The cosine rate is CosineAnnealingLR's with one period over all steps; the constant one does not move."""
    recipe = small(lr=0.3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    for step in range(20):
        assert learning_rate(recipe, step, 20) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        schedule.step()
    assert learning_rate(small(lr=0.3, schedule="constant"), 19, 20) == 0.3


def test_a_finished_file_describes_itself(tmp_path: Path) -> None:
    """Model, data, recipe, epoch and metrics are in it, the metrics those of its weights, and no training state."""
    recipe = small(label_noise=0.4, noise_seed=2, rho=0.05)
    checkpoint = train(recipe, tmp_path / "run.pt")
    assert checkpoint.training is None
    assert (checkpoint.model, checkpoint.epoch) == ("mlp", 3)
    assert checkpoint.model_args == {"shape": (1, 8, 8), "classes": 10, "hidden": (8,)}
    assert checkpoint.data == {"name": "digits", "label_noise": 0.4, "noise_seed": 2, "noise_version": 2}
    assert Recipe(**checkpoint.recipe) == recipe
    model = make_model("mlp", **checkpoint.model_args)
    model.load_state_dict(checkpoint.state_dict)
    metrics = dict(checkpoint.metrics)
    assert metrics.pop("lr") == learning_rate(recipe, 17, 18)
    for split in ("train", "test"):
        data = load_data("digits", split, label_noise=0.4, noise_seed=2)
        logits = model.double()(data.inputs.double())
        loss = nn.functional.cross_entropy(logits, data.targets).item()
        assert metrics.pop(f"{split}_loss") == pytest.approx(loss, rel=1e-5)
        accuracy = (logits.argmax(1) == data.targets).double().mean().item()
        assert metrics.pop(f"{split}_accuracy") == pytest.approx(accuracy, abs=1e-12)
    assert not metrics


class Interruption(Exception):
    """Stands for Ctrl-C."""


def interrupt_at(step: int) -> Callable[..., None]:
    def progress(done: int, total: int, values: dict[str, float]) -> None:
        if done == step:
            raise Interruption

    return progress


@pytest.mark.parametrize(
    "changes",
    [
        {"rho": 0.05},
        {"optimizer": "AdamW", "rho": 0.05, "lr": 1e-3},
        {"variant": "looksam", "rho": 0.05},
        {"optimizer": "AdamW", "variant": "friendlysam", "rho": 0.05, "lr": 1e-3},
        {"optimizer": "adam", "lr": 1e-3, "decoupled": True, "label_noise": 0.2},
        {"model": "wide_resnet", "model_args": {"widen": 1}, "batch_size": 720, "epochs": 2, "rho": 0.05},
    ],
    ids=["sam", "sam-adamw", "looksam", "friendlysam-adamw", "adam-decoupled", "batchnorm"],
)
def test_resume_is_bit_identical(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A run stopped in its last epoch and resumed ends in the very bytes of an uninterrupted run."""
    recipe = small(**changes)
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    expected = train(recipe, whole)
    state = torch.get_rng_state()
    steps = math.ceil(WHOLE / recipe.batch_size) * recipe.epochs
    with pytest.raises(Interruption):
        train(recipe, parts, progress=interrupt_at(steps - 1))
    stopped = read_checkpoint(parts)
    assert stopped.epoch == recipe.epochs - 1
    assert stopped.training is not None
    torch.rand(1)
    resumed = train(recipe, parts, resume=True)
    assert resumed.sha256 == expected.sha256
    torch.set_rng_state(state)


def _dies(moment: str, out: str) -> None:
    """Train to ``out`` and die at the moment, in a process of its own."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    calls = []
    replace_file = os.replace

    def replaced(*names: Any) -> None:
        # The third file is that of epoch 2, after the snapshot of epoch 0 and the file of epoch 1.
        calls.append(names)
        die() if len(calls) == 3 else replace_file(*names)

    if moment == "while writing":
        os.replace = replaced  # type: ignore[assignment]
    progress = (lambda done, total, values: die() if done == 15 else None) if moment == "in a step" else None
    train(small(rho=0.05), out, save_epochs="0", progress=progress)


@pytest.mark.parametrize(("moment", "epoch"), [("in a step", 2), ("while writing", 1)])
def test_kill_9_costs_at_most_an_epoch(tmp_path: Path, moment: str, epoch: int) -> None:
    """A process killed by SIGKILL leaves a whole file, and resuming it ends in the bits of an unbroken run."""
    out = tmp_path / "run.pt"
    process = processes.start(_dies, moment, str(out))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert read_checkpoint(out).epoch == epoch
    recipe = small(rho=0.05)
    assert train(recipe, out, resume=True).sha256 == train(recipe, tmp_path / "whole.pt").sha256


def test_resume_starts_or_returns_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    """Without a file a resumed run starts; a finished one comes back without a step or a write."""
    out = tmp_path / "run.pt"
    first = train(small(), out, resume=True)
    written = out.stat().st_mtime_ns
    again = train(small(), out, resume=True, progress=interrupt_at(1))
    assert again.sha256 == first.sha256
    assert out.stat().st_mtime_ns == written


def test_resume_refuses_another_recipe(tmp_path: Path) -> None:
    """The first difference is named with both values; a list in place of a tuple is none."""
    out = tmp_path / "run.pt"
    train(small(), out)
    with pytest.raises(ArgumentError, match=r"lr is 0\.1 and in .*run\.pt 0\.05"):
        train(small(lr=0.1, seed=3), out, resume=True)
    train(small(model_args={"hidden": [8]}), out, resume=True)
    with pytest.raises(ArgumentError, match="one of --resume and --overwrite"):
        train(small(), out, resume=True, overwrite=True)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    """An existing file or snapshot stops the run before its first step, and stays as it is."""
    out = tmp_path / "run.pt"
    snapshot_path(out, 1).write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"run-epoch1\.pt exists.*--resume.*--overwrite"):
        train(small(), out, save_epochs=[1], progress=interrupt_at(1))
    train(small(), out)
    before = out.read_bytes()
    with pytest.raises(OutputError, match=r"run\.pt exists"):
        train(small(), out, progress=interrupt_at(1))
    assert out.read_bytes() == before
    assert train(small(seed=1), out, overwrite=True).recipe["seed"] == 1


def test_snapshots_are_the_weights_of_their_epochs(tmp_path: Path) -> None:
    """Epoch 0 is the fresh model, the last equals the run's file, and a middle one the weights on the way."""
    out = tmp_path / "run.pt"
    last = train(small(schedule="constant"), out, save_epochs="0,67%,last")
    kept = {epoch: read_checkpoint(snapshot_path(out, epoch)) for epoch in (0, 2, 3)}
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"run-epoch{e}.pt" for e in (0, 2, 3)] + ["run.pt"]
    fresh = make_model("mlp", seed=0, hidden=(8,)).state_dict()
    assert all(torch.equal(kept[0].state_dict[key], fresh[key]) for key in fresh)
    assert kept[3].sha256 == last.sha256
    shorter = train(small(schedule="constant", epochs=2), tmp_path / "short.pt")
    assert torch.equal(flat(kept[2]), flat(shorter))
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        train(small(schedule="constant"), snapshot_path(out, 2), resume=True)


def test_divergence_stops_with_the_last_good_epoch_kept(tmp_path: Path) -> None:
    """A loss that overflows raises an error naming epoch and step, and what the file holds is finite."""
    out = tmp_path / "run.pt"
    recipe = small(lr=1e3, epochs=40, momentum=0.0, weight_decay=1.0, schedule="constant", batch_size=WHOLE)
    with pytest.raises(SharpscopeError, match=r"epoch \d+, step \d+\. Lower the learning rate"):
        train(recipe, out)
    kept = read_checkpoint(out)
    assert kept.epoch is not None
    assert kept.epoch >= 1
    assert bool(torch.isfinite(flat(kept)).all())
    assert math.isfinite(kept.metrics["train_loss"])


def test_training_leaves_the_random_state(tmp_path: Path) -> None:
    """The global generator is bit for bit what it was, and what it was does not matter."""
    torch.manual_seed(3)
    first = train(small(), tmp_path / "a.pt")
    torch.manual_seed(4)
    state = torch.get_rng_state()
    second = train(small(), tmp_path / "b.pt")
    assert torch.equal(state, torch.get_rng_state())
    assert first.sha256 == second.sha256


def test_sgd_and_sam_start_alike(tmp_path: Path) -> None:
    """With one seed both start from the same weights, and rho = 0.05 is what the name "sam" alone means."""
    for name, recipe in (("sgd", small(epochs=1)), ("sam", small(epochs=1, optimizer="SAM"))):
        train(recipe, tmp_path / f"{name}.pt", save_epochs=[0])
    sgd, sam = (read_checkpoint(tmp_path / f"{name}-epoch0.pt") for name in ("sgd", "sam"))
    assert torch.equal(flat(sgd), flat(sam))
    assert small(optimizer="SAM") == small(optimizer="sgd", rho=0.05)


@pytest.mark.parametrize("name", ["Adagrad", "rprop", "RMSprop", "LBFGS", "Adafactor", "nadam"])
def test_any_torch_optimizer_trains(tmp_path: Path, name: str) -> None:
    """By its name in any case, with momentum only where it has one, an epoch lowers the training loss."""
    recipe = small(epochs=1, optimizer=name, lr=1e-3, weight_decay=0.0, batch_size=WHOLE)
    checkpoint = train(recipe, tmp_path / "run.pt", save_epochs=[0])
    before = read_checkpoint(tmp_path / "run-epoch0.pt").metrics["train_loss"]
    assert checkpoint.metrics["train_loss"] < before
    assert checkpoint.recipe["momentum"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamm"}, "Did you mean 'adam"),
        ({"model": "cnm"}, "Did you mean 'cnn'"),
        ({"data": "digit"}, "Did you mean 'digits'"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"rho": -1.0}, "rho must be"),
        ({"p": 1}, "p must be 2 or inf"),
        ({"weight_decay": math.inf}, "weight_decay must be"),
        ({"label_noise": 2.0}, "label_noise must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    """Each value outside its domain raises ArgumentError when the recipe is made."""
    with pytest.raises(ArgumentError, match=message):
        small(**changes)


def test_what_cannot_be_trained_is_said_before_the_work(tmp_path: Path) -> None:
    """Missing data, a device that is not there, a folder as output, a wrong shape, an optimizer without decay."""
    out = tmp_path / "run.pt"
    with pytest.raises(DataError, match="apt install"):
        train(small(data="fashion-mnist"), out, data_root=tmp_path)
    with pytest.raises(ArgumentError, match="device 'nowhere'"):
        train(small(), out, device="nowhere")
    with pytest.raises(OutputError, match="is a folder"):
        train(small(), tmp_path)
    with pytest.raises(ArgumentError, match="Leave both out"):
        train(small(model_args={"shape": (1, 28, 28)}), out)
    with pytest.raises(ArgumentError, match="no weight decay of its own"):
        train(small(optimizer="rprop"), out)
    with pytest.raises(ArgumentError, match="LBFGS"):
        train(small(optimizer="lbfgs", weight_decay=0.0, rho=0.05), out)
    assert not out.exists()


def test_decoupled_decay_is_adamws_own() -> None:
    """For AdamW both spellings give torch's weight decay and no second one by a hook."""
    for decoupled in (False, True):
        optimizer = make_optimizer(small(optimizer="adamw", decoupled=decoupled, weight_decay=0.1), nn.Linear(2, 2))
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        assert not optimizer._optimizer_step_pre_hooks


def test_epochs_are_read_as_numbers_percentages_and_last() -> None:
    """Spaces and repetitions do not matter; what is no epoch of the run is refused."""
    assert parse_epochs("0, 1,50%,last", 40) == {0, 1, 20, 40}
    assert parse_epochs(["100%", 3, "last"], 3) == {3}
    assert parse_epochs((), 3) == set()
    for bad in ("4", "-1", "half", "101%", "nan%", "inf%", "1,,2"):
        with pytest.raises(ArgumentError, match="An epoch must be"):
            parse_epochs(bad, 3)


def test_evaluate_is_the_mean_in_eval_mode() -> None:
    """Uneven batches do not change the mean; dropout is off; each module gets its own mode back."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Dropout(0.9), nn.BatchNorm1d(4))
    model[2].eval()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    data = DataSet(torch.rand(10, 1, 8, 8), torch.arange(10) % 4, 4, "made", "train")
    loss, accuracy = evaluate(model, data, batch_size=3)
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    logits = model.eval()(data.inputs)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, data.targets).item(), rel=1e-6)
    assert accuracy == (logits.argmax(1) == data.targets).double().mean().item()


def monitored(out: Path) -> list[int]:
    return MonitorResult.load(monitor_path(out)).steps.tolist()


@pytest.mark.parametrize(
    "changes", [{"rho": 0.05}, {"model": "wide_resnet", "model_args": {"widen": 1}, "batch_size": 720}]
)
def test_a_monitor_leaves_the_weights_as_they_are(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The file is byte for byte that of a run without it, and the records are of the start and every so many steps."""
    recipe = small(**{"epochs": 2, **changes})
    bare = train(recipe, tmp_path / "bare.pt")
    watched = train(recipe, tmp_path / "watched.pt", monitor=2, monitor_examples=16)
    assert watched.sha256 == bare.sha256
    steps = recipe.epochs * math.ceil(WHOLE / recipe.batch_size)
    assert monitored(tmp_path / "watched.pt") == list(range(0, steps + 1, 2))
    result = MonitorResult.load(monitor_path(tmp_path / "watched.pt"))
    assert result.converged.all()
    assert result.provenance["num_examples"] == 16
    assert np.isfinite(result.column("sam_edge")).all() == (recipe.rho is not None)
    assert not monitor_path(tmp_path / "bare.pt").exists()


def test_a_resumed_run_neither_loses_nor_doubles_records(tmp_path: Path) -> None:
    """Stopped in the third epoch, or between writing records and weights, it ends with the steps of an unbroken run."""
    recipe, whole, parts = small(epochs=4), tmp_path / "whole.pt", tmp_path / "parts.pt"
    expected = train(recipe, whole, monitor=4)
    with pytest.raises(Interruption):
        train(recipe, parts, monitor=4, progress=interrupt_at(15))
    assert monitored(parts) == [0, 4, 8, 12]
    ahead = MonitorResult.load(monitor_path(whole))
    ahead.save(monitor_path(parts))  # as if the records of a later epoch had been written and its weights not
    assert train(recipe, parts, monitor=4, resume=True).sha256 == expected.sha256
    assert monitored(parts) == monitored(whole) == list(range(0, 25, 4))
    before, again = (MonitorResult.load(monitor_path(path)) for path in (whole, parts))
    assert (again.lambda_max <= before.column("upper")).all()
    assert (before.lambda_max <= again.column("upper")).all()
    monitor_path(parts).unlink()
    train(recipe, parts, monitor=4, resume=True)  # finished: nothing is trained, and nothing measured
    assert not monitor_path(parts).exists()


def test_records_are_not_overwritten_unasked(tmp_path: Path) -> None:
    """A file where the records would go stops the run before its first step."""
    out = tmp_path / "run.pt"
    monitor_path(out).write_text("mine")
    with pytest.raises(OutputError, match=r"run\.pt\.monitor\.json exists already"):
        train(small(), out, monitor=2, progress=interrupt_at(1))
    with pytest.raises(ArgumentError, match="every must be an integer of at least 1"):
        train(small(), out, monitor=0, overwrite=True)
    train(small(epochs=1), out, monitor=3, overwrite=True)
    assert monitored(out) == [0, 3, 6]
