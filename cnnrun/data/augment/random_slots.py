"""Random numbers for augmentation, by name, as pure functions of (seed, epoch, sample)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnnrun.base.device import tensor_on
from cnnrun.base.randomness import uniform

# The position of a name is the slot of its random numbers. Add new names at the end, so that old runs can be repeated.
SLOTS = (
    "flip_x", "flip_y", "shift_y", "shift_x", "rotate", "scale", "shear",
    "brightness", "contrast", "saturation", "hue", "erase", "erase_area", "erase_shape", "erase_y", "erase_x",
    "crop_area", "crop_shape", "crop_y", "crop_x", "grayscale", "noise", "blur", "policy",
    "mix", "mix_part", "mix_y", "mix_x", "mosaic", "mosaic_y", "mosaic_x",
)  # fmt: skip


class Draws:
    """The random numbers of a batch by slot name.

    `index_B` are the samples' numbers; a sample that is repeated in an epoch has a number of its own for each repeat.
    Only the numbers of `slots` are computed. They do not depend on which other slots are named.
    """

    def __init__(self, seed: int, epoch: int, index_B: Tensor, slots: Sequence[str] = SLOTS) -> None:
        self.seed, self.epoch, self.index_B = seed, epoch, index_B
        numbers = tensor_on(index_B.device, [SLOTS.index(slot) for slot in slots], torch.int64)
        self._values = dict(zip(slots, uniform(seed, epoch, index_B, numbers).unbind(1), strict=True))

    def __getitem__(self, slot: str) -> Tensor:
        """Uniform numbers in [0, 1), float32 [B]."""
        return self._values[slot]

    def draw_symmetric(self, slot: str) -> Tensor:
        """Uniform numbers in [-1, 1), float32 [B]."""
        return self._values[slot] * 2 - 1
