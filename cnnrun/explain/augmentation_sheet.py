"""A contact sheet of training images, unchanged and as the first epochs augment them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.atomic_files import Folder, make_folder, storage_errors
from cnnrun.base.progress import progress_bar
from cnnrun.base.randomness import permutation
from cnnrun.contracts.task import Task
from cnnrun.contracts.task_parts import Targets
from cnnrun.data.dataset import Dataset
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.training_batches import BatchPlan, BatchReading, TrainingBatches
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.contact_sheet import draw_contact_sheet, write_png
from cnnrun.explain.figures.panels import draw_overlay, to_pillow
from cnnrun.training.event_file import EventFile

Column = tuple[str, Tensor, dict[str, Tensor]]  # title, images [N, C, H, W], targets


def write_augmentation_sheet(
    experiment: Experiment, count: int, epochs: int, out: Path, tensorboard: Path | None
) -> dict[str, Any]:
    """Write a sheet with a row for each of `count` training images, as PNG and, in the folder `tensorboard`, for it."""
    data = build_dataset(experiment.data, index_source(experiment.data), progress_bar)
    samples = permutation(experiment.seed, 0, len(data.splits["train"]))[:count]
    task = experiment.task.bind(data.facts)
    pixels = draw_contact_sheet(
        [
            (title, _draw_targets(images, targets, task), task.showing.describe_targets(targets))
            for title, images, targets in _sheet_columns(experiment, data, samples, epochs)
        ]
    )
    write_png(out, pixels, "cnnrun data show")
    if tensorboard:
        _write_event(tensorboard, pixels)
    event_folder = str(tensorboard) if tensorboard else None
    return {"path": str(out), "pictures": len(samples), "times": epochs, "tensorboard": event_folder}


def _sheet_columns(experiment: Experiment, data: Dataset, samples: Tensor, epochs: int) -> list[Column]:
    """Columns of the sheet: the samples unchanged, then as each epoch augments them."""
    examples, host = data.splits["train"], torch.device("cpu")
    plan = BatchPlan(len(samples), 1, experiment.seed, lambda seed, epoch: (samples, samples))
    mix_targets = experiment.task.bind(data.facts).learning.mix_targets
    batches = TrainingBatches(examples, experiment.data.augment, plan, BatchReading(host), mix_targets)
    images = examples.load_images(samples).float()
    columns: list[Column] = [("unchanged", images, examples.batch_targets(samples, host))]
    for epoch in range(epochs):
        batch = batches.at(epoch)
        columns.append((f"epoch {epoch + 1}", batch.images, batch.targets))
    return columns


def _draw_targets(images_NCHW: Tensor, targets: Targets, task: Task) -> Tensor:
    """Draw the targets onto the images, without their text, if the task has targets to draw."""
    if not task.showing.has_overlays:
        return images_NCHW
    drawings = [
        draw_overlay(to_pillow(image), overlay.without_text())
        for image, overlay in zip(images_NCHW, task.showing.target_overlays(targets), strict=True)
    ]
    return torch.from_numpy(np.stack([np.asarray(drawing) for drawing in drawings])).permute(0, 3, 1, 2)


def _write_event(folder: Path, pixels: NDArray[np.uint8]) -> None:
    make_folder(folder)
    with storage_errors(folder, pixels.nbytes), closing(EventFile(Folder(folder))) as writer:
        writer.add_image("data/sheet", pixels, 0)
