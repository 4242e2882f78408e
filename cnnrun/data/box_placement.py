"""Boxes in the pixels of the network's input, after images are resized, cropped or padded."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.layer import HeightWidth, Shape
from cnnrun.contracts.objects import ObjectTable
from cnnrun.data.image_geometry import compute_view
from cnnrun.data.image_settings import ImageSettings


def map_boxes_to_input(
    objects: ObjectTable, sizes_N2: NDArray[np.int64], shape: Shape, image_settings: ImageSettings
) -> tuple[ObjectTable, Tensor]:
    """Convert the boxes of N images from original pixels to pixels of the network's input.

    `sizes_N2` has the height and width of each image. Returns the objects, and each image's `View` as [N, 6]. `fit:
    crop` cuts boxes at the edges; an object of less than a pixel in height or width then gets the label -1.
    """

    @cache
    def view_of_size(height: int, width: int) -> tuple[float, ...]:
        return compute_view((height, width), _height_width(shape), image_settings).as_tuple()

    views = torch.tensor([view_of_size(*map(int, size)) for size in sizes_N2]).view(-1, 6)
    object_views = views[objects.image_index_M]
    scale, offset = object_views[:, :2].repeat(1, 2), object_views[:, 2:4].repeat(1, 2)
    edge = torch.tensor([shape[2], shape[1]] * 2, dtype=torch.float32)
    boxes = torch.minimum((objects.columns["boxes"] * scale + offset).clamp(min=0), edge)
    labels = objects.columns["objects"]
    if image_settings.fit == "crop":
        remains = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
        labels, boxes = torch.where(remains, labels, -1), boxes * remains[:, None]
    return replace(objects, columns={**objects.columns, "boxes": boxes, "objects": labels}), views


def _height_width(shape: Shape) -> HeightWidth:
    return shape[1], shape[2]
