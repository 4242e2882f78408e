"""Names of checkpoint directories, and the small files that point at one of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from cnnrun.base.atomic_files import Folder, describe_failure
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import CheckpointError, StorageError

LATEST, BEST, BEFORE_DECAY, BEST_BEFORE_DECAY = "latest", "best", "before_decay", "best_before_decay"
POINTERS = (LATEST, BEST, BEFORE_DECAY, BEST_BEFORE_DECAY)
NAME_PATTERN = re.compile(r"step-([0-9]{1,18})")
_ATTEMPTS = 3


def name_of_step(step: int) -> str:
    """The name of the checkpoint directory of `step`."""
    return f"step-{step:08d}"


def set_pointer(folder: Folder, pointer: str, name: str) -> None:
    """Write `name` into the file `pointer` atomically."""
    retry(lambda: folder.replace(pointer, name.encode()), folder, len(name))


def read_pointer(folder: Path, pointer: str) -> str | None:
    """The directory name in a pointer file, or None if the file is missing or damaged."""
    try:
        data = read_bytes(folder / pointer, CheckpointError, 64)
    except CheckpointError:
        return None
    name = data.decode("ascii", "replace")
    return name if NAME_PATTERN.fullmatch(name) else None


def retry(write: Callable[[], None], folder: Folder, byte_count: int) -> None:
    """Call `write`, up to three times with pauses if the disk fails; `byte_count` is the size, for the error.

    Raises StorageError after the last attempt, or at once if the folder was moved.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            write()
            return
        except OSError as error:
            if attempt == _ATTEMPTS or not folder.is_in_place():
                failure = describe_failure(folder.path, byte_count, error)
                raise StorageError(f"{failure}; earlier checkpoints are kept") from None
            time.sleep(0.1 * 4**attempt)
