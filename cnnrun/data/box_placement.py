"""Where boxes lie once their pictures are what the network sees."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.layer import HeightWidth, Shape
from cnnrun.contracts.objects import ObjectTable
from cnnrun.data.image_files import ImageSettings, compute_view


def place_boxes(
    objects: ObjectTable, sizes_N2: NDArray[np.int64], shape: Shape, image: ImageSettings
) -> tuple[ObjectTable, Tensor]:
    """The objects of pictures of those sizes with boxes in the network's pixels, and `view` [N, 6]: see `View`.

    What `fit: crop` cuts away is cut off the boxes; of what less than a pixel a side is left is no object.
    """

    @cache
    def numbers(height: int, width: int) -> tuple[float, ...]:
        return compute_view((height, width), _pair(shape), image).as_tuple()

    views = torch.tensor([numbers(*map(int, size)) for size in sizes_N2]).view(-1, 6)
    of_object = views[objects.image_index_M]
    scale, offset = of_object[:, :2].repeat(1, 2), of_object[:, 2:4].repeat(1, 2)
    edge = torch.tensor([shape[2], shape[1]] * 2, dtype=torch.float32)
    boxes = torch.minimum((objects.columns["boxes"] * scale + offset).clamp(min=0), edge)
    labels = objects.columns["objects"]
    if image.fit == "crop":
        left = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
        labels, boxes = torch.where(left, labels, -1), boxes * left[:, None]
    return replace(objects, columns={**objects.columns, "boxes": boxes, "objects": labels}), views


def _pair(shape: Shape) -> HeightWidth:
    return shape[1], shape[2]
