"""Trainings that are killed with SIGKILL and restarted until they finish, and the digest that must be equal then.

torch is imported once and each training is forked, so that a kill costs a fraction of a second.
tests/system/test_killed_trainings.py runs some of them, `scripts/endurance` as many as wanted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cnnrun.base import atomic_files
from cnnrun.experiment import schema
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoint_pointers, checkpoints
from tests.support.configs import KINDS, case_config
from tests.support.forked_processes import fork, outcome
from tests.support.images import write_pictures

CASES = list(itertools.product((0, 2), (1, 3), KINDS))  # workers, accumulate, kind
HOWS = ("moment", "write")  # at a uniformly random moment; before a uniformly random call that writes


def training_digest(root: Path) -> str:
    """Digest of everything that must be equal: tensors, counters, offsets, metrics.jsonl, result and pointers."""
    run = root / "runs" / "c" / "1"
    found = hashlib.sha256()
    for pointer in ("latest", "best"):
        name = checkpoint_pointers.read_pointer(run / "checkpoints", pointer)
        assert name, f"no {pointer}"
        saved = checkpoints.load(run / "checkpoints" / name)
        found.update(f"{pointer} {name} {json.dumps(saved.state, sort_keys=True)}".encode())
        for part, tensors in sorted(saved.parts.items()):
            for key, value in sorted(tensors.items()):
                found.update(f"{part} {key} {value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    found.update((run / "metrics.jsonl").read_bytes())
    result = json.loads((run / "result.json").read_text())
    found.update(f"{result['steps']} {result['best_step']} {result['best']}".encode())
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*") if "tmp" in path.name or "damaged" in path.name)
    assert not left, f"left behind: {left}"
    return found.hexdigest()


def _train_counting_calls(made: schema.Experiment, root: Path, fatal: int | None) -> int:
    """Train in this process, which is killed before writing call number `fatal`. Return the number of writing calls."""
    calls = 0
    lock = threading.Lock()

    def count() -> None:
        nonlocal calls
        with lock:
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def count_calls(real):
        def call(*arguments, **settings):
            count()
            return real(*arguments, **settings)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir", "pwrite", "write", "ftruncate"):
        setattr(os, name, count_calls(getattr(os, name)))

    def write_in_halves(descriptor, data):
        os.write(descriptor, data[: len(data) // 2])
        os.write(descriptor, data[len(data) // 2 :])

    atomic_files._write_all = write_in_halves
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    train_run(made, root / "runs", torch.device("cpu"), resume=True)
    return calls


@dataclass
class Undisturbed:
    """Result of an undisturbed training: its digest, its duration and its number of writing calls."""

    digest: str
    seconds: float
    calls: int


def run_undisturbed(folder: Path, case: tuple[int, int, str]) -> Undisturbed:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = case_config(folder, root, case)
        began = time.monotonic()
        calls = outcome(*fork(lambda: _train_counting_calls(made, root, None)))
        assert isinstance(calls, int), calls
        assert calls > 0, f"killed by signal {-calls}"
        return Undisturbed(training_digest(root), time.monotonic() - began, calls)


@dataclass
class Story:
    """Record of a training that was killed repeatedly."""

    case: tuple[int, int, str]
    kills: int = 0
    starts: int = 0
    found: str = ""
    trouble: list[str] = field(default_factory=list)


def kill_repeatedly(
    folder: Path, case: tuple[int, int, str], expected: Undisturbed, kills: int, how: str, seed: int, early: float = 1.0
) -> Story:
    """Kill a training `kills` times, each time at a new random point, then let it finish.

    `early` is the fraction of an undisturbed run within which it is killed. A smaller one leaves room for more kills.
    """
    draw, story = random.Random(seed), Story(case)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = case_config(folder, root, case)
        while True:
            last = story.kills >= kills
            story.starts += 1
            status = _start_once(made, root, expected, draw, None if last else how, early)
            if status == signal.SIGKILL:
                story.kills += 1
            elif status:
                story.trouble.append(f"start {story.starts} ended with {status}")
                return story
            elif last:
                break
            elif (root / "runs" / "c" / "1" / "result.json").exists():
                break  # it was done before it could be killed again
        try:
            story.found = training_digest(root)
        except (AssertionError, OSError) as error:
            story.trouble.append(str(error))
    if story.found != expected.digest:
        story.trouble.append("not what an undisturbed run gives")
    return story


def _start_once(
    made: schema.Experiment, root: Path, expected: Undisturbed, draw: random.Random, how: str | None, early: float
) -> int:
    """Start the training. Return the signal that killed it, 0 if it finished, or -1 if it failed."""
    fatal = draw.randint(1, int(expected.calls * early)) if how == "write" else None
    pid, pipe = fork(lambda: _train_counting_calls(made, root, fatal))
    if how == "moment":
        time.sleep(draw.uniform(0, expected.seconds * early))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with os.fdopen(pipe, "rb") as told:
        data = told.read()
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    return 0 if b"returned" in data[:40] else -1


def stories(kills: int, seed: int = 0, most: int = 10) -> Iterator[Story]:
    """Kill trainings over all cases and ways until there were `kills` kills, at most `most` in one training."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = write_pictures(Path(name) / "pictures")
        expected = {case: run_undisturbed(folder, case) for case in CASES}
        done = 0
        for number in itertools.count():
            case, how = CASES[number % len(CASES)], HOWS[number // len(CASES) % 2]
            wanted = min(draw.randint(1, most), kills - done)
            story = kill_repeatedly(folder, case, expected[case], wanted, how, draw.getrandbits(32))
            done += story.kills
            yield story
            if done >= kills:
                return
