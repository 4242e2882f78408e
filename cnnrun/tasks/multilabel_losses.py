"""Losses of multilabel classification, which treat each label on its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cnnrun.config.spec import Kind
from cnnrun.contracts.task_parts import Criterion, Targets

_EPS = 1e-6


class MultilabelLossSpec(Kind):
    """Base class of losses that treat each label on its own."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        """Loss of each label, [B, K].

        `present_BK` is 0 or 1, or between them for mixed images. `weight_K` multiplies the loss of the present share
        of a label.
        """
        raise NotImplementedError


class Bce(MultilabelLossSpec):
    """Binary cross-entropy."""

    kind = "bce"

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        return F.binary_cross_entropy_with_logits(logit_BK, present_BK, pos_weight=weight_K, reduction="none")


class Focal(MultilabelLossSpec):
    """Focal loss: binary cross-entropy that gives easy labels less weight (Lin et al. 2017, eq. 4).

    A label that is present with the share t has the loss of `torchvision.ops.sigmoid_focal_loss`: cross-entropy with t,
    times (t * (1 - p) + (1 - t) * p)^gamma.
    """

    kind = "focal"
    main = "gamma"

    gamma: float = Field(2.0, ge=0)
    """The focusing exponent; 0 is `bce`."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        error = present_BK * (1 - score) + (1 - present_BK) * score
        # A power below 1 has an infinite slope at 0, where nothing is left to learn.
        return error.clamp(min=_EPS).pow(self.gamma) * Bce().loss_per_label(logit_BK, present_BK, weight_K)


class Asymmetric(MultilabelLossSpec):
    """Focal loss with a separate exponent for absent labels, whose easiest have no loss (Ridnik et al. 2021)."""

    kind = "asymmetric"

    positive: float = Field(0.0, ge=0)
    """The focusing exponent of present labels (gamma+)."""
    negative: float = Field(4.0, ge=0)
    """The focusing exponent of absent labels (gamma-)."""
    margin: float = Field(0.05, ge=0, lt=1)
    """Absent labels whose probability is below this have no loss."""

    def loss_per_label(self, logit_BK: Tensor, present_BK: Tensor, weight_K: Tensor | None) -> Tensor:
        score = logit_BK.sigmoid()
        shifted = (score - self.margin).clamp(
            min=0, max=1 - _EPS
        )  # eq. 5; below 1, for a tiny margin, so log1p is finite
        positive = (1 - score).clamp(min=_EPS).pow(self.positive) * F.logsigmoid(logit_BK)
        log_absent = F.logsigmoid(-logit_BK) if self.margin == 0 else torch.log1p(-shifted)
        negative = shifted.clamp(min=_EPS).pow(self.negative) * log_absent
        weight = 1.0 if weight_K is None else weight_K
        return -(weight * present_BK * positive + (1 - present_BK) * negative)


MultilabelLoss = Bce | Focal | Asymmetric


class MultilabelCriterion(Criterion):
    """Mean of the loss over labels and images."""

    weight: Tensor | None

    def __init__(self, loss: MultilabelLossSpec, weight_K: Tensor | None) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("weight", weight_K, persistent=False)

    def forward(self, outputs: Tensor, targets: Targets) -> dict[str, Tensor]:
        return {
            self.loss.kind: self.loss.loss_per_label(outputs, targets["present"].to(outputs.dtype), self.weight).mean()
        }
