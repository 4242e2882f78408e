"""Cross-validation: every image is in one fold, as `data split` divides; runs are resumed; the interval."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.data.index import index_source
from cnnrun.experiment.assemble import prepare_dataset
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.schema import Experiment
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.studies.folds import train_folds
from cnnrun.results.studies.train_run import train_run
from cnnrun.results.studies.training_series import RunSettings
from tests.support.configs import TINY, task_config, tiny_experiment
from tests.support.images import save_class_folders, save_picture, write_pictures
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")
FAST = ("train.epochs=1", "train.precision=float32")


def folder_config(root: Path, val: str, *more: str) -> Experiment:
    data = f"data={{source: {{folder: '{root}'}}, image: {{size: 8, channels: 1}}, split: {{val: {val}}}}}"
    return parse_config(TINY, "tiny.yaml", ["name=tiny", data, "train.batch=8", *more])


def val_names(experiment: Experiment) -> list[str]:
    val = prepare_dataset(experiment).splits["val"]
    return [val.sample_name(index) for index in range(len(val))]


def test_five_folds_cover_every_image_once_and_equal_those_of_a_split_table(tmp_path, run_cli):
    root = save_class_folders(tmp_path / "pets")
    folds = [val_names(folder_config(root, f"{{fold: {number}, of: 3}}")) for number in (1, 2, 3)]
    names = sorted(name for fold in folds for name in fold)
    assert names == sorted(set(names)) == sorted(str(path) for path in root.rglob("*.png"))
    (tmp_path / "c.yaml").write_text(folder_config(root, "0.2").to_yaml())
    table = tmp_path / "split.csv"
    run_cli("data", "split", tmp_path / "c.yaml", "--folds", 3, "--test", 0, "--out", table)
    with table.open() as file:
        rows = list(csv.DictReader(file))
    for number, fold in enumerate(folds, 1):
        in_table = {str(root / row["path"]) for row in rows if row[f"fold_{number}"] == "val"}
        assert in_table == set(fold)


def test_copies_of_an_image_are_in_one_fold(tmp_path):
    root = tmp_path / "pets"
    for name in ("cat", "dog"):
        for number in range(12):
            save_picture(root / name / f"{number}.png", seed=number % 7 + (100 if name == "dog" else 0))
    folds = [val_names(folder_config(root, f"{{fold: {number}, of: 4}}")) for number in range(1, 5)]
    names = [name for fold in folds for name in fold]
    assert sorted(names) == sorted(str(path) for path in root.rglob("*.png"))
    fold_of = {name: number for number, fold in enumerate(folds) for name in fold}
    for name in ("cat", "dog"):
        for number in range(5):
            assert fold_of[str(root / name / f"{number}.png")] == fold_of[str(root / name / f"{number + 7}.png")]


@pytest.mark.parametrize("kind", ["classify", "detect", "segment", "verify", "regress", "multilabel"])
def test_folds_of_every_task_cover_its_samples_once(kind, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    samples: list[str] = []
    for number in (1, 2):
        by = "by: label, " if kind == "verify" else ""
        text = task_config(kind, folder, tmp_path / "cache")
        split = f"data.split={{{by}val: {{fold: {number}, of: 2}}}}"
        index = index_source(parse_config(text, "c.yaml", [split]).data)
        split_of_source, rows = index.splits["val"]
        samples += [split_of_source.sample_name(row) for row in rows.tolist()]
        assert not set(rows.tolist()) & set(index.splits["train"][1].tolist())
    train = index.contents.splits["train"]
    assert sorted(samples) == sorted(train.sample_name(row) for row in range(len(train)))


def test_folds_equal_runs_trained_one_by_one_and_are_measured_by_their_last_checkpoint(tmp_path):
    settings = RunSettings(tmp_path / "runs", CPU)
    made = train_folds(tiny_experiment("train.epochs=2", "train.precision=float32"), 3, settings)
    values = []
    for row in made["runs"]:
        fold = f"data.split.val={{fold: {row['fold']}, of: 3}}"
        alone = tiny_experiment("train.epochs=2", "train.precision=float32", fold)
        run = Path(train_run(alone, tmp_path / "alone", CPU, resume=False)["run"])
        assert digest(run) == digest(Path(row["run"]))
        last = evaluate_run(run / "checkpoints" / "latest", tmp_path, CPU, "val")
        assert last["numbers"] == row["numbers"]
        values.append(last["numbers"]["accuracy"])
    summary = made["summary"]["accuracy"]
    scale = np.std(values, ddof=1) * (1 / 3 + 1 / 2) ** 0.5
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=scale)
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert (summary["from"], summary["to"]) == pytest.approx((max(low, 0), min(high, 1)))
    assert json.loads((tmp_path / "runs" / "tiny" / "folds-1-3.json").read_text())["runs"] == made["runs"]


def test_folds_interrupted_in_the_middle_are_resumed(tmp_path):
    whole = train_folds(tiny_experiment(*FAST), 3, RunSettings(tmp_path / "whole", CPU))
    with stop_at(7):  # the second fold's seventh step: the first fold is finished
        train_run(tiny_experiment(*FAST, "data.split.val={fold: 1, of: 3}"), tmp_path / "none", CPU, resume=False)
    train_run(tiny_experiment(*FAST, "data.split.val={fold: 1, of: 3}"), tmp_path / "cut", CPU, resume=False)
    with stop_at(7):
        train_run(tiny_experiment(*FAST, "data.split.val={fold: 2, of: 3}"), tmp_path / "cut", CPU, resume=False)
    part = train_folds(tiny_experiment(*FAST), 3, RunSettings(tmp_path / "cut", CPU, resume=True))
    assert [Path(row["run"]).name for row in part["runs"]] == ["1", "2", "3"]
    for one, other in zip(whole["runs"], part["runs"], strict=True):
        assert digest(Path(one["run"])) == digest(Path(other["run"]))
    assert part["summary"] == whole["summary"]


def test_what_cannot_be_cross_validated_is_refused(tmp_path, run_cli):
    with pytest.raises(ConfigError, match=r"train\.early_stop would let each fold choose"):
        train_folds(tiny_experiment("train.early_stop={patience: 2}"), 3, RunSettings(tmp_path, CPU))
    with pytest.raises(ConfigError, match=r"data\.split\.val names a fold itself"):
        train_folds(tiny_experiment("data.split.val={fold: 1, of: 5}"), 3, RunSettings(tmp_path, CPU))
    few = save_class_folders(tmp_path / "pets")
    with pytest.raises(DataError, match="are too few for 99 folds"):
        index_source(folder_config(few, "{fold: 1, of: 99}").data)
    with pytest.raises(ConfigError, match="there is no fold 4 of 3"):
        folder_config(few, "{fold: 4, of: 3}")
    with pytest.raises(ConfigError, match=r"data\.split\.val\.of: this setting is required"):
        folder_config(few, "{fold: 4}")
    for name in ("train", "val"):
        save_class_folders(tmp_path / "divided" / name)
    with pytest.raises(DataError, match="the source has a val split of its own"):
        index_source(folder_config(tmp_path / "divided", "{fold: 1, of: 3}").data)
    (tmp_path / "tiny.yaml").write_text(TINY)
    code, _, errors = run_cli("train", tmp_path / "tiny.yaml", "--folds", 3, "--seeds", 2)
    assert code == 2
    assert "cannot be combined" in errors
    code, out, _ = run_cli("train", tmp_path / "tiny.yaml", "--folds", 2, "train.epochs=1", "--no-report")
    assert code == 0
    assert "2 folds, measured each on its own fold by the last checkpoint" in out
