"""Parts of pictures that one cell of a layer sees, and what the deconvnet makes of that cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cnnrun.explain import SIDE, Subject
from cnnrun.panels import picture_of
from cnnrun.seeing import Place, projected
from cnnrun.tiles import grown, signal

Box = tuple[int, int, int, int]


def box_of(place: Place, row: int, column: int, image: tuple[int, ...]) -> Box:
    """The box (x1, y1, x2, y2) that a cell sees, moved inside the picture where it fits and else cut to it."""
    x1, y1, x2, y2 = place.out.seen(row, column, image)
    left, right = _inside(x1, x2, image[2])
    top, bottom = _inside(y1, y2, image[1])
    return left, top, right, bottom


def _inside(low: int, high: int, size: int) -> tuple[int, int]:
    length = min(high - low, size)
    start = min(max(low, 0), size - length)
    return start, start + length


def projections(subject: Subject, place: Place, pictures_BCHW: Tensor, cells_B3: Tensor) -> Iterator[Tensor]:
    """`seeing.projected`, some pictures at a time: a signal [C, H, W] for each."""
    given, size = subject.given, subject.at_once
    for pictures, cells in zip(pictures_BCHW.split(size), cells_B3.split(size), strict=True):
        yield from projected(given.network, place, pictures.to(given.device), cells).cpu()


def pair(picture_CHW: Tensor, signal_CHW: Tensor, box: Box) -> tuple[Any, Any]:
    """The part of a picture in the box, and of a signal, as Pillow pictures of one size."""
    x1, y1, x2, y2 = box
    part = picture_of(picture_CHW[:, y1:y2, x1:x2]).convert("RGB")
    return grown(part, SIDE), signal(signal_CHW[:, y1:y2, x1:x2], SIDE)


def as_tensor(cells: list[tuple[int, int, int]]) -> Tensor:
    """Cells (channel, row, column) as int64 [B, 3]."""
    return torch.tensor(cells, dtype=torch.int64).view(-1, 3)
