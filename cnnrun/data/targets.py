"""Targets of many samples as tensors: selection, counts and statistics."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import escape
from cnnrun.contracts.facts import NumberStatistics
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.objects import OBJECT, ObjectTable
from cnnrun.contracts.source import Split
from cnnrun.data.box_placement import map_boxes_to_input
from cnnrun.data.image_settings import ImageSettings


def flatten_targets(targets: dict[str, Tensor], objects: ObjectTable | None) -> dict[str, Tensor]:
    """The targets of N samples with the objects of all samples concatenated, and their `counts` [N] per sample."""
    return targets if objects is None else {**targets, **objects.columns, "counts": objects.counts_N}


def target_codes(targets: dict[str, Tensor], objects: ObjectTable | None, count: int) -> Tensor:
    """A code for the targets of each of `count` samples, int64 [N]: its label, or a digest of its targets."""
    if "labels" in targets:
        return targets["labels"]
    if objects is not None:
        return torch.tensor(
            [code for block in objects.padded_blocks() for code in _digest_targets(block, len(block["boxes"]))]
        )
    return torch.tensor(_digest_targets(targets, count))


def _digest_targets(targets: dict[str, Tensor], count: int) -> list[int]:
    columns = [targets[name].numpy() for name in ("present", "numbers", "boxes", "objects") if name in targets]
    return [zlib.crc32(b"".join(column[i].tobytes() for column in columns)) for i in range(count)]


def select_targets(
    split: Split, rows: Tensor, shape: Shape, image_settings: ImageSettings
) -> tuple[dict[str, Tensor], ObjectTable | None]:
    """The targets of some samples of a source, and their objects with boxes in the network's pixels, if any."""
    targets = {name: values[rows] for name, values in split.targets.items()}
    if split.objects is None or split.sizes is None:
        return targets, None
    objects, views = map_boxes_to_input(split.objects.select(rows), split.sizes[rows.numpy()], shape, image_settings)
    return targets | {"view": views}, objects


def count_classes(targets: dict[str, Tensor], classes: int) -> tuple[int, ...]:
    """Number of images, or of objects to detect, of each class; empty if the targets have no classes."""
    if "present" in targets:
        return tuple(targets["present"].sum(0).tolist())
    if "labels" in targets:
        labels = targets["labels"]
    elif "objects" in targets:
        labels = targets["objects"][(targets["objects"] >= 0) & (targets["roles"] == OBJECT)]
    else:
        return ()
    return tuple(torch.bincount(labels, minlength=classes).tolist())


def measure_numbers(names: Sequence[str], targets: dict[str, Tensor]) -> tuple[NumberStatistics, ...]:
    """Mean, standard deviation and range of each regression target; empty if there are none."""
    if "numbers" not in targets:
        return ()
    values = targets["numbers"].double()
    columns = (values.mean(0), values.std(0, correction=0), values.amin(0), values.amax(0))
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    return tuple(NumberStatistics(name, *statistics) for name, *statistics in rows)


def labels_or_zeros(split: Split) -> Tensor:
    """Each sample's label, or 0 if samples have no single label: int64 [N]."""
    return split.targets.get("labels", torch.zeros(len(split), dtype=torch.int64))


def float32_problem(name: str, values: Sequence[float | None] | NDArray[Any]) -> str | None:
    """Reason that values which differ are all equal in float32, or None. Tasks warn of values that are nearly so."""
    exact = np.asarray(values, np.float64)
    spread = float(np.ptp(exact))
    if spread == 0 or np.ptp(exact.astype(np.float32)) > 0:
        return None
    text = f"{escape(name)} varies by {spread:.3g} around {exact.mean():.6g}"
    return f"{text}, too finely for float32; subtract the mean from it"
