"""The dense head of a detector, and the decoder that selects the best of its boxes.

Anchor-free like FCOS (Tian et al. 2019): every cell of every level predicts the distances from its centre to the four
sides of a box, and a logit per class. Raw outputs are [B, A, FIRST_LOGIT + K] for the A cells of all levels: the box in
pixels, the cell's centre and stride in pixels (which the assignment needs), and the K logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnrun.base.boxes import non_maximum_suppression, pad_to

FIRST_LOGIT = 7  # x1, y1, x2, y2 of the box; x, y, stride of the cell
_INITIAL_SCORE = 0.01  # of every class in every cell of a new network (Lin et al. 2017, section 3.3)
# Distances are exp(output) strides: from a thousandth, so that every box has an area, to a thousand.
_MIN_EXPONENT, _MAX_EXPONENT = -7.0, 7.0


class LogitConv(nn.Conv2d):
    """A 1x1 convolution whose initial scores are low everywhere, because nearly all cells have no object."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.constant_(self.bias, -math.log((1 - _INITIAL_SCORE) / _INITIAL_SCORE))


class DenseHead(nn.Module):
    """Feature maps of several levels -> raw outputs of all their cells.

    Each level goes through two towers of convolutions, one for the logits and one for the boxes; `tower_channels` are
    the channels of each convolution. If `shared`, all levels use the same convolutions, each with its own batch norms
    (RTMDet, Lyu et al. 2022, section 3.2).
    """

    def __init__(
        self,
        in_channels: list[int],
        image: list[int],
        classes: int,
        tower_channels: list[int],
        shared: bool,
        depthwise: bool,
    ) -> None:
        super().__init__()
        self.in_channels, self.image, self.classes = in_channels, image, classes
        self.tower_channels, self.shared, self.depthwise = tower_channels, shared, depthwise
        towers = 1 if shared else len(in_channels)
        widths = [tower_channels[-1] if tower_channels else width for width in in_channels]
        for tower in ("what", "where"):
            self.add_module(
                f"{tower}_convs",
                nn.ModuleList(_tower_convs(width, tower_channels, depthwise) for width in in_channels[:towers]),
            )
            self.add_module(
                f"{tower}_norms",
                nn.ModuleList(nn.ModuleList(map(nn.BatchNorm2d, tower_channels)) for _ in in_channels),
            )
        self.logits = nn.ModuleList(LogitConv(width, classes, 1) for width in widths[:towers])
        self.sides = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in widths[:towers])

    def forward(self, *levels: Tensor) -> Tensor:
        outputs = []
        for level, features in enumerate(levels):
            index = 0 if self.shared else level
            logit_features = self._apply_tower("what", index, level, features)
            box_features = self._apply_tower("where", index, level, features)
            # In float32 even under mixed precision: bfloat16 would round a box of a large image to 2 pixels.
            logits, sides = self.logits[index](logit_features).float(), self.sides[index](box_features).float()
            outputs.append(_cell_outputs(sides, logits, self.image))
        return torch.cat(outputs, 1)

    def _apply_tower(self, tower: str, index: int, level: int, x: Tensor) -> Tensor:
        convs, norms = self.get_submodule(f"{tower}_convs.{index}"), self.get_submodule(f"{tower}_norms.{level}")
        for conv, norm in zip(convs.children(), norms.children(), strict=True):
            x = F.silu(norm(conv(x)))
        return x


def _tower_convs(in_channels: int, tower_channels: list[int], depthwise: bool) -> nn.ModuleList:
    def build_conv(width: int, channels: int) -> nn.Module:
        if not depthwise:
            return nn.Conv2d(width, channels, 3, padding=1, bias=False)
        depthwise_conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        return nn.Sequential(depthwise_conv, nn.Conv2d(width, channels, 1, bias=False))

    widths = [in_channels, *tower_channels[:-1]]
    return nn.ModuleList(map(build_conv, widths[: len(tower_channels)], tower_channels))


def _cell_outputs(sides_B4HW: Tensor, logits_BKHW: Tensor, image: list[int]) -> Tensor:
    """Raw outputs [B, H * W, FIRST_LOGIT + K] of one level; its cells are evenly spaced over the image."""
    height, width = sides_B4HW.shape[2:]
    stride_y, stride_x = image[0] / height, image[1] / width
    y = (torch.arange(height, device=sides_B4HW.device) + 0.5) * stride_y
    x = (torch.arange(width, device=sides_B4HW.device) + 0.5) * stride_x
    y, x = y[:, None].expand(height, width), x[None].expand(height, width)
    stride = torch.full_like(x, max(stride_y, stride_x))
    distances = sides_B4HW.clamp(_MIN_EXPONENT, _MAX_EXPONENT).exp() * max(stride_y, stride_x)
    left, up, right, down = distances.unbind(1)
    batch = sides_B4HW.shape[0]
    cells = torch.stack([x, y, stride]).expand(batch, 3, height, width)
    outputs = torch.cat([torch.stack([x - left, y - up, x + right, y + down], 1), cells, logits_BKHW], 1)
    return outputs.flatten(2).transpose(1, 2)


class DetectionDecoder(nn.Module):
    """Raw outputs -> the best `max_boxes` boxes of each image: {boxes [B, N, 4], scores [B, N], labels [B, N]}.

    Scores fall. If there are fewer boxes, the rest have score 0, label -1 and a box of zeros. Non-maximum suppression
    with the threshold `overlap` gets the `candidates` highest scores; boxes need a score above `min_score`.
    """

    def __init__(self, image: list[int], max_boxes: int, candidates: int, overlap: float, min_score: float) -> None:
        super().__init__()
        self.image, self.max_boxes, self.candidates = image, max_boxes, candidates
        self.overlap, self.min_score = overlap, min_score

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        classes = outputs.shape[2] - FIRST_LOGIT
        logits = outputs[:, :, FIRST_LOGIT:].flatten(1)
        logits, indices = logits.topk(min(self.candidates, logits.shape[1]), 1)
        scores, labels, cells = logits.sigmoid(), indices % classes, indices // classes
        boxes = outputs[:, :, :4].gather(1, cells[:, :, None].expand(-1, -1, 4))
        height, width = self.image
        edges = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        boxes = torch.minimum(boxes.clamp(min=0), edges)
        is_selected = non_maximum_suppression(boxes, scores, labels, self.overlap) & (scores > self.min_score)
        scores, best = torch.where(is_selected, scores, 0.0).topk(min(self.max_boxes, scores.shape[1]), 1)
        is_box = scores > 0
        boxes = boxes.gather(1, best[:, :, None].expand(-1, -1, 4)) * is_box[:, :, None]
        labels = torch.where(is_box, labels.gather(1, best), -1)
        return {
            "boxes": pad_to(boxes, self.max_boxes, 0.0),
            "scores": pad_to(scores, self.max_boxes, 0.0),
            "labels": pad_to(labels, self.max_boxes, -1),
        }


def cell_stride(image: Sequence[int], shape: Sequence[int]) -> float:
    """Distance in pixels between neighbouring cells of a feature map [C, H, W] on an image [H, W]."""
    return max(image[0] / shape[1], image[1] / shape[2])
