"""Pickled objects of other people's classes: taken for what they hold, without running their code."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

# Modules in a pickled one, and how deep.
MODULES, DEPTH = 100_000, 100


def inert(stream: BinaryIO) -> tuple[Any, list[str]]:
    """What ``torch.load`` reads where every foreign class is replaced by one that does nothing, and their names.

    An object becomes an ordered dict whose ``__dict__`` is the object's. torch's own unpickler for weights reads, which
    calls nothing but tensors' builders and what it is given here, and refuses the modules that run commands.

    Raises: pickle.UnpicklingError for what that unpickler does not take, an older torch or an older format included.
    """
    listed = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if listed is None:
        raise pickle.UnpicklingError("torch is older than 2.6")
    stream.seek(0)
    names = sorted(listed(stream))
    stream.seek(0)
    stand_ins: Any = [(_stand_in(name), name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(stream, map_location="cpu", weights_only=True), names


def module_weights(value: Any) -> dict[str, Tensor] | None:
    """The state dict of a module that ``inert`` read, None where ``value`` is none, or is nested beyond all reason."""
    if not _is_module(value):
        return None
    found: dict[str, Tensor] = {}
    left = [("", value)]
    seen = 0
    while left:
        prefix, module = left.pop()
        held, seen = vars(module), seen + 1
        # Modules may be shared, and a file of some kilobytes could name one in 2^60 ways.
        if seen > MODULES or prefix.count(".") > DEPTH:
            return None
        passing, buffers = held.get("_non_persistent_buffers_set"), held.get("_buffers")
        passing = passing if isinstance(passing, set | frozenset | list | tuple) else ()
        buffers = buffers if isinstance(buffers, Mapping) else {}
        own = {**held["_parameters"], **{k: b for k, b in buffers.items() if k not in passing}}
        found |= {f"{prefix}{name}": t for name, t in own.items() if isinstance(name, str) and isinstance(t, Tensor)}
        children = [(f"{prefix}{name}.", child) for name, child in held["_modules"].items() if _is_module(child)]
        left += children[::-1]
    return found


def _is_module(value: Any) -> bool:
    held = vars(value) if type(value) is OrderedDict else {}
    return isinstance(held.get("_parameters"), Mapping) and isinstance(held.get("_modules"), Mapping)


def _stand_in(name: str) -> type:
    """A class, or function, that makes nothing of what it is given."""

    class Called(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return OrderedDict() if name == "collections.defaultdict" else object.__new__(cls)  # type: ignore[arg-type]

    class StandIn(metaclass=Called):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return OrderedDict()  # the one object that torch's unpickler sets both items and attributes of

        def __setstate__(self, state: Any) -> None:
            """Nothing is kept."""

    StandIn.__name__ = StandIn.__qualname__ = name
    return StandIn
