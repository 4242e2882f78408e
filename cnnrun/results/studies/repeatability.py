"""Checks that a training gives the same bits again: repeated, resumed, and with images read by threads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.progress import say
from cnnrun.data.dataset import Examples
from cnnrun.data.decode import Decoder
from cnnrun.data.image_stores import DecodingStore
from cnnrun.results.studies.sample_trainings import CheckResult, SelftestContext
from cnnrun.training import checkpoints
from cnnrun.training.loop import fit


def _run_state(run: Path) -> list[Any]:
    """State of a run that two equal runs share to the bit: tensors, counters and metrics."""
    checkpoint = checkpoints.load_newest(run / "checkpoints", "latest", say)
    assert checkpoint is not None
    tensors = [
        (part, name, value)
        for part, part_tensors in sorted(checkpoint.parts.items())
        for name, value in sorted(part_tensors.items())
    ]
    return [*tensors, checkpoint.state, (run / "metrics.jsonl").read_bytes()]


def _state_differences(first_state: list[Any], second_state: list[Any]) -> list[str]:
    """Names of the entries in which two states differ."""
    names = []
    for first, second in zip(first_state, second_state, strict=True):
        if isinstance(first, tuple):
            is_equal = first[:2] == second[:2] and torch.equal(first[2], second[2])
            names += [] if is_equal else [f"{first[0]} {first[1]}"]
        elif first != second:
            names.append("counters" if isinstance(first, dict) else "metrics.jsonl")
    return names


def _compare_runs(context: SelftestContext, check: str, name: str, success: str) -> CheckResult:
    differences = _state_differences(_run_state(context.folder / "first"), _run_state(context.folder / name))
    rest = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
    return CheckResult(check, not differences, f"differs in {differences[0]}{rest}" if differences else success)


def check_repeat(context: SelftestContext) -> CheckResult:
    """Train twice and compare."""
    result = fit(context.build_setup("first", save_every=1))
    fit(context.build_setup("again"))
    context.step_seconds = context.experiment.train.batch / result["images_per_second"]
    return _compare_runs(context, "a repeated run is the same", "again", f"{result['steps']} steps, to the last bit")


def check_resume(context: SelftestContext) -> CheckResult:
    """Resume the training from the middle of its first epoch and compare."""
    saved = checkpoints.list_checkpoints(context.folder / "first" / "checkpoints")
    middle = saved[max(0, len(saved) // 4 - 1)]
    shutil.copytree(context.folder / "first", context.folder / "resumed")
    for later_checkpoint in saved[saved.index(middle) + 1 :]:
        shutil.rmtree(context.folder / "resumed" / "checkpoints" / later_checkpoint.name)
    fit(context.build_setup("resumed"), checkpoints.load(context.folder / "resumed" / "checkpoints" / middle.name))
    return _compare_runs(
        context, "a resumed run is the same", "resumed", f"resumed from {middle.name}, to the last bit"
    )


def check_workers(context: SelftestContext) -> CheckResult:
    """Train on images that two threads decode ahead of use, and compare."""

    def stream_images(examples: Examples) -> Examples:
        image = context.experiment.data.image
        decoder = Decoder(examples.source, context.data.facts.image_shape, image, None)
        images = DecodingStore(decoder, 2, context.experiment.data.timeout)
        return replace(examples, images=images, rows=examples.source_rows)

    data = replace(
        context.data, splits={name: stream_images(examples) for name, examples in context.data.splits.items()}
    )
    fit(replace(context.build_setup("workers", data), prefetch=3))
    return _compare_runs(context, "reading threads change no bit", "workers", "two threads, to the last bit")
