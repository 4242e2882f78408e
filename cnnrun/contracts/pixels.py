"""Pixels as files and the cache hold them, whole numbers of 8 or 16 bits, and as the network takes them: 0..255."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_WHITE = 65_535
MIN_BLACK, MAX_SIGNED = -32_768, 32_767  # of int16


def drawn_channels(channels: int) -> slice:
    """The channels that drawings show: the first three as RGB; of one or two channels, the first as grey."""
    return slice(0, 3 if channels >= 3 else 1)


@dataclass(frozen=True)
class PixelFormat:
    """Format of stored pixels: levels above `black`, from 0 to white - black, which the network takes as 0..255."""

    white: int = 255
    black: int = 0

    @property
    def span(self) -> int:
        """The level that the network takes as 255."""
        return self.white - self.black

    @property
    def is_deep(self) -> bool:
        """Return whether a pixel takes 16 bits."""
        return self.span > 255

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of stored pixels."""
        return np.dtype(np.uint16 if self.is_deep else np.uint8)

    @property
    def file_dtype(self) -> np.dtype[Any]:
        """NumPy's type of pixels in files, which are stored pixels with `black` added."""
        return np.dtype(np.int16) if self.black < 0 else self.dtype

    @property
    def levels_per_grey(self) -> float:
        """The number of levels between two of the network's: 1 for 8 bits, 257 for all of 16 bits."""
        return self.span / 255

    def without_black(self) -> PixelFormat:
        """The format in which pixels of a file are stored pixels."""
        return PixelFormat(self.span)

    def to_network(self, pixels: Tensor) -> Tensor:
        """Convert stored pixels to values 0..255: 16 bits to float32. Others, such as frozen features, stay."""
        return self._scale(pixels.float()) if pixels.dtype == torch.uint16 else pixels

    def from_file(self, pixels: Tensor) -> Tensor:
        """Convert pixels of a file, in `file_dtype`, to values 0..255 in float32; those outside are clipped."""
        if not self.is_deep:
            return pixels.float()
        return self._scale(pixels.float().clamp(self.black, self.white) - self.black)

    def to_file(self, values: Tensor) -> Tensor:
        """Convert values 0..255, as `from_file` gives them, to pixels of a file."""
        if not self.is_deep:
            return values.byte()
        pixels = (values.double() * self.levels_per_grey).round() + self.black
        return pixels.to(torch.int16 if self.black < 0 else torch.uint16)

    def _scale(self, levels: Tensor) -> Tensor:
        # In this order the product is exact, so that white becomes 255 and the quotient is the nearest number.
        return levels * 255 / self.span


EIGHT_BITS = PixelFormat()
