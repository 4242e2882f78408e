"""What a network sees and how it learns, on pictures of its own data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.batch import Batch
from cnnrun.batches import in_order
from cnnrun.dataset import Examples
from cnnrun.errors import ConfigError
from cnnrun.network import build
from cnnrun.panels import Dot, dotted, drawing, enlarged, picture_of, side_by_side
from cnnrun.taskspec import Level
from cnnrun.trained import Trained


def found(given: Trained, examples: Examples, numbers: Sequence[int]) -> NDArray[np.uint8]:
    """Samples of a split with what is in them and what the network finds, drawn. Raises ConfigError."""
    batch = _samples(given, examples, numbers)
    with torch.inference_mode():
        names = [examples.name(each) for each in numbers]
        drawn = drawing(given.task, given.facts, batch, given.results(batch.pictures), names)
    if drawn is None:
        raise ConfigError(f"{given.task.kind} finds nothing that lies anywhere in a picture")
    return drawn


def assignment(given: Trained, examples: Examples, number: int, nodes: Any) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Which cells would learn which objects of a sample, level by level: as data, and drawn. Raises ConfigError."""
    batch = _samples(given, examples, [number])
    with torch.inference_mode():
        found = given.task.assignment(given.network(batch.pictures), batch.targets, given.facts)
    true = given.task.true_marks(batch.targets, given.facts)
    if found is None or true is None:
        raise ConfigError(f"{given.task.kind} assigns no cells to objects")
    levels = [Level(each.shape, each.field, each.stride) for each in build(nodes, given.task, given.facts).levels]
    names = given.task.taken() or ["last layer"]
    picture, first, columns, rows = picture_of(batch.pictures[0]), 0, [], []
    factor = enlarged(picture)
    for name, level in zip(names, levels, strict=True):
        cells = range(first, first + level.shape[1] * level.shape[2])
        first = cells.stop
        own = [each for each in found if each["cell"] in cells]
        dots = [Dot(each["x"], each["y"], each["object"], each["quality"]) for each in own]
        title = f"{name}: {len(own)} cells of {len(cells)}"
        columns.append((title, dotted(picture, true[0], dots, factor)))
        rows += [{"level": name, **{key: value for key, value in each.items() if key != "cell"}} for each in own]
    objects = [{"object": k, "label": mark.text, "box": list(mark.box)} for k, mark in enumerate(true[0])]
    counts = [sum(row["object"] == k for row in rows) for k in range(len(objects))]
    best = [max((row["quality"] for row in rows if row["object"] == k), default=0.0) for k in range(len(objects))]
    about = [each | {"cells": n, "best": q} for each, n, q in zip(objects, counts, best, strict=True)]
    return {"picture": examples.name(number), "objects": about, "cells": rows}, side_by_side([columns])


def _samples(given: Trained, examples: Examples, numbers: Sequence[int]) -> Batch:
    """Those samples of a split, as they are."""
    if wrong := [each for each in numbers if not 0 <= each < len(examples)]:
        raise ConfigError(f"there is no picture {wrong[0]}; the split has {len(examples)}, from 0")
    chosen = torch.zeros(len(examples), dtype=torch.bool)
    chosen[list(numbers)] = True
    return next(iter(in_order(examples.only(chosen), len(numbers), given.device)))
