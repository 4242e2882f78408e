"""Locks on the disk that end with their process, and what stands in for them on disks that have none."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnrun.base.progress import say

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class LockHeldError(Exception):
    """Another process holds the lock."""


@contextmanager
def hold_lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock file at `path`; the hold ends with the process, however that ends.

    Where another process has it, calls `waiting` once and waits; without `waiting` raises Locked. Raises OSError where
    the file cannot be made.
    """
    lock = _acquired(path, waiting)
    try:
        yield
    finally:
        lock.release()


def _acquired(path: Path, waiting: Callable[[], None] | None) -> Any:
    """The lock, held: the system's own, or where the disk has none a file whose presence is the lock."""
    from filelock import FileLock, SoftFileLock

    try:
        return _wait_for(FileLock(path, fallback_to_soft=False), waiting)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
    file = path.with_name(f"{path.name}.held")
    say(f"{path}: this disk has no locks; {file.name} holds it instead: remove that if its machine is gone")
    return _wait_for(SoftFileLock(file), waiting)


def _wait_for(lock: Any, waiting: Callable[[], None] | None) -> Any:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise LockHeldError from None
        waiting()
        lock.acquire()
    return lock
