"""Checkpoints: directories of safetensors and JSON files with hashes. A kill at any moment loses no saved step.

    checkpoints/step-00000420/{model,optimizer,...}.safetensors  state.json  manifest.json
    checkpoints/step-00000420/evaluation.json    results on val; added when val has been measured
    checkpoints/latest    a small file that holds the name of a directory; `best` likewise, and, where the schedule ends
                          with a decay, `before_decay` and the best until then, `best_before_decay`

A directory gets its final name only when it is complete and on disk: files are written and synced in a temporary
directory, which is renamed; the parent is synced, the pointer replaced, and only then old checkpoints are removed.
Loading checks every size and SHA-256, and that every value is finite, before it returns a tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from cnnrun.base.atomic_files import Folder
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import CheckpointError, escape, first_line
from cnnrun.training.checkpoint_pointers import (
    BEST,
    LATEST,
    NAME_PATTERN,
    POINTERS,
    name_of_step,
    read_pointer,
    retry,
    set_pointer,
)

# Format 2 had neither evaluation.json nor tensor counts; format 3 held the choices made on val among the data facts.
FORMAT: Literal[4] = 4
_READ_FORMATS = (2, 3, FORMAT)
MAX_JSON_BYTES = 4 << 20
STATE, EVALUATION, MANIFEST = "state.json", "evaluation.json", "manifest.json"
_OLD_SUFFIX = ".old.tmp"

CheckpointParts = dict[str, dict[str, Tensor]]  # part, such as "model" -> tensor name -> tensor


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors by part, and all other state as JSON data."""

    path: Path
    parts: CheckpointParts
    state: dict[str, Any]


class _Entry(BaseModel):
    """Size and hash of a checkpoint's file; `tensors` is the count of tensors in a safetensors file."""

    model_config = ConfigDict(strict=True, extra="forbid")
    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tensors: int | None = None


class _Manifest(BaseModel):
    """The contents of manifest.json: format, step, and an entry for each other file."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: Literal[2, 3, 4]
    step: int = Field(ge=0)
    files: dict[Annotated[str, Field(pattern=r"^([A-Za-z0-9_]+\.safetensors|state\.json|evaluation\.json)$")], _Entry]

    def to_bytes(self) -> bytes:
        return json.dumps(self.model_dump(exclude_none=True), indent=1).encode()


def save(folder: Folder, step: int, parts: CheckpointParts, state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step` into `folder` and point `latest` at it; returns its path.

    Raises StorageError after three failed attempts.
    """
    files = {
        f"{name}.safetensors": safetensors.torch.save(
            {key: value.detach().cpu().contiguous() for key, value in part.items()}
        )
        for name, part in parts.items()
    }
    files[STATE] = json.dumps(state, indent=1).encode()
    tensor_counts = {f"{name}.safetensors": len(part) for name, part in parts.items()}
    name = name_of_step(step)
    retry(lambda: _write_checkpoint(folder, name, step, files, tensor_counts), folder, sum(map(len, files.values())))
    set_pointer(folder, LATEST, name)
    return folder.path / name


def add_evaluation(folder: Folder, step: int, state: dict[str, Any]) -> None:
    """Write evaluation.json into the checkpoint of `step`: entries of `state` that replace those of state.json.

    A kill leaves the checkpoint intact, at worst without an evaluation. Raises StorageError or CheckpointError.
    """
    name, data = name_of_step(step), json.dumps(state, indent=1).encode()

    def write() -> None:
        checkpoint = folder.open_child(name)
        manifest = _read_manifest(checkpoint)
        manifest.format = FORMAT  # a resumed checkpoint may be of an older one
        if manifest.files.pop(EVALUATION, None):  # a manifest that lists it would not fit the new file
            checkpoint.replace(MANIFEST, manifest.to_bytes())
        manifest.files[EVALUATION] = _Entry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        checkpoint.replace(EVALUATION, data)
        checkpoint.replace(MANIFEST, manifest.to_bytes())

    retry(write, folder, len(data))


def repair_before_resume(folder: Folder, resumed: Path, best_step: int | None) -> None:
    """Prepare `folder` for resuming from the checkpoint `resumed`.

    Damaged checkpoints after it are renamed to `*.damaged`. Also set `best` to `best_step`: a process killed between
    saving and setting it leaves an older one.
    """
    for path in list_checkpoints(folder.path):
        if _step(path) > _step(resumed):
            with contextlib.suppress(CheckpointError):
                load(path)
                continue
            damaged = f"{path.name}.damaged"
            if folder.has(damaged):
                folder.remove(damaged)
            folder.rename(path.name, damaged)
    if best_step is not None and folder.has(best := name_of_step(best_step)):
        set_pointer(folder, BEST, best)


def prune(folder: Folder, keep: int) -> None:
    """Remove all checkpoints except the newest `keep` and those that pointers name, oldest first."""
    pointed = {read_pointer(folder.path, pointer) for pointer in POINTERS}
    for old in list_checkpoints(folder.path)[:-keep]:
        if old.name not in pointed:
            with contextlib.suppress(OSError):  # the next save tries again
                folder.remove(_rename_old(folder, old.name))


def repair_killed_save(folder: Folder) -> None:
    """Clean up after a killed save: remove unfinished files and restore a checkpoint that it had renamed."""
    complete = {path.name for path in list_checkpoints(folder.path)}
    missing = {read_pointer(folder.path, pointer) for pointer in POINTERS} - complete
    for name in folder.names():
        if name.endswith(_OLD_SUFFIX) and name.removesuffix(_OLD_SUFFIX) in missing:
            folder.rename(name, name.removesuffix(_OLD_SUFFIX))
        elif name.endswith(".tmp"):
            folder.remove(name)
    for name in complete:
        folder.open_child(name).remove_abandoned(exclusive=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Paths of the checkpoint directories in `folder`, by ascending step; their contents are not checked."""
    paths = [path for path in folder.glob("step-*") if NAME_PATTERN.fullmatch(path.name) and path.is_dir()]
    return sorted(paths, key=_step)


def _step(path: Path) -> int:
    return int(path.name[5:])


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and verify it against its manifest. Raises CheckpointError if a file is missing or damaged."""
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
    """Read the checkpoint that `pointer` names, or the newest undamaged one if that is damaged or missing.

    Each damaged checkpoint is reported through `say`. Returns None if there are no checkpoints.
    Raises CheckpointError if all are damaged.
    """
    name = read_pointer(folder, pointer)
    others = [path for path in reversed(list_checkpoints(folder)) if path.name != name]
    problems: list[str] = []
    for path in ([folder / name] if name else []) + others:
        try:
            checkpoint = load(path)
        except CheckpointError as error:
            problems += error.lines
            continue
        for problem in problems:
            say(f"skipping a damaged checkpoint: {problem}")
        return checkpoint
    if problems:
        raise CheckpointError(*problems, f"{folder}: no undamaged checkpoint is left")
    return None


def _write_checkpoint(folder: Folder, name: str, step: int, files: dict[str, bytes], tensors: dict[str, int]) -> None:
    temporary = f"{name}.tmp"
    if folder.has(temporary):
        folder.remove(temporary)
    try:
        checkpoint = folder.make_child(temporary)
        with ThreadPoolExecutor(4, thread_name_prefix="save") as pool:  # hashes are computed while the disk writes
            writes = [pool.submit(checkpoint.create, file, data) for file, data in files.items()]
            hashes = {file: pool.submit(hashlib.sha256, data) for file, data in files.items()}
            for write in writes:
                write.result()
        entries = {
            file: _Entry(bytes=len(files[file]), sha256=digest.result().hexdigest(), tensors=tensors.get(file))
            for file, digest in hashes.items()
        }
        checkpoint.create(MANIFEST, _Manifest(format=FORMAT, step=step, files=entries).to_bytes())
        checkpoint.sync()
        _replace_checkpoint(folder, temporary, name)
    finally:
        with contextlib.suppress(OSError):
            folder.remove(temporary)


def _replace_checkpoint(folder: Folder, temporary: str, name: str) -> None:
    """Rename a written checkpoint to its final name; an older one of that name is removed only afterwards."""
    old = _rename_old(folder, name) if folder.has(name) else None
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


def _rename_old(folder: Folder, checkpoint: str) -> str:
    """Rename a checkpoint that will be removed; `repair_killed_save` restores it if a kill left no successor."""
    old = f"{checkpoint}{_OLD_SUFFIX}"
    if folder.has(old):
        folder.remove(old)
    folder.rename(checkpoint, old)
    return old


def _read_manifest(folder: Folder) -> _Manifest:
    path = folder.path / MANIFEST
    data = read_bytes(path, CheckpointError, MAX_JSON_BYTES, folder)
    content = _parse_json(path, data)
    if isinstance(content, dict) and isinstance(found := content.get("format"), int) and found not in _READ_FORMATS:
        advice = f"this version reads {_READ_FORMATS[0]} to {FORMAT}; use the version of cnnrun that wrote it"
        raise CheckpointError(f"{folder.path}: a checkpoint of format {found}; {advice}")
    try:
        manifest = _Manifest.model_validate(content)
    except ValidationError:
        raise CheckpointError(f"{folder.path}: {MANIFEST} is damaged") from None
    # Equal content in other bytes means that something else than cnnrun wrote the manifest.
    if STATE not in manifest.files or data != manifest.to_bytes():
        raise CheckpointError(f"{folder.path}: {MANIFEST} is damaged")
    if folder.path.name != name_of_step(manifest.step):
        raise CheckpointError(f"{folder.path}: its manifest is of step {manifest.step:,}: the folder was renamed")
    return manifest


def _read_verified(folder: Folder, name: str, entry: _Entry) -> bytes:
    """The bytes of a file. Raises CheckpointError if its size or hash is not the manifest's."""
    path = folder.path / name
    size = folder.status(name).st_size if folder.has(name) else entry.bytes
    if size != entry.bytes:
        raise CheckpointError(f"{path}: has {size:,} bytes, should have {entry.bytes:,}")
    data = read_bytes(path, CheckpointError, entry.bytes, folder)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise CheckpointError(f"{path}: damaged (its SHA-256 is not the manifest's)")
    return data


def _read_state(folder: Folder, name: str, manifest: _Manifest) -> dict[str, Any]:
    entry = manifest.files[name]
    if entry.bytes > MAX_JSON_BYTES:
        raise CheckpointError(f"{folder.path / name}: {entry.bytes:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    state = _parse_json(folder.path / name, _read_verified(folder, name, entry))
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder.path / name}: damaged (not a JSON object)")
    return state


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged (not JSON)") from None


def _read_tensors(folder: Folder, name: str, entry: _Entry) -> dict[str, Tensor]:
    path = folder.path / name
    try:
        tensors = safetensors.torch.load(_read_verified(folder, name, entry))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({first_line(error)})") from None
    if entry.tensors is not None and len(tensors) != entry.tensors:
        raise CheckpointError(f"{path}: holds {len(tensors):,} tensors, should hold {entry.tensors:,}")
    for key, value in tensors.items():
        if not _is_finite(value):
            raise CheckpointError(f"{path}: {escape(key)} is not made of finite real numbers")
    return tensors


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return not value.is_complex()
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())
