"""The key of a measurement: what its numbers depend on, the code of model and loss by what it computes."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharpscope.errors import SharpscopeError
from sharpscope.objective import Objective
from sharpscope.resume.fingerprint import SCALARS, fingerprint, has_bytes
from sharpscope.version import __version__

# Examples that the probe evaluates.
EXAMPLES = 32


def key_of(objective: Objective, **settings: Any) -> str:
    """The hash of a measurement: model, loss, data, ``settings``, precision, device, versions.

    The code of model and loss counts by what it computes (``probe``): a change that does not affect the probe's
    examples is not detected, unless it is in a plain attribute of a module or of the loss. To be called before the
    micro-batch is settled. Cost: one walk over the data without the model, and the probe.
    """
    problem = objective.problem
    return fingerprint(
        _state(problem.model),
        [name for name, p in problem.model.named_parameters() if p.requires_grad],
        _state(problem.loss),
        problem.data,
        [problem.params, problem.mode, float(problem.weight_decay)],
        [objective.curvature.name, objective.dtype, objective.device, objective.micro_batch],
        settings,
        [__version__, torch.__version__, torch.get_num_threads()],
        probe(objective),
    )


def probe(objective: Objective) -> list[Tensor]:
    """Loss, weight, gradient and the product with a fixed vector of the first examples, which identify the code.

    Loss and gradient, or the loss alone, where the model has no further derivative; empty where even the loss fails,
    of which the first analysis reports the reason. Bit for bit the same for the same code. ``objective`` is left as it
    was. Cost: 1 gradient and 1 product of 32 examples (the loader's first batch where batches are kept), not counted.
    """
    # An objective of its own on the same model, so that counters, micro-batch and memory limit do not change.
    own = Objective(
        objective.terms.problem_with(objective.problem.data),
        dtype=objective.dtype,
        device=objective.device,
        micro_batch=objective.micro_batch,
        curvature=objective.curvature,
    )
    vector = torch.randn(1, own.num_params, generator=torch.Generator().manual_seed(0)).to(own.device, own.dtype)

    def derivatives(block: Tensor) -> list[Tensor]:
        sums = own.accumulate([own.first_examples(EXAMPLES)], block)
        return [sums.loss, sums.weight, sums.gradient, sums.products]

    def loss() -> list[Tensor]:
        return list(own.terms.bare(lambda: own.terms.sums(own.first_examples(EXAMPLES))))

    attempts: list[Callable[[], list[Tensor]]] = [
        lambda: derivatives(vector),
        lambda: derivatives(own.no_vectors()),
        loss,
    ]
    with own.measuring(), _deterministic_kernels():
        for attempt in attempts:
            try:
                return attempt()
            except (SharpscopeError, RuntimeError):
                continue
    return []


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    """Deterministic kernels where torch has them: atomic additions on a GPU would change the probe's last bits."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _state(thing: Any) -> list[Any]:
    """Parameters, buffers and plain attributes of a model or loss: what it holds besides its code."""
    if isinstance(thing, functools.partial):
        return [_state(thing.func), _held({**dict(enumerate(thing.args)), **thing.keywords})]
    if inspect.ismethod(thing):
        return [thing.__name__, _state(thing.__self__)]
    if not isinstance(thing, nn.Module):
        return [type(thing).__qualname__, _held(getattr(thing, "__dict__", {}))]
    internal = vars(nn.Module())
    modules = {
        name: [type(module).__qualname__, {k: v for k, v in vars(module).items() if k not in internal and _is_plain(v)}]
        for name, module in thing.named_modules()
    }
    return [dict(thing.named_parameters()), dict(thing.named_buffers()), modules]


def _held(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The plain entries of ``values``, and the state of modules among them."""
    modules = {name: _state(value) for name, value in values.items() if isinstance(value, nn.Module)}
    return {**{name: value for name, value in values.items() if _is_plain(value)}, **modules}


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a scalar, text, tensor or array, or a list, tuple or mapping of them."""
    if isinstance(value, Mapping):
        return all(_is_plain(entry) for item in value.items() for entry in item)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, SCALARS) or has_bytes(value)
