"""Identify a measurement: hashes of model, loss, data and settings, the same in every process."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import hashlib
import inspect
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sharpscope.errors import ArgumentError, SharpscopeError
from sharpscope.objective import Objective
from sharpscope.objective.micro_batches import as_batches, walk
from sharpscope.random_streams import stream
from sharpscope.version import __version__
from sharpscope.weights.restore import preserved, strided

# Examples that the probe evaluates.
EXAMPLES = 32


def key_of(objective: Objective, **settings: Any) -> str:
    """Hash of a measurement: model, loss, data, ``settings``, precision, device and versions.

    Model and loss are identified by their plain attributes, their code with the constants that it reads (``code_of``;
    not that of installed packages), and what they compute on a few examples (``probe``). Call this before the
    micro-batch is chosen.

    Cost: one walk over the data without the model, and the probe.
    """
    problem = objective.problem
    return fingerprint(
        state_of(problem.model),
        [name for name, p in problem.model.named_parameters() if p.requires_grad],
        state_of(problem.loss),
        problem.data,
        [problem.params, problem.mode, float(problem.weight_decay)],
        [objective.curvature.name, objective.dtype, objective.device, objective.micro_batch],
        settings,
        [__version__, torch.__version__, torch.get_num_threads()],
        probe(objective),
    )


def probe(objective: Objective) -> list[Tensor]:
    """Loss, weight, gradient and Hessian product with a fixed vector on the first examples, to identify the code.

    Only loss and gradient, or only the loss, if the model cannot be differentiated further; empty if the loss fails
    (the first analysis reports why). Bit-identical for the same code. ``objective`` is not changed.

    Cost: 1 gradient and 1 product of 32 examples (or of the loader's first batch, if batches are kept), not counted.
    """
    # A separate objective on the same model, so that counters, micro-batch and memory limit do not change.
    own = Objective(
        objective.terms.problem_with(objective.problem.data),
        dtype=objective.dtype,
        device=objective.device,
        micro_batch=objective.micro_batch,
        curvature=objective.curvature,
    )
    vector = torch.randn(1, own.num_params, generator=stream(0, "probe")).to(own.device, own.dtype)

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
    """Use deterministic kernels if torch has them: atomic additions on a GPU would change the probe's last bits."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_deterministic_debug_mode(before)


def state_of(thing: Any) -> list[Any]:
    """Parameters, buffers and plain attributes of a model or loss."""
    if isinstance(thing, functools.partial):
        return [state_of(thing.func), _plain_state({**dict(enumerate(thing.args)), **thing.keywords})]
    if inspect.ismethod(thing):
        return [thing.__name__, state_of(thing.__self__)]
    if not isinstance(thing, nn.Module):
        attributes = _plain_state(getattr(thing, "__dict__", {}))
        code = code_of(thing if isinstance(thing, types.FunctionType) else type(thing))
        return [type(thing).__qualname__, attributes, code]
    internal = vars(nn.Module())
    modules = {
        name: [type(module).__qualname__, {k: v for k, v in vars(module).items() if k not in internal and _is_plain(v)}]
        for name, module in thing.named_modules()
    }
    kinds = {type(module).__qualname__: code_of(type(module)) for module in thing.modules()}
    return [dict(thing.named_parameters()), dict(thing.named_buffers()), modules, kinds]


def code_of(thing: Any) -> dict[str, Any]:
    """The code of a function or class, by name, of all it calls by name, and the constants that it reads.

    Bytecode, constants, and the plain globals, attributes of modules and variables of an enclosing function. Code of
    installed packages is left out.
    """
    found: dict[str, Any] = {}
    _collect_code(thing, found)
    return found


def _collect_code(thing: Any, found: dict[str, Any]) -> None:
    if isinstance(thing, type):
        for kind in thing.__mro__:
            for function in vars(kind).values():
                _collect_code(getattr(function, "__func__", getattr(function, "fget", function)), found)
        return
    thing = inspect.unwrap(thing) if callable(thing) else thing
    if not isinstance(thing, types.FunctionType) or "site-packages" in thing.__code__.co_filename:
        return
    name = f"{thing.__module__}.{thing.__qualname__}"
    if name in found or thing.__code__.co_filename.startswith(_STANDARD_LIBRARY):
        return
    read = _names_read(thing.__code__)
    used = {n: thing.__globals__[n] for n in read & thing.__globals__.keys()}
    for module in [value for value in used.values() if isinstance(value, types.ModuleType)]:
        if "site-packages" not in (getattr(module, "__file__", None) or "site-packages"):
            used.update({f"{module.__name__}.{n}": vars(module)[n] for n in read & vars(module).keys()})
    for variable, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            used[f"<{variable}>"] = cell.cell_contents
    functions = {n: value for n, value in used.items() if isinstance(value, types.FunctionType | type)}
    plain = {n: value for n, value in used.items() if n not in functions and _is_plain(value)}
    defaults = [value for value in (*(thing.__defaults__ or ()), thing.__kwdefaults__) if _is_plain(value)]
    found[name] = [_bytes_of(thing.__code__), plain, defaults]
    for value in functions.values():
        _collect_code(value, found)


_STANDARD_LIBRARY = os.path.dirname(os.__file__)


def _names_read(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names_read(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _bytes_of(code: types.CodeType) -> list[Any]:
    """Bytecode and constants, the same in every process."""
    constants = [
        _bytes_of(c) if isinstance(c, types.CodeType) else sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c)
        for c in code.co_consts
    ]
    return [code.co_code, list(code.co_names), constants]


def _plain_state(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The plain entries of ``values``, and the state of the modules in it."""
    modules = {name: state_of(value) for name, value in values.items() if isinstance(value, nn.Module)}
    return {**{name: value for name, value in values.items() if _is_plain(value)}, **modules}


def _is_plain(value: Any) -> bool:
    """Whether ``value`` is a scalar, text, tensor, array or function, or a collection or record of them."""
    if isinstance(value, Mapping):
        return all(_is_plain(entry) for item in value.items() for entry in item)
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if _is_record(value):
        return _is_plain(vars(value))
    return isinstance(value, SCALARS + FUNCTIONS + (np.generic, enum.Enum)) or has_bytes(value)


def _is_record(value: Any) -> bool:
    """Whether ``value`` holds named values and nothing else, as the configuration of a model does."""
    if isinstance(value, type) or hasattr(value, "__getitem__") or not hasattr(value, "__dict__"):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace | argparse.Namespace)


# blake2b hashes about 1 GB a second on one core, several times what SHA-256 does without hardware support.
DIGEST_BYTES = 16

SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, os.PathLike)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)


def fingerprint(*values: Any) -> str:
    """Hash (32 hexadecimal digits) of the exact ``values``, the same in every process.

    Tensors and arrays are hashed by dtype, shape and bytes, independent of device and strides; scalars, text, dtypes,
    devices and paths by type and value; functions by name; mappings and sets independent of their order. Data (a
    Dataset, a DataLoader, an iterable) are hashed batch by batch; all random states are restored.

    Cost: one walk over the data, and about 1 s per gigabyte.

    Raises: ArgumentError for a value that cannot be hashed; DataError for data that can be iterated over only once.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    # Each value is preceded by its type and size, so that different values never give the same bytes.
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, FUNCTIONS):  # by name: what they compute is seen by the probe
        value = f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, enum.Enum):
        value = str(value)
    if _is_record(value):
        value = {"type": type(value), **vars(value)}
    if isinstance(value, SCALARS):
        text = repr(value).encode()
        _tag(digest, type(value).__name__, len(text))
        digest.update(text)
    elif isinstance(value, Tensor) and value.layout != torch.strided:
        _tag(digest, "sparse", value.layout, *value.shape)
        for part in strided(value):
            _add(digest, part)
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
            for batch in walk(as_batches(value)):
                _add(digest, batch)
        _tag(digest, "end of data")
    else:
        raise ArgumentError(
            f"A fingerprint needs tensors, arrays, numbers, text or batches of them, got a {type(value).__name__}. "
            "Pass the values that define it instead."
        )


def _tag(digest: hashlib.blake2b, *words: object) -> None:
    digest.update(f"<{' '.join(map(str, words))}>".encode())


def has_bytes(value: Any) -> bool:
    """Whether ``value`` is a dense tensor, or an array of numbers or text."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_quantized
    return isinstance(value, np.ndarray) and not value.dtype.hasobject
