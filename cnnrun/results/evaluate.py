"""A trained network measured on a split, with intervals and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cnnrun.base.ranks import joined
from cnnrun.experiment.open_run import eval_data, trained
from cnnrun.explain.figures.png import written
from cnnrun.tasks.intervals import intervals
from cnnrun.training.evaluate import evaluate


def evaluate_run(
    target: Path | None, root: Path, device: torch.device, split: str | None, plots: Path | None = None
) -> dict[str, Any]:
    """A trained network's numbers on a split, with figures in a folder `plots`; of several ranks all come here."""
    experiment, given = trained(target, root, device)
    name, data = eval_data(experiment, given, split)
    examples, batch = data.splits[name], experiment.train.batch
    with joined(device, experiment.train.timeout) as ranks:
        ranks.wait(patiently=True)
        criterion = None if given.task.open_set else given.criterion
        measured = evaluate(given.network, criterion, given.task, given.facts, examples, batch, device, ranks)
    return {
        "run": str(given.run),
        "step": given.step,
        "split": name,
        "samples": len(data.splits[name]),
        "numbers": measured.numbers,
        "intervals": intervals(measured.numbers, measured.spread, measured.right),
        "tables": measured.tables,
        "matrices": measured.matrices,
        **({"plots": written(measured.plots, plots)} if plots else {}),
    }
