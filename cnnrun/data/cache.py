"""The cache folder: decoded images on disk, so that each data set is decoded once for all runs that use it.

    <folder>/<key>/               an entry: one split of a data set (cached_split.py)
    <folder>/shards/              copies of shards downloaded from object storage

The key is a digest of the files and of every setting that affects the decoded pixels.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, StorageError, escape
from cnnrun.base.locks import LockHeldError, hold_lock

FORMAT_VERSION = 2  # version of an entry's files, part of its key; raise it when older entries can no longer be read
BLOCK_IMAGES, BLOCK_BYTES = 1024, 32 << 20

LOCK_FILE, SEAL_FILE = "lock", "complete.json"
MAX_JSON_BYTES = 1 << 20
SHARD_FOLDER = "shards"  # beside the entries: copies of remote shards
_KEY, _SHARD_COPY = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{32}\.(tar|[0-9]+\.tmp)")
_PLAN_KEYS = {"source", "count", "shape", "block", "files", "blocks"}

ProgressBar = Callable[[str, int], Any]


def images_per_block(bytes_each: int) -> int:
    """Number of images of `bytes_each` bytes that are decoded, written or summed up together."""
    return max(1, min(BLOCK_IMAGES, BLOCK_BYTES // bytes_each))


def user_cache_folder() -> Path | None:
    """cnnrun's folder under the user's cache folder, or None if the user has none."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cnnrun"
    except RuntimeError:  # neither HOME nor an account
        return None


def list_entries(folder: Path) -> list[dict[str, Any]]:
    """Every entry of the cache, the last used first."""
    entries = [entry for path in _subfolders(folder) if (entry := _describe_entry(path))]
    return sorted(entries, key=itemgetter("used"), reverse=True)


def _describe_entry(path: Path) -> dict[str, Any] | None:
    """Key, source, size and use of a folder in the cache. None if cnnrun did not make it or it was just removed."""
    try:
        if path.name == SHARD_FOLDER and (copies := _shard_copies(path)):
            description = {"source": "shards from elsewhere", "count": len(copies), "shape": []}
            plan: Any = dict.fromkeys(_PLAN_KEYS) | description
        else:
            plan = read_json(path / "plan.json") if _KEY.fullmatch(path.name) else None
        if not isinstance(plan, dict) or not set(plan) >= _PLAN_KEYS:
            return None
        if not isinstance(plan["count"], int) or not isinstance(plan["shape"], list):
            return None
        return {
            "key": path.name,
            "source": str(plan["source"]),
            "count": plan["count"],
            "shape": plan["shape"],
            "bytes": _bytes_in(path),
            "complete": path.name == SHARD_FOLDER or (path / SEAL_FILE).exists(),
            "used": path.stat().st_mtime,
        }
    except OSError:
        return None


def _shard_copies(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _SHARD_COPY.fullmatch(path.name)]


def bytes_used(folder: Path, except_key: str = "") -> int:
    """Bytes that the cache takes on the disk, without the entry `except_key`."""
    return sum(_bytes_in(path) for path in _subfolders(folder) if path.name != except_key)


def _subfolders(folder: Path) -> list[Path]:
    """The folders inside a folder; links are left out. Raises StorageError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{folder}: cannot be read ({error.strerror})") from None


def remove_entries(folder: Path, keys: list[str]) -> tuple[list[str], list[str]]:
    """Remove the entries with these keys; returns the removed keys, and those that a process is building now."""
    removed, in_use = [], []
    for key in keys:
        if key == SHARD_FOLDER:
            with storage_errors(folder / key, 0):
                for path in _shard_copies(folder / key):
                    path.unlink()
            removed.append(key)
            continue
        try:
            with storage_errors(folder / key, 0), hold_lock(folder / key / LOCK_FILE):
                _remove_entry(folder / key)
            removed.append(key)
        except LockHeldError:
            in_use.append(key)
    return removed, in_use


def list_cache(folder: str | None) -> dict[str, Any]:
    """List the entries of the cache at `folder`, by default the user's cache, and their sizes.

    Raises StorageError if the user has no cache folder.
    """
    path = Path(folder) if folder else user_cache_folder()
    if path is None:
        raise StorageError("there is no cache folder (HOME is not set); give --dir")
    entries = list_entries(path)
    return {"folder": str(path), "entries": entries, "bytes": sum(entry["bytes"] for entry in entries)}


def clear_cache(folder: str | None, prefixes: list[str], everything: bool) -> dict[str, Any]:
    """Remove entries of the cache: those whose keys begin with the prefixes, or all.

    Raises ConfigError unless each prefix fits exactly one key.
    """
    listing = list_cache(folder)
    keys = [entry["key"] for entry in listing["entries"]]
    if bool(prefixes) == everything:
        raise ConfigError("give the keys of the entries to remove (see `cnnrun cache list`), or --all")
    chosen = keys if everything else []
    for prefix in prefixes:
        matching = [key for key in keys if key.startswith(prefix)]
        if len(matching) != 1:
            raise ConfigError(
                f"{escape(prefix)}: the beginning of {format_count(len(matching), 'key')}, not of one; "
                "see `cnnrun cache list`"
            )
        chosen += matching
    removed, in_use = remove_entries(Path(listing["folder"]), list(dict.fromkeys(chosen)))
    freed = sum(entry["bytes"] for entry in listing["entries"] if entry["key"] in removed)
    return {"folder": listing["folder"], "removed": removed, "in_use": in_use, "bytes": freed}


def _remove_entry(folder: Path) -> None:
    """Remove an entry, its lock last: a process that waits for the lock then finds an empty folder.

    Files that another process writes after the lock is gone stay.
    """
    opened = Folder(folder)
    for name in sorted(opened.names(), key=lambda name: name.startswith(LOCK_FILE)):
        opened.remove(name)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def read_json(path: Path) -> Any:
    """The content of a JSON file of an entry, or None if it is missing or not JSON."""
    try:
        return json.loads(read_bytes(path, StorageError, MAX_JSON_BYTES))
    except (StorageError, ValueError, RecursionError):
        return None


def _bytes_in(folder: Path) -> int:
    """Bytes that a folder's files take on the disk, as far as this user may read it."""
    total = 0
    with contextlib.suppress(OSError):  # another process may remove it meanwhile
        for path in folder.iterdir():
            total += 512 * path.stat().st_blocks
    return total
