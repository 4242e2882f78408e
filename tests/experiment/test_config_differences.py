"""A config in place of a run means its newest run, and is refused where its results would differ from the run's."""

from __future__ import annotations

import os
import shutil

import pytest

from cnnrun.experiment.config_differences import list_differences
from tests.support.configs import TINY, tiny_experiment

COMMANDS = {
    "eval": ["eval", "CONFIG"],
    "export": ["export", "code", "CONFIG"],
    "compare": ["compare", "CONFIG", "CONFIG"],
    "explain": ["explain", "filters", "CONFIG"],
    "calibrate": ["calibrate", "CONFIG"],
    "report": ["report", "CONFIG"],
    "predict": ["predict", "picture.png", "--run", "CONFIG"],
}
CHANGES = {
    "source": (("source: digits", "source: {idx: elsewhere}"), "data.source"),
    "split": (("val: 0.2", "val: 0.3"), "data.split.val is 0.3, but 0.2 in runs/tiny/1"),
    "pictures": (("data: {", "data: {image: {background: 0}, "), "data.image.background"),
    "model": (("out_channels: 4", "out_channels: 8"), "out_channels is 8, but 4 in runs/tiny/1"),
    "activation": (("batch, activation: relu", "batch, activation: gelu"), "gelu is given, but not set in runs/tiny/1"),
    "task": (("task: classify", "task: {classify: {top_k: 3}}"), "task.classify.top_k"),
}


@pytest.fixture
def run(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run.parent, "runs/tiny")
    return tmp_path / "runs" / "tiny" / "1"


def words(command, config="tiny.yaml"):
    return [config if word == "CONFIG" else word for word in COMMANDS[command]]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_config_whose_results_would_differ_from_its_run_is_refused(run, run_cli, command, change):
    (old, new), told = CHANGES[change]
    assert old in TINY
    (run.parents[2] / "tiny.yaml").write_text(TINY.replace(old, new))
    code, out, err = run_cli(*words(command))
    assert (code, out) == (2, ""), err
    assert told in err
    assert "train this config, or give the run: runs/tiny/1" in err


@pytest.mark.parametrize("command", ["eval", "explain"])
def test_a_changed_training_setting_is_reported(run, run_cli, command):
    text = TINY.replace("data: {", "data: {augment: {flip: horizontal}, ").replace("epochs: 2", "epochs: 12")
    (run.parents[2] / "tiny.yaml").write_text(f"seed: 3\n{text}".replace("batch: 64", "batch: 32"))
    code, _, err = run_cli(*words(command))
    assert code == 0, err
    assert "using runs/tiny/1" in err
    for setting in ("seed is 3", "data.augment.flip", "train.batch is 32, but 64 in runs/tiny/1"):
        assert f"tiny.yaml: {setting}" in err
    assert "train.epochs" not in err
    assert err.count("the run's network is used as it was trained") == 3


def test_an_equal_config_only_names_the_run_it_uses(run, run_cli):
    (run.parents[2] / "tiny.yaml").write_text(TINY.replace("epochs: 2", "epochs: 12"))
    code, _, err = run_cli("eval", "tiny.yaml")
    assert (code, err) == (0, "using runs/tiny/1\n")
    (run / "result.json").unlink()
    assert run_cli("eval", "tiny.yaml")[2] == "using runs/tiny/1, which is unfinished\n"
    assert run_cli("eval", run)[2] == ""


def test_the_newest_run_has_the_largest_number(run, run_cli):
    (run.parents[2] / "tiny.yaml").write_text(TINY.replace("epochs: 2", "epochs: 12"))
    for number in ("9", "10"):
        shutil.copytree(run, run.parent / number)
    os.utime(run.parent / "9" / "config.yaml", (4e9, 4e9))  # copying a run may change its times
    assert "using runs/tiny/10\n" in run_cli("eval", "tiny.yaml")[2]
    assert "using runs/tiny/10\n" in run_cli("eval")[2]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model[0].conv.activation=relu", "model[0].conv.activation=gelu"),
        ("model[1]=global_avg_pool", "model[1]=global_max_pool"),
        ("train.sampler=uniform", "train.sampler=balanced"),
        ("data.augment={}", "data.augment={flip: horizontal}"),
    ],
)
def test_kinds_without_settings_differ(first, second):
    one, other = tiny_experiment(first), tiny_experiment(second)
    assert list_differences(one, other)
    assert not list_differences(one, tiny_experiment(first))


def test_layers_have_one_name_with_and_without_weights(tmp_path):
    layers = "[{conv: {out_channels: 4}}, flatten, {linear: 3}]"
    bare = tiny_experiment(f"model={layers}")
    loaded = tiny_experiment(f"model={{weights: {tmp_path}/w.safetensors, layers: {layers}}}")
    keys = [key for key, *_ in list_differences(bare, loaded)]
    assert keys == ["model.weights"]
