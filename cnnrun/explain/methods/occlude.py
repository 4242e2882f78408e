"""`explain occlude`: scores while a grey square covers each part of an image (figure 7 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import ConfigError, escape
from cnnrun.explain.aim import ScoreDirection, choose_direction
from cnnrun.explain.figures.panels import palette_colour, titled_grid, truncate_text
from cnnrun.explain.figures.tiles import heat_map, scale_to_side
from cnnrun.explain.layer_names import capture_outputs
from cnnrun.explain.subject import TILE_SIDE, ExplainedNetwork, Explanation, ImagesToExplain, compute_class_scores

_IMAGE_SIDE = 2 * TILE_SIDE
_OUTSIDE_GREY = 200  # grey level of pixels beyond the centres of the outermost squares
_MAX_KEY_NAMES = 9  # classes in the key of colours


@dataclass(frozen=True)
class OcclusionScores:
    """Scores with the square at each position [rows, columns], and the positions of its top left corner."""

    score: Tensor
    energy: Tensor
    winner: Tensor  # index of the class with the highest score
    tops: list[int]
    lefts: list[int]
    size: int


class SquareGrid(NamedTuple):
    """The side of the square, and the distance between its positions, in pixels."""

    size: int
    step: int


@dataclass(frozen=True)
class OccludedImage:
    """The scores of one image with the square at each position, and without it; the channel is the strongest one."""

    occlusion: OcclusionScores
    direction: ScoreDirection
    score_before: float
    channel: int
    names: tuple[str, ...]


def occlude(
    subject: ExplainedNetwork,
    images: ImagesToExplain,
    layer: str | None,
    class_name: str | None,
    size: int | None,
    stride: int | None,
) -> Explanation:
    """Draw the score, the sum of the strongest feature map and the winning class by the position of a grey square.

    By default its side is a quarter of the image's shorter side, and its step a quarter of its side. Raises
    ConfigError.
    """
    trained, place = subject.trained, subject.find_feature_map_layer(layer)
    _, height, width = trained.facts.image_shape
    size = size or max(1, min(height, width) // 4)
    grid = SquareGrid(size, stride or max(1, size // 4))
    if size > min(height, width):
        raise ConfigError(f"--size {size}: larger than the image, {width}x{height}")
    class_scores = subject.class_scores(images.pixels)
    direction = choose_direction(class_scores, class_name, images, compare_with_itself=True)
    scores_before = direction.scores(class_scores.display_BK).tolist()
    sums = subject.layer_features(place, images.pixels).sum((2, 3))
    names = class_scores.names if class_scores.is_comparable else ()
    rows, image_rows = [], []
    for index in range(len(images)):
        channel = int(sums[index].argmax())
        occlusion = measure_occlusion(
            subject, images.pixels[index], direction.select(index), place.module_name, channel, grid
        )
        occluded = OccludedImage(occlusion, direction, scores_before[index], channel, names)
        rows.append(_draw_row(images, index, occluded))
        image_rows.append(_image_row(images, index, occluded))
    caption = (
        f"A grey square of {size} pixels moves by {grid.step}: the {direction.quantity} of the class in the title, "
        f"the sum of the strongest map of {place.title}, each from black (lowest) to yellow (highest)"
        + (", and the winning class as a colour, by the square's centre." if names[1:] else ".")
    )
    data = {"layer": place.title, "size": size, "stride": grid.step, "pictures": image_rows}
    return Explanation(titled_grid(rows), caption, data, "pictures")


def measure_occlusion(
    subject: ExplainedNetwork,
    image_CHW: Tensor,
    direction: ScoreDirection,
    module: str,
    channel: int,
    grid: SquareGrid,
) -> OcclusionScores:
    """Measure scores of one image with a square of the data's mean colour at each position, in batches."""
    trained, (size, step) = subject.trained, grid
    _, height, width = image_CHW.shape
    tops, lefts = _square_starts(height, size, step), _square_starts(width, size, step)
    corners = torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts)).view(-1, 2).to(trained.device)
    rows, columns = torch.arange(height, device=trained.device), torch.arange(width, device=trained.device)
    grey = torch.tensor(trained.facts.mean, device=trained.device).view(-1, 1, 1)
    scores, energies, winners = [], [], []
    with torch.no_grad(), capture_outputs(trained.network, [module]) as outputs:
        for part in corners.split(subject.batch_size):
            in_rows = (rows >= part[:, :1]) & (rows < part[:, :1] + size)
            in_columns = (columns >= part[:, 1:]) & (columns < part[:, 1:] + size)
            mask = in_rows[:, None, :, None] & in_columns[:, None, None, :]
            class_scores = compute_class_scores(trained, torch.where(mask, grey, image_CHW))
            scores.append(direction.scores(class_scores.display_BK))
            energies.append(outputs[module][:, channel].sum((1, 2)))
            winners.append(class_scores.display_BK.argmax(1))
    score, energy, winner = (
        torch.cat(parts).view(len(tops), len(lefts)).cpu() for parts in (scores, energies, winners)
    )
    return OcclusionScores(score.float(), energy.float(), winner, tops, lefts, size)


def _square_starts(side: int, size: int, step: int) -> list[int]:
    """Positions of the square along a side; the last one ends at the edge."""
    starts = list(range(0, side - size + 1, step))
    return starts if starts[-1] == side - size else [*starts, side - size]


def _draw_row(images: ImagesToExplain, index: int, occluded: OccludedImage) -> list[tuple[str, Any]]:
    occlusion, names = occluded.occlusion, occluded.names
    pillow_image = scale_to_side(images.pillow_image(index), _IMAGE_SIDE).convert("RGB")

    def draw_map(values: Tensor) -> Any:
        heat = heat_map(values, float(values.min()), float(values.max()))
        return _stretch_over_image(heat, occlusion, images, pillow_image.size)

    score_range, energy_range = (
        f"{float(values.min()):.3g} to {float(values.max()):.3g}" for values in (occlusion.score, occlusion.energy)
    )
    row = [
        (images.title(index), pillow_image),
        (f"{occluded.direction.names[index]} {occluded.score_before:.3g}: {score_range}", draw_map(occlusion.score)),
        (f"channel {occluded.channel}: {energy_range}", draw_map(occlusion.energy)),
    ]
    if len(names) < 2:
        return row
    winner_image, frequent = _colour_winners(occlusion.winner)
    stretched = _stretch_over_image(winner_image, occlusion, images, pillow_image.size)
    return [*row, ("winning class", stretched), _draw_key(frequent, names)]


def _stretch_over_image(
    colours: Any, occlusion: OcclusionScores, images: ImagesToExplain, size: tuple[int, int]
) -> Any:
    """Stretch a map with a pixel for each position of the square over the image; grey beyond the squares' centres."""
    from PIL import Image as Pil

    height, width = images.pixels.shape[2:]
    rows = _nearest_squares(occlusion.tops, height, occlusion.size)
    columns = _nearest_squares(occlusion.lefts, width, occlusion.size)
    stretched = np.asarray(colours)[rows.clip(0)][:, columns.clip(0)]
    inside = (rows >= 0)[:, None, None] & (columns >= 0)[None, :, None]
    pixels = np.where(inside, stretched, _OUTSIDE_GREY).astype(np.uint8)
    return Pil.fromarray(pixels).resize(size, Pil.Resampling.NEAREST)


def _nearest_squares(starts: Sequence[int], side: int, size: int) -> NDArray[np.int64]:
    """Index of the square with the nearest centre for each pixel along a side; -1 outside the centres' strips."""
    centres = np.array(starts) + size / 2
    pixels = np.arange(side) + 0.5
    distances = np.abs(pixels[:, None] - centres)
    max_distance = max(0.5, (centres[1] - centres[0]) / 2) if len(centres) > 1 else size / 2
    return np.where(distances.min(1) <= max_distance, distances.argmin(1), -1)


def _draw_key(frequent: Sequence[int], names: tuple[str, ...]) -> tuple[str, Any]:
    """Draw a key of colours and class names, the most frequent first."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    font, class_indices = ImageFont.load_default(size=12), frequent[:_MAX_KEY_NAMES]
    key = Pil.new("RGB", (130, 18 * len(class_indices) + 4), "white")
    draw = ImageDraw.Draw(key)
    for line, class_index in enumerate(class_indices):
        draw.rectangle((2, 18 * line + 3, 14, 18 * line + 15), fill=palette_colour(class_index))
        draw.text((20, 18 * line + 2), truncate_text(escape(names[class_index]), font, 108), "black", font)
    return "", key


def _colour_winners(winner: Tensor) -> tuple[Any, list[int]]:
    """Colour the winning class of each position; returns the image and the classes, the most frequent first."""
    from PIL import Image as Pil
    from PIL import ImageColor

    pillow_image = Pil.new("RGB", (winner.shape[1], winner.shape[0]))
    pillow_image.putdata([ImageColor.getrgb(palette_colour(class_index)) for class_index in winner.flatten().tolist()])
    class_indices, counts = winner.unique(return_counts=True)
    frequent = class_indices[counts.argsort(descending=True, stable=True)].tolist()
    return pillow_image, frequent


def _image_row(images: ImagesToExplain, index: int, occluded: OccludedImage) -> dict[str, Any]:
    occlusion, names, size = occluded.occlusion, occluded.names, occluded.occlusion.size
    row, column = divmod(int(occlusion.score.argmin()), occlusion.score.shape[1])
    left, top = occlusion.lefts[column], occlusion.tops[row]
    winner_names = [[names[class_index] for class_index in winners] for winners in occlusion.winner.tolist() if names]
    return {
        "picture": images.names[index],
        "target": occluded.direction.names[index],
        "score": occluded.score_before,
        "least": float(occlusion.score.min()),
        "least_box": [left, top, left + size, top + size],
        "channel": occluded.channel,
        "tops": occlusion.tops,
        "lefts": occlusion.lefts,
        "scores": occlusion.score.tolist(),
        "energies": occlusion.energy.tolist(),
        **({"said": winner_names} if len(names) > 1 else {}),
    }
