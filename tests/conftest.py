"""Shared: a tiny config, a run trained once, the command line in this process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from pretended_gpu import pretended_gpu

from cnnrun.base.device import choose
from cnnrun.commands import app

TINY = """
task: classify
data: {source: digits, split: {val: 0.2, test: 0.2}}
model:
  - conv: {out_channels: 4, norm: batch, activation: relu}
  - max_pool
  - flatten
  - dropout: 0.1
  - linear: {out_features: 16, activation: relu}
train: {epochs: 2, batch: 64, monitor: val/accuracy}
"""

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
    # The first backward pass decides whether autograd has threads of its own, which forked tests cannot have: an export
    # before it makes it so.
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def run_cli(capfd, monkeypatch) -> Cli:
    """`run_cli("train", path)` -> (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cnnrun", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            app.main()
        captured = capfd.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """The run folder of TINY, trained once for all tests that only read it."""
    from cnnrun.experiment import schema
    from cnnrun.results.train_run import train_run

    root = tmp_path_factory.mktemp("trained")
    tried = schema.parse(TINY, "tiny.yaml", ["name=tiny", "train.epochs=12"])
    return Path(train_run(tried, root, torch.device("cpu"), resume=False)["run"])


@pytest.fixture(scope="session")
def linked_run(tmp_path_factory) -> Path:
    """A run of a network with links by name and parallel branches."""
    from explained import linked

    return linked(tmp_path_factory.mktemp("linked"))


@pytest.fixture(scope="session")
def of_each_task(tmp_path_factory) -> dict[str, Path]:
    """A run of each task, trained once for all tests that only read it."""
    from explained import one_of_each

    return one_of_each(tmp_path_factory.mktemp("tasks"))


REHEARSAL = "CNNRUN_CUDA_REHEARSAL"


@contextmanager
def some_gpu() -> Iterator[torch.device]:
    """A GPU; with CNNRUN_CUDA_REHEARSAL=1, where there is none, one that is pretended inside."""
    if torch.cuda.is_available():
        yield choose("cuda")
    elif os.environ.get(REHEARSAL) == "1":
        with pretended_gpu():
            yield choose("cuda")
    else:
        pytest.skip(f"needs a CUDA device; {REHEARSAL}=1 rehearses it on a pretended one")


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """See `some_gpu`."""
    with some_gpu() as device:
        yield device


@pytest.fixture
def real_gpu() -> torch.device:
    """A GPU that is there."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and cannot be rehearsed without one")
    return choose("cuda")


def save_picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    """A picture file of random pixels; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Pil.fromarray(pixels).save(path)
    return path


@pytest.fixture
def picture_folder(tmp_path) -> Path:
    """Two classes in folders, 12 pictures each, no splits."""
    root = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog")):
        for number in range(12):
            save_picture(root / name / f"{number}.png", seed=100 * label + number)
    return root


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
