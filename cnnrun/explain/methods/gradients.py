"""Where a picture would have to change for the network to say something else: slopes, at a layer or at the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cnnrun.base.errors import ConfigError
from cnnrun.explain.aim import Aim, aimed, other_rule
from cnnrun.explain.backward_rules import passing_back
from cnnrun.explain.figures.panels import side_by_side
from cnnrun.explain.figures.tiles import grey, grown, heated
from cnnrun.explain.layer_names import captured
from cnnrun.explain.method_base import Rule
from cnnrun.explain.subject import SIDE, Explanation, Shown, Subject, said_of

_WIDE = 2 * SIDE
_HOW: dict[Rule, str] = {
    "plain": "",
    "guided": ", by guided backpropagation",
    "deconv": ", through ReLUs as the deconvnet has it",
}


def gradcam(subject: Subject, shown: Shown, layer: str | None, target: str | None) -> Explanation:
    """Where a layer's maps speak for what the network says (Selvaraju et al. 2017). Raises ConfigError.

    Where that comes from one place alone, as a detector's best score does, by HiResCAM (Draelos and Carin 2021).
    """
    place = subject.maps(layer)
    maps, aim, scores = cams(subject, shown, place.module, place.title, target)
    rows, told = [], []
    for number in range(len(shown)):
        picture = grown(shown.picture(number), _WIDE).convert("RGB")
        title = f"{aim.names[number]} {scores[number]:.3g}" + ("" if maps[number].any() else ", by nothing here")
        rows.append([(shown.title(number), picture), (title, heated(picture, maps[number]))])
        told.append(_told(shown, number, aim, scores[number]) | {"map": maps[number].tolist()})
    caption = (
        f"{place.title}: where its maps speak for what is written ({aim.what}), from black (not at all) to yellow "
        f"(most), each picture by itself: {'HiResCAM' if aim.local else 'Grad-CAM'}."
    )
    return Explanation(side_by_side(_two_by_two(rows)), caption, {"layer": place.title, "pictures": told}, "pictures")


def cams(subject: Subject, shown: Shown, module: str, path: str, target: str | None) -> tuple[Tensor, Aim, list[float]]:
    """Each picture's map [B, H, W]: the ReLU of the maps weighed by their slopes' means (eq. 1, 2); aims and scores.

    For what is local, weighed by the slopes themselves: their mean over the map says nothing of one place.
    """
    said = subject.said(shown.pixels)
    aim = aimed(said, target, shown)
    made = []
    for maps, slope in _slopes(subject, shown, aim, module, "plain"):
        if slope is None:
            raise ConfigError(f"--layer {path}: nothing that the network says comes from it")
        weights = slope if aim.local else slope.mean((2, 3), keepdim=True)
        made.append((weights * maps).sum(1).relu().float().cpu())
    return torch.cat(made), aim, aim.of(said.shown_BK).tolist()


def _slopes(
    subject: Subject, shown: Shown, aim: Aim, module: str, rule: Rule
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What comes out of a module, and the slope of what is said by it, some pictures at a time."""
    network = subject.given.network
    for start in range(0, len(shown), subject.at_once):
        pixels = shown.pixels[start : start + subject.at_once].detach().requires_grad_()
        with torch.enable_grad(), passing_back(network, rule), captured(network, [module]) as kept:
            strength = aim.part(start, len(pixels)).of(said_of(subject.given, pixels).raw_BK)
            (slope,) = torch.autograd.grad(strength.sum(), kept[module], allow_unused=True)
        yield kept[module].detach(), slope


def saliency(subject: Subject, shown: Shown, target: str | None, rule: Rule) -> Explanation:
    """How much each pixel would change what the network says (Simonyan et al. 2014, section 3.1). Raises ConfigError.

    The largest slope over colours. `rule` says what ReLUs hand back: see `layer_names.passing_back`.
    """
    slopes, aim, scores = slopes_of(subject, shown, target, rule)
    rows, told = [], []
    for number in range(len(shown)):
        size = slopes[number].abs().amax(0)
        picture = grown(shown.picture(number), _WIDE).convert("RGB")
        title = f"{aim.names[number]} {scores[number]:.3g}"
        rows.append([(shown.title(number), picture), (title, grey(size, 0.0, float(size.max()), _WIDE))])
        told.append(_told(shown, number, aim, scores[number]) | {"largest": float(size.max())})
    caption = (
        f"How much each pixel would change what is written ({aim.what}){_HOW[rule]}: black not at all, white most, "
        "each picture by itself."
    )
    caption += other_rule(subject) if rule != "plain" else ""
    return Explanation(side_by_side(_two_by_two(rows)), caption, {"rule": rule, "pictures": told}, "pictures")


def slopes_of(
    subject: Subject, shown: Shown, target: str | None, rule: Rule = "plain"
) -> tuple[Tensor, Aim, list[float]]:
    """The slope of what is said by each value of the normalised input [B, C, H, W], the aims, the scores."""
    said = subject.said(shown.pixels)
    aim = aimed(said, target, shown)
    found = [slope for _, slope in _slopes(subject, shown, aim, "normalize", rule)]
    slopes = torch.cat([slope.float().cpu() for slope in found if slope is not None])
    return slopes, aim, aim.of(said.shown_BK).tolist()


def _two_by_two(rows: list[list[tuple[str, Any]]]) -> list[list[tuple[str, Any]]]:
    """Two pictures' rows in one."""
    return [list(chain.from_iterable(rows[start : start + 2])) for start in range(0, len(rows), 2)]


def _told(shown: Shown, number: int, aim: Aim, score: float) -> dict[str, Any]:
    return {"picture": shown.names[number], "target": aim.names[number], "score": score}
