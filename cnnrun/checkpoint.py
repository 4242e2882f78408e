"""Checkpoints: a directory of safetensors and JSON, hashed, written so that a kill at any moment loses nothing.

    checkpoints/step-00000420/{model,optimizer,...}.safetensors  state.json  manifest.json
    checkpoints/latest    a small file that names a directory; likewise `best`

A directory appears under its name only when complete and on disk: temporary directory, fsync of each file, rename,
fsync of the parent, then the pointer is replaced; only then old ones go. Loading checks every size and SHA-256 before
a tensor is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cnnrun import disk
from cnnrun.errors import CheckpointError, StorageError

FORMAT = 2
MAX_JSON_BYTES = 4 << 20
_ATTEMPTS = 3
_OLD = ".old.tmp"

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
    needed = sum(map(len, files.values()))
    target = folder / f"step-{step:08d}"
    retry(lambda: _write_generation(target, step, files), folder, needed)
    point(folder, "latest", target.name)
    return target


def point(folder: Path, pointer: str, name: str) -> None:
    """Make the small file `pointer` name the directory `name`, atomically."""
    retry(lambda: disk.replace(folder / pointer, name.encode()), folder, len(name))


def settle(folder: Path, used: Path, best_step: int | None) -> None:
    """Before a run goes on from `used`: mend what a kill between saving and pointing left, put damaged ones aside."""
    for path in generations(folder):
        if _step(path) > _step(used):
            with contextlib.suppress(CheckpointError):
                load(path)
                continue
            damaged = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            path.replace(damaged)
    if best_step is not None and (best := folder / f"step-{best_step:08d}").exists():
        point(folder, "best", best.name)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` generations and those that a pointer names, in the order of their steps."""
    pointed = {pointed_at(folder, pointer) for pointer in ("latest", "best")}
    for old in generations(folder)[:-keep]:
        if old.name not in pointed:
            with contextlib.suppress(OSError):  # the next save tries again
                shutil.rmtree(_aside(old), ignore_errors=True)


def sweep(folder: Path) -> None:
    """Put right what a killed save left behind: remove what it had begun, put back what it had put aside."""
    kept = {path.name for path in generations(folder)}
    names = {pointed_at(folder, pointer) for pointer in ("latest", "best")} - kept
    for old in folder.glob(f"step-*{_OLD}"):
        if old.name.removesuffix(_OLD) in names:
            old.replace(old.with_name(old.name.removesuffix(_OLD)))
    for stray in folder.glob("*.tmp"):
        shutil.rmtree(stray, ignore_errors=True) if stray.is_dir() else stray.unlink(missing_ok=True)


def generations(folder: Path) -> list[Path]:
    """Complete-looking generations, oldest first by step number."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name[5:])


def pointed_at(folder: Path, pointer: str) -> str | None:
    """The directory name in a pointer file, or None where there is no sound one."""
    try:
        name = (folder / pointer).read_text()
    except (OSError, UnicodeDecodeError):
        return None
    return name if name.startswith("step-") and name[5:].isdigit() else None


def load(path: Path) -> Checkpoint:
    """A checkpoint whose every file has the size and hash of its manifest. Raises CheckpointError."""
    written = _bytes(path / "manifest.json", None)
    manifest = _json(path / "manifest.json", written)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of format {FORMAT}; it is of another version of cnnrun")
    files = manifest.get("files")
    # A manifest that says the same in other bytes was not written here.
    sound = written == _as_bytes(manifest)
    if not sound or not isinstance(files, dict) or "state.json" not in files or not all(map(_plain, files)):
        raise CheckpointError(f"{path}: manifest.json is damaged")
    if path.name != f"step-{manifest.get('step', -1):08d}":
        raise CheckpointError(f"{path}: holds step {manifest.get('step')}")
    parts = {
        name.removesuffix(".safetensors"): _tensors(path / name, entry)
        for name, entry in files.items()
        if name.endswith(".safetensors")
    }
    state = _json(path / "state.json", _bytes(path / "state.json", files["state.json"]))
    return Checkpoint(path, parts, state)


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
                line = f"{disk.trouble(folder, needed, error)}; earlier checkpoints are kept"
                raise StorageError(line) from None
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def _as_bytes(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _write_generation(target: Path, step: int, files: dict[str, bytes]) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with ThreadPoolExecutor(4, thread_name_prefix="save") as pool:  # hashing while disks are waited for
            written = [pool.submit(disk.write, temporary / name, data) for name, data in files.items()]
            hashes = {name: pool.submit(hashlib.sha256, data) for name, data in files.items()}
            for each in written:
                each.result()
        entries = {
            name: {"bytes": len(files[name]), "sha256": made.result().hexdigest()} for name, made in hashes.items()
        }
        disk.write(temporary / "manifest.json", _as_bytes({"format": FORMAT, "step": step, "files": entries}))
        disk.sync(temporary)
        _put(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, target: Path) -> None:
    """Give a generation its name; one of that name goes only when this one is there."""
    old = _aside(target) if target.exists() else None
    try:
        temporary.rename(target)
        disk.sync(target.parent)
    except OSError:
        if old and not target.exists():
            old.replace(target)
        raise
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _aside(generation: Path) -> Path:
    """Out of the way at once; `sweep` puts back what a kill left without a successor."""
    aside = generation.with_name(f"{generation.name}{_OLD}")
    shutil.rmtree(aside, ignore_errors=True)
    generation.replace(aside)
    return aside


def _plain(name: str) -> bool:
    """Whether a file of a checkpoint may be called so."""
    return name == "state.json" or (name.endswith(".safetensors") and "/" not in name and not name.startswith("."))


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


def _json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged (not JSON)") from None


def _tensors(path: Path, entry: Any) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(_bytes(path, entry))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
