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

# Limits for a pickled module: number of submodules, depth of nesting.
MAX_MODULES, MAX_DEPTH = 100_000, 100


def unpickle_inert(stream: BinaryIO) -> tuple[Any, list[str]]:
    """Unpickle a file with every unknown class replaced by an inert stand-in.

    Each object becomes an ordered dict with the ``__dict__`` of the object. torch's weights-only unpickler reads the
    file; it calls only tensor constructors and the stand-ins, and rejects modules that run commands.

    Returns: the contents, and the names of the unknown classes.

    Raises: pickle.UnpicklingError for contents that this unpickler rejects, for old formats, and with torch before 2.6.
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
    """State dict of a module read by ``unpickle_inert``; None for other values, and for modules beyond the limits."""
    if not _is_module(value):
        return None
    found: dict[str, Tensor] = {}
    left = [("", value)]
    seen = 0
    while left:
        prefix, module = left.pop()
        held, seen = vars(module), seen + 1
        # Shared modules let a file of a few kilobytes hold 2^60 paths.
        if seen > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            return None
        transient, buffers = held.get("_non_persistent_buffers_set"), held.get("_buffers")
        transient = transient if isinstance(transient, set | frozenset | list | tuple) else ()
        buffers = buffers if isinstance(buffers, Mapping) else {}
        own = {**held["_parameters"], **{k: b for k, b in buffers.items() if k not in transient}}
        found |= {f"{prefix}{name}": t for name, t in own.items() if isinstance(name, str) and isinstance(t, Tensor)}
        children = [(f"{prefix}{name}.", child) for name, child in held["_modules"].items() if _is_module(child)]
        left += children[::-1]
    return found


def _is_module(value: Any) -> bool:
    held = vars(value) if type(value) is OrderedDict else {}
    return isinstance(held.get("_parameters"), Mapping) and isinstance(held.get("_modules"), Mapping)


def _stand_in(name: str) -> type:
    """A class that ignores its arguments, in place of the class or function ``name``."""

    class Called(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return OrderedDict() if name == "collections.defaultdict" else object.__new__(cls)  # type: ignore[arg-type]

    class StandIn(metaclass=Called):
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return OrderedDict()  # the only type for which torch's unpickler sets both items and attributes

        def __setstate__(self, state: Any) -> None:
            """Ignore the state."""

    StandIn.__name__ = StandIn.__qualname__ = name
    return StandIn


INDEX = ".metadata"

# The classes of an index; calling them has no side effects.
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


class DistributedCheckpoint:
    """Read the index of a ``torch.distributed.checkpoint`` folder, and selected tensors.

    Attributes:
        tree: nested dicts as they were saved, with meta tensors (no memory) as placeholders.
        read_from: the index file and the shard files.

    Raises: CheckpointError if the index is damaged, or names files outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree: dict[str, Any] = {}
        self._names: dict[int, str] = {}
        self._shards: dict[str, list[tuple[Any, Any]]] = {}
        try:
            self._index = _Index(io.BytesIO((folder / INDEX).read_bytes())).load()
            self._read_index()
        except CheckpointError:
            raise
        # A damaged pickle can raise nearly anything.
        except Exception as error:
            raise CheckpointError(
                f"{folder / INDEX} must be an index of torch.distributed.checkpoint, but is damaged. Copy it again."
            ) from error

    def _read_index(self) -> None:
        paths = self._index.planner_data or {}
        for name, entry in self._index.state_dict_metadata.items():
            path = paths.get(name, (name,))
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
            self._shards.setdefault(index.fqn, []).append((index, info))
        files = sorted({str(info.relative_path) for info in self._index.storage_data.values()})
        outside = [file for file in files if Path(file).name != file]
        if outside:
            raise CheckpointError(
                f"The index of {self.folder} must name files of its own folder, got {outside[0]!r}. Do not trust it."
            )
        self.read_from = [self.folder / file for file in (INDEX, *files)]

    def read(self, chosen: Mapping[str, Tensor], unpickle: Callable[[Path, io.BytesIO], Any]) -> dict[str, Tensor]:
        """Read the tensors of the placeholders ``chosen``; ``unpickle(file, bytes)`` reads one shard.

        Raises: CheckpointError if shards are missing, or do not match the index.
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
        for index, info in self._shards.get(name, ()):
            path = self.folder / info.relative_path
            try:
                with path.open("rb") as stream:
                    stream.seek(info.offset)
                    # At most the file's size: a damaged length must not allocate more.
                    shard = unpickle(path, io.BytesIO(stream.read(min(info.length, path.stat().st_size))))
                target, known = whole, covered
                for dimension, (start, size) in enumerate(zip(index.offset, shard.shape, strict=True)):
                    target, known = target.narrow(dimension, start, size), known.narrow(dimension, start, size)
                if shard.dtype != whole.dtype or bool(known.any()):
                    raise ValueError("another dtype, or an overlap with another shard")
                target.copy_(shard)
                known.fill_(True)
            except CheckpointError:
                raise
            except (OSError, RuntimeError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise CheckpointError(f"The shard of {name} in {path} is missing or damaged. Copy it again.") from error
        if not bool(covered.all()):
            raise CheckpointError(
                f"The shards of {name} in {self.folder} must hold {whole.numel()} values, got {int(covered.sum())}. "
                "Copy it again."
            )
        return whole


class _Index(pickle._Unpickler):
    """Unpickler for the classes of an index; in Python, since a malicious file can make the C one allocate 64 GB."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module in TENSOR_MODULES and name in CLASSES:
            return super().find_class(module, name)
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index")
