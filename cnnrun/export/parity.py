"""The parity check: an artefact must give the network's results on real samples, and the same metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.contracts.results import Results
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.training.evaluation import measure_metrics

BATCH_SIZES = (1, 2, 7)
MIN_SAMPLES = 64
METRIC_DIGITS = 4  # decimals to which the artefact's metrics must equal the network's
_NOISE_LEVELS = 2.0**-10  # grey levels: many times larger than rounding errors, but invisible
_MAX_UNSTABLE_SHARE = 0.05  # more unstable images than this share of the compared ones fail the check
Artefact = Callable[[NDArray[Any]], list[NDArray[Any]]]  # of pixels as the artefact takes them, [B, H, W, C]


def measure_parity(
    artefact: Artefact, trained: TrainedNetwork, splits: dict[str, Examples], batch: int
) -> dict[str, Any]:
    """Compare an artefact with its network, and return the record that is stored beside the artefact.

    Compares results on MIN_SAMPLES real images at several batch sizes and on a black and a white image, then metrics
    on the first of `splits`.
    """
    compute_results = _results_function(artefact, trained)
    batches = [next(iter(batches_in_order(examples, MIN_SAMPLES, trained.device))) for examples in splits.values()]
    images = torch.cat([batch.images for batch in batches])[:MIN_SAMPLES]
    differences, reasons, unstable = _compare_results(compute_results, trained, images)

    split, examples = next(iter(splits.items()))
    metrics = {
        side: measure_metrics(
            function, trained.task, trained.choices, batches_in_order(examples, batch, trained.device)
        )
        for side, function in (("network", trained.results), ("artefact", compute_results))
    }
    tolerance = 0.5 * 10**-METRIC_DIGITS  # relative for metrics above 1, such as errors in a large unit
    for name, expected in metrics["network"].items():
        actual = metrics["artefact"][name]
        if expected is None or actual is None:  # undefined on these samples, for both
            continue
        if not math.isclose(expected, actual, abs_tol=tolerance, rel_tol=tolerance):
            reasons.append(f"{name} is {expected:.6f} in the network and {actual:.6f} in the file")
    return {
        "passed": not reasons,
        "reason": reasons[0] if reasons else None,
        "split": split,
        "samples_compared": len(images),
        "batch_sizes": list(BATCH_SIZES),
        "unsteady": unstable,
        "largest_difference": max(differences),
        "metrics": metrics,
    }


def measure_image_parity(artefact: Artefact, trained: TrainedNetwork, images_BCHW: Tensor) -> dict[str, Any]:
    """Compare an artefact with its network on images alone, for networks without data; see `measure_parity`."""
    compute_results = _results_function(artefact, trained)
    differences, reasons, unstable = _compare_results(compute_results, trained, images_BCHW)
    return {
        "passed": not reasons,
        "reason": reasons[0] if reasons else None,
        "samples_compared": len(images_BCHW),
        "batch_sizes": list(BATCH_SIZES),
        "unsteady": unstable,
        "largest_difference": max(differences),
    }


def _results_function(artefact: Artefact, trained: TrainedNetwork) -> Callable[[Tensor], Results]:
    """Wrap an artefact so that it maps pixels [B, C, H, W] to results by name on the network's device."""
    names = list(trained.task.predicting.result_shapes())

    def compute_results(images_BCHW: Tensor) -> Results:
        pixels = trained.image.pixel_format.to_file(images_BCHW.permute(0, 2, 3, 1).cpu())
        values = artefact(pixels.numpy())
        return {name: torch.from_numpy(value).to(trained.device) for name, value in zip(names, values, strict=True)}

    return compute_results


def _compare_results(
    compute_results: Callable[[Tensor], Results], trained: TrainedNetwork, images: Tensor
) -> tuple[list[float], list[str], list[str]]:
    """Compare results over batch sizes and extreme images.

    Returns the largest difference of each batch that agrees, the reasons for disagreement, and the batches of images
    that were left out because they are unstable (see `_is_stable`).
    """
    black = torch.zeros(1, *trained.facts.image_shape, device=trained.device)
    cases = [(f"batch {size}", batch) for size in BATCH_SIZES for batch in images.split(size)]
    cases += [("a black image", black), ("a white image", black + 255)]
    predicting, differences, reasons, unstable = trained.task.predicting, [], [], []
    for case, batch in cases:
        expected, actual = trained.results(batch), compute_results(batch)
        if predicting.find_disagreement(expected, actual) is None:
            differences.append(predicting.largest_difference(expected, actual))
            continue
        for index in range(len(batch)):
            expected_row, actual_row = _select_row(expected, index), _select_row(actual, index)
            if reason := predicting.find_disagreement(expected_row, actual_row):
                if _is_stable(trained, batch[index : index + 1], expected_row):
                    reasons.append(f"{case}: {reason}")
                else:
                    unstable.append(case)
    max_unstable = _MAX_UNSTABLE_SHARE * len(BATCH_SIZES) * len(images) + 2  # 2: the black and the white image
    if len(unstable) > max_unstable:
        reasons.append(
            f"noise of {_NOISE_LEVELS:g} grey levels changes the results of {format_count(len(unstable), 'image')}"
        )
    return differences or [math.nan], reasons, unstable


def _select_row(results: Results, index: int) -> Results:
    return {name: values[index : index + 1] for name, values in results.items()}


def _is_stable(trained: TrainedNetwork, image: Tensor, results: Results) -> bool:
    """Return whether the network's own results stay the same when tiny noise is added to the image, and subtracted.

    If not, rounding decides, for example, which of two almost equal boxes of an object remains. That is usual on an
    image of one colour, where all cells have the same input.
    """
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image.device) * _NOISE_LEVELS
    noisy_results = (trained.results(image + change) for change in (noise, -noise))
    return all(trained.task.predicting.find_disagreement(results, noisy) is None for noisy in noisy_results)


def pixel_shape(trained: TrainedNetwork) -> tuple[int, int, int]:
    """Shape of an artefact's input image: (height, width, channels)."""
    channels, height, width = trained.facts.image_shape
    return height, width, channels
