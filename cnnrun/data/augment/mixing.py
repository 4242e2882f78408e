"""Images made of several: mixup (Zhang et al. 2018), cutmix (Yun et al. 2019) and mosaic (Bochkovskiy et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cnnrun.contracts.objects import OBJECT_COLUMNS
from cnnrun.data.augment.colour import rectangle_masks
from cnnrun.data.augment.geometry import drop_hidden_objects, warp, warp_masks
from cnnrun.data.augment.random_slots import Draws

_LEVELS = 4096  # quantiles in the table


@cache
def _beta_quantiles(alpha: float) -> Tensor:
    """The quantiles of Beta(alpha, alpha) at the middles of 4,096 equal parts of [0, 1]."""
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, (torch.arange(_LEVELS).double() + 0.5).numpy() / _LEVELS)).float()


def beta_from_uniform(alpha: float, uniform_B: Tensor) -> Tensor:
    """Beta(alpha, alpha) variables from uniform ones in [0, 1), by a table of 4,096 quantiles."""
    return _beta_quantiles(alpha).to(uniform_B.device, non_blocking=True)[(uniform_B * _LEVELS).long()]


@dataclass(frozen=True)
class MosaicTile:
    """A tile of a mosaic: the region it fills (x1, y1, x2, y2), and the scale and upper left corner of its image."""

    region_B4: Tensor
    scale_B: Tensor
    left_B: Tensor
    top_B: Tensor


def mosaic_tiles(x_B: Tensor, y_B: Tensor, height: int, width: int) -> list[MosaicTile]:
    """The four tiles of a mosaic, which meet at (x, y). Each image just covers its region, with a corner at (x, y)."""
    zero, tiles = torch.zeros_like(x_B), []
    for below in (False, True):
        for right in (False, True):
            region_width, region_height = (width - x_B if right else x_B), (height - y_B if below else y_B)
            scale = torch.maximum(region_width / width, region_height / height)
            low = (x_B if right else zero), (y_B if below else zero)
            high = (zero + width if right else x_B), (zero + height if below else y_B)
            left, top = (x_B if right else x_B - scale * width), (y_B if below else y_B - scale * height)
            tiles.append(MosaicTile(torch.stack([*low, *high], 1), scale, left, top))
    return tiles


def make_mosaics(
    images: Tensor,
    partners_BP: Tensor,
    targets: dict[str, Tensor],
    draws: Draws,
    probability: float,
    min_visible: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn images, each with `probability`, into mosaics with their three partners; boxes and masks follow.

    The four images meet at a random point in the middle half. Targets are padded to four times as many places, with the
    objects first. Objects of which less than `min_visible` is left are dropped.
    """
    batch, _, height, width = images.shape
    is_mosaic_B = draws["mosaic"] < probability
    members = torch.cat([torch.arange(batch, device=images.device)[:, None], partners_BP], 1)
    x = (width * (0.25 + 0.5 * draws["mosaic_x"])).round()
    y = (height * (0.25 + 0.5 * draws["mosaic_y"])).round()
    mosaics, masks, tile_targets = images, targets.get("masks"), list[dict[str, Tensor]]()
    for number, tile in enumerate(mosaic_tiles(x, y, height, width)):
        sources_B = members[:, number]
        mask = _region_masks(tile.region_B4, height, width) & is_mosaic_B[:, None, None]
        matrices = _tile_matrices(tile, height, width)
        mosaics = torch.where(mask[:, None], warp(images[sources_B], matrices), mosaics)
        if masks is not None:
            masks = torch.where(mask, warp_masks(targets["masks"][sources_B], matrices), masks)
            continue
        placed = _place_targets({name: targets[name][sources_B] for name in OBJECT_COLUMNS}, tile, min_visible)
        # An image that is not a mosaic keeps its own objects, in the columns of the first tile only.
        unchanged = targets if number == 0 else {**targets, "objects": torch.full_like(targets["objects"], -1)}
        tile_targets.append(
            {
                name: torch.where(_add_dimensions(is_mosaic_B, placed[name]), placed[name], unchanged[name])
                for name in OBJECT_COLUMNS
            }
        )
    if masks is not None:
        return mosaics, {**targets, "masks": masks}
    joined = {name: torch.cat([columns[name] for columns in tile_targets], 1) for name in OBJECT_COLUMNS}
    return mosaics, {**targets, **_move_objects_first(joined)}


def _move_objects_first(targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same targets with all objects first, in the same order; the places without objects follow, set to 0."""
    is_empty = targets["objects"] < 0
    order = is_empty.to(torch.uint8).argsort(dim=1, stable=True)
    sorted_targets = {}
    for name, values in targets.items():
        cleared = values if name == "objects" else values.masked_fill(_add_dimensions(is_empty, values), 0)
        sorted_targets[name] = cleared.gather(1, _add_dimensions(order, values).expand_as(values))
    return sorted_targets


def _add_dimensions(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with trailing dimensions of size 1, so that it has as many dimensions as `like`."""
    return tensor.view(*tensor.shape, *[1] * (like.dim() - tensor.dim()))


def _region_masks(region_B4: Tensor, height: int, width: int) -> Tensor:
    """Masks of the pixels in a region, bool [B, H, W]."""
    x1, y1, x2, y2 = (side[:, None] for side in region_B4.unbind(1))
    columns = torch.arange(width, device=region_B4.device)
    rows = torch.arange(height, device=region_B4.device)
    return ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None]


def _place_targets(targets: dict[str, Tensor], tile: MosaicTile, min_visible: float) -> dict[str, Tensor]:
    """Targets of images placed in a tile: boxes are scaled, moved and clipped to the region."""
    offset = torch.stack([tile.left_B, tile.top_B] * 2, 1)[:, None]
    boxes = targets["boxes"] * tile.scale_B[:, None, None] + offset
    full_area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    low, high = (side.repeat(1, 2)[:, None] for side in tile.region_B4.split(2, 1))
    clipped = torch.minimum(torch.maximum(boxes, low), high)
    return drop_hidden_objects(targets, clipped, full_area, min_visible)


def _tile_matrices(tile: MosaicTile, height: int, width: int) -> Tensor:
    """The matrices, [B, 2, 3], that put images at the tile's scale and place on a canvas of their own size."""
    matrix = torch.zeros(len(tile.scale_B), 2, 3, device=tile.scale_B.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / tile.scale_B
    matrix[:, 0, 2] = (width / 2 - tile.left_B) / tile.scale_B - width / 2
    matrix[:, 1, 2] = (height / 2 - tile.top_B) / tile.scale_B - height / 2
    return matrix


def mix_images(images: Tensor, partner_B: Tensor, draws: Draws, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Images mixed with their partners, and the weight of each image's own label, float32 [B].

    `mixup` and `cutmix` are the parameters of the Beta distributions, 0 for off. If both are on, each image is mixed in
    one of the two ways at random, with equal chances.
    """
    partners = images[partner_B]
    height, width = images.shape[2:]
    is_cutmix_B = draws["mix"] < (0.5 if mixup and cutmix else float(bool(cutmix)))
    own_B = torch.ones_like(draws["mix"])
    weight = own_B[:, None, None, None]
    if mixup:
        own_B = beta_from_uniform(mixup, draws["mix_part"])
        weight = own_B[:, None, None, None]
    if cutmix:
        area = (1 - beta_from_uniform(cutmix, draws["mix_part"])) * height * width
        height_per_width = torch.full_like(area, height / width)
        patch = rectangle_masks(area, height_per_width, draws["mix_y"], draws["mix_x"], height, width)
        # The label weights use the pasted pixels as rounded, and not the area that was drawn.
        own_B = torch.where(is_cutmix_B, 1 - patch.float().mean((1, 2)), own_B)
        outside_patch = (~patch).float()[:, None]
        weight = torch.where(is_cutmix_B[:, None, None, None], outside_patch, weight)
    return torch.lerp(partners, images, weight.expand_as(images)), own_B
