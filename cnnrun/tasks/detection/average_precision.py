"""COCO's own protocol, counted by faster-coco-eval: average precision and recall of boxes.

Everything is measured in the pixels of the pictures as they were given, whatever the network saw of them.
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
from cnnrun.tasks.intervals import BOOTSTRAP_DRAWS, bootstrap_weights

COCO_METRICS = {
    "AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5,
    "AR1": 6, "AR10": 7, "AR100": 8, "AR_small": 9, "AR_medium": 10, "AR_large": 11,
}  # fmt: skip
_BEYOND = 1e11  # an area outside all of COCO's ranges: such a box is passed over wherever it is matched
_CURVE = 101  # COCO's recall levels
_SIZES = {"_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10), "": (0, 1e10)}  # COCO's, in pixels
_FEWEST, _WORK = 100, 100_000  # draws at least, and pictures or classes of all draws at most, for an interval


class AveragePrecision:
    """Collects boxes found and true, picture by picture."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes = classes
        self._images: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []
        self._found: list[dict[str, Any]] = []

    def add(self, results: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        """A batch: {boxes, scores, labels} of a decoder, {boxes, objects, roles, areas, view} of the data."""
        found = {name: value.cpu().numpy() for name, value in results.items()}
        true = {name: value.cpu().numpy() for name, value in targets.items()}
        found["boxes"], true["boxes"] = (undo_view(each["boxes"], true["view"]) for each in (found, true))
        for row in range(len(found["scores"])):
            image = len(self._images) + 1
            self._images.append({"id": image})
            self._found += _detections(image, *(found[name][row] for name in ("boxes", "scores", "labels")))
            self._truth += _annotations(image, len(self._truth), {name: each[row] for name, each in true.items()})

    def evaluate(self) -> Any:
        """COCO's evaluation, done."""
        from faster_coco_eval import COCO, COCOeval_faster

        categories = [{"id": number, "name": name} for number, name in enumerate(self._classes, 1)]
        with contextlib.redirect_stdout(io.StringIO()):  # it narrates
            truth = COCO({"images": self._images, "annotations": self._truth, "categories": categories})
            found = (
                truth.loadRes(self._found)
                if self._found
                else COCO({"images": self._images, "annotations": [], "categories": categories})
            )
            evaluation = COCOeval_faster(truth, found, "bbox", separate_eval=True)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation

    def bootstrap_metrics(self, evaluation: Any) -> dict[str, NDArray[np.float64]]:
        """The numbers over draws of the pictures: what was matched within a picture stays, and is counted anew.

        NaN where a draw has nothing of that size to find.
        """
        count, most = len(self._images), _WORK // max(len(self._images), len(self._classes))
        matched = list(evaluation._evalImgs_cpp)  # class by class and size by size, every picture
        found: list[dict[str, float | None]] = []
        known = [name for name, value in coco_metrics(evaluation).items() if value is not None]
        every, again = np.arange(count), copy.copy(evaluation)
        for times in bootstrap_weights(count, max(_FEWEST, min(BOOTSTRAP_DRAWS, most))):
            drawn = np.repeat(every, times.astype(np.int64)).tolist()
            found.append(
                _accumulate_matches(again, [matched[k + i] for k in range(0, len(matched), count) for i in drawn])
            )
        return {name: np.array([each[name] for each in found], np.float64) for name in known}

    def object_counts(self) -> list[int]:
        """The objects of each class that were to be found."""
        wanted = [each["category_id"] - 1 for each in self._truth if each["area"] < _BEYOND and not each["iscrowd"]]
        counts: list[int] = np.bincount(np.array(wanted, np.int64), minlength=len(self._classes)).tolist()
        return counts


def _accumulate_matches(evaluation: Any, matched: list[Any]) -> dict[str, float | None]:
    """The numbers of pictures given by what was matched in each."""
    from faster_coco_eval.core.faster_eval_api import _C

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.eval = _C.COCOevalAccumulate(evaluation._paramsEval, matched)
        evaluation.summarize()
    return coco_metrics(evaluation)


def undo_view(boxes_BN4: NDArray[Any], view_B6: NDArray[Any]) -> NDArray[np.float64]:
    """Boxes of the network's picture in the pixels of the picture given, cut at its edges: see `task.View`."""
    scale, offset, size = (np.tile(each, 2) for each in np.split(view_B6[:, None], 3, 2))
    made: NDArray[np.float64] = ((boxes_BN4.astype(np.float64) - offset) / scale).clip(0, size)
    return made


def _xywh(boxes_N4: NDArray[Any]) -> list[list[float]]:
    rows: list[list[float]] = np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], 1).tolist()
    return rows


def _detections(image: int, boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any]) -> list[dict[str, Any]]:
    real = labels >= 0
    return [
        {"image_id": image, "category_id": label + 1, "bbox": box, "score": score}
        for box, score, label in zip(_xywh(boxes[real]), scores[real].tolist(), labels[real].tolist(), strict=True)
    ]


def _annotations(image: int, before: int, true: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    real = true["objects"] >= 0
    rows = zip(*(true[name][real].tolist() for name in ("objects", "roles", "areas")), strict=True)
    return [
        {
            "id": before + number,
            "image_id": image,
            "category_id": label + 1,
            "bbox": box,
            "area": _BEYOND if role == DIFFICULT else area,
            "iscrowd": int(role == CROWD),
        }
        for number, (box, (label, role, area)) in enumerate(zip(_xywh(true["boxes"][real]), rows, strict=True), 1)
    ]


def coco_metrics(evaluation: Any) -> dict[str, float | None]:
    """COCO's twelve numbers by name; None where there is nothing of that size to find, for which COCO has -1."""
    stats = np.asarray(evaluation.stats, dtype=np.float64)
    return {name: _defined(stats[place]) for name, place in COCO_METRICS.items()}


def undefined_coco_metrics(targets: dict[str, Tensor]) -> dict[str, str]:
    """The numbers that are not defined for a split with these targets, and why: it has no object of that size."""
    real = (targets["objects"] >= 0) & (targets["roles"] == OBJECT)
    areas = targets["areas"][real]
    found: dict[str, str] = {}
    for size, (low, high) in _SIZES.items():
        if not bool(((areas >= low) & (areas <= high)).any()):
            names = [name for name in COCO_METRICS if name.endswith(size)]
            why = f"has no {size[1:]} object ({low:g} to {high:g} pixels of area)" if size else "has no object"
            found |= dict.fromkeys(names, why)
    return found


def _defined(value: float) -> float | None:
    """A value of COCO's; None for the -1 that says there is none."""
    return float(value) if value > -1 else None


def per_class_rows(evaluation: Any, classes: tuple[str, ...], counts: list[int]) -> list[dict[str, Any]]:
    """AP, AP50, AR100 of each class, None for one that no picture has, and how many objects of it there are."""
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    return [
        {
            "class": name,
            "AP": _mean(precision[:, :, k, 0, -1]),
            "AP50": _mean(precision[0, :, k, 0, -1]),
            "AR100": _mean(recall[:, k, 0, -1]),
            "objects": counts[k],
        }
        for k, name in enumerate(classes)
    ]


def precision_recall_rows(evaluation: Any, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Precision at COCO's recall levels and an overlap of a half, and the score at which it is reached.

    A class that no picture has is left out.
    """
    precision, scores = evaluation.eval["precision"], evaluation.eval["scores"]
    return [
        {
            "class": name,
            "recall": round(level / (_CURVE - 1), 2),
            "precision": float(precision[0, level, k, 0, -1]),
            "score": float(scores[0, level, k, 0, -1]),
        }
        for k, name in enumerate(classes)
        if precision[0, 0, k, 0, -1] > -1
        for level in range(_CURVE)
    ]


def _mean(values: NDArray[Any]) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None
