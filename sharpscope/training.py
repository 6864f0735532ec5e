"""Train a bundled network, with or without SAM, and write self-describing checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpscope.atomic_io import locked, require_writable
from sharpscope.checkpoint import Checkpoint, load_weights, read_checkpoint, write_checkpoint
from sharpscope.errors import ArgumentError, CheckpointError, OutputError, SharpscopeError, nearest, require_count
from sharpscope.monitor import EXAMPLES, SharpnessMonitor
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM
from sharpscope.precision import available_device
from sharpscope.problem import Problem
from sharpscope.random_streams import derived_seed, stream
from sharpscope.results import MonitorResult
from sharpscope.results.origin import typed_value
from sharpscope.results.serialization import jsonable
from sharpscope.zoo import DATASETS, MODELS, NOISE_VERSION, DataSet, load_data, make_model, model_arguments

SCHEDULES = ("cosine", "constant")

# SAM and its variants by name, with the default rho of each.
VARIANTS: dict[str, tuple[type[SAM], float]] = {
    "sam": (SAM, 0.05),
    "asam": (ASAM, 0.5),
    "gsam": (GSAM, 0.05),
    "looksam": (LookSAM, 0.05),
    "friendlysam": (FriendlySAM, 0.05),
}

# Without SparseAdam, which rejects dense gradients.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, Optimizer) and name not in ("Optimizer", "SparseAdam")
}

# Their weight_decay is decoupled: it shrinks the weights by lr * weight_decay, separately from the gradient.
DECOUPLED = ("adamw", "adafactor", "muon")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that determine the trained weights; on the same CPU, equal recipes give bit-identical weights.

    Args:
        model: name of a bundled model.
        model_args: keyword arguments of the model; ``shape`` and ``classes`` are taken from the data.
        data: name of a bundled data set.
        optimizer: name of a ``torch.optim`` class, case-insensitive. "sam", "asam", "gsam", "looksam" and
            "friendlysam" mean SGD with that ``variant`` and its default ``rho``.
        rho: SAM's perturbation radius; None trains without SAM.
        variant: SAM variant; needs ``rho``.
        p: norm of SAM's perturbation, 2 or inf.
        m: examples per perturbation; None: the whole batch.
        sam_args: further arguments of SAM or the variant, such as ``adaptive``, ``ascent_steps``, ``alpha`` or ``k``.
        lr: initial learning rate.
        momentum: None: 0.9 for SGD, the default of torch for other optimizers; ignored by optimizers without momentum.
        weight_decay: c of the L2 penalty ``c/2 ||w||^2``. The base optimizer adds its gradient, taken at w
            (Foret et al. 2021, Eq. 1).
        decoupled: subtract ``lr * weight_decay * w`` before the base step instead (Loshchilov and Hutter 2019).
            AdamW, Adafactor and Muon always do so.
        batch_size: examples per batch; the last batch of an epoch may be smaller.
        epochs: passes over the training data.
        schedule: "cosine" (decays to zero, updated every step) or "constant".
        label_noise: fraction of training labels that are replaced by another class.
        noise_seed: seed of the label noise.
        seed: seed of the initial weights, the order of the examples, and dropout.

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
                raise ArgumentError(f"optimizer and variant must agree, got {name} and {self.variant}. Pass one.")
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
            raise ArgumentError("m, variant and sam_args belong to SAM. Pass rho (--rho), or optimizer='sam'.")
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
    """Learning rate at ``step`` (from 0) of ``steps``: ``lr (1 + cos(pi step / steps)) / 2``, or constant ``lr``."""
    if recipe.schedule == "constant":
        return recipe.lr
    return recipe.lr * (1 + math.cos(math.pi * step / steps)) / 2


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Create the recipe's optimizer for ``model``, wrapped in SAM if ``rho`` is set.

    Raises: ArgumentError if the optimizer rejects the options or the parameters.
    """
    kind = OPTIMIZERS[recipe.optimizer]
    taken = inspect.signature(kind).parameters
    by_hook = recipe.decoupled and recipe.optimizer not in DECOUPLED
    options: dict[str, Any] = {"lr": recipe.lr}
    if recipe.momentum is not None:
        options["momentum"] = recipe.momentum
    if "weight_decay" in taken:
        # Passed even if 0, since some optimizers decay by default.
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
    """Parse epochs such as "0,1,50%,last", or a sequence of such entries; 0 is before training.

    Raises: ArgumentError for an entry that is not a number, a percentage or "last", or is outside 0..epochs.
    """
    entries = wanted.split(",") if isinstance(wanted, str) else wanted
    parsed = set()
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
        parsed.add(epoch)
    return parsed


def snapshot_path(out: str | os.PathLike[str], epoch: int) -> Path:
    """File of the weights after ``epoch`` epochs: ``runs/sam-epoch3.pt`` for ``runs/sam.pt``."""
    path = Path(out)
    return path.with_name(f"{path.stem}-epoch{epoch}{path.suffix}")


def monitor_path(out: str | os.PathLike[str]) -> Path:
    """File of the sharpness during training: ``runs/sam.pt.monitor.json`` for ``runs/sam.pt``."""
    path = Path(out)
    return path.with_name(f"{path.name}.monitor.json")


def earlier_run(
    recipe: Recipe, target: Path, other_outputs: Sequence[Path], *, resume: bool, overwrite: bool
) -> Checkpoint | None:
    """Return the checkpoint in ``target`` to resume from, or None to start a new run.

    Args:
        recipe: settings of the run.
        target: checkpoint file of the run.
        other_outputs: further files that the run will write.
        resume: allow existing files, and resume from ``target``.
        overwrite: allow existing files, and ignore them.

    Raises: OutputError if an output exists and neither ``resume`` nor ``overwrite`` is set; ArgumentError if ``target``
        or another output has another recipe; CheckpointError if it cannot be resumed.
    """
    if resume and overwrite:
        raise ArgumentError("A run is either resumed or overwritten. Pass one of --resume and --overwrite.")
    present = [path for path in (target, *other_outputs) if path.exists()]
    if present and not resume and not overwrite:
        raise OutputError(f"{present[0]} exists already. Pass --resume to continue it, or --overwrite.")
    if overwrite:
        return None
    earlier = None
    for path in present:
        if path == monitor_path(target):
            known = typed_value(MonitorResult.load(path).provenance, "recipe", Mapping) or {}
        else:
            checkpoint = read_checkpoint(path)
            known, earlier = checkpoint.recipe, checkpoint if path == target else earlier
        key = differing_setting(recipe, known)
        if key is not None:
            raise ArgumentError(
                f"Resuming needs an unchanged recipe, but {key} is {getattr(recipe, key)!r} and in {path} "
                f"{known.get(key, 'missing')!r}. Change it back, or pass --overwrite to start over."
            )
    if earlier is None:
        return None
    if earlier.training is None and earlier.epoch != recipe.epochs:
        raise CheckpointError(
            f"{target} holds only the weights of one epoch and cannot be resumed. Pass the run's own file."
        )
    return earlier


def differing_setting(recipe: Recipe, known: Mapping[str, Any]) -> str | None:
    """The first setting in which ``known``, a recipe as a file holds it, differs from ``recipe``, or None."""
    # Settings that an older version did not have: it behaved like their defaults.
    theirs = {**dataclasses.asdict(Recipe()), **known} if known else {}
    ours = dataclasses.asdict(recipe)
    return next((key for key, value in ours.items() if _as_json(theirs.get(key)) != _as_json(value)), None)


def _as_json(value: Any) -> Any:
    """``value`` as a result holds it, where a tuple equals a list and a number that is not finite is null."""
    return json.loads(json.dumps(jsonable(value)))


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
    """Train a bundled network by ``recipe``, write the checkpoint ``out``, and return it.

    ``out`` is replaced atomically after every epoch. A run stopped at any time, even by kill -9, resumes from its last
    finished epoch and, on the CPU, gives the same bits. The global random state is preserved.

    Args:
        recipe: all settings that determine the trained weights.
        out: checkpoint file.
        resume: resume the run in ``out``; start it if the file is missing, return it if it is finished.
        overwrite: start over even if files of an earlier run exist; its monitored sharpness is deleted.
        save_epochs: epochs to save to files of their own (see ``snapshot_path``), such as "0,1,50%,last"; 0 is the
            initial weights. A resumed run does not save epochs that are already past.
        data_root: folder of a data set that is read from files.
        device: where to train.
        progress: called after every step as ``progress(step, steps, {"loss": ..., "accuracy": ...})`` with the means
            of the epoch so far.
        monitor: measure lambda_max of the training loss before the first and after every ``monitor`` steps with a
            ``SharpnessMonitor``, and write it to ``monitor_path(out)`` after every epoch. Does not change the weights.
        monitor_examples: training examples that the monitor measures on.

    Cost: 1 gradient per step, 2 with SAM, and one evaluation of both splits per epoch.

    Raises: ArgumentError for invalid settings or arguments; OutputError if ``out`` cannot be written, would be
        overwritten, or is being written by another process; DataError if the data are missing; SharpscopeError if
        the loss becomes infinite or NaN.
    """
    target = require_writable(out)
    with locked(target):
        snapshots = parse_epochs(save_epochs, recipe.epochs)
        other_outputs = [] if monitor is None else [monitor_path(target)]
        other_outputs += [snapshot_path(target, epoch) for epoch in sorted(snapshots)]
        earlier = earlier_run(recipe, target, other_outputs, resume=resume, overwrite=overwrite)
        if earlier is not None and earlier.training is None:
            return earlier
        noise_version = NOISE_VERSION if earlier is None else earlier.data.get("noise_version", 1)
        run = _start(recipe, data_root, available_device(device), noise_version)
        done = 0
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            if earlier is not None and earlier.training is not None and earlier.epoch is not None:
                done = earlier.epoch
                load_weights(run.model, earlier.state_dict)
                run.optimizer.load_state_dict(earlier.training["optimizer"])
            sharpness = None if monitor is None else _monitor(run, target, monitor, monitor_examples, done)
            if done == 0 and 0 in snapshots:
                _write(run, snapshot_path(target, 0), 0)
            for epoch in range(done + 1, recipe.epochs + 1):
                _train_epoch(run, epoch, progress, sharpness)
                metrics = _metrics(run, epoch)
                if not math.isfinite(metrics["train_loss"]):
                    raise _diverged(epoch, run.steps_per_epoch)
                if epoch in snapshots:
                    _write(run, snapshot_path(target, epoch), epoch, metrics)
                if sharpness is not None:  # before the checkpoint: records without a checkpoint are measured again
                    sharpness.result().save(monitor_path(target))
                elif overwrite:
                    monitor_path(target).unlink(missing_ok=True)  # of the run that is replaced
                unfinished = epoch < recipe.epochs
                state = {"optimizer": run.optimizer.state_dict()} if unfinished else None
                _write(run, target, epoch, metrics, state)
        return read_checkpoint(target)


@torch.no_grad()
def evaluate(model: nn.Module, data: DataSet, batch_size: int = 1024) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy of ``model`` on ``data`` in eval mode, accumulated in float64.

    The train or eval mode of each module is restored.
    """
    modes = [(module, module.training) for module in model.modules()]
    like = next(model.parameters())
    loss = correct = torch.zeros((), dtype=torch.float64)
    model.eval()
    try:
        for start in range(0, len(data), batch_size):
            batch = slice(start, start + batch_size)
            logits, labels = model(data.inputs[batch].to(like)), data.targets[batch].to(like.device)
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
    noise: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_set) / self.recipe.batch_size)

    def learning_rate(self, step: int) -> float:
        return learning_rate(self.recipe, step, self.steps_per_epoch * self.recipe.epochs)


def _start(recipe: Recipe, data_root: str | os.PathLike[str] | None, device: torch.device, noise_version: int) -> _Run:
    noise: dict[str, Any] = {
        "label_noise": recipe.label_noise,
        "noise_seed": recipe.noise_seed,
        "noise_version": noise_version,
    }
    load = functools.partial(load_data, recipe.data, root=data_root, **noise)
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
    return _Run(recipe, model, args, make_optimizer(recipe, model), train_set, test_set, device, noise)


def _monitor(run: _Run, target: Path, every: int, examples: int, epoch: int) -> SharpnessMonitor:
    """Monitor of a run that continues after ``epoch`` epochs, including the records of those epochs."""
    recipe, data = run.recipe, (run.train_set.inputs, run.train_set.targets)
    origin = {"checkpoint": str(target), "data": recipe.data, "split": "train", "label_noise": recipe.label_noise}
    origin |= {"recipe": dataclasses.asdict(recipe)}
    problem = Problem(model=run.model, loss=nn.CrossEntropyLoss(), data=data, provenance=origin)
    monitor = SharpnessMonitor(problem, run.optimizer, every=every, examples=examples, seed=recipe.seed)
    if epoch == 0:
        monitor.measure(0)
        return monitor
    before = monitor_path(target)
    monitor.resume(MonitorResult.load(before) if before.exists() else monitor.result(), epoch * run.steps_per_epoch)
    return monitor


def _train_epoch(run: _Run, epoch: int, progress: Progress | None, monitor: SharpnessMonitor | None) -> None:
    recipe, model, optimizer = run.recipe, run.model, run.optimizer
    _reseed(run.device, derived_seed(recipe.seed, "dropout", epoch))
    generator = stream(recipe.seed, "order", epoch)
    order = torch.randperm(len(run.train_set), generator=generator).to(run.device)
    # SAM and LBFGS need a closure. For the others the gradient is taken before step(), whose hook may shrink w.
    needs_closure = _needs_closure(optimizer)
    seen, loss_sum, correct = 0, 0.0, 0
    model.train()
    for i in range(run.steps_per_epoch):
        batch = order[i * recipe.batch_size : (i + 1) * recipe.batch_size]
        step = (epoch - 1) * run.steps_per_epoch + i
        inputs, targets = run.train_set.inputs[batch], run.train_set.targets[batch]
        # Loss, number of correct predictions and examples of each chunk of the batch, at the weights before the step.
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
        elif needs_closure:
            optimizer.step(closure)  # type: ignore[arg-type]
        else:
            closure()
            optimizer.step()
        if monitor is not None:
            monitor.step(step + 1)
        for value, num_correct, examples in at_w.values():
            seen, loss_sum, correct = seen + examples, loss_sum + value * examples, correct + num_correct
        if progress is not None:
            total = run.steps_per_epoch * recipe.epochs
            progress(step + 1, total, {"loss": loss_sum / seen, "accuracy": correct / seen})


def _needs_closure(optimizer: Optimizer) -> bool:
    return inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty


def _metrics(run: _Run, epoch: int) -> dict[str, float]:
    """Loss and accuracy of both splits, and the learning rate of the epoch's last step (epoch 0: the first step)."""
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
        "Lower the learning rate (--lr). The files of finished epochs are kept."
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
        data={"name": run.recipe.data, **run.noise},
        recipe=recipe,
        epoch=epoch,
        metrics=_metrics(run, epoch) if metrics is None else metrics,
        training=state,
    )


def _reseed(device: torch.device, seed: int) -> None:
    # torch.manual_seed would also reseed devices whose state is not forked.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
