"""Trainings that are killed with SIGKILL and started again until they are done, and what must be equal then.

torch is imported once and each training forked, so that a kill costs a fraction of a second. tests/test_killed.py runs
some of them, `scripts/endurance` as many as one likes.
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

import numpy as np
import torch
from PIL import Image
from several import forked

from cnnrun.base import atomic_files
from cnnrun.experiment import schema
from cnnrun.results.train_run import train_run
from cnnrun.training import checkpoints

CONFIG = """
task: classify
data:
  source: {{folder: '{pictures}'}}
  image: {{size: 8, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
  - linear: {{out_features: 8, activation: relu}}
train: {{epochs: 3, batch: 8, monitor: val/accuracy, save_every: 4, early_stop: {{patience: 3}}}}
"""
DETECT = """
task: {{detect: {{levels: [p3], channels: 4, depth: 1, most: 8}}}}
data:
  source: {{voc: '{scenes}'}}
  image: {{size: 16, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, stride: 2, norm: batch, activation: relu}}
  - conv: {{name: p3, out_channels: 4, stride: 2, norm: batch, activation: relu}}
  - conv: {{out_channels: 4}}
train: {{epochs: 3, batch: 8, optimizer: {{adamw: 0.01}}, monitor: val/loss, save_every: 4}}
"""
VERIFY = """
task: {{verify: {{dimension: 6, loss: {{arcface: {{warmup: 0.9}}}}}}}}
data:
  source: {{folder: '{people}'}}
  image: {{size: 8, channels: 1}}
  split: {{by: label, val: 0.3}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
train: {{epochs: 3, batch: 8, sampler: {{identities: 2}}, monitor: val/eer, save_every: 4}}
"""
REGRESS = """
task: {{regress: {{angles: {{turn: 360}}, loss: gaussian}}}}
data:
  source: {{table: {{path: '{numbers}', numbers: [level, turn]}}}}
  image: {{size: 8, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
train: {{epochs: 3, batch: 8, monitor: val/mae, save_every: 4}}
"""
LABELS = """
task: multilabel
data:
  source: {{table: {{path: '{numbers}', labels: marks}}}}
  image: {{size: 8, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
train: {{epochs: 3, batch: 8, monitor: val/mAP, save_every: 4}}
"""
KINDS = {
    "ema": ["train.ema={decay: 0.9}", "train.optimizer={adamw: 0.01}"],
    "dropout": ["data.augment={shift: 0.2, noise: 8}"],
    "detect": ["data.augment={flip: both, rotate: 9, mosaic: 0.5}", "train.ema={decay: 0.9}"],
    "verify": ["data.augment={shift: 0.1, flip: horizontal}", "train.ema={decay: 0.9}"],
    "regress": ["data.augment={shift: 0.1}", "train.optimizer={adamw: 0.01}"],
    "multilabel": ["data.augment={mixup: 0.4}", "train.ema={decay: 0.9}"],
    "mixup": ["data.augment={mixup: 0.4, rotate: 9}", "train.sampler=balanced", "train.clip=1.0"],
}
CASES = list(itertools.product((0, 2), (1, 3), KINDS))  # workers, accumulate, kind
HOWS = ("moment", "write")  # at a uniformly random moment; before a uniformly random call that writes


def pictures(root: Path) -> Path:
    """Two classes of 30 small pictures."""
    noise = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(30):
            pixels = noise.integers(0, 200, (8, 8), dtype=np.uint8) + np.uint8(40 * label)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    scenes(root.parent / "scenes")
    rows = [f"{path.relative_to(root.parent)},{noise.random():.4f},{360 * noise.random():.2f},{'ab'[noise.integers(2)]}"
            for path in sorted(root.rglob("*.png"))]  # fmt: skip
    (root.parent / "numbers.csv").write_text("\n".join(["path,level,turn,marks", *rows]) + "\n")
    for number in range(60):
        (root.parent / "people" / f"s{number % 10}").mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 100, (8, 8), dtype=np.uint8) + np.uint8(15 * (number % 10))
        Image.fromarray(pixels).save(root.parent / "people" / f"s{number % 10}" / f"{number}.png")
    return root


def scenes(root: Path) -> None:
    """40 pictures with a bright box each, as VOC has them."""
    noise = np.random.default_rng(1)
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    for number in range(40):
        pixels = noise.integers(0, 60, (16, 16), dtype=np.uint8)
        x, y = noise.integers(0, 9, 2).tolist()
        pixels[y : y + 6, x : x + 6] = 200
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{number}.png")
        box = f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 6}</xmax><ymax>{y + 6}</ymax>"
        written = f"<object><name>box</name><bndbox>{box}</bndbox></object>"
        (root / "Annotations" / f"{number}.xml").write_text(f"<annotation>{written}</annotation>")


def config(folder: Path, root: Path, case: tuple[int, int, str]) -> schema.Experiment:
    """A case's experiment, with a cache of its own in `root`, so that its pictures are decoded there."""
    workers, accumulate, kind = case
    text = {"detect": DETECT, "verify": VERIFY, "regress": REGRESS, "multilabel": LABELS}.get(kind, CONFIG)
    places = {name: folder.parent / name for name in ("scenes", "people")} | {"numbers": folder.parent / "numbers.csv"}
    text = text.format(pictures=folder, cache=root / "cache", **places)
    if kind == "dropout":
        text = text.replace("  - flatten\n", "  - dropout: 0.3\n  - flatten\n")
    cached = "disk" if accumulate == 1 else "none"
    more = ["name=c", f"data.workers={workers}", f"train.accumulate={accumulate}", f"data.cache={cached}"]
    return schema.parse(text, "c.yaml", [*KINDS[kind], *more])


def digest(root: Path) -> str:
    """Of everything that must be equal: all tensors, counters and offsets, the metrics' bytes, what is pointed at."""
    run = root / "runs" / "c" / "1"
    found = hashlib.sha256()
    for pointer in ("latest", "best"):
        name = checkpoints.pointed_at(run / "checkpoints", pointer)
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


def _training(made: schema.Experiment, root: Path, fatal: int | None) -> int:
    """Train in this process; the call number `fatal` that writes is never made. Gives how many there were."""
    calls = 0
    lock = threading.Lock()

    def count() -> None:
        nonlocal calls
        with lock:
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(real):
        def call(*arguments, **settings):
            count()
            return real(*arguments, **settings)

        return call

    for name in ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir", "pwrite", "write", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))

    def in_halves(descriptor, data):
        os.write(descriptor, data[: len(data) // 2])
        os.write(descriptor, data[len(data) // 2 :])

    atomic_files._write_all = in_halves
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    train_run(made, root / "runs", torch.device("cpu"), resume=True)
    return calls


@dataclass
class Whole:
    """A case that was left alone: what it gave, how long it took, how many calls wrote."""

    digest: str
    seconds: float
    calls: int


def whole(folder: Path, case: tuple[int, int, str]) -> Whole:
    from several import outcome

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = config(folder, root, case)
        began = time.monotonic()
        calls = outcome(*forked(lambda: _training(made, root, None)))
        assert isinstance(calls, int), calls
        assert calls > 0, f"killed by signal {-calls}"
        return Whole(digest(root), time.monotonic() - began, calls)


@dataclass
class Story:
    """What became of a training that was killed again and again."""

    case: tuple[int, int, str]
    kills: int = 0
    starts: int = 0
    found: str = ""
    trouble: list[str] = field(default_factory=list)


def killed(
    folder: Path, case: tuple[int, int, str], expected: Whole, kills: int, how: str, seed: int, early: float = 1.0
) -> Story:
    """Kill a training `kills` times, each at a new random point, then let it end.

    `early` is the part of an undisturbed run in which kills come: less makes room for more of them.
    """
    draw, story = random.Random(seed), Story(case)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = config(folder, root, case)
        while True:
            last = story.kills >= kills
            story.starts += 1
            status = _once(made, root, expected, draw, None if last else how, early)
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
            story.found = digest(root)
        except (AssertionError, OSError) as error:
            story.trouble.append(str(error))
    if story.found != expected.digest:
        story.trouble.append("not what an undisturbed run gives")
    return story


def _once(
    made: schema.Experiment, root: Path, expected: Whole, draw: random.Random, how: str | None, early: float
) -> int:
    """Start the training; gives the signal that ended it, 0 for a good end, -1 for a bad one."""
    fatal = draw.randint(1, int(expected.calls * early)) if how == "write" else None
    pid, pipe = forked(lambda: _training(made, root, fatal))
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
    """Trainings over all cases and ways to be killed, until there were so many kills; chains of up to `most`."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pictures(Path(name) / "pictures")
        expected = {case: whole(folder, case) for case in CASES}
        done = 0
        for number in itertools.count():
            case, how = CASES[number % len(CASES)], HOWS[number // len(CASES) % 2]
            wanted = min(draw.randint(1, most), kills - done)
            story = killed(folder, case, expected[case], wanted, how, draw.getrandbits(32))
            done += story.kills
            yield story
            if done >= kills:
                return
