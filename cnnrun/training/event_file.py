"""Writer of TensorBoard's event files.

Unlike TensorBoard's own it starts no thread, follows no link out of the run's folder, and raises errors at once.
"""

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
    """A new event file in `folder`. TensorBoard ignores the values of earlier files from step `purge_step` on."""

    def __init__(self, folder: Folder, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard recognises the file by events.out.tfevents. Other writers add the host's name, which is private.
        name = f"events.out.tfevents.{int(time.time()):010d}.{os.getpid()}.{secrets.token_hex(4)}"
        self._records = RecordWriter(folder.open_for_append(name))
        self._add_event(Event(file_version="brain.Event:2"), purge_step)
        if purge_step is not None:
            self._add_event(Event(session_log=SessionLog(status=SessionLog.START)), purge_step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to the curve `name`."""
        from torch.utils.tensorboard.summary import scalar

        self._add_summary(scalar(name, value), step)

    def add_image(self, name: str, pixels_HWC: NDArray[np.uint8], step: int) -> None:
        """Add an image."""
        from torch.utils.tensorboard.summary import image

        self._add_summary(image(name, pixels_HWC, dataformats="HWC"), step)

    def add_images(self, name: str, pixels_BCHW: Tensor, step: int) -> None:
        """Add a grid of images, uint8."""
        from torch.utils.tensorboard.summary import image

        self._add_summary(image(name, pixels_BCHW, dataformats="NCHW"), step)

    def close(self) -> None:
        """Flush and close the file."""
        self._records.close()

    def _add_summary(self, summary: Any, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._add_event(Event(summary=summary), step)

    def _add_event(self, event: Any, step: int | None) -> None:
        event.wall_time = time.time()
        if step is not None:
            event.step = int(step)
        self._records.write(event.SerializeToString())
        self._records.flush()
