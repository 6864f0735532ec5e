"""Write files atomically, and by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import warnings
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


@contextmanager
def locked(path: str | os.PathLike[str], *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of the output ``path`` while the block runs, in the file ``.NAME.lock`` next to it.

    The operating system releases it when the process ends, by a kill too; the file is removed with it.

    Args:
        path: file or folder; its parent folder is created.
        shared: allow other shared locks at the same time (on Windows there are none: nothing is locked).

    Raises: OutputError if another process holds the lock, or it cannot be written.
    """
    target = Path(path)
    lock = target.with_name(f".{target.name}.lock")
    if shared and sys.platform == "win32":
        yield
        return
    descriptor = None
    while descriptor is None:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OutputError(f"Cannot write {target}: {error.strerror}. Choose another path.") from error
        try:
            _lock(descriptor, shared)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                os.close(descriptor)
                raise OutputError(
                    f"{target} is being written by another process. Wait until that has ended, or choose another path."
                ) from error
            warnings.warn(f"{target} cannot be locked here: write it from one process at a time.", stacklevel=3)
        if not _is_at(descriptor, lock):  # removed by its last holder in the meantime
            os.close(descriptor)
            descriptor = None
    try:
        yield
    finally:
        _remove(descriptor, lock, shared)


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, shared: bool) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _remove(descriptor: int, lock: Path, shared: bool) -> None:
        os.close(descriptor)
        with contextlib.suppress(OSError):  # opened by another process
            lock.unlink()

else:
    import fcntl

    def _lock(descriptor: int, shared: bool) -> None:
        # Unlike lockf, it also excludes other threads and files opened by the same process.
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)

    def _remove(descriptor: int, lock: Path, shared: bool) -> None:
        try:
            if shared:
                _lock(descriptor, False)  # the last holder
            lock.unlink(missing_ok=True)
        except OSError:
            pass
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process, such as a loader's worker, may have it open
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
