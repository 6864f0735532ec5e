"""Store the finished steps of a long computation on disk, so that the same call resumes after a kill."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpscope.atomic_io import atomic
from sharpscope.errors import ArgumentError, OutputError
from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import LossAndGradient
from sharpscope.resume.key import fingerprint

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


# The counters of the cost that are stored with a step.
COUNTERS = ("passes", "hvps", "example_gradients", "seconds")


def journaled_hvp(objective: Objective, journal: Journal, progress: Progress) -> Callable[[Tensor], Tensor]:
    """``objective.products`` that reads finished passes from ``journal``, with their loss, gradient and cost.

    The micro-batch is settled first, and stored: the last bits depend on it.
    """
    settled = journal.once("micro-batch", lambda: _settled(objective))
    objective.micro_batch = settled["size"]

    def products(rows: Tensor) -> Tensor:
        before = journal.replayed
        entry = once_with_cost(objective, journal, "pass", lambda: _pass(objective, rows, progress), given=[rows])
        if journal.replayed > before:
            _restore(objective, entry)
            progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)
        images: Tensor = entry["products"]
        return images

    return products


def once_with_cost(
    objective: Objective,
    journal: Journal,
    label: str,
    compute: Callable[[], Mapping[str, Any]],
    *,
    given: Sequence[Any] = (),
) -> Entry:
    """``journal.once``, where a stored step leaves the cost as it was after it was computed."""

    def charged() -> Entry:
        values = compute()
        return {**values, "cost": {name: getattr(objective.cost_counter, name) for name in COUNTERS}}

    before = journal.replayed
    entry = journal.once(label, charged, given=given)
    if journal.replayed > before:
        objective.cost_counter.restore(**entry["cost"])
    return entry


def _settled(objective: Objective) -> Entry:
    objective.choose_micro_batch()
    return {"size": objective.micro_batch}


def _pass(objective: Objective, rows: Tensor, progress: Progress) -> Entry:
    """One pass over the data: the products, and what it leaves in ``objective``."""
    products = objective.products(rows, progress)
    return {"products": products, **vars(objective.last_pass), "micro_batch": objective.micro_batch}


def _restore(objective: Objective, entry: Entry) -> None:
    """Leave ``objective`` as the stored pass left it."""
    objective.last_pass = LossAndGradient(entry["loss"], entry["gradient"], entry["spread"], entry["examples"])
    objective.num_examples, objective.terms.checked = entry["examples"], True
    objective.micro_batch = entry["micro_batch"]


# The layout of a file; files of another are not read.
FORMAT = 1

_CHECK = struct.Struct("<I")

Place = tuple[float, ...]


class PointLog:
    """Values by the coordinates of the point, appended to a file in ``folder``; each is a whole record or none.

    What any file there holds under the same ``key`` (other weights, data, directions or configuration have another)
    counts as finished, whatever process wrote it: each writes to the file of its ``name``. A file of another key gives
    way when the first point of this one is added. A record that a kill cut short is dropped.

    Args:
        folder: made when the first point is added; None keeps points in memory alone.
        key: what the values depend on beside the coordinates, from ``fingerprint``.
        coordinates, values: how many numbers of each.
        name: of this process's file.

    Raises: OutputError when a file cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, key: str, coordinates: int, values: int, name: str = "points"
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._name, self._coordinates = name, coordinates
        layout = {"format": FORMAT, "key": key, "coordinates": coordinates, "values": values}
        self._head = json.dumps(layout).encode() + b"\n"
        self._record = struct.Struct(f"<{coordinates + values}d")
        self._found: dict[Place, tuple[float, ...]] = {}
        self._whole = 0
        self._open: int | None = None
        self.read()
        self.replayed = len(self._found)

    def __contains__(self, point: Place) -> bool:
        return point in self._found

    def __getitem__(self, point: Place) -> tuple[float, ...]:
        return self._found[point]

    def read(self) -> None:
        """Take in what other processes have finished meanwhile."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*.points")):
            whole = self._read(path)
            if path == self._path:
                self._whole = whole

    def add(self, point: Place, values: Sequence[float]) -> None:
        """Keep the values of a point: they survive a kill from now on."""
        self._found[point] = tuple(map(float, values))
        if self._folder is None:
            return
        record = self._record.pack(*point, *self._found[point])
        try:
            if self._open is None:
                self._open = self._append()
            os.write(self._open, record + _CHECK.pack(self._check(record)))
        except OSError as error:
            raise OutputError(f"Cannot write {self._path}: {error.strerror}. Choose another place.") from error

    def clear(self) -> None:
        """Forget every point; the first that is added replaces this process's file."""
        self._found, self._whole = {}, 0

    def close(self) -> None:
        """Close the file; what is in it stays."""
        if self._open is not None:
            os.close(self._open)
            self._open = None

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}.points"

    def _check(self, record: bytes) -> int:
        """A checksum under this head, which a record of another key fails, whoever wrote it into this file."""
        return zlib.crc32(record, zlib.crc32(self._head))

    def _append(self) -> int:
        """The file, open at the end of its last whole record."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(opened, self._whole)
        if not self._whole:
            os.write(opened, self._head)
        return opened

    def _read(self, path: Path) -> int:
        """Take in a file's records; returns where the last whole one ends, 0 for a file of another key."""
        try:
            data = path.read_bytes()
        except OSError:
            return 0
        position = len(self._head)
        if data[:position] != self._head:
            return 0
        size = self._record.size
        while len(data) >= position + size + _CHECK.size:
            record = data[position : position + size]
            if _CHECK.unpack_from(data, position + size)[0] != self._check(record):
                break
            numbers = self._record.unpack(record)
            self._found.setdefault(numbers[: self._coordinates], numbers[self._coordinates :])
            position += size + _CHECK.size
        return position
