"""The run folder: `runs/<name>/<number>/`, made atomically, held by one process at a time, free of links."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

from cnnrun import __version__
from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.errors import CheckpointError, StorageError, escape
from cnnrun.base.locks import LockHeldError, hold_lock
from cnnrun.training.run_records import CHECKPOINTS, CONFIG, RESULT, Environment

_MOST_ENTRIES = 100_000


def create_run_folder(root: Path, name: str, files: Mapping[str, bytes] | None = None) -> Path:
    """Make `root/name/<next number>` with these files; there whole or not at all. Raises StorageError."""
    files = files or {}
    there = root / name
    with storage_errors(there, sum(map(len, files.values()))):
        there.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(there)
        folder, temporary = Folder(there), f".{os.getpid()}.{time.time_ns()}.tmp"
        try:
            fresh = folder.make_child(temporary)
            for file, data in files.items():
                fresh.create(file, data)
            fresh.sync()
            run = _take_number(folder, temporary)
            folder.sync()
        except OSError:
            shutil.rmtree(there / temporary, ignore_errors=True)
            raise
    return run


def _take_number(folder: Folder, fresh: str) -> Path:
    """Give the fresh run the next number that no other run takes in between."""
    number = max(_numbers(folder.path), default=0)
    while True:
        number += 1
        if not folder.has(str(number)):
            try:
                folder.rename(fresh, str(number))
            except OSError:  # taken meanwhile, by a run with files in it
                if not folder.has(str(number)):
                    raise
            else:
                return folder.path / str(number)


def _remove_abandoned(there: Path) -> None:
    """Remove what killed processes began to make; what is being made now is younger than an hour."""
    for path in there.glob(".*.tmp"):
        if path.is_dir() and not path.is_symlink() and time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def unfinished_runs(root: Path, name: str) -> list[Path]:
    """Runs of that name that have a config but no result, newest first."""
    return [folder for folder in _newest_first(root / name) if not (folder / RESULT).exists()]


def finished_runs(root: Path, name: str) -> list[Path]:
    """Runs of that name that have a result, newest first."""
    return [folder for folder in _newest_first(root / name) if (folder / RESULT).exists()]


def _newest_first(there: Path) -> list[Path]:
    folders = [there / str(number) for number in sorted(_numbers(there), reverse=True)]
    return [folder for folder in folders if (folder / CONFIG).exists()]


def newest_run(root: Path, name: str | None = None) -> Path:
    """The run with a checkpoint that has the highest number, of that name or of all. Raises CheckpointError.

    Numbers are given in order and survive copying, unlike the times of files; these decide between names alone.
    """
    names = [name] if name else [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    newest_of_each = [found for each in names if (found := _highest_saved(root / each))]
    if not newest_of_each:
        raise CheckpointError(f"{root / name if name else root}: no run here; `cnnrun train CONFIG` makes one")
    return max(newest_of_each, key=lambda run: (run / CONFIG).stat().st_mtime_ns)


def _highest_saved(there: Path) -> Path | None:
    numbers = sorted(_numbers(there), reverse=True)
    return next(
        (there / str(number) for number in numbers if (there / str(number) / CHECKPOINTS / "latest").exists()), None
    )


def refuse_links(run: Path) -> None:
    """Raises CheckpointError where a run holds anything but folders and files: nothing may lead out of it."""
    waiting, seen = [run], 0
    while waiting:
        for entry in _entries(waiting.pop()):
            seen += 1
            kind = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(kind):
                waiting.append(Path(entry.path))
            elif not stat.S_ISREG(kind):
                what = "a link" if stat.S_ISLNK(kind) else "no file"
                raise CheckpointError(f"{escape(entry.path)}: {what}; a run holds files of its own alone: remove it")
        if seen > _MOST_ENTRIES:
            raise CheckpointError(f"{escape(str(run))}: more than {_MOST_ENTRIES:,} files: not a run")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise CheckpointError(f"{escape(str(folder))}: cannot be read ({error.strerror})") from None


@contextmanager
def hold_run(run: Path) -> Iterator[Folder]:
    """Hold the run for this process, opened; the hold ends with the process, however that ends.

    Raises StorageError where another process has it, CheckpointError where it holds links.
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
    """What may change a result's bits, for the run's environment.json."""
    return {
        "cnnrun": __version__,
        "torch": torch.__version__,
        "pillow": version("pillow"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        **_of_device(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def _of_device(device: torch.device) -> Environment:
    """Return what of a device may change a result's bits."""
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
    """A line for each thing that is not as it was."""
    return [f"{key} was {before[key]}, is {now[key]}" for key in now if key in before and before[key] != now[key]]


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in folder.iterdir() if _is_number(entry.name) and entry.is_dir()]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 19
