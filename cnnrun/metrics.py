"""Numbers about classification, from counts that add up over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ClassificationCounts:
    """Counts from which every classification number follows: confusion matrix, top-k hits, calibration bins."""

    def __init__(self, classes: int, top_k: int, bins: int = 15) -> None:
        self.classes, self.top_k, self.bins = classes, min(top_k, classes), bins
        self._confusion = torch.zeros(classes * classes, dtype=torch.int64)
        self._hits = torch.zeros((), dtype=torch.int64)
        self._calibration = torch.zeros(3, bins, dtype=torch.float64)  # count, correct, sum of confidence

    def add(self, probability_BK: Tensor, labels_B: Tensor) -> None:
        """One batch; the counts stay on its device until they are read."""
        device = labels_B.device
        confidence, predicted = probability_BK.max(1)
        self._confusion = self._confusion.to(device)
        self._confusion += torch.bincount(labels_B * self.classes + predicted, minlength=self.classes**2)
        top = probability_BK.topk(self.top_k, 1).indices
        self._hits = self._hits.to(device) + (top == labels_B[:, None]).any(1).sum()
        # Bins are (low, high], as in Guo et al. 2017; confidence is never 0.
        place = (confidence.double() * self.bins).ceil().long().sub_(1).clamp_(0, self.bins - 1)
        rows = torch.stack([torch.ones_like(confidence), (predicted == labels_B).float(), confidence]).double()
        self._calibration = self._calibration.to(device).index_add(1, place, rows)

    @property
    def confusion_KK(self) -> Tensor:
        """Rows are the true classes, columns the predicted ones."""
        return self._confusion.view(self.classes, self.classes).cpu()

    def accuracy(self) -> float:
        return float(self.confusion_KK.diagonal().sum().double() / self.confusion_KK.sum())

    def top_k_accuracy(self) -> float:
        return float(self._hits.cpu().double() / self.confusion_KK.sum())

    def expected_calibration_error(self) -> float:
        """Mean gap between confidence and accuracy over the bins, weighted by their counts (Guo et al. 2017, eq. 3)."""
        count, correct, confidence = self._calibration.cpu()
        return float((correct - confidence).abs().sum() / count.sum())

    def per_class(self, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Precision, recall, F1 and support of each class; 0 where nothing was predicted or nothing is there."""
        confusion = self.confusion_KK.double()
        hits, predicted, support = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
        precision, recall = hits / predicted.clamp(min=1), hits / support.clamp(min=1)
        f1 = 2 * hits / (predicted + support).clamp(min=1)
        columns = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), support.long().tolist(), strict=True)
        return [{"class": name, "precision": p, "recall": r, "f1": f, "support": n} for name, p, r, f, n in columns]
