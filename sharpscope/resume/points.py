"""Points that are finished, on disk as soon as each is, so that a walk over many goes on where it was killed."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from sharpscope.errors import OutputError

# The layout of a file; files of another are not read.
FORMAT = 1

_CHECK = struct.Struct("<I")

Point = tuple[float, ...]


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
        self._found: dict[Point, tuple[float, ...]] = {}
        self._whole = 0
        self._open: int | None = None
        self.read()
        self.replayed = len(self._found)

    def __contains__(self, point: Point) -> bool:
        return point in self._found

    def __getitem__(self, point: Point) -> tuple[float, ...]:
        return self._found[point]

    def read(self) -> None:
        """Take in what other processes have finished meanwhile."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in sorted(self._folder.glob("*.points")):
            whole = self._read(path)
            if path == self._path:
                self._whole = whole

    def add(self, point: Point, values: Sequence[float]) -> None:
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
