"""The user's model without what others put around it, run as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from sharpscope.errors import ProblemError
from sharpscope.problem import Problem


def bare(problem: Problem) -> Problem:
    """``problem`` of the module inside DataParallel, DistributedDataParallel and ``torch.compile``.

    Their forward pass has hooks and collectives of its own, and a compiled graph has no second derivative. The weights
    are the same tensors; ``params`` may name them either way.

    Raises: ProblemError for a model that lies in shards on several processes.
    """
    model, prefix = problem.model, ""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model, prefix = model.module, f"{prefix}module."
        elif "_orig_mod" in model._modules and type(model).__name__ == "OptimizedModule":
            model, prefix = model._modules["_orig_mod"], f"{prefix}_orig_mod."  # type: ignore[assignment]
        else:
            break
    sharded = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if sharded or any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise ProblemError(
            "The model must be whole on one process to be monitored, but its parameters are sharded. Measure its "
            "checkpoints instead."
        )
    given = problem.params
    params = given.removeprefix(prefix) if isinstance(given, str) else [p.removeprefix(prefix) for p in given]
    return replace(problem, model=model, params=params)


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """What ``Module.compile`` or ``torch.compile`` made of ``model`` or of modules in it is not used in the block."""
    own = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    compiled = bool(own) or any(type(m).__name__ == "OptimizedModule" for m in model.modules())
    stance = getattr(torch.compiler, "set_stance", None)  # since torch 2.6
    if not compiled or stance is None:
        yield
        return
    with stance("force_eager"):
        yield
