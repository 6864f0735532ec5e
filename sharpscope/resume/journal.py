"""The finished steps of a long computation on disk, so that the same call resumes after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpscope.errors import ArgumentError, OutputError
from sharpscope.files import atomic
from sharpscope.resume.fingerprint import fingerprint

Entry = dict[str, Any]

# torch aligns the memory that it allocates to this, and the last bits of a product may depend on it.
ALIGNMENT = 64


class Journal:
    """The finished steps of one computation, in order, each in a file of its own in the folder ``path``.

    A computation that asks for the same steps in the same order gets the stored ones, bit for bit, and computes and
    stores the others: killed at any moment, it loses only the current step. The checksum of an entry covers its values,
    the ``key``, the request and the checksum of the entry before. An entry is used only if its checksum is right: files
    that are damaged, of another key or of another order are computed again and replaced.

    Args:
        path: the folder, made when the first entry is written; None stores nothing and computes every step.
        key: what the computation depends on, from ``key_of``.

    Attributes:
        replayed: the number of entries read from disk so far.

    Raises: ArgumentError without a key, OutputError when ``path`` is a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str = "") -> None:
        if path is not None and not key:
            raise ArgumentError("A journal on disk must have a key, or it would be taken for another run's. Pass one.")
        self._folder = None if path is None else Path(path)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise OutputError(f"The journal must be a folder, but {self._folder} is a file. Name another place.")
        self._count = 0
        self._previous = key
        self.replayed = 0

    def once(self, label: str, compute: Callable[[], Mapping[str, Any]], *, given: Sequence[Any] = ()) -> Entry:
        """What ``compute()`` returned, now or in the run that was killed.

        Args:
            label: the name of the step.
            compute: returns tensors and plain JSON values (numbers, strings, lists of them) by name.
            given: what the step depends on besides the key, the label and the entries before; hashed exactly.

        Raises: ArgumentError for a value that cannot be stored, OutputError when it cannot be written.
        """
        if self._folder is None:
            return _storable(compute())
        request = fingerprint(self._previous, label, list(given))
        path = self._folder / f"{self._count:06d}.entry"
        # Entries are replayed from the first on: after one that was computed, no file is worth reading.
        stored = _read(path, request) if self.replayed == self._count else None
        if stored is not None:
            values, self._previous = stored
            self.replayed += 1
        else:
            values = _storable(compute())
            self._previous = _write(path, request, values)
        self._count += 1
        return values


def discard(path: str | os.PathLike[str]) -> None:
    """Remove journal and points at ``path``, whatever their key. Other files stay, and the folder with them."""
    folder = Path(path)
    for pattern in ("[0-9]*.entry", ".[0-9]*.entry.*.tmp", "*.points", "[0-9]*.npz"):  # the last of 0.1.0
        for state in folder.glob(pattern):
            state.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write(path: Path, request: str, values: Entry) -> str:
    """Store an entry, whole or not at all, and return its checksum."""
    checksum = fingerprint(request, values)
    try:
        with atomic(path) as temporary:
            torch.save({"values": values, "checksum": checksum}, temporary)
    except RuntimeError as error:  # torch's writer, where the disk is full
        raise OutputError(f"Cannot write {path}: the disk takes no more. Choose another place.") from error
    return checksum


def _read(path: Path, request: str) -> tuple[Entry, str] | None:
    """The values and the checksum at ``path`` if they are whole and answer ``request``, else None."""
    try:
        entry = torch.load(path, weights_only=True)
        values, checksum = entry["values"], entry["checksum"]
        right = checksum == fingerprint(request, values)
    except Exception:  # a missing, damaged or foreign file makes the parser raise any kind of error
        return None
    return (_storable(values), checksum) if right else None


def _storable(values: Mapping[str, Any]) -> Entry:
    """``values`` as an entry holds them: tensors in memory of their own, everything else as JSON."""
    entry: Entry = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            entry[name] = _owned(value.detach())
        else:
            try:
                entry[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                came = type(value).__name__
                raise ArgumentError(f"A journal keeps tensors and JSON values, got a {came} as {name!r}.") from error
    return entry


def _owned(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy where it is not aligned or a view of a larger tensor; dense tensors keep their strides.

    So it is laid out as it comes back from disk, and later products with it have the same last bits.
    """
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
