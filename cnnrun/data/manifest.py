"""Manifests: lists of files with SHA-256 hashes, as `sha256sum` writes them, that show damage no decoder can see."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from cnnrun.base.bounded_files import open_file, read_bytes
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files, Members
from cnnrun.base.machine_load import processor_count
from cnnrun.contracts.source import Split
from cnnrun.data.decode import start_threads

_CHUNK_BYTES, _MAX_BYTES = 1 << 20, 1 << 30
_LINE = re.compile(rb"(?P<hash>[0-9a-fA-F]{64}) [ *](?P<name>.+)")  # `*` marks a file that was read in binary mode


def list_unique_files(splits: Iterable[Split]) -> list[Path]:
    """The distinct files that the splits' images are read from, sorted."""
    return sorted({path for split in splits for path in _split_files(split)}, key=os.fsencode)


def _split_files(split: Split) -> Sequence[Path]:
    """The image files or shards of a split; none for images in memory."""
    images = split.images
    if isinstance(images, Members):
        return list(images.shards)
    return [Path(path) for path in images] if isinstance(images, Files) else []


def common_folder(paths: list[Path]) -> Path:
    """The deepest folder that contains all the files."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def format_manifest(paths: list[Path], root: Path) -> bytes:
    """The manifest of the files, named relative to `root`.

    Raises DataError for a name with a line break or backslash.
    """
    lines = []
    for path, digest in zip(paths, _hash_files(paths), strict=True):
        name = os.fsencode(os.path.relpath(path, root))
        if b"\n" in name or b"\\" in name:
            raise DataError(f"{escape(str(path))}: a manifest cannot name a file with a line break or backslash")
        lines.append(digest.encode() + b"  " + name + b"\n")
    return b"".join(lines)


def compare_with_manifest(manifest: Path, paths: list[Path], root: Path) -> dict[str, list[str]]:
    """The names of files that are `changed`, `missing` and `new` compared with a manifest.

    Raises DataError if the manifest or a file cannot be read.
    """
    expected = _read_manifest(manifest)
    path_by_name = {os.fsencode(os.path.relpath(path, root)): path for path in paths}
    common = [name for name in path_by_name if name in expected]
    actual = dict(zip(common, _hash_files([path_by_name[name] for name in common]), strict=True))
    names_by_kind = {
        "changed": [name for name in common if actual[name] != expected[name]],
        "missing": [name for name in expected if name not in path_by_name],
        "new": [name for name in path_by_name if name not in expected],
    }
    return {kind: [escape(os.fsdecode(name)) for name in names] for kind, names in names_by_kind.items()}


def _read_manifest(manifest: Path) -> dict[bytes, str]:
    """The SHA-256 of each file by its name."""
    lines = read_bytes(manifest, DataError, _MAX_BYTES).splitlines()
    hashes = {}
    for number, line in enumerate(lines, 1):
        parts = _LINE.fullmatch(line)
        if not parts:
            raise DataError(f"{escape(str(manifest))}:{number}: not a line of a manifest")
        hashes[parts["name"]] = parts["hash"].decode().lower()
    return hashes


def _hash_files(paths: list[Path]) -> list[str]:
    def hash_file(path: Path) -> str:
        hasher = hashlib.sha256()
        with open_file(path, DataError) as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest()

    with start_threads(processor_count()) as parallel_map:
        hashes: list[str] = parallel_map(hash_file, paths)
    return hashes
