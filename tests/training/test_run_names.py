from __future__ import annotations

import os

import pytest

from cnnrun.base import atomic_files
from cnnrun.base.errors import CheckpointError, StorageError
from cnnrun.training import run_folder


def save_unfinished_run(folder) -> None:
    (folder / run_folder.CONFIG).write_text("x")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step-00000001")


def test_run_numbers_count_up_past_nine_and_past_gaps(tmp_path):
    made = [run_folder.create_run_folder(tmp_path, "a") for _ in range(11)]
    assert [folder.name for folder in made] == [str(n) for n in range(1, 12)]
    made[4].rmdir()
    assert run_folder.create_run_folder(tmp_path, "a").name == "12"


def test_unfinished_runs_have_a_config_and_no_result(tmp_path):
    a, b, c, d = (run_folder.create_run_folder(tmp_path, "a") for _ in range(4))
    for folder in (a, b, d):
        save_unfinished_run(folder)
    atomic_files.write_json(b / run_folder.RESULT, {})
    assert run_folder.unfinished_runs(tmp_path, "a") == [d, a]
    assert c not in run_folder.unfinished_runs(tmp_path, "a")
    assert run_folder.unfinished_runs(tmp_path, "none") == []


def test_the_newest_run_is_by_number_within_a_name_and_by_time_among_names(tmp_path):
    with pytest.raises(CheckpointError, match="no run with a checkpoint here"):
        run_folder.newest_run(tmp_path / "nothing")
    for place, (name, when) in enumerate((("a", 300), ("b", 500), ("a", 400))):
        folder = run_folder.create_run_folder(tmp_path, name)
        save_unfinished_run(folder)
        os.utime(folder / run_folder.CONFIG, (when, when))
        assert place < 3
    fresh = run_folder.create_run_folder(tmp_path, "b")  # a run without a checkpoint is not the newest
    (fresh / run_folder.CONFIG).write_text("x")
    assert run_folder.newest_run(tmp_path) == tmp_path / "b" / "1"
    assert run_folder.newest_run(tmp_path, "a") == tmp_path / "a" / "2"


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    atomic_files.write_text(tmp_path / "f", "one")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        atomic_files.write_text(tmp_path / "f", "two")
    assert (tmp_path / "f").read_text() == "one"
