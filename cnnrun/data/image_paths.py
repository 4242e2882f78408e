"""Image files at the paths that a user gives: files, and folders searched for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cnnrun.base.counts import format_count
from cnnrun.base.errors import DataError, escape
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.base.progress import say
from cnnrun.data.image_names import SUFFIX_LIST, choose_images, is_image_name


def list_images(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files among the paths, and the image files inside folders, sorted. Hidden files are left out.

    Raises DataError before the first path if one does not exist, and for a folder without images.
    """
    missing = [f"{escape(str(path))}: no such file" for path in paths if not path.exists()]
    if missing:
        raise DataError(*missing)
    for path in paths:
        yield from _find_images(path) if path.is_dir() else [path]


def _find_images(folder: Path) -> list[Path]:
    def is_visible_file(path: Path) -> bool:
        return not any(map(is_hidden_or_system_name, path.relative_to(folder).parts)) and path.is_file()

    files = [str(path) for path in folder.rglob("*") if is_visible_file(path)]
    images = sorted(map(Path, choose_images(files)))
    arrays = sum(is_image_name(Path(file).name) for file in files) - len(images)
    if arrays:
        say(f"{escape(str(folder))}: left out {format_count(arrays, '.npy file')} beside other images")
    if not images:
        raise DataError(f"{escape(str(folder))}: no images ({SUFFIX_LIST})")
    return images
