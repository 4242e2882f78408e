"""Average precision and recall of boxes by COCO's protocol, computed by faster-coco-eval.

Boxes and areas are in pixels of the original images, not of the resized ones that the network sees.
"""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.objects import CROWD, DIFFICULT, OBJECT
from cnnrun.contracts.results import RankedRows
from cnnrun.tasks.intervals import BOOTSTRAP_DRAWS, bootstrap_weights

COCO_METRICS = {
    "AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5,
    "AR1": 6, "AR10": 7, "AR100": 8, "AR_small": 9, "AR_medium": 10, "AR_large": 11,
}  # fmt: skip
_OUT_OF_RANGE_AREA = 1e11  # outside all of COCO's ranges: COCO ignores the object and the box that matches it
_RECALL_LEVELS = 101
_AREA_RANGES = {"_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10), "": (0, 1e10)}  # pixels
# Draws for an interval are limited: draws * max(images, classes) is at most _MAX_WORK, unless that gives too few draws.
_MIN_DRAWS, _MAX_WORK = 100, 100_000


class AveragePrecision:
    """Collects predicted and true boxes, and evaluates them by COCO's protocol."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes = classes
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def add(self, results: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        """Add a batch: {boxes, scores, labels} of a decoder and {boxes, objects, roles, areas, view} of the data."""
        predicted = {name: value.cpu().numpy() for name, value in results.items()}
        true = {name: value.cpu().numpy() for name, value in targets.items()}
        predicted["boxes"], true["boxes"] = (undo_view(part["boxes"], true["view"]) for part in (predicted, true))
        for row in range(len(predicted["scores"])):
            image = len(self._images) + 1
            self._images.append({"id": image})
            self._detections += _coco_detections(
                image, *(predicted[name][row] for name in ("boxes", "scores", "labels"))
            )
            self._annotations += _coco_annotations(
                image, len(self._annotations), {name: values[row] for name, values in true.items()}
            )

    def evaluate(self) -> Any:
        """Run COCO's evaluation on all images; returns the COCOeval object."""
        from faster_coco_eval import COCO, COCOeval_faster

        categories = [{"id": number, "name": name} for number, name in enumerate(self._classes, 1)]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress and a table
            truth = COCO({"images": self._images, "annotations": self._annotations, "categories": categories})
            detections = (
                truth.loadRes(self._detections)
                if self._detections
                else COCO({"images": self._images, "annotations": [], "categories": categories})
            )
            evaluation = COCOeval_faster(truth, detections, "bbox", separate_eval=True)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def bootstrap_metrics(self, evaluation: Any) -> dict[str, NDArray[np.float64]]:
        """Values of each metric over bootstrap draws of the images; the matches within an image are reused.

        A value is NaN if the draw has no object of that size.
        """
        count = len(self._images)
        max_draws = _MAX_WORK // max(count, len(self._classes))
        matches = list(evaluation._evalImgs_cpp)  # for each class, for each area range, for each image
        defined = [name for name, value in coco_metrics(evaluation).items() if value is not None]
        metrics_per_draw: list[dict[str, float | None]] = []
        indices, draw_evaluation = np.arange(count), copy.copy(evaluation)
        for times in bootstrap_weights(count, max(_MIN_DRAWS, min(BOOTSTRAP_DRAWS, max_draws))):
            draw = np.repeat(indices, times.astype(np.int64)).tolist()
            draw_matches = [matches[start + index] for start in range(0, len(matches), count) for index in draw]
            metrics_per_draw.append(_accumulate_matches(draw_evaluation, draw_matches))
        return {name: np.array([metrics[name] for metrics in metrics_per_draw], np.float64) for name in defined}

    def object_counts(self) -> list[int]:
        """Number of true objects of each class, without crowds and difficult ones."""
        labels = [
            row["category_id"] - 1
            for row in self._annotations
            if row["area"] < _OUT_OF_RANGE_AREA and not row["iscrowd"]
        ]
        counts: list[int] = np.bincount(np.array(labels, np.int64), minlength=len(self._classes)).tolist()
        return counts


def _accumulate_matches(evaluation: Any, matches: list[Any]) -> dict[str, float | None]:
    """Metrics of the images that have these matches; overwrites the results in `evaluation`."""
    from faster_coco_eval.core.faster_eval_api import _C

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.eval = _C.COCOevalAccumulate(evaluation._paramsEval, matches)
        evaluation.summarize()
    return coco_metrics(evaluation)


def undo_view(boxes_BN4: NDArray[Any], view_B6: NDArray[Any]) -> NDArray[np.float64]:
    """Convert boxes from pixels of the network's input to those of the original image, clipped to it (see `View`)."""
    scale, offset, size = (np.tile(part, 2) for part in np.split(view_B6[:, None], 3, 2))
    boxes: NDArray[np.float64] = ((boxes_BN4.astype(np.float64) - offset) / scale).clip(0, size)
    return boxes


def _xywh(boxes_N4: NDArray[Any]) -> list[list[float]]:
    rows: list[list[float]] = np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], 1).tolist()
    return rows


def _coco_detections(
    image: int, boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any]
) -> list[dict[str, Any]]:
    """Predicted boxes of an image in COCO's format, without padding."""
    is_box = labels >= 0
    return [
        {"image_id": image, "category_id": label + 1, "bbox": box, "score": score}
        for box, score, label in zip(
            _xywh(boxes[is_box]), scores[is_box].tolist(), labels[is_box].tolist(), strict=True
        )
    ]


def _coco_annotations(image: int, last_id: int, true: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    """True boxes of an image in COCO's format, without padding; ids follow `last_id`."""
    is_box = true["objects"] >= 0
    rows = zip(*(true[name][is_box].tolist() for name in ("objects", "roles", "areas")), strict=True)
    return [
        {
            "id": last_id + number,
            "image_id": image,
            "category_id": label + 1,
            "bbox": box,
            "area": _OUT_OF_RANGE_AREA if role == DIFFICULT else area,
            "iscrowd": int(role == CROWD),
        }
        for number, (box, (label, role, area)) in enumerate(zip(_xywh(true["boxes"][is_box]), rows, strict=True), 1)
    ]


def coco_metrics(evaluation: Any) -> dict[str, float | None]:
    """COCO's twelve metrics by name; None where COCO has -1 because no object has that size."""
    stats = np.asarray(evaluation.stats, dtype=np.float64)
    return {name: _none_if_undefined(stats[index]) for name, index in COCO_METRICS.items()}


def undefined_coco_metrics(targets: dict[str, Tensor]) -> dict[str, str]:
    """Metrics that are undefined for a split with these targets -> the reason: it has no object of that size."""
    is_object = (targets["objects"] >= 0) & (targets["roles"] == OBJECT)
    areas = targets["areas"][is_object]
    reasons: dict[str, str] = {}
    for size, (low, high) in _AREA_RANGES.items():
        if not bool(((areas >= low) & (areas <= high)).any()):
            names = [name for name in COCO_METRICS if name.endswith(size)]
            reason = f"has no {size[1:]} object ({low:g} to {high:g} pixels of area)" if size else "has no object"
            reasons |= dict.fromkeys(names, reason)
    return reasons


def _none_if_undefined(value: float) -> float | None:
    """A value of COCO's, or None for -1."""
    return float(value) if value > -1 else None


def per_class_rows(evaluation: Any, classes: tuple[str, ...], counts: list[int]) -> RankedRows:
    """AP, AP50, AR100 (None if no image has the class) and the number of objects of each class."""
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    rows = (
        {
            "class": name,
            "AP": _defined_mean(precision[:, :, k, 0, -1]),
            "AP50": _defined_mean(precision[0, :, k, 0, -1]),
            "AR100": _defined_mean(recall[:, k, 0, -1]),
            "objects": counts[k],
        }
        for k, name in enumerate(classes)
    )
    return RankedRows(rows, "AP", "objects")


def precision_recall_rows(evaluation: Any, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Precision at COCO's recall levels, with boxes matched at IoU 0.5, and the score at which each level is reached.

    Classes that no image has are left out.
    """
    precision, scores = evaluation.eval["precision"], evaluation.eval["scores"]
    return [
        {
            "class": name,
            "recall": round(level / (_RECALL_LEVELS - 1), 2),
            "precision": float(precision[0, level, k, 0, -1]),
            "score": float(scores[0, level, k, 0, -1]),
        }
        for k, name in enumerate(classes)
        if precision[0, 0, k, 0, -1] > -1
        for level in range(_RECALL_LEVELS)
    ]


def _defined_mean(values: NDArray[Any]) -> float | None:
    """Mean of the values that are not COCO's -1; None if all are."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
