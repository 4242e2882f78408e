"""Checkpoints: a directory of safetensors and JSON, hashed, written so that a kill at any moment loses nothing.

    checkpoints/step-00000420/{model,optimizer,...}.safetensors  state.json  manifest.json
    checkpoints/latest    a small file that names a directory; likewise `best`

A directory appears under its name only when complete and on disk: temporary directory, fsync of each file, rename,
fsync of the parent, then the pointer is replaced. Loading checks every size and SHA-256 before a tensor is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cnnrun.errors import CheckpointError, StorageError

FORMAT = 1
MAX_JSON_BYTES = 4 << 20
_ATTEMPTS = 3

Parts = dict[str, dict[str, Tensor]]  # "model" -> name -> tensor


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by part, and the rest as JSON data."""

    path: Path
    parts: Parts
    state: dict[str, Any]


def save(folder: Path, step: int, parts: Parts, state: dict[str, Any]) -> Path:
    """Write generation `step` under `folder` and point `latest` at it. Raises StorageError after three attempts."""
    files = {
        f"{name}.safetensors": safetensors.torch.save(
            {key: value.detach().cpu().contiguous() for key, value in part.items()}
        )
        for name, part in parts.items()
    }
    files["state.json"] = json.dumps(state, indent=1).encode()
    files["manifest.json"] = json.dumps(_manifest(files), indent=1).encode()
    needed = sum(map(len, files.values()))
    target = folder / f"step-{step:08d}"
    retry(lambda: _write_generation(target, files), folder, needed)
    point(folder, "latest", target.name)
    return target


def point(folder: Path, pointer: str, name: str) -> None:
    """Make the small file `pointer` name the directory `name`, atomically."""
    temporary = folder / f".{pointer}.tmp"

    def replace() -> None:
        _write_durably(temporary, name.encode())
        temporary.replace(folder / pointer)
        _sync_folder(folder)

    retry(replace, folder, len(name))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` generations and those that a pointer names, in the order of their steps."""
    pointed = {pointed_at(folder, pointer) for pointer in ("latest", "best")}
    for old in generations(folder)[:-keep]:
        if old.name not in pointed:
            shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed save left behind."""
    for stray in folder.glob("*.tmp"):
        shutil.rmtree(stray, ignore_errors=True) if stray.is_dir() else stray.unlink(missing_ok=True)


def generations(folder: Path) -> list[Path]:
    """Complete-looking generations, oldest first by step number."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def pointed_at(folder: Path, pointer: str) -> str | None:
    """The directory name in a pointer file, or None where there is no sound one."""
    try:
        name = (folder / pointer).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name.startswith("step-") and name[5:].isdigit() else None


def load(path: Path) -> Checkpoint:
    """A checkpoint whose every file has the size and hash of its manifest. Raises CheckpointError."""
    manifest = _json(path / "manifest.json", None)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT}; it is of another version of cnnrun")
    files = manifest.get("files")
    if not isinstance(files, dict) or "state.json" not in files or not all(map(_plain, files)):
        raise CheckpointError(f"{path}: manifest.json is damaged")
    parts = {
        name.removesuffix(".safetensors"): _tensors(path / name, entry)
        for name, entry in files.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(path, parts, _json(path / "state.json", files["state.json"]))


def load_newest(folder: Path, pointer: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `pointer` names; where it is damaged or missing the newest sound one, aloud. None if none."""
    name = pointed_at(folder, pointer)
    order = [path for path in reversed(generations(folder)) if path.name != name]
    problems: list[str] = []
    for path in ([folder / name] if name else []) + order:
        try:
            found = load(path)
        except CheckpointError as error:
            problems += error.lines
            continue
        for problem in problems:
            say(f"damaged checkpoint left aside: {problem}")
        return found
    if problems:
        raise CheckpointError(*problems, f"{folder}: no sound checkpoint is left")
    return None


def retry(write: Callable[[], None], folder: Path, needed: int) -> None:
    """Run `write`, again after a pause when the disk fails, and raise StorageError after the last attempt."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return write()
        except OSError as error:
            if attempt == _ATTEMPTS:
                raise StorageError(_disk_message(folder, needed, error)) from None
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def _disk_message(folder: Path, needed: int, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free"
    except OSError:
        free = "the folder cannot be reached"
    reason = error.strerror or str(error)
    return (
        f"{folder}: cannot write ({reason}); {needed / 2**20:,.1f} MiB are needed, {free}; earlier checkpoints are kept"
    )


def _manifest(files: dict[str, bytes]) -> dict[str, Any]:
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    return {"format": FORMAT, "files": entries}


def _write_generation(target: Path, files: dict[str, bytes]) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            _write_durably(temporary / name, data)
        _sync_folder(temporary)
        if target.exists():  # the same step saved again; its bytes are the same, so either may survive
            shutil.rmtree(target)
        temporary.rename(target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(name: str) -> bool:
    return "/" not in name and not name.startswith(".")


def _bytes(path: Path, entry: Any) -> bytes:
    """A file's bytes, if size and hash are as the manifest says; the manifest itself has no entry."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size != (entry["bytes"] if entry else size) or (entry is None and size > MAX_JSON_BYTES):
                raise CheckpointError(f"{path}: has {size} bytes, should have {entry['bytes'] if entry else 'fewer'}")
            data = file.read()
    except (OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if entry and hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path}: damaged (its SHA-256 is not the manifest's)")
    return data


def _json(path: Path, entry: Any) -> Any:
    try:
        return json.loads(_bytes(path, entry))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged (not JSON)") from None


def _tensors(path: Path, entry: Any) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(_bytes(path, entry))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
