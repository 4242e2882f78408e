"""Segmentation from end to end: the same numbers everywhere, and masks of the images' own sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnrun.training.run_records import read_metrics

METRICS = ("mean_iou", "mean_dice", "pixel_accuracy")


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_training_eval_and_the_exported_file_measure_the_same(of_each_task, run_cli):
    run = of_each_task["segment"]
    evaluation = json.loads(run_cli("eval", run, "--split", "val", "--json")[1])
    (best,) = [row for row in read_metrics(run) if row["step"] == evaluation["step"]]
    trained = {name: best[f"val/{name}"] for name in METRICS}
    assert {name: evaluation["numbers"][name] for name in METRICS} == pytest.approx(trained, abs=1e-6)
    exported = json.loads(run_cli("export", "onnx", run, "--split", "val", "--json")[1])
    assert {name: exported["metrics"]["artefact"][name] for name in METRICS} == pytest.approx(trained, abs=1e-4)


def test_predicted_masks_have_the_size_of_their_images(of_each_task, run_cli, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a", (16, 16)), ("b", (48, 32))):
        Image.fromarray(np.full(size[::-1], 30, np.uint8)).save(folder / f"{name}.png")
    words = ["predict", folder, "--run", of_each_task["segment"], "--masks", tmp_path / "masks", "--draw"]
    code, out, error = run_cli(*words, tmp_path / "drawings", "--json")
    assert code == 0, error
    for line in out.splitlines():
        row = json.loads(line)
        name = Path(row["path"]).name
        mask = read_pixels(tmp_path / "masks" / name)
        assert mask.shape == (row["height"], row["width"]) == read_pixels(folder / name).shape
        shares = {("floor", "box")[k]: float((mask == k).mean()) for k in np.unique(mask)}
        assert row["shares"] == pytest.approx(shares)
        assert read_pixels(tmp_path / "drawings" / name).shape[:2] == mask.shape
    assert run_cli(*words, tmp_path / "drawings", "--json")[0] == 0  # its own files are replaced


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("segment", ["--score", "0.5"], "--score and --coco need a network that finds objects; segment finds none"),
        ("classify", ["--masks", "m"], "--masks needs a network with a class for each pixel; classify has none"),
        ("classify", ["--draw", "d"], "--draw needs a network that predicts boxes or masks; classify predicts none"),
    ],
)
def test_outputs_that_a_task_cannot_give_are_refused(task, options, words, of_each_task, run_cli, tmp_path):
    code, _, error = run_cli("predict", tmp_path, "--run", of_each_task[task], *options)
    assert code == 2
    assert words in error


def test_a_task_and_a_source_of_different_targets_are_refused(run_cli, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("task: segment\ndata: {source: digits}\nmodel: [{conv: 4}]\n")
    code, _, error = run_cli("check", config)
    assert code == 2
    assert "digits gives labels; segment learns masks" in error


def test_a_layer_is_taken_by_name_from_the_zoo(run_cli, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "task: {segment: merged1}\ndata: {source: {digit_scenes: {give: masks, train: 9, held_out: 3}}}\n"
        "model: unet\ntrain: {batch: 3, monitor: val/mean_iou}\n"
    )
    assert run_cli("check", "--no-decode", config)[0] == 0
    code, _, error = run_cli("check", config, "task={segment: merged9}")
    assert code == 2
    assert "no layer 'merged9' in the model" in error


def test_masks_and_drawings_need_two_folders(of_each_task, run_cli, tmp_path):
    words = ["--masks", tmp_path / "out", "--draw", tmp_path / "." / "out"]
    code, _, error = run_cli("predict", tmp_path, "--run", of_each_task["segment"], *words)
    assert code == 2
    assert "would replace each other's files; give two folders" in error


def test_a_segmentation_is_not_calibrated_and_reads_no_data(of_each_task, run_cli, monkeypatch):
    def read(*arguments):
        raise AssertionError

    monkeypatch.setattr("cnnrun.results.calibrate.prepare_eval_data", read)
    code, _, error = run_cli("calibrate", of_each_task["segment"])
    assert code == 2
    assert "nothing to calibrate" in error
