"""Two pictures in one: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), each picture with its own part."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from cnnrun.colour import rectangles
from cnnrun.draws import Draws
from cnnrun.geometry import still_there, warp

_LEVELS = 4096


@cache
def _beta_quantiles(alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha) at the middles of _LEVELS equal parts of [0, 1]."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, (torch.arange(_LEVELS).double() + 0.5).numpy() / _LEVELS)).float()


def beta(alpha: float, uniform_B: Tensor) -> Tensor:
    """Beta(alpha, alpha) variables out of uniform ones, to 1 in 4096."""
    return _beta_quantiles(alpha).to(uniform_B.device)[(uniform_B * _LEVELS).long()]


def mosaic(
    pictures: Tensor, partners_BP: Tensor, targets: dict[str, Tensor], draws: Draws, part: float, least: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a `part` of the pictures each becomes a corner of a picture of four (Bochkovskiy et al. 2020), boxes and all.

    The four meet at a random point in the middle half; each is shrunk until it just covers its corner. Targets are
    padded to four times as many objects.
    """
    batch, _, height, width = pictures.shape
    use_B = draws["mosaic"] < part
    members = torch.cat([torch.arange(batch, device=pictures.device)[:, None], partners_BP], 1)
    x, y = width * (0.25 + 0.5 * draws["mosaic_x"]), height * (0.25 + 0.5 * draws["mosaic_y"])
    x, y = x.round(), y.round()
    made, moved = torch.zeros_like(pictures), []
    columns = torch.arange(width, device=pictures.device)
    rows = torch.arange(height, device=pictures.device)
    for corner in range(4):
        right, below = corner % 2 == 1, corner // 2 == 1
        scale = torch.maximum((width - x if right else x) / width, (height - y if below else y) / height)
        # The picture's corner that lies at the meeting point: an output pixel at p comes from (p - offset) / scale.
        offset_x = x if right else x - scale * width
        offset_y = y if below else y - scale * height
        there = ((columns >= x[:, None]) == right)[:, None] & ((rows >= y[:, None]) == below)[:, :, None]
        there &= use_B[:, None, None]
        shrunk = _shrunk(pictures[members[:, corner]], scale, offset_x, offset_y)
        made = torch.where(there[:, None], shrunk, made)
        own = {name: values[members[:, corner]] for name, values in targets.items() if name in _OF_OBJECTS}
        offset = torch.stack([offset_x, offset_y, offset_x, offset_y], 1)[:, None]
        boxes = own["boxes"] * scale[:, None, None] + offset
        whole = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
        low = torch.stack([x if right else 0 * x, y if below else 0 * y] * 2, 1)[:, None]
        high = torch.stack([0 * x + width if right else x, 0 * y + height if below else y] * 2, 1)[:, None]
        own = still_there(own, torch.minimum(torch.maximum(boxes, low), high), whole, least)
        if corner == 0:  # a picture that stays as it is keeps its own objects, once
            for name in ("boxes", "objects"):
                use = use_B.view(-1, *[1] * (own[name].dim() - 1))
                own[name] = torch.where(use, own[name], targets[name])
        else:
            own["objects"] = torch.where(use_B[:, None], own["objects"], -1)
        moved.append(own)
    joined = {name: torch.cat([each[name] for each in moved], 1) for name in moved[0]}
    return torch.where(use_B[:, None, None, None], made, pictures), {**targets, **joined}


_OF_OBJECTS = ("boxes", "objects", "roles", "areas")


def _shrunk(pictures: Tensor, scale_B: Tensor, left_B: Tensor, top_B: Tensor) -> Tensor:
    """Pictures at that scale with their upper left corner there, on a canvas of their own size."""
    height, width = pictures.shape[2:]
    matrix = torch.zeros(len(pictures), 2, 3, device=pictures.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale_B
    matrix[:, 0, 2] = (width / 2 - left_B) / scale_B - width / 2
    matrix[:, 1, 2] = (height / 2 - top_B) / scale_B - height / 2
    return warp(pictures, matrix)


def mixed(pictures: Tensor, partner_B: Tensor, draws: Draws, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each picture with a part of another of the batch, and how much of it is its own: float32 [B].

    Where both are asked for, each picture is mixed in one of the two ways, half of them in each.
    """
    others = pictures[partner_B]
    height, width = pictures.shape[2:]
    cut_B = draws["mix"] < (0.5 if mixup and cutmix else float(bool(cutmix)))
    own_B = torch.ones_like(draws["mix"])
    weight = own_B[:, None, None, None]
    if mixup:
        own_B = beta(mixup, draws["mix_part"])
        weight = own_B[:, None, None, None]
    if cutmix:
        area = (1 - beta(cutmix, draws["mix_part"])) * height * width
        square = torch.full_like(area, height / width)
        patch = rectangles(area, square, draws["mix_y"], draws["mix_x"], height, width)
        # The labels follow the pixels that were really pasted, after rounding.
        own_B = torch.where(cut_B, 1 - patch.float().mean((1, 2)), own_B)
        pasted = (~patch).float()[:, None]
        weight = torch.where(cut_B[:, None, None, None], pasted, weight)
    return torch.lerp(others, pictures, weight.expand_as(pictures)), own_B
