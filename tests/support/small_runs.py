"""Networks for the tests of explanations: with links by name and parallel branches, for every task."""

from __future__ import annotations

from pathlib import Path

import torch

from cnnrun.experiment import schema
from cnnrun.explain import run_method
from cnnrun.results import operations
from tests.support.configs import LINKED, case_config
from tests.support.images import write_pictures

TASKS = ("classify", "multilabel", "regress", "detect", "verify")


def train_linked(root: Path) -> Path:
    """The run folder of LINKED, trained."""
    made = schema.parse(LINKED, "linked.yaml")
    return Path(operations.train(made, root, torch.device("cpu"), resume=False)["run"])


def train_each_task(root: Path) -> dict[str, Path]:
    """A run of each task, of small pictures, trained shortly."""
    folder = write_pictures(root / "pets")
    kinds = {"classify": "dropout"}
    found = {}
    for task in TASKS:
        made = case_config(folder, root, (0, 2, kinds.get(task, task))).model_copy(update={"name": task})
        found[task] = Path(operations.train(made, root / "runs", torch.device("cpu"), resume=False)["run"])
    return found


def open_run(run: Path, **asked) -> run_method.Opened:
    """A run opened as the commands open it, on the CPU."""
    return run_method.opened(run_method.Asked(run, Path("runs"), torch.device("cpu"), **asked))
