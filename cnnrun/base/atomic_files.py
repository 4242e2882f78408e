"""Files that are whole or not there, and on the disk once they are: everything that cnnrun writes goes through here.

A file is written under a random name that must be new, synced, and renamed. Names are looked up in a directory that was
opened once (`Folder`) where the platform can do that, so that a directory that is moved, replaced or linked meanwhile
receives nothing. Only the errors of this module are the disk's; any other OSError is a bug.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from cnnrun.base.errors import CheckpointError, ConfigError, StorageError, escape

_RELATIVE = {os.open, os.mkdir, os.rename, os.unlink, os.stat} <= os.supports_dir_fd  # not on Windows
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_TEMPORARY = re.compile(r"\.(.*)\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{16}\.tmp")  # name, machine, process
_ABANDONED_SECONDS = 3600  # a temporary file that is older belongs to a process that was killed, on whatever machine
_LONGEST = 190  # bytes of a name within a temporary one


class Folder:
    """A directory that is opened once: what is written goes there, whatever becomes of its path."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """Open the directory at `path`. Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, _DIRECTORY) if descriptor is None and _RELATIVE else descriptor
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)
            self._identity = _identity(os.fstat(self._descriptor))
        else:
            self._identity = _identity(path.stat())

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open an entry of this directory, never through a link; returns the descriptor."""
        return os.open(self._entry(name), flags | _NO_LINK, mode, **self._within())

    def open_child(self, name: str, *, create: bool = False) -> Folder:
        """Open a directory inside this one. Raises CheckpointError where it is a link or no directory."""
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._entry(name), **self._within())
        if not stat.S_ISDIR(self.status(name).st_mode):
            raise CheckpointError(f"{escape(str(self.path / name))}: a link or no folder; remove it")
        if self._descriptor is None:
            return Folder(self.path / name)
        return Folder(self.path / name, self.open(name, _DIRECTORY))

    def names(self) -> list[str]:
        """The names of all entries."""
        return os.listdir(self.path if self._descriptor is None else self._descriptor)

    def status(self, name: str) -> os.stat_result:
        """The status of an entry, of a link itself. Raises FileNotFoundError."""
        return os.stat(self._entry(name), follow_symlinks=False, **self._within())

    def has(self, name: str) -> bool:
        """Return whether there is an entry of that name, be it a link that leads nowhere."""
        try:
            self.status(name)
        except OSError:
            return False
        return True

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must be new, and wait until it is on the disk. Raises OSError."""
        descriptor = self.open(name, _NEW_FILE)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(name)
            raise
        finally:
            os.close(descriptor)

    def replace(self, name: str, data: bytes) -> None:
        """Put a file in the place of another, whole, and wait until it is on the disk. Raises OSError."""
        temporary = _temporary(name)
        self.create(temporary, data)
        try:
            self.rename(temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        self.sync()

    def replace_together(self, files: Mapping[str, bytes], seal: tuple[str, bytes]) -> None:
        """Replace several files that belong together. The file `seal`, which vouches for them, is there only when all
        of them are. Raises OSError.
        """
        temporary = {name: _temporary(name) for name in files}
        try:
            for name, data in files.items():
                self.create(temporary[name], data)
            if self.has(seal[0]):
                self.remove(seal[0])
                self.sync()
            for name, fresh in temporary.items():
                self.rename(fresh, name)
        except BaseException:
            for fresh in filter(self.has, temporary.values()):
                with contextlib.suppress(OSError):
                    self.remove(fresh)
            raise
        self.sync()
        self.replace(*seal)

    def open_for_append(self, name: str) -> BinaryIO:
        """Open a file to write at its end, new or not. Raises CheckpointError where it has another name elsewhere."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(self.open(name, flags), "r+b")
        if os.fstat(file.fileno()).st_nlink > 1:
            file.close()
            raise CheckpointError(f"{escape(str(self.path / name))}: has a second name (a hard link); copy it instead")
        return file

    def make_child(self, name: str) -> Folder:
        """Make a directory that must be new, and open it."""
        os.mkdir(self._entry(name), **self._within())
        return self.open_child(name)

    def rename(self, old: str, new: str) -> None:
        """Rename an entry; a file of the new name is replaced, a directory that is not empty is not."""
        within = {} if self._descriptor is None else {"src_dir_fd": self._descriptor, "dst_dir_fd": self._descriptor}
        rename = os.replace if self._descriptor is None else os.rename
        rename(self._entry(old), self._entry(new), **within)

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a directory with all that is in it."""
        if stat.S_ISDIR(self.status(name).st_mode):
            shutil.rmtree(self._entry(name), **self._within())
        else:
            os.unlink(self._entry(name), **self._within())

    def sync(self) -> None:
        """Wait until the names in this directory are on the disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def remove_abandoned(self, of: str | None = None, *, exclusive: bool = False) -> None:
        """Remove temporary files that killed processes left, all or those `of` one file.

        `held`: nobody else writes here, so that every one is left over.
        """
        for name in self.names():
            found = _TEMPORARY.fullmatch(name)
            if found and of in (None, found[1]):
                with contextlib.suppress(OSError):
                    old = time.time() - self.status(name).st_mtime > _ABANDONED_SECONDS
                    if exclusive or old or (found[2] == _machine() and not _is_running(int(found[3]))):
                        self.remove(name)

    def is_in_place(self) -> bool:
        """Return whether its path still leads to this directory."""
        try:
            return _identity(os.stat(self.path)) == self._identity
        except OSError:
            return False

    def _entry(self, name: str) -> str:
        assert "/" not in name, name
        return name if self._descriptor is not None else str(self.path / name)

    def _within(self) -> dict[str, Any]:
        return {} if self._descriptor is None else {"dir_fd": self._descriptor}


def write_file(path: Path, data: bytes, *, tidy: bool = True) -> None:
    """Write a file so that it is whole or as it was. Raises StorageError.

    `tidy` removes what killed processes left of it, for which the folder is looked through.
    """
    with storage_errors(path, len(data)):
        folder = Folder(path.parent)
        folder.replace(path.name, data)
        if tidy:
            folder.remove_abandoned(path.name)


def write_text(path: Path, text: str) -> None:
    """`write_file` for text. Raises StorageError."""
    write_file(path, text.encode())


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """JSON as the files of a run hold it."""
    return (json.dumps(data, indent=1) + "\n").encode()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """`write_file` for JSON. Raises StorageError."""
    write_file(path, json_bytes(data))


def write_new_file(path: Path, data: bytes, own_mark: bytes | None = None, *, tidy: bool = True) -> None:
    """Write a new file; one that is there is replaced only if `mine`, our own mark, is near its beginning.

    Raises ConfigError where another is there, StorageError.
    """
    if os.path.lexists(path) and not (own_mark and is_own_file(path, own_mark)):
        raise ConfigError(f"{escape(str(path))}: is there already; choose another")
    write_file(path, data, tidy=tidy)


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing. Raises StorageError."""
    with storage_errors(path, 0):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def storage_errors(path: Path, needed: int, consequence: str = "") -> Iterator[None]:
    """Turn an OSError of what is written inside into a StorageError of one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(describe_failure(path, needed, error) + consequence) from None


def describe_failure(path: Path, needed: int, error: OSError) -> str:
    """A line on why `needed` bytes could not be written there."""
    reason = error.strerror or str(error)
    return f"{escape(str(path))}: cannot write ({reason}); {_amount(needed)} are needed, {_free(path, error)}"


def _free(path: Path, error: OSError) -> str:
    """Describe how much is free where `path` is, or was to be."""
    place = next((each for each in (path, *path.parents) if each.exists()), None)
    try:
        free = shutil.disk_usage(place or path).free
    except OSError:
        return "the folder cannot be reached"
    if error.errno == errno.ENOSPC and place and _has_no_inodes(place):
        return f"{_amount(free)} are free, but no inodes: the disk can hold no more files, remove some"
    return f"{_amount(free)} are free"


def _has_no_inodes(place: Path) -> bool:
    status = os.statvfs(place) if hasattr(os, "statvfs") else None
    return status is not None and status.f_files > 0 and status.f_favail == 0


def _amount(size: int) -> str:
    unit, name = next((each for each in ((2**30, "GiB"), (2**20, "MiB")) if size >= each[0]), (2**10, "KiB"))
    return f"{size / unit:,.1f} {name}"


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _temporary(name: str) -> str:
    short = os.fsdecode(os.fsencode(name)[:_LONGEST])
    return f".{short}.{_machine()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


@cache
def _machine() -> str:
    """A word for this machine since it was started: process numbers mean something there alone."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    about = boot.read_text() if boot.exists() else ""
    return hashlib.sha256(f"{platform.node()} {about}".encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    """Return whether there is such a process, or whether that cannot be told."""
    if os.name == "nt":  # where the signal 0 is one that is sent
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def is_own_file(path: Path, mark: bytes) -> bool:
    """Return whether a regular file has our mark near its beginning, so that we may replace it."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            return mark in file.read(200)
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
