"""The image files that paths given by a user mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import is_clutter
from cnnrun.data.image_files import SUFFIX_LIST, is_image_name


def list_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the paths themselves, and every image file inside folders, sorted; hidden ones left out.

    Raises DataError, before anything is predicted, when a path does not exist.
    """
    missing = [f"{escape(str(path))}: no such file" for path in paths if not path.exists()]
    if missing:
        raise DataError(*missing)
    for path in paths:
        yield from _inside(path) if path.is_dir() else [path]


def _inside(folder: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        inside = not any(map(is_clutter, path.relative_to(folder).parts))
        return inside and is_image_name(path.name) and path.is_file()

    found = sorted(path for path in folder.rglob("*") if wanted(path))
    if not found:
        raise DataError(f"{escape(str(folder))}: no pictures ({SUFFIX_LIST})")
    return found
