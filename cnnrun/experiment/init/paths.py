"""Folders of a data set, and a name for its config."""

from __future__ import annotations

import re
from pathlib import Path

from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.data.split_names import parse_split_name

SPLIT_PREFIX = re.compile(r"(train|val|valid|test)(?=[a-z])")  # of names such as `trainannot`
_MAX_DEPTH = 3  # folders within folders that are searched


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # it may not be listed, such as the folder around that of the user
        return []
    return [path for path in entries if path.is_dir() and not path.is_symlink() and is_visible(path)]


def is_visible(path: Path) -> bool:
    """Return whether a path's name is not that of a hidden file or of a system's."""
    return not is_hidden_or_system_name(path.name)


def is_file(path: Path) -> bool:
    """Return whether there is a file of this name, which may be any text."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def split_of(root: Path, folder: Path) -> str | None:
    """The split that a part of the folder's path names, in a word of its own or in front of another."""
    for part in reversed(folder.relative_to(root).parts if folder.is_relative_to(root) else [folder.name]):
        prefix = SPLIT_PREFIX.match(part.lower())
        words = [part, *re.split(r"[^A-Za-z]+", part), prefix[0] if prefix else ""]
        if split := next((name for word in words if (name := parse_split_name(word))), None):
            return split
    return None


def folders_below(root: Path) -> list[Path]:
    """The folder and the visible folders within it, down to a small depth."""
    found, level = [root], [root]
    for _ in range(_MAX_DEPTH):
        level = [folder for parent in level for folder in subfolders(parent)]
        found += level
    return found


def name_of_path(path: Path) -> str:
    """A name for a config, from the path of its data."""
    resolved = path.resolve()
    name = resolved.name if resolved.is_dir() else resolved.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "data"
