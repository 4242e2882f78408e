"""TensorBoard's event files, written by us into an opened folder: no thread, no link followed, every error at once."""

from __future__ import annotations

import os
import secrets
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.atomic_files import Folder


class EventFile:
    """A new event file in `folder`; what earlier files say of steps from `purge_step` on is not shown any more."""

    def __init__(self, folder: Folder, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard looks for the first three words; the host's name, which others put here, is left out.
        name = f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}.{secrets.token_hex(4)}"
        self._records = RecordWriter(folder.open_for_append(name))
        self._add(Event(file_version="brain.Event:2"), purge_step)
        if purge_step is not None:
            self._add(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        from torch.utils.tensorboard.summary import scalar

        self._summary(scalar(name, value), step)

    def add_image(self, name: str, pixels_HWC: NDArray[np.uint8], step: int) -> None:
        """An image."""
        from torch.utils.tensorboard.summary import image

        self._summary(image(name, pixels_HWC, dataformats="HWC"), step)

    def add_images(self, name: str, pixels_BCHW: Tensor, step: int) -> None:
        """A grid of images, uint8."""
        from torch.utils.tensorboard.summary import image

        self._summary(image(name, pixels_BCHW, dataformats="NCHW"), step)

    def close(self) -> None:
        """Write out what is left."""
        self._records.close()

    def _summary(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._add(Event(summary=summary), step)

    def _add(self, event: Any, step: int | None) -> None:
        event.wall_time = time.time()
        if step is not None:
            event.step = int(step)
        self._records.write(event.SerializeToString())
        self._records.flush()
