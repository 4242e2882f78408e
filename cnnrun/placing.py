"""Where boxes lie once their pictures are what the network sees."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts import Pair, Shape
from cnnrun.pictures import Image, view


def placed(targets: dict[str, Tensor], sizes_N2: NDArray[np.int64], shape: Shape, image: Image) -> dict[str, Tensor]:
    """The targets of pictures of those sizes with boxes in the network's pixels, and `view` [N, 6]: see `View`.

    What `fit: crop` cuts away is cut off the boxes; of what less than a pixel a side is left is no object.
    """

    @cache
    def numbers(height: int, width: int) -> tuple[float, ...]:
        return view((height, width), _pair(shape), image).numbers()

    views = torch.tensor([numbers(*map(int, size)) for size in sizes_N2]).view(-1, 6)
    scale, offset = views[:, None, :2].repeat(1, 1, 2), views[:, None, 2:4].repeat(1, 1, 2)
    edge = torch.tensor([shape[2], shape[1]] * 2, dtype=torch.float32)
    boxes = torch.minimum((targets["boxes"] * scale + offset).clamp(min=0), edge)
    left = ((boxes[..., 2:] - boxes[..., :2]) >= 1).all(2) if image.fit == "crop" else targets["objects"] >= 0
    objects = torch.where(left, targets["objects"], -1)
    return {**targets, "boxes": boxes * (objects >= 0)[..., None], "objects": objects, "view": views}


def _pair(shape: Shape) -> Pair:
    return shape[1], shape[2]
