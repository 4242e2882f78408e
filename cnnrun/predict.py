"""Results for picture files, as they come."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.contracts import View
from cnnrun.errors import DataError, printable
from cnnrun.pictures import SUFFIXES, load
from cnnrun.trained import Trained


def files(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths themselves, and every picture file inside folders, sorted; hidden ones left out.

    Raises DataError, before anything is predicted, when a path does not exist.
    """
    missing = [f"{printable(str(path))}: no such file" for path in paths if not path.exists()]
    if missing:
        raise DataError(*missing)
    for path in paths:
        yield from _inside(path) if path.is_dir() else [path]


def _inside(folder: Path) -> list[Path]:
    def wanted(path: Path) -> bool:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()

    found = sorted(path for path in folder.rglob("*") if wanted(path))
    if not found:
        raise DataError(f"{printable(str(folder))}: no pictures ({', '.join(sorted(SUFFIXES))})")
    return found


def predict(trained: Trained, paths: Iterable[Path], batch: int) -> Iterator[dict[str, Any]]:
    """A row a file, in order: its path with the task's result, or with `error` where it cannot be read."""
    channels, height, width = trained.facts.image

    def read(path: Path) -> tuple[NDArray[np.uint8], View] | DataError:
        try:
            return load(path, (height, width), channels, trained.image)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        source = iter(paths)
        while chunk := list(itertools.islice(source, batch)):
            loaded = list(pool.map(read, chunk))
            rows = iter(_rows(trained, [each for each in loaded if not isinstance(each, DataError)]))
            for path, each in zip(chunk, loaded, strict=True):
                if isinstance(each, DataError):
                    yield {"path": str(path), "error": str(each)}
                else:
                    yield {"path": str(path), **next(rows)}


def _rows(trained: Trained, loaded: list[tuple[NDArray[np.uint8], View]]) -> list[dict[str, Any]]:
    if not loaded:
        return []
    pictures = (
        torch.from_numpy(np.stack([pixels for pixels, _ in loaded])).to(trained.device).permute(0, 3, 1, 2).float()
    )
    return trained.task.rows(trained.results(pictures), trained.facts, [view for _, view in loaded])
