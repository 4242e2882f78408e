"""`cnnrun plan`: time and memory that a training will need, predicted from a short training of the same config."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cnnrun.base.atomic_files import Folder, json_bytes, make_folder, storage_errors, write_json
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.counts import format_count
from cnnrun.base.device import peak_memory_mib
from cnnrun.base.durations import format_duration
from cnnrun.base.errors import CheckpointError
from cnnrun.base.machine_load import processor_count
from cnnrun.base.progress import say
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.source import Masks, SourceContents, Split
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.file_listing import list_files
from cnnrun.data.index import SourceIndex, index_source
from cnnrun.data.storage import is_cached
from cnnrun.experiment.assemble import load_initial_weights, prepare_dataset
from cnnrun.experiment.preparation import PreparedTraining, prepare_training
from cnnrun.experiment.schema import Experiment
from cnnrun.training.hooks import TrainingHooks
from cnnrun.training.loop import fit
from cnnrun.training.run_folder import describe_environment
from cnnrun.training.run_records import MAX_JSON_BYTES, PLAN
from cnnrun.training.step_time import one_thread, thread_speedup

_MEASURED_SECONDS = 8.0  # duration of the measured training; evaluation on val gets about half of it
_MAX_EPOCHS = 10  # epochs of the measured training
_MAX_DECODED_IMAGES = 1024  # images of each split that are decoded if they are not cached yet
_MAX_VAL_IMAGES = 2000  # images of val in the measured training's evaluation


def plan_training(experiment: Experiment, device: torch.device, runs: Path) -> dict[str, Any]:
    """Run a short training, predict time and memory of the whole one, and store the plan for a later training."""
    start = time.perf_counter()
    weights = load_initial_weights(experiment)
    experiment = experiment.with_statistics_of_weights(weights.facts if weights else None)
    source_index = index_source(experiment.data)
    source_splits = source_index.contents.splits
    undecoded_counts = {name: _undecoded_count(experiment, split) for name, split in source_splits.items()}
    sampled = _sample_index(source_index) if any(undecoded_counts.values()) else source_index
    data, decoding_seconds = _decode(experiment, sampled, keeps_cache=sampled is not source_index)
    decoded = sum(len(split) for split in sampled.source_splits())
    class_counts, numbers = source_index.class_counts(), source_index.numbers()
    facts = replace(data.facts, class_counts=class_counts, counts=source_index.counts, numbers=numbers)
    training = prepare_training(experiment, weights, device, data=replace(data, facts=facts))
    if experiment.data.cache == "none":
        say("data.cache: none decodes images at each use, which the plan does not measure: training may take longer")
    say(f"training on {format_count(len(data.splits['train']), 'image')} for a few seconds")
    speed = _measure_speed(training, device)
    plan = _predict_times(experiment, facts, speed)
    undecoded = sum(undecoded_counts.values())
    sample_count = sum(len(split) for split in source_index.source_splits())
    plan |= {
        "decode_seconds": round(undecoded * decoding_seconds / decoded, 1),
        "cache_mib": round(sample_count * _sample_bytes(experiment, source_index, facts) / 2**20, 1)
        if undecoded
        else 0.0,
        "peak_memory_mib": peak_memory_mib(device)
        + _remaining_memory_mib(experiment, source_index, facts, decoded if undecoded else int(speed["read"]), device),
    }
    write_plan(training.experiment, runs, device, plan)
    return {"name": experiment.name, "took": round(time.perf_counter() - start, 1), **plan}


def _decode(experiment: Experiment, index: SourceIndex, keeps_cache: bool) -> tuple[Dataset, float]:
    """Decode the images of `index`; returns them with the seconds that an otherwise idle machine needs for it.

    They are processor seconds, divided by the number of threads. With `keeps_cache` the cache on the disk is unchanged.
    """
    data = experiment.data.model_copy(update={"cache": "memory"}) if keeps_cache else experiment.data
    threads = min(processor_count(), processor_count() if data.workers is None else max(1, data.workers))
    start = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        dataset = prepare_dataset(experiment.model_copy(update={"data": data}), index)
    return dataset, (time.process_time() - start) / threads


def _undecoded_count(experiment: Experiment, split: Split) -> int:
    """Number of images of a split that a training would have to decode first: they or their masks are not cached."""
    data, shape = experiment.data, experiment.data.image_shape()
    assert shape is not None, "a config without an image size is refused when it is read"

    def needs_decoding(part: Split | Masks, part_shape: Shape) -> bool:
        if isinstance(part.images, np.ndarray):
            return False
        files = list_files(part, data.fingerprint == "content", data.workers)
        return not is_cached(part, part_shape, data.image, data, files)

    has_undecoded_masks = split.masks is not None and needs_decoding(split.masks, (1, *shape[1:]))
    return len(split) if has_undecoded_masks or needs_decoding(split, shape) else 0


def _sample_bytes(experiment: Experiment, source_index: SourceIndex, facts: DataFacts) -> int:
    """Bytes of a decoded image, and of its mask if the images have masks."""
    channels, height, width = facts.image_shape
    has_masks = any(split.masks is not None for split in source_index.source_splits())
    pixel_bytes = experiment.data.image.pixel_format.dtype.itemsize
    return (pixel_bytes * channels + has_masks) * height * width


def _sample_index(source_index: SourceIndex) -> SourceIndex:
    """Index of evenly spaced images of each split, at most _MAX_DECODED_IMAGES."""
    splits, sources = {}, {}
    for name, (split, rows) in source_index.splits.items():
        chosen = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _MAX_DECODED_IMAGES)).long()]
        sources[name] = split.select(chosen)
        splits[name] = (sources[name], torch.arange(len(chosen)))
    contents: SourceContents = replace(source_index.contents, splits=sources)
    return SourceIndex(contents, splits, source_index.held_out_splits)


def _measure_speed(training: PreparedTraining, device: torch.device) -> dict[str, float]:
    """Measure seconds per step and per end of an epoch, on an otherwise idle machine if the processor does the work.

    That is then the processor time of one thread, which other programs hardly change, divided by the speedup of all
    threads. On a GPU, or if images are read from the disk, the training waits, so the time that passes counts.
    """
    examples = (training.data.splits[name] for name in ("train", "val"))
    uses_processor_time = device.type == "cpu" and all(split.images.is_in_memory for split in examples)
    with TemporaryDirectory(prefix="cnnrun-plan-") as folder:
        if not uses_processor_time:
            return {**_time_short_training(training, device, Path(folder), time.perf_counter), "idle": False}
        speedup = thread_speedup(torch.get_num_threads())
        with one_thread():
            speed = _time_short_training(training, device, Path(folder), time.thread_time)
    return {**speed, "step": speed["step"] / speedup, "epoch_end": speed["epoch_end"] / speedup, "idle": True}


def _time_short_training(
    training: PreparedTraining, device: torch.device, folder: Path, now: Callable[[], float]
) -> dict[str, float]:
    """Measure seconds per step and per end of an epoch in a short training, after a shorter one that warms up."""
    spec, data = training.experiment.train, training.data
    train, val = data.splits["train"], data.splits["val"]
    batch = min(spec.batch, len(train))
    all_learn = {"freeze": spec.always_frozen, "freeze_epochs": None}  # of most steps, and the slowest
    short_settings: dict[str, Any] = {"batch": batch, "save_every": None, "early_stop": None, "drop_last": True}

    def run_training(name: str, min_steps: int, val_images: int) -> tuple[int, float, dict[str, Any]]:
        """Train briefly; returns steps per epoch, seconds at the end of each epoch, and the training's result."""
        steps = max(1, min(min_steps, len(train) // batch))
        epochs = min(-(-min_steps // steps), _MAX_EPOCHS)  # a small split needs several for that many steps
        splits = {"train": _first_samples(train, steps * batch), "val": _first_samples(val, val_images)}
        (folder / name).mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            short = replace(
                training.with_train(**short_settings, **all_learn, epochs=epochs), data=replace(data, splits=splits)
            )
            result = fit(short.build_setup(device, Folder(folder / name)), hooks=TrainingHooks(now=now))
        step_seconds = epochs * steps * batch / result["images_per_second"]
        return steps, (result["seconds"] - step_seconds) / epochs, result

    _, epoch_end, warm_result = run_training("warm", 1, min_val_images := min(len(val), batch))
    steps = math.ceil(_MEASURED_SECONDS * warm_result["images_per_second"] / batch)
    affordable = int(_MEASURED_SECONDS / 2 * min_val_images / epoch_end)
    val_images = max(min_val_images, min(len(val), _MAX_VAL_IMAGES, affordable))
    steps, epoch_end, result = run_training("measured", steps, val_images)
    return {
        "step": spec.batch / result["images_per_second"],
        "epoch_end": epoch_end,
        "val": val_images,
        "read": steps * batch + val_images,
        "wait": result["data_wait_share"],
    }


def _first_samples(examples: Examples, count: int) -> Examples:
    return examples.select(torch.arange(len(examples)) < count)


def _predict_times(experiment: Experiment, facts: DataFacts, speed: dict[str, float]) -> dict[str, Any]:
    spec = experiment.train
    steps = spec.steps_per_epoch(facts.counts["train"])
    epoch_end = speed["epoch_end"] * facts.counts["val"] / speed["val"]
    epoch = steps * speed["step"] + epoch_end
    return {
        "epochs": spec.epochs,
        "steps_per_epoch": steps,
        "seconds_per_step": round(speed["step"], 5),
        "seconds_per_epoch": round(epoch, 2),
        "seconds": round(epoch * spec.epochs, 1),
        "images_per_second": round(spec.batch / speed["step"], 1),
        "data_wait_share": speed["wait"],
        "on_idle_machine": speed["idle"],
    }


def _remaining_memory_mib(
    experiment: Experiment, source_index: SourceIndex, facts: DataFacts, decoded_count: int, device: torch.device
) -> int:
    """MiB of decoded images that a whole training holds in memory beyond the short training's `decoded_count`."""
    sample_bytes = _sample_bytes(experiment, source_index, facts)
    file_count = sum(len(split) for split in source_index.source_splits() if not isinstance(split.images, np.ndarray))
    if device.type == "cuda" or not file_count or file_count * sample_bytes > experiment.data.memory_gib * 2**30:
        return 0
    image_count = sum(source_index.counts[name] for name in ("train", "val"))
    return max(0, round((image_count - decoded_count) * sample_bytes / 2**20))


_COMPARED_KEYS = ("seconds", "peak_memory_mib", "data_wait_share")  # keys of a plan and of a training's result


def write_plan(experiment: Experiment, runs: Path, device: torch.device, plan: dict[str, Any]) -> None:
    """Store a plan, to be compared with a later training of this config."""
    make_folder(runs / experiment.name)
    write_json(runs / experiment.name / PLAN, {**plan, "for": _plan_settings(experiment, describe_environment(device))})


def compare_with_plan(
    runs: Path, experiment: Experiment, run: Folder, environment: dict[str, Any], result: dict[str, Any]
) -> None:
    """Compare a finished training with its plan, if one of the same config and machine exists; write and print both.

    `environment` is the run's `run_folder.describe_environment`. A plan that cannot be read is ignored.
    """
    try:
        plan = json.loads(read_bytes(runs / experiment.name / PLAN, CheckpointError, MAX_JSON_BYTES))
        if plan.pop("for") != _plan_settings(experiment, environment):
            return
        pairs = {name: [float(plan[name]), float(result[name])] for name in _COMPARED_KEYS}
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        return
    with storage_errors(run.path / PLAN, 4096):
        run.replace(PLAN, json_bytes({"planned": plan, "measured": {name: result[name] for name in _COMPARED_KEYS}}))
    seconds, memory = pairs["seconds"], pairs["peak_memory_mib"]
    planned_text, measured_text = (
        f"{format_duration(duration)} and {size:,.0f} MiB" for duration, size in zip(seconds, memory, strict=True)
    )
    idle = ", on an otherwise idle machine" if plan.get("on_idle_machine") else ""
    say(f"planned {planned_text}{idle}; it took {measured_text}")


def _plan_settings(experiment: Experiment, environment: dict[str, Any]) -> dict[str, Any]:
    """Config and machine of a plan. Image statistics are left out, since a run adds them to its own config."""
    config: dict[str, Any] = experiment.model_dump(mode="json", by_alias=True)
    for name in ("mean", "std"):
        config["data"]["image"].pop(name, None)
    return {"config": config, "machine": environment}
