"""Results for picture files, as they come."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.atomic_files import is_own_file, make_folder, write_text
from cnnrun.base.boxes import Mark
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.results import View
from cnnrun.contracts.task import TaskSpec
from cnnrun.data.image_files import ImageSettings, decode_image, image_errors, load_with_view, read_image_bytes
from cnnrun.data.image_paths import list_images
from cnnrun.explain.figures.contact_sheet import write_png
from cnnrun.explain.figures.panels import draw_marks
from cnnrun.model.trained_network import TrainedNetwork

_BY = "cnnrun predict"  # what drawings say of themselves


@dataclass(frozen=True)
class BoxOutput:
    """How found boxes are shown: from which scores, drawn into which folder, written to which file."""

    scores: Sequence[str] = ()
    draw: Path | None = None
    coco: Path | None = None

    @property
    def is_wanted(self) -> bool:
        return bool(self.scores or self.draw or self.coco)


def predict_paths(
    trained: TrainedNetwork, paths: Sequence[Path], batch: int, boxes: BoxOutput
) -> Iterator[dict[str, Any]]:
    """A row for each image in files and folders, as `predict_files` gives them; boxes are drawn and written if wanted.

    Raises ConfigError.
    """
    task, coco, has_boxes = trained.task, boxes.coco, trained.task.target_kind == "boxes"
    if boxes.is_wanted and not has_boxes:
        raise ConfigError(f"--score, --draw and --coco are for boxes; {task.kind} finds none")
    trained = replace(trained, task=task_with_scores(task, boxes.scores, trained.facts))
    if coco and (coco.exists() or not coco.parent.is_dir()):
        raise ConfigError(f"--coco {coco}: {'is there already' if coco.exists() else 'no such folder'}; choose another")
    results: list[dict[str, Any]] = []
    draw = box_drawer(boxes.draw, trained.image)
    for row in predict_files(trained, list_images(paths), batch):
        draw(row)
        if coco:
            results += coco_results(row)
        yield {"objects": [], **row} if has_boxes else row
    if coco:
        write_text(coco, json.dumps(results) + "\n")


def predict_files(trained: TrainedNetwork, paths: Iterable[Path], batch: int) -> Iterator[dict[str, Any]]:
    """A row a file, in order: its path with the task's result, or with `error` where it cannot be read."""
    channels, height, width = trained.facts.image

    def read(path: Path) -> tuple[NDArray[np.uint8], View] | DataError:
        try:
            return load_with_view(path, (height, width), channels, trained.image)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        source = iter(paths)
        while chunk := list(itertools.islice(source, batch)):
            loaded = list(pool.map(read, chunk))
            rows = iter(_rows(trained, [each for each in loaded if not isinstance(each, DataError)]))
            for path, each in zip(chunk, loaded, strict=True):
                if isinstance(each, DataError):
                    yield {"path": str(path), "error": str(each)}
                else:
                    yield {"path": str(path), **next(rows)}


def _rows(trained: TrainedNetwork, loaded: list[tuple[NDArray[np.uint8], View]]) -> list[dict[str, Any]]:
    if not loaded:
        return []
    pictures = (
        torch.from_numpy(np.stack([pixels for pixels, _ in loaded])).to(trained.device).permute(0, 3, 1, 2).float()
    )
    return trained.task.result_rows(trained.results(pictures), trained.facts, [view for _, view in loaded])


def task_with_scores(task: TaskSpec, written: Sequence[str], facts: Facts) -> TaskSpec:
    """The task with other scores from which objects are shown: `0.4` for all classes, `cat=0.6` for one of them."""
    if not written:
        return task
    scores = task.thresholds(facts)
    for each in sorted(written, key=lambda each: "=" in each):  # that for all first
        name, _, number = each.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1 or (name and name not in facts.classes):
            known = join_names(facts.classes)
            raise ConfigError(f"--score {escape(each)}: give a number below 1, or class=number (classes: {known})")
        scores |= {name: value} if name else dict.fromkeys(facts.classes, value)
    return task.model_copy(update={"score": scores})


def coco_results(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row's objects in COCO's results format. A picture's id is its name, as a number where it is one."""
    stem = Path(row["path"]).stem
    image = int(stem) if stem.isdecimal() else Path(row["path"]).name
    keys = ("category_id", "bbox", "score")
    return [{"image_id": image, **{key: each[key] for key in keys}} for each in row.get("objects", [])]


def box_drawer(folder: Path | None, image: ImageSettings) -> Callable[[dict[str, Any]], None]:
    """A function that draws a row's objects on its picture, as a PNG in the folder; that does nothing without one.

    Raises ConfigError where pictures of others lie in the folder.
    """
    if folder is None:
        return lambda row: None
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--draw {escape(str(folder))}: is a file")
    make_folder(folder)
    for path in folder.glob("*.png"):
        if not is_own_file(path, _BY.encode()):
            raise ConfigError(f"--draw {escape(str(folder))}: holds pictures of yours; choose another folder")
    taken: set[str] = set()

    def draw(row: dict[str, Any]) -> None:
        if "error" in row:
            return
        path = Path(row["path"])
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        with image_errors(str(path)):
            picture = decode_image(read_image_bytes(path), 3, image).pillow_image
        marks = [
            Mark((x, y, x + w, y + h), f"{each['label']} {each['score']:.2f}", each["category_id"])
            for each in row["objects"]
            for x, y, w, h in [each["bbox"]]
        ]
        write_png(folder / f"{name}.png", np.asarray(draw_marks(picture, marks)), _BY)

    return draw
