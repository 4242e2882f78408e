"""A supervisor that repeats a command until it succeeds, while the command is killed at chosen places.

tests/training/test_run_folder.py runs some chains, `benchmarks/reliability.py --only supervisor` all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cnnrun.experiment import config_file
from cnnrun.results.studies.train_run import train_run
from tests.support.configs import TINY
from tests.support.forked_processes import fork, outcome
from tests.support.images import save_picture
from tests.support.interrupted_trainings import digest

# Where trainings are killed: before a call of these, the first to the n-th that there are in two epochs.
PLACES = {
    "validation": ("cnnrun.training.evaluation._batch_results", 12),
    "writing down": ("cnnrun.training.metrics_log.MetricsLog.record", 2),
    "keeping what val said": ("cnnrun.training.checkpoints.add_evaluation", 2),
    "drawing": ("cnnrun.training.metrics_log._draw_confusion_matrix", 2),
    "writing result.json": ("cnnrun.training.loop.TrainingLoop.write_result", 1),
    "after result.json": ("cnnrun.results.report.writer.report_after_training", 1),
    "writing the report": ("cnnrun.results.report.writer.write_new_file", 1),
}
WRITING = {"export": 12, "enroll": 4, "cache": 60}  # killed before a call that writes, the first to the n-th


@dataclass
class Chain:
    """Record of one supervised command: how often it was killed and started, and what was wrong at the end."""

    place: str
    kills: int = 0
    starts: int = 0
    trouble: list[str] = field(default_factory=list)


def run_command(words: list[str], place: str | None, nth: int) -> int:
    """Run the command in this process, which is killed at the n-th call of `place`. Return the exit code."""
    from cnnrun.commands import app

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patched:
        if place in PLACES:
            _kill_at_call(patched, PLACES[place][0], nth)
        elif place:
            _kill_at_write(patched, nth)
        patched.setattr(sys, "argv", ["cnnrun", *words])
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            app.main()
        except SystemExit as left:
            return int(left.code or 0)
    return 0


def _kill_at_call(patched: pytest.MonkeyPatch, target: str, nth: int) -> None:
    place, _, name = target.rpartition(".")
    parent = pkgutil.resolve_name(place)
    real, calls = getattr(parent, name), [0]

    def replacement(*arguments, **settings):
        calls[0] += 1
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **settings)

    patched.setattr(parent, name, replacement)


def _kill_at_write(patched: pytest.MonkeyPatch, nth: int) -> None:
    calls = [0]

    def count_calls(real):
        def call(*arguments, **settings):
            calls[0] += 1
            if calls[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **settings)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "open", "unlink", "pwrite", "write", "ftruncate"):
        patched.setattr(os, name, count_calls(getattr(os, name)))


def run_chain(place: str, seed: int, most: int = 4) -> Chain:
    """Kill the command up to `most` times, repeat it until it succeeds, run it once more and check the result."""
    draw, made = random.Random(f"{place} {seed}"), Chain(place)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words, found = _prepare(place, folder)
        wanted = draw.randint(1, most)
        while made.starts < 40:
            fatal = made.kills < wanted
            nth = draw.randint(1, PLACES[place][1] if place in PLACES else WRITING[place])
            made.starts += 1
            ended = outcome(*fork(lambda fatal=fatal, nth=nth: run_command(words, place if fatal else None, nth)))
            if ended == -signal.SIGKILL:
                made.kills += 1
            elif ended:
                made.trouble.append(f"start {made.starts} ended with {ended}")
                return made
            elif not fatal:
                break
            else:
                wanted = made.kills  # it ended before it could be killed again
        if again := outcome(*fork(lambda: run_command(words, None, 0))):
            made.trouble.append(f"once more, when all was done: {again}")
        made.trouble += found()
    return made


def _prepare(place: str, folder: Path) -> tuple[list[str], Callable[[], list[str]]]:
    """Return the command and a function that lists what is wrong after it."""
    if place == "export":
        run = _train(folder, TINY)
        words = ["export", "code", str(run)]
        expected = _export(run, folder / "other" / "model.py")
        kept = {*expected, "parity-code.json"}
        return words, lambda: [
            *([] if _files(run / "exports") == expected else ["the export differs"]),
            *([] if {path.name for path in (run / "exports").iterdir()} == kept else ["files are left behind"]),
        ]
    if place == "enroll":
        return _prepare_enroll(folder)
    text = TINY
    if place == "cache":
        for number in range(60):
            save_picture(folder / "pets" / "ab"[number % 2] / f"{number}.png", seed=number, size=(8, 8))
        data = f"{{source: {{folder: '{folder}/pets'}}, image: {{size: 8, channels: 1}}, split: {{val: 0.2}}"
        text = text.replace("{source: digits, split: {val: 0.2, test: 0.2}}", f"{data}, cache_dir: '{folder}/cache'}}")
        text = text.replace("batch: 64", "batch: 8")
    (folder / "tiny.yaml").write_text(text)
    words = ["train", str(folder / "tiny.yaml"), "--runs", str(folder / "runs"), "--resume"]
    return words, lambda: _differences(folder)


def _differences(folder: Path) -> list[str]:
    """Differences between the supervised training and an undisturbed one."""
    whole = _train(folder, (folder / "tiny.yaml").read_text())
    run = folder / "runs" / "tiny" / "1"
    runs = sorted(path.name for path in run.parent.iterdir())
    left = [str(path) for path in folder.glob("runs/**/*") if "tmp" in path.name]
    return [
        *([] if runs == ["1"] else [f"trained more than once: {runs}"]),
        *([] if (run / "report.html").exists() else ["no report"]),
        *([f"left behind: {left}"] if left else []),
        *([] if digest(run) == digest(whole) else ["not the bits of an undisturbed run"]),
    ]


def _train(folder: Path, text: str) -> Path:
    made = config_file.parse_config(text, "tiny.yaml", ["name=tiny"])
    trained = outcome(*fork(lambda: train_run(made, folder / "whole", torch.device("cpu"), resume=False)))
    return Path(trained["run"])


def _export(run: Path, path: Path) -> dict[str, str]:
    """Export without disturbance and return the digests of its files."""
    path.parent.mkdir()
    assert outcome(*fork(lambda: run_command(["export", "code", str(run), "--out", str(path)], None, 0))) == 0
    return _files(path.parent)


def _files(folder: Path) -> dict[str, str]:
    record = json.loads((folder / "parity-code.json").read_text())
    for name, expected in record["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, "the record is of other files"
    return record["sha256"]


def _prepare_enroll(folder: Path) -> tuple[list[str], Callable[[], list[str]]]:
    for person in range(4):
        for number in range(3):
            save_picture(folder / "people" / f"p{person}" / f"{number}.png", seed=10 * person + number, size=(8, 8))
    text = (
        "task: {verify: {dimension: 6}}\n"
        f"data: {{source: {{folder: '{folder}/people'}}, image: {{size: 8, channels: 1}}, "
        f"split: {{by: label, val: 0.5}}, cache_dir: '{folder}/cache'}}\nmodel: [flatten]\n"
        "train: {epochs: 1, batch: 4, sampler: {identities: 2}, monitor: val/eer}\n"
    )
    run = _train(folder, text)

    def words(gallery: str) -> list[str]:
        return ["enroll", str(folder / "people"), "--gallery", str(folder / gallery), "--run", str(run)]

    assert outcome(*fork(lambda: run_command(words("other.safetensors"), None, 0))) == 0

    def differences() -> list[str]:
        pair = [(folder / name).read_bytes() for name in ("g.safetensors", "other.safetensors")]
        left = [path.name for path in folder.glob(".*.tmp")]
        return [*([] if pair[0] == pair[1] else ["the gallery differs"]), *([f"left behind: {left}"] if left else [])]

    return words("g.safetensors"), differences


def chains(each: int) -> Iterator[Chain]:
    """Run `each` chains for every place."""
    for seed in range(each):
        for place in (*PLACES, *WRITING):
            yield run_chain(place, seed)
