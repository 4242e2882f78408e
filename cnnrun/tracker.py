"""Where numbers go while training: `metrics.jsonl` for machines, TensorBoard for eyes.

`metrics.jsonl` holds nothing of the clock, so a repeated or resumed run writes the same bytes; seconds and images/s go
to TensorBoard alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cnnrun import disk
from cnnrun.errors import StorageError
from cnnrun.progress import say

_LONGEST = 24  # letters of a class's name in a picture: longer ones would leave no room for it


class Tracker:
    """Writes both; on resuming at `step` what an earlier process wrote beyond it is cut off."""

    def __init__(self, run: Path, step: int = 0, offset: int = 0) -> None:
        self._run, self._step = run, step
        self._writer: Any = None
        path = run / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size < offset:
            say(f"{path}: {offset - size:,} bytes of it are gone; what comes is written after what is left")
        with self._writing(0):
            self._file = path.open("ab")
            self._file.truncate(min(size, offset))

    def offset(self) -> int:
        """Bytes of metrics.jsonl that belong to what was saved so far; they are on the disk."""
        with self._writing(0):
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._file.seek(0, 2)

    def record(self, step: int, numbers: Mapping[str, float | int | str]) -> None:
        """A line of metrics.jsonl, its numbers to TensorBoard as well."""
        line = json.dumps({"step": step, **numbers}).encode() + b"\n"
        with self._writing(len(line)):
            self._file.write(line)
            self._file.flush()
        self.show(step, {key: value for key, value in numbers.items() if isinstance(value, float)})

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers to TensorBoard alone."""
        for name, value in numbers.items():
            self._board("add_scalar", name, value, step)

    def show_pictures(self, step: int, name: str, pictures_BCHW: Tensor) -> None:
        """A grid of pictures with values 0..255; nothing where these are features."""
        if pictures_BCHW.dim() != 4 or pictures_BCHW.shape[1] not in (1, 3):
            return
        self._board("add_images", name, pictures_BCHW.clamp(0, 255).byte().cpu(), step)

    def show_drawing(self, step: int, name: str, pixels_HWC: Any) -> None:
        """A picture that was drawn."""
        self._board("add_image", name, pixels_HWC, step, dataformats="HWC")

    def show_matrix(self, step: int, name: str, matrix: list[list[int]], labels: tuple[str, ...]) -> None:
        """A confusion matrix as a picture."""
        self._board("add_image", name, _drawn(matrix, labels), step, dataformats="HWC")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what matters was written out before
            self._file.close()
        if self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()

    @contextmanager
    def _writing(self, needed: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            line = disk.trouble(self._run / "metrics.jsonl", needed, error)
            raise StorageError(f"{line}; the last checkpoint stands") from None

    def _board(self, method: str, *arguments: Any, **settings: Any) -> None:
        """One call to TensorBoard's writer. Its disk failing costs the pictures, not the training."""
        if self._writer is False:
            return
        try:
            if self._writer is None:
                # Imported at the first write, after the first step: it costs a second.
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._run), purge_step=self._step)
            getattr(self._writer, method)(*arguments, **settings)
        except OSError as error:
            say(f"TensorBoard is off from here: {error}")
            self._writer = False


class Silent(Tracker):
    """For ranks that write nothing."""

    def __init__(self) -> None:
        pass

    def offset(self) -> int:
        return 0

    def record(self, step: int, numbers: Mapping[str, float | int | str]) -> None:
        pass

    def close(self) -> None:
        pass

    def _board(self, method: str, *arguments: Any, **settings: Any) -> None:
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
        short = [label if len(label) <= _LONGEST else f"{label[:_LONGEST]}…" for label in labels]
        axes.set_xticks(range(len(labels)), short, rotation=90, parse_math=False)
        axes.set_yticks(range(len(labels)), short, parse_math=False)
        for row, column in np.argwhere(counts > 0):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=colour, fontsize=7)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
