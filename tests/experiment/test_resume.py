"""A resume that may be inexact reports each difference in a line; --strict-resume refuses it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from cnnrun.base.errors import CheckpointError
from cnnrun.experiment import config_file, preparation, schema
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import run_folder
from tests.support.configs import TINY, case_config
from tests.support.images import save_class_folders, save_picture, write_pictures
from tests.support.interrupted_trainings import stop_at

CPU = torch.device("cpu")


def folder_experiment(root: Path, *more: str) -> schema.Experiment:
    data = f"data={{source: {{folder: '{root}'}}, image: {{size: 8, channels: 1}}, split: {{val: 0.2}}}}"
    return config_file.parse_config(TINY, "tiny.yaml", ["name=tiny", data, "train.batch=8", *more])


@pytest.fixture
def pets(tmp_path) -> Path:
    return save_class_folders(tmp_path / "pets")


@pytest.fixture
def unfinished_run(pets, tmp_path) -> Path:
    """A run that was stopped at its second step."""
    with stop_at(1):
        train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=False)
    return tmp_path / "runs" / "tiny" / "1"


OTHER_ENVIRONMENTS = {
    "torch": lambda patched: patched.setattr(torch, "__version__", "9.9.9"),
    "threads": lambda patched: patched.setattr(torch, "get_num_threads", lambda: 7),
    "cpu_capability": lambda patched: patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80"),
    "pillow": lambda patched: patched.setattr(run_folder, "version", lambda name: "0.1"),
    "cnnrun": lambda patched: patched.setattr(run_folder, "__version__", "0.0"),
    "python": lambda patched: patched.setattr(run_folder.platform, "python_version", lambda: "2.7"),
    "ranks": lambda patched: patched.setattr(run_folder, "describe_environment", _of_five_ranks),
}
_environment = run_folder.describe_environment


def _of_five_ranks(device, ranks=1):
    return _environment(device, 5)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", OTHER_ENVIRONMENTS)
def test_a_different_environment_is_reported_and_refused_by_strict_resume(unfinished_run, pets, tmp_path, capfd, what):
    before = read_files(unfinished_run)
    with pytest.MonkeyPatch.context() as patched:
        OTHER_ENVIRONMENTS[what](patched)
        with pytest.raises(CheckpointError, match=f"{what} was .*, is ") as refused:
            train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume="strict")
        assert len(refused.value.lines) == 2
        assert read_files(unfinished_run) == before
        capfd.readouterr()
        train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=True)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"{what} was ")]
    assert line.endswith("the result may differ in its last bits from an uninterrupted run's")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.batch=6", "train.batch was 8, is 6"),
        ("seed=4", "seed was 0, is 4"),
        ("train.clip=1.0", "train.clip was not set, is 1.0"),
        ("train.accumulate=2", "train.accumulate was 1, is 2"),
        ("data.augment.shift=0.1", "data.augment.shift was 0.0, is 0.1"),
    ],
)
def test_different_settings_are_reported_and_refused_by_strict_resume(
    unfinished_run, pets, tmp_path, capfd, setting, said
):
    with pytest.raises(CheckpointError, match=f"is unfinished, but {said} now"):
        train_run(folder_experiment(pets, setting), tmp_path / "runs", CPU, resume="strict")
    assert not (tmp_path / "runs" / "tiny" / "2").exists()
    capfd.readouterr()
    made = train_run(folder_experiment(pets, setting), tmp_path / "runs", CPU, resume=True)
    assert made["run"].endswith("/2")
    assert f"is unfinished, but {said} now" in capfd.readouterr().err


@pytest.mark.parametrize("setting", ["data.workers=1", "data.prefetch=3", "train.keep=5", "train.timeout=7"])
def test_settings_that_cannot_change_the_result_do_not_prevent_strict_resume(unfinished_run, pets, tmp_path, setting):
    made = train_run(folder_experiment(pets, setting), tmp_path / "runs", CPU, resume="strict")
    assert made["run"] == str(unfinished_run)


def test_changed_data_is_refused_with_what_changed(unfinished_run, pets, tmp_path):
    def expect_refusal(*, said: str) -> None:
        with pytest.raises(CheckpointError, match=said) as error:
            train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=True)
        assert error.value.exit_code == 3
        assert len(error.value.lines) == 1

    kept = pets / "cat" / "3.png"
    data = kept.read_bytes()
    kept.unlink()
    expect_refusal(said="3.png is gone")
    save_picture(kept, seed=999, size=(8, 8))
    expect_refusal(said="3.png changed")
    kept.write_bytes(data)
    os.utime(kept, (1, 1))
    save_picture(pets / "elk" / "1.png", seed=555, size=(8, 8))
    expect_refusal(said="the classes were cat, dog, and are cat, dog, elk")


def test_a_changed_mask_is_named(tmp_path):
    folder = write_pictures(tmp_path / "pets")
    experiment = case_config(folder, tmp_path, (0, 1, "segment"))
    with stop_at(1):
        train_run(experiment, tmp_path / "runs", CPU, resume=False)
    mask = folder.parent / "masks" / "masks" / "3.png"
    os.utime(mask, (1, 1))
    with pytest.raises(CheckpointError, match=f"{mask} changed"):
        train_run(experiment, tmp_path / "runs", CPU, resume=True)


def test_the_environment_of_an_earlier_resume_is_remembered(unfinished_run, pets, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        OTHER_ENVIRONMENTS["cpu_capability"](patched)
        with stop_at(3):
            train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=True)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cpu_capability was Z80, is "):
            train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume="strict")


def test_strict_resume_checks_every_earlier_environment_not_only_the_last(unfinished_run, pets, tmp_path):
    """A run started here and resumed elsewhere cannot be resumed strictly there either."""
    with pytest.MonkeyPatch.context() as patched:
        OTHER_ENVIRONMENTS["threads"](patched)
        with stop_at(3):
            train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=True)
        with pytest.raises(CheckpointError, match="threads was 1, is 7"):
            train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume="strict")


def test_data_changed_before_the_first_checkpoint_is_refused(unfinished_run, pets, tmp_path):
    shutil.rmtree(unfinished_run / "checkpoints")
    save_picture(pets / "cat" / "3.png", seed=999, size=(8, 8))
    with pytest.raises(CheckpointError, match="3.png changed"):
        train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=True)


def test_a_run_finished_by_another_process_meanwhile_is_not_changed(unfinished_run, pets, tmp_path, monkeypatch):
    real = preparation.check_training_possible

    def finishing(*arguments):
        monkeypatch.setattr(preparation, "check_training_possible", real)
        train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=True)
        finished.update(read_files(unfinished_run))
        return real(*arguments)

    finished: dict[str, bytes] = {}
    monkeypatch.setattr(preparation, "check_training_possible", finishing)
    made = train_run(folder_experiment(pets), tmp_path / "runs", CPU, resume=True)
    assert made["run"] == str(unfinished_run)
    assert made["steps"] == 8
    assert read_files(unfinished_run) == finished


def test_strict_resume_on_the_command_line_exits_with_3(unfinished_run, pets, tmp_path, run_cli):
    path = tmp_path / "tiny.yaml"
    path.write_text(folder_experiment(pets).to_yaml())
    code, _, err = run_cli("train", path, "train.batch=6", "--strict-resume", "--runs", tmp_path / "runs")
    assert code == 3
    assert "is unfinished, but train.batch was 8, is 6 now\n" in err
    assert "--strict-resume needs an unfinished run with the same settings" in err
    code, out, _ = run_cli("train", path, "--strict-resume", "--runs", tmp_path / "runs")
    assert code == 0
    assert str(unfinished_run) in out
