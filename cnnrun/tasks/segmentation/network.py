"""The network's part in segmentation: head, loss and decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnrun.contracts.target_kind import IGNORED
from cnnrun.contracts.task_parts import Criterion, Targets


class SegmentationHead(nn.Module):
    """Feature maps [B, C, h, w] -> logits [B, K, H, W] of the input's size: 1x1 convolution, bilinear upsampling."""

    def __init__(self, channels: int, classes: int, image: list[int]) -> None:
        super().__init__()
        self.channels, self.classes, self.image = channels, classes, image
        self.conv = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv(x)
        if list(logits.shape[2:]) == self.image:
            return logits
        # In float32 even under mixed precision: the loss is measured at the input's size.
        return F.interpolate(logits.float(), size=self.image, mode="bilinear", align_corners=False)


class SegmentationCriterion(Criterion):
    """Cross-entropy, averaged over the pixels of an image, plus Dice loss, averaged over the classes that it shows.

    Both are means over images, so that a batch split into micro-batches has the same loss. The Dice loss of a class is
    1 - 2 * sum(p * t) / (sum(p) + sum(t)) over the image's pixels: that of Milletari et al. (2016) without its squares.
    Pixels to ignore count in neither loss. An image in which every pixel is ignored has the loss 0.
    """

    def __init__(self, dice_weight: float) -> None:
        super().__init__()
        self.dice_weight = dice_weight

    def forward(self, outputs: Tensor, targets: Targets) -> dict[str, Tensor]:
        labels_BHW = targets["masks"].long()
        is_measured = labels_BHW != IGNORED
        pixels_B = is_measured.sum((1, 2)).clamp(min=1)
        loss_BHW = F.cross_entropy(outputs, labels_BHW, reduction="none", ignore_index=IGNORED)
        losses = {"cross_entropy": (loss_BHW.sum((1, 2)) / pixels_B).mean()}
        if self.dice_weight:
            losses["dice"] = self.dice_weight * self._dice_losses(outputs, labels_BHW, is_measured).mean()
        return losses

    def _dice_losses(self, outputs: Tensor, labels_BHW: Tensor, is_measured: Tensor) -> Tensor:
        """Dice loss of each image: [B]."""
        probability = outputs.softmax(1) * is_measured[:, None]
        label = labels_BHW.masked_fill(~is_measured, 0)
        true = torch.zeros_like(probability).scatter_(1, label[:, None], is_measured[:, None].to(probability.dtype))
        both, total = (probability * true).sum((2, 3)), (probability + true).sum((2, 3))
        is_shown = true.sum((2, 3)) > 0
        loss_BK = (1 - 2 * both / total.clamp(min=1e-6)) * is_shown
        return loss_BK.sum(1) / is_shown.sum(1).clamp(min=1)


class SegmentationDecoder(nn.Module):
    """Logits [B, K, H, W] -> `mask`, the most probable class of each pixel, uint8, and its probability `confidence`."""

    def forward(self, outputs: Tensor) -> dict[str, Tensor]:
        confidence, mask = outputs.softmax(1).max(1)
        return {"mask": mask.to(torch.uint8), "confidence": confidence}
