"""Train a bundled network, with or without SAM, into a checkpoint that describes itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpscope.atomic_io import require_writable
from sharpscope.checkpoint import Checkpoint, load_weights, read_checkpoint, write_checkpoint
from sharpscope.errors import ArgumentError, CheckpointError, OutputError, SharpscopeError, nearest, require_count
from sharpscope.monitor import EXAMPLES, SharpnessMonitor
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM
from sharpscope.precision import available_device
from sharpscope.problem import Problem
from sharpscope.results import MonitorResult
from sharpscope.zoo import DATASETS, MODELS, DataSet, load_data, make_model, model_arguments

SCHEDULES = ("cosine", "constant")

# SAM and its relatives by name, with the radius that each has where none is given.
VARIANTS: dict[str, tuple[type[SAM], float]] = {
    "sam": (SAM, 0.05),
    "asam": (ASAM, 0.5),
    "gsam": (GSAM, 0.05),
    "looksam": (LookSAM, 0.05),
    "friendlysam": (FriendlySAM, 0.05),
}

# SparseAdam is left out: it refuses the dense gradients that these models have.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer) and name not in ("Optimizer", "SparseAdam")
}

# Their weight_decay already shrinks the weights by lr * weight_decay, apart from the gradient.
DECOUPLED = ("adamw", "adafactor", "muon")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights; equal recipes give equal weights on one machine's CPU.

    Args:
        model, model_args: a bundled model; ``shape`` and ``classes`` come from the data.
        data: a bundled data set.
        optimizer: any ``torch.optim`` class by name, whatever the case; "sam", "asam", "gsam", "looksam" and
            "friendlysam" stand for SGD with that ``variant`` and its usual ``rho``.
        rho: the radius of SAM around the optimizer; None trains without SAM.
        variant: which of SAM's relatives, where rho is given.
        p: the norm of SAM's ball, 2 or infinity.
        m: examples that share a perturbation; None is the batch.
        sam_args: further arguments of SAM or the variant, such as ``adaptive``, ``ascent_steps``, ``alpha`` or ``k``.
        lr: the learning rate of the first step.
        momentum: None is 0.9 for SGD and torch's default elsewhere; None too where the optimizer has no momentum.
        weight_decay: the factor c of the penalty c/2 ||w||^2, whose gradient at w joins that of the loss in the base
            optimizer (Foret et al. 2021, Eq. 1).
        decoupled: instead subtract ``lr * weight_decay * w`` before the base step (Loshchilov and Hutter 2019).
            AdamW, Adafactor and Muon always do so.
        batch_size: of the training batches; the last one of an epoch may be smaller.
        epochs: passes over the training data.
        schedule: "cosine" (to zero over all steps, changed at every step) or "constant".
        label_noise, noise_seed: the fraction of wrong training labels, and which.
        seed: of the initial weights, the order of the examples and dropout.

    Raises: ArgumentError for an unknown name or a value outside its domain.
    """

    model: str = "cnn"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data: str = "digits"
    optimizer: str = "sgd"
    rho: float | None = None
    variant: str = "sam"
    p: float = 2.0
    m: int | None = None
    sam_args: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 0.05
    momentum: float | None = None
    weight_decay: float = 5e-4
    decoupled: bool = False
    batch_size: int = 64
    epochs: int = 40
    schedule: str = "cosine"
    label_noise: float = 0.0
    noise_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        name = self.optimizer.lower()
        if name in VARIANTS:
            if self.variant not in ("sam", name):
                raise ArgumentError(f"optimizer and variant say two kinds, {name} and {self.variant}. Pass one.")
            object.__setattr__(self, "variant", name)
            object.__setattr__(self, "rho", VARIANTS[name][1] if self.rho is None else self.rho)
            name = "sgd"
        for kind, value, known in (
            ("model", self.model, MODELS),
            ("data set", self.data, DATASETS),
            ("optimizer", name, [*OPTIMIZERS, *VARIANTS]),
            ("variant", self.variant, VARIANTS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in known:
                raise ArgumentError(nearest(kind, value, known))
        object.__setattr__(self, "optimizer", name)
        if "momentum" not in inspect.signature(OPTIMIZERS[name]).parameters:
            object.__setattr__(self, "momentum", None)
        elif self.momentum is None and name == "sgd":
            object.__setattr__(self, "momentum", 0.9)
        self._check_numbers()

    def _check_numbers(self) -> None:
        if self.rho is None and (self.m is not None or self.variant != "sam" or self.sam_args):
            raise ArgumentError("m, variant and sam_args belong to SAM. Pass rho (--rho), or name it as the optimizer.")
        for key in ("batch_size", "epochs", *(() if self.m is None else ("m",))):
            require_count(key, getattr(self, key))
        for key in ("rho", "weight_decay", "momentum"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < math.inf:
                raise ArgumentError(f"{key} must be at least 0 and finite, got {value!r}.")
        for key in ("seed", "noise_seed"):
            value = getattr(self, key)
            if not isinstance(value, int) or not 0 <= value < 1 << 63:
                raise ArgumentError(f"{key} must be an integer from 0 to 2^63 - 1, got {value!r}.")
        if not 0 < self.lr < math.inf:
            raise ArgumentError(f"lr must be positive and finite, got {self.lr!r}.")
        if self.p not in (2, math.inf):
            raise ArgumentError(f"p must be 2 or inf, got {self.p!r}.")
        if not 0 <= self.label_noise <= 1:
            raise ArgumentError(f"label_noise must be a fraction from 0 to 1, got {self.label_noise!r}.")


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``: ``lr (1 + cos(pi step / steps)) / 2``, or ``lr``."""
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * (1 + math.cos(math.pi * step / steps)) / 2


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The recipe's optimizer on the parameters of ``model``, SAM around it if ``rho`` is given.

    Raises: ArgumentError when the optimizer cannot take the options or the parameters.
    """
    kind = OPTIMIZERS[recipe.optimizer]
    taken = inspect.signature(kind).parameters
    by_hook = recipe.decoupled and recipe.optimizer not in DECOUPLED
    options: dict[str, Any] = {"lr": recipe.lr}
    if recipe.momentum is not None:
        options["momentum"] = recipe.momentum
    if "weight_decay" in taken:
        # Stated even when it is 0, since some optimizers decay by default.
        options["weight_decay"] = 0.0 if by_hook else recipe.weight_decay
    elif recipe.weight_decay and not by_hook:
        raise ArgumentError(f"{kind.__name__} has no weight decay of its own. Pass --decoupled or --weight-decay 0.")
    parameters = list(model.parameters())
    try:
        if recipe.rho is None:
            optimizer: Optimizer = kind(parameters, **options)
            base = optimizer
        else:
            sam = VARIANTS[recipe.variant][0]
            optimizer = sam(parameters, kind, rho=recipe.rho, p=recipe.p, m=recipe.m, **recipe.sam_args, **options)
            base = optimizer.base_optimizer
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArgumentError(f"{kind.__name__} does not fit the {recipe.model} or its options: {error}") from error
    if by_hook and recipe.weight_decay:
        base.register_step_pre_hook(lambda *_: _shrink(base, recipe.weight_decay))
    return optimizer


@torch.no_grad()
def _shrink(optimizer: Optimizer, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.mul_(1 - group["lr"] * weight_decay)


def parse_epochs(wanted: str | Iterable[int | str], epochs: int) -> set[int]:
    """The epochs meant by "0,1,50%,last" or by a sequence of such entries; 0 is before training.

    Raises: ArgumentError for an entry that is none of a number, a percentage and "last", or is outside 0..epochs.
    """
    entries = wanted.split(",") if isinstance(wanted, str) else wanted
    found = set()
    for entry in entries:
        text = str(entry).strip()
        try:
            if text == "last":
                epoch = epochs
            elif text.endswith("%"):
                share = float(text[:-1])
                epoch = round(share / 100 * epochs) if share <= 100 else epochs + 1
            else:
                epoch = int(text)
        except (ValueError, OverflowError):
            raise ArgumentError(f"An epoch must be a number, a percentage or 'last', got {text!r}.") from None
        if not 0 <= epoch <= epochs:
            raise ArgumentError(f"An epoch must be from 0 to {epochs}, got {text!r}.")
        found.add(epoch)
    return found


def snapshot_path(out: str | os.PathLike[str], epoch: int) -> Path:
    """Where the weights after ``epoch`` epochs are kept: ``runs/sam.pt`` gives ``runs/sam-epoch3.pt``."""
    path = Path(out)
    return path.with_name(f"{path.stem}-epoch{epoch}{path.suffix}")


def monitor_path(out: str | os.PathLike[str]) -> Path:
    """Where the sharpness along the run is kept: ``runs/sam.pt`` gives ``runs/sam.pt.monitor.json``."""
    path = Path(out)
    return path.with_name(f"{path.name}.monitor.json")


def earlier_run(
    recipe: Recipe, target: Path, beside: Sequence[Path], *, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """The run in ``target`` to go on with, or None to start one, when nothing that must stay would be overwritten.

    ``beside``: the other files that the run is to write.

    Raises: OutputError where a file is there already; ArgumentError and CheckpointError for a run that is not this one.
    """
    if resume and overwrite:
        raise ArgumentError("A run is either resumed or overwritten. Pass one of --resume and --overwrite.")
    present = [path for path in (target, *beside) if path.exists()]
    if present and not resume and not overwrite:
        raise OutputError(f"{present[0]} exists already. Pass --resume to go on with it, or --overwrite.")
    if overwrite or not target.exists():
        return None
    earlier = read_checkpoint(target)
    ours = dataclasses.asdict(recipe)
    # What an older version did not know it did as by default.
    theirs = {**dataclasses.asdict(Recipe()), **earlier.recipe}
    for key, value in ours.items():
        # By way of JSON, in which a tuple and a list of the same sizes are the same recipe.
        if _as_json(theirs[key]) != _as_json(value):
            raise ArgumentError(
                f"A run is resumed by its own recipe, but {key} is {value!r} and in {target} "
                f"{earlier.recipe.get(key, 'missing')!r}. Change it back, or pass --overwrite to start anew."
            )
    if earlier.training is None and earlier.epoch != recipe.epochs:
        raise CheckpointError(f"{target} keeps one epoch's weights and cannot be resumed. Name the run's own file.")
    return earlier


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


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
