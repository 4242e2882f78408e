"""Checkpoints: a directory of safetensors and JSON, hashed, written so that a kill at any moment loses nothing.

    checkpoints/step-00000420/{model,optimizer,...}.safetensors  state.json  manifest.json
    checkpoints/step-00000420/evaluation.json    what val said of these weights; added once it has
    checkpoints/latest    a small file that names a directory; likewise `best`

A directory appears under its name only when complete and on disk: temporary directory, fsync of each file, rename,
fsync of the parent, then the pointer is replaced; only then old ones go. Loading checks every size and SHA-256, and
that every number is finite, before a tensor is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from cnnrun.base.atomic_files import Folder, describe_failure
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import CheckpointError, StorageError, escape, first_line

FORMAT: Literal[3] = 3  # 2 had neither evaluation.json nor the numbers of tensors
MAX_JSON_BYTES = 4 << 20
STATE, EVALUATION, MANIFEST = "state.json", "evaluation.json", "manifest.json"
_ATTEMPTS = 3
_OLD = ".old.tmp"
_NAME = re.compile(r"step-([0-9]{1,18})")

CheckpointParts = dict[str, dict[str, Tensor]]  # "model" -> name -> tensor


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors by part, and the rest as JSON data."""

    path: Path
    parts: CheckpointParts
    state: dict[str, Any]


class _Entry(BaseModel):
    """A file of a checkpoint; `tensors` is how many a safetensors file holds."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tensors: int | None = None


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal[2, 3]
    step: int = Field(ge=0)
    files: dict[Annotated[str, Field(pattern=r"^([A-Za-z0-9_]+\.safetensors|state\.json|evaluation\.json)$")], _Entry]

    def to_bytes(self) -> bytes:
        return json.dumps(self.model_dump(exclude_none=True), indent=1).encode()


def save(folder: Folder, step: int, parts: CheckpointParts, state: dict[str, Any]) -> Path:
    """Write generation `step` under `folder` and point `latest` at it. Raises StorageError after three attempts."""
    files = {
        f"{name}.safetensors": safetensors.torch.save(
            {key: value.detach().cpu().contiguous() for key, value in part.items()}
        )
        for name, part in parts.items()
    }
    files[STATE] = json.dumps(state, indent=1).encode()
    tensors = {f"{name}.safetensors": len(part) for name, part in parts.items()}
    name = f"step-{step:08d}"
    retry(lambda: _write_generation(folder, name, step, files, tensors), folder, sum(map(len, files.values())))
    set_pointer(folder, "latest", name)
    return folder.path / name


def add_evaluation(folder: Folder, step: int, state: dict[str, Any]) -> None:
    """Keep what was found of generation `step` beside it: entries of `state` that replace those it was saved with.

    A kill on the way leaves the generation as it was saved. Raises StorageError, CheckpointError.
    """
    name, data = f"step-{step:08d}", json.dumps(state, indent=1).encode()

    def write() -> None:
        generation = folder.open_child(name)
        manifest = _read_manifest(generation)
        manifest.files[EVALUATION] = _Entry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        manifest.format = FORMAT
        generation.replace(EVALUATION, data)
        generation.replace(MANIFEST, manifest.to_bytes())

    retry(write, folder, len(data))


def set_pointer(folder: Folder, pointer: str, name: str) -> None:
    """Make the small file `pointer` name the directory `name`, atomically."""
    retry(lambda: folder.replace(pointer, name.encode()), folder, len(name))


def repair_before_resume(folder: Folder, used: Path, best_step: int | None) -> None:
    """Before a run goes on from `used`: mend what a kill between saving and pointing left, put damaged ones aside."""
    for path in list_checkpoints(folder.path):
        if _step(path) > _step(used):
            with contextlib.suppress(CheckpointError):
                load(path)
                continue
            damaged = f"{path.name}.damaged"
            if folder.has(damaged):
                folder.remove(damaged)
            folder.rename(path.name, damaged)
    if best_step is not None and folder.has(best := f"step-{best_step:08d}"):
        set_pointer(folder, "best", best)


def prune(folder: Folder, keep: int) -> None:
    """Remove all but the newest `keep` generations and those that a pointer names, in the order of their steps."""
    pointed = {read_pointer(folder.path, pointer) for pointer in ("latest", "best")}
    for old in list_checkpoints(folder.path)[:-keep]:
        if old.name not in pointed:
            with contextlib.suppress(OSError):  # the next save tries again
                folder.remove(_put_aside(folder, old.name))


def repair_killed_save(folder: Folder) -> None:
    """Put right what a killed save left behind: remove what it had begun, put back what it had put aside."""
    kept = {path.name for path in list_checkpoints(folder.path)}
    wanted = {read_pointer(folder.path, pointer) for pointer in ("latest", "best")} - kept
    for name in folder.names():
        if name.endswith(_OLD) and name.removesuffix(_OLD) in wanted:
            folder.rename(name, name.removesuffix(_OLD))
        elif name.endswith(".tmp"):
            folder.remove(name)
    for name in kept:
        folder.open_child(name).remove_abandoned(exclusive=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete-looking generations, oldest first by step number."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name[5:])


def read_pointer(folder: Path, pointer: str) -> str | None:
    """The directory name in a pointer file, or None where there is no sound one."""
    try:
        data = read_bytes(folder / pointer, CheckpointError, 64)
    except CheckpointError:
        return None
    name = data.decode("ascii", "replace")
    return name if _NAME.fullmatch(name) else None


def load(path: Path) -> Checkpoint:
    """A checkpoint whose every file has the size and hash of its manifest. Raises CheckpointError."""
    try:
        folder = Folder(path)
    except OSError as error:
        raise CheckpointError(f"{escape(str(path))}: cannot be read ({error.strerror})") from None
    manifest = _read_manifest(folder)
    parts = {
        name.removesuffix(".safetensors"): _read_tensors(folder, name, entry)
        for name, entry in manifest.files.items()
        if name.endswith(".safetensors")
    }
    state = _read_state(folder, STATE, manifest)
    if EVALUATION in manifest.files:
        state |= _read_state(folder, EVALUATION, manifest)
    return Checkpoint(path, parts, state)


def load_newest(folder: Path, pointer: str, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `pointer` names; where it is damaged or missing the newest sound one, and that is said.

    None where there is none at all. Raises CheckpointError where none is sound.
    """
    name = read_pointer(folder, pointer)
    order = [path for path in reversed(list_checkpoints(folder)) if path.name != name]
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


def retry(write: Callable[[], None], folder: Folder, needed: int) -> None:
    """Run `write`, again after a pause when the disk fails, and raise StorageError after the last attempt."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return write()
        except OSError as error:
            if attempt == _ATTEMPTS or not folder.is_in_place():
                line = f"{describe_failure(folder.path, needed, error)}; earlier checkpoints are kept"
                raise StorageError(line) from None
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


def _write_generation(folder: Folder, name: str, step: int, files: dict[str, bytes], tensors: dict[str, int]) -> None:
    temporary = f"{name}.tmp"
    if folder.has(temporary):
        folder.remove(temporary)
    try:
        fresh = folder.make_child(temporary)
        with ThreadPoolExecutor(4, thread_name_prefix="save") as pool:  # hashing while disks are waited for
            written = [pool.submit(fresh.create, file, data) for file, data in files.items()]
            hashes = {file: pool.submit(hashlib.sha256, data) for file, data in files.items()}
            for each in written:
                each.result()
        entries = {
            file: _Entry(bytes=len(files[file]), sha256=made.result().hexdigest(), tensors=tensors.get(file))
            for file, made in hashes.items()
        }
        fresh.create(MANIFEST, _Manifest(format=FORMAT, step=step, files=entries).to_bytes())
        fresh.sync()
        _put(folder, temporary, name)
    finally:
        with contextlib.suppress(OSError):
            folder.remove(temporary)


def _put(folder: Folder, temporary: str, name: str) -> None:
    """Give a generation its name; one of that name goes only when this one is there."""
    old = _put_aside(folder, name) if folder.has(name) else None
    try:
        folder.rename(temporary, name)
        folder.sync()
    except OSError:
        if old and not folder.has(name):
            folder.rename(old, name)
        raise
    if old:
        with contextlib.suppress(OSError):
            folder.remove(old)


def _put_aside(folder: Folder, generation: str) -> str:
    """Rename a checkpoint that will be removed; `repair_killed_save` restores it if a kill left no successor."""
    aside = f"{generation}{_OLD}"
    if folder.has(aside):
        folder.remove(aside)
    folder.rename(generation, aside)
    return aside


def _read_manifest(folder: Folder) -> _Manifest:
    path = folder.path / MANIFEST
    data = read_bytes(path, CheckpointError, MAX_JSON_BYTES, folder)
    known = _json(path, data)
    if not isinstance(known, dict) or known.get("format") not in (2, FORMAT):
        raise CheckpointError(f"{folder.path}: not a checkpoint of format {FORMAT}; it is of another version of cnnrun")
    try:
        manifest = _Manifest.model_validate(known)
    except ValidationError:
        raise CheckpointError(f"{folder.path}: {MANIFEST} is damaged") from None
    # A manifest that says the same in other bytes was not written here.
    if STATE not in manifest.files or data != manifest.to_bytes():
        raise CheckpointError(f"{folder.path}: {MANIFEST} is damaged")
    if folder.path.name != f"step-{manifest.step:08d}":
        raise CheckpointError(f"{folder.path}: holds step {manifest.step}")
    return manifest


def _read_entry(folder: Folder, name: str, entry: _Entry) -> bytes:
    """A file's bytes, if size and hash are as the manifest says."""
    path = folder.path / name
    size = folder.status(name).st_size if folder.has(name) else entry.bytes
    if size != entry.bytes:
        raise CheckpointError(f"{path}: has {size} bytes, should have {entry.bytes}")
    data = read_bytes(path, CheckpointError, entry.bytes, folder)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{path}: damaged (its SHA-256 is not the manifest's)")
    return data


def _read_state(folder: Folder, name: str, manifest: _Manifest) -> dict[str, Any]:
    entry = manifest.files[name]
    if entry.bytes > MAX_JSON_BYTES:
        raise CheckpointError(f"{folder.path / name}: {entry.bytes:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    state = _json(folder.path / name, _read_entry(folder, name, entry))
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder.path / name}: damaged (no object)")
    return state


def _json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged (not JSON)") from None


def _read_tensors(folder: Folder, name: str, entry: _Entry) -> dict[str, Tensor]:
    path = folder.path / name
    try:
        tensors = safetensors.torch.load(_read_entry(folder, name, entry))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({first_line(error)})") from None
    if entry.tensors is not None and len(tensors) != entry.tensors:
        raise CheckpointError(f"{path}: holds {len(tensors)} tensors, should hold {entry.tensors}")
    for key, value in tensors.items():
        if not _is_finite(value):
            raise CheckpointError(f"{path}: {escape(key)} is not made of finite real numbers")
    return tensors


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return not value.is_complex()
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())
