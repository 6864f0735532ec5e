"""Pickled objects of other people's classes: taken for what they hold, without running their code."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor


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
    """The state dict of a module that ``inert`` read, None where ``value`` is none."""
    held = vars(value) if type(value) is OrderedDict else {}
    if not isinstance(held.get("_parameters"), Mapping) or not isinstance(held.get("_modules"), Mapping):
        return None
    passing = held.get("_non_persistent_buffers_set", ())
    own = {**held["_parameters"], **{k: b for k, b in held.get("_buffers", {}).items() if k not in passing}}
    found = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    for name, child in held["_modules"].items():
        found |= {f"{name}.{key}": tensor for key, tensor in (module_weights(child) or {}).items()}
    return found


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
