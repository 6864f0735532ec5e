"""The finished parts of a comparison on disk, by which the same call goes on after a kill."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sharpscope.errors import DataError
from sharpscope.results import SliceResult
from sharpscope.results.comparison import ANALYSES, Performance
from sharpscope.results.serialization import Misfit, as_json, head, opened, read, value_as, write
from sharpscope.resume.journal import discard


class Parts:
    """The finished parts of a comparison in a folder, each with the key of what it is of.

    A part is used again only under its own key; a killed one goes on in its journal.

    Args:
        folder: made when the first part is written; None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def keep(self, name: str, part: str, key: Callable[[], str], measure: Callable[[Path | None], Any]) -> Any:
        """``measure(journal)``, or what it returned under this key; on disk always as it is read back.

        Args:
            name: of the checkpoint.
            part: "performance", a key of ANALYSES, or "to-" and the name of another checkpoint.
            key: the hash of what decides the part, which walks the data.
        """
        if self._folder is None:
            return measure(None)
        now, path = key(), self._folder / f"{_plain(name)}-{_plain(part)}.json"
        journal = path.with_suffix(".partial")
        found = _read(path, part, now)
        if found is None:
            write(path, {**head("part", {"key": now}), "holds": as_json(measure(journal))})
            found = _read(path, part, now)
            assert found is not None
        discard(journal)  # also one that was left by a kill just here
        return found


def _read(path: Path, part: str, key: str) -> Any:
    """The part at ``path``, None where there is none of this key."""
    try:
        said = opened(read(path), "part")
        if said["key"] != key:
            return None
        if part == "performance":
            return value_as(Mapping[str, Performance], said["holds"], "holds")
        return (ANALYSES[part].result if part in ANALYSES else SliceResult).from_dict(said["holds"])
    except (DataError, KeyError, Misfit):
        return None


def _plain(name: str) -> str:
    """A name as part of a file name, another for each: what had to be replaced is told apart by a hash."""
    plain = re.sub(r"[^\w.+-]", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"
