"""Patches of images that activate a layer's channels most, with their projections by the deconvnet."""

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
from cnnrun.explain.layer_names import NamedLayer, layer_features
from cnnrun.explain.subject import TILE_SIDE, ExplainedNetwork
from cnnrun.model.trained_network import TrainedNetwork

PATCHES_PER_CHANNEL = 9  # as in the paper

PixelBox = tuple[int, int, int, int]
Cell = tuple[int, int, int]  # channel, row, column


@dataclass(frozen=True)
class StrongestCells:
    """Strongest cells of each channel, from different images, best first: [N, C]."""

    values: Tensor
    samples: Tensor
    cells: Tensor  # row * width + column


@dataclass(frozen=True)
class Patch:
    """A cell with its value, sample and receptive field; the field's image and its projection as Pillow images."""

    cell: Cell
    value: float
    sample: int
    box: PixelBox
    image: Any
    projection: Any

    def to_dict(self, examples: Examples) -> dict[str, Any]:
        """Convert to plain data, without images."""
        name, position = examples.sample_name(self.sample), {"cell": list(self.cell[1:]), "box": list(self.box)}
        return {"channel": self.cell[0], "picture": name, "sample": self.sample, "value": self.value, **position}


def find_strongest_cells(
    trained: TrainedNetwork,
    place: NamedLayer,
    examples: Examples,
    batch_size: int,
    max_cells: int = PATCHES_PER_CHANNEL,
) -> StrongestCells:
    """Find each channel's strongest cells in one pass over a split, at most one per image.

    Equally strong cells stay in the order of their samples, whatever the batch size.
    """
    strongest: list[Tensor] = []
    for batch in batches_in_order(examples, batch_size, trained.device):
        values, cells = layer_features(trained.network, place, batch.images).flatten(2).max(2)
        candidates = [values, batch.index_B.to(values.device)[:, None].expand_as(values), cells]
        merged = candidates
        if strongest:
            merged = [torch.cat(tensors) for tensors in zip(strongest, candidates, strict=True)]
        order = merged[0].sort(dim=0, descending=True, stable=True).indices[:max_cells]
        strongest = [tensor.gather(0, order) for tensor in merged]
    return StrongestCells(*(tensor.cpu() for tensor in strongest))


def draw_patches(
    subject: ExplainedNetwork, place: NamedLayer, examples: Examples, strongest: StrongestCells, channels: Sequence[int]
) -> list[list[Patch]]:
    """Draw the strongest cells of some channels: a list of patches for each channel."""
    cells, samples, values = [], [], []
    for channel in channels:
        columns = (tensor[:, channel].tolist() for tensor in (strongest.values, strongest.samples, strongest.cells))
        for value, sample, cell in zip(*columns, strict=True):
            cells.append((channel, *divmod(cell, place.shape[2])))
            samples.append(sample)
            values.append(value)
    drawings = _draw_cells(subject, place, examples, cells, samples)
    patches = [
        Patch(cell, value, sample, *drawing)
        for cell, value, sample, drawing in zip(cells, values, samples, drawings, strict=True)
    ]
    count = len(strongest.values)
    return [patches[start : start + count] for start in range(0, len(patches), count)]


def _draw_cells(
    subject: ExplainedNetwork, place: NamedLayer, examples: Examples, cells: list[Cell], samples: list[int]
) -> Iterator[tuple[PixelBox, Any, Any]]:
    """Draw cells in batches: for each its box, and the parts of the image and of the projection inside it."""
    for start in range(0, len(cells), subject.batch_size):
        batch_cells = cells[start : start + subject.batch_size]
        images_BCHW = examples.load_images(torch.tensor(samples[start : start + subject.batch_size])).float()
        projections_BCHW = projections(subject, place, images_BCHW, batch_cells)
        for cell, image_CHW, projection_CHW in zip(batch_cells, images_BCHW, projections_BCHW, strict=True):
            x1, y1, x2, y2 = box = receptive_field_box(place, cell[1], cell[2], subject.trained.facts.image_shape)
            crop = to_pillow(image_CHW[:, y1:y2, x1:x2]).convert("RGB")
            yield box, scale_to_side(crop, TILE_SIDE), signed_tile(projection_CHW[:, y1:y2, x1:x2], TILE_SIDE)


def projections(subject: ExplainedNetwork, place: NamedLayer, images_BCHW: Tensor, cells: Sequence[Cell]) -> Tensor:
    """Project cells back to pixels as `project_to_pixels` does; the result is on the CPU."""
    trained = subject.trained
    cells_B3 = torch.tensor(cells, dtype=torch.int64).view(-1, 3)
    return project_to_pixels(trained.network, place, images_BCHW.to(trained.device), cells_B3).cpu()


def receptive_field_box(place: NamedLayer, row: int, column: int, image: tuple[int, ...]) -> PixelBox:
    """Receptive field (x1, y1, x2, y2) of a cell, moved inside the image, or cut to it if it is larger."""
    x1, y1, x2, y2 = place.output.receptive_box(row, column, image)
    left, right = _shift_inside(x1, x2, image[2])
    top, bottom = _shift_inside(y1, y2, image[1])
    return left, top, right, bottom


def _shift_inside(low: int, high: int, size: int) -> tuple[int, int]:
    length = min(high - low, size)
    start = min(max(low, 0), size - length)
    return start, start + length
