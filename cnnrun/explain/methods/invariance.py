"""How features and scores change as pictures are shifted, enlarged and turned: figure 5 of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrun.contracts.figure import Plot, Series
from cnnrun.data.augment.geometry import affine, warp
from cnnrun.explain.aim import Aim, aimed
from cnnrun.explain.figures.panels import picture_of, side_by_side
from cnnrun.explain.figures.tiles import grown, mosaic
from cnnrun.explain.layer_names import captured
from cnnrun.explain.subject import SIDE, Explanation, Shown, Subject, drawn, said_of

_STEPS = 25
_SHIFT, _SCALE = 0.25, 1.8  # of the height, either way; as in the paper
_SHOWN = 4  # pictures of each change that are drawn


@dataclass(frozen=True)
class Change:
    """One way of changing a picture: its name, its amounts and the matrices [S, 2, 3] that make them."""

    name: str
    amounts: list[float]
    matrix_S23: Tensor


def invariance(subject: Subject, shown: Shown, layers: Sequence[str], target: str | None) -> Explanation:
    """Distances to the features of the picture as it is, relative to their length, layer by layer; and the score.

    By default of the first conv and the last layer before the task's. Raises ConfigError.
    """
    telling = subject.telling()
    first = next((place for place in telling if place.kind == "conv"), telling[0])
    places = [subject.any(layer) for layer in layers] or [first, telling[-1]]
    modules = list(dict.fromkeys(place.module for place in places))
    paths = {place.module: place.title for place in places}
    given = subject.given
    aim = aimed(subject.said(shown.pixels), target, shown, itself=True)
    told, rows = [], []
    for change in changes(given.facts.image, given.device):
        found = [_changed(subject, shown.pixels[n], change, aim.part(n), modules) for n in range(len(shown))]
        plots = [
            Plot(paths[module], change.name, "distance / length", _series(shown, change, [f[module] for f in found]))
            for module in modules
        ]
        plots.append(
            Plot("what the network says", change.name, aim.what, _series(shown, change, [f[""] for f in found]))
        )
        rows.append([_example(shown, change), *[("", drawn(plot, 0.5)) for plot in plots]])
        for n, of_picture in enumerate(found):
            lines = {paths.get(module, "score"): values for module, values in of_picture.items()}
            told.append({"picture": shown.names[n], "change": change.name, "amounts": change.amounts, **lines})
    caption = (
        f"How far the features of {len(shown)} picture(s) move, relative to their length, and what the network says "
        f"({aim.what}) as each is shifted, enlarged and turned; black comes in from outside."
    )
    data = {"layers": [paths[module] for module in modules], "targets": aim.names, "curves": told}
    return Explanation(side_by_side(rows), caption, data)


def changes(image: Sequence[int], device: torch.device) -> list[Change]:
    """The paper's three: a vertical shift, a scale, a turn all the way round."""
    one, none = torch.ones(_STEPS), torch.zeros(_STEPS)
    mirror = torch.ones(_STEPS, 2)
    shift = torch.linspace(-_SHIFT, _SHIFT, _STEPS).mul(image[1]).round()
    scale = torch.linspace(1, _SCALE, _STEPS)
    turn = torch.linspace(0, 2 * math.pi, _STEPS)
    still = torch.zeros(_STEPS, 2)
    made = (
        ("shift down, pixels", shift, affine(none, none, one, mirror, torch.stack([none, shift], 1))),
        ("enlarged, times", scale, affine(none, none, 1 / scale, mirror, still)),
        ("turned, degrees", turn.rad2deg(), affine(turn, none, one, mirror, still)),
    )
    return [Change(name, [round(value, 4) for value in s.tolist()], matrix.to(device)) for name, s, matrix in made]


def _changed(
    subject: Subject, picture_CHW: Tensor, change: Change, aim: Aim, modules: Sequence[str]
) -> dict[str, list[float]]:
    """The distances of each module's features, and the scores under ""."""
    given = subject.given
    pictures = warp(picture_CHW.expand(len(change.amounts), -1, -1, -1), change.matrix_S23)
    with torch.no_grad(), captured(given.network, modules) as kept:
        said = said_of(given, torch.cat([picture_CHW[None], pictures]))
        found = {"": aim.of(said.shown_BK)[1:].tolist()}
        for module in modules:
            own, *_ = flat = kept[module].flatten(1).float()
            found[module] = ((flat[1:] - own).norm(dim=1) / own.norm().clamp(min=1e-12)).tolist()
    return {**{module: found[module] for module in modules}, "": found[""]}


def _series(shown: Shown, change: Change, values: list[list[float]]) -> tuple[Series, ...]:
    return tuple(Series(shown.title(n), change.amounts, each) for n, each in enumerate(values))


def _example(shown: Shown, change: Change) -> tuple[str, Any]:
    chosen = torch.linspace(0, _STEPS - 1, _SHOWN).round().long()
    made = warp(shown.pixels[:1].expand(_SHOWN, -1, -1, -1), change.matrix_S23[chosen])
    return change.name, mosaic([grown(picture_of(each).convert("RGB"), SIDE) for each in made], 2)
