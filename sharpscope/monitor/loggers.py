"""Connect the monitor to trainers (Lightning, Hugging Face) and loggers (TensorBoard, wandb, functions)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sharpscope.errors import ArgumentError
from sharpscope.importing import is_missing_module

LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(step: Callable[[int], object], offer: Callable[[Any], None]) -> Any:
    """``step(number)`` after each optimizer step on rank 0, and ``offer(optimizer)`` before the first of them."""
    # The two packages have classes of their own, so the one whose Trainer is in use comes first.
    names = sorted(LIGHTNING, key=lambda name: name not in sys.modules)
    base = _imported(names, "lightning").Callback

    class Callback(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self._seen = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self._seen = trainer.global_step
            if trainer.optimizers:
                offer(trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any, **options: Any) -> None:
            # While gradients accumulate, batches end without a step.
            if trainer.is_global_zero and trainer.global_step != self._seen:
                self._seen = trainer.global_step
                step(self._seen)

    return Callback()


def huggingface_callback(step: Callable[[int], object], offer: Callable[[Any], None]) -> Any:
    """As ``lightning_callback``."""
    base = _imported(("transformers",), "transformers").TrainerCallback

    class Callback(base):  # type: ignore[misc, valid-type]
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **options: Any) -> None:
            offer(optimizer)
            if state.is_world_process_zero:
                step(state.global_step)

    return Callback()


def _imported(names: Sequence[str], package: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not is_missing_module(error, name):
                raise
    raise ArgumentError(f"{' or '.join(names)} must be installed for this callback. Install it: pip install {package}.")


Sink = Callable[[int, Mapping[str, float]], None]


def log_function(log: Any) -> Sink:
    """``sink(step, {tag: value})`` that writes to ``log``.

    ``log`` has ``add_scalar(tag, value, step)``, ``log_metrics(dict, step)`` or ``log(dict)``, looked for in this
    order, or is called with a dict; None drops everything. Where no step can be passed it is in the dict, as
    "sharpness/step".

    Raises: ArgumentError when it is none of these.
    """
    if log is None:
        return lambda step, values: None
    if callable(getattr(log, "add_scalar", None)):

        def scalars(step: int, values: Mapping[str, float]) -> None:
            for tag, value in values.items():
                log.add_scalar(tag, value, step)

        return scalars
    if callable(getattr(log, "log_metrics", None)):
        return lambda step, values: log.log_metrics(dict(values), step)
    take = log.log if callable(getattr(log, "log", None)) else log
    if not callable(take):
        raise ArgumentError(
            "log must have add_scalar(tag, value, step), log_metrics(dict, step) or log(dict), or be callable with a "
            f"dict, got {type(log).__name__}."
        )
    return lambda step, values: take({"sharpness/step": step, **values})
