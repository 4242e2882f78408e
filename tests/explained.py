"""Networks for the tests of explanations: with links by name and parallel branches, for every task."""

from __future__ import annotations

from pathlib import Path

import killing
import torch

from cnnrun.experiment import schema
from cnnrun.explain import run_method
from cnnrun.explain.method_base import ExplainMethod
from cnnrun.results.train_run import train_run

LINKED = """
task: classify
name: linked
data: {source: digits, split: {val: 0.2, test: 0.1}}
model:
  - conv: {out_channels: 8, activation: relu, name: stem}
  - max_pool
  - parallel:
      branches:
        - [{conv: {out_channels: 4, kernel_size: 1, activation: relu}}]
        - [{conv: {out_channels: 4, norm: batch, activation: relu}}, {conv: {out_channels: 4, activation: relu}}]
      merge: concat
  - residual: [{conv: {out_channels: 8, norm: batch, activation: relu}}, {conv: {out_channels: 8, norm: batch}}]
  - repeat: {times: 2, layers: [{conv: {out_channels: 8, activation: relu}}]}
  - upsample: {scale_factor: 2, name: up}
  - concat: [up, stem]
  - conv: {out_channels: 12, activation: relu, name: last}
  - global_avg_pool
  - dropout: 0.1
train: {epochs: 4, batch: 64, keep: 9, monitor: val/accuracy}
"""
TASKS = ("classify", "multilabel", "regress", "detect", "verify")


def linked(root: Path) -> Path:
    """The run folder of LINKED, trained."""
    made = schema.parse(LINKED, "linked.yaml")
    return Path(train_run(made, root, torch.device("cpu"), resume=False)["run"])


def one_of_each(root: Path) -> dict[str, Path]:
    """A run of each task, of small pictures, trained shortly."""
    folder = killing.pictures(root / "pets")
    kinds = {"classify": "dropout"}
    found = {}
    for task in TASKS:
        made = killing.config(folder, root, (0, 2, kinds.get(task, task))).model_copy(update={"name": task})
        found[task] = Path(train_run(made, root / "runs", torch.device("cpu"), resume=False)["run"])
    return found


def opened(run: Path) -> run_method.OpenRun:
    """A run opened as the commands open it, on the CPU."""
    return run_method.open_run(run, Path("runs"), torch.device("cpu"))


def explained(method: ExplainMethod, run: Path, out: Path | None = None, root: Path = Path("runs")) -> dict:
    """What the command of a method returns, on the CPU."""
    return run_method.explain_run(method, run, root, torch.device("cpu"), out)
