"""The dense head of a detector: at every cell of every level a box and a score a class; and what is left of them.

Anchor-free, as FCOS (Tian et al. 2019): a cell says how far the box's four sides are from its own middle. What the head
gives is [B, A, PLACE + K] for the A cells of all levels: the box in pixels, the cell's middle and stride in pixels
(what the assignment needs to know), and a logit a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnrun.base.boxes import non_maximum_suppression, pad_to

FIRST_LOGIT = 7  # x1, y1, x2, y2 of the box; x, y, stride of the cell
_RARE = 0.01  # the score that a new network gives every class everywhere (Lin et al. 2017, section 3.3)
# The exponents of a distance in strides: up to a thousand, and down to a thousandth, so that every box has an area.
_NEAR, _FAR = -7.0, 7.0


class LogitConv(nn.Conv2d):
    """A 1x1 convolution that begins with a low score everywhere: nearly all cells show nothing."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.constant_(self.bias, -math.log((1 - _RARE) / _RARE))


class DenseHead(nn.Module):
    """Feature maps of several levels -> boxes and logits of all their cells.

    Each level goes through two towers of `depth` convolutions, for what is there and for where it is. `shared` levels
    use the same convolutions, each with batch norms of its own (RTMDet, Lyu et al. 2022, section 3.2).
    """

    def __init__(
        self,
        in_channels: list[int],
        image: list[int],
        classes: int,
        channels: int,
        depth: int,
        shared: bool,
        depthwise: bool,
    ) -> None:
        super().__init__()
        self.in_channels, self.image, self.classes = in_channels, image, classes
        self.channels, self.depth, self.shared, self.depthwise = channels, depth, shared, depthwise
        kinds = 1 if shared else len(in_channels)
        widths = [channels if depth else each for each in in_channels]
        for tower in ("what", "where"):
            self.add_module(
                f"{tower}_convs",
                nn.ModuleList(_convs(each, channels, depth, depthwise) for each in in_channels[:kinds]),
            )
            self.add_module(
                f"{tower}_norms",
                nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth)) for _ in in_channels),
            )
        self.logits = nn.ModuleList(LogitConv(width, classes, 1) for width in widths[:kinds])
        self.sides = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in widths[:kinds])

    def forward(self, *levels: Tensor) -> Tensor:
        found = []
        for level, features in enumerate(levels):
            kind = 0 if self.shared else level
            what = self._through("what", kind, level, features)
            where = self._through("where", kind, level, features)
            # In float32 whatever the network computes in: bfloat16 would round a box of a large picture to 2 pixels.
            logits, sides = self.logits[kind](what).float(), self.sides[kind](where).float()
            found.append(_cells(sides, logits, self.image))
        return torch.cat(found, 1)

    def _through(self, tower: str, kind: int, level: int, x: Tensor) -> Tensor:
        convs, norms = self.get_submodule(f"{tower}_convs.{kind}"), self.get_submodule(f"{tower}_norms.{level}")
        for conv, norm in zip(convs.children(), norms.children(), strict=True):
            x = F.silu(norm(conv(x)))
        return x


def _convs(in_channels: int, channels: int, depth: int, depthwise: bool) -> nn.ModuleList:
    def conv(width: int) -> nn.Module:
        if not depthwise:
            return nn.Conv2d(width, channels, 3, padding=1, bias=False)
        across = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        return nn.Sequential(across, nn.Conv2d(width, channels, 1, bias=False))

    return nn.ModuleList(conv(in_channels if number == 0 else channels) for number in range(depth))


def _cells(sides_B4HW: Tensor, logits_BKHW: Tensor, image: list[int]) -> Tensor:
    """[B, H * W, PLACE + K]: the cells lie evenly over the picture, whatever made the map so large."""
    height, width = sides_B4HW.shape[2:]
    tall, wide = image[0] / height, image[1] / width
    y = (torch.arange(height, device=sides_B4HW.device) + 0.5) * tall
    x = (torch.arange(width, device=sides_B4HW.device) + 0.5) * wide
    y, x = y[:, None].expand(height, width), x[None].expand(height, width)
    stride = torch.full_like(x, max(tall, wide))
    left, up, right, down = (sides_B4HW.clamp(_NEAR, _FAR).exp() * max(tall, wide)).unbind(1)
    batch = sides_B4HW.shape[0]
    place = torch.stack([x, y, stride]).expand(batch, 3, height, width)
    made = torch.cat([torch.stack([x - left, y - up, x + right, y + down], 1), place, logits_BKHW], 1)
    return made.flatten(2).transpose(1, 2)


class DetectionDecoder(nn.Module):
    """What the head gives -> the best `most` boxes of each picture: {boxes [B, N, 4], scores [B, N], labels [B, N]}.

    Scores fall; where fewer are found, the rest has score 0, label -1 and a box of zeros.
    """

    def __init__(self, image: list[int], most: int, candidates: int, overlap: float, least: float) -> None:
        super().__init__()
        self.image, self.most, self.candidates = image, most, candidates
        self.overlap, self.least = overlap, least

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        classes = outputs.shape[2] - FIRST_LOGIT
        logits = outputs[:, :, FIRST_LOGIT:].flatten(1)
        logits, place = logits.topk(min(self.candidates, logits.shape[1]), 1)
        scores, labels, cell = logits.sigmoid(), place % classes, place // classes
        boxes = outputs[:, :, :4].gather(1, cell[:, :, None].expand(-1, -1, 4))
        height, width = self.image
        edge = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        boxes = torch.minimum(boxes.clamp(min=0), edge)
        kept = non_maximum_suppression(boxes, scores, labels, self.overlap) & (scores > self.least)
        scores, best = torch.where(kept, scores, 0.0).topk(min(self.most, scores.shape[1]), 1)
        found = scores > 0
        boxes = boxes.gather(1, best[:, :, None].expand(-1, -1, 4)) * found[:, :, None]
        labels = torch.where(found, labels.gather(1, best), -1)
        return {
            "boxes": pad_to(boxes, self.most, 0.0),
            "scores": pad_to(scores, self.most, 0.0),
            "labels": pad_to(labels, self.most, -1),
        }


def cell_stride(image: Sequence[int], shape: Sequence[int]) -> float:
    """Pixels from one cell of a map [C, H, W] to the next."""
    return max(image[0] / shape[1], image[1] / shape[2])
