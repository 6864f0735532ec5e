"""What ``sharpscope compare`` is given: checkpoints by name and group, their test data, and the command itself."""

from __future__ import annotations

import argparse
import glob
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sharpscope.cli import options

# The part of a path that tells one checkpoint of a run from another.
_EPOCH = re.compile(r"(epoch|step|iter|iteration)s?[-_=.]?\d+", re.IGNORECASE)


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
    for group, paths in found.items():
        runs: dict[str, str] = {}
        for path in paths:
            first = runs.setdefault(_EPOCH.sub("", path), path)
            if first != path:
                raise ArgumentError(
                    f"A group must hold independent runs, but {first} and {path} of {group} differ in the epoch alone. "
                    "Narrow the pattern to one checkpoint a run."
                )
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
    from sharpscope.checkpoint.problem_file import problem_of
    from sharpscope.errors import ArgumentError

    if args.problem is None:
        return True
    try:
        problem_of(args.problem, "test")
    except ArgumentError:
        return False  # what is wrong with the file itself shows when it is loaded
    return True


def loaded(args: argparse.Namespace, path: str, name: str) -> Any:
    """The Problem of a checkpoint, which is paired by the numbers in its ``name`` where no recipe tells its seed."""
    problem = options.load(args, path, examples=None)
    numbers = "-".join(re.findall(r"\d+", name))
    known = (problem.provenance.get("recipe") or {}).get("seed") is not None
    return problem if known or not numbers else replace(problem, provenance={**problem.provenance, "pair": numbers})


def test_data(args: argparse.Namespace, named: Mapping[str, str]) -> Any:
    """The test data, which all checkpoints, by name, must have in common; None where there are none.

    Raises: DataError where they differ.
    """
    from sharpscope.comparing.checkpoints import SharedData

    shared = SharedData("test")
    if has_test(args):
        for name, path in named.items():
            shared.add(name, options.load(args, path, split="test", examples=None))
    return shared.data


def command(args: argparse.Namespace) -> str:
    """A command that gives the same again: as it was given, without --json and --overwrite.

    These stay where they part a list from the checkpoints after it, as in ``--model-args depth=4 --json a.pt``.
    """
    from sharpscope.cli import parser

    end = args.argv.index("--") if "--" in args.argv else len(args.argv)
    less = [word for word in args.argv[:end] if not _is_left_out(word)] + args.argv[end:]
    again = vars(parser().parse_args(less))
    same = all(again[name] == value for name, value in vars(args).items() if name not in ("argv", *_LEFT_OUT))
    return shlex.join(["sharpscope", *(less if same else args.argv)])


_LEFT_OUT = ("json", "overwrite")


def _is_left_out(word: str) -> bool:
    """Whether it is one of these options, which may be abbreviated."""
    return len(word) > 2 and any(f"--{name}".startswith(word) for name in _LEFT_OUT)


def _matching(pattern: str) -> list[str]:
    """The files that a pattern matches, sgd-10.pt after sgd-9.pt."""
    from sharpscope.errors import ArgumentError

    found = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
    if not found:
        raise ArgumentError(f"No checkpoint matches {pattern!r}. Check the pattern, and the folder you are in.")
    return sorted(found, key=lambda path: [(len(p), p) if p.isdigit() else (0, p) for p in re.split(r"(\d+)", path)])
