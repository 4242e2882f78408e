"""A list of files with the SHA-256 of each, as `sha256sum` writes it: it tells damage that no decoder can see."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cnnrun.base.bounded_files import open_file, read_bytes
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import Files, Members
from cnnrun.contracts.source import Split
from cnnrun.data.decode import processor_count, start_threads

_CHUNK, _MOST_BYTES = 1 << 20, 1 << 30


def list_unique_files(splits: Iterable[Split]) -> list[Path]:
    """Every file that the splits' images are read from once, sorted."""
    return sorted({path for split in splits for path in _files_of(split)}, key=os.fsencode)


def _files_of(split: Split) -> Sequence[Path]:
    images = split.images
    if isinstance(images, Members):
        return list(images.shards)
    return [Path(path) for path in images] if isinstance(images, Files) else []


def common_folder(paths: list[Path]) -> Path:
    """The deepest folder that all the files are in."""
    return Path(os.path.commonpath([path.parent for path in paths]))


def format_manifest(paths: list[Path], root: Path) -> bytes:
    """The manifest of those files, named relative to `root`. Raises DataError for a name with a line break."""
    lines = []
    for path, digest in zip(paths, _digests(paths), strict=True):
        name = os.fsencode(os.path.relpath(path, root))
        if b"\n" in name or b"\\" in name:
            raise DataError(f"{escape(str(path))}: a manifest cannot name a file with a line break or backslash")
        lines.append(digest.encode() + b"  " + name + b"\n")
    return b"".join(lines)


def differences(manifest: Path, paths: list[Path], root: Path) -> dict[str, list[str]]:
    """The names of files that are `changed`, `missing` and `new` against a manifest. Raises DataError."""
    listed = _read(manifest)
    here = {os.fsencode(os.path.relpath(path, root)): path for path in paths}
    known = [name for name in here if name in listed]
    now = dict(zip(known, _digests([here[name] for name in known]), strict=True))
    found = {
        "changed": [name for name in known if now[name] != listed[name]],
        "missing": [name for name in listed if name not in here],
        "new": [name for name in here if name not in listed],
    }
    return {what: [escape(os.fsdecode(name)) for name in names] for what, names in found.items()}


def _read(manifest: Path) -> dict[bytes, str]:
    lines = read_bytes(manifest, DataError, _MOST_BYTES).splitlines()
    found = {}
    for number, line in enumerate(lines, 1):
        digest, _, name = line.partition(b"  ")
        if len(digest) != 64 or not name:
            raise DataError(f"{escape(str(manifest))}:{number}: not a line of a manifest")
        found[name] = digest.decode("ascii", "replace").lower()
    return found


def _digests(paths: list[Path]) -> list[str]:
    def one(path: Path) -> str:
        made = hashlib.sha256()
        with open_file(path, DataError) as file:
            while part := file.read(_CHUNK):
                made.update(part)
        return made.hexdigest()

    with start_threads(processor_count()) as run:
        found: list[str] = run(one, paths)
    return found
