"""A finished run is extended: the longer training has the bits of a single one where the schedule allows it."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from cnnrun.base.errors import CheckpointError, ConfigError
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.extensions import describe_lineage
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.checkpoint_pointers import read_pointer
from cnnrun.training.run_folder import refuse_links
from tests.support.configs import TINY, tiny_experiment
from tests.support.forked_processes import fork
from tests.support.interrupted_trainings import digest, stop_at

CPU = torch.device("cpu")
STABLE = (
    "train.schedule={warmup_stable_decay: {warmup_steps: 9, decay: 0.4}}",
    "train.optimizer={adamw: 0.01}",
    "train.ema={decay: 0.9}",
    "data.augment={shift: 0.2}",
    "train.keep=1",
    "train.precision=float32",
)


def train(runs: Path, epochs: int, *settings: str, extend: Path | None = None, resume: bool = False) -> Path:
    experiment = tiny_experiment(f"train.epochs={epochs}", *settings)
    return Path(train_run(experiment, runs, CPU, resume, extend=extend)["run"])


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> str:
    return digest(train(tmp_path_factory.mktemp("single"), 6, *STABLE))


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """A finished run of four epochs, whose decay begins within its third."""
    return train(tmp_path_factory.mktemp("short"), 4, *STABLE)


def test_four_epochs_and_two_more_have_the_bits_of_six(short, single, tmp_path, capfd):
    before = digest(short)
    extension = train(tmp_path, 6, *STABLE, extend=short)
    assert digest(extension) == single
    assert digest(short) == before
    said = capfd.readouterr().err
    assert "the same bits as a single training of 6 epochs" in said
    assert "train.epochs was 4, is 6" in said


def test_an_extension_is_extended(short, tmp_path):
    first = train(tmp_path / "a", 6, *STABLE, extend=short)
    second = train(tmp_path / "a", 9, *STABLE, extend=first)
    assert digest(second) == digest(train(tmp_path / "b", 9, *STABLE))
    assert describe_lineage(second) == [f"Extends {first} (6 epochs) from its step 62."]
    assert describe_lineage(first) == [
        f"Extends {short} (4 epochs) from its step 41.",
        f"Extended by {second}.",
    ]
    assert f"Extended by {first}." in describe_lineage(short)
    refuse_links(second)


def test_runs_that_were_stopped_are_extended_to_the_same_bits(single, tmp_path):
    """The first training stops before, at and after the step at which its decay begins; so does the extension."""
    for number, (first, second) in enumerate([(40, 41), (41, 62), (42, 70)]):
        runs = tmp_path / str(number)
        with stop_at(first):
            train(runs, 4, *STABLE)
        run = train(runs, 4, *STABLE, resume=True)
        with stop_at(second):
            train(runs, 6, *STABLE, extend=run)
        extension = train(runs, 6, *STABLE, resume=True)
        assert extension.name == "2"
        assert digest(extension) == single


def test_a_killed_extension_has_the_bits_of_an_undisturbed_one(short, single, tmp_path):
    """Killed before a random writing call, by SIGKILL, up to three times; then `--extend --resume` ends it."""
    draw = random.Random(5)
    for number in range(3):
        runs = tmp_path / str(number)
        for _ in range(3):
            pid, pipe = fork(partial(_extend_until_call, runs, short, draw.randint(1, 120)))
            os.close(pipe)
            os.waitpid(pid, 0)
        assert digest(train(runs, 6, *STABLE, extend=short, resume=True)) == single
        assert len([path for path in (runs / "tiny").iterdir() if path.name.isdigit()]) == 1


def _extend_until_call(runs: Path, run: Path, fatal: int) -> None:
    calls = 0

    def counting(real):
        def call(*arguments, **settings):
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **settings)

        return call

    for name in ("fsync", "rename", "mkdir", "open", "write"):
        setattr(os, name, counting(getattr(os, name)))
    train(runs, 6, *STABLE, extend=run, resume=True)


def test_a_constant_rate_extends_to_the_same_bits_and_a_cycle_says_that_it_does_not(tmp_path, capfd):
    constant = ("train.schedule=constant", "train.precision=float32")
    run = train(tmp_path / "a", 2, *constant)
    assert digest(train(tmp_path / "a", 3, *constant, extend=run)) == digest(train(tmp_path / "b", 3, *constant))
    assert "the same bits as a single training of 3 epochs" in capfd.readouterr().err
    cycle = ("train.schedule=one_cycle", "train.precision=float32")
    run = train(tmp_path / "c", 2, *cycle)
    extension = train(tmp_path / "c", 3, *cycle, extend=run)
    said = capfd.readouterr().err
    assert "a single training of 3 epochs would end differently: its learning rates would have been others" in said
    assert json.loads((extension / "result.json").read_text())["steps"] == 51
    assert digest(extension) != digest(train(tmp_path / "d", 3, *cycle))


def test_a_loss_that_changes_with_the_progress_is_named(tmp_path, capfd):
    verify = (
        "task={verify: {dimension: 6, loss: {arcface: {warmup: 0.9}}}}",
        "data.split={by: label, val: 0.3, test: 0.0}",
        "train.monitor=val/eer",
        "train.schedule=constant",
    )
    run = train(tmp_path, 1, *verify)
    train(tmp_path, 2, *verify, extend=run)
    assert "would end differently: its loss depends on the part of the training that is done" in capfd.readouterr().err


def test_checkpoints_before_the_decay_are_kept(short):
    kept = {path.name for path in (short / "checkpoints").glob("step-*")}
    pointers = {name: read_pointer(short / "checkpoints", name) for name in ("before_decay", "best_before_decay")}
    assert set(pointers.values()) <= kept
    assert pointers["before_decay"] == "step-00000041"
    assert len(kept) <= 4


REFUSED = {
    "train.epochs=4": "train.epochs: {run} has 4 epochs already; give more",
    "train.epochs=2": "train.epochs: {run} has 4 epochs already; give more",
    "train.batch=32": "train.batch was 64, is 32",
    "seed=3": "seed was 0, is 3",
    "data.split={val: 0.3}": "data.split.val was 0.2, is 0.3",
    "train.monitor=val/loss": "train.monitor was val/accuracy, is val/loss",
    "train.ema=null": "train.ema",
    "train.accumulate=2": "train.accumulate was 1, is 2",
    "train.optimizer={sgd: 0.01}": "train.optimizer",
    "train.optimizer={adamw: {lr: 0.01, amsgrad: true}}": "amsgrad was False, is True",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_an_extension_cannot_change_is_refused_and_nothing_is_written(short, tmp_path, setting):
    with pytest.raises(ConfigError) as refused:
        train_run(tiny_experiment("train.epochs=6", *STABLE, setting), tmp_path, CPU, False, extend=short)
    assert REFUSED[setting].format(run=short) in "\n".join(refused.value.lines)
    assert not list(tmp_path.iterdir())


def test_other_changes_are_said(short, tmp_path, capfd):
    train(tmp_path, 5, *STABLE, "train.clip=1.0", extend=short)
    said = capfd.readouterr().err
    assert "train.clip was not set, is 1.0" in said
    assert "a single training of 5 epochs would end differently: train.clip differs" in said


def test_unfinished_runs_checkpoints_and_damaged_checkpoints_are_refused(short, tmp_path, run_cli):
    with stop_at(3):
        train(tmp_path, 2)
    with pytest.raises(CheckpointError, match="is unfinished; finish it with --resume"):
        train(tmp_path, 4, extend=tmp_path / "tiny" / "1")
    with pytest.raises(ConfigError, match="not one of its checkpoints"):
        train(tmp_path, 6, *STABLE, extend=short / "checkpoints" / "latest")
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    code, _, errors = run_cli("train", str(config), "--extend", str(short), "--seeds", "2")
    assert code == 2
    assert "--extend, --seeds and --folds cannot be combined" in errors


def test_a_run_that_stopped_early_is_not_extended(tmp_path):
    early = ("train.early_stop={patience: 1, min_delta: 1.0}", "train.schedule=constant")
    run = train(tmp_path, 9, *early)
    for epochs in (9, 12):
        with pytest.raises(ConfigError, match=r"stopped early, after 1 evaluation without improvement; raise"):
            train(tmp_path, epochs, *early, extend=run)
    assert train(tmp_path, 9, "train.schedule=constant", extend=run).name == "2"  # what was left of its epochs


def test_a_precision_that_was_measured_is_kept(tmp_path):
    experiment = tiny_experiment("train.epochs=1", "train.schedule=constant", "train.precision=bfloat16")
    run = Path(train_run(experiment, tmp_path, CPU, False)["run"])
    longer = tiny_experiment("train.epochs=2", "train.schedule=constant", "train.precision=auto")
    extension = Path(train_run(longer, tmp_path, CPU, False, extend=run)["run"])
    assert parse_config((extension / "config.yaml").read_text(), "c").train.precision == "bfloat16"


def test_an_extension_is_resumed_and_no_other_run(short, single, tmp_path):
    with stop_at(20):
        train(tmp_path, 6, *STABLE)  # an unfinished run of the same config, which extends nothing
    extension = train(tmp_path, 6, *STABLE, extend=short, resume=True)
    assert extension.name == "2"
    assert digest(extension) == single


def test_damaged_records_are_named_or_left_out(short, tmp_path):
    copy = tmp_path / "runs" / "tiny" / "1"
    shutil.copytree(short, copy)
    with (copy / "extensions.jsonl").open("ab") as file:
        file.write(b'{"run": "runs/x')
    describe_lineage(copy)
    (copy / "metrics.jsonl").write_bytes((copy / "metrics.jsonl").read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: its last bytes are missing"):
        train(tmp_path / "more", 6, *STABLE, extend=copy)
    assert not list((tmp_path / "more").rglob("config.yaml"))


def test_a_warmup_that_reaches_into_the_decay_is_refused(tmp_path):
    long = "train.schedule={warmup_stable_decay: {warmup_steps: 1000}}"
    with pytest.raises(ConfigError, match="warmup_steps: 1,000 of 34 steps reach into the decay"):
        train(tmp_path, 2, long)
