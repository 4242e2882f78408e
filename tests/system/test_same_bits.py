"""Equal weights for any number of decoding workers, any prefetch and any kind of cache."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cnnrun.base.errors import InterruptionError
from cnnrun.experiment import config_file
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.learner import Learner
from tests.support.images import save_picture

CONFIG = """
task: classify
data:
  source: {{folder: {root}}}
  image: {{size: 12, channels: 3}}
  augment: {{flip: horizontal, shift: 0.1, rotate: 10, brightness: 0.2, contrast: 0.2, saturation: 0.2, mixup: 0.2}}
  split: {{val: 0.2}}
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - max_pool
  - flatten
  - dropout: 0.2
train: {{epochs: 5, batch: 8, sampler: balanced}}
"""
CASES = [
    *itertools.product((0, 1, 2, 4), (0, 3), ("disk", "none")),
    *itertools.product((0, 2), (0, 3), ("memory",)),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pets")
    for label, name in enumerate(("cat", "dog", "fox")):
        for number in range(40 - 12 * label):
            save_picture(root / name / f"{number}.jpg", seed=100 * label + number, size=(20, 16))
    return root


def digest(run: Path) -> str:
    """Digest of all weights after the last step and of the metrics file."""
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text()
    tensors = safetensors.torch.load_file(latest / "model.safetensors")
    made = hashlib.sha256((run / "metrics.jsonl").read_bytes())
    for name in sorted(tensors):
        made.update(name.encode() + tensors[name].numpy().tobytes())
    return made.hexdigest()


def config(root: Path, tmp_path: Path, workers: int, prefetch: int, kind: str, *more: str):
    settings = [f"data.workers={workers}", f"data.prefetch={prefetch}", f"data.cache={kind}"]
    return config_file.parse_config(
        CONFIG.format(root=root), "c.yaml", ["name=c", f"data.cache_dir={tmp_path / 'cache'}", *settings, *more]
    )


def train_config(experiment, runs: Path, resume: bool = False) -> Path:
    return Path(train_run(experiment, runs, torch.device("cpu"), resume)["run"])


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory) -> str:
    there = tmp_path_factory.mktemp("expected")
    run = train_config(config(root, there, 0, 0, "disk"), there / "runs")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5
    return digest(run)


@pytest.mark.parametrize(("workers", "prefetch", "kind"), CASES)
def test_workers_prefetch_and_cache_change_no_bit(root, expected, tmp_path, workers, prefetch, kind):
    assert digest(train_config(config(root, tmp_path, workers, prefetch, kind), tmp_path / "runs")) == expected


def test_changing_workers_prefetch_and_cache_at_a_resume_changes_no_bit(root, expected, tmp_path, monkeypatch):
    """The run stops at steps 7 and 19 and resumes with other workers, another prefetch and another cache."""
    import signal

    steps = 0
    update = Learner.update_weights

    def counted(*arguments):
        nonlocal steps
        update(*arguments)
        steps += 1
        if steps in (7, 19):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Learner, "update_weights", counted)
    for workers, prefetch, kind in ((0, 0, "memory"), (2, 3, "none")):
        with pytest.raises(InterruptionError):
            train_config(config(root, tmp_path, workers, prefetch, kind), tmp_path / "runs", resume=True)
    run = train_config(config(root, tmp_path, 4, 1, "disk"), tmp_path / "runs", resume=True)
    assert run.name == "1"
    assert digest(run) == expected


def test_another_augmentation_or_sampler_changes_the_digest(root, expected, tmp_path):
    assert (
        digest(train_config(config(root, tmp_path, 0, 0, "disk", "data.augment.shift=0.2"), tmp_path / "runs"))
        != expected
    )
    other = config(root, tmp_path, 0, 0, "disk", "train.sampler=uniform")
    assert digest(train_config(other, tmp_path / "runs")) != expected
