"""Detection through every command: train, resume, evaluate, export and draw."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image as Pil

from cnnrun.base.errors import ConfigError
from cnnrun.experiment import assemble, config_file, open_run, schema
from cnnrun.experiment.checks import facts_before_decoding
from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.export_run import export_run
from cnnrun.results.predict import choose_thresholds
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.evaluation import measure_split
from tests.support.forked_processes import run_on_ranks
from tests.support.images import save_picture
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")
SCENES = """
task: {detect: {levels: [p3, p4], channels: 16, depth: 1, most: 30}}
data:
  source: {digit_scenes: {train: 160, held_out: 70, most: 4}}
  augment: {shift: 0.05, scale: 0.1}
model:
  - conv: {out_channels: 8, stride: 2, norm: batch, activation: silu}
  - conv: {out_channels: 16, stride: 2, norm: batch, activation: silu}
  - conv: {name: c3, out_channels: 24, stride: 2, norm: batch, activation: silu}
  - conv: {name: p4, out_channels: 16, stride: 2, norm: batch, activation: silu}
  - fpn_up: {name: p3, lateral: c3, out_channels: 16}
train: {epochs: 3, batch: 16, optimizer: {adamw: 0.004}, monitor: val/AP50}
"""


def scenes_experiment(*overrides: str) -> schema.Experiment:
    return config_file.parse_config(SCENES, "scenes.yaml", ["name=scenes", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A detector that is trained long enough to detect something."""
    root = tmp_path_factory.mktemp("scenes")
    made = scenes_experiment("train.epochs=14", "data.source.digit_scenes.train=500", "train.ema={decay: 0.9}")
    return Path(train_run(made, root, CPU, resume=False)["run"])


@pytest.fixture
def scene(tmp_path, run) -> Path:
    """A scene as an image file of twice the size."""
    pixels = scenes_experiment().data.source.read().splits["test"].images[3, :, :, 0]
    path = tmp_path / "pictures" / "12.png"
    path.parent.mkdir()
    Pil.fromarray(pixels).resize((192, 192), Pil.Resampling.BILINEAR).save(path)
    return path


def test_a_detector_learns_and_eval_equals_the_training_metrics(run):
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    best = max(json.loads(line)["val/AP50"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert best > 0.15
    assert {"val/AP", "val/AP75", "val/AR100", "val/loss"} <= set(last)
    result = evaluate_run(run, run.parent.parent, CPU, "val")
    assert result["numbers"]["AP50"] == best  # what training said of its best checkpoint
    assert len(result["tables"]["per_class"]) == 10
    assert len(result["tables"]["precision_recall"]) == 1010


@pytest.mark.parametrize("augment", ["{shift: 0.1, flip: both}", "{rotate: 9, scale: 0.2, mosaic: 0.5}"])
def test_a_resumed_training_of_a_detector_equals_an_uninterrupted_one(tmp_path, augment):
    made = scenes_experiment(
        f"data.augment={augment}", "train.ema={decay: 0.9}", "train.epochs=2", "train.accumulate=2"
    )
    train_run(made, tmp_path / "whole", CPU, resume=True)
    with stop_at(7):
        train_run(made, tmp_path / "cut", CPU, resume=True)
    train_run(made, tmp_path / "cut", CPU, resume=True)
    assert digest(tmp_path / "cut" / "scenes" / "1") == digest(tmp_path / "whole" / "scenes" / "1")


def test_evaluation_on_two_ranks_equals_one_process(run):
    _, given = open_run.open_trained(run, run.parent.parent, CPU)
    data = assemble.prepare_dataset(scenes_experiment())

    def measure(rank=None):
        from cnnrun.base.ranks import join_ranks

        with join_ranks(CPU, 60) as ranks:
            return measure_split(given.to_measure(), data.splits["val"], 16, ranks).metrics

    alone = measure()
    assert alone["AP50"] > 0
    assert all(each == alone for each in run_on_ranks(2, measure))


@pytest.mark.parametrize("form", [Onnx(), Code()], ids=lambda form: form.kind)
def test_an_exported_detector_has_the_same_boxes_and_metrics(run, tmp_path, form):
    path = tmp_path / f"model{form.suffix}"
    report = export_run(form, run, run.parent.parent, None, path)
    assert report["passed"]
    assert report["samples_compared"] == 64
    for name, value in report["metrics"]["network"].items():
        assert report["metrics"]["artefact"][name] == pytest.approx(value, abs=1e-4)
    assert report["metrics"]["artefact"]["AP50"] > 0.1


def test_the_onnx_graph_includes_non_maximum_suppression(run, tmp_path):
    path = tmp_path / "model.onnx"
    export_run(Onnx(), run, run.parent.parent, None, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [out.name for out in session.get_outputs()] == ["boxes", "scores", "labels"]
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list("0123456789")
    assert "pixels of the input" in about["boxes"]
    for batch in (1, 3):
        boxes, scores, labels = session.run(None, {"pixels": np.zeros((batch, 96, 96, 1), np.uint8)})
        assert boxes.shape == (batch, 30, 4)
        assert scores.shape == labels.shape == (batch, 30)


def test_an_export_with_different_boxes_is_refused(run, tmp_path, monkeypatch):
    from cnnrun import export as exporting
    from cnnrun.base.errors import ParityError

    real = Onnx.reload

    def shifted(self, path):
        inner = real(self, path)
        return lambda pixels: [inner(pixels)[0] + 0.5, *inner(pixels)[1:]]

    monkeypatch.setattr(exporting.onnx.Onnx, "reload", shifted)
    with pytest.raises(ParityError, match="overlaps the network's"):
        export_run(Onnx(), run, run.parent.parent, None, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_predict_gives_boxes_in_pixels_of_the_original_image(run, scene, tmp_path, run_cli):
    code, out, _ = run_cli("predict", scene, "--run", run, "--json", "--score", "0.05")
    assert code == 0
    row = json.loads(out)
    assert (row["height"], row["width"]) == (192, 192)
    assert row["objects"]
    _, given = open_run.open_trained(run, run.parent.parent, CPU)
    with Pil.open(scene) as picture:
        pixels = np.asarray(picture.resize((96, 96), Pil.Resampling.BILINEAR))
    results = given.results(torch.from_numpy(pixels.copy())[None, None].float())
    x1, y1, x2, y2 = (2 * results["boxes"][0, 0]).tolist()
    assert row["objects"][0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
    assert row["objects"][0]["score"] == pytest.approx(float(results["scores"][0, 0]), abs=1e-5)

    strict = json.loads(run_cli("predict", scene, "--run", run, "--json", "--score", "0.99")[1])
    assert strict["objects"] == []
    label = row["objects"][0]["label"]
    one = json.loads(
        run_cli("predict", scene, "--run", run, "--json", "--score", "0.99", "--score", f"{label}=0.05")[1]
    )
    assert {each["label"] for each in one["objects"]} == {label}


def test_predict_writes_coco_results_and_drawings(run, scene, tmp_path, run_cli):
    coco, drawn = tmp_path / "results.json", tmp_path / "drawn"
    code, out, _ = run_cli(
        "predict", scene.parent, "--run", run, "--score", "0.05", "--coco", coco, "--draw", drawn, "--csv"
    )
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    found = json.loads(coco.read_text())
    assert len(rows) == len(found) > 0
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    assert found[0]["image_id"] == 12
    with Pil.open(drawn / "12.png") as picture:
        assert picture.size == (192, 192)
    from pycocotools.coco import COCO

    truth = COCO()
    truth.dataset = {"images": [{"id": 12}], "categories": [{"id": k} for k in range(1, 11)], "annotations": []}
    truth.createIndex()
    assert len(truth.loadRes(str(coco)).anns) == len(found)
    assert run_cli("predict", scene, "--run", run, "--coco", coco)[0] == 2  # never written over
    code, _, err = run_cli("predict", scene, "--run", run, "--score", "dog=0.4")
    assert code == 2
    assert "--score dog=0.4: give a number below 1, or class=number (classes: 0, 1" in err
    text = run_cli("predict", scene, "--run", run, "--score", "0.05")[1]
    assert " at " in text


def test_a_score_threshold_of_one_class_leaves_the_others(run):
    _, given = open_run.open_trained(run, run.parent.parent, CPU)
    task = given.task.spec.model_copy(update={"score": {"1": 0.8}}).bind(given.facts)
    thresholds = task.predicting.thresholds(given.choices)
    few = choose_thresholds(thresholds, ["2=0.6"])
    assert (few["1"], few["2"], few["3"]) == (0.8, 0.6, 0.3)
    all_but = choose_thresholds(thresholds, ["2=0.6", "0.1"])
    assert (all_but["1"], all_but["2"]) == (0.1, 0.6)


def test_a_csv_of_boxes_is_complete_if_the_first_image_is_unreadable(run, scene, run_cli):
    (scene.parent / "00.png").write_bytes(b"no picture")
    code, out, _ = run_cli("predict", scene.parent, "--run", run, "--csv", "--score", "0.05")
    assert code == 8
    first, *rest = csv.DictReader(io.StringIO(out))
    assert "not an image" in first["error"]
    assert rest
    assert all(row["label"] and row["width"] for row in rest)
    empty = list(csv.DictReader(io.StringIO(run_cli("predict", scene, "--run", run, "--csv", "--score", "0.99")[1])))
    assert [(row["path"], row["label"]) for row in empty] == [(str(scene), "")]


def test_an_unusable_output_path_is_refused_before_anything_is_predicted(run, scene, tmp_path, run_cli):
    code, out, err = run_cli("predict", scene, "--run", run, "--coco", tmp_path / "none" / "c.json")
    assert (code, out) == (2, "")
    assert "no such folder" in err
    code, out, err = run_cli("predict", scene, "--run", run, "--draw", scene.parent)
    assert (code, out) == (2, "")
    assert "holds PNG files that cnnrun did not write" in err


def test_a_detector_with_frozen_layers_trains_on_cached_features(tmp_path):
    made = scenes_experiment("train.freeze=c3", "task.detect.levels=[p4]", "data.augment={}", "train.epochs=1")
    nodes = [node for node in made.model.layers if node.name != "p3"]
    made = made.model_copy(update={"model": made.model.model_copy(update={"layers": nodes})})
    assert train_run(made, tmp_path, CPU, resume=False)["best"]


def test_box_options_are_refused_for_other_tasks(trained_run, tmp_path, run_cli):
    picture = save_picture(tmp_path / "a.png", size=(8, 8), mode="L")
    objects = "--score and --coco need a network that finds objects; classify finds none"
    for option, words in (
        (["--score", "0.5"], objects),
        (["--draw", tmp_path / "d"], "--draw needs a network that predicts boxes or masks; classify predicts none"),
        (["--coco", tmp_path / "c.json"], objects),
    ):
        code, out, err = run_cli("predict", picture, "--run", trained_run, *option)
        assert (code, out) == (2, "")
        assert words in err
        assert not (tmp_path / "d").exists()


def test_explain_draws_detections_and_the_assignment(run, tmp_path, run_cli, trained_run):
    code, out, _ = run_cli(
        "explain", "detections", run, "--out", tmp_path / "found.png", "--images", "3", "--runs", tmp_path
    )
    assert code == 0
    assert "Targets, left, and the network's detections, right." in out
    with Pil.open(tmp_path / "found.png") as picture:
        assert picture.size[1] > 3 * 96
    code, out, _ = run_cli("explain", "assign", run, "--image", "3", "--out", tmp_path / "a.png", "--json")
    assert code == 0
    about = json.loads(out)
    assert sum(each["cells"] for each in about["objects"]) == len(about["cells"])
    assert {row["level"] for row in about["cells"]} <= {"p3", "p4"}
    for row in about["cells"]:
        x1, y1, x2, y2 = about["objects"][row["object"]]["box"]
        assert x1 - 8 <= row["x"] <= x2 + 8
        assert y1 - 8 <= row["y"] <= y2 + 8
    assert run_cli("explain", "assign", run, "--image", "999", "--out", tmp_path / "b.png")[0] == 2
    assert run_cli("explain", "assign", trained_run, "--out", tmp_path / "b.png")[0] == 2
    assert run_cli("explain", "detections", trained_run, "--out", tmp_path / "b.png")[0] == 2
    assert not (tmp_path / "b.png").exists()


def test_training_logs_images_of_detections(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run), size_guidance={"images": 0})
    board.Reload()
    assert len(board.Images("val/predictions")) == 14
    assert "train/images" in board.Tags()["images"]


@pytest.mark.parametrize(
    ("override", "where", "words"),
    [
        ("data.source=digits", "data.source", "digits gives labels; detect learns boxes"),
        ("task=classify", "data.source", "digit_scenes gives boxes; classify learns labels"),
        ("task.detect.levels=[p3, p5]", "task.detect", "no layer 'p5' in the model (known: c3, p4, p3)"),
        ("train.sampler=balanced", "train.sampler", "balanced needs one label per image"),
        ("data.augment.mixup=0.2", "data.augment.mixup", "detect cannot learn from mixed images"),
        ("task.detect.levels=[p3, p3]", "task.detect.levels", "names a layer twice"),
        ("task.detect.levels=[c3, p4]", "model", "levels that share towers need equal channels"),
        ("train.monitor=val/accuracy", "train.monitor", "'val/accuracy' is not measured"),
    ],
)
def test_invalid_detection_configs_are_refused_at_their_position(override, where, words):
    with pytest.raises(ConfigError) as refused:
        scenes_experiment(override)
    assert any(where in line and words in line for line in refused.value.lines), refused.value.lines


@pytest.mark.parametrize(("setting", "needed"), [("mosaic=0.5", "boxes or masks"), ("crop={safe: true}", "boxes")])
def test_box_augmentations_are_refused_without_boxes(setting, needed):
    from tests.support.configs import TINY

    with pytest.raises(ConfigError, match=f"needs {needed}, which classify does not have; remove the line"):
        config_file.parse_config(TINY, "tiny.yaml", [f"data.augment.{setting}"])


def test_summary_diagram_and_check_report_the_levels(tmp_path, run_cli):
    path = tmp_path / "scenes.yaml"
    path.write_text(SCENES)
    code, out, _ = run_cli("check", path)
    assert code == 0
    assert "p3: a cell every 8 pixels" in out
    assert "180x27" not in out
    assert "180x17" in run_cli("summary", path)[1]  # 144 + 36 cells; box, place, ten classes
    assert "fpn_up" in run_cli("diagram", path)[1]
    assert "pan_down:" in run_cli("zoo", "blocks")[1]
    assert run_cli("data", "show", path, "--out", tmp_path / "s.png")[0] == 0
    code, out, _ = run_cli("data", "check", path)
    assert code == 0


def test_a_shipped_block_can_be_replaced(tmp_path):
    own = SCENES + "blocks: {fpn_up: {parameters: {lateral, out_channels: 4}, layers: [{conv: $out_channels}]}}\n"
    made = config_file.parse_config(own, "c.yaml", ["name=c", "task.detect.towers=separate", "task.detect.levels=[p3]"])
    assert assemble.build_experiment_network(made, made.task.bind(facts_before_decoding(made))).levels[0].shape == (
        16,
        6,
        6,
    )
