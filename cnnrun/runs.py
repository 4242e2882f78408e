"""The run folder: `runs/<name>/<number>/`, made atomically, held by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cnnrun import __version__, disk
from cnnrun.errors import CheckpointError, ConfigError, StorageError, printable

CONFIG = "config.yaml"
RESULT = "result.json"
ENVIRONMENT = "environment.json"
WEIGHTS = "weights.json"  # what it began with
FILES = "data.tsv.gz"  # the files that it learns from
PLAN = "plan.json"  # what was foretold of the training
CALIBRATION = "calibration.json"  # what was chosen on val after the training, and for which weights
FACTS = "facts.json"  # what was known of the data when it began


def create(root: Path, name: str, files: Mapping[str, bytes] | None = None) -> Path:
    """A fresh `root/name/<next number>` with these files; there whole or not at all. Raises StorageError."""
    files = files or {}
    there = root / name
    fresh = there / f".{os.getpid()}.{time.time_ns()}.tmp"
    try:
        there.mkdir(parents=True, exist_ok=True)
        _sweep_old(there)
        fresh.mkdir()
        for file, data in files.items():
            disk.write(fresh / file, data)
        disk.sync(fresh)
        run = _numbered(fresh, there)
        disk.sync(there)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise StorageError(disk.trouble(there, sum(map(len, files.values())), error)) from None
    return run


def _numbered(fresh: Path, there: Path) -> Path:
    """The folder under the next number that no other run takes in between."""
    number = max(_numbers(there), default=0)
    while True:
        number += 1
        run = there / str(number)
        if not run.exists():
            with contextlib.suppress(FileExistsError):
                disk.rename(fresh, run)
                return run


def _sweep_old(there: Path) -> None:
    """Remove what killed processes began to make; what is being made now is younger than an hour."""
    for path in there.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def unfinished(root: Path, name: str) -> list[Path]:
    """Runs of that name that have a config but no result, newest first."""
    return [folder for folder in _newest_first(root / name) if not (folder / RESULT).exists()]


def finished(root: Path, name: str) -> list[Path]:
    """Runs of that name that have a result, newest first."""
    return [folder for folder in _newest_first(root / name) if (folder / RESULT).exists()]


def _newest_first(there: Path) -> list[Path]:
    folders = [there / str(number) for number in sorted(_numbers(there), reverse=True)]
    return [folder for folder in folders if (folder / CONFIG).exists()]


def newest(root: Path, name: str | None = None) -> Path:
    """The run started last that has a checkpoint, of all or of that name. Raises CheckpointError."""
    names = [name] if name else [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    started = [
        folder
        for each in names
        for number in _numbers(root / each)
        if ((folder := root / each / str(number)) / "checkpoints" / "latest").exists()
    ]
    if not started:
        raise CheckpointError(f"{root / name if name else root}: no run here; `cnnrun train CONFIG` makes one")
    return max(started, key=lambda folder: ((folder / CONFIG).stat().st_mtime_ns, int(folder.name)))


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold the run for this process; the hold ends with the process, however that ends. Raises StorageError."""
    try:
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(disk.trouble(run / "lock", 0, error)) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StorageError(f"{run}: another process is training this run") from None
    except OSError as error:  # a network's disk that knows no locks
        os.close(descriptor)
        raise StorageError(f"{run / 'lock'}: cannot be locked ({error.strerror}); use --runs on another disk") from None
    try:
        for left in run.glob(".*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def result(run: Path) -> Any:
    """What a finished run reached; None for one that is not finished."""
    try:
        return json.loads((run / RESULT).read_text())
    except (OSError, ValueError):
        return None


def fingerprint(run: Path) -> str | None:
    """Of the data that the run learned from."""
    try:
        found: str = json.loads((run / FACTS).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is whole or not there. Raises StorageError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` for bytes."""
    try:
        disk.replace(path, data)
    except OSError as error:
        raise StorageError(disk.trouble(path, len(data), error)) from None


def write_new(path: Path, data: bytes, mine: bytes | None = None) -> None:
    """Write a new file; one that is there is only replaced if `mine`, which our own hold, is near its beginning.

    Raises ConfigError where another is there.
    """
    if path.exists() and not (mine and path.is_file() and mine in path.read_bytes()[:200]):
        raise ConfigError(f"{printable(str(path))}: is there already; choose another")
    write_bytes(path, data)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """`write_text` for data."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def environment(device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """What may change a result's bits, for the run's environment.json."""
    return {
        "cnnrun": __version__,
        "torch": torch.__version__,
        "pillow": version("pillow"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
    }


def environments(run: Path) -> list[dict[str, Any]]:
    """Every environment that the run was trained in, the first one first."""
    try:
        found = json.loads((run / ENVIRONMENT).read_text())
        later = found.pop("later", [])
        return [found, *later]
    except (OSError, ValueError, AttributeError):
        return []


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each thing that is not as it was."""
    return [f"{key} was {before[key]}, is {now[key]}" for key in now if key in before and before[key] != now[key]]


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()]
