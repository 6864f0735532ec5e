"""What ``sharpscope compare`` is given and keeps: checkpoints by name and group, and the parts that are done."""

from __future__ import annotations

import argparse
import glob
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any


def groups(args: argparse.Namespace) -> dict[str, list[str]]:
    """The files of each group by its name; empty where checkpoints stand for themselves.

    Raises: ArgumentError where checkpoints come both ways, a group twice, or a pattern that no file matches.
    """
    from sharpscope.errors import ArgumentError

    asked = [("sgd", args.sgd), ("sam", args.sam)]
    for name, *more in args.group or ():
        group, equals, pattern = name.partition("=")
        if not equals or not group:
            raise ArgumentError(f"--group must be NAME=PATTERN, as adam='adam-*.pt', got {name!r}.")
        asked.append((group, [pattern, *more]))
    named = [(group, patterns) for group, patterns in asked if patterns]
    found: dict[str, list[str]] = {}
    for group, patterns in named:
        if group in found:
            raise ArgumentError(f"A group must be named once, got {group!r} twice. Give it several patterns instead.")
        found[group] = [path for pattern in patterns for path in _matching(pattern)]
    if found and args.checkpoints:
        raise ArgumentError("Checkpoints stand for themselves or in groups, got both. Name all in groups, or none.")
    if len(found) == 1:
        raise ArgumentError(f"A group needs another to be compared with, got {next(iter(found))!r} alone.")
    return found


def names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart: "sgd.pt", or "sgd/last.pt" and "sam/last.pt".

    Raises: ArgumentError for a path that comes twice.
    """
    from sharpscope.errors import ArgumentError

    parts = [Path(path).resolve().parts for path in paths]
    twice = next((paths[i] for i, p in enumerate(parts) if p in parts[:i]), None)
    if twice is not None:
        raise ArgumentError(f"A comparison needs each checkpoint once, got {twice} twice. Name another.")
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(p[-depth:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(paths)


def has_test(args: argparse.Namespace) -> bool:
    """Whether there are test data: of a bundled set, or of a problem() that takes ``split``."""
    from sharpscope.errors import ArgumentError
    from sharpscope.problem_file import problem_of

    if args.problem is None:
        return True
    try:
        problem_of(args.problem, "test")
    except ArgumentError:
        return False  # what is wrong with the file itself shows when it is loaded
    return True


class Parts:
    """The finished parts of a comparison in a folder, each with the key of what it is of.

    A part is used again only under its own key; a killed one goes on in its journal.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, name: str, part: str, key: Callable[[], str], measure: Callable[[Path | None], Any]) -> Any:
        """``measure(journal)``, or what it returned under this key; always as it is read back from disk."""
        from sharpscope.errors import DataError
        from sharpscope.resume.journal import discard

        now, path = key(), self._folder / f"{_plain(name)}-{_plain(part)}.json"
        kind = part.partition("-")[0]
        try:
            found, known = _read(path, kind)
        except DataError:
            known = ""
        journal = path.with_suffix(".partial")
        if known != now:
            _write(path, measure(journal), now)
            found = _read(path, kind)[0]
        discard(journal)  # also one that was left by a kill just here
        return found


def _read(path: Path, kind: str) -> tuple[Any, str]:
    """The result at ``path``, and its key."""
    from sharpscope.errors import DataError
    from sharpscope.results import DensityResult, EigenResult, SharpnessResult, SliceResult, TraceResult
    from sharpscope.results.comparison import Performance
    from sharpscope.results.record import opened, read

    if kind == "performance":
        said = opened(read(path), "performance")
        try:
            key = str(said.pop("key"))
            return {split: Performance(**{**one, "loss": _number(one["loss"])}) for split, one in said.items()}, key
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} must hold losses by split, got: {error}.") from error
    kinds: dict[str, Any] = {"eigen": EigenResult, "trace": TraceResult, "density": DensityResult}
    kinds["sharpness"] = SharpnessResult
    result = kinds.get(kind, SliceResult).load(path)
    plain = dict(result.provenance)
    return replace(result, provenance={k: v for k, v in plain.items() if k != "key"}), str(plain.get("key"))


def _write(path: Path, result: Any, key: str) -> None:
    from sharpscope.results.record import head, plain, write

    if isinstance(result, dict):
        write(path, {**head("performance", {"key": key}), **{s: plain(asdict(one)) for s, one in result.items()}})
    else:
        replace(result, provenance={**result.provenance, "key": key}).save(path)


def _number(value: float | None) -> float:
    """JSON has null for what is not finite."""
    return float("nan") if value is None else value


def _matching(pattern: str) -> list[str]:
    """The files that a pattern matches, sgd-10.pt after sgd-9.pt."""
    from sharpscope.errors import ArgumentError

    found = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
    if not found:
        raise ArgumentError(f"No checkpoint matches {pattern!r}. Check the pattern, and the folder you are in.")
    return sorted(found, key=lambda path: [(len(p), p) if p.isdigit() else (0, p) for p in re.split(r"(\d+)", path)])


def _plain(name: str) -> str:
    """A name as part of a file name, another for each: what had to be replaced is told apart by a hash."""
    plain = re.sub(r"[^\w.+-]", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"
