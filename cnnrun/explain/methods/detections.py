"""For networks that find objects: what is there beside what is found, and which cells learn what."""

from __future__ import annotations

from typing import Any

import torch

from cnnrun.base.errors import ConfigError
from cnnrun.contracts.task import FeatureLevel
from cnnrun.explain.figures.panels import Dot, draw_dots, enlargement, marks_panel, titled_grid
from cnnrun.explain.subject import Explanation, ImagesToExplain, Subject


def detections(subject: Subject, shown: ImagesToExplain) -> Explanation:
    """Pictures with what is in them and what the network finds, drawn. Raises ConfigError."""
    given = subject.trained
    marks = given.task.result_marks(given.results(shown.pixels), given.facts)
    true = given.task.target_marks(shown.targets, given.facts) if shown.targets else [[] for _ in range(len(shown))]
    if marks is None or true is None:
        raise ConfigError(f"{given.task.kind} finds nothing that lies anywhere in a picture")
    drawn = marks_panel(shown.pixels, true, marks, shown.names)
    caption = "What is in each picture, left, and what the network finds, right." if shown.targets else "What is found."
    pictures = [{"picture": name, "found": len(own)} for name, own in zip(shown.names, marks, strict=True)]
    return Explanation(drawn, caption, {"pictures": pictures})


def show_assignment(subject: Subject, shown: ImagesToExplain) -> Explanation:
    """Which cells would learn which objects of the first picture, level by level. Raises ConfigError."""
    given = subject.trained
    with torch.inference_mode():
        found = given.task.assignment(given.network(shown.pixels), shown.targets, given.facts)
    true = given.task.target_marks(shown.targets, given.facts)
    if found is None or true is None:
        raise ConfigError(f"{given.task.kind} assigns no cells to objects")
    levels = [FeatureLevel(each.shape, each.field, each.stride) for each in subject.built_network.levels]
    names = given.task.feature_layers() or ["last layer"]
    picture, first, columns, rows = shown.pillow_image(0), 0, [], []
    for name, level in zip(names, levels, strict=True):
        cells = range(first, first + level.shape[1] * level.shape[2])
        first = cells.stop
        own = [each for each in found if each["cell"] in cells]
        dots = [Dot(each["x"], each["y"], each["object"], each["quality"]) for each in own]
        title = f"{name}: {len(own)} cells of {len(cells)}"
        columns.append((title, draw_dots(picture, true[0], dots, enlargement(picture))))
        rows += [{"level": name, **{key: value for key, value in each.items() if key != "cell"}} for each in own]
    caption = f"{shown.names[0]}: the cells of each level that learn each object; the larger, the better one fits."
    data = {"picture": shown.names[0], "objects": _objects(true[0], rows), "cells": rows}
    return Explanation(titled_grid([columns]), caption, data, "objects")


def _objects(true: list[Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each object with how many cells learn it, and how well the best of them fits."""
    made = []
    for number, mark in enumerate(true):
        own = [row["quality"] for row in rows if row["object"] == number]
        about = {"object": number, "label": mark.text, "box": list(mark.box)}
        made.append({**about, "cells": len(own), "best": max(own, default=0.0)})
    return made
