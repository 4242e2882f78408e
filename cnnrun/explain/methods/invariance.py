"""`explain invariance`: features and scores as images are shifted, enlarged and rotated (figure 5 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.contracts.figure import Plot, Series
from cnnrun.data.augment.geometry import affine_matrices, warp
from cnnrun.explain.aim import ScoreDirection, choose_direction
from cnnrun.explain.figures.panels import titled_grid, to_pillow
from cnnrun.explain.figures.tiles import mosaic, scale_to_side
from cnnrun.explain.layer_names import capture_outputs
from cnnrun.explain.subject import (
    TILE_SIDE,
    ExplainedNetwork,
    Explanation,
    ImagesToExplain,
    compute_class_scores,
    plot_to_pillow,
)

_STEPS = 25
_MAX_SHIFT, _MAX_SCALE = 0.25, 1.8  # as in the paper; shifts are shares of the height, up and down
_DRAWN_AMOUNTS = 4  # amounts of each transform that are drawn
_SCORE = "score"  # key of the scores beside those of modules


@dataclass(frozen=True)
class TransformSeries:
    """A series of transforms of an image: its name, its amounts and their matrices [S, 2, 3]."""

    name: str
    amounts: list[float]
    matrix_S23: Tensor


def invariance(
    subject: ExplainedNetwork, images: ImagesToExplain, layers: Sequence[str], class_name: str | None
) -> Explanation:
    """Measure each layer's feature distance from the unchanged image, relative to the features' length, and the score.

    The default layers are the first conv and the last layer before the head. Raises ConfigError.
    """
    informative = subject.informative_layers()
    first_conv = next((place for place in informative if place.kind == "conv"), informative[0])
    places = [subject.find_layer(layer) for layer in layers] or [first_conv, informative[-1]]
    modules = list(dict.fromkeys(place.module_name for place in places))
    paths = {place.module_name: place.title for place in places}
    trained = subject.trained
    direction = choose_direction(subject.class_scores(images.pixels), class_name, images, compare_with_itself=True)
    curves, rows = [], []
    for transform in image_transforms(trained.facts.image_shape, trained.device):
        measurements = [
            _measure_transform(subject, images.pixels[index], transform, direction.select(index), modules)
            for index in range(len(images))
        ]
        series = {
            key: _series(images, transform, [measurement[key] for measurement in measurements])
            for key in (*modules, _SCORE)
        }
        plots = [Plot(paths[module], transform.name, "distance / length", series[module]) for module in modules]
        plots.append(Plot(_SCORE, transform.name, direction.quantity, series[_SCORE]))
        rows.append([_draw_transform(images, transform), *[("", plot_to_pillow(plot, 0.5)) for plot in plots]])
        for index, measurement in enumerate(measurements):
            lines = {paths.get(module, _SCORE): values for module, values in measurement.items()}
            description = {"picture": images.names[index], "change": transform.name, "amounts": transform.amounts}
            curves.append({**description, **lines})
    caption = (
        f"How far the features of {format_count(len(images), 'image')} move, relative to their length, and how the "
        f"score ({direction.quantity}) changes as each is shifted, enlarged and rotated; the outside is black."
    )
    data = {"layers": [paths[module] for module in modules], "targets": direction.names, "curves": curves}
    return Explanation(titled_grid(rows), caption, data)


def image_transforms(image: Sequence[int], device: torch.device) -> list[TransformSeries]:
    """Build the three series of the paper: a vertical shift, an enlargement, and a full rotation."""
    ones, zeros = torch.ones(_STEPS), torch.zeros(_STEPS)
    no_flip = torch.ones(_STEPS, 2)
    shift = torch.linspace(-_MAX_SHIFT, _MAX_SHIFT, _STEPS).mul(image[1]).round()
    scale = torch.linspace(1, _MAX_SCALE, _STEPS)
    angle = torch.linspace(0, 2 * math.pi, _STEPS)
    no_shift = torch.zeros(_STEPS, 2)
    transforms = (
        ("shift down, pixels", shift, affine_matrices(zeros, zeros, ones, no_flip, torch.stack([zeros, shift], 1))),
        ("enlarged, times", scale, affine_matrices(zeros, zeros, 1 / scale, no_flip, no_shift)),
        ("rotated, degrees", angle.rad2deg(), affine_matrices(angle, zeros, ones, no_flip, no_shift)),
    )
    return [
        TransformSeries(name, [round(value, 4) for value in amounts.tolist()], matrix_S23.to(device))
        for name, amounts, matrix_S23 in transforms
    ]


def _measure_transform(
    subject: ExplainedNetwork,
    image_CHW: Tensor,
    transform: TransformSeries,
    direction: ScoreDirection,
    modules: Sequence[str],
) -> dict[str, list[float]]:
    """Measure the relative distance of each module's features, by module, and the scores, under _SCORE."""
    trained = subject.trained
    images_SCHW = warp(image_CHW.expand(len(transform.amounts), -1, -1, -1), transform.matrix_S23)
    with torch.no_grad(), capture_outputs(trained.network, modules) as outputs:
        class_scores = compute_class_scores(trained, torch.cat([image_CHW[None], images_SCHW]))
        values = {_SCORE: direction.scores(class_scores.display_BK)[1:].tolist()}
        for module in modules:
            reference, *_ = features_SF = outputs[module].flatten(1).float()
            values[module] = ((features_SF[1:] - reference).norm(dim=1) / reference.norm().clamp(min=1e-12)).tolist()
    return {**{module: values[module] for module in modules}, _SCORE: values[_SCORE]}


def _series(images: ImagesToExplain, transform: TransformSeries, values: list[list[float]]) -> tuple[Series, ...]:
    return tuple(
        Series(images.title(index), transform.amounts, image_values) for index, image_values in enumerate(values)
    )


def _draw_transform(images: ImagesToExplain, transform: TransformSeries) -> tuple[str, Any]:
    """Draw the first image at some amounts of a transform."""
    indices = torch.linspace(0, _STEPS - 1, _DRAWN_AMOUNTS).round().long()
    warped = warp(images.pixels[:1].expand(_DRAWN_AMOUNTS, -1, -1, -1), transform.matrix_S23[indices])
    tiles = [scale_to_side(to_pillow(pixels_CHW).convert("RGB"), TILE_SIDE) for pixels_CHW in warped]
    return transform.name, mosaic(tiles, 2)
