"""The training loop behind ``sharpscope train`` and ``sharpscope demo``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpscope.atomic_io import require_writable
from sharpscope.checkpoint import Checkpoint, load_weights, read_checkpoint, write_checkpoint
from sharpscope.errors import ArgumentError, SharpscopeError
from sharpscope.monitor import EXAMPLES, SharpnessMonitor
from sharpscope.optim import SAM
from sharpscope.precision import available_device
from sharpscope.problem import Problem
from sharpscope.results import MonitorResult
from sharpscope.training.recipe import (
    Recipe,
    earlier_run,
    learning_rate,
    make_optimizer,
    monitor_path,
    parse_epochs,
    snapshot_path,
)
from sharpscope.zoo import DataSet, load_data, make_model, model_arguments

__all__ = ["Recipe", "evaluate", "monitor_path", "parse_epochs", "snapshot_path", "train"]

Progress = Callable[[int, int, dict[str, float]], None]


def train(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    save_epochs: str | Iterable[int | str] = (),
    data_root: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    monitor: int | None = None,
    monitor_examples: int = EXAMPLES,
) -> Checkpoint:
    """Train as the recipe says and return the checkpoint that ``out`` then holds.

    ``out`` is replaced whole after every epoch, so that a run stopped at any moment, even by kill -9, is resumed from
    its last finished epoch and, on the CPU, ends in the same bits. The global random state is left as it was.

    Args:
        recipe: what to train, and how.
        out: the checkpoint file.
        resume: go on with the run in ``out``; start it if there is none, and return it if it is finished.
        overwrite: start anew even if there are files of an earlier run.
        save_epochs: epochs to keep besides, as ``parse_epochs`` reads them, in the files named by
            ``snapshot_path``; 0 is the initial weights. When resuming, epochs already passed are not kept.
        data_root: the folder of a data set that is read from files.
        device: where to train.
        progress: called after every step with the steps done, all steps, and the epoch's mean ``loss`` and
            ``accuracy`` so far.
        monitor: measure lambda_max of the training loss at the start and every so many steps, by a ``SharpnessMonitor``
            on ``monitor_examples`` training examples, into the JSON file named by ``monitor_path``, which is replaced
            whole after every epoch. The weights are the same bits without it.

    Cost: a gradient a step, two with SAM, and an evaluation of both splits an epoch.

    Raises: ArgumentError for what the recipe or the arguments get wrong; OutputError when ``out`` cannot be written or
        would be overwritten; DataError without the data; SharpscopeError when the loss is no longer finite.
    """
    target = require_writable(out)
    kept = parse_epochs(save_epochs, recipe.epochs)
    beside = [] if monitor is None else [monitor_path(target)]
    beside += [snapshot_path(target, epoch) for epoch in sorted(kept)]
    earlier = earlier_run(recipe, target, beside, resume=resume, overwrite=overwrite)
    if earlier is not None and earlier.training is None:
        return earlier
    run = _start(recipe, data_root, available_device(device))
    done = 0
    with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
        if earlier is not None and earlier.training is not None and earlier.epoch is not None:
            done = earlier.epoch
            load_weights(run.model, earlier.state_dict)
            run.optimizer.load_state_dict(earlier.training["optimizer"])
        watch = None if monitor is None else _watch(run, target, monitor, monitor_examples, done)
        if done == 0 and 0 in kept:
            _write(run, snapshot_path(target, 0), 0)
        for epoch in range(done + 1, recipe.epochs + 1):
            _train_epoch(run, epoch, progress, watch)
            metrics = _metrics(run, epoch)
            if not math.isfinite(metrics["train_loss"]):
                raise _diverged(epoch, run.steps_per_epoch)
            if epoch in kept:
                _write(run, snapshot_path(target, epoch), epoch, metrics)
            if watch is not None:  # before the checkpoint: a kill in between costs records that are measured again
                watch.result().save(monitor_path(target))
            unfinished = epoch < recipe.epochs
            state = {"optimizer": run.optimizer.state_dict()} if unfinished else None
            _write(run, target, epoch, metrics, state)
    return read_checkpoint(target)


@torch.no_grad()
def evaluate(model: nn.Module, data: DataSet, batch_size: int = 1024) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy of ``model`` on ``data`` in eval mode, summed in float64.

    The model's modes are put back, each module's own.
    """
    modes = [(module, module.training) for module in model.modules()]
    like = next(model.parameters())
    loss = correct = torch.zeros((), dtype=torch.float64)
    model.eval()
    try:
        for start in range(0, len(data), batch_size):
            part = slice(start, start + batch_size)
            logits, labels = model(data.inputs[part].to(like)), data.targets[part].to(like.device)
            loss = loss + nn.functional.cross_entropy(logits, labels, reduction="none").double().sum().cpu()
            correct = correct + (logits.argmax(1) == labels).sum().cpu()
    finally:
        for module, mode in modes:
            module.training = mode
    return float(loss) / len(data), float(correct) / len(data)


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    model: nn.Module
    model_args: dict[str, Any]
    optimizer: Optimizer
    train_set: DataSet
    test_set: DataSet
    device: torch.device

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_set) / self.recipe.batch_size)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.recipe, step, self.steps_per_epoch * self.recipe.epochs)


def _start(recipe: Recipe, data_root: str | os.PathLike[str] | None, device: torch.device) -> _Run:
    load = functools.partial(
        load_data, recipe.data, root=data_root, label_noise=recipe.label_noise, noise_seed=recipe.noise_seed
    )
    train_set, test_set = (
        dataclasses.replace(data, inputs=data.inputs.to(device), targets=data.targets.to(device))
        for data in map(load, ("train", "test"))
    )
    args = model_arguments(
        recipe.model, **{"shape": train_set.shape, "classes": train_set.classes, **recipe.model_args}
    )
    if args["shape"] != train_set.shape or args["classes"] < train_set.classes:
        raise ArgumentError(
            f"{recipe.data} has inputs of shape {train_set.shape} in {train_set.classes} classes, but model_args "
            f"say {args['shape']} and {args['classes']}. Leave both out."
        )
    model = make_model(recipe.model, seed=recipe.seed, **args).to(device)
    return _Run(recipe, model, args, make_optimizer(recipe, model), train_set, test_set, device)


def _watch(run: _Run, target: Path, every: int, examples: int, epoch: int) -> SharpnessMonitor:
    """The monitor of a run that starts after ``epoch`` epochs, with what an earlier run measured up to there."""
    recipe, data = run.recipe, (run.train_set.inputs, run.train_set.targets)
    origin = {"checkpoint": str(target), "data": recipe.data, "split": "train", "label_noise": recipe.label_noise}
    origin |= {"recipe": dataclasses.asdict(recipe)}
    problem = Problem(model=run.model, loss=nn.CrossEntropyLoss(), data=data, provenance=origin)
    watch = SharpnessMonitor(problem, run.optimizer, every=every, examples=examples, seed=recipe.seed)
    if epoch == 0:
        watch.measure(0)
        return watch
    before = monitor_path(target)
    watch.resume(MonitorResult.load(before) if before.exists() else watch.result(), epoch * run.steps_per_epoch)
    return watch


def _train_epoch(run: _Run, epoch: int, progress: Progress | None, watch: SharpnessMonitor | None) -> None:
    recipe, model, optimizer = run.recipe, run.model, run.optimizer
    _reseed(run.device, _derived_seed("dropout", recipe.seed, epoch))
    generator = torch.Generator().manual_seed(_derived_seed("order", recipe.seed, epoch))
    order = torch.randperm(len(run.train_set), generator=generator).to(run.device)
    # SAM and LBFGS take several gradients a step; the others must not see the weights move before their only one.
    closed = _needs_closure(optimizer)
    seen, loss_sum, correct = 0, 0.0, 0
    model.train()
    for i in range(run.steps_per_epoch):
        batch = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
        step = (epoch - 1) * run.steps_per_epoch + i
        inputs, targets = run.train_set.inputs[batch], run.train_set.targets[batch]
        # Loss, correct answers and examples of each piece of the batch, at the weights before the step.
        at_w: dict[int, tuple[float, int, int]] = {}

        def closure(inputs: Tensor = inputs, targets: Tensor = targets, at_w: Any = at_w, i: int = i) -> Tensor:
            optimizer.zero_grad()
            logits = model(inputs)
            loss: Tensor = nn.functional.cross_entropy(logits, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise _diverged(epoch, i + 1)
            if inputs.data_ptr() not in at_w:
                at_w[inputs.data_ptr()] = (value, int((logits.argmax(1) == targets).sum()), len(targets))
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step)
        if isinstance(optimizer, SAM):
            optimizer.step(closure, inputs, targets)
        elif closed:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
        if watch is not None:
            watch.step(step + 1)
        for value, right, examples in at_w.values():
            seen, loss_sum, correct = seen + examples, loss_sum + value * examples, correct + right
        if progress is not None:
            total = run.steps_per_epoch * recipe.epochs
            progress(step + 1, total, {"loss": loss_sum / seen, "accuracy": correct / seen})


def _needs_closure(optimizer: Optimizer) -> bool:
    return inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty


def _metrics(run: _Run, epoch: int) -> dict[str, float]:
    """Loss and accuracy of both splits, and the learning rate of the epoch's last step (for 0, of the first)."""
    train_loss, train_accuracy = evaluate(run.model, run.train_set)
    test_loss, test_accuracy = evaluate(run.model, run.test_set)
    return {
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "lr": run.learning_rate(max(epoch * run.steps_per_epoch - 1, 0)),
    }


def _diverged(epoch: int, step: int) -> SharpscopeError:
    return SharpscopeError(
        f"The training loss must stay finite, but it is NaN or infinite in epoch {epoch}, step {step}. "
        "Lower the learning rate (--lr). What finished epochs wrote is kept."
    )


def _write(
    run: _Run, path: Path, epoch: int, metrics: dict[str, float] | None = None, state: dict[str, Any] | None = None
) -> None:
    recipe = dataclasses.asdict(run.recipe)
    write_checkpoint(
        path,
        state_dict=run.model.state_dict(),
        model=run.recipe.model,
        model_args=run.model_args,
        data={"name": run.recipe.data, "label_noise": run.recipe.label_noise, "noise_seed": run.recipe.noise_seed},
        recipe=recipe,
        epoch=epoch,
        metrics=_metrics(run, epoch) if metrics is None else metrics,
        training=state,
    )


def _reseed(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed, which would reseed devices whose state is not forked.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _derived_seed(purpose: str, seed: int, epoch: int) -> int:
    """Unrelated seeds for each purpose and epoch; Random seeds itself from a string by SHA-512."""
    return random.Random(f"{purpose} {seed} {epoch}").getrandbits(63)
