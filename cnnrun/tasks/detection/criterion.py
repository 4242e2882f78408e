"""The loss of detection: quality focal loss of the scores, and overlap loss of the boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnrun.contracts.task_parts import Criterion, Targets
from cnnrun.tasks.detection.assignment import Assignment, AssignmentSettings, Objects, assign_cells, batch_objects
from cnnrun.tasks.detection.box_losses import BoxLoss, box_loss
from cnnrun.tasks.detection.head import FIRST_LOGIT


@dataclass(frozen=True)
class DetectionLoss:
    """Settings of the loss: see the fields of `Detect`."""

    box_loss: BoxLoss
    box_weight: float
    gamma: float
    assignment: AssignmentSettings


class DetectionCriterion(Criterion):
    """Quality focal loss of every cell's scores, and overlap loss of the boxes of cells that learn an object.

    Both are sums over an image's cells, divided by the mean number of objects of a training image. This is a constant,
    so that a batch split into micro-batches has the same loss and gradient. (TOOD divides by the sum of the batch's
    qualities, which no part of a batch knows.)
    """

    def __init__(self, objects_per_image: float, settings: DetectionLoss) -> None:
        super().__init__()
        self.objects_per_image, self.settings = objects_per_image, settings

    def forward(self, outputs_BAF: Tensor, targets: Targets) -> dict[str, Tensor]:
        boxes_BA4, logits_BAK = outputs_BAF[:, :, :4], outputs_BAF[:, :, FIRST_LOGIT:]
        objects = batch_objects(targets)
        assignment = self.assign(outputs_BAF, objects)
        labels_BA = objects.labels_BM.clamp(min=0).gather(1, assignment.object_BA)
        quality_BA = assignment.quality_BA * assignment.foreground_BA
        target_BAK = (F.one_hot(labels_BA, logits_BAK.shape[2]) * quality_BA[:, :, None]).to(logits_BAK.dtype)
        score_loss_BAK = (
            quality_focal_loss(logits_BAK, target_BAK, self.settings.gamma) * assignment.has_loss_BA[:, :, None]
        )
        true_BA4 = objects.boxes_BM4.gather(1, assignment.object_BA[:, :, None].expand(-1, -1, 4))
        # The box of a cell without an object is compared with itself: no loss, and no division by the area of padding.
        true_BA4 = torch.where(assignment.foreground_BA[:, :, None], true_BA4, boxes_BA4.detach())
        box_loss_BA = (
            box_loss(self.settings.box_loss, boxes_BA4, true_BA4) * assignment.quality_BA * assignment.foreground_BA
        )
        scale = 1 / (self.objects_per_image * len(outputs_BAF))
        return {"score": score_loss_BAK.sum() * scale, "box": box_loss_BA.sum() * (self.settings.box_weight * scale)}

    def assign(self, outputs_BAF: Tensor, objects: Objects) -> Assignment:
        """Assign cells to objects for these raw outputs, without gradients."""
        cells_BA3 = outputs_BAF[:, :, 4:FIRST_LOGIT]
        scores, boxes = outputs_BAF[:, :, FIRST_LOGIT:].detach().sigmoid(), outputs_BAF[:, :, :4].detach()
        return assign_cells(scores, boxes, cells_BA3, objects, self.settings.assignment)


def quality_focal_loss(logits_BAK: Tensor, target_BAK: Tensor, gamma: float) -> Tensor:
    """Quality focal loss |target - score|^gamma * binary cross-entropy (Li et al. 2020, eq. 1).

    If gamma is 0, the entropy of the target is subtracted, so that the loss is 0 where the score equals the target.
    """
    loss = F.binary_cross_entropy_with_logits(logits_BAK, target_BAK, reduction="none")
    if gamma:
        return loss * (target_BAK - logits_BAK.sigmoid()).abs().pow(gamma)
    return loss - F.binary_cross_entropy(target_BAK, target_BAK, reduction="none")
