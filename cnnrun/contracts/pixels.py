"""Pixels as files and the cache hold them, whole numbers of 8 or 16 bits, and as the network takes them: 0..255."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_WHITE = 65_535


def drawn_channels(channels: int) -> slice:
    """The channels that drawings show: the first three as RGB; of one or two channels, the first as grey."""
    return slice(0, 3 if channels >= 3 else 1)


@dataclass(frozen=True)
class PixelFormat:
    """Format of stored pixels: whole numbers from 0 to `white`, which the network takes as 0..255."""

    white: int = 255

    @property
    def is_deep(self) -> bool:
        """Return whether a pixel takes 16 bits."""
        return self.white > 255

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of stored pixels."""
        return np.dtype(np.uint16 if self.is_deep else np.uint8)

    @property
    def torch_dtype(self) -> torch.dtype:
        """PyTorch's type of stored pixels."""
        return torch.uint16 if self.is_deep else torch.uint8

    @property
    def levels_per_grey(self) -> float:
        """The number of stored levels between two of the network's: 1 for 8 bits, 257 for all of 16 bits."""
        return self.white / 255

    def to_network(self, pixels: Tensor) -> Tensor:
        """Convert stored pixels to values 0..255: 16 bits to float32. Others, such as frozen features, stay."""
        # In this order the product is exact, so that white becomes 255 and the quotient is the nearest number.
        return pixels.float() * 255 / self.white if pixels.dtype == torch.uint16 else pixels

    def to_stored(self, values: Tensor) -> Tensor:
        """Convert values 0..255, as `to_network` gives them, to stored pixels."""
        return (values.double() * self.levels_per_grey).round().to(self.torch_dtype) if self.is_deep else values.byte()


EIGHT_BITS = PixelFormat()
