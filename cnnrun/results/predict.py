"""`cnnrun predict`: predictions for image files, one row at a time."""

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

_GENERATOR = "cnnrun predict"  # written into the PNG files, which marks them as ours


@dataclass(frozen=True)
class BoxOutput:
    """Output of detected boxes: minimum scores, a folder for drawings, a file in COCO's results format."""

    scores: Sequence[str] = ()
    draw: Path | None = None
    coco: Path | None = None

    @property
    def is_wanted(self) -> bool:
        """Return whether any of the settings is given."""
        return bool(self.scores or self.draw or self.coco)


def predict_paths(
    trained: TrainedNetwork, paths: Sequence[Path], batch: int, boxes: BoxOutput
) -> Iterator[dict[str, Any]]:
    """Predict the images in files and folders, a row for each as by `predict_files`; draw and write boxes if wanted.

    Raises ConfigError if boxes are wanted from a task that has none, or if an output path cannot be used.
    """
    task, coco, has_boxes = trained.task, boxes.coco, trained.task.target_kind == "boxes"
    if boxes.is_wanted and not has_boxes:
        raise ConfigError(f"--score, --draw and --coco need a network that finds boxes; {task.kind} finds none")
    trained = replace(trained, task=task_with_scores(task, boxes.scores, trained.facts))
    if coco and (coco.exists() or not coco.parent.is_dir()):
        raise ConfigError(f"--coco {coco}: {'already exists' if coco.exists() else 'no such folder'}; choose another")
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
    """Predict files in order; a row holds the path and the task's result, or `error` if the file cannot be read."""
    channels, height, width = trained.facts.image

    def load_image(path: Path) -> tuple[NDArray[np.uint8], View] | DataError:
        try:
            return load_with_view(path, (height, width), channels, trained.image)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        source = iter(paths)
        while chunk := list(itertools.islice(source, batch)):
            loaded = list(pool.map(load_image, chunk))
            rows = iter(_result_rows(trained, [image for image in loaded if not isinstance(image, DataError)]))
            for path, image in zip(chunk, loaded, strict=True):
                if isinstance(image, DataError):
                    yield {"path": str(path), "error": str(image)}
                else:
                    yield {"path": str(path), **next(rows)}


def _result_rows(trained: TrainedNetwork, loaded: list[tuple[NDArray[np.uint8], View]]) -> list[dict[str, Any]]:
    if not loaded:
        return []
    images_BCHW = (
        torch.from_numpy(np.stack([pixels for pixels, _ in loaded])).to(trained.device).permute(0, 3, 1, 2).float()
    )
    return trained.task.result_rows(trained.results(images_BCHW), trained.facts, [view for _, view in loaded])


def task_with_scores(task: TaskSpec, settings: Sequence[str], facts: Facts) -> TaskSpec:
    """Copy the task with other score thresholds: `0.4` for all classes, `cat=0.6` for one. Raises ConfigError."""
    if not settings:
        return task
    scores = task.thresholds(facts)
    for setting in sorted(settings, key=lambda setting: "=" in setting):  # the one for all classes first
        name, _, text = setting.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1 or (name and name not in facts.classes):
            classes = join_names(facts.classes)
            raise ConfigError(f"--score {escape(setting)}: give a number below 1, or class=number (classes: {classes})")
        scores |= {name: value} if name else dict.fromkeys(facts.classes, value)
    return task.model_copy(update={"score": scores})


def coco_results(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Objects of a row in COCO's results format. An image's id is its file name, or the number that its stem is."""
    stem = Path(row["path"]).stem
    image_id = int(stem) if stem.isdecimal() else Path(row["path"]).name
    keys = ("category_id", "bbox", "score")
    return [{"image_id": image_id, **{key: detection[key] for key in keys}} for detection in row.get("objects", [])]


def box_drawer(folder: Path | None, image: ImageSettings) -> Callable[[dict[str, Any]], None]:
    """Return a function that draws a row's objects onto its image, as a PNG in the folder; without one, a no-op.

    Raises ConfigError if the folder holds PNG files that cnnrun did not write.
    """
    if folder is None:
        return lambda row: None
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--draw {escape(str(folder))}: is a file; give a folder")
    make_folder(folder)
    for path in folder.glob("*.png"):
        if not is_own_file(path, _GENERATOR.encode()):
            raise ConfigError(
                f"--draw {escape(str(folder))}: holds PNG files that cnnrun did not write; choose another folder"
            )
    names: set[str] = set()

    def draw(row: dict[str, Any]) -> None:
        if "error" in row:
            return
        path = Path(row["path"])
        name, copy = path.stem, 1
        while name in names:
            copy += 1
            name = f"{path.stem}-{copy}"
        names.add(name)
        with image_errors(str(path)):
            pillow_image = decode_image(read_image_bytes(path), 3, image).pillow_image
        marks = [
            Mark((x, y, x + w, y + h), f"{detection['label']} {detection['score']:.2f}", detection["category_id"])
            for detection in row["objects"]
            for x, y, w, h in [detection["bbox"]]
        ]
        write_png(folder / f"{name}.png", np.asarray(draw_marks(pillow_image, marks)), _GENERATOR)

    return draw
