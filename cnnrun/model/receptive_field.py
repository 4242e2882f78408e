"""Receptive fields: the shape of each layer's output, and the part of the image that each of its cells sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnnrun.contracts.layer import HeightWidth, Shape, Window


@dataclass(frozen=True)
class LayerOutput:
    """The output of a layer: its shape, and the receptive fields of its cells, in pixels of the image.

    A receptive field is `field` high and wide. The first cell's begins at `start`, the next cell's `stride` further.
    With `whole`, every cell sees the whole image.
    """

    shape: Shape
    field: HeightWidth = (1, 1)
    stride: tuple[float, float] = (1.0, 1.0)
    is_global: bool = False
    start: tuple[float, float] = (0.0, 0.0)

    def receptive_box(self, row: int, column: int, image: Shape) -> tuple[int, int, int, int]:
        """The box (x1, y1, x2, y2) of the image that a cell sees; it may reach beyond the image's edges.

        After a layer that enlarges, the box is exact only to within the width of a cell.
        """
        if self.is_global:
            return 0, 0, image[2], image[1]
        top, left = (math.floor(self.start[d] + index * self.stride[d]) for d, index in ((0, row), (1, column)))
        return left, top, left + self.field[1], top + self.field[0]


def propagate_window(window: Window, sources: list[LayerOutput], shape: Shape) -> LayerOutput:
    """Compute the receptive fields of a layer's output from those of its inputs, per direction.

    Araujo et al. 2019, eq. 2 and 3.
    """
    whole = window.is_global or any(source.is_global for source in sources) or len(shape) != 3
    fields, strides, starts = [], [], []
    for d in (0, 1):
        step = max(source.stride[d] for source in sources)
        first = min(source.start[d] for source in sources)
        extent = max(source.start[d] + source.field[d] for source in sources) - first
        fields.append(round(extent + (window.kernel[d] - 1) * step))
        strides.append(step * window.stride[d] / window.scale[d])
        starts.append(first + window.start[d] * step)
    return LayerOutput(shape, (fields[0], fields[1]), (strides[0], strides[1]), whole, (starts[0], starts[1]))
