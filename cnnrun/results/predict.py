"""`cnnrun predict`: predictions for image files, one row at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnnrun.base.atomic_files import is_own_file, make_folder, write_text
from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, escape
from cnnrun.contracts.prediction import Overlay, Prediction
from cnnrun.data.image_files import decode_image, image_errors, read_image_bytes
from cnnrun.data.image_paths import list_images
from cnnrun.data.image_settings import ImageSettings
from cnnrun.explain.figures.contact_sheet import write_png
from cnnrun.explain.figures.panels import draw_overlay, to_pillow
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.results.inference import compute_results

_GENERATOR = "cnnrun predict"  # written into the PNG files, which marks them as ours


@dataclass(frozen=True)
class OutputFiles:
    """Output besides the rows: minimum scores, folders for drawings and masks, a file in COCO's results format."""

    scores: Sequence[str] = ()
    draw: Path | None = None
    coco: Path | None = None
    masks: Path | None = None


@dataclass(frozen=True)
class PredictedFile:
    """A file with its prediction, or with the reason that it cannot be read."""

    path: Path
    prediction: Prediction | None
    error: str = ""
    unreadable_json: Mapping[str, Any] = field(default_factory=dict)
    """Keys in JSON that every file has: see `Predicting`."""

    def to_json(self) -> dict[str, Any]:
        """Return the path with the prediction, or with `error`, as plain data for JSON."""
        content = self.prediction.to_json() if self.prediction else {"error": self.error}
        return {**self.unreadable_json, "path": str(self.path), **content}


def predict_paths(
    trained: TrainedNetwork, paths: Sequence[Path], batch: int, output: OutputFiles, fast: bool = False
) -> Iterator[PredictedFile]:
    """Predict the images in files and folders, as by `predict_files`; draw and write objects if wanted.

    Raises ConfigError if the task cannot give an output that is wanted, or if an output path cannot be used.
    """
    predicting, coco = trained.task.predicting, output.coco
    if (output.scores or coco) and not predicting.has_objects:
        raise ConfigError(f"--score and --coco need a network that finds objects; {trained.task.kind} finds none")
    if output.draw and not predicting.has_overlays:
        raise ConfigError(f"--draw needs a network that predicts boxes or masks; {trained.task.kind} predicts none")
    if output.masks and not predicting.has_class_maps:
        raise ConfigError(f"--masks needs a network with a class for each pixel; {trained.task.kind} has none")
    if output.draw and output.masks and output.draw.resolve() == output.masks.resolve():
        raise ConfigError(f"--draw and --masks {output.masks}: would replace each other's files; give two folders")
    thresholds = choose_thresholds(predicting.thresholds(trained.choices), output.scores)
    if coco and (coco.exists() or not coco.parent.is_dir()):
        raise ConfigError(f"--coco {coco}: {'already exists' if coco.exists() else 'no such folder'}; choose another")
    results: list[dict[str, Any]] = []
    draw = overlay_drawer(output.draw, trained.image, trained.facts.image_shape[0])
    write_mask = mask_writer(output.masks)
    for predicted in predict_files(trained, list_images(paths), batch, thresholds, fast):
        draw(predicted)
        write_mask(predicted)
        if coco:
            results += coco_results(predicted)
        yield predicted
    if coco:
        write_text(coco, json.dumps(results) + "\n")


def predict_files(
    trained: TrainedNetwork,
    paths: Iterable[Path],
    batch: int,
    thresholds: dict[str, float] | None = None,
    fast: bool = False,
) -> Iterator[PredictedFile]:
    """Predict files in order, with `fast` in bfloat16.

    `thresholds` are the minimum scores of the classes, by default the network's.
    """
    predicting = trained.task.predicting
    if thresholds is None:
        thresholds = predicting.thresholds(trained.choices)
    for chunk, results, views in compute_results(trained, paths, batch, fast):
        predictions = iter(predicting.predictions(results, views, thresholds) if views else ())
        for path, error in chunk:
            if error is not None:
                yield PredictedFile(path, None, str(error), predicting.unreadable_json)
            else:
                yield PredictedFile(path, next(predictions), "", predicting.unreadable_json)


def choose_thresholds(thresholds: dict[str, float], settings: Sequence[str]) -> dict[str, float]:
    """Replace minimum scores by class: `0.4` for all classes, `cat=0.6` for one of them. Raises ConfigError."""
    thresholds = dict(thresholds)
    for setting in sorted(settings, key=lambda setting: "=" in setting):  # the one for all classes first
        name, _, text = setting.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < 1 or (name and name not in thresholds):
            classes = join_names(list(thresholds))
            raise ConfigError(f"--score {escape(setting)}: give a number below 1, or class=number (classes: {classes})")
        thresholds |= {name: value} if name else dict.fromkeys(thresholds, value)
    return thresholds


def coco_results(predicted: PredictedFile) -> list[dict[str, Any]]:
    """Objects of a file in COCO's results format. An image's id is its file name, or the number that its stem is."""
    if predicted.prediction is None:
        return []
    stem = predicted.path.stem
    image_id = int(stem) if stem.isdecimal() else predicted.path.name
    return [{"image_id": image_id, **detection} for detection in predicted.prediction.coco_results()]


def overlay_drawer(folder: Path | None, image: ImageSettings, channels: int) -> Callable[[PredictedFile], None]:
    """Return a function that draws a prediction onto its image, as a PNG in the folder; without one, a no-op.

    `channels` are those of the network's input.

    Raises ConfigError if the folder holds PNG files that cnnrun did not write.
    """
    if folder is None:
        return lambda predicted: None
    choose_path = _prepare_png_folder("--draw", folder)

    def draw(predicted: PredictedFile) -> None:
        if predicted.prediction is None:
            return
        with image_errors(str(predicted.path)):
            decoded = decode_image(read_image_bytes(predicted.path), 3 if channels in (1, 3) else channels, image)
        image_8_bit, *further_planes = decoded.pillow_images
        pillow_image = to_pillow(decoded.values()) if further_planes else image_8_bit
        drawing = draw_overlay(pillow_image, predicted.prediction.overlay() or Overlay())
        write_png(choose_path(predicted.path), np.asarray(drawing), _GENERATOR)

    return draw


def mask_writer(folder: Path | None) -> Callable[[PredictedFile], None]:
    """Return a function that writes the class of each pixel as a grey PNG in the folder; without one, a no-op.

    Raises ConfigError if the folder holds PNG files that cnnrun did not write.
    """
    if folder is None:
        return lambda predicted: None
    choose_path = _prepare_png_folder("--masks", folder)

    def write(predicted: PredictedFile) -> None:
        class_map = predicted.prediction.class_map() if predicted.prediction else None
        if class_map is not None:
            write_png(choose_path(predicted.path), class_map, _GENERATOR)

    return write


def _prepare_png_folder(option: str, folder: Path) -> Callable[[Path], Path]:
    """Make the folder of an option; the result gives the path of the PNG for each image, under a name of its own."""
    escaped = escape(str(folder))
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {escaped}: is a file; give a folder")
    make_folder(folder)
    for path in folder.glob("*.png"):
        if not is_own_file(path, _GENERATOR.encode()):
            raise ConfigError(f"{option} {escaped}: holds PNG files that cnnrun did not write; choose another folder")
    names = set[Path]()
    return lambda path: choose_png_path(folder, path.stem, names)


def choose_png_path(folder: Path, stem: str, names: set[Path]) -> Path:
    """Choose a path that is not among `names`, and add it: `stem.png`, then `stem-2.png`, and so on."""
    path, copy = folder / f"{stem}.png", 1
    while path in names:
        copy += 1
        path = folder / f"{stem}-{copy}.png"
    names.add(path)
    return path
