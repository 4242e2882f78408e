"""`explain detections` and `explain assign`: targets beside detections, and the cells assigned to objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cnnrun.base.errors import ConfigError
from cnnrun.contracts.prediction import CaptionedBox, Overlay
from cnnrun.contracts.task_parts import FeatureLevel
from cnnrun.explain.figures.panels import Dot, draw_dots, enlargement, overlay_panel, titled_grid
from cnnrun.explain.subject import ExplainedNetwork, Explanation, ImagesToExplain


def detections(subject: ExplainedNetwork, images: ImagesToExplain) -> Explanation:
    """Draw the targets of images beside the network's detections. Raises ConfigError for tasks without positions."""
    trained = subject.trained
    showing = trained.task.showing
    if not showing.has_overlays:
        raise ConfigError(f"explain detections needs a task with boxes; this network is for {trained.task.kind}")
    overlays = trained.overlays(images.pixels)
    target_overlays = showing.target_overlays(images.targets) if images.targets else [Overlay()] * len(images)
    panel = overlay_panel(images.pixels, target_overlays, overlays, images.names)
    caption = "Targets, left, and the network's detections, right." if images.targets else "The network's detections."
    counts = [len(overlay.boxes) for overlay in overlays]
    rows = [{"picture": name, "found": count} for name, count in zip(images.names, counts, strict=True)]
    return Explanation(panel, caption, {"pictures": rows})


def show_assignment(subject: ExplainedNetwork, images: ImagesToExplain) -> Explanation:
    """Draw the cells that training would assign to the objects of the first image, by level. Raises ConfigError."""
    trained = subject.trained
    if trained.task.cells is None:
        raise ConfigError(f"explain assign needs a task with boxes; {trained.task.kind} assigns no cells to objects")
    with torch.inference_mode():
        cells = trained.task.cells.assigned_cells(trained.network(images.pixels), images.targets)
    boxes = trained.task.showing.target_overlays(images.targets)[0].boxes
    levels = [FeatureLevel(level.shape, level.field, level.stride) for level in subject.built_network.levels]
    level_names = trained.task.requirements.feature_layers or ["last layer"]
    pillow_image, first_cell, columns, rows = images.pillow_image(0), 0, [], []
    for level_name, level in zip(level_names, levels, strict=True):
        cell_range = range(first_cell, first_cell + level.shape[1] * level.shape[2])
        first_cell = cell_range.stop
        level_cells = [cell for cell in cells if cell.cell_index in cell_range]
        dots = [Dot(cell.x_px, cell.y_px, cell.object_index, cell.quality) for cell in level_cells]
        title = f"{level_name}: {len(level_cells)} cells of {len(cell_range)}"
        columns.append((title, draw_dots(pillow_image, boxes, dots, enlargement(pillow_image))))
        for cell in level_cells:
            place = {"level": level_name, "x": cell.x_px, "y": cell.y_px}
            rows.append({**place, "object": cell.object_index, "quality": cell.quality})
    caption = f"{images.names[0]}: the cells of each level assigned to each object; a larger dot fits better."
    data = {"picture": images.names[0], "objects": _objects(boxes, rows), "cells": rows}
    return Explanation(titled_grid([columns]), caption, data, "objects")


def _objects(boxes: Sequence[CaptionedBox], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each object with the number of cells assigned to it and the quality of the best one."""
    objects = []
    for object_index, box in enumerate(boxes):
        qualities = [row["quality"] for row in rows if row["object"] == object_index]
        description = {"object": object_index, "label": box.text, "box": list(box.box)}
        objects.append({**description, "cells": len(qualities), "best": max(qualities, default=0.0)})
    return objects
