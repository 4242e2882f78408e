"""Where a picture would have to change for the network to say something else: slopes, at a layer or at the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cnnrun.base.errors import ConfigError
from cnnrun.explain.aim import ScoreDirection, choose_direction, no_relu_note
from cnnrun.explain.backward_rules import use_backward_rule
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import grey_tile, overlay_heat_map, scale_to_side
from cnnrun.explain.layer_names import capture_outputs
from cnnrun.explain.method_base import BackwardRule
from cnnrun.explain.subject import TILE_SIDE, Explanation, ImagesToExplain, Subject, compute_class_scores

_WIDE = 2 * TILE_SIDE
_HOW: dict[BackwardRule, str] = {
    "plain": "",
    "guided": ", by guided backpropagation",
    "deconv": ", through ReLUs as the deconvnet has it",
}


def gradcam(subject: Subject, shown: ImagesToExplain, layer: str | None, target: str | None) -> Explanation:
    """Where a layer's maps speak for what the network says (Selvaraju et al. 2017). Raises ConfigError.

    Where that comes from one place alone, as a detector's best score does, by HiResCAM (Draelos and Carin 2021).
    """
    place = subject.find_map_layer(layer)
    maps, aim, scores = class_activation_maps(subject, shown, place.module_name, place.title, target)
    rows, told = [], []
    for number in range(len(shown)):
        picture = scale_to_side(shown.pillow_image(number), _WIDE).convert("RGB")
        title = f"{aim.names[number]} {scores[number]:.3g}" + ("" if maps[number].any() else ", by nothing here")
        rows.append([(shown.title(number), picture), (title, overlay_heat_map(picture, maps[number]))])
        told.append(_told(shown, number, aim, scores[number]) | {"map": maps[number].tolist()})
    caption = (
        f"{place.title}: where its maps speak for what is written ({aim.quantity}), from black (not at all) to yellow "
        f"(most), each picture by itself: {'HiResCAM' if aim.is_local else 'Grad-CAM'}."
    )
    return Explanation(titled_grid(_two_by_two(rows)), caption, {"layer": place.title, "pictures": told}, "pictures")


def class_activation_maps(
    subject: Subject, shown: ImagesToExplain, module: str, path: str, target: str | None
) -> tuple[Tensor, ScoreDirection, list[float]]:
    """Each picture's map [B, H, W]: the ReLU of the maps weighed by their slopes' means (eq. 1, 2); aims and scores.

    For what is local, weighed by the slopes themselves: their mean over the map says nothing of one place.
    """
    said = subject.class_scores(shown.pixels)
    aim = choose_direction(said, target, shown)
    made = []
    for maps, slope in _slopes(subject, shown, aim, module, "plain"):
        if slope is None:
            raise ConfigError(f"--layer {path}: nothing that the network says comes from it")
        weights = slope if aim.is_local else slope.mean((2, 3), keepdim=True)
        made.append((weights * maps).sum(1).relu().float().cpu())
    return torch.cat(made), aim, aim.scores(said.display_BK).tolist()


def _slopes(
    subject: Subject, shown: ImagesToExplain, aim: ScoreDirection, module: str, rule: BackwardRule
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What comes out of a module, and the slope of what is said by it, some pictures at a time."""
    network = subject.trained.network
    for start in range(0, len(shown), subject.batch_size):
        pixels = shown.pixels[start : start + subject.batch_size].detach().requires_grad_()
        with torch.enable_grad(), use_backward_rule(network, rule), capture_outputs(network, [module]) as kept:
            strength = aim.select(start, len(pixels)).scores(compute_class_scores(subject.trained, pixels).raw_BK)
            (slope,) = torch.autograd.grad(strength.sum(), kept[module], allow_unused=True)
        yield kept[module].detach(), slope


def saliency(subject: Subject, shown: ImagesToExplain, target: str | None, rule: BackwardRule) -> Explanation:
    """How much each pixel would change what the network says (Simonyan et al. 2014, section 3.1). Raises ConfigError.

    The largest slope over colours. `rule` says what ReLUs hand back: see `layer_names.passing_back`.
    """
    slopes, aim, scores = input_gradients(subject, shown, target, rule)
    rows, told = [], []
    for number in range(len(shown)):
        size = slopes[number].abs().amax(0)
        picture = scale_to_side(shown.pillow_image(number), _WIDE).convert("RGB")
        title = f"{aim.names[number]} {scores[number]:.3g}"
        rows.append([(shown.title(number), picture), (title, grey_tile(size, 0.0, float(size.max()), _WIDE))])
        told.append(_told(shown, number, aim, scores[number]) | {"largest": float(size.max())})
    caption = (
        f"How much each pixel would change what is written ({aim.quantity}){_HOW[rule]}: black not at all, white most, "
        "each picture by itself."
    )
    caption += no_relu_note(subject) if rule != "plain" else ""
    return Explanation(titled_grid(_two_by_two(rows)), caption, {"rule": rule, "pictures": told}, "pictures")


def input_gradients(
    subject: Subject, shown: ImagesToExplain, target: str | None, rule: BackwardRule = "plain"
) -> tuple[Tensor, ScoreDirection, list[float]]:
    """The slope of what is said by each value of the normalised input [B, C, H, W], the aims, the scores."""
    said = subject.class_scores(shown.pixels)
    aim = choose_direction(said, target, shown)
    found = [slope for _, slope in _slopes(subject, shown, aim, "normalize", rule)]
    slopes = torch.cat([slope.float().cpu() for slope in found if slope is not None])
    return slopes, aim, aim.scores(said.display_BK).tolist()


def _two_by_two(rows: list[list[tuple[str, Any]]]) -> list[list[tuple[str, Any]]]:
    """Two pictures' rows in one."""
    return [list(chain.from_iterable(rows[start : start + 2])) for start in range(0, len(rows), 2)]


def _told(shown: ImagesToExplain, number: int, aim: ScoreDirection, score: float) -> dict[str, Any]:
    return {"picture": shown.names[number], "target": aim.names[number], "score": score}
