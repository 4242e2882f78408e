"""Atomic writes: a file is complete and on the disk, or unchanged. Everything that cnnrun writes goes through here.

A file is written under a new random name, synced and then renamed. Where the platform allows it, names are resolved in
a directory that was opened once (`Folder`), so nothing is written to a directory that takes its place meanwhile. Disk
errors are reported by this module alone; an OSError from anywhere else is a bug.
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

_HAS_DIR_FD = {os.open, os.mkdir, os.rename, os.unlink, os.stat} <= os.supports_dir_fd  # not on Windows
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_DIRECTORY_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_CLOSE_ON_EXEC_BINARY = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _CLOSE_ON_EXEC_BINARY
_TEMPORARY_NAME = re.compile(r"\.(.*)\.([0-9a-f]{8})-([0-9]+)-[0-9a-f]{16}\.tmp")  # name, machine, process
_ABANDONED_SECONDS = 3600  # an older temporary file belongs to a process that was killed, on any machine
_MAX_NAME_BYTES = 190  # of the file's name within a temporary name: file systems allow 255 in all


class Folder:
    """A directory that is opened once. Writes go to that directory even if its path later leads elsewhere."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """Open the directory at `path`. Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, _DIRECTORY_FLAGS) if descriptor is None and _HAS_DIR_FD else descriptor
        if self._descriptor is not None:
            weakref.finalize(self, os.close, self._descriptor)
            self._identity = _identity(os.fstat(self._descriptor))
        else:
            self._identity = _identity(path.stat())

    def open(self, name: str, flags: int, mode: int = 0o666) -> int:
        """Open an entry of this directory without following a link, and return the descriptor."""
        return os.open(self._entry(name), flags | _NO_LINK, mode, **self._dir_fd())

    def open_child(self, name: str, *, create: bool = False) -> Folder:
        """Open a directory inside this one. Raises CheckpointError if it is a link or not a directory."""
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._entry(name), **self._dir_fd())
        if not stat.S_ISDIR(self.status(name).st_mode):
            raise CheckpointError(f"{escape(str(self.path / name))}: is a link or not a folder; remove it")
        if self._descriptor is None:
            return Folder(self.path / name)
        return Folder(self.path / name, self.open(name, _DIRECTORY_FLAGS))

    def names(self) -> list[str]:
        """Names of all entries."""
        return os.listdir(self.path if self._descriptor is None else self._descriptor)

    def status(self, name: str) -> os.stat_result:
        """Status of an entry; of the link itself if it is one. Raises FileNotFoundError."""
        return os.stat(self._entry(name), follow_symlinks=False, **self._dir_fd())

    def has(self, name: str) -> bool:
        """Return whether there is an entry of that name; a broken link counts."""
        try:
            self.status(name)
        except OSError:
            return False
        return True

    def create(self, name: str, data: bytes) -> None:
        """Write a new file and wait until it is on the disk. Raises OSError, also if the name exists."""
        descriptor = self.open(name, _NEW_FILE_FLAGS)
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
        """Create or replace a file atomically, and wait until it is on the disk. Raises OSError."""
        temporary = _temporary_name(name)
        self.create(temporary, data)
        try:
            self.rename(temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(temporary)
            raise
        self.sync()

    def replace_together(self, files: Mapping[str, bytes], seal: tuple[str, bytes]) -> None:
        """Replace several files that belong together. Raises OSError.

        The file `seal` proves that the others are complete: it is removed before the first is replaced and written
        after the last.
        """
        temporary_names = {name: _temporary_name(name) for name in files}
        try:
            for name, data in files.items():
                self.create(temporary_names[name], data)
            if self.has(seal[0]):
                self.remove(seal[0])
                self.sync()
            for name, temporary in temporary_names.items():
                self.rename(temporary, name)
        except BaseException:
            for temporary in filter(self.has, temporary_names.values()):
                with contextlib.suppress(OSError):
                    self.remove(temporary)
            raise
        self.sync()
        self.replace(*seal)

    def open_for_append(self, name: str) -> BinaryIO:
        """Open a file for appending, and create it if it is missing. Raises CheckpointError if it has a hard link."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | _CLOSE_ON_EXEC_BINARY
        file = os.fdopen(self.open(name, flags), "r+b")
        if os.fstat(file.fileno()).st_nlink > 1:
            file.close()
            raise CheckpointError(f"{escape(str(self.path / name))}: has a second name (a hard link); copy it instead")
        return file

    def make_child(self, name: str) -> Folder:
        """Make a new directory and open it. Raises FileExistsError."""
        os.mkdir(self._entry(name), **self._dir_fd())
        return self.open_child(name)

    def rename(self, old: str, new: str) -> None:
        """Rename an entry. A file of the new name is replaced; raises OSError if it is a directory with entries."""
        dir_fds = {} if self._descriptor is None else {"src_dir_fd": self._descriptor, "dst_dir_fd": self._descriptor}
        rename = os.replace if self._descriptor is None else os.rename
        rename(self._entry(old), self._entry(new), **dir_fds)

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a directory with its contents."""
        if stat.S_ISDIR(self.status(name).st_mode):
            shutil.rmtree(self._entry(name), **self._dir_fd())
        else:
            os.unlink(self._entry(name), **self._dir_fd())

    def sync(self) -> None:
        """Wait until this directory's list of names is on the disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def remove_abandoned(self, file_name: str | None = None, *, exclusive: bool = False) -> None:
        """Remove temporary files that killed processes left: all of them, or those of the file `file_name`.

        With `exclusive` no other process writes here, so every temporary file is abandoned.
        """
        for name in self.names():
            match = _TEMPORARY_NAME.fullmatch(name)
            if match and file_name in (None, match[1]):
                with contextlib.suppress(OSError):
                    is_old = time.time() - self.status(name).st_mtime > _ABANDONED_SECONDS
                    if exclusive or is_old or (match[2] == _machine_id() and not _is_running(int(match[3]))):
                        self.remove(name)

    def is_in_place(self) -> bool:
        """Return whether `path` still leads to this directory."""
        try:
            return _identity(os.stat(self.path)) == self._identity
        except OSError:
            return False

    def _entry(self, name: str) -> str:
        assert "/" not in name, name
        return name if self._descriptor is not None else str(self.path / name)

    def _dir_fd(self) -> dict[str, Any]:
        return {} if self._descriptor is None else {"dir_fd": self._descriptor}


def write_file(path: Path, data: bytes, *, tidy: bool = True) -> None:
    """Create or replace a file atomically. Raises StorageError.

    `tidy` also removes temporary files of it that killed processes left; that lists the whole folder.
    """
    with storage_errors(path, len(data)):
        folder = Folder(path.parent)
        folder.replace(path.name, data)
        if tidy:
            folder.remove_abandoned(path.name)


def write_text(path: Path, text: str) -> None:
    """Create or replace a text file atomically, in UTF-8. Raises StorageError."""
    write_file(path, text.encode())


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Data as the bytes of a JSON file, in the format of a run's files."""
    return (json.dumps(data, indent=1) + "\n").encode()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Create or replace a JSON file atomically. Raises StorageError."""
    write_file(path, json_bytes(data))


def write_new_file(path: Path, data: bytes, own_mark: bytes | None = None, *, tidy: bool = True) -> None:
    """Write a file, and replace an existing one only if cnnrun wrote it: if `own_mark` is near its beginning.

    Raises ConfigError if another file exists there, and StorageError.
    """
    if os.path.lexists(path) and not (own_mark and is_own_file(path, own_mark)):
        raise ConfigError(f"{escape(str(path))}: already exists; choose another path")
    write_file(path, data, tidy=tidy)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents. Raises StorageError."""
    with storage_errors(path, 0):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def storage_errors(path: Path, needed: int, consequence: str = "") -> Iterator[None]:
    """Turn an OSError into a StorageError of one line; `needed` is the size in bytes, `consequence` ends the line."""
    try:
        yield
    except OSError as error:
        raise StorageError(describe_failure(path, needed, error) + consequence) from None


def describe_failure(path: Path, needed: int, error: OSError) -> str:
    """Line that says why `needed` bytes could not be written to `path`, and how much space is free."""
    reason = error.strerror or str(error)
    space = _describe_free_space(path, error)
    return f"{escape(str(path))}: cannot write ({reason}); {_format_size(needed)} are needed, {space}"


def _describe_free_space(path: Path, error: OSError) -> str:
    existing = next((candidate for candidate in (path, *path.parents) if candidate.exists()), None)
    try:
        free = shutil.disk_usage(existing or path).free
    except OSError:
        return "the folder cannot be reached"
    if error.errno == errno.ENOSPC and existing and _has_no_inodes(existing):
        return f"{_format_size(free)} are free, but no inodes: the disk can hold no more files, remove some"
    return f"{_format_size(free)} are free"


def _has_no_inodes(path: Path) -> bool:
    status = os.statvfs(path) if hasattr(os, "statvfs") else None
    return status is not None and status.f_files > 0 and status.f_favail == 0


def _format_size(size: int) -> str:
    larger_units = ((2**30, "GiB"), (2**20, "MiB"))
    factor, unit = next(((factor, unit) for factor, unit in larger_units if size >= factor), (2**10, "KiB"))
    return f"{size / factor:,.1f} {unit}"


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _temporary_name(name: str) -> str:
    short = os.fsdecode(os.fsencode(name)[:_MAX_NAME_BYTES])
    return f".{short}.{_machine_id()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"


@cache
def _machine_id() -> str:
    """Identifier of this machine since its last boot: process ids mean something only there."""
    boot_id_file = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot_id_file.read_text() if boot_id_file.exists() else ""
    return hashlib.sha256(f"{platform.node()} {boot_id}".encode()).hexdigest()[:8]


def _is_running(process_id: int) -> bool:
    """Return whether a process exists; also true if the system does not say."""
    if os.name == "nt":  # Windows would deliver signal 0 instead of only checking
        return True
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def is_own_file(path: Path, mark: bytes) -> bool:
    """Return whether a path is a regular file with `mark` in its first 200 bytes, so that cnnrun may replace it."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            return mark in file.read(200)
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Device and inode, which no two directories share."""
    return status.st_dev, status.st_ino
