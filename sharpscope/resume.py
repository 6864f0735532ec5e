"""Store finished steps of a long computation on disk, so that the same call resumes after a kill."""

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
from sharpscope.fingerprint import fingerprint
from sharpscope.objective import Objective, Progress
from sharpscope.objective.accumulate import LossAndGradient

Entry = dict[str, Any]

# Bytes to which torch aligns its memory; the last bits of a product may depend on it.
ALIGNMENT = 64


class Journal:
    """Results of the finished steps of one computation, in order, each in a file in the folder ``path``.

    When the computation runs again, finished steps are read back, bit for bit; a kill loses only the current step. The
    checksum of an entry covers its values, the ``key``, the request and the checksum of the entry before. Files with
    another checksum (damaged, of another key or in another order) are computed again and replaced.

    Args:
        path: folder, created with the first entry; None stores nothing and computes every step.
        key: identifies the computation, from ``key_of``.

    Attributes:
        replayed: number of entries read from disk so far.

    Raises: ArgumentError if ``path`` has no key; OutputError if ``path`` is a file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str = "") -> None:
        if path is not None and not key:
            raise ArgumentError("A journal on disk must have a key, which identifies its computation. Pass one.")
        self._folder = None if path is None else Path(path)
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise OutputError(f"The journal must be a folder, but {self._folder} is a file. Choose another path.")
        self._count = 0
        self._previous = key
        self.replayed = 0

    def once(self, label: str, compute: Callable[[], Mapping[str, Any]], *, given: Sequence[Any] = ()) -> Entry:
        """Return the stored result of this step, or that of ``compute()``, which is then stored.

        Args:
            label: name of the step.
            compute: returns tensors and JSON values by name.
            given: further inputs of the step besides the key, the label and the earlier entries; hashed exactly.

        Raises: ArgumentError for a value that cannot be stored; OutputError if the entry cannot be written.
        """
        if self._folder is None:
            return _storable(compute())
        request = fingerprint(self._previous, label, list(given))
        path = self._folder / f"{self._count:06d}.entry"
        # The first entry that had to be computed invalidates all later ones.
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
    """Delete journals and point logs in the folder ``path``, and the folder if it is then empty."""
    folder = Path(path)
    for pattern in ("[0-9]*.entry", ".[0-9]*.entry.*.tmp", "*.points", "[0-9]*.npz"):  # .npz: version 0.1.0
        for state in folder.glob(pattern):
            state.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _write(path: Path, request: str, values: Entry) -> str:
    """Store an entry atomically and return its checksum."""
    checksum = fingerprint(request, values)
    try:
        with atomic(path) as temporary:
            torch.save({"values": values, "checksum": checksum}, temporary)
    except RuntimeError as error:  # of torch.save if the disk is full
        raise OutputError(f"Cannot write {path}: the disk is full. Choose another path.") from error
    return checksum


def _read(path: Path, request: str) -> tuple[Entry, str] | None:
    """Values and checksum of the entry at ``path`` if it is intact and matches ``request``, else None."""
    try:
        entry = torch.load(path, weights_only=True)
        values, checksum = entry["values"], entry["checksum"]
        right = checksum == fingerprint(request, values)
    except Exception:  # the parser can raise any error for a missing, damaged or foreign file
        return None
    return (_storable(values), checksum) if right else None


def _storable(values: Mapping[str, Any]) -> Entry:
    """``values`` as they are read back from an entry: tensors that own their memory, everything else through JSON."""
    entry: Entry = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            entry[name] = _owned(value.detach())
        else:
            try:
                entry[name] = json.loads(json.dumps(value))
            except (TypeError, ValueError) as error:
                kind = type(value).__name__
                raise ArgumentError(f"A journal stores tensors and JSON values, got a {kind} as {name!r}.") from error
    return entry


def _owned(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy if it is unaligned or a view of a larger tensor; dense tensors keep their strides.

    The layout is then the same as after reading it from disk, so later products have the same last bits.
    """
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


# Counters of the cost that are stored with a step.
COUNTERS = ("passes", "hvps", "example_gradients", "seconds")


def journaled_hvp(objective: Objective, journal: Journal, progress: Progress) -> Callable[[Tensor], Tensor]:
    """Return ``objective.products`` with finished passes read from ``journal``, with their loss, gradient and cost.

    The micro-batch is chosen first and stored (``journaled_micro_batch``).
    """
    journaled_micro_batch(objective, journal)

    def products(rows: Tensor) -> Tensor:
        before = journal.replayed
        entry = once_with_cost(objective, journal, "pass", lambda: _pass(objective, rows, progress), given=[rows])
        if journal.replayed > before:
            _restore(objective, entry)
            progress(f"pass {objective.passes} is on disk", 0, objective.num_examples)
        result: Tensor = entry["products"]
        return result

    return products


def journaled_micro_batch(objective: Objective, journal: Journal) -> None:
    """Choose the micro-batch, or take the stored choice: it is timed, and the last bits of all sums depend on it."""
    chosen = once_with_cost(objective, journal, "micro-batch", lambda: _choose_micro_batch(objective))
    objective.micro_batch = chosen["size"]


def once_with_cost(
    objective: Objective,
    journal: Journal,
    label: str,
    compute: Callable[[], Mapping[str, Any]],
    *,
    given: Sequence[Any] = (),
) -> Entry:
    """``journal.once`` that also stores the cost; a stored step restores the counters to their value after it."""

    def compute_with_cost() -> Entry:
        values = compute()
        return {**values, "cost": {name: getattr(objective.cost_counter, name) for name in COUNTERS}}

    before = journal.replayed
    entry = journal.once(label, compute_with_cost, given=given)
    if journal.replayed > before:
        objective.cost_counter.restore(**entry["cost"])
    return entry


def _choose_micro_batch(objective: Objective) -> Entry:
    objective.choose_micro_batch()
    return {"size": objective.micro_batch}


def _pass(objective: Objective, rows: Tensor, progress: Progress) -> Entry:
    """One pass over the data: the products, and the state that it leaves in ``objective``."""
    products = objective.products(rows, progress)
    return {"products": products, **vars(objective.last_pass), "micro_batch": objective.micro_batch}


def _restore(objective: Objective, entry: Entry) -> None:
    """Set the state of ``objective`` to that after the stored pass."""
    objective.last_pass = LossAndGradient(entry["loss"], entry["gradient"], entry["spread"], entry["examples"])
    objective.num_examples, objective.terms.checked = entry["examples"], True
    objective.micro_batch = entry["micro_batch"]


# Version of the file layout; files of other versions are ignored.
FORMAT = 1

_CHECK = struct.Struct("<I")

Place = tuple[float, ...]


class PointLog:
    """Append-only log of values by the coordinates of a point, in files in ``folder``.

    Each process appends to its own file, ``name``, and reads all files with the same ``key``. A file with another key
    is ignored, and overwritten if it has the same name. An incomplete record, left by a kill, is dropped.

    Args:
        folder: created with the first point; None keeps the points in memory only.
        key: identifies everything but the coordinates that the values depend on, from ``key_of``.
        coordinates: numbers per point.
        values: values per point.
        name: name of this process's file, without suffix.

    Raises: OutputError if the file cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None, key: str, coordinates: int, values: int, name: str = "points"
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self._name, self._coordinates = name, coordinates
        layout = {"format": FORMAT, "key": key, "coordinates": coordinates, "values": values}
        self._header = json.dumps(layout).encode() + b"\n"
        self._record = struct.Struct(f"<{coordinates + values}d")
        self._points: dict[Place, tuple[float, ...]] = {}
        self._valid_bytes = 0
        self._descriptor: int | None = None
        self.read()
        self.replayed = len(self._points)

    def __contains__(self, point: Place) -> bool:
        return point in self._points

    def __getitem__(self, point: Place) -> tuple[float, ...]:
        return self._points[point]

    def read(self) -> None:
        """Read the points that other processes have added."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*.points")):
            valid_bytes = self._read(path)
            if path == self._path:
                self._valid_bytes = valid_bytes

    def add(self, point: Place, values: Sequence[float]) -> None:
        """Store the values of a point; they survive a kill once this returns."""
        self._points[point] = tuple(map(float, values))
        if self._folder is None:
            return
        record = self._record.pack(*point, *self._points[point])
        try:
            if self._descriptor is None:
                self._descriptor = self._append()
            os.write(self._descriptor, record + _CHECK.pack(self._check(record)))
        except OSError as error:
            raise OutputError(f"Cannot write {self._path}: {error.strerror}. Choose another path.") from error

    def clear(self) -> None:
        """Discard all points; the next one added overwrites this process's file."""
        self._points, self._valid_bytes = {}, 0

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}.points"

    def _check(self, record: bytes) -> int:
        """CRC-32 of the header and the record, so that a record written with another key does not match."""
        return zlib.crc32(record, zlib.crc32(self._header))

    def _append(self) -> int:
        """Open this process's file, truncated after its last complete record."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(opened, self._valid_bytes)
        if not self._valid_bytes:
            os.write(opened, self._header)
        return opened

    def _read(self, path: Path) -> int:
        """Read the records of a file; return the end of the last complete one, or 0 for a file with another key."""
        try:
            data = path.read_bytes()
        except OSError:
            return 0
        position = len(self._header)
        if data[:position] != self._header:
            return 0
        size = self._record.size
        while len(data) >= position + size + _CHECK.size:
            record = data[position : position + size]
            if _CHECK.unpack_from(data, position + size)[0] != self._check(record):
                break
            numbers = self._record.unpack(record)
            self._points.setdefault(numbers[: self._coordinates], numbers[self._coordinates :])
            position += size + _CHECK.size
        return position
