"""Generated images of real handwritten digits at random places, in random sizes and numbers. Nothing to download."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cnnrun.base.randomness import permutation, uniform
from cnnrun.contracts.source import Masks, SourceContents, Split
from cnnrun.data.sources.annotated_images import Box
from cnnrun.data.sources.box_lists import BoxSource, build_object_table, mask_classes
from cnnrun.data.sources.embedded_digits import read_digits

_SIDE_PX = 96  # of a scene
_MIN_DIGIT_PX, _MAX_DIGIT_PX = 14, 40  # of a digit's side, with its margins
_GRAIN_LEVELS = 32  # grey levels of the background's noise
_INK_LEVEL = 64  # a pixel of this grey level or above belongs to the digit's box
_TRIES = 10  # places tried for a digit that must not cover others
_DRAWS_PER_DIGIT = 2 + 2 * _TRIES  # which digit, its size, and y and x of each place
_DIGIT_FRACTIONS = {"train": 0.7, "val": 0.15, "test": 0.15}  # of the digits: no digit of train is shown in test


class DigitScenes(BoxSource):
    """The built-in digits (see `digits`) scattered over a grey canvas of 96 x 96; no two splits share a digit."""

    kind = "digit_scenes"

    give: Literal["boxes", "counts", "presence", "masks"] = "boxes"  # type: ignore[assignment]
    """The targets of a scene: as for other sources with boxes; or `masks`, the class of each pixel (for `segment`)."""
    image_shape = (1, _SIDE_PX, _SIDE_PX)

    train: int = Field(2000, ge=1, le=1_000_000)
    """The number of training scenes."""
    held_out: int = Field(400, ge=1, le=1_000_000)
    """The number of scenes in val, and in test."""
    most: int = Field(6, ge=1, le=500)
    """The maximum number of digits in a scene; the minimum is 0."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The seed of the scenes; the config's own `seed` does not change them."""

    def read_boxes(self) -> SourceContents:
        digits, labels = read_digits()
        order = permutation(self.seed, 0, len(digits)).numpy()
        ends = np.cumsum([round(fraction * len(digits)) for fraction in _DIGIT_FRACTIONS.values()])[:-1]
        splits = {}
        for split_number, (split, rows) in enumerate(zip(_DIGIT_FRACTIONS, np.split(order, ends), strict=True)):
            count = self.train if split == "train" else self.held_out
            splits[split] = self._generate_split(digits[rows], labels[rows], count, split_number)
        classes = tuple("0123456789")
        return SourceContents(mask_classes(classes) if self.give == "masks" else classes, splits)

    def _generate_split(self, digits: NDArray[np.uint8], labels: NDArray[Any], count: int, split_number: int) -> Split:
        """A split of `count` scenes. `split_number` takes the place of the epoch in the random numbers."""
        scenes = _empty_canvases(self.seed, split_number, count)
        slots = torch.arange(1 + self.most * _DRAWS_PER_DIGIT)
        draws = uniform(self.seed, split_number, torch.arange(count), slots).numpy().astype(np.float64)
        masks = np.zeros_like(scenes)
        boxes = [
            self._draw_scene((scenes[index, :, :, 0], masks[index, :, :, 0]), digits, labels, draws[index])
            for index in range(count)
        ]
        sizes = np.full((count, 2), _SIDE_PX, np.int64)
        objects = build_object_table(boxes, sizes)
        scene_masks = Masks(masks, tuple(range(256))) if self.give == "masks" else None
        return Split(scenes, {}, "digit_scenes", sizes=sizes, objects=objects, masks=scene_masks)

    def _draw_scene(
        self,
        canvas_and_mask: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        digits: NDArray[np.uint8],
        labels: NDArray[Any],
        draws: NDArray[np.float64],
    ) -> list[Box]:
        """Draw digits onto the canvas, and 1 + their labels into its mask; returns their boxes.

        A digit that finds no free place is left out.
        """
        from PIL import Image as Pil

        boxes: list[Box] = []
        for number in range(int(draws[0] * (self.most + 1))):
            choice, size, *places = draws[1 + number * _DRAWS_PER_DIGIT :][:_DRAWS_PER_DIGIT]
            index, side = int(choice * len(digits)), round(_MIN_DIGIT_PX + size * (_MAX_DIGIT_PX - _MIN_DIGIT_PX))
            digit = np.asarray(Pil.fromarray(digits[index]).resize((side, side), Pil.Resampling.BICUBIC))
            ys, xs = np.nonzero(digit >= _INK_LEVEL)
            for y, x in zip(places[::2], places[1::2], strict=True):
                top, left = int(y * (_SIDE_PX - side + 1)), int(x * (_SIDE_PX - side + 1))
                corners = (left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1)
                if not any(_has_overlap(corners, box.corners) for box in boxes):
                    region, mask = (array[top : top + side, left : left + side] for array in canvas_and_mask)
                    np.maximum(region, digit, out=region)
                    mask[digit >= _INK_LEVEL] = 1 + labels[index]
                    boxes.append(Box(tuple(map(float, corners)), int(labels[index])))  # type: ignore[arg-type]
                    break
        return boxes


def _empty_canvases(seed: int, split_number: int, count: int) -> NDArray[np.uint8]:
    """Canvases of grey noise, uint8 [N, H, W, 1]. No two are equal, so that scenes without digits differ too."""
    slots = torch.arange(1 << 30, (1 << 30) + _SIDE_PX * _SIDE_PX)  # slots that no scene draws from
    canvases = [
        (uniform(seed, split_number, indices, slots) * _GRAIN_LEVELS).byte()
        for indices in torch.arange(count).split(256)
    ]
    return torch.cat(canvases).view(count, _SIDE_PX, _SIDE_PX, 1).numpy()


def _has_overlap(first: Any, second: Any) -> bool:
    """Return whether two boxes (x1, y1, x2, y2) have a pixel in common."""
    return bool(
        max(first[0], second[0]) < min(first[2], second[2]) and max(first[1], second[1]) < min(first[3], second[3])
    )
