"""`explain gradcam` and `explain saliency`: gradients of a score at a layer's output or at the pixels."""

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
from cnnrun.explain.subject import TILE_SIDE, ExplainedNetwork, Explanation, ImagesToExplain, compute_class_scores

_IMAGE_SIDE = 2 * TILE_SIDE
_RULE_TEXTS: dict[BackwardRule, str] = {
    "plain": "",
    "guided": ", by guided backpropagation",
    "deconv": ", by the deconvnet's rule for ReLUs",
}


def gradcam(
    subject: ExplainedNetwork, images: ImagesToExplain, layer: str | None, class_name: str | None
) -> Explanation:
    """Draw where a layer's maps support a score, by Grad-CAM (Selvaraju et al. 2017). Raises ConfigError.

    For a score from one position alone, such as a detector's best one, use HiResCAM (Draelos and Carin 2021).
    """
    place = subject.find_feature_map_layer(layer)
    maps, direction, scores = class_activation_maps(subject, images, place.module_name, place.title, class_name)
    rows, image_rows = [], []
    for index in range(len(images)):
        pillow_image = scale_to_side(images.pillow_image(index), _IMAGE_SIDE).convert("RGB")
        title = f"{direction.names[index]} {scores[index]:.3g}" + ("" if maps[index].any() else ", no support here")
        rows.append([(images.title(index), pillow_image), (title, overlay_heat_map(pillow_image, maps[index]))])
        image_rows.append(_image_row(images, index, direction, scores[index]) | {"map": maps[index].tolist()})
    caption = (
        f"{place.title}: where its maps support the score in the title ({direction.quantity}), from black (none) to "
        f"yellow (most), each image by itself: {'HiResCAM' if direction.is_local else 'Grad-CAM'}."
    )
    data = {"layer": place.title, "pictures": image_rows}
    return Explanation(titled_grid(_pair_rows(rows)), caption, data, "pictures")


def class_activation_maps(
    subject: ExplainedNetwork, images: ImagesToExplain, module: str, path: str, class_name: str | None
) -> tuple[Tensor, ScoreDirection, list[float]]:
    """Compute the map of each image [B, H, W], with directions and scores.

    It is the ReLU of the feature maps weighted by their gradients' means (eq. 1, 2). For a local score the weights are
    the gradients themselves, since their mean over the map says nothing about one position.
    """
    class_scores = subject.class_scores(images.pixels)
    direction = choose_direction(class_scores, class_name, images)
    maps_BHW = []
    for maps_BCHW, gradient_BCHW in _output_gradients(subject, images, direction, module, "plain"):
        if gradient_BCHW is None:
            raise ConfigError(f"--layer {path}: no score depends on it")
        weights_BCHW = gradient_BCHW if direction.is_local else gradient_BCHW.mean((2, 3), keepdim=True)
        maps_BHW.append((weights_BCHW * maps_BCHW).sum(1).relu().float().cpu())
    return torch.cat(maps_BHW), direction, direction.scores(class_scores.display_BK).tolist()


def _output_gradients(
    subject: ExplainedNetwork, images: ImagesToExplain, direction: ScoreDirection, module: str, rule: BackwardRule
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Compute a module's output and the gradient of the scores by it (None if unused), a batch at a time."""
    network = subject.trained.network
    for start in range(0, len(images), subject.batch_size):
        pixels = images.pixels[start : start + subject.batch_size].detach().requires_grad_()
        with torch.enable_grad(), use_backward_rule(network, rule), capture_outputs(network, [module]) as outputs:
            class_scores = compute_class_scores(subject.trained, pixels)
            scores_B = direction.select(start, len(pixels)).scores(class_scores.raw_BK)
            (gradient,) = torch.autograd.grad(scores_B.sum(), outputs[module], allow_unused=True)
        yield outputs[module].detach(), gradient


def saliency(
    subject: ExplainedNetwork, images: ImagesToExplain, class_name: str | None, rule: BackwardRule
) -> Explanation:
    """Draw how strongly a score depends on each pixel (Simonyan et al. 2014, section 3.1). Raises ConfigError.

    A pixel's value is its largest gradient over colours. For `rule`, see `backward_rules.use_backward_rule`.
    """
    gradients, direction, scores = input_gradients(subject, images, class_name, rule)
    rows, image_rows = [], []
    for index in range(len(images)):
        strength_HW = gradients[index].abs().amax(0)
        pillow_image = scale_to_side(images.pillow_image(index), _IMAGE_SIDE).convert("RGB")
        title = f"{direction.names[index]} {scores[index]:.3g}"
        tile = grey_tile(strength_HW, 0.0, float(strength_HW.max()), _IMAGE_SIDE)
        rows.append([(images.title(index), pillow_image), (title, tile)])
        image_rows.append(_image_row(images, index, direction, scores[index]) | {"largest": float(strength_HW.max())})
    caption = (
        f"How strongly the score in the title ({direction.quantity}) depends on each pixel{_RULE_TEXTS[rule]}: black "
        "not at all, white most, each image by itself."
    )
    caption += no_relu_note(subject) if rule != "plain" else ""
    return Explanation(titled_grid(_pair_rows(rows)), caption, {"rule": rule, "pictures": image_rows}, "pictures")


def input_gradients(
    subject: ExplainedNetwork, images: ImagesToExplain, class_name: str | None, rule: BackwardRule = "plain"
) -> tuple[Tensor, ScoreDirection, list[float]]:
    """Compute the gradient of the scores by the normalized input [B, C, H, W], with directions and scores."""
    class_scores = subject.class_scores(images.pixels)
    direction = choose_direction(class_scores, class_name, images)
    batches = [batch for _, batch in _output_gradients(subject, images, direction, "normalize", rule)]
    gradients_BCHW = torch.cat([batch.float().cpu() for batch in batches if batch is not None])
    return gradients_BCHW, direction, direction.scores(class_scores.display_BK).tolist()


def _pair_rows(rows: list[list[tuple[str, Any]]]) -> list[list[tuple[str, Any]]]:
    """Join the rows of two images into one."""
    return [list(chain.from_iterable(rows[start : start + 2])) for start in range(0, len(rows), 2)]


def _image_row(images: ImagesToExplain, index: int, direction: ScoreDirection, score: float) -> dict[str, Any]:
    return {"picture": images.names[index], "target": direction.names[index], "score": score}
