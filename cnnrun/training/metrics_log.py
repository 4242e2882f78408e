"""Where numbers go while training: `metrics.jsonl` for machines, TensorBoard for eyes.

`metrics.jsonl` holds nothing of the clock, so a repeated or resumed run writes the same bytes; seconds and images/s go
to TensorBoard alone. What goes to TensorBoard can fail in any way and costs no training.
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

_LONGEST = 24  # letters of a class's name in a picture: longer ones would leave no room for it


class MetricsLog:
    """Writes both into the run; on resuming at `step` what an earlier process wrote beyond it is cut off."""

    def __init__(self, run: Folder, step: int = 0, offset: int = 0) -> None:
        self._run, self._step = run, step
        self._board: EventFile | None = None
        self._board_failed = False
        with self._writing(0):
            self._file = run.open_for_append(METRICS)
            size = os.fstat(self._file.fileno()).st_size
            if size < offset:
                gone = offset - size
                say(f"{run.path / METRICS}: {gone:,} bytes of it are gone; what comes is written after what is left")
            self._file.truncate(min(size, offset))

    def sync(self) -> int:
        """Bytes of metrics.jsonl that belong to what was saved so far; they are on the disk.

        Raises StorageError where the file is no longer in the run.
        """
        with self._writing(0):
            self._file.flush()
            os.fsync(self._file.fileno())
            status = os.fstat(self._file.fileno())
        if not self._run.has(METRICS) or self._run.status(METRICS).st_ino != status.st_ino:
            raise StorageError(f"{self._run.path / METRICS}: was removed or replaced while the run was training")
        return status.st_size

    def record(self, step: int, numbers: Mapping[str, float | int | str]) -> None:
        """A line of metrics.jsonl, its numbers to TensorBoard as well."""
        line = json.dumps({"step": step, **numbers}).encode() + b"\n"
        with self._writing(len(line)):
            self._file.write(line)
            self._file.flush()
        self.add_scalars(step, {key: value for key, value in numbers.items() if isinstance(value, float)})

    def add_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers to TensorBoard alone."""
        for name, value in numbers.items():
            self._look(partial(EventFile.add_scalar, name=name, value=value, step=step))

    def add_images(self, step: int, name: str, pictures_BCHW: Tensor) -> None:
        """A grid of pictures with values 0..255; nothing where these are features."""
        if pictures_BCHW.dim() != 4 or pictures_BCHW.shape[1] not in (1, 3):
            return
        self._look(lambda board: board.add_images(name, pictures_BCHW.clamp(0, 255).byte().cpu(), step))

    def add_drawing(self, step: int, name: str, draw: Callable[[], Any]) -> None:
        """What `draw` gives, uint8 [H, W, 3]; nothing where it gives None."""

        def add(board: EventFile) -> None:
            if (pixels := draw()) is not None:
                board.add_image(name, pixels, step)

        self._look(add)

    def add_confusion_matrix(self, step: int, name: str, matrix: list[list[int]], labels: tuple[str, ...]) -> None:
        """A confusion matrix as a picture."""
        self.add_drawing(step, name, lambda: _drawn(matrix, labels))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what matters was written out before
            self._file.close()
        if self._board:
            with contextlib.suppress(OSError):
                self._board.close()

    @contextmanager
    def _writing(self, needed: int) -> Iterator[None]:
        with storage_errors(self._run.path / METRICS, needed, "; the last checkpoint stands"):
            yield

    def _look(self, show: Callable[[EventFile], None]) -> None:
        """Something for eyes alone. The first failure of any kind is said and turns TensorBoard off, no more."""
        if self._board_failed:
            return
        try:
            if self._board is None:
                # At the first use, after the first step: importing TensorBoard takes a second.
                self._board = EventFile(self._run, self._step)
            show(self._board)
        except InterruptionError:
            raise
        except Exception as error:
            self._board_failed = True
            say(f"TensorBoard gets nothing from here on ({first_line(error)}); the training goes on")


class NoMetricsLog(MetricsLog):
    """For ranks that write nothing."""

    def __init__(self) -> None:
        pass

    def sync(self) -> int:
        return 0

    def record(self, step: int, numbers: Mapping[str, float | int | str]) -> None:
        pass

    def close(self) -> None:
        pass

    def _look(self, show: Callable[[EventFile], None]) -> None:
        pass


def _drawn(matrix: list[list[int]], labels: tuple[str, ...]) -> Any:
    """The confusion matrix as uint8 [H, W, 3]: rows are true classes, shade is the part of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = np.array(matrix, dtype=np.float64)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(12.0, 3 + 0.5 * len(labels))
    figure = Figure(figsize=(side, side), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(labels) <= 30:
        names = [escape(label) for label in labels]
        short = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}…" for name in names]
        axes.set_xticks(range(len(labels)), short, rotation=90, parse_math=False)
        axes.set_yticks(range(len(labels)), short, parse_math=False)
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=colour, fontsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
