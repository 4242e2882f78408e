"""Regression and multilabel classification through every command, from a table to the exported file."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image as Pil

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.data.index import index_source
from cnnrun.data.settings import Data
from cnnrun.experiment import assemble, checks, config_file, open_run, schema
from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code
from cnnrun.results import compare
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.export_run import export_run
from cnnrun.results.studies.train_run import train_run
from tests.support.forked_processes import run_on_ranks
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")
SIDE = 12
REGRESS = """
task: {{regress: {{angles: {{turn: 360}}, loss: {loss}}}}}
data:
  source: {{table: {{path: {table}, numbers: [level, turn, place]}}}}
  image: {{size: 12, channels: 1}}
  split: {{val: 0.2, test: 0.2}}
  cache: memory
model:
  - conv: {{out_channels: 8, norm: batch, activation: relu}}
  - max_pool
  - flatten
  - linear: {{out_features: 32, activation: relu}}
train: {{epochs: 8, batch: 16, optimizer: {{adamw: 0.01}}, monitor: val/gain}}
"""
LABELS = """
task: {{multilabel: {{loss: {loss}}}}}
data:
  source: {{table: {{path: {table}, labels: marks}}}}
  image: {{size: 12, channels: 1}}
  split: {{val: 0.2, test: 0.2}}
  cache: memory
model: [{{conv: {{out_channels: 8, norm: batch, activation: relu}}}}, max_pool, flatten]
train: {{epochs: 8, batch: 16, optimizer: {{adamw: 0.01}}, monitor: val/mAP}}
"""
LOSSES = ["mse", "mae", "{huber: 0.5}", "gaussian"]


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    """240 images with a dark half at an angle, a grey level, and marks in two corners, one or none."""
    root = tmp_path_factory.mktemp("numbers")
    draw, rows = np.random.default_rng(0), []
    across, down = np.meshgrid(np.arange(SIDE) - 5.5, np.arange(SIDE) - 5.5)
    for number in range(240):
        level, turn = draw.uniform(60, 200), draw.uniform(0, 360)
        side = across * np.cos(np.radians(turn)) + down * np.sin(np.radians(turn))
        pixels = np.where(side > 0, level, 20)
        marks = [name for name, corner in (("north", (0, 0)), ("south", (9, 9))) if draw.random() < 0.4]
        for name, corner in (("north", (0, 0)), ("south", (9, 9))):
            if name in marks:
                pixels[corner[0] : corner[0] + 3, corner[1] : corner[1] + 3] = 255
        Pil.fromarray(np.clip(pixels + draw.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)).save(
            root / f"{number}.png"
        )
        rows.append([f"{number}.png", f"{1000 * level:.2f}", f"{turn:.2f}", f"{level / 1e5:.7f}", ";".join(marks)])
    with (root / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "level", "turn", "place", "marks"], *rows])
    return root


def regression_experiment(image_folder: Path, *overrides: str, loss: str = "mse") -> schema.Experiment:
    text = REGRESS.format(table=image_folder / "t.csv", loss=loss)
    return config_file.parse_config(text, "numbers.yaml", ["name=numbers", *overrides])


def multilabel_experiment(image_folder: Path, *overrides: str, loss: str = "bce") -> schema.Experiment:
    return config_file.parse_config(
        LABELS.format(table=image_folder / "t.csv", loss=loss), "l.yaml", ["name=labels", *overrides]
    )


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory) -> Path:
    made = regression_experiment(image_folder, "train.epochs=25", loss="gaussian")
    return Path(train_run(made, tmp_path_factory.mktemp("runs"), CPU, resume=False)["run"])


@pytest.fixture(scope="module")
def multilabel_run(image_folder, tmp_path_factory) -> Path:
    made = multilabel_experiment(image_folder, "train.epochs=15")
    return Path(train_run(made, tmp_path_factory.mktemp("runs"), CPU, resume=False)["run"])


def copy_run(run: Path, root: Path) -> Path:
    return Path(shutil.copytree(run, root / "copy" / "1"))


# --- learning ---------------------------------------------------------------------------------------------------------


def test_regression_learns_targets_of_any_scale_and_angles(run):
    found = evaluate_run(run, Path("runs"), CPU, None)
    assert found["split"] == "test"
    rows = {row["target"]: row for row in found["tables"]["per_target"]}
    assert rows["level"]["gain"] > 0.6
    assert rows["turn"]["gain"] > 0.7
    assert rows["place"]["gain"] > 0.6
    assert rows["level"]["mae"] == pytest.approx(1e8 * rows["place"]["mae"], rel=0.5)
    for name, (low, high) in found["intervals"].items():
        assert low <= found["numbers"][name] <= high


def test_check_describes_the_numbers_of_train(image_folder):
    level, _, place = checks.check(regression_experiment(image_folder))["numbers"]
    assert list(level) == ["name", "mean", "std", "least", "most"]
    assert level["least"] == pytest.approx(1e8 * place["least"], rel=1e-4)
    assert 60_000 <= level["least"] < level["mean"] < level["most"] <= 200_000


@pytest.mark.parametrize("loss", [*LOSSES, "quantile"])
def test_every_regression_loss_learns(image_folder, tmp_path, loss):
    angle = [] if loss != "quantile" else ["task.regress.angles={}", "task.regress.columns=[level]"]
    text = REGRESS.format(table=image_folder / "t.csv", loss=loss)
    if angle:
        text = text.replace("angles: {turn: 360}", "columns: [level]")
    made = config_file.parse_config(text, "n.yaml", ["name=n"])
    result = train_run(made, tmp_path, CPU, resume=False)
    assert result["best"]["val/gain"] > 0.3


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
def test_every_multilabel_loss_learns_and_its_thresholds_are_stored(image_folder, tmp_path, loss):
    result = train_run(multilabel_experiment(image_folder, loss=loss), tmp_path, CPU, resume=False)
    assert result["best"]["val/mAP"] > 0.9
    given = open_run.open_trained(Path(result["run"]), tmp_path, CPU)[1]
    assert list(given.choices.class_thresholds) == ["north", "south"]
    again = evaluate_run(Path(result["run"]), tmp_path, CPU, "val")
    assert [row["threshold"] for row in again["tables"]["per_class"]] == list(given.choices.class_thresholds.values())


@pytest.mark.parametrize("kind", ["gaussian", "labels"])
def test_a_resumed_training_of_numbers_or_label_sets_equals_an_uninterrupted_one(image_folder, tmp_path, kind):
    made = (
        regression_experiment(image_folder, "train.epochs=3", loss="gaussian")
        if kind == "gaussian"
        else multilabel_experiment(image_folder, "train.epochs=3")
    )
    whole = train_run(made, tmp_path / "whole", CPU, resume=False)["run"]
    with stop_at(13):
        train_run(made, tmp_path / "cut", CPU, resume=False)
    part = train_run(made, tmp_path / "cut", CPU, resume=True)["run"]
    assert digest(Path(whole)) == digest(Path(part))


@pytest.mark.parametrize("make", [regression_experiment, multilabel_experiment])
def test_metrics_on_two_ranks_equal_one_process(image_folder, tmp_path, make):
    made = make(image_folder, "train.epochs=1")
    run = train_run(made, tmp_path, CPU, resume=False)["run"]
    alone = evaluate_run(Path(run), tmp_path, CPU, None)
    for rank in run_on_ranks(2, lambda _: evaluate_run(Path(run), tmp_path, CPU, None)):
        assert rank["numbers"] == alone["numbers"]


def test_label_sets_are_learned_with_mixup_and_micro_batches(image_folder, tmp_path):
    made = multilabel_experiment(image_folder, "data.augment={mixup: 0.4}", "train.accumulate=2", "train.epochs=2")
    assert train_run(made, tmp_path, CPU, resume=False)["best"]["val/mAP"] > 0.3


# --- used -------------------------------------------------------------------------------------------------------------


def test_predict_prints_values_by_target_name(run, image_folder, run_cli):
    code, out, _ = run_cli("predict", image_folder / "0.png", image_folder / "1.png", "--run", run, "--json")
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert list(first["values"]) == list(first["deviations"]) == ["level", "turn", "place"]
    assert first["values"] != second["values"]
    assert 0 <= first["values"]["turn"] < 360
    code, out, _ = run_cli("predict", image_folder / "0.png", "--run", run, "--csv")
    (row,) = csv.DictReader(io.StringIO(out))
    assert float(row["level"]) == pytest.approx(first["values"]["level"])
    assert float(row["turn deviation"]) == pytest.approx(first["deviations"]["turn"])
    code, out, _ = run_cli("predict", image_folder / "0.png", "--run", run)
    assert "level " in out
    assert "place deviation " in out


def test_predict_prints_labels_that_reach_their_threshold(multilabel_run, image_folder, run_cli):
    true = {row["path"]: row["marks"] for row in csv.DictReader((image_folder / "t.csv").read_text().splitlines())}
    code, out, _ = run_cli("predict", *(image_folder / f"{n}.png" for n in range(40)), "--run", multilabel_run, "--csv")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    names = ["north", "south"]
    columns = [f"{what} {name}" for what in ("present", "probability") for name in names]
    assert list(rows[0]) == ["path", *columns, "error"]
    told = [";".join(name for name in names if row[f"present {name}"] == "1") for row in rows]
    assert sum(one == true[Path(row["path"]).name] for one, row in zip(told, rows, strict=True)) >= 36
    assert " none" in run_cli("predict", *(image_folder / f"{n}.png" for n in range(40)), "--run", multilabel_run)[1]


@pytest.mark.parametrize("form", [Onnx(), Code()], ids=["onnx", "code"])
@pytest.mark.parametrize("loss", [*LOSSES, "quantile", "labels"])
def test_an_exported_regression_or_multilabel_model_equals_the_network(image_folder, tmp_path, form, loss):
    if loss == "labels":
        made = multilabel_experiment(image_folder, "train.epochs=2")
    elif loss == "quantile":
        text = REGRESS.format(table=image_folder / "t.csv", loss="{quantile: [0.1, 0.5, 0.9]}")
        made = config_file.parse_config(
            text.replace("angles: {turn: 360}", "columns: [place, level]"), "n", ["name=n", "train.epochs=2"]
        )
    else:
        made = regression_experiment(image_folder, "train.epochs=2", loss=loss)
    run = Path(train_run(made, tmp_path, CPU, resume=False)["run"])
    report = export_run(form, run, tmp_path, None, None)
    assert report["passed"]
    assert report["samples_compared"] >= 64


def test_an_exported_file_describes_its_outputs(run, multilabel_run, tmp_path):
    path = Path(export_run(Onnx(), run, tmp_path, None, tmp_path / "n.onnx")["path"])
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(said["values"]) == ["level", "turn", "place"]
    assert json.loads(said["angles"]) == {"turn": 360.0}
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    values, deviations = session.run(None, {"pixels": np.full((3, SIDE, SIDE, 1), 90, np.uint8)})
    assert values.shape == deviations.shape == (3, 3)
    path = Path(export_run(Onnx(), multilabel_run, tmp_path, None, tmp_path / "l.onnx")["path"])
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    given = open_run.open_trained(multilabel_run, tmp_path, CPU)[1]
    assert json.loads(said["thresholds"]) == given.choices.class_thresholds


def test_check_and_data_check_accept_numbers_and_label_sets(image_folder, tmp_path, run_cli):
    path = tmp_path / "n.yaml"
    path.write_text(REGRESS.format(table=image_folder / "t.csv", loss="mse"))
    code, out, _ = run_cli("check", path)
    assert code == 0
    assert "n: no problems. level, turn, place; images of 1x12x12" in out
    code, out, err = run_cli("data", "check", path)
    assert code == 0, err
    code, out, err = run_cli("data", "show", path, "--out", tmp_path / "sheet.png")
    assert code == 0, err
    path.write_text(LABELS.format(table=image_folder / "t.csv", loss="bce"))
    code, out, err = run_cli("data", "check", path)
    assert code == 0, err
    assert "north" in out


# --- refused ----------------------------------------------------------------------------------------------------------


def test_augmentations_that_change_an_angle_are_refused(image_folder, tmp_path):
    for setting in ("flip: both", "rotate: 5", "shear: 3", "policy: trivial_augment"):
        with pytest.raises(ConfigError, match="changes images but not their targets"):
            regression_experiment(image_folder, f"data.augment={{{setting}}}")
    regression_experiment(image_folder, "data.augment={flip: both}", "task.regress.turns=false")
    regression_experiment(image_folder, "data.augment={shift: 0.1, brightness: 0.2}")


def test_a_task_refuses_a_source_with_other_targets(image_folder):
    with pytest.raises(ConfigError, match="table gives numbers; multilabel learns label sets"):
        config_file.parse_config(
            LABELS.format(table=image_folder / "t.csv", loss="bce").replace("labels: marks", "numbers: level"),
            "l.yaml",
            [],
        )
    with pytest.raises(ConfigError, match="balanced needs one label per image"):
        multilabel_experiment(image_folder, "train.sampler=balanced")
    with pytest.raises(ConfigError, match="no number 'leevl'; did you mean 'level'"):
        assemble.build_checked_network(
            made := regression_experiment(image_folder, "task.regress.columns=[leevl, turn]"), facts_of(made)
        )


def test_regressions_of_different_columns_are_not_compared(image_folder, run, tmp_path):
    other = train_run(
        regression_experiment(image_folder, "task.regress.columns=[level, turn]"), tmp_path, CPU, resume=False
    )["run"]
    (pair,) = compare.compare_runs([run, Path(other)], tmp_path, CPU, None)["pairs"]
    assert pair["tests"] == []
    assert "measure different things" in pair["unpaired"]


def facts_of(made: schema.Experiment):
    return assemble.prepare_dataset(made).facts


def test_an_image_with_two_different_targets_is_refused(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "twice")
    rows = list(csv.reader((tmp_path / "twice" / "t.csv").read_text().splitlines()))
    shutil.copy(tmp_path / "twice" / "0.png", tmp_path / "twice" / "again.png")
    rows.append(["again.png", "5", *rows[1][2:]])
    with (tmp_path / "twice" / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(DataError, match="under more than one label"):
        assemble.prepare_dataset(regression_experiment(tmp_path / "twice"))


def test_boxes_are_converted_to_counts_and_presence(tmp_path):
    def read_scenes(what: str):
        return index_source(
            Data.model_validate({"source": {"digit_scenes": {"train": 60, "held_out": 20, "give": what}}})
        )

    boxes, counts, presence = map(read_scenes, ("boxes", "counts", "presence"))
    objects = boxes.contents.splits["train"].objects.pad()["objects"]
    expected = torch.stack([(objects == k).sum(1) for k in range(10)], 1).float()
    assert torch.equal(counts.contents.splits["train"].targets["numbers"], expected)
    assert torch.equal(presence.contents.splits["train"].targets["present"], expected > 0)
    assert counts.contents.number_names == presence.contents.classes == tuple("0123456789")
    assert [number.name for number in counts.numbers()] == list("0123456789")


def test_counts_of_boxes_are_learned_and_evaluated(tmp_path):
    text = """
    task: regress
    data: {source: {digit_scenes: {train: 120, held_out: 30, give: counts}}}
    model: [{conv: {out_channels: 4, stride: 4, norm: batch, activation: relu}}, global_avg_pool]
    train: {epochs: 1, batch: 16, monitor: val/mae}
    """
    run = train_run(config_file.parse_config(text, "c.yaml", ["name=c"]), tmp_path, CPU, resume=False)["run"]
    found = evaluate_run(Path(run), tmp_path, CPU, None)
    assert len(found["tables"]["per_target"]) == 10
