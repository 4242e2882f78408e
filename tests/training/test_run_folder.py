"""Run folders that are moved or changed during training, how trainings end, and commands that are repeated."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from cnnrun.base import atomic_files, locks
from cnnrun.base.errors import CheckpointError, InterruptionError, ResourceError, StorageError
from cnnrun.experiment import schema
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints, run_folder
from cnnrun.training.learner import Learner
from tests.support.configs import tiny_experiment
from tests.support.forked_processes import fork, outcome
from tests.support.interrupted_trainings import digest
from tests.support.supervised_commands import PLACES, WRITING, run_chain

CPU = torch.device("cpu")


def three_epochs(*overrides: str) -> schema.Experiment:
    return tiny_experiment("train.epochs=3", *overrides)


def run_at_step(monkeypatch, step: int, action) -> None:
    """Call `action` at the start of a step."""
    real = Learner.backward

    def backward(self, batch, number):
        if number == step:
            action()
        return real(self, batch, number)

    monkeypatch.setattr(Learner, "backward", backward)


@pytest.mark.parametrize("step", [3, 20])
def test_a_moved_run_folder_ends_the_training_after_saving_in_it(tmp_path, monkeypatch, step):
    """Regression: the folder was created again, half of the run was in each, and the exit code was 0."""
    run, there = tmp_path / "runs" / "tiny" / "1", tmp_path / "there"
    with monkeypatch.context() as patched:
        run_at_step(patched, step, lambda: run.rename(there))
        with pytest.raises(
            StorageError, match="was moved or deleted while the run was training; step .* is saved in the moved folder"
        ):
            train_run(three_epochs(), tmp_path / "runs", CPU, resume=False)
    assert not run.exists()
    saved = checkpoints.load_newest(there / "checkpoints", "latest", pytest.fail)
    assert saved is not None
    there.rename(run)
    again = train_run(three_epochs(), tmp_path / "runs", CPU, resume=True)
    assert again["run"] == str(run)
    whole = train_run(three_epochs(), tmp_path / "whole", CPU, resume=False)["run"]
    assert digest(run) == digest(Path(whole))


@pytest.mark.parametrize("what", ["", "checkpoints"])
def test_a_deleted_run_folder_ends_the_training_and_is_not_recreated(tmp_path, monkeypatch, what):
    run = tmp_path / "runs" / "tiny" / "1"
    with monkeypatch.context() as patched:
        run_at_step(patched, 20, lambda: shutil.rmtree(run / what))
        with pytest.raises(StorageError) as ended:
            train_run(three_epochs(), tmp_path / "runs", CPU, resume=False)
    assert ended.value.exit_code == 5
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_removing_or_replacing_the_metrics_file_ends_the_training(tmp_path, monkeypatch, how):
    path = tmp_path / "runs" / "tiny" / "1" / "metrics.jsonl"

    def take_away() -> None:
        path.unlink()
        if how == "replaced":
            path.write_text("")

    with monkeypatch.context() as patched:
        run_at_step(patched, 20, take_away)
        with pytest.raises(StorageError, match=r"metrics.jsonl: was removed or replaced"):
            train_run(three_epochs(), tmp_path / "runs", CPU, resume=False)


def test_a_signal_stops_validation_within_one_batch(tmp_path, monkeypatch):
    """Regression: SIGTERM in a long validation and SIGKILL six seconds later lost the whole epoch."""
    batches: list[int] = []
    real = Learner._evaluated_network

    def slow(self):
        forward = real(self)

        def counted(inputs):
            batches.append(len(inputs))
            if len(batches) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return forward(inputs)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "_evaluated_network", slow)
        with pytest.raises(
            InterruptionError, match="stopped while measuring val after step 17, which is saved"
        ) as left:
            train_run(three_epochs("train.batch=64"), tmp_path / "runs", CPU, resume=False)
    assert left.value.exit_code == 143
    assert len(batches) == 2
    run = Path(train_run(three_epochs(), tmp_path / "runs", CPU, resume=True)["run"])
    assert digest(run) == digest(Path(train_run(three_epochs(), tmp_path / "whole", CPU, resume=False)["run"]))


@pytest.mark.slow
@pytest.mark.parametrize("place", [*PLACES, *WRITING])
def test_a_command_killed_and_repeated_gives_the_uninterrupted_result(place):
    """Killed and repeated until it succeeds, then run once more: one result, the same bits, no leftover files."""
    found = run_chain(place, seed=1)
    assert not found.trouble, found
    assert found.kills


def test_resuming_a_finished_run_whose_data_changed_is_refused(tmp_path, picture_folder, run_cli):
    from tests.support.images import save_picture

    config = tmp_path / "pets.yaml"
    config.write_text(
        f"task: classify\ndata: {{source: {{folder: '{picture_folder}'}}, image: {{size: 8, channels: 1}}, "
        f"split: {{val: 0.25}}, cache_dir: '{tmp_path}/cache'}}\nmodel: [flatten]\ntrain: {{epochs: 1, batch: 4}}\n"
    )
    words = ("train", config, "--runs", tmp_path / "runs", "--no-report", "--resume")
    assert run_cli(*words)[0] == 0
    code, _, err = run_cli(*words)
    assert code == 0
    assert "is finished: there is nothing left to train" in err
    save_picture(picture_folder / "cat" / "another.png", seed=99)
    code, _, err = run_cli(*words)
    assert code == 3
    assert "the data has changed since then; train again without --resume" in err


# --- memory ----------------------------------------------------------------------------------------------------------

MESSAGES = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    ),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not execute a primitive"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("unable to mmap 1073741824 bytes from file </torch_1>: Cannot allocate memory (12)"),
    MemoryError("Unable to allocate 12.0 GiB for an array with shape (4000, 1000, 400) and data type float64"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", MESSAGES, ids=lambda error: str(error)[:30] or type(error).__name__)
@pytest.mark.parametrize("place", ["augmentation", "the network"])
def test_every_out_of_memory_error_is_recognized(tmp_path, monkeypatch, capfd, error, place):
    from cnnrun.data.training_batches import TrainingBatches

    def short(self_or_learner, *rest):
        batches = self_or_learner if place == "augmentation" else None
        parts = batches._micro_batch_count if batches is not None else len(rest[0].micro_sizes)
        if parts < 2:
            raise error
        return real(self_or_learner, *rest)

    target, name = (TrainingBatches, "_prepare") if place == "augmentation" else (Learner, "backward")
    real = getattr(target, name)
    expected = Path(
        train_run(three_epochs("train.accumulate=2", "train.epochs=1"), tmp_path / "set", CPU, False)["run"]
    )
    with monkeypatch.context() as patched:
        patched.setattr(target, name, short)
        run = Path(train_run(three_epochs("train.epochs=1"), tmp_path / "short", CPU, False)["run"])
    assert "memory ran out at step 0: continuing with 2 micro-batches" in capfd.readouterr().err
    assert digest(run) == digest(expected)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(errno.EIO, "I/O"), ValueError("x")]
)
def test_other_errors_are_not_treated_as_out_of_memory(error):
    from cnnrun.base.device import is_out_of_memory

    assert not is_out_of_memory(error)


@pytest.mark.parametrize("place", ["the network", "augmentation", "an own mistake"])
def test_progress_is_saved_before_an_error_ends_the_training(tmp_path, monkeypatch, place):
    """Regression: nothing was saved when the smallest micro-batch ran out of memory or a step failed otherwise."""
    from cnnrun.data.training_batches import TrainingBatches

    error = ZeroDivisionError("ours") if place == "an own mistake" else MemoryError("12 GiB")

    def failing(*arguments):
        step = arguments[1] if place == "augmentation" else arguments[2]
        if step >= 9:
            raise error
        return real(*arguments)

    target, name = (TrainingBatches, "_prepare") if place == "augmentation" else (Learner, "backward")
    real = getattr(target, name)
    monkeypatch.setattr("cnnrun.data.training_batches.AHEAD_BYTES", 1)
    with monkeypatch.context() as patched:
        patched.setattr(target, name, failing)
        with pytest.raises(ZeroDivisionError if place == "an own mistake" else ResourceError, match="ours|12 GiB"):
            train_run(three_epochs("train.accumulate=2"), tmp_path, CPU, resume=False)
    saved = checkpoints.load_newest(tmp_path / "tiny" / "1" / "checkpoints", "latest", pytest.fail)
    assert saved is not None
    assert saved.state["training"]["step"] == 9


def test_running_out_of_memory_in_the_optimizer_saves_no_partly_updated_weights(tmp_path, monkeypatch):
    real = Learner.update_weights

    def half(self, step, factor):
        if step == 20:
            with torch.no_grad():
                next(self.network.parameters()).zero_()
            raise MemoryError
        real(self, step, factor)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update_weights", half)
        with pytest.raises(ResourceError, match="in the optimizer's step 20.*continue from the last checkpoint"):
            train_run(three_epochs(), tmp_path / "runs", CPU, resume=False)
    run = Path(train_run(three_epochs(), tmp_path / "runs", CPU, resume=True)["run"])
    assert digest(run) == digest(Path(train_run(three_epochs(), tmp_path / "whole", CPU, resume=False)["run"]))


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_disk_without_locks_falls_back_to_a_lock_file(tmp_path, monkeypatch, capfd, number):
    import fcntl

    def none(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with run_folder.hold_run(tmp_path):
        assert (tmp_path / "lock.held").exists() or (tmp_path / "lock").exists()
        holder = outcome(*fork(lambda: _try_to_hold(tmp_path)))
        assert holder == "in use"
    assert outcome(*fork(lambda: _try_to_hold(tmp_path))) == "held"
    if number != errno.ENOSYS:  # filelock itself handles ENOSYS
        assert "this disk has no locks; the file lock.held is used instead" in capfd.readouterr().err


def _try_to_hold(run: Path) -> str:
    try:
        with run_folder.hold_run(run):
            return "held"
    except StorageError:
        return "in use"


def test_a_killed_process_no_longer_holds_its_run(tmp_path, monkeypatch):
    """With the locks of the system, and with the lock file used instead."""
    for number in (None, errno.ENOLCK):
        folder = tmp_path / str(number)
        folder.mkdir()

        def hold(folder=folder, number=number) -> None:
            if number:
                _without_locks(number)
            with run_folder.hold_run(folder):
                (folder / "held").touch()
                time.sleep(100)

        pid, pipe = fork(hold)
        while not (folder / "held").exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert outcome(pid, pipe) == -signal.SIGKILL

        def again(folder=folder, number=number) -> str:
            if number:
                _without_locks(number)
            return _try_to_hold(folder)

        assert outcome(*fork(again)) == "held"


def _without_locks(number: int) -> None:
    import fcntl

    def none(descriptor, operation):
        raise OSError(number, os.strerror(number))

    fcntl.flock = none


def test_a_disk_without_free_inodes_is_reported(tmp_path, monkeypatch):
    class Status:
        f_files, f_favail, f_bavail, f_frsize, f_blocks, f_bfree = 1000, 0, 10, 4096, 100, 10

    monkeypatch.setattr(os, "statvfs", lambda place: Status)
    line = atomic_files.describe_failure(tmp_path / "x", 10, OSError(errno.ENOSPC, "No space left on device"))
    assert "but no inodes: the disk can hold no more files" in line


def test_clearing_a_cache_leaves_a_valid_lock_to_a_waiting_process(tmp_path, monkeypatch):
    """Regression: clearing removed the lock that others waited for, and two processes built the cache at once."""
    from cnnrun.data import cache

    key = "0" * 32
    folder = tmp_path / key
    folder.mkdir()
    order: list[str] = []

    def waiting() -> str:
        def noted() -> None:
            (tmp_path / "waiting").touch()

        while True:
            folder.mkdir(exist_ok=True)
            try:
                with locks.hold_lock(folder / cache.LOCK_FILE, noted):
                    return "held" if (folder / cache.LOCK_FILE).stat().st_nlink else "held a lock that nobody sees"
            except FileNotFoundError:
                continue

    with locks.hold_lock(folder / cache.LOCK_FILE):
        pid, pipe = fork(waiting)
        while not (tmp_path / "waiting").exists():
            time.sleep(0.01)
        cache._remove_entry(folder)
        order.append("cleared")
    assert outcome(pid, pipe) == "held"


def test_temporary_files_of_killed_processes_are_removed_by_the_next_write(tmp_path, monkeypatch):
    def killed() -> None:
        monkeypatch.setattr(os, "rename", lambda *rest, **more: os.kill(os.getpid(), signal.SIGKILL))
        atomic_files.write_text(tmp_path / "g.txt", "one")

    for _ in range(2):
        assert outcome(*fork(killed)) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".g.txt.*.tmp"))) == 2
    being_written = tmp_path / atomic_files._temporary_name("g.txt")  # of a process that still runs
    being_written.touch()
    other = tmp_path / atomic_files._temporary_name("h.txt").replace(str(os.getpid()), "999999999")
    other.touch()
    atomic_files.write_text(tmp_path / "g.txt", "two")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "g.txt", being_written, other])


def test_a_damaged_result_is_written_again_after_it_is_removed(tmp_path):
    result = train_run(three_epochs(), tmp_path, CPU, resume=False)
    run = Path(result["run"])
    before = digest(run)
    (run / "result.json").write_text("[]")
    with pytest.raises(CheckpointError, match="remove this file and run the command again with --resume"):
        train_run(three_epochs(), tmp_path, CPU, resume=True)
    (run / "result.json").unlink()
    again = train_run(three_epochs(), tmp_path, CPU, resume=True)
    assert again["run"] == str(run)
    assert (again["steps"], again["best"]) == (result["steps"], result["best"])
    assert digest(run) == before
