"""The writer of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.errors import StorageError
from cnnrun.training import checkpoints
from cnnrun.training.checkpoint_pointers import BEFORE_DECAY, BEST, BEST_BEFORE_DECAY, name_of_step, set_pointer
from cnnrun.training.run_records import CHECKPOINTS


class CheckpointWriter:
    """Writer of the checkpoints in a run's folder, of which it keeps `keep` besides the best."""

    def __init__(self, run: Folder, keep: int) -> None:
        self._run, self._keep = run, keep
        with storage_errors(run.path / CHECKPOINTS, 0):
            self._folder = run.open_child(CHECKPOINTS, create=True)

    def repair(self, resumed: checkpoints.Checkpoint, best_step: int | None) -> None:
        """Finish what a killed process left undone before the run is resumed from a checkpoint."""
        with storage_errors(self._folder.path, 0):
            checkpoints.repair_before_resume(self._folder, resumed.path, best_step)

    def save(self, step: int, parts: checkpoints.CheckpointParts, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`.

        Raises StorageError if the run's folder was moved; the checkpoint is still written into the moved folder.
        """
        with self._detect_moved_folder(step):
            checkpoints.save(self._folder, step, parts, state)
            checkpoints.prune(self._folder, self._keep)

    def add_evaluation(self, step: int, state: dict[str, Any], is_best: bool) -> None:
        """Add to the checkpoint of `step` what was measured on val, and point `best` at it if it is the best."""
        with self._detect_moved_folder(step):
            checkpoints.add_evaluation(self._folder, step, state)
            if is_best:
                set_pointer(self._folder, BEST, name_of_step(step))
            checkpoints.prune(self._folder, self._keep)

    def keep_for_extension(self, step: int, best_step: int) -> None:
        """Keep the checkpoint of `step`, before the decay, and the best until then; `best_step` is 0 if none is."""
        if best_step:
            set_pointer(self._folder, BEST_BEFORE_DECAY, name_of_step(best_step))
        set_pointer(self._folder, BEFORE_DECAY, name_of_step(step))

    @contextmanager
    def _detect_moved_folder(self, step: int) -> Iterator[None]:
        """Raise StorageError, after the writes inside this context, if the run's folder was moved or deleted."""
        line = f"{self._run.path}: the folder was moved or deleted while the run was training"
        try:
            yield
        except StorageError:
            if self._is_moved():
                raise StorageError(f"{line}; nothing more can be saved") from None
            raise
        if self._is_moved():
            raise StorageError(
                f"{line}; step {step:,} is saved in the moved folder: move it back and continue with --resume"
            )

    def _is_moved(self) -> bool:
        return not (self._run.is_in_place() and self._folder.is_in_place())
