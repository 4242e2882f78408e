"""The log of metrics during training: `metrics.jsonl` for programs, TensorBoard for people.

`metrics.jsonl` holds no times, so a repeated or resumed run writes the same bytes; seconds and images/s go to
TensorBoard only. A failure of TensorBoard never ends the training.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from cnnrun.base.atomic_files import Folder, storage_errors
from cnnrun.base.errors import InterruptionError, StorageError, escape, first_line
from cnnrun.base.progress import say
from cnnrun.training.event_file import EventFile
from cnnrun.training.run_records import METRICS

_MAX_NAME_LENGTH = 24  # longer class names leave no room for the confusion matrix


class MetricsLog:
    """Writer of both logs in a run's folder.

    A run that resumes at `step` cuts metrics.jsonl at `offset` bytes, which removes lines of later steps.
    """

    def __init__(self, run: Folder, step: int = 0, offset: int = 0) -> None:
        self._run, self._step = run, step
        self._board: EventFile | None = None
        self._board_failed = False
        with self._storage_errors(0):
            self._file = run.open_for_append(METRICS)
            size = os.fstat(self._file.fileno()).st_size
            if size < offset:
                missing = offset - size
                say(f"{run.path / METRICS}: the last {missing:,} bytes are missing; new lines are added after the rest")
            self._file.truncate(min(size, offset))

    def sync(self) -> int:
        """Write metrics.jsonl to the disk; returns its size in bytes.

        Raises StorageError if the file was removed or replaced.
        """
        with self._storage_errors(0):
            self._file.flush()
            os.fsync(self._file.fileno())
            status = os.fstat(self._file.fileno())
        if not self._run.has(METRICS) or self._run.status(METRICS).st_ino != status.st_ino:
            raise StorageError(f"{self._run.path / METRICS}: was removed or replaced while the run was training")
        return status.st_size

    def record(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        """Write a line of metrics.jsonl, and its floats to TensorBoard."""
        line = json.dumps({"step": step, **metrics}).encode() + b"\n"
        with self._storage_errors(len(line)):
            self._file.write(line)
            self._file.flush()
        self.add_scalars(step, {key: value for key, value in metrics.items() if isinstance(value, float)})

    def add_scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points to TensorBoard's curves, without a line in metrics.jsonl."""
        for name, value in metrics.items():
            self._add_to_board(partial(EventFile.add_scalar, name=name, value=value, step=step))

    def add_images(self, step: int, name: str, images_BCHW: Tensor) -> None:
        """Add a grid of images with values 0..255 to TensorBoard; features, which are no images, are skipped."""
        if images_BCHW.dim() != 4 or images_BCHW.shape[1] not in (1, 3):
            return
        self._add_to_board(lambda board: board.add_images(name, images_BCHW.clamp(0, 255).byte().cpu(), step))

    def add_drawing(self, step: int, name: str, draw: Callable[[], Any]) -> None:
        """Add the image that `draw` returns, uint8 [H, W, 3], to TensorBoard; None adds nothing."""

        def add(board: EventFile) -> None:
            if (pixels := draw()) is not None:
                board.add_image(name, pixels, step)

        self._add_to_board(add)

    def add_confusion_matrix(self, step: int, name: str, matrix: list[list[int]], labels: tuple[str, ...]) -> None:
        """Add a confusion matrix to TensorBoard as an image."""
        self.add_drawing(step, name, lambda: _draw_confusion_matrix(matrix, labels))

    def close(self) -> None:
        """Close both logs. Errors are ignored: `sync` has written everything that matters."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board:
            with contextlib.suppress(OSError):
                self._board.close()

    @contextmanager
    def _storage_errors(self, byte_count: int) -> Iterator[None]:
        """Context that turns an OSError into a StorageError; `byte_count` is the size of what is written."""
        with storage_errors(self._run.path / METRICS, byte_count, "; the last checkpoint is kept"):
            yield

    def _add_to_board(self, add: Callable[[EventFile], None]) -> None:
        """Call `add` with TensorBoard's file. The first failure is printed and turns TensorBoard off."""
        if self._board_failed:
            return
        try:
            if self._board is None:
                # Opened at its first use, after the first step: importing TensorBoard takes a second.
                # The points of the checkpoint's own step stay: they are not logged again.
                self._board = EventFile(self._run, self._step + 1)
            add(self._board)
        except InterruptionError:
            raise
        except Exception as error:
            self._board_failed = True
            say(f"TensorBoard is turned off for this run ({first_line(error)}); the training continues")


class NoMetricsLog(MetricsLog):
    """A log that writes nothing, for all ranks but the first."""

    def __init__(self) -> None:
        pass

    def sync(self) -> int:
        return 0

    def record(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        pass

    def close(self) -> None:
        pass

    def _add_to_board(self, add: Callable[[EventFile], None]) -> None:
        pass


def _draw_confusion_matrix(matrix: list[list[int]], labels: tuple[str, ...]) -> Any:
    """Draw a confusion matrix as uint8 [H, W, 3]: rows are true classes, shades are fractions of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.array(matrix, dtype=np.float64)
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 3 + 0.5 * len(labels))
    figure = Figure(figsize=(side, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= 30:
        names = [escape(label) for label in labels]
        ticks = [name if len(name) <= _MAX_NAME_LENGTH else f"{name[:_MAX_NAME_LENGTH]}…" for name in names]
        axes.set_xticks(range(len(labels)), ticks, rotation=90, parse_math=False)
        axes.set_yticks(range(len(labels)), ticks, parse_math=False)
        for row, column in np.argwhere(counts > 0):
            colour = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=colour, fontsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
