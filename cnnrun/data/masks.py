"""Decoded masks: their problems, and the classes that they show."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cnnrun.base.errors import escape
from cnnrun.contracts.drawn_masks import DrawnMasks
from cnnrun.contracts.source import Split
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.data.cache import images_per_block
from cnnrun.data.image_stores import ImageStore
from cnnrun.data.storage import StoredSplit


def mask_problems(split: Split, rows: Tensor, stored: StoredSplit, stored_masks: StoredSplit) -> dict[int, str]:
    """Problems of images whose mask cannot be decoded or has another size, by the index of the image."""
    assert split.masks is not None
    problems = {row: stored_masks.problems[row] for row in rows.tolist() if row in stored_masks.problems}
    if stored.records is None or stored_masks.records is None or isinstance(split.masks.images, np.ndarray):
        return problems
    images, masks = (records()[["height", "width"]][rows.numpy()] for records in (stored.records, stored_masks.records))
    for position in np.flatnonzero(images != masks):
        row = int(rows[position])
        if row not in problems:
            mask, image = (f"{size['width']}x{size['height']}" for size in (masks[position], images[position]))
            problems[row] = (
                f"{escape(split.sample_name(row))}: is {image} pixels; its objects are drawn for {mask}"
                if isinstance(split.masks.images, DrawnMasks)
                else f"{escape(split.masks.sample_name(row))}: is {mask} pixels; its image is {image}"
            )
    return problems


def find_shown_classes(masks: ImageStore, rows: Tensor, class_count: int) -> Tensor:
    """Mark the classes that each mask shows: bool [N, K]."""
    shows = torch.zeros(len(rows), IGNORED + 1, dtype=torch.bool)
    position = 0
    for part in rows.split(images_per_block(int(np.prod(masks.shape)))):
        for values in masks.take(part):
            shows[position, values.unique().long()] = True
            position += 1
    return shows[:, :class_count]
