"""Targets of many samples as tensors: selected, counted, summed up."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cnnrun.contracts.facts import NumberStatistics
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.objects import ObjectTable
from cnnrun.contracts.source import Split
from cnnrun.data.box_placement import place_boxes
from cnnrun.data.image_files import ImageSettings


def flatten_targets(targets: dict[str, Tensor], objects: ObjectTable | None) -> dict[str, Tensor]:
    """The targets of many samples as tensors, objects one after the other, and `counts` [N] of them."""
    return targets if objects is None else {**targets, **objects.columns, "counts": objects.counts_N}


def target_codes(targets: dict[str, Tensor], objects: ObjectTable | None, count: int) -> Tensor:
    """What is known of each of `count` samples as one number, int64 [N]: its label, or a digest."""
    if "labels" in targets:
        return targets["labels"]
    if objects is not None:
        return torch.tensor(
            [code for block in objects.padded_blocks() for code in _digests(block, len(block["boxes"]))]
        )
    return torch.tensor(_digests(targets, count))


def _digests(targets: dict[str, Tensor], count: int) -> list[int]:
    known = [targets[name].numpy() for name in ("present", "numbers", "boxes", "objects") if name in targets]
    return [zlib.crc32(b"".join(each[i].tobytes() for each in known)) for i in range(count)]


def select_targets(
    split: Split, rows: Tensor, shape: Shape, image: ImageSettings
) -> tuple[dict[str, Tensor], ObjectTable | None]:
    """The targets of those of a source's samples, and their objects where they lie in the network's pictures."""
    own = {target: values[rows] for target, values in split.targets.items()}
    if split.objects is None or split.sizes is None:
        return own, None
    objects, views = place_boxes(split.objects.select(rows), split.sizes[rows.numpy()], shape, image)
    return own | {"view": views}, objects


def count_classes(targets: dict[str, Tensor], classes: int) -> tuple[int, ...]:
    """How often each class stands in targets: of pictures, or of objects that are to be found."""
    if "present" in targets:
        return tuple(targets["present"].sum(0).tolist())
    if "labels" in targets:
        found = targets["labels"]
    elif "objects" in targets:
        found = targets["objects"][(targets["objects"] >= 0) & (targets["roles"] == 0)]
    else:
        return ()
    return tuple(torch.bincount(found, minlength=classes).tolist())


def measure_numbers(names: Sequence[str], targets: dict[str, Tensor]) -> tuple[NumberStatistics, ...]:
    """Mean, deviation and range of each of the numbers in the targets; nothing where they have none."""
    if "numbers" not in targets:
        return ()
    values = targets["numbers"].double()
    columns = (values.mean(0), values.std(0, correction=0), values.amin(0), values.amax(0))
    return tuple(
        NumberStatistics(name, *each) for name, *each in zip(names, *(c.tolist() for c in columns), strict=True)
    )


def labels_or_zeros(split: Split) -> Tensor:
    """Each sample's label, or 0 where it has no single one: int64 [N]."""
    return split.targets.get("labels", torch.zeros(len(split), dtype=torch.int64))
