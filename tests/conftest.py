"""Shared fixtures: a tiny config, runs trained once, the command line in this process."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnnrun.base.device import choose_device
from cnnrun.commands import app
from cnnrun.data.settings import Data
from tests.support.configs import TINY
from tests.support.forked_python import run_python
from tests.support.images import save_class_folders
from tests.support.pretended_gpu import some_gpu

Cli = Callable[..., tuple[int, str, str]]


def pytest_sessionstart() -> None:
    """Collect no garbage while tests are collected: it would take a third of the time and find none."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Exempt imported modules and collected tests from garbage collection, in this process and its forks."""
    gc.freeze()
    gc.enable()


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
    from tests.support.small_runs import train_tiny

    return train_tiny(tmp_path_factory.mktemp("trained"), "train.epochs=12")


@pytest.fixture(scope="session")
def linked_run(tmp_path_factory) -> Path:
    """A run of a network with links by name and parallel branches."""
    from tests.support.small_runs import train_linked

    return train_linked(tmp_path_factory.mktemp("linked"))


@pytest.fixture(scope="session")
def of_each_task(tmp_path_factory) -> dict[str, Path]:
    """A run of each task, trained once for all tests that only read it."""
    from tests.support.small_runs import train_each_task

    return train_each_task(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def forked_pickle_reader(monkeypatch) -> None:
    """Fork the process that reads a foreign pickle, where a test is about what it reads and not how it is started."""

    def run(command: list[str], *, cwd: str, env: dict[str, str], timeout: float, **_: bool) -> object:
        return run_python(command[1:], Path(cwd), env, timeout=timeout)

    forked = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr("cnnrun.model.untrusted_pickle.subprocess", forked)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A real GPU, or a pretended one in a rehearsal (see `some_gpu`)."""
    with some_gpu() as device:
        yield device


@pytest.fixture
def real_gpu() -> torch.device:
    """A real GPU; the test is skipped without one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and cannot be rehearsed without one")
    return choose_device("cuda")


@pytest.fixture
def picture_folder(tmp_path) -> Path:
    """Two class folders of 12 images each, without splits."""
    return save_class_folders(tmp_path / "pets", count=12, size=(12, 10))


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    """Give the tests a cache of their own, so that none reads or fills the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def cache_folder(tmp_path) -> Path:
    """Folder for caches."""
    return tmp_path / "cache"


@pytest.fixture
def blocked_data(picture_folder, cache_folder, monkeypatch) -> Data:
    """24 valid images and one invalid image, in blocks of four."""
    from tests.support.cached_dataset import data_in_blocks

    return data_in_blocks(picture_folder, cache_folder, monkeypatch)


@pytest.fixture
def bundles(tmp_path, monkeypatch) -> list[str]:
    """A list with one item for each build of the chart script."""
    from tests.support.cached_dataset import record_bundles

    return record_bundles(tmp_path / "home", monkeypatch)
