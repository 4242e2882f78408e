"""Overlap of predicted and true masks: intersection over union, Dice coefficient and pixel accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.results import RankedRows
from cnnrun.contracts.target_kind import IGNORED

Floats = NDArray[np.float64]


def count_pixels(predicted_BHW: Tensor, true_BHW: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Count the pixels of each class in each image, and the confusion matrix; pixels to ignore are left out.

    Returns the pixels that are (in both, predicted, true) of each class, int64 [B, 3, K], and the confusion matrix of
    all images, int64 [K, K].
    """
    images = torch.arange(len(true_BHW), device=true_BHW.device)[:, None, None]
    is_measured = true_BHW != IGNORED
    cells = (images * classes + true_BHW.long()) * classes + predicted_BHW.long()
    counts = torch.bincount(cells[is_measured], minlength=len(true_BHW) * classes * classes)
    counts_BKK = counts.view(-1, classes, classes)
    per_class = torch.stack([counts_BKK.diagonal(dim1=1, dim2=2), counts_BKK.sum(1), counts_BKK.sum(2)], 1)
    return per_class, counts_BKK.sum(0)


@dataclass(frozen=True)
class Overlaps:
    """Pixels of each image that are (in both, predicted, true) of each class: [N, 3, K]."""

    counts_N3K: Floats

    def __len__(self) -> int:
        return len(self.counts_N3K)

    def metrics(self, weight_N: Floats | None = None) -> dict[str, float | None]:
        """Mean IoU and mean Dice over the classes that are true or predicted somewhere, and pixel accuracy.

        All are None if every pixel is to be ignored.
        """
        both, predicted, true = self._totals(weight_N)
        if not true.any():
            return dict.fromkeys(("mean_iou", "mean_dice", "pixel_accuracy"))
        occurs = predicted + true > 0
        iou = both[occurs] / (predicted + true - both)[occurs]
        dice = 2 * both[occurs] / (predicted + true)[occurs]
        return {
            "mean_iou": float(iou.mean()),
            "mean_dice": float(dice.mean()),
            "pixel_accuracy": float(both.sum() / true.sum()),
        }

    def per_class_rows(self, classes: tuple[str, ...]) -> RankedRows:
        """A row for each class: IoU, Dice, precision and recall of its pixels, and their number; None if undefined."""
        both, predicted, true = self._totals(None)

        def ratio(part: float, whole: float) -> float | None:
            return part / whole if whole else None

        rows = (
            {
                "class": name,
                "iou": ratio(both[k], predicted[k] + true[k] - both[k]),
                "dice": ratio(2 * both[k], predicted[k] + true[k]),
                "precision": ratio(both[k], predicted[k]),
                "recall": ratio(both[k], true[k]),
                "pixels": int(true[k]),
            }
            for k, name in enumerate(classes)
        )
        return RankedRows(rows, "iou", "pixels")

    def _totals(self, weight_N: Floats | None) -> Floats:
        weight = np.ones(len(self)) if weight_N is None else weight_N
        totals: Floats = np.tensordot(weight, self.counts_N3K, 1)
        return totals
