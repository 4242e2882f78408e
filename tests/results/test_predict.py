"""Predictions of files: their thresholds, JSON, COCO's results format and drawings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pil
from PIL import ImageColor

from cnnrun.base.errors import ConfigError
from cnnrun.data.image_settings import ImageSettings
from cnnrun.explain.figures.panels import palette_colour
from cnnrun.results.predict import PredictedFile, choose_thresholds, coco_results, overlay_drawer
from cnnrun.tasks.classification import LabelPrediction
from cnnrun.tasks.detection.prediction import DetectedObject, DetectPrediction

LABEL = LabelPrediction([("ape", 0.75), ("bee", 0.25)])
OBJECTS = DetectPrediction(
    [DetectedObject("cat", 2, 9, 0.5, (10.0, 20.0, 40.0, 60.0)), DetectedObject("ape", 0, 7, 0.25, (50.0, 30, 70, 50))],
    80,
    100,
)


def test_the_json_of_a_file_has_its_path_and_the_prediction_or_the_error():
    assert PredictedFile(Path("a"), LABEL).to_json() == {"path": "a", **LABEL.to_json()}
    assert PredictedFile(Path("a"), None, "no picture").to_json() == {"path": "a", "error": "no picture"}
    objects = {"objects": []}
    assert PredictedFile(Path("a"), None, "no", objects).to_json() == {"objects": [], "path": "a", "error": "no"}
    found = PredictedFile(Path("a"), OBJECTS, "", objects).to_json()
    assert [entry["label"] for entry in found["objects"]] == ["cat", "ape"]
    assert (found["path"], found["height"], found["width"]) == ("a", 80, 100)


def test_coco_results_name_the_image_by_its_number_or_its_file_name():
    for path, image_id in (("x/12.png", 12), ("x/scene.png", "scene.png")):
        first, second = coco_results(PredictedFile(Path(path), OBJECTS))
        assert first == {"image_id": image_id, "category_id": 9, "bbox": [10.0, 20.0, 30.0, 40.0], "score": 0.5}
        assert (second["image_id"], second["category_id"]) == (image_id, 7)
    assert coco_results(PredictedFile(Path("1.png"), LABEL)) == []
    assert coco_results(PredictedFile(Path("1.png"), None, "no picture")) == []


def test_a_threshold_for_all_classes_comes_before_those_of_single_classes():
    thresholds = {"ape": 0.3, "bee": 0.8}
    assert choose_thresholds(thresholds, []) == thresholds
    assert choose_thresholds(thresholds, ["bee=0.6", "0.1"]) == {"ape": 0.1, "bee": 0.6}
    assert thresholds == {"ape": 0.3, "bee": 0.8}
    for setting in ("dog=0.4", "1", "-0.1", "x", "ape=", "nan"):
        with pytest.raises(ConfigError, match="give a number below 1, or class=number"):
            choose_thresholds(thresholds, [setting])


def test_drawings_have_the_colour_of_the_classs_index(tmp_path):
    """As the drawings of targets; not of the object's rank."""
    Pil.new("L", (100, 80), 255).save(tmp_path / "12.png")
    draw = overlay_drawer(tmp_path / "drawn", ImageSettings(), 3)
    draw(PredictedFile(tmp_path / "12.png", OBJECTS))
    draw(PredictedFile(tmp_path / "broken.png", None, "no picture"))
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["12.png"]
    with Pil.open(tmp_path / "drawn" / "12.png") as drawing:
        pixels = np.asarray(drawing)
    for (x, y), class_index in (((39, 59), 2), ((69, 49), 0)):  # the lower right corners
        assert tuple(pixels[y, x]) == ImageColor.getrgb(palette_colour(class_index))
        assert (pixels[y + 1, x] == 255).all()


def test_images_of_one_name_are_drawn_into_files_of_their_own(tmp_path):
    draw = overlay_drawer(tmp_path / "drawn", ImageSettings(), 3)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Pil.new("L", (100, 80), 255).save(tmp_path / folder / "1.png")
        draw(PredictedFile(tmp_path / folder / "1.png", OBJECTS))
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["1-2.png", "1.png"]
