"""`explain detections` and `explain assign`: targets beside detections, and the cells assigned to objects."""

from __future__ import annotations

from typing import Any

import torch

from cnnrun.base.boxes import Mark
from cnnrun.base.errors import ConfigError
from cnnrun.contracts.task import FeatureLevel
from cnnrun.explain.figures.panels import Dot, draw_dots, enlargement, marks_panel, titled_grid
from cnnrun.explain.subject import Explanation, ImagesToExplain, Subject


def detections(subject: Subject, images: ImagesToExplain) -> Explanation:
    """Draw the targets of images beside the network's detections. Raises ConfigError for tasks without positions."""
    trained = subject.trained
    result_marks = trained.task.result_marks(trained.results(images.pixels), trained.facts)
    target_marks: list[list[Mark]] | None = [[] for _ in range(len(images))]
    if images.targets:
        target_marks = trained.task.target_marks(images.targets, trained.facts)
    if result_marks is None or target_marks is None:
        raise ConfigError(f"explain detections needs a task with boxes; this network is for {trained.task.kind}")
    panel = marks_panel(images.pixels, target_marks, result_marks, images.names)
    caption = "Targets, left, and the network's detections, right." if images.targets else "The network's detections."
    counts = [len(image_marks) for image_marks in result_marks]
    rows = [{"picture": name, "found": count} for name, count in zip(images.names, counts, strict=True)]
    return Explanation(panel, caption, {"pictures": rows})


def show_assignment(subject: Subject, images: ImagesToExplain) -> Explanation:
    """Draw the cells that training would assign to the objects of the first image, by level. Raises ConfigError."""
    trained = subject.trained
    with torch.inference_mode():
        cells = trained.task.assignment(trained.network(images.pixels), images.targets, trained.facts)
    target_marks = trained.task.target_marks(images.targets, trained.facts)
    if cells is None or target_marks is None:
        raise ConfigError(f"explain assign needs a task with boxes; {trained.task.kind} assigns no cells to objects")
    levels = [FeatureLevel(level.shape, level.field, level.stride) for level in subject.built_network.levels]
    level_names = trained.task.feature_layers() or ["last layer"]
    pillow_image, first_cell, columns, rows = images.pillow_image(0), 0, [], []
    for level_name, level in zip(level_names, levels, strict=True):
        cell_range = range(first_cell, first_cell + level.shape[1] * level.shape[2])
        first_cell = cell_range.stop
        level_cells = [cell for cell in cells if cell["cell"] in cell_range]
        dots = [Dot(cell["x"], cell["y"], cell["object"], cell["quality"]) for cell in level_cells]
        title = f"{level_name}: {len(level_cells)} cells of {len(cell_range)}"
        columns.append((title, draw_dots(pillow_image, target_marks[0], dots, enlargement(pillow_image))))
        for cell in level_cells:
            rows.append({"level": level_name, **{key: value for key, value in cell.items() if key != "cell"}})
    caption = f"{images.names[0]}: the cells of each level assigned to each object; a larger dot fits better."
    data = {"picture": images.names[0], "objects": _objects(target_marks[0], rows), "cells": rows}
    return Explanation(titled_grid([columns]), caption, data, "objects")


def _objects(marks: list[Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each object with the number of cells assigned to it and the quality of the best one."""
    objects = []
    for object_index, mark in enumerate(marks):
        qualities = [row["quality"] for row in rows if row["object"] == object_index]
        description = {"object": object_index, "label": mark.text, "box": list(mark.box)}
        objects.append({**description, "cells": len(qualities), "best": max(qualities, default=0.0)})
    return objects
