"""After any disk error or kill, the last checkpoint exists, is undamaged and is found."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.base.errors import CheckpointError, StorageError, UserError
from cnnrun.experiment import config_file
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoint_pointers, checkpoints
from tests.support.configs import TINY
from tests.support.forked_processes import fork, outcome, wait_for
from tests.support.forked_python import run_python

CPU = torch.device("cpu")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EXDEV)


def parts(seed: int) -> checkpoints.CheckpointParts:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(50, generator=generator), "n": torch.tensor(seed)},
        "optimizer": {"momentum:w": torch.randn(50, generator=generator)},
        "ema": {"w": torch.randn(50, generator=generator)},
    }


def save(folder: Path, step: int, keep: int = 2) -> None:
    """Save as a training does; every third step becomes the best."""
    if not folder.exists():
        folder.mkdir(parents=True)
    checkpoints.save(Folder(folder), step, parts(step), {"training": {"step": step}})
    if step % 3 == 0:
        checkpoint_pointers.set_pointer(Folder(folder), "best", f"step-{step:08d}")
    checkpoints.prune(Folder(folder), keep)


def newest_step(folder: Path) -> int:
    """The step of the checkpoint that a resume would use; fails if any damage is reported."""
    found = checkpoints.load_newest(folder, "latest", pytest.fail)
    assert found is not None
    step = int(found.state["training"]["step"])
    assert torch.equal(found.parts["ema"]["w"], parts(step)["ema"]["w"])
    return step


@contextlib.contextmanager
def watch_writes(before: Callable[[str], None]) -> Iterator[None]:
    """Call `before` with the name of each call that changes the disk."""
    with pytest.MonkeyPatch.context() as patched:

        def watched(name: str, real):
            def call(*arguments, **settings):
                before(name)
                return real(*arguments, **settings)

            return call

        for name in ("fsync", "replace", "rename", "mkdir", "write"):
            patched.setattr(os, name, watched(name, getattr(os, name)))
        descriptor = os.open

        def opened_for(path, flags, *rest, **settings):
            if flags & (os.O_WRONLY | os.O_RDWR):
                before("open")
            return descriptor(path, flags, *rest, **settings)

        patched.setattr(os, "open", opened_for)

        yield


def kill_saves(tmp_path: Path, how: str) -> None:
    """Kill 250 saves and check after each that no checkpoint is lost."""
    folder, draw = tmp_path / "checkpoints", random.Random(5)
    start = time.perf_counter()
    for step in range(1, 9):
        save(tmp_path / "timed", step)
    save_seconds = (time.perf_counter() - start) / 8  # on this machine, with whatever else it does
    save(folder, 1)

    def saving(fatal: int | None) -> None:
        calls = itertools.count(1)

        def before(name: str) -> None:
            if next(calls) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        begin = newest_step(folder) + 1
        (tmp_path / "going").touch()
        with watch_writes(before):
            for step in itertools.count(begin):
                save(folder, step)

    reached, had_best = 1, False
    for _ in range(250):
        (tmp_path / "going").unlink(missing_ok=True)
        pid, pipe = fork(lambda: saving(draw.randint(1, 90) if how == "call" else None))
        draw.random()
        if how == "moment":
            wait_for((tmp_path / "going").exists)  # independent of how long the fork takes
            time.sleep(draw.uniform(0.0, 4 * save_seconds))
            os.kill(pid, signal.SIGKILL)
        assert outcome(pid, pipe) == -signal.SIGKILL
        for pointer in ("latest", "best"):
            name = checkpoint_pointers.read_pointer(folder, pointer)
            if pointer == "latest" or had_best or name:  # once a pointer exists, it always exists
                checkpoints.load(folder / str(name))
        had_best = had_best or (folder / "best").exists()
        assert newest_step(folder) >= reached
        reached = newest_step(folder)
        checkpoints.repair_killed_save(Folder(folder))
        assert not [path.name for path in folder.iterdir() if "tmp" in path.name]
        for path in checkpoints.list_checkpoints(folder):
            checkpoints.load(path)
    assert had_best
    assert reached > 100, reached  # the kills happened during saves


@pytest.mark.parametrize("how", ["moment", "call"])
def test_kills_while_saving_lose_no_checkpoint(tmp_path, how):
    """After 250 kills at random moments, or at random calls: no damage, `latest` exists, no temporary files stay."""
    call = f"kill_saves(Path({str(tmp_path)!r}), {how!r})"
    program = f"from pathlib import Path; from tests.training.test_disk_failures import kill_saves; {call}"
    # Not in this process, because a fork takes longer the more memory a process has.
    done = run_python(["-c", program], tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["kill", "error"])
def test_saving_the_same_step_again_never_loses_it(tmp_path, monkeypatch, how):
    monkeypatch.setattr(checkpoint_pointers.time, "sleep", lambda seconds: None)
    save(tmp_path / "count", 3, keep=1)
    calls = record_writes(lambda: save(tmp_path / "count", 3, keep=1))
    for place in range(len(calls)):
        folder, passed = tmp_path / str(place), itertools.count()
        save(folder, 3, keep=1)

        def fail(name: str, place=place, passed=passed) -> None:
            if next(passed) >= place:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.EIO, "Input/output error")

        def again(folder=folder, fail=fail) -> None:
            with watch_writes(fail):
                save(folder, 3, keep=1)

        if how == "kill":
            assert outcome(*fork(again)) == -signal.SIGKILL
        else:
            with contextlib.suppress(StorageError):
                again()
        checkpoints.repair_killed_save(Folder(folder))  # as the next start of the training does
        assert newest_step(folder) == 3, calls[place]
        assert not [path.name for path in folder.iterdir() if "tmp" in path.name]


def damaged_copies(newest_: Path, other: Path) -> Iterator[tuple[Path, bytes, str]]:
    """1,000 flipped bits, 200 truncations and 50 files of another checkpoint."""
    draw = random.Random(11)
    files = sorted(newest_.iterdir())
    sizes = [path.stat().st_size for path in files]
    for number in range(1000):
        path = draw.choices(files, sizes)[0] if number % 2 else draw.choice(files)
        data = bytearray(path.read_bytes())
        place = draw.randrange(len(data) * 8)
        data[place // 8] ^= 1 << (place % 8)
        yield path, bytes(data), f"bit {place} of {path.name}"
    for _ in range(200):
        path = draw.choice(files)
        yield path, path.read_bytes()[: draw.randrange(path.stat().st_size)], f"cut {path.name}"
    for number in range(50):
        path = files[number % len(files)]
        if path.read_bytes() == (other / path.name).read_bytes():
            continue
        yield path, (other / path.name).read_bytes(), f"{path.name} of another generation"


def test_any_damage_is_detected_before_a_tensor_is_used(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    latest = tmp_path / "step-00000003"
    found = 0
    for path, data, what in damaged_copies(latest, tmp_path / "step-00000001"):
        sound = path.read_bytes()
        path.write_bytes(data)
        said: list[str] = []
        loaded = checkpoints.load_newest(tmp_path, "latest", said.append)
        assert loaded is not None
        assert loaded.state == {"training": {"step": 2}}, what
        assert "skipping a damaged checkpoint" in said[0]
        path.write_bytes(sound)
        found += 1
    assert found == 1250
    assert newest_step(tmp_path) == 3


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    shutil.rmtree(tmp_path / "step-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="its manifest is of step 1: the folder was renamed"):
        checkpoints.load(tmp_path / "step-00000002")


def test_a_damaged_newest_checkpoint_is_set_aside_on_resume(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-00000004" / "state.json").write_text("{}")
    (tmp_path / "latest").write_text("step-00000002")
    checkpoints.repair_before_resume(Folder(tmp_path), tmp_path / "step-00000002", 1)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        f"step-0000000{step}" for step in (1, 2, 3)
    ]
    assert (tmp_path / "step-00000004.damaged").is_dir()
    save(tmp_path, 4, keep=9)
    (tmp_path / "step-00000004" / "state.json").write_text("{}")
    checkpoints.repair_before_resume(Folder(tmp_path), tmp_path / "step-00000002", 1)  # once more
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [
        f"step-0000000{step}" for step in (1, 2, 3)
    ]
    assert checkpoint_pointers.read_pointer(tmp_path, "best") == "step-00000001"


def record_writes(action: Callable[[], None]) -> list[str]:
    made: list[str] = []
    with watch_writes(made.append):
        action()
    return made


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_an_error_in_any_write_call_loses_no_checkpoint(tmp_path, monkeypatch, number):
    monkeypatch.setattr(checkpoint_pointers.time, "sleep", lambda seconds: None)
    save(tmp_path / "count", 2)
    calls = record_writes(lambda: save(tmp_path / "count", 3))
    assert len(calls) >= 20
    for place in range(len(calls)):
        folder = tmp_path / str(place)
        save(folder, 2)
        passed = itertools.count()

        def fail(name: str, place=place, passed=passed) -> None:
            if next(passed) >= place:
                raise OSError(number, os.strerror(number))

        with pytest.raises(StorageError) as refused, watch_writes(fail):
            save(folder, 3)
        assert refused.value.exit_code == 5
        (line,) = refused.value.lines
        assert os.strerror(number) in line
        assert " are needed, " in line
        assert " are free" in line
        assert "earlier checkpoints are kept" in line
        assert newest_step(folder) in (2, 3)
        assert not [path.name for path in folder.iterdir() if "tmp" in path.name]
        save(folder, 4)
        assert newest_step(folder) == 4


def test_a_save_that_fails_once_or_twice_is_retried(tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(checkpoint_pointers.time, "sleep", waited.append)
    calls = len(record_writes(lambda: save(tmp_path / "count", 3)))
    for place, times in itertools.product(range(calls), (1, 2)):
        folder = tmp_path / f"{place} {times}"
        folder.mkdir()
        passed = itertools.count()

        def fail(name: str, place=place, times=times, passed=passed) -> None:
            if place <= next(passed) < place + times:
                raise OSError(errno.EIO, "Input/output error")

        with watch_writes(fail):
            save(folder, 3)
        assert newest_step(folder) == 3
    assert waited


def test_old_checkpoints_are_deleted_only_after_the_new_one_is_on_disk(tmp_path, monkeypatch):
    """A checkpoint is renamed into place before `latest` points to it, and only then are old ones removed."""
    save(tmp_path, 1, keep=1)
    said: list[str] = []

    def noting(name: str, real):
        def call(folder, *rest):
            said.append(" ".join([name, folder.path.name if name == "sync" else str(rest[0])]))
            return real(folder, *rest)

        return call

    for name in ("create", "sync", "rename", "remove"):
        monkeypatch.setattr(Folder, name, noting(name, getattr(Folder, name)))
    monkeypatch.setattr("cnnrun.base.atomic_files._temporary_name", lambda name: f".{name}.tmp")
    save(tmp_path, 2, keep=1)
    files = [*(f"create {name}.safetensors" for name in parts(1)), "create state.json"]
    assert sorted(said[: len(files)]) == sorted(files)
    assert said[len(files) :] == [
        "create manifest.json",
        "sync step-00000002.tmp",
        "rename step-00000002.tmp",
        f"sync {tmp_path.name}",
        "remove step-00000002.tmp",
        "create .latest.tmp",
        "rename .latest.tmp",
        f"sync {tmp_path.name}",
        "rename step-00000001",
        "remove step-00000001.old.tmp",
    ]


def test_checkpoint_files_are_synced_before_they_are_renamed(tmp_path):
    """The order of system calls, as strace records it."""
    strace, folder, log = shutil.which("strace"), tmp_path / "c", tmp_path / "log"
    if strace is None:
        pytest.skip("needs strace")
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        f"import pathlib; from tests.training.test_disk_failures import save; save(pathlib.Path({str(folder)!r}), 1)\n"
    )
    command = [strace, "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(log)]
    subprocess.run([*command, sys.executable, "-c", program], capture_output=True)
    if not folder.exists():
        pytest.skip("strace may not trace here")
    order = [line.split(None, 1)[1] for line in log.read_text(errors="replace").splitlines() if str(folder) in line]
    named = next(place for place, line in enumerate(order) if line.startswith("rename"))
    synced = " ".join(order[:named])
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json"):
        assert name in synced
    assert order[named + 1].startswith("fsync")


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("best", [9, 10, 100])
def test_pruning_orders_steps_by_number_and_keeps_the_best(tmp_path, keep, best):
    for step in (9, 10, 100):
        checkpoints.save(Folder(tmp_path), step, parts(step), {"training": {"step": step}})
        if step == best:
            checkpoint_pointers.set_pointer(Folder(tmp_path), "best", f"step-{step:08d}")
        os.utime(tmp_path / f"step-{step:08d}", (1000 - step, 1000 - step))  # modification times in the opposite order
    checkpoints.prune(Folder(tmp_path), keep)
    left = [int(path.name[5:]) for path in checkpoints.list_checkpoints(tmp_path)]
    assert left == sorted({best, *[9, 10, 100][-keep:]})


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_the_training_and_keeps_earlier_checkpoints(small_disk, tmp_path, run_cli, monkeypatch):
    monkeypatch.setattr(checkpoint_pointers.time, "sleep", lambda seconds: None)
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("s: 16", "s: 600").replace("epochs: 2", "epochs: 5"))  # checkpoints of 0.36 MiB
    code, _, err = run_cli("train", config, "--runs", small_disk)
    assert code == 5
    assert "No space left on device); " in err
    assert "KiB are needed, " in err
    assert "earlier checkpoints are kept" in err
    assert "Traceback" not in err
    folder = small_disk / "tiny" / "1" / "checkpoints"
    saved = checkpoints.load_newest(folder, "latest", pytest.fail)
    assert saved is not None
    assert not [path.name for path in folder.iterdir() if "tmp" in path.name]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    code, out, _ = run_cli("train", config, "--runs", small_disk, "--resume")
    assert code == 0
    assert f"run: {small_disk / 'tiny' / '1'}" in out


def train_and_watch(root: Path, before: Callable[[str], None]) -> None:
    made = config_file.parse_config(TINY, "tiny.yaml", ["name=tiny"])
    with watch_writes(before):
        train_run(made, root, CPU, resume=True)


def state(root: Path) -> tuple[object, ...]:
    run = root / "tiny" / "1"
    saved = checkpoints.load_newest(run / "checkpoints", "latest", pytest.fail)
    tensors = {part: {name: value.tolist() for name, value in of.items()} for part, of in saved.parts.items()}
    return (
        tensors,
        saved.state,
        (run / "metrics.jsonl").read_bytes(),
        json.loads((run / "result.json").read_text())["steps"],
    )


def test_a_training_can_be_resumed_after_an_error_in_any_of_its_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_pointers.time, "sleep", lambda seconds: None)
    names: list[str] = []
    train_and_watch(tmp_path / "whole", names.append)
    expected = state(tmp_path / "whole")
    for place in range(0, len(names), 3):
        root, passed = tmp_path / str(place), itertools.count()

        def fail(name: str, place=place, passed=passed) -> None:
            if next(passed) >= place:
                raise OSError(errno.ENOSPC, "No space left on device")

        with contextlib.suppress(UserError):
            train_and_watch(root, fail)
        if (root / "tiny" / "1" / "checkpoints").is_dir():
            checkpoints.load_newest(root / "tiny" / "1" / "checkpoints", "latest", pytest.fail)
        if not (root / "tiny" / "1" / "result.json").exists():
            train_and_watch(root, lambda name: None)
        assert state(root) == expected, (place, names[place])
