"""The files that commands write: locked until the command ends, and replaced only by the same command or on demand.

A command that can go on after an interruption writes ``asked.json`` into the folder of its saved passes: what it was
asked for, and the hash of the result that it wrote. By it the command knows its own unfinished work when it is given
again; to any other command that work is a result like another.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

FIGURES = (".png", ".pdf", ".svg")
ASKED = "asked.json"

# Locks of the command that is running, and what is left to do before it releases them.
_held = contextlib.ExitStack()


@contextlib.contextmanager
def released_at_end() -> Iterator[None]:
    """Release what ``claim`` locks in this block when it ends."""
    global _held
    outer, _held = _held, contextlib.ExitStack()
    try:
        with _held:
            yield
    finally:
        _held = outer


def claim(
    args: argparse.Namespace,
    *files: Path,
    state: Path | None = None,
    asked: Any = None,
    own: Callable[[], bool] = lambda: False,
    shared: bool = False,
) -> None:
    """Lock the files that a command will write until it ends, and check that it may write them.

    Args:
        args: the command's; with ``--overwrite`` everything may be replaced.
        files: the result first.
        state: folder of the saved passes.
        asked: what decides the result, as JSON; None for a command that cannot go on.
        own: whether the existing result is of this very command, next to what ``state`` says.
        shared: other processes of the same command write the same result.

    Raises: OutputError if a file is one of those to be read, cannot be written, or is being written by another process;
        without ``--overwrite`` also if it exists, or ``state`` holds saved passes, and they are not of this command.
    """
    from sharpscope.atomic_io import locked
    from sharpscope.errors import OutputError

    result = files[0]
    for file in files:
        _require_apart(getattr(args, "checkpoints", ()), file)
    for file in files:
        _held.enter_context(locked(file, shared=shared))
    record = {} if state is None else _record(state)
    begun = asked is not None and record.get("asked") == asked
    written, own_result = record.get("files", {}) if begun else {}, result.exists() and own()
    mine = written.get(result.name) == _digest(result) or own_result if result.exists() else begun
    if not args.overwrite:
        for file in files:
            if file.exists() and not own_result and written.get(file.name) != _digest(file):
                raise OutputError(f"{file} exists already. Name another place, or pass --overwrite.")
        if state is not None and _holds_work(state) and not begun and not (mine and not record):
            raise OutputError(
                f"{state} holds the unfinished work of another command. Give that command again to finish it, name "
                "another place, or pass --overwrite."
            )
    if state is not None and asked is not None:
        if not begun:
            _write_record(state, {"asked": asked, "files": {}})
        if not shared:
            _held.callback(_drop_if_empty, state)


def saved(out: Path) -> None:
    """Note in the folder of the saved passes that the result in ``out``, and the arrays next to it, are theirs."""
    from sharpscope.results.serialization import arrays_path

    record = _record(state(out))
    if record:
        files = [file for file in (out, arrays_path(out)) if file.exists()]
        _write_record(state(out), {**record, "files": {file.name: _digest(file) for file in files}})


def finished(out: Path) -> None:
    """Delete the saved passes of the result in ``out``."""
    from sharpscope.resume import discard

    for name in (ASKED, "directions.npz", "preview.json", "preview.npz"):
        (state(out) / name).unlink(missing_ok=True)
    discard(state(out))


def outputs(
    args: argparse.Namespace, *, arrays: bool = False, resumes: bool = False, shared: bool = False
) -> list[Path | None]:
    """The JSON file of each checkpoint, claimed; with ``arrays`` the .npz next to it too.

    ``resumes``: the command saves its passes in ``state(output)``.
    """
    from sharpscope.errors import OutputError
    from sharpscope.results.serialization import arrays_path

    if args.out is None:
        return [None] * len(args.checkpoints)
    out = Path(args.out)
    if len(args.checkpoints) == 1:
        files = [out / f"{Path(args.checkpoints[0]).stem}.json" if out.is_dir() else out]
    else:
        names = [Path(path).stem for path in args.checkpoints]
        if len(set(names)) < len(names):
            names = [f"{i}-{name}" for i, name in enumerate(names, start=1)]
        if out.is_file() or out.suffix == ".json":
            raise OutputError(f"With several checkpoints --out must be a folder, but {out} is the name of a file.")
        files = [out / f"{name}.json" for name in names]
    for path, file in zip(args.checkpoints, files, strict=True):
        if file.suffix == ".npz":
            raise OutputError(f"The result is JSON, and its vectors go beside it as .npz, got {file}. Name it .json.")
        both = [file, *([arrays_path(file)] if arrays else [])]
        claim(args, *both, state=state(file), asked=_asked(args, path) if resumes else None, shared=shared)
    return list(files)


def figure(args: argparse.Namespace) -> Path | None:
    """Where ``--figure`` goes, claimed."""
    from sharpscope.errors import OutputError

    if args.figure is None:
        return None
    path = Path(args.figure)
    if path.suffix not in FIGURES:
        raise OutputError(f"The figure must be one of {', '.join(FIGURES)}, got {path}. Name it so.")
    claim(args, path, shared=getattr(args, "shard", None) is not None)
    return path


def state(out: Path) -> Path:
    """The folder of the saved passes of an unfinished run that writes ``out``."""
    return out.with_name(f"{out.name}.partial")


# Options that do not decide a result: where it goes, how it is shown, and how long the command goes on.
_UNDECISIVE = ("run", "argv", "overwrite", "figure", "json", "out", "shard", "max_passes", "vectors", "checkpoints")
# Options that name files, whose contents decide.
_FILES = ("to", "through", "trajectory", "eigen", "problem")


def _asked(args: argparse.Namespace, checkpoint: str) -> Any:
    """What decides the result of one checkpoint, as JSON."""
    given = {name: value for name, value in vars(args).items() if name not in _UNDECISIVE}
    named = [path for name in _FILES for path in _listed(given.get(name))]
    return json.loads(json.dumps({**given, "files": [_content(path) for path in [checkpoint, *named]]}, default=str))


def _listed(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _content(path: str) -> str:
    """The hash of a checkpoint or another file; of what is no file its name."""
    from sharpscope.checkpoint import digest_of
    from sharpscope.errors import CheckpointError

    try:
        return digest_of(path)
    except (OSError, CheckpointError):  # reported when it is loaded
        return path


def _require_apart(read: Sequence[str], file: Path) -> None:
    """Raise OutputError if a file that is to be written is one of those to be read, or cannot be written."""
    from sharpscope.atomic_io import require_writable
    from sharpscope.errors import OutputError

    if file.resolve() in {Path(path).resolve() for path in read}:
        raise OutputError(f"{file} is one of the files to be read. Name another place for the result.")
    require_writable(file)


def _record(folder: Path) -> dict[str, Any]:
    """The content of ``asked.json``; empty if there is none."""
    try:
        found = json.loads((folder / ASKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    from sharpscope.atomic_io import atomic

    with atomic(folder / ASKED) as temporary:
        temporary.write_text(json.dumps(record, sort_keys=True), encoding="utf-8")


def _holds_work(folder: Path) -> bool:
    """Whether anything but ``asked.json`` and temporary files is in ``folder``."""
    return folder.is_dir() and any(p.name != ASKED and not p.name.startswith(".") for p in folder.iterdir())


def _drop_if_empty(folder: Path) -> None:
    """Delete a folder in which no pass was saved."""
    if not _holds_work(folder):
        (folder / ASKED).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
