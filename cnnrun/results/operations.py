"""What the commands do, as functions that return plain data; the command line prints it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnnrun.base import torchrun
from cnnrun.base.atomic_files import Folder, write_text
from cnnrun.base.bounded_files import read_text
from cnnrun.base.device import forget_peak_memory
from cnnrun.base.errors import CheckpointError, ConfigError
from cnnrun.base.progress import say
from cnnrun.base.ranks import Ranks, joined
from cnnrun.contracts.layer import Facts
from cnnrun.contracts.task import Level
from cnnrun.data.dataset import Dataset, Index, index, remarks
from cnnrun.data.image_paths import list_images
from cnnrun.data.prepare import fingerprint, refuse_bad_boxes, refuse_missing_files
from cnnrun.experiment import import_weights
from cnnrun.experiment.assemble import create, dataset, eval_data, fitting, initial, job, network, trained, usable
from cnnrun.experiment.learnable import measurable, notes_on_classes, refuse_unlearnable, same_everywhere
from cnnrun.experiment.resume import (
    find_resumable,
    refuse_changed_data,
    refuse_unrepeatable,
    same_weights,
    saved_in,
    unchanged,
)
from cnnrun.experiment.schema import Experiment, parse
from cnnrun.explain.figures.network_svg import svg
from cnnrun.explain.figures.panels import drawing
from cnnrun.explain.figures.png import written
from cnnrun.export import MIN_SAMPLES, Format, export
from cnnrun.model import weights_file
from cnnrun.model.network import Built, flops
from cnnrun.model.outline import outline, text
from cnnrun.model.weights_file import How, Weights
from cnnrun.results.predict import coco_results, drawn_into, predict, with_scores
from cnnrun.results.studies.plan_records import beside_the_plan
from cnnrun.tasks.intervals import intervals
from cnnrun.training import run_folder
from cnnrun.training.evaluate import evaluate as measure_split
from cnnrun.training.loop import fit
from cnnrun.training.run_records import CHECKPOINTS, CONFIG, EXPORTS, read_result


def train(
    experiment: Experiment,
    root: Path,
    device: torch.device,
    resume: bool,
    strict: bool = False,
    enough: Callable[[int, float], bool] | None = None,
) -> dict[str, Any]:
    """Train to the end in a run folder; returns what was reached. `strict` refuses to go on with anything but the same.

    `enough` is asked after each epoch whether the training may end there: see `Job`. Of several ranks all come here;
    the first makes the run folder and writes. To resume a run that is finished already trains nothing.
    """
    forget_peak_memory(device)
    if strict:
        refuse_unrepeatable(experiment, device)
    if torchrun.restarted() and not resume:
        say("torchrun started this again: going on as with --resume")
        resume = True
    with joined(device, experiment.train.timeout) as ranks, ExitStack() as stack:
        left = ranks.from_first(lambda: _left(experiment, root, resume, strict))
        if left and "finished" in left:
            return {"run": left["run"], "already_finished": True, **left["finished"]}
        begun = _begin(experiment, root, left, ranks)
        run, opened = begun.run, list[Folder]()
        ranks.from_first(lambda: opened.append(stack.enter_context(run_folder.held(run))))
        if done := ranks.from_first(lambda: read_result(run)):
            say(f"{run} was finished by another process meanwhile")
            return {"run": str(run), "already_finished": True, **done}
        folder = opened[0] if opened else None
        saved = saved_in(folder, begun.data, ranks) if resume else None
        where = run_folder.environment(device, ranks.size)
        ranks.from_first(lambda: unchanged(opened[0], where, strict))
        made = job(begun.experiment, begun.data, begun.initial, folder, device, ranks, enough)
        result = fit(replace(made, draw=drawing), saved)
        if folder and saved is None:  # of a run that was resumed no one knows how long it took
            beside_the_plan(begun.experiment, root, folder, where, result)
        return {"run": str(run), **result}


@dataclass(frozen=True)
class _Begun:
    """A run whose folder is there: its config, the weights that it begins with where any are given, its data."""

    experiment: Experiment
    initial: Weights | None
    data: Dataset
    run: Path


def _begin(experiment: Experiment, root: Path, left: dict[str, Any] | None, ranks: Ranks) -> _Begun:
    """Prepare the run that was `left` unfinished, or make a new one once everything is known to fit."""
    # A run that has a checkpoint no longer needs the weights it began with.
    given = None if left and left["saved"] else initial(experiment)
    if left:
        experiment = experiment.with_statistics_of(parse(left["config"], str(Path(left["run"]) / CONFIG)))
    if left and given:
        same_weights(Path(left["run"]), given)
    experiment = experiment.with_weights_of(given.facts if given else None)
    data = _learnable(experiment, given, ranks)
    run = left["run"] if left else ranks.from_first(lambda: str(create(experiment, data, given, root)))
    return _Begun(experiment, given, data, Path(run))


def _learnable(experiment: Experiment, given: Weights | None, ranks: Ranks) -> Dataset:
    """The data, decoded, once everything is known to fit: nothing is made on the disk for what cannot be trained."""
    data = dataset(experiment)
    for note in data.notes:
        say(f"data: {note}")
    refuse_unlearnable(experiment, data, given, ranks.size)
    for note in notes_on_classes(experiment, data):
        say(f"data: {note}")
    ranks.wait(patiently=True)
    same_everywhere(data, ranks)
    return data


def _left(experiment: Experiment, root: Path, resume: bool, strict: bool) -> dict[str, Any] | None:
    """The run to go on with, or the finished one and what it reached, as the ranks tell each other."""
    found = find_resumable(experiment, root, resume, strict)
    if found is None:
        return None
    if found.is_finished:
        return {"run": str(found.run), "finished": _reached(experiment, found.run)}
    saved = (found.run / CHECKPOINTS / "latest").exists()
    config = read_text(found.run / CONFIG, CheckpointError, folder=Folder(found.run))
    return {"run": str(found.run), "config": config, "saved": saved}


def _reached(experiment: Experiment, run: Path) -> dict[str, Any]:
    """Read what a finished run of this config reached. Raises CheckpointError where data or weights changed since."""
    if given := initial(experiment):
        same_weights(run, given)
    refuse_changed_data(run, fingerprint(experiment.data, index(experiment.data)))
    try:
        reached = read_result(run)
    except CheckpointError as error:
        raise CheckpointError(f"{error.lines[0]}; remove it, and --resume writes it anew") from None
    assert reached is not None
    return reached


def evaluate(
    target: Path | None, root: Path, device: torch.device, split: str | None, plots: Path | None = None
) -> dict[str, Any]:
    """A trained network's numbers on a split, with figures in a folder `plots`; of several ranks all come here."""
    experiment, given = trained(target, root, device)
    name, data = eval_data(experiment, given, split)
    examples, batch = data.splits[name], experiment.train.batch
    with joined(device, experiment.train.timeout) as ranks:
        ranks.wait(patiently=True)
        criterion = None if given.task.open_set else given.criterion
        measured = measure_split(given.network, criterion, given.task, given.facts, examples, batch, device, ranks)
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


def predicted(
    target: Path | None,
    root: Path,
    device: torch.device,
    paths: Sequence[Path],
    batch: int,
    score: Sequence[str],
    draw: Path | None,
    coco: Path | None,
) -> Iterator[dict[str, Any]]:
    """A row a picture as `predict.predict` gives them; drawn into a folder and written as COCO results where asked."""
    given = usable(target, root, device)
    if (score or draw or coco) and given.task.targets != "boxes":
        raise ConfigError(f"--score, --draw and --coco are for boxes; {given.task.kind} finds none")
    given = replace(given, task=with_scores(given.task, score, given.facts))
    if coco and (coco.exists() or not coco.parent.is_dir()):
        raise ConfigError(f"--coco {coco}: {'is there already' if coco.exists() else 'no such folder'}; choose another")
    found: list[dict[str, Any]] = []
    drawn, boxes = drawn_into(draw, given.image), given.task.targets == "boxes"
    for row in predict(given, list_images(paths), batch):
        drawn(row)
        if coco:
            found += coco_results(row)
        yield {"objects": [], **row} if boxes else row
    if coco:
        write_text(coco, json.dumps(found) + "\n")


def exported(form: Format, target: Path | None, root: Path, split: str | None, out: Path | None) -> dict[str, Any]:
    """Write a trained network in a format; returns how it compares."""
    experiment, given = trained(target, root, torch.device("cpu"))
    name, data = eval_data(experiment, given, split, at_least=MIN_SAMPLES)
    path = out or given.run / EXPORTS / f"model{form.suffix}"
    if path.suffix != form.suffix or path.is_dir():
        raise ConfigError(f"--out {path}: give a file that ends in {form.suffix}")
    ordered = [name, *(other for other in data.splits if other != name)]
    splits = {each: data.splits[each] for each in ordered}
    return {"path": str(path), **export(form, given, splits, path, experiment.train.batch)}


def imported(
    path: Path, like: str, how: How, classes: str | None, drop: Sequence[str], out: Path | None
) -> dict[str, Any]:
    """Turn a foreign state dict into a weights file; returns what it holds."""
    target = out or Path(f"{Path(like).stem}.safetensors")
    if target.suffix != ".safetensors":
        raise ConfigError(f"--out {target}: a weights file ends in .safetensors")
    made = import_weights.imported(path, like, how, classes, drop)
    weights_file.write(target, made.tensors, made.about, made.facts)
    return {
        "path": str(target),
        "tensors": len(made.tensors),
        "parameters": made.parameters,
        "classes": list(made.facts.classes),
    }


def checked(experiment: Experiment, decode: bool = True) -> dict[str, Any]:
    """Everything that training would refuse, without a step; unless `decode`, all but what only the pixels can tell."""
    given = initial(experiment)
    experiment = experiment.with_weights_of(given.facts if given else None)
    indexed = index(experiment.data)
    if decode:
        data = dataset(experiment, indexed)
        built, facts = refuse_unlearnable(experiment, data, given), data.facts
        targets, notes = data.splits["train"].all_targets(), [*data.notes, *notes_on_classes(experiment, data)]
    else:
        built, facts, targets = _fits_undecoded(experiment, indexed, given)
        notes = [*remarks(indexed), "pictures were not decoded: damaged files and duplicates are not looked for"]
    levels = [Level(each.shape, each.field, each.stride) for each in built.levels]
    return {
        "name": experiment.name,
        "classes": list(facts.classes),
        "numbers": [asdict(number) for number in facts.numbers],
        "image": list(facts.image),
        "counts": facts.counts,
        "parameters": built.parameters,
        "flops": sum(flops(built)),
        "steps": experiment.train.steps_per_epoch(facts.counts["train"]) * experiment.train.epochs,
        "decoded": decode,
        "remarks": [*notes, *experiment.task.remarks(levels, targets, facts)],
    }


def _fits_undecoded(
    experiment: Experiment, indexed: Index, given: Weights | None
) -> tuple[Built, Facts, dict[str, Tensor]]:
    facts, image = _facts(experiment), experiment.data.image
    refuse_bad_boxes(indexed, experiment.data.bad_boxes)
    refuse_missing_files(indexed, experiment.data.bad_files)
    built = fitting(experiment, facts, given)
    targets = {name: indexed.targets(name, facts.image, image) for name in indexed.splits}
    measurable(experiment, targets)
    return built, facts, targets["train"]


def summary(experiment: Experiment) -> dict[str, Any]:
    """The network, a row a layer, sized for the config's data."""
    facts = _facts(experiment)
    built = network(experiment, facts)
    rows = [asdict(row) | {"flops": count} for row, count in zip(built.rows, flops(built), strict=True)]
    totals = {key: sum(row[key] for row in rows) for key in ("parameters", "flops", "activation_bytes")}
    return {"name": experiment.name, "image": list(facts.image), "layers": rows, "total": totals}


def diagram(experiment: Experiment) -> tuple[str, str]:
    """The network as text and as SVG."""
    facts = _facts(experiment)
    parts = outline(network(experiment, facts), experiment.task.kind)
    return text(parts), svg(parts, experiment.name)


def _facts(experiment: Experiment) -> Facts:
    """What is known of the data once its files are listed."""
    indexed, shape = index(experiment.data), experiment.data.image_shape()
    assert shape is not None, "experiment.load refuses a config without a picture size"
    return Facts(
        indexed.source.classes,
        shape,
        class_counts=indexed.class_counts(),
        counts=indexed.counts,
        numbers=indexed.numbers(),
    )
