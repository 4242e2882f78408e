from __future__ import annotations

import json
import os
import random

import pytest
import torch

from cnnrun.base.atomic_files import Folder
from cnnrun.base.errors import CheckpointError, StorageError
from cnnrun.training import checkpoint_pointers, checkpoints


def parts(seed: int) -> checkpoints.CheckpointParts:
    generator = torch.Generator().manual_seed(seed)
    return {"model": {"w": torch.randn(50, generator=generator), "n": torch.tensor(seed)}, "optimizer": {}}


def quiet(line: str) -> None:
    pass


def test_a_saved_checkpoint_is_loaded_with_the_same_contents(tmp_path):
    path = checkpoints.save(Folder(tmp_path), 7, parts(1), {"training": {"step": 7}})
    loaded = checkpoints.load(path)
    assert torch.equal(loaded.parts["model"]["w"], parts(1)["model"]["w"])
    assert loaded.parts["optimizer"] == {}
    assert loaded.state == {"training": {"step": 7}}
    assert checkpoint_pointers.read_pointer(tmp_path, "latest") == path.name
    assert not list(tmp_path.glob("*.tmp"))


def test_channels_last_tensors_keep_their_values(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    path = checkpoints.save(Folder(tmp_path), 1, {"model": {"w": weight}}, {})
    assert torch.equal(checkpoints.load(path).parts["model"]["w"], weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
def test_a_tensor_with_one_non_finite_value_is_refused(tmp_path, kind, bad):
    weight = torch.ones(50, dtype=kind)
    path = checkpoints.save(Folder(tmp_path), 1, {"model": {"w": weight}}, {})
    assert torch.equal(checkpoints.load(path).parts["model"]["w"], weight)
    weight[17] = bad
    path = checkpoints.save(Folder(tmp_path), 2, {"model": {"w": weight}}, {})
    with pytest.raises(CheckpointError, match="w is not made of finite real numbers"):
        checkpoints.load(path)


def test_steps_sort_as_numbers_and_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (9, 10, 100, 99_999_999, 100_000_000):
        checkpoints.save(Folder(tmp_path), step, parts(step), {})
        if step == 10:
            checkpoint_pointers.set_pointer(Folder(tmp_path), "best", "step-00000010")
    checkpoints.prune(Folder(tmp_path), 2)
    assert [int(path.name[5:]) for path in checkpoints.list_checkpoints(tmp_path)] == [10, 99_999_999, 100_000_000]


def flip_bits(data: bytes, count: int, seed: int) -> list[bytes]:
    random.seed(seed)
    made = []
    for _ in range(count):
        place = random.randrange(len(data) * 8)
        changed = bytearray(data)
        changed[place // 8] ^= 1 << (place % 8)
        made.append(bytes(changed))
    return made


def test_every_flipped_bit_and_truncation_is_detected_and_the_previous_checkpoint_used(tmp_path):
    checkpoints.save(Folder(tmp_path), 1, parts(1), {"training": {"step": 1}})
    newest = checkpoints.save(Folder(tmp_path), 2, parts(2), {"training": {"step": 2}})
    for name in ("model.safetensors", "state.json", "manifest.json"):
        sound = (newest / name).read_bytes()
        for damaged in [*flip_bits(sound, 40, len(sound)), *(sound[:cut] for cut in range(0, len(sound), 37))]:
            (newest / name).write_bytes(damaged)
            said: list[str] = []
            if name == "manifest.json" and json_equal(damaged, sound):
                continue  # changed whitespace is not damage
            found = checkpoints.load_newest(tmp_path, "latest", said.append)
            assert found.state == {"training": {"step": 1}}
            assert said
            assert "skipping a damaged checkpoint" in said[0]
        (newest / name).write_bytes(sound)
    assert checkpoints.load_newest(tmp_path, "latest", quiet).state == {"training": {"step": 2}}


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_files_of_two_checkpoints_do_not_mix(tmp_path):
    a, b = (checkpoints.save(Folder(tmp_path), step, parts(step), {}) for step in (1, 2))
    (b / "model.safetensors").write_bytes((a / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="SHA-256"):
        checkpoints.load(b)


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"../../etc", b"/etc", b"step-99999999", b"step-x"])
def test_a_bad_pointer_falls_back_to_the_newest(tmp_path, content):
    for step in (9, 10):
        checkpoints.save(Folder(tmp_path), step, parts(step), {"step": step})
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert checkpoints.load_newest(tmp_path, "latest", quiet).state == {"step": 10}


def test_only_damaged_checkpoints_is_an_error_and_no_checkpoints_is_none(tmp_path):
    assert checkpoints.load_newest(tmp_path, "latest", quiet) is None
    path = checkpoints.save(Folder(tmp_path), 1, parts(1), {})
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):
        checkpoints.load_newest(tmp_path, "latest", quiet)


@pytest.mark.parametrize("kind", ["symlink", "fifo"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = checkpoints.save(Folder(tmp_path), 1, parts(1), {})
    target = path / "model.safetensors"
    moved = target.rename(tmp_path / "elsewhere")
    os.symlink(moved, target) if kind == "symlink" else os.mkfifo(target)
    with pytest.raises(CheckpointError):
        checkpoints.load(path)


@pytest.mark.parametrize("names", [["../x.safetensors"], [".hidden"], ["/etc/passwd"]])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, names):
    path = checkpoints.save(Folder(tmp_path), 1, parts(1), {})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] |= {name: {"bytes": 1, "sha256": "0"} for name in names}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        checkpoints.load(path)


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open"])
def test_a_failing_disk_loses_no_earlier_checkpoint(tmp_path, monkeypatch, call):
    import errno

    checkpoints.save(Folder(tmp_path), 1, parts(1), {"step": 1})
    monkeypatch.setattr(checkpoint_pointers.time, "sleep", lambda seconds: None)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        folder = Folder(tmp_path)
        patched.setattr(os, call, fail)
        with pytest.raises(StorageError, match="No space left.* are needed.*are free") as refused:
            checkpoints.save(folder, 2, parts(2), {"step": 2})
    assert refused.value.exit_code == 5
    assert checkpoints.load_newest(tmp_path, "latest", quiet).state == {"step": 1}
    checkpoints.repair_killed_save(Folder(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))


def test_saving_is_retried_after_a_disk_error(tmp_path, monkeypatch):
    real, failures = os.fsync, [OSError(5, "Input/output error")]
    monkeypatch.setattr(checkpoint_pointers.time, "sleep", lambda seconds: None)

    def flaky(descriptor: int) -> None:
        if failures:
            raise failures.pop()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", flaky)
    path = checkpoints.save(Folder(tmp_path), 1, parts(1), {"step": 1})
    assert checkpoints.load(path).state == {"step": 1}


def test_an_added_evaluation_replaces_the_saved_training_state(tmp_path):
    folder = Folder(tmp_path)
    path = checkpoints.save(folder, 7, parts(1), {"training": {"step": 7, "best": None}, "scaler": {}})
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    checkpoints.add_evaluation(folder, 7, {"training": {"step": 7, "best": 0.5}})
    assert checkpoints.load(path).state == {"training": {"step": 7, "best": 0.5}, "scaler": {}}
    changed = {file.name for file in path.iterdir() if before.get(file.name) != file.read_bytes()}
    assert changed == {"manifest.json", "evaluation.json"}


@pytest.mark.parametrize("has_evaluation", [False, True])
@pytest.mark.parametrize("call", range(1, 20))
def test_a_kill_while_adding_an_evaluation_leaves_the_checkpoint_intact(tmp_path, call, has_evaluation):
    import signal

    from tests.support.forked_processes import fork, outcome

    checkpoints.save(Folder(tmp_path), 7, parts(1), {"training": 1})
    if has_evaluation:
        checkpoints.add_evaluation(Folder(tmp_path), 7, {"training": 0})

    def adding() -> None:
        calls = 0

        def counted(real):
            def made(*arguments, **settings):
                nonlocal calls
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **settings)

            return made

        for name in ("open", "write", "fsync", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoints.add_evaluation(Folder(tmp_path), 7, {"training": 2})

    ended = outcome(*fork(adding))
    assert ended in (None, -signal.SIGKILL)
    found = checkpoints.load_newest(tmp_path, "latest", pytest.fail)
    assert found.state["training"] in ({0, 1, 2} if ended else {2})
    checkpoints.repair_killed_save(Folder(tmp_path))
    assert not list(tmp_path.rglob("*.tmp"))
    checkpoints.add_evaluation(Folder(tmp_path), 7, {"training": 3})
    assert checkpoints.load(tmp_path / "step-00000007").state == {"training": 3}


def test_a_later_format_is_refused_with_what_to_do(tmp_path):
    manifest = checkpoints.save(Folder(tmp_path), 1, parts(1), {}) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 4', '"format": 5'))
    with pytest.raises(CheckpointError, match="of format 5; this version reads 2 to 4; use the version"):
        checkpoints.load(manifest.parent)


def test_checkpoints_of_format_2_are_read_and_resumed(trained_run, tmp_path):
    """Format 2 had the evaluation in state.json and listed no tensor counts."""
    import hashlib
    import shutil

    from cnnrun.experiment import config_file, open_run
    from cnnrun.results.studies.train_run import train_run

    run = tmp_path / "tiny" / "1"
    shutil.copytree(trained_run, run)
    (run / "result.json").unlink()
    for generation in checkpoints.list_checkpoints(run / "checkpoints"):
        state = checkpoints.load(generation).state
        (generation / "evaluation.json").unlink()
        (generation / "state.json").write_text(json.dumps(state))
        files = {path.name: path.read_bytes() for path in generation.iterdir() if path.name != "manifest.json"}
        listed = {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        }
        manifest = {"format": 2, "step": int(generation.name[5:]), "files": listed}
        (generation / "manifest.json").write_text(json.dumps(manifest, indent=1))
    cpu = torch.device("cpu")
    assert (
        open_run.open_trained(run, tmp_path, cpu)[1].digest
        == open_run.open_trained(trained_run, tmp_path, cpu)[1].digest
    )
    result = train_run(config_file.read_config(run / "config.yaml"), tmp_path, cpu, resume=True)
    assert result["run"] == str(run)
    assert result["best"] == json.loads((trained_run / "result.json").read_text())["best"]
