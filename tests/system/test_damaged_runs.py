"""A run with damaged files, even with correct hashes, is refused in one line with exit 3 or 4, or used unchanged.

An even sample of the damages is tested. `benchmarks/reliability.py --only damage` tries every one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cnnrun.training import checkpoints
from tests.support import damaged_runs

SAMPLE = 60  # of each kind


@pytest.fixture(scope="module")
def runs_of_each_state(tmp_path_factory):
    """A config, a finished run of it, and the same run as if its training had been killed just before it finished."""
    return damaged_runs.runs_of_each_state(tmp_path_factory.mktemp("damaged"))


def sample(damages):
    """SAMPLE damages, evenly spaced, so that each file has its share of them."""
    found = list(damages)
    return [found[number * len(found) // SAMPLE] for number in range(SAMPLE)] if len(found) > SAMPLE else found


def check_damages(source: Path, damages, words, *, refused: int) -> None:
    """Assert that each damage to a copy of the run gives 0, 3 or 4, and a message without a traceback if not 0."""
    codes, before = [], tree_digest(source)
    for what, apply in sample(damages):
        code, err = damaged_runs.run_on_damaged_copy(source, apply, words)
        assert code in (0, 3, 4), (what, err)
        assert "Traceback" not in err, what
        assert code == 0 or err.splitlines(), what
        codes.append(code)
    assert tree_digest(source) == before
    assert codes.count(3) >= refused


def tree_digest(folder: Path) -> str:
    """Digest of every name and content in a folder. Links are not followed."""
    made = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        made.update(os.fsencode(path))
        if path.is_symlink():
            made.update(os.fsencode(path.readlink()))
        elif path.is_file():
            made.update(path.read_bytes())
    return made.hexdigest()


KINDS = {
    "files, eval": (damaged_runs.file_damages, "eval", 3),
    "files, report": (damaged_runs.file_damages, "report", 10),
    "files, train": (damaged_runs.file_damages, "train", 3),
    "checkpoints, eval": (damaged_runs.checkpoint_damages, "eval", 10),
    "checkpoints, train": (damaged_runs.checkpoint_damages, "train", 10),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_run_is_refused_or_still_usable(runs_of_each_state, kind):
    config, finished, killed = runs_of_each_state
    damages, command, refused = KINDS[kind]
    source = killed if command == "train" else finished
    words = ("train", str(config), "--resume", "--no-report") if command == "train" else (command,)
    check_damages(source, damages(source), words, refused=refused)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_non_finite_weights_are_refused(runs_of_each_state, run_cli, tmp_path, part, bad):
    """Regression: a checkpoint with NaN and correct hashes was evaluated with exit 0."""
    config, finished, killed = runs_of_each_state
    for source, words in ((finished, ("eval",)), (killed, ("train", config, "--resume"))):
        if part == "optimizer" and source == finished:
            continue
        copy = tmp_path / words[0] / "tiny" / "1"
        shutil.copytree(source, copy)
        for generation in checkpoints.list_checkpoints(copy / "checkpoints"):
            tensors = safetensors.torch.load_file(generation / f"{part}.safetensors")
            name = next(name for name, value in tensors.items() if value.is_floating_point())
            tensors[name] = torch.full_like(tensors[name], bad)
            (generation / f"{part}.safetensors").write_bytes(safetensors.torch.save(tensors))
            damaged_runs.reseal(generation)
        code, _, err = run_cli(*words, *([copy] if words == ("eval",) else []), "--runs", tmp_path / words[0])
        assert code == 3
        assert "is not made of finite real numbers" in err


# --- links ------------------------------------------------------------------------------------------------------------


COMMANDS = {
    "eval": lambda run: ("eval", run),
    "report": lambda run: ("report", run),
    "calibrate": lambda run: ("calibrate", run),
    "export": lambda run: ("export", "onnx", run),
    "explain": lambda run: ("explain", "filters", run),
    "predict": lambda run: ("predict", run, "--run", run),
    "checkpoint": lambda run: ("eval", run / "checkpoints" / "best"),
}


@pytest.mark.parametrize("command", [*COMMANDS, "train"])
def test_links_never_lead_writes_out_of_a_run(runs_of_each_state, run_cli, tmp_path, command):
    """Regression: six of seven commands wrote through a link outside the run, with exit 0."""
    config, finished, killed = runs_of_each_state
    source = killed if command == "train" else finished
    for number, (what, apply) in enumerate(damaged_runs.links_and_pipes(source, tmp_path / "outside")):
        root, outside = tmp_path / str(number), tmp_path / "outside"
        outside.mkdir()
        copy = root / "tiny" / "1"
        shutil.copytree(source, copy)
        apply(copy)
        before = tree_digest(outside)
        words = ("train", config, "--resume") if command == "train" else COMMANDS[command](copy)
        code, _, err = run_cli(*words, "--runs", root)
        assert code == 3, (what, err)
        assert tree_digest(outside) == before, what
        assert len(err.splitlines()) >= 1
        assert "Traceback" not in err
        shutil.rmtree(outside)
        shutil.rmtree(root)


def test_a_link_with_the_temporary_name_is_not_written_through(tmp_path, monkeypatch):
    """A temporary file that already exists is never opened, even if its random name was guessed."""
    from cnnrun.base import atomic_files
    from cnnrun.base.errors import StorageError

    (tmp_path / "outside").write_text("mine")
    monkeypatch.setattr(atomic_files, "_temporary_name", lambda name: f".{name}.tmp")
    (tmp_path / ".f.tmp").symlink_to(tmp_path / "outside")
    with pytest.raises(StorageError):
        atomic_files.write_text(tmp_path / "f", "theirs")
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_hard_linked_metrics_file_is_refused(runs_of_each_state, run_cli, tmp_path):
    """A hard link does not look like a link, and an append to it changes both files."""
    config, _, killed = runs_of_each_state
    copy = tmp_path / "tiny" / "1"
    shutil.copytree(killed, copy)
    (tmp_path / "victim").write_text("mine")
    (copy / "metrics.jsonl").unlink()
    os.link(tmp_path / "victim", copy / "metrics.jsonl")
    code, _, err = run_cli("train", config, "--resume", "--runs", tmp_path, "--no-report")
    assert code == 3
    assert "has a second name (a hard link)" in err
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda value: value.to(torch.float8_e4m3fn), torch.Tensor.int])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_tensors_of_another_dtype_are_refused(runs_of_each_state, part, change):
    config, finished, killed = runs_of_each_state

    def damage_it(run: Path) -> None:
        generation = damaged_runs.newest_checkpoint(run)
        tensors = safetensors.torch.load_file(generation / f"{part}.safetensors")
        changed = {name: change(value) if value.is_floating_point() else value for name, value in tensors.items()}
        (generation / f"{part}.safetensors").write_bytes(safetensors.torch.save(changed))
        damaged_runs.reseal(generation)

    code, err = damaged_runs.run_on_damaged_copy(killed, damage_it, ("train", str(config), "--resume", "--no-report"))
    assert code == 3, err
    if part == "ema":
        assert damaged_runs.run_on_damaged_copy(finished, damage_it, ("eval",))[0] == 3
