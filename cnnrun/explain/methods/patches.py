"""The strongest cells of a layer over a data set, the part of the picture that each sees, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.explain.backward_rules import project_to_pixels
from cnnrun.explain.figures.panels import to_pillow
from cnnrun.explain.figures.tiles import scale_to_side, signed_tile
from cnnrun.explain.layer_names import LayerPlace, layer_features
from cnnrun.explain.subject import TILE_SIDE, Subject
from cnnrun.model.trained_network import TrainedNetwork

PATCHES_PER_CHANNEL = 9  # as in the paper

PixelBox = tuple[int, int, int, int]
Cell = tuple[int, int, int]  # channel, row, column


@dataclass(frozen=True)
class StrongestCells:
    """For each channel its strongest cells, of different pictures, best first: [N, C], N at most what was asked."""

    values: Tensor
    samples: Tensor
    cells: Tensor  # row * width + column


@dataclass(frozen=True)
class Patch:
    """A cell with its value, the sample and the box that it sees, and both as Pillow pictures of one size."""

    cell: Cell
    value: float
    sample: int
    box: PixelBox
    image: Any
    projection: Any

    def to_dict(self, examples: Examples) -> dict[str, Any]:
        """As plain data."""
        name, where = examples.sample_name(self.sample), {"cell": list(self.cell[1:]), "box": list(self.box)}
        return {"channel": self.cell[0], "picture": name, "sample": self.sample, "value": self.value, **where}


def find_strongest_cells(
    given: TrainedNetwork, place: LayerPlace, examples: Examples, batch: int, best: int = PATCHES_PER_CHANNEL
) -> StrongestCells:
    """One pass over a split: of each picture each channel's strongest cell, of these the best.

    Of equally strong ones the first comes first, whatever the batch.
    """
    kept: list[Tensor] = []
    for part in batches_in_order(examples, batch, given.device):
        values, cells = layer_features(given.network, place, part.images).flatten(2).max(2)
        new = [values, part.index_B.to(values.device)[:, None].expand_as(values), cells]
        joined = [torch.cat(pair) for pair in zip(kept, new, strict=True)] if kept else new
        order = joined[0].sort(dim=0, descending=True, stable=True).indices[:best]
        kept = [each.gather(0, order) for each in joined]
    return StrongestCells(*(each.cpu() for each in kept))


def draw_patches(
    subject: Subject, place: LayerPlace, examples: Examples, found: StrongestCells, channels: Sequence[int]
) -> list[list[Patch]]:
    """What was found for those channels, drawn."""
    cells, samples, values = [], [], []
    for channel in channels:
        of_channel = (each[:, channel].tolist() for each in (found.values, found.samples, found.cells))
        for value, sample, cell in zip(*of_channel, strict=True):
            cells.append((channel, *divmod(cell, place.shape[2])))
            samples.append(sample)
            values.append(value)
    drawn = _drawn(subject, place, examples, cells, samples)
    made = [
        Patch(cell, value, sample, *pair)
        for cell, value, sample, pair in zip(cells, values, samples, drawn, strict=True)
    ]
    count = len(found.values)
    return [made[start : start + count] for start in range(0, len(made), count)]


def _drawn(
    subject: Subject, place: LayerPlace, examples: Examples, cells: list[Cell], samples: list[int]
) -> Iterator[tuple[PixelBox, Any, Any]]:
    """For each cell its box, the part of the sample's picture in it, and of the projection; some at a time."""
    for start in range(0, len(cells), subject.batch_size):
        own = cells[start : start + subject.batch_size]
        pictures = examples.load_images(torch.tensor(samples[start : start + subject.batch_size])).float()
        for cell, picture, back in zip(own, pictures, projections(subject, place, pictures, own), strict=True):
            x1, y1, x2, y2 = box = receptive_field_box(place, cell[1], cell[2], subject.trained.facts.image)
            part = to_pillow(picture[:, y1:y2, x1:x2]).convert("RGB")
            yield box, scale_to_side(part, TILE_SIDE), signed_tile(back[:, y1:y2, x1:x2], TILE_SIDE)


def projections(subject: Subject, place: LayerPlace, pictures_BCHW: Tensor, cells: Sequence[Cell]) -> Tensor:
    """`layer_names.projected`, on the host."""
    given = subject.trained
    at = torch.tensor(cells, dtype=torch.int64).view(-1, 3)
    return project_to_pixels(given.network, place, pictures_BCHW.to(given.device), at).cpu()


def receptive_field_box(place: LayerPlace, row: int, column: int, image: tuple[int, ...]) -> PixelBox:
    """The box (x1, y1, x2, y2) that a cell sees, moved inside the picture where it fits and else cut to it."""
    x1, y1, x2, y2 = place.output.receptive_box(row, column, image)
    left, right = _inside(x1, x2, image[2])
    top, bottom = _inside(y1, y2, image[1])
    return left, top, right, bottom


def _inside(low: int, high: int, size: int) -> tuple[int, int]:
    length = min(high - low, size)
    start = min(max(low, 0), size - length)
    return start, start + length
