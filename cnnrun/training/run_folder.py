"""The run folder `runs/<name>/<number>/`: created atomically, locked by one process at a time, free of links."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from cnnrun import __version__
from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.errors import CheckpointError, StorageError, escape
from cnnrun.base.locks import LockHeldError, hold_lock
from cnnrun.training.run_records import CHECKPOINTS, CONFIG, RESULT, Environment

_MAX_ENTRIES = 100_000


def create_run_folder(runs: Path, name: str, files: Mapping[str, bytes] | None = None) -> Path:
    """Create `runs/name/<next number>` with these files, by path, completely or not at all. Raises StorageError."""
    files = files or {}
    parent = runs / name
    with storage_errors(parent, sum(map(len, files.values()))):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        folder, temporary = Folder(parent), f".{os.getpid()}.{time.time_ns()}.tmp"
        try:
            new_run = folder.make_child(temporary)
            for file, data in files.items():
                _create_file(new_run, file.split("/"), data)
            new_run.sync()
            run = _rename_to_next_number(folder, temporary)
            folder.sync()
        except OSError:
            shutil.rmtree(parent / temporary, ignore_errors=True)
            raise
    return run


def _create_file(folder: Folder, path: Sequence[str], data: bytes) -> None:
    """Create a file, and the folders that its path names."""
    name, *rest = path
    if rest:
        child = folder.open_child(name, create=True)
        _create_file(child, rest, data)
        child.sync()
    else:
        folder.create(name, data)


def _rename_to_next_number(folder: Folder, temporary: str) -> Path:
    """Rename a new run to the next free number; another process may take numbers meanwhile."""
    number = max(_run_numbers(folder.path), default=0)
    while True:
        number += 1
        if not folder.has(str(number)):
            try:
                folder.rename(temporary, str(number))
            except OSError:  # another process has just created a run of this number
                if not folder.has(str(number)):
                    raise
            else:
                return folder.path / str(number)


def _remove_abandoned(parent: Path) -> None:
    """Remove unfinished folders of killed processes, except those younger than an hour, which may still be in use."""
    for path in parent.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink() and time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def unfinished_runs(runs: Path, name: str) -> list[Path]:
    """Runs of this name that have a config but no result, newest first."""
    return [folder for folder in _newest_first(runs / name) if not (folder / RESULT).exists()]


def finished_runs(runs: Path, name: str) -> list[Path]:
    """Runs of this name that have a result, newest first."""
    return [folder for folder in _newest_first(runs / name) if (folder / RESULT).exists()]


def _newest_first(parent: Path) -> list[Path]:
    folders = [parent / str(number) for number in sorted(_run_numbers(parent), reverse=True)]
    return [folder for folder in folders if (folder / CONFIG).exists()]


def newest_run(runs: Path, name: str | None = None) -> Path:
    """The newest run that has a checkpoint, of this name or of all names. Raises CheckpointError if there is none.

    Among runs of one name the highest number is the newest, because copying changes the times of files. Between names
    the time of the config decides.
    """
    names = [name] if name else [entry.name for entry in runs.iterdir() if entry.is_dir()] if runs.is_dir() else []
    candidates = [run for run_name in names if (run := _newest_saved(runs / run_name))]
    if not candidates:
        raise CheckpointError(
            f"{runs / name if name else runs}: no run with a checkpoint here; start one with `cnnrun train CONFIG`"
        )
    return max(candidates, key=lambda run: (run / CONFIG).stat().st_mtime_ns)


def _newest_saved(parent: Path) -> Path | None:
    folders = [parent / str(number) for number in sorted(_run_numbers(parent), reverse=True)]
    return next((folder for folder in folders if (folder / CHECKPOINTS / "latest").exists()), None)


def refuse_links(run: Path) -> None:
    """Raise CheckpointError if a run holds anything but folders and files, because links could lead out of it."""
    folders, count = [run], 0
    while folders:
        for entry in _list_entries(folders.pop()):
            count += 1
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                folders.append(Path(entry.path))
            elif not stat.S_ISREG(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
                raise CheckpointError(f"{escape(entry.path)}: {kind}; a run may hold only files and folders: remove it")
        if count > _MAX_ENTRIES:
            raise CheckpointError(f"{escape(str(run))}: more than {_MAX_ENTRIES:,} files; this is not a run")


def _list_entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise CheckpointError(f"{escape(str(folder))}: cannot be read ({error.strerror})") from None


@contextmanager
def hold_run(run: Path) -> Iterator[Folder]:
    """Open and lock the run for this process. The lock also ends if the process is killed.

    Raises StorageError if another process has locked it, CheckpointError if the run holds links.
    """
    refuse_links(run)
    with contextlib.ExitStack() as stack:
        try:
            with storage_errors(run / "lock", 0):
                stack.enter_context(hold_lock(run / "lock"))
                folder = Folder(run)
                folder.remove_abandoned(exclusive=True)
        except LockHeldError:
            raise StorageError(f"{run}: another process is training this run") from None
        yield folder


def describe_environment(device: torch.device, ranks: int = 1) -> Environment:
    """Versions and hardware that may change a result's bits, for the run's environment.json."""
    return {
        "cnnrun": __version__,
        "torch": torch.__version__,
        "pillow": version("pillow"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        **_describe_device(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def _describe_device(device: torch.device) -> Environment:
    """Name and settings of a device that may change a result's bits."""
    if device.type != "cuda":
        return {"device_name": "cpu"}
    return {
        "device_name": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda or "none",
        "cudnn": torch.backends.cudnn.version() or 0,
        "fp32_convolutions": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "fp32_products": torch.backends.cuda.matmul.fp32_precision,
    }


def environment_changes(before: Environment, now: Environment) -> list[str]:
    """Describe each entry of both that differs, a line per entry."""
    return [f"{key} was {before[key]}, is {now[key]}" for key in now if key in before and before[key] != now[key]]


def _run_numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in folder.iterdir() if _is_number(entry.name) and entry.is_dir()]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 19
