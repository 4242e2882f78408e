"""`cnnrun plan`: how long a training will take and how much memory, from a short one of the same config."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cnnrun.base.atomic_files import Folder, json_bytes, make_folder, storage_errors, write_json
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.device import peak_memory_mib
from cnnrun.base.errors import CheckpointError
from cnnrun.base.progress import say
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.source import SourceContents, Split
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.file_listing import list_files
from cnnrun.data.index import SourceIndex, index_source
from cnnrun.data.storage import is_cached
from cnnrun.experiment.assemble import assemble_job, build_checked_network, load_initial_weights, prepare_dataset
from cnnrun.experiment.schema import Experiment
from cnnrun.model.weights_file import Weights
from cnnrun.training.loop import fit
from cnnrun.training.run_folder import describe_environment
from cnnrun.training.run_records import MAX_JSON_BYTES, PLAN

_SECONDS = 8.0  # of training that is measured, and half of that of val, as far as one step tells
_EPOCHS = 10  # at most
_PICTURES = 1024  # of each split that are decoded where they are not yet
_VAL = 2000  # pictures of val that are measured on


def plan_training(experiment: Experiment, device: torch.device, root: Path) -> dict[str, Any]:
    """Measure, foretell, and keep what was foretold for the training of this config that may follow."""
    began = time.perf_counter()
    given = load_initial_weights(experiment)
    experiment = experiment.with_statistics_of_weights(given.facts if given else None)
    indexed = index_source(experiment.data)
    missing = {name: _missing(experiment, split) for name, split in indexed.contents.splits.items()}
    few = _few(indexed) if any(missing.values()) else indexed
    decoding = time.perf_counter()
    # What is not decoded yet stays so: the cache is left alone.
    settings = experiment.data.model_copy(update={"cache": "memory"}) if few is not indexed else experiment.data
    with contextlib.redirect_stderr(io.StringIO()):
        data = prepare_dataset(experiment.model_copy(update={"data": settings}), few)
    decoded = sum(len(split) for split in few.source_splits())
    rate = decoded / (time.perf_counter() - decoding)
    facts = replace(data.facts, class_counts=indexed.class_counts(), counts=indexed.counts, numbers=indexed.numbers())
    build_checked_network(experiment, facts, given)
    if experiment.data.cache == "none":
        say("data.cache: none decodes pictures anew at each use, which is not measured here: it may take longer")
    say(f"training on {len(data.splits['train']):,} pictures for some seconds")
    with TemporaryDirectory(prefix="cnnrun-plan-") as folder:
        measured = _measured(experiment, replace(data, facts=facts), given, device, Path(folder))
    planned = _foretold(experiment, facts, measured)
    undecoded = sum(missing.values())
    each = int(np.prod(facts.image))
    planned |= {
        "decode_seconds": round(undecoded / rate, 1),
        "cache_mib": round(sum(len(split) for split in indexed.source_splits()) * each / 2**20, 1)
        if undecoded
        else 0.0,
        "peak_memory_mib": peak_memory_mib(device)
        + _still_to_hold(experiment, indexed, facts, decoded if undecoded else int(measured["read"]), device),
    }
    write_plan(experiment, root, device, planned)
    return {"name": experiment.name, "took": round(time.perf_counter() - began, 1), **planned}


def _missing(experiment: Experiment, split: Split) -> int:
    """Pictures of a source's split that training would have to decode first."""
    if isinstance(split.images, np.ndarray):
        return 0
    data, shape = experiment.data, experiment.data.image_shape()
    assert shape is not None, "experiment.load refuses a config without a picture size"
    listed = list_files(split, data.fingerprint == "content", data.workers)
    return 0 if is_cached(split, shape, data.image, data, listed) else len(split)


def _few(indexed: SourceIndex) -> SourceIndex:
    """The index of some pictures of each split, at equal distances."""
    splits, sources = {}, {}
    for name, (split, rows) in indexed.splits.items():
        chosen = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _PICTURES)).long()]
        sources[name] = split.select(chosen)
        splits[name] = (sources[name], torch.arange(len(chosen)))
    source: SourceContents = replace(indexed.contents, splits=sources)
    return SourceIndex(source, splits, indexed.held_out_splits)


def _measured(
    experiment: Experiment, data: Dataset, given: Weights | None, device: torch.device, folder: Path
) -> dict[str, float]:
    """Seconds a step and an epoch's end, from a short training after a shorter one that warms up."""
    spec = experiment.train
    train, val = data.splits["train"], data.splits["val"]
    batch = min(spec.batch, len(train))
    few = {"batch": batch, "save_every": None, "early_stop": None, "drop_last": True}

    def trained(name: str, wanted: int, pictures: int) -> tuple[int, float, dict[str, Any]]:
        """Steps of an epoch, the seconds at its end, and what the training says of itself."""
        steps = max(1, min(wanted, len(train) // batch))
        epochs = min(-(-wanted // steps), _EPOCHS)  # of few pictures several, as the training itself
        short = experiment.model_copy(update={"train": spec.model_copy(update=few | {"epochs": epochs})})
        splits = {"train": _first(train, steps * batch), "val": _first(val, pictures)}
        (folder / name).mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            result = fit(assemble_job(short, replace(data, splits=splits), given, Folder(folder / name), device))
        stepping = epochs * steps * batch / result["images_per_second"]
        return steps, (result["seconds"] - stepping) / epochs, result

    _, aside, warm = trained("warm", 1, few_val := min(len(val), batch))
    steps = math.ceil(_SECONDS * warm["images_per_second"] / batch)
    pictures = max(few_val, min(len(val), _VAL, int(_SECONDS / 2 * few_val / aside)))
    steps, aside, result = trained("measured", steps, pictures)
    return {
        "step": spec.batch / result["images_per_second"],
        "aside": aside,
        "val": pictures,
        "read": steps * batch + pictures,
        "wait": result["data_wait_share"],
    }


def _first(examples: Examples, count: int) -> Examples:
    return examples.select(torch.arange(len(examples)) < count)


def _foretold(experiment: Experiment, facts: Facts, measured: dict[str, float]) -> dict[str, Any]:
    spec = experiment.train
    steps = spec.steps_per_epoch(facts.counts["train"])
    aside = measured["aside"] * facts.counts["val"] / measured["val"]
    epoch = steps * measured["step"] + aside
    return {
        "epochs": spec.epochs,
        "steps_per_epoch": steps,
        "seconds_per_step": round(measured["step"], 5),
        "seconds_per_epoch": round(epoch, 2),
        "seconds": round(epoch * spec.epochs, 1),
        "images_per_second": round(spec.batch / measured["step"], 1),
        "data_wait_share": measured["wait"],
    }


def _still_to_hold(experiment: Experiment, indexed: SourceIndex, facts: Facts, held: int, device: torch.device) -> int:
    """MiB of decoded pictures that a whole training has in memory, beyond the `held` ones of the short one."""
    picture = int(np.prod(facts.image))
    files = sum(len(split) for split in indexed.source_splits() if not isinstance(split.images, np.ndarray))
    if device.type == "cuda" or not files or files * picture > experiment.data.memory_gib * 2**30:
        return 0
    used = sum(indexed.counts[name] for name in ("train", "val"))
    return max(0, round((used - held) * picture / 2**20))


_TOLD = ("seconds", "peak_memory_mib", "data_wait_share")  # what both know


def write_plan(experiment: Experiment, root: Path, device: torch.device, planned: dict[str, Any]) -> None:
    """Keep a plan for the training of this config that may follow."""
    make_folder(root / experiment.name)
    write_json(root / experiment.name / PLAN, {**planned, "for": _settings(experiment, describe_environment(device))})


def compare_with_plan(
    root: Path, experiment: Experiment, run: Folder, where: dict[str, Any], result: dict[str, Any]
) -> None:
    """Write and say what was foretold and what it came to, where there is a plan of the same config and machine.

    `where` is the run's `run_folder.describe_environment`. A plan that cannot be read is none.
    """
    try:
        planned = json.loads(read_bytes(root / experiment.name / PLAN, CheckpointError, MAX_JSON_BYTES))
        if planned.pop("for") != _settings(experiment, where):
            return
        pairs = {name: [float(planned[name]), float(result[name])] for name in _TOLD}
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        return
    with storage_errors(run.path / PLAN, 4096):
        run.replace(PLAN, json_bytes({"planned": planned, "measured": {name: result[name] for name in _TOLD}}))
    seconds, memory = pairs["seconds"], pairs["peak_memory_mib"]
    say(f"planned {seconds[0]:.0f} s and {memory[0]:,.0f} MiB; it took {seconds[1]:.0f} s and {memory[1]:,.0f} MiB")


def _settings(experiment: Experiment, where: dict[str, Any]) -> dict[str, Any]:
    """The config, but for the statistics of the pictures, which a run writes into its own; and the machine."""
    made: dict[str, Any] = experiment.model_dump(mode="json", by_alias=True)
    for name in ("mean", "std"):
        made["data"]["image"].pop(name, None)
    return {"config": made, "machine": where}
