"""Unpickle foreign classes and distributed checkpoints as inert data, without running their code."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharpscope.errors import CheckpointError

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


INDEX = ".metadata"

# All that an index is made of; none of it does anything when called.
TENSOR_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
PLAIN: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PureWindowsPath,
}
CLASSES = (
    *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
    *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo"),
)


class Pieces:
    """The tensors of a folder, as nested dicts of placeholders, and the means to read some of them.

    Attributes:
        tree: nested dicts as they were saved; in place of a tensor one of its shape without memory.
        read_from: the index, and the files that hold the pieces.

    Raises: CheckpointError for a folder whose index is damaged, or names files elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._pieces: dict[str, list[tuple[Any, Any]]] = {}
        try:
            self._index = _Index(io.BytesIO((folder / INDEX).read_bytes())).load()
            self._plan()
        except CheckpointError:
            raise
        # A damaged pickle can raise nearly anything.
        except Exception as error:
            raise CheckpointError(
                f"{folder / INDEX} must be an index of torch.distributed.checkpoint, but is damaged. Copy it again."
            ) from error

    def _plan(self) -> None:
        places = self._index.planner_data or {}
        for name, entry in self._index.state_dict_metadata.items():
            path = places.get(name, (name,))
            if not hasattr(entry, "chunks") or not all(isinstance(key, str) for key in path):
                continue
            branch = self.tree
            for key in path[:-1]:
                branch = branch.setdefault(key, {})
            if path[-1] in branch:
                raise CheckpointError(f"{self.folder} has two tensors under {'.'.join(path)}. Copy it again.")
            branch[path[-1]] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            self._names[id(branch[path[-1]])] = name
        for index, info in self._index.storage_data.items():
            self._pieces.setdefault(index.fqn, []).append((index, info))
        files = sorted({str(info.relative_path) for info in self._index.storage_data.values()})
        foreign = [file for file in files if Path(file).name != file]
        if foreign:
            raise CheckpointError(f"{self.folder} must name files of its own, got {foreign[0]!r}. Do not trust it.")
        self.read_from = [self.folder / file for file in (INDEX, *files)]

    def read(self, chosen: Mapping[str, Tensor], unpickle: Callable[[Path, io.BytesIO], Any]) -> dict[str, Tensor]:
        """The tensors whose placeholders are ``chosen``, each piece through ``unpickle(file, bytes)``.

        Raises: CheckpointError where pieces are missing, or other ones than the index says.
        """
        held = sum(file.stat().st_size for file in self.read_from[1:] if file.is_file())
        if sum(t.numel() * t.element_size() for t in chosen.values()) > held:
            raise CheckpointError(
                f"{self.folder} would unpack to more than its {held:,} bytes: it is damaged, or compressed. Convert it "
                "with torch.distributed.checkpoint.format_utils.dcp_to_torch_save."
            )
        return {name: self._tensor(self._names[id(tensor)], tensor, unpickle) for name, tensor in chosen.items()}

    def _tensor(self, name: str, like: Tensor, unpickle: Callable[[Path, io.BytesIO], Any]) -> Tensor:
        whole = torch.empty(like.shape, dtype=like.dtype)
        covered = torch.zeros(like.shape, dtype=torch.bool)
        for index, info in self._pieces.get(name, ()):
            path = self.folder / info.relative_path
            try:
                with path.open("rb") as stream:
                    stream.seek(info.offset)
                    # No more than there is, lest a damaged length ask for memory.
                    piece = unpickle(path, io.BytesIO(stream.read(min(info.length, path.stat().st_size))))
                place, known = whole, covered
                for dimension, (start, size) in enumerate(zip(index.offset, piece.shape, strict=True)):
                    place, known = place.narrow(dimension, start, size), known.narrow(dimension, start, size)
                if piece.dtype != whole.dtype or bool(known.any()):
                    raise ValueError("of another type, or in the place of another piece")
                place.copy_(piece)
                known.fill_(True)
            except CheckpointError:
                raise
            except (OSError, RuntimeError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise CheckpointError(f"The piece of {name} in {path} is missing or damaged. Copy it again.") from error
        if not bool(covered.all()):
            raise CheckpointError(
                f"The pieces of {name} in {self.folder} must hold {whole.numel()} numbers, got {int(covered.sum())}. "
                "Copy it again."
            )
        return whole


class _Index(pickle._Unpickler):
    """Of the classes of an index alone; in Python, since the unpickler in C can be told to take 64 GB for nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module in TENSOR_MODULES and name in CLASSES:
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")
