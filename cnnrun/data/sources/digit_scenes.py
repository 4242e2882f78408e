"""Scenes of real handwritten digits: several a picture, of random place, size and number. Nothing to download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from cnnrun.base.randomness import permutation, uniform
from cnnrun.contracts.source import SourceContents, Split
from cnnrun.data.sources.box_lists import Box, BoxSource, build_object_table
from cnnrun.data.sources.embedded_digits import read_digits

_SIDE = 96  # pixels of a scene
_SMALLEST, _LARGEST = 14, 40  # pixels of a digit's side, with its margins
_GRAIN = 32  # grey levels of the canvas's grain
_INK = 64  # the grey level from which a pixel belongs to a digit's box
_TRIES = 10  # places tried for a digit that must not cover others
_APART = {"train": 0.7, "val": 0.15, "test": 0.15}  # parts of the digits: no scene of test shows one of train


class DigitScenes(BoxSource):
    """The embedded digits (see `digits`) scattered over a grey canvas of 96 x 96; test shows digits of its own."""

    kind = "digit_scenes"
    image = (1, _SIDE, _SIDE)

    train: int = Field(2000, ge=1, le=1_000_000)
    """Training scenes; val and test have `held_out` each."""
    held_out: int = Field(400, ge=1, le=1_000_000)
    most: int = Field(6, ge=1, le=500)
    """Digits of a scene, at most; at least none."""
    seed: int = Field(0, ge=0, lt=2**63)

    def read_boxes(self) -> SourceContents:
        digits, labels = read_digits()
        order = permutation(self.seed, 0, len(digits)).numpy()
        ends = np.cumsum([round(part * len(digits)) for part in _APART.values()])[:-1]
        splits = {}
        for number, (name, chosen) in enumerate(zip(_APART, np.split(order, ends), strict=True)):
            count = self.train if name == "train" else self.held_out
            splits[name] = self._scenes(digits[chosen], labels[chosen], count, number)
        return SourceContents(tuple("0123456789"), splits)

    def _scenes(self, digits: NDArray[np.uint8], labels: NDArray[Any], count: int, number: int) -> Split:
        pictures = _paper(self.seed, number, count)
        slots = torch.arange(1 + self.most * (2 + 2 * _TRIES))
        draws = uniform(self.seed, number, torch.arange(count), slots).numpy().astype(np.float64)
        rows = [self._scene(pictures[place, :, :, 0], digits, labels, draws[place]) for place in range(count)]
        sizes = np.full((count, 2), _SIDE, np.int64)
        return Split(pictures, {}, "digit_scenes", sizes=sizes, objects=build_object_table(rows, sizes))

    def _scene(
        self, canvas: NDArray[np.uint8], digits: NDArray[np.uint8], labels: NDArray[Any], draws: NDArray[np.float64]
    ) -> list[Box]:
        """Draw one scene; returns the boxes of what is in it."""
        from PIL import Image as Pil

        boxes: list[Box] = []
        for each in range(int(draws[0] * (self.most + 1))):
            which, size, *places = draws[1 + each * (2 + 2 * _TRIES) :][: 2 + 2 * _TRIES]
            chosen, side = int(which * len(digits)), round(_SMALLEST + size * (_LARGEST - _SMALLEST))
            drawn = np.asarray(Pil.fromarray(digits[chosen]).resize((side, side), Pil.Resampling.BICUBIC))
            ys, xs = np.nonzero(drawn >= _INK)
            for y, x in zip(places[::2], places[1::2], strict=True):
                top, left = int(y * (_SIDE - side + 1)), int(x * (_SIDE - side + 1))
                corners = (left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1)
                if not any(_meet(corners, box.corners) for box in boxes):
                    part = canvas[top : top + side, left : left + side]
                    np.maximum(part, drawn, out=part)
                    boxes.append(Box(tuple(map(float, corners)), int(labels[chosen])))  # type: ignore[arg-type]
                    break
        return boxes


def _paper(seed: int, number: int, count: int) -> NDArray[np.uint8]:
    """Empty canvases [N, H, W, 1], no two alike: even a scene without digits is a picture of its own."""
    pixels = torch.arange(1 << 30, (1 << 30) + _SIDE * _SIDE)  # slots that no scene draws from
    parts = [(uniform(seed, number, each, pixels) * _GRAIN).byte() for each in torch.arange(count).split(256)]
    return torch.cat(parts).view(count, _SIDE, _SIDE, 1).numpy()


def _meet(one: Any, other: Any) -> bool:
    """Whether two boxes have a pixel in common."""
    return bool(max(one[0], other[0]) < min(one[2], other[2]) and max(one[1], other[1]) < min(one[3], other[3]))
