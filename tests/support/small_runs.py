"""Small trained runs for tests: of TINY, of a network with links by name and parallel branches, and of every task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnnrun.experiment import config_file
from cnnrun.explain import run as opening
from cnnrun.explain import run_method
from cnnrun.explain.method_base import ExplainMethod
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints
from tests.support.configs import LINKED, TINY, case_config, tiny_experiment
from tests.support.images import write_pictures

TASKS = ("classify", "multilabel", "regress", "detect", "verify", "segment")


def train_tiny(root: Path, *overrides: str) -> Path:
    """Train TINY with these overrides and return the run folder."""
    return Path(train_run(tiny_experiment(*overrides), root, torch.device("cpu"), resume=False)["run"])


def train_from_weights(run: Path, root: Path, *overrides: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Train the layers of TINY for one epoch from the weights of a run. Return the new run and its first tensors."""
    layers = TINY[TINY.index("model:\n") + 7 : TINY.index("train:")].replace("  - ", "    - ")
    text = TINY.replace(
        TINY[TINY.index("model:\n") : TINY.index("train:")], f"model:\n  layers:\n{layers}  weights: {run}\n"
    )
    tried = config_file.parse_config(text, "f", ["name=given", "train.epochs=1", *overrides])
    made = Path(train_run(tried, root, torch.device("cpu"), resume=False)["run"])
    return made, checkpoints.load_newest(made / "checkpoints", "latest", pytest.fail).parts["model"]


def train_linked(root: Path) -> Path:
    """Train LINKED and return the run folder."""
    made = config_file.parse_config(LINKED, "linked.yaml")
    return Path(train_run(made, root, torch.device("cpu"), resume=False)["run"])


def train_each_task(root: Path) -> dict[str, Path]:
    """Train a short run of each task on small images."""
    folder = write_pictures(root / "pets")
    kinds = {"classify": "dropout"}
    found = {}
    for task in TASKS:
        made = case_config(folder, root, (0, 2, kinds.get(task, task))).model_copy(update={"name": task})
        found[task] = Path(train_run(made, root / "runs", torch.device("cpu"), resume=False)["run"])
    return found


def open_run(run: Path) -> opening.OpenRun:
    """Open a run on the CPU as the commands do."""
    return opening.open_run(run, Path("runs"), torch.device("cpu"))


def explain_run(method: ExplainMethod, run: Path, out: Path | None = None, root: Path = Path("runs")) -> dict:
    """Run an explanation method on the CPU and return the data of its command."""
    return run_method.explain_run(method, run, root, torch.device("cpu"), out)
