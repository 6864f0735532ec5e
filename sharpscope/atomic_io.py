"""Write files atomically."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sharpscope.errors import OutputError


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; if the block succeeds, flush that file to disk and rename it to ``path``.

    Readers see either the old file or the complete new one. An exception leaves the old file unchanged.

    Raises: OutputError if the file cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror}. Choose another path.") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp creates files with mode 0600, whatever the umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}. Choose another path.") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str]) -> Path:
    """Return ``path`` as a Path after checking that a file can be created in its folder; creates the folder.

    Raises: OutputError if ``path`` is a folder, or its folder cannot be created or written.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"The output must be a file, but {target} is a folder. Pass a file in it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".sharpscope-", dir=target.parent)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror}. Choose another path.") from error
    os.close(handle)
    os.unlink(name)
    return target
