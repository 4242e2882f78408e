"""Means over rectangles of an image, from a table of sums (Crow 1984): one table serves every size and crop."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SummedAreas:
    """Sums over all rectangles of an image that begin at its top left corner.

    The sums are int32 and may overflow; the sum of a rectangle is a difference of them and is exact as long as it fits,
    which is up to 8 million pixels.
    """

    def __init__(self, pixels_HWC: NDArray[np.uint8], device: torch.device) -> None:
        self.height, self.width = pixels_HWC.shape[:2]
        sums = np.zeros((self.height + 1, self.width + 1, pixels_HWC.shape[2]), np.int32)
        sums[1:, 1:] = pixels_HWC
        np.cumsum(sums, 1, out=sums)  # in place, because new memory takes longer than adding
        np.cumsum(sums, 0, out=sums)
        self._sums_HWC = torch.from_numpy(sums).to(device)

    def resize(self, height: int, width: int, rows: slice) -> Tensor:
        """Rows of the image resized to `height` x `width`, as by PyTorch's mode `area`: float [1, C, R, W]."""
        device = self._sums_HWC.device
        top_R, bottom_R = (edges[rows] for edges in _cell_edges(torch.tensor(self.height, device=device), height))
        left_W, right_W = _cell_edges(torch.tensor(self.width, device=device), width)
        sums = self._sums_HWC.index_select(0, bottom_R) - self._sums_HWC.index_select(0, top_R)
        sums = sums.index_select(1, right_W) - sums.index_select(1, left_W)
        counts_RW = (bottom_R - top_R)[:, None] * (right_W - left_W)
        return (sums / counts_RW[:, :, None]).permute(2, 0, 1)[None]

    def crops(self, boxes_N4: Tensor, side: int) -> Tensor:
        """Parts of the image, resized to `side` x `side`: [N, C, side, side].

        Boxes are whole numbers (x1, y1, x2, y2) within the image; x2 and y2 are the first pixels outside of the box.
        """
        x1_N1, y1_N1, x2_N1, y2_N1 = (boxes_N4[:, [column]] for column in range(4))
        left_NS, right_NS = (x1_N1 + edges for edges in _cell_edges(x2_N1 - x1_N1, side))
        top_NS, bottom_NS = (y1_N1 + edges for edges in _cell_edges(y2_N1 - y1_N1, side))

        sums_PC = self._sums_HWC.flatten(0, 1)

        def sums_at(rows_NS: Tensor, columns_NS: Tensor) -> Tensor:
            indices = rows_NS[:, :, None] * (self.width + 1) + columns_NS[:, None, :]
            return torch.index_select(sums_PC, 0, indices.flatten()).view(*indices.shape, sums_PC.shape[1])

        sums = sums_at(bottom_NS, right_NS) - sums_at(top_NS, right_NS)
        sums -= sums_at(bottom_NS, left_NS) - sums_at(top_NS, left_NS)
        counts_NSS = (bottom_NS - top_NS)[:, :, None] * (right_NS - left_NS)[:, None, :]
        return (sums / counts_NSS[..., None]).permute(0, 3, 1, 2)


def _cell_edges(size: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """First pixel of each of `cells` equal parts of `size` pixels, and the first pixel after it; parts may overlap."""
    indices = torch.arange(cells, device=size.device)
    return indices * size // cells, -(-(indices + 1) * size // cells)
