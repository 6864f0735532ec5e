"""The recipe of a training run, and the files that the run writes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from sharpscope.checkpoint import Checkpoint, read_checkpoint
from sharpscope.errors import ArgumentError, CheckpointError, OutputError, nearest, require_count
from sharpscope.optim import ASAM, GSAM, SAM, FriendlySAM, LookSAM
from sharpscope.zoo import DATASETS, MODELS

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
