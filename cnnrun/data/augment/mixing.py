"""Two pictures in one: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), each picture with its own part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cnnrun.contracts.objects import OBJECT_COLUMNS
from cnnrun.data.augment.colour import rectangle_masks
from cnnrun.data.augment.geometry import drop_hidden_objects, warp
from cnnrun.data.augment.random_slots import Draws

_LEVELS = 4096


@cache
def _beta_quantiles(alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha) at the middles of _LEVELS equal parts of [0, 1]."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, (torch.arange(_LEVELS).double() + 0.5).numpy() / _LEVELS)).float()


def beta_from_uniform(alpha: float, uniform_B: Tensor) -> Tensor:
    """Beta(alpha, alpha) variables out of uniform ones, to 1 in 4096."""
    return _beta_quantiles(alpha).to(uniform_B.device, non_blocking=True)[(uniform_B * _LEVELS).long()]


@dataclass(frozen=True)
class MosaicCorner:
    """A corner of a mosaic: the region it fills (x1, y1, x2, y2), and its picture's scale and upper left corner."""

    region_B4: Tensor
    scale_B: Tensor
    left_B: Tensor
    top_B: Tensor


def mosaic_corners(x_B: Tensor, y_B: Tensor, height: int, width: int) -> list[MosaicCorner]:
    """The four corners of pictures that meet at (x, y): each picture just covers its own, and ends at the meeting."""
    zero, found = torch.zeros_like(x_B), []
    for below in (False, True):
        for right in (False, True):
            wide, tall = (width - x_B if right else x_B), (height - y_B if below else y_B)
            scale = torch.maximum(wide / width, tall / height)
            low = (x_B if right else zero), (y_B if below else zero)
            high = (zero + width if right else x_B), (zero + height if below else y_B)
            left, top = (x_B if right else x_B - scale * width), (y_B if below else y_B - scale * height)
            found.append(MosaicCorner(torch.stack([*low, *high], 1), scale, left, top))
    return found


def make_mosaics(
    pictures: Tensor, partners_BP: Tensor, targets: dict[str, Tensor], draws: Draws, part: float, least: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a `part` of the pictures each becomes a corner of a picture of four (Bochkovskiy et al. 2020), boxes and all.

    The four meet at a random point in the middle half. Objects come first; targets are padded to four times as many.
    """
    batch, _, height, width = pictures.shape
    use_B = draws["mosaic"] < part
    members = torch.cat([torch.arange(batch, device=pictures.device)[:, None], partners_BP], 1)
    x = (width * (0.25 + 0.5 * draws["mosaic_x"])).round()
    y = (height * (0.25 + 0.5 * draws["mosaic_y"])).round()
    made, moved = pictures, []
    for number, corner in enumerate(mosaic_corners(x, y, height, width)):
        of = members[:, number]
        filled = _filled(corner.region_B4, height, width) & use_B[:, None, None]
        made = torch.where(filled[:, None], _shrunk(pictures[of], corner), made)
        own = _cut({name: targets[name][of] for name in OBJECT_COLUMNS}, corner, least)
        # A picture that stays as it is keeps its own objects, once.
        stay = targets if number == 0 else {**targets, "objects": torch.full_like(targets["objects"], -1)}
        moved.append({name: torch.where(_like(use_B, own[name]), own[name], stay[name]) for name in OBJECT_COLUMNS})
    return made, {**targets, **_packed({name: torch.cat([each[name] for each in moved], 1) for name in OBJECT_COLUMNS})}


def _packed(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same objects in the same order, with all places that hold none behind them, and empty."""
    none = targets["objects"] < 0
    order = none.to(torch.uint8).argsort(dim=1, stable=True)
    packed = {}
    for name, values in targets.items():
        held = values if name == "objects" else values.masked_fill(_like(none, values), 0)
        packed[name] = held.gather(1, _like(order, values).expand_as(values))
    return packed


def _like(which: Tensor, values: Tensor) -> Tensor:
    """The same with dimensions of size 1 behind, until there are as many as `values` has."""
    return which.view(*which.shape, *[1] * (values.dim() - which.dim()))


def _filled(region_B4: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in a region: bool [B, H, W]."""
    x1, y1, x2, y2 = (side[:, None] for side in region_B4.unbind(1))
    columns = torch.arange(width, device=region_B4.device)
    rows = torch.arange(height, device=region_B4.device)
    return ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None]


def _cut(targets: dict[str, Tensor], corner: MosaicCorner, least: float) -> dict[str, Tensor]:
    """Targets of pictures that became corners: boxes shrunk, and cut at the region's edges."""
    offset = torch.stack([corner.left_B, corner.top_B] * 2, 1)[:, None]
    boxes = targets["boxes"] * corner.scale_B[:, None, None] + offset
    whole = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    low, high = (side.repeat(1, 2)[:, None] for side in corner.region_B4.split(2, 1))
    return drop_hidden_objects(targets, torch.minimum(torch.maximum(boxes, low), high), whole, least)


def _shrunk(pictures: Tensor, corner: MosaicCorner) -> Tensor:
    """Pictures at the corner's scale and place, on a canvas of their own size."""
    height, width = pictures.shape[2:]
    matrix = torch.zeros(len(pictures), 2, 3, device=pictures.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / corner.scale_B
    matrix[:, 0, 2] = (width / 2 - corner.left_B) / corner.scale_B - width / 2
    matrix[:, 1, 2] = (height / 2 - corner.top_B) / corner.scale_B - height / 2
    return warp(pictures, matrix)


def mix_images(pictures: Tensor, partner_B: Tensor, draws: Draws, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Each picture with a part of another of the batch, and how much of it is its own: float32 [B].

    Where both are asked for, each picture is mixed in one of the two ways, half of them in each.
    """
    others = pictures[partner_B]
    height, width = pictures.shape[2:]
    cut_B = draws["mix"] < (0.5 if mixup and cutmix else float(bool(cutmix)))
    own_B = torch.ones_like(draws["mix"])
    weight = own_B[:, None, None, None]
    if mixup:
        own_B = beta_from_uniform(mixup, draws["mix_part"])
        weight = own_B[:, None, None, None]
    if cutmix:
        area = (1 - beta_from_uniform(cutmix, draws["mix_part"])) * height * width
        square = torch.full_like(area, height / width)
        patch = rectangle_masks(area, square, draws["mix_y"], draws["mix_x"], height, width)
        # The labels follow the pixels that were really pasted, after rounding.
        own_B = torch.where(cut_B, 1 - patch.float().mean((1, 2)), own_B)
        pasted = (~patch).float()[:, None]
        weight = torch.where(cut_B[:, None, None, None], pasted, weight)
    return torch.lerp(others, pictures, weight.expand_as(pictures)), own_B
