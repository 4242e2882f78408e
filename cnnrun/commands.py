"""What the commands do, as functions that return plain data; the command line prints it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrun import runs
from cnnrun.assemble import dataset, eval_data, job, network, start, trained
from cnnrun.contracts import Facts, Split
from cnnrun.dataset import index
from cnnrun.errors import ConfigError
from cnnrun.evaluate import evaluate as measure_split
from cnnrun.experiment import Experiment
from cnnrun.export import Format, export
from cnnrun.learner import check
from cnnrun.train import fit


def train(experiment: Experiment, root: Path, device: torch.device, resume: bool) -> dict[str, Any]:
    """Train to the end in a run folder; returns what was reached."""
    data = dataset(experiment)
    run, saved = start(experiment, root, resume)
    with runs.held(run):
        runs.write_json(run / "environment.json", runs.environment(device))
        return {"run": str(run), **fit(job(experiment, data, run, device), saved)}


def evaluate(target: Path | None, root: Path, device: torch.device, split: str | None) -> dict[str, Any]:
    """A trained network's numbers on a split."""
    experiment, given = trained(target, root, device)
    name, data = eval_data(experiment, given, split)
    criterion = experiment.task.criterion(given.facts).to(device)
    measured = measure_split(
        given.network, criterion, given.task, given.facts, data.splits[name], experiment.train.batch, device
    )
    return {
        "run": str(given.run),
        "step": given.step,
        "split": name,
        "samples": len(data.splits[name]),
        "numbers": measured.numbers,
        "tables": measured.tables,
        "matrices": measured.matrices,
    }


def exported(form: Format, target: Path | None, root: Path, split: str | None, out: Path | None) -> dict[str, Any]:
    """Write a trained network in a format; returns how it compares."""
    experiment, given = trained(target, root, torch.device("cpu"))
    name, data = eval_data(experiment, given, split)
    path = out or given.run / "exports" / f"model{form.suffix}"
    return {"path": str(path), **export(form, given, data.splits[name], name, path, experiment.train.batch)}


def checked(experiment: Experiment) -> dict[str, Any]:
    """Everything that can be known without decoding a picture or taking a step."""
    indexed, splits = index(experiment.data)
    shape = experiment.data.image_shape()
    assert shape is not None
    counts = {name: len(rows) for name, (_, rows) in splits.items()}
    facts = Facts(indexed.classes, shape, counts=counts, class_counts=_class_counts(splits, len(indexed.classes)))
    if problem := experiment.task.problem(facts):
        raise ConfigError(f"task: {problem}")
    built = network(experiment, facts)
    check(experiment.train, counts["train"], built.network)
    return {
        "name": experiment.name,
        "classes": list(indexed.classes),
        "image": list(shape),
        "counts": counts,
        "parameters": built.parameters,
        "flops": sum(row.flops for row in built.rows),
        "steps": experiment.train.steps_per_epoch(counts["train"]) * experiment.train.epochs,
    }


def summary(experiment: Experiment) -> dict[str, Any]:
    """The network, a row a layer, sized for the config's data."""
    indexed, _ = index(experiment.data)
    shape = experiment.data.image_shape()
    assert shape is not None
    built = network(experiment, Facts(indexed.classes, shape))
    rows = [asdict(row) for row in built.rows]
    totals = {key: sum(row[key] for row in rows) for key in ("parameters", "flops", "activation_bytes")}
    return {"name": experiment.name, "image": list(shape), "layers": rows, "total": totals}


def _class_counts(splits: dict[str, tuple[Split, Tensor]], classes: int) -> tuple[int, ...]:
    split, rows = splits["train"]
    if "labels" not in split.targets:
        return ()
    return tuple(torch.bincount(split.targets["labels"][rows], minlength=classes).tolist())
