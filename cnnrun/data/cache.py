"""Decoded pictures on the disk, each data set decoded once: found again by the next run, shared by those that run now.

    <folder>/<key>/               a split of a data set (cached_split.py)
    <folder>/shards/              copies of shards fetched from elsewhere

The key is a digest of the files and of everything that decides what they are decoded to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import ConfigError, StorageError, escape
from cnnrun.base.locks import LockHeldError, hold_lock

FORMAT = 2  # of an entry's files; raised whenever an older one cannot be read: it is then no longer found
BLOCK_IMAGES, BLOCK_BYTES = 1024, 32 << 20

LOCK, SEAL = "lock", "complete.json"
MAX_JSON_BYTES = 1 << 20
SHARD_FOLDER = "shards"  # beside the data sets: shards fetched from elsewhere
_KEY, _COPY = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{32}\.(tar|[0-9]+\.tmp)")
_PLANNED = {"source", "count", "shape", "block", "files", "blocks"}

Progress = Callable[[str, int], Any]


def images_per_block(bytes_each: int) -> int:
    """How many pictures of that size are decoded, written or summed up together."""
    return max(1, min(BLOCK_IMAGES, BLOCK_BYTES // bytes_each))


def user_cache_folder() -> Path | None:
    """cnnrun's folder under the user's cache folder; None where the user has none."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnnrun"
    except RuntimeError:  # neither HOME nor an account
        return None


def list_entries(folder: Path) -> list[dict[str, Any]]:
    """Every data set in the cache, the one used last first."""
    found = [about for path in _folders(folder) if (about := _about(path))]
    return sorted(found, key=lambda entry: -float(str(entry["used"])))


def _about(path: Path) -> dict[str, Any] | None:
    """What a folder in the cache holds; None where it is not ours, or is removed meanwhile."""
    try:
        if path.name == SHARD_FOLDER and (copies := _copies(path)):
            plan: Any = dict.fromkeys(_PLANNED) | {"source": "shards from elsewhere", "count": len(copies), "shape": []}
        else:
            plan = read_json(path / "plan.json") if _KEY.fullmatch(path.name) else None
        if not isinstance(plan, dict) or not set(plan) >= _PLANNED:
            return None
        if not isinstance(plan["count"], int) or not isinstance(plan["shape"], list):
            return None
        return {
            "key": path.name,
            "source": str(plan["source"]),
            "count": plan["count"],
            "shape": plan["shape"],
            "bytes": _bytes_in(path),
            "complete": path.name == SHARD_FOLDER or (path / SEAL).exists(),
            "used": path.stat().st_mtime,
        }
    except OSError:
        return None


def _copies(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _COPY.fullmatch(path.name)]


def bytes_used(folder: Path, except_key: str = "") -> int:
    """What the cache takes on the disk; `but` that data set."""
    return sum(_bytes_in(path) for path in _folders(folder) if path.name != except_key)


def _folders(folder: Path) -> list[Path]:
    """The folders in the cache's; a link is none of ours. Raises StorageError."""
    try:
        with os.scandir(folder) as found:
            return [Path(each.path) for each in found if each.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror})") from None


def clear(folder: Path, keys: list[str]) -> tuple[list[str], list[str]]:
    """Remove those data sets; returns (removed, left because a process is building them)."""
    removed, left = [], []
    for key in keys:
        if key == SHARD_FOLDER:
            with storage_errors(folder / key, 0):
                for path in _copies(folder / key):
                    path.unlink()
            removed.append(key)
            continue
        try:
            with storage_errors(folder / key, 0), hold_lock(folder / key / LOCK):
                _empty(folder / key)
            removed.append(key)
        except LockHeldError:
            left.append(key)
    return removed, left


def list_cache(folder: str | None) -> dict[str, Any]:
    """What the cache in `folder`, else in the user's own, holds."""
    where = Path(folder) if folder else user_cache_folder()
    found = list_entries(where) if where else []
    return {"folder": str(where), "entries": found, "bytes": sum(entry["bytes"] for entry in found)}


def clear_cache(folder: str | None, prefixes: list[str], everything: bool) -> dict[str, Any]:
    """Remove data sets from the cache: those whose keys begin with the prefixes, or all. Raises ConfigError."""
    listed = list_cache(folder)
    known = [entry["key"] for entry in listed["entries"]]
    if bool(prefixes) == everything:
        raise ConfigError("give the keys of what to remove (`cnnrun cache list` has them), or --all")
    chosen = known if everything else []
    for prefix in prefixes:
        matching = [name for name in known if name.startswith(prefix)]
        if len(matching) != 1:
            raise ConfigError(f"{escape(prefix)}: {len(matching)} data sets have a key that begins so")
        chosen += matching
    removed, left = clear(Path(listed["folder"]), chosen)
    freed = sum(entry["bytes"] for entry in listed["entries"] if entry["key"] in removed)
    return {"folder": listed["folder"], "removed": removed, "in_use": left, "bytes": freed}


def _empty(folder: Path) -> None:
    """Remove a data set, its lock last: whoever waits for that finds nothing half removed, and begins anew.

    What others put there once the lock is gone is theirs, and stays.
    """
    opened = Folder(folder)
    for name in sorted(opened.names(), key=lambda name: name.startswith(LOCK)):
        opened.remove(name)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def read_json(path: Path) -> Any:
    """What a JSON file of an entry says; None where it is not there or no JSON."""
    try:
        return json.loads(read_bytes(path, StorageError, MAX_JSON_BYTES))
    except (StorageError, ValueError, RecursionError):
        return None


def _bytes_in(folder: Path) -> int:
    """What a folder takes on the disk, as far as this user may see it: another process may remove it meanwhile."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            total += 512 * path.stat().st_blocks
    return total
