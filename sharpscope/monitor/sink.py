"""Where numbers go while a model is trained: TensorBoard, Lightning's loggers, wandb, or any function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sharpscope.errors import ArgumentError

Sink = Callable[[int, Mapping[str, float]], None]


def sink_of(log: Any) -> Sink:
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
