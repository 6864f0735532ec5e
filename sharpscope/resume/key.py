"""The key of a measurement: a hash of everything that its numbers depend on."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sharpscope.errors import ArgumentError, SharpscopeError
from sharpscope.objective import Objective
from sharpscope.objective.micro_batches import as_batches
from sharpscope.version import __version__
from sharpscope.weights.restore import preserved

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
        return list(own.terms.without_graph(lambda: own.terms.sums(own.first_examples(EXAMPLES))))

    attempts: list[Callable[[], list[Tensor]]] = [
        lambda: derivatives(vector),
        lambda: derivatives(own.empty_block()),
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
        return [_state(thing.func), _plain_state({**dict(enumerate(thing.args)), **thing.keywords})]
    if inspect.ismethod(thing):
        return [thing.__name__, _state(thing.__self__)]
    if not isinstance(thing, nn.Module):
        return [type(thing).__qualname__, _plain_state(getattr(thing, "__dict__", {}))]
    internal = vars(nn.Module())
    modules = {
        name: [type(module).__qualname__, {k: v for k, v in vars(module).items() if k not in internal and _is_plain(v)}]
        for name, module in thing.named_modules()
    }
    return [dict(thing.named_parameters()), dict(thing.named_buffers()), modules]


def _plain_state(values: Mapping[Any, Any]) -> dict[Any, Any]:
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


# blake2b hashes about 1 GB a second on one core, several times what SHA-256 does without hardware support.
DIGEST_BYTES = 16

SCALARS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, os.PathLike)


def fingerprint(*values: Any) -> str:
    """A hash (32 hexadecimal digits) of the exact ``values``, in order, equal in every process.

    Tensors and arrays are hashed by dtype, shape and bytes, whatever their device and strides; scalars, text, dtypes,
    devices and paths by type and value; mappings and sets in any order. Data (a Dataset, a DataLoader, an object to
    iterate over) are walked once and hashed by their batches; all random states are restored.

    Cost: one walk over the data without a model, and about a second a gigabyte.

    Raises: ArgumentError for a value that cannot be hashed, DataError for data that can be walked only once.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    # Each value is preceded by its type and size, so that different values never give the same bytes.
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, SCALARS):
        text = repr(value).encode()
        _tag(digest, type(value).__name__, len(text))
        digest.update(text)
    elif has_bytes(value):
        _tag(digest, "tensor" if isinstance(value, Tensor) else "array", value.dtype, *value.shape)
        if isinstance(value, Tensor):
            dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
            value = dense.reshape(-1).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, Mapping | set | frozenset):
        items = value.items() if isinstance(value, Mapping) else [(entry,) for entry in value]
        _tag(digest, "mapping" if isinstance(value, Mapping) else "set", len(value))
        digest.update("".join(sorted(fingerprint(*item) for item in items)).encode())
    elif isinstance(value, tuple | list):
        _tag(digest, "sequence", len(value))
        for entry in value:
            _add(digest, entry)
    elif not isinstance(value, Tensor) and (isinstance(value, Dataset) or hasattr(value, "__iter__")):
        with preserved(data=value):
            for batch in as_batches(value):
                _add(digest, batch)
        _tag(digest, "end of data")
    else:
        raise ArgumentError(
            f"A fingerprint needs tensors, arrays, numbers, text or batches of them, got a {type(value).__name__}. "
            "Pass what it depends on instead."
        )


def _tag(digest: hashlib.blake2b, *words: object) -> None:
    digest.update(f"<{' '.join(map(str, words))}>".encode())


def has_bytes(value: Any) -> bool:
    """Whether ``value`` is a dense tensor, or an array of numbers or text."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_quantized
    return isinstance(value, np.ndarray) and not value.dtype.hasobject
