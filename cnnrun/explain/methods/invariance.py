"""How features and scores change as pictures are shifted, enlarged and turned: figure 5 of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrun.contracts.figure import Plot, Series
from cnnrun.data.augment.geometry import affine_matrices, warp
from cnnrun.explain.aim import ScoreDirection, choose_direction
from cnnrun.explain.figures.panels import titled_grid, to_pillow
from cnnrun.explain.figures.tiles import mosaic, scale_to_side
from cnnrun.explain.layer_names import capture_outputs
from cnnrun.explain.subject import (
    TILE_SIDE,
    Explanation,
    ImagesToExplain,
    Subject,
    compute_class_scores,
    plot_to_pillow,
)

_STEPS = 25
_SHIFT, _SCALE = 0.25, 1.8  # of the height, either way; as in the paper
_SHOWN = 4  # pictures of each change that are drawn


@dataclass(frozen=True)
class ImageTransform:
    """One way of changing a picture: its name, its amounts and the matrices [S, 2, 3] that make them."""

    name: str
    amounts: list[float]
    matrix_S23: Tensor


def invariance(subject: Subject, shown: ImagesToExplain, layers: Sequence[str], target: str | None) -> Explanation:
    """Distances to the features of the picture as it is, relative to their length, layer by layer; and the score.

    By default of the first conv and the last layer before the task's. Raises ConfigError.
    """
    telling = subject.informative_layers()
    first = next((place for place in telling if place.kind == "conv"), telling[0])
    places = [subject.find_layer(layer) for layer in layers] or [first, telling[-1]]
    modules = list(dict.fromkeys(place.module_name for place in places))
    paths = {place.module_name: place.title for place in places}
    given = subject.trained
    aim = choose_direction(subject.class_scores(shown.pixels), target, shown, compare_with_itself=True)
    told, rows = [], []
    for change in image_transforms(given.facts.image, given.device):
        found = [_changed(subject, shown.pixels[n], change, aim.select(n), modules) for n in range(len(shown))]
        plots = [
            Plot(paths[module], change.name, "distance / length", _series(shown, change, [f[module] for f in found]))
            for module in modules
        ]
        plots.append(
            Plot("what the network says", change.name, aim.quantity, _series(shown, change, [f[""] for f in found]))
        )
        rows.append([_example(shown, change), *[("", plot_to_pillow(plot, 0.5)) for plot in plots]])
        for n, of_picture in enumerate(found):
            lines = {paths.get(module, "score"): values for module, values in of_picture.items()}
            told.append({"picture": shown.names[n], "change": change.name, "amounts": change.amounts, **lines})
    caption = (
        f"How far the features of {len(shown)} picture(s) move, relative to their length, and what the network says "
        f"({aim.quantity}) as each is shifted, enlarged and turned; black comes in from outside."
    )
    data = {"layers": [paths[module] for module in modules], "targets": aim.names, "curves": told}
    return Explanation(titled_grid(rows), caption, data)


def image_transforms(image: Sequence[int], device: torch.device) -> list[ImageTransform]:
    """The paper's three: a vertical shift, a scale, a turn all the way round."""
    one, none = torch.ones(_STEPS), torch.zeros(_STEPS)
    mirror = torch.ones(_STEPS, 2)
    shift = torch.linspace(-_SHIFT, _SHIFT, _STEPS).mul(image[1]).round()
    scale = torch.linspace(1, _SCALE, _STEPS)
    turn = torch.linspace(0, 2 * math.pi, _STEPS)
    still = torch.zeros(_STEPS, 2)
    made = (
        ("shift down, pixels", shift, affine_matrices(none, none, one, mirror, torch.stack([none, shift], 1))),
        ("enlarged, times", scale, affine_matrices(none, none, 1 / scale, mirror, still)),
        ("turned, degrees", turn.rad2deg(), affine_matrices(turn, none, one, mirror, still)),
    )
    return [
        ImageTransform(name, [round(value, 4) for value in s.tolist()], matrix.to(device)) for name, s, matrix in made
    ]


def _changed(
    subject: Subject, picture_CHW: Tensor, change: ImageTransform, aim: ScoreDirection, modules: Sequence[str]
) -> dict[str, list[float]]:
    """The distances of each module's features, and the scores under ""."""
    given = subject.trained
    pictures = warp(picture_CHW.expand(len(change.amounts), -1, -1, -1), change.matrix_S23)
    with torch.no_grad(), capture_outputs(given.network, modules) as kept:
        said = compute_class_scores(given, torch.cat([picture_CHW[None], pictures]))
        found = {"": aim.scores(said.display_BK)[1:].tolist()}
        for module in modules:
            own, *_ = flat = kept[module].flatten(1).float()
            found[module] = ((flat[1:] - own).norm(dim=1) / own.norm().clamp(min=1e-12)).tolist()
    return {**{module: found[module] for module in modules}, "": found[""]}


def _series(shown: ImagesToExplain, change: ImageTransform, values: list[list[float]]) -> tuple[Series, ...]:
    return tuple(Series(shown.title(n), change.amounts, each) for n, each in enumerate(values))


def _example(shown: ImagesToExplain, change: ImageTransform) -> tuple[str, Any]:
    chosen = torch.linspace(0, _STEPS - 1, _SHOWN).round().long()
    made = warp(shown.pixels[:1].expand(_SHOWN, -1, -1, -1), change.matrix_S23[chosen])
    return change.name, mosaic([scale_to_side(to_pillow(each).convert("RGB"), TILE_SIDE) for each in made], 2)
