"""Lock files that are released when their process ends, with a fallback for disks without locks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnrun.base.progress import say

_UNSUPPORTED_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class LockHeldError(Exception):
    """Another process holds the lock."""


@contextmanager
def hold_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file at `path`; the system releases it even if the process is killed.

    On a disk without locks the lock is a file `.held`, which stays if the process is killed. If another process holds
    the lock, calls `on_wait` once and waits; without `on_wait` raises LockHeldError. Raises OSError if the file cannot
    be created.
    """
    lock = _acquire_file(path, on_wait)
    try:
        yield
    finally:
        lock.release()


def _acquire_file(path: Path, on_wait: Callable[[], None] | None) -> Any:
    """Acquire the system's lock; on a disk without locks, create a file whose presence is the lock."""
    from filelock import FileLock, SoftFileLock

    try:
        return _acquire(FileLock(path, fallback_to_soft=False), on_wait)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED_ERRORS:
            raise
    file = path.with_name(f"{path.name}.held")
    say(f"{path}: this disk has no locks; the file {file.name} is used instead: remove it if its machine has crashed")
    return _acquire(SoftFileLock(file), on_wait)


def _acquire(lock: Any, on_wait: Callable[[], None] | None) -> Any:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is None:
            raise LockHeldError from None
        on_wait()
        lock.acquire()
    return lock
