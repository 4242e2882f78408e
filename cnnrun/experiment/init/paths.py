"""Folders of a data set, and a name for its config."""

from __future__ import annotations

import re
from pathlib import Path

from cnnrun.base.file_sequences import is_hidden_or_system_name

_MAX_DEPTH = 3  # folders within folders that are searched


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in a folder, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden_or_system_name(path.name))


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
