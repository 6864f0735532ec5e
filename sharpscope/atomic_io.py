"""Writing files so that nothing the user had is ever lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sharpscope.errors import OutputError


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it, flushed to disk, when the block ends well.

    A reader sees the old file or the new one, never a part; on an exception the old file stays.

    Raises: OutputError when the folder cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror}. Choose another place.") from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes 0600 whatever the umask; a result should be as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror or error}. Choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path, after making sure that a file can be created in its folder.

    Called before hours of work, not after them.

    Raises: OutputError when ``path`` is a folder or its folder cannot be made or written.
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"The output must be a file, but {target} is a folder. Name a file in it.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".sharpscope-", dir=target.parent)
    except OSError as error:
        raise OutputError(f"Cannot write {target}: {error.strerror}. Choose another place.") from error
    os.close(handle)
    os.unlink(name)
    return target
