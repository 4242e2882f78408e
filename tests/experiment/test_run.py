"""Hooks that callers add to a training do not change its result."""

from __future__ import annotations

from pathlib import Path

import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.experiment import run as experiment_run
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.run import RunHooks
from cnnrun.results.studies.train_run import train_run
from tests.support.configs import TINY
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")


def test_training_without_hooks_equals_that_of_the_command_line(tmp_path):
    config = parse_config(TINY, "tiny.yaml", ["name=tiny"])
    plain = experiment_run.train(config, tmp_path / "plain", CPU)
    watched = train_run(config, tmp_path / "watched", CPU, resume=False)
    assert plain["best"] == watched["best"]
    assert digest(Path(plain["run"])) == digest(Path(watched["run"]))


def test_a_result_is_recorded_once_and_not_when_resumed(tmp_path):
    recorded = []

    def record(experiment, folder, environment, result):
        assert isinstance(folder, Folder)
        recorded.append((experiment.name, folder.path, environment["device"], result["steps"]))

    config = parse_config(TINY, "tiny.yaml", ["name=tiny"])
    with stop_at(20):
        experiment_run.train(config, tmp_path, CPU, hooks=RunHooks(record=record))
    resumed = experiment_run.train(config, tmp_path, CPU, resume=True, hooks=RunHooks(record=record))
    assert Path(resumed["run"]).name == "1"
    assert recorded == []
    whole = experiment_run.train(config, tmp_path, CPU, hooks=RunHooks(record=record))
    assert [(name, path) for name, path, *_ in recorded] == [("tiny", Path(whole["run"]))]
    assert experiment_run.train(config, tmp_path, CPU, resume=True, hooks=RunHooks(record=record))["already_finished"]
    assert len(recorded) == 1


def test_epochs_of_few_steps_and_dropped_images_are_said(tmp_path, capfd):
    experiment_run.train(parse_config(TINY, "tiny.yaml", ["name=tiny", "train.batch=256"]), tmp_path, CPU)
    said = capfd.readouterr().err
    assert "train.batch: an epoch has 4 steps; with 32 instead of 256 it has 35" in said
    assert "train.drop_last: each epoch leaves out 127 of 1,151 images" in said
    experiment_run.train(parse_config(TINY, "tiny.yaml", ["name=tiny", "train.batch=32"]), tmp_path, CPU)
    assert "train.batch:" not in capfd.readouterr().err
