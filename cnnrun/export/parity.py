"""The parity gate: an artefact is kept only if it gives the network's results on real samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.contracts.results import Results
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.training.evaluation import measure_metrics

BATCH_SIZES = (1, 2, 7)


MIN_SAMPLES = 64


_SHAKE = 2.0**-10  # grey levels: many times what rounding does to a picture, and nothing to anyone else


_UNSTEADY = 0.05  # the part of the real pictures compared that may be so


METRIC_DIGITS = 4  # to which the metric of the artefact must equal the network's


Artefact = Callable[[NDArray[np.uint8]], list[NDArray[Any]]]


def measure_parity(
    artefact: Artefact, trained: TrainedNetwork, splits: dict[str, Examples], batch: int
) -> dict[str, Any]:
    """Compare the artefact with the network: real samples at several batch sizes, extremes, and the metric again."""
    run = _as_results(artefact, trained)
    first = [next(iter(batches_in_order(each, MIN_SAMPLES, trained.device))).images for each in splits.values()]
    real = torch.cat(first)[:MIN_SAMPLES]
    gaps, reasons, unsteady = _compared(run, trained, real)

    split, examples = next(iter(splits.items()))
    numbers = {
        who: measure_metrics(function, trained.task, trained.facts, batches_in_order(examples, batch, trained.device))
        for who, function in (("network", trained.results), ("artefact", run))
    }
    for name, value in numbers["network"].items():
        other = numbers["artefact"][name]
        close = 0.5 * 10**-METRIC_DIGITS  # of numbers above 1, such as errors in a large unit, in parts of them
        if value is None or other is None:  # not defined on these samples, which is so for both
            continue
        if not math.isclose(value, other, abs_tol=close, rel_tol=close):
            reasons.append(f"{name} is {value:.6f} in the network and {other:.6f} in the file")
    return {
        "passed": not reasons,
        "reason": reasons[0] if reasons else None,
        "split": split,
        "samples_compared": len(real),
        "batch_sizes": list(BATCH_SIZES),
        "unsteady": unsteady,
        "largest_difference": max(gaps),
        "metrics": numbers,
    }


def _as_results(artefact: Artefact, trained: TrainedNetwork) -> Callable[[Tensor], Results]:
    """The artefact as the network is called: pixel values [B, C, H, W] -> results by name, on the network's device."""
    names = list(trained.task.result_shapes(trained.facts))

    def run(pictures_BCHW: Tensor) -> Results:
        values = artefact(pictures_BCHW.permute(0, 2, 3, 1).byte().cpu().numpy())
        return {name: torch.from_numpy(value).to(trained.device) for name, value in zip(names, values, strict=True)}

    return run


def _compared(
    run: Callable[[Tensor], Results], trained: TrainedNetwork, real: Tensor
) -> tuple[list[float], list[str], list[str]]:
    """The largest difference of each batch, and why batches are not the same, over sizes and extremes.

    And which pictures were left out because they say nothing: see `_steady`.
    """
    black = torch.zeros(1, *trained.facts.image, device=trained.device)
    cases = [(f"batch {size}", part) for size in BATCH_SIZES for part in real.split(size)]
    cases += [("a black picture", black), ("a white picture", black + 255)]
    gaps, reasons, unsteady = [], [], []
    for what, pictures in cases:
        ours, theirs = trained.results(pictures), run(pictures)
        if trained.task.find_disagreement(ours, theirs, trained.facts) is None:
            gaps.append(trained.task.largest_difference(ours, theirs, trained.facts))
            continue
        for row in range(len(pictures)):
            one = slice(row, row + 1)
            mine, other = ({name: value[one] for name, value in each.items()} for each in (ours, theirs))
            if why := trained.task.find_disagreement(mine, other, trained.facts):
                if _steady(trained, pictures[one], mine):
                    reasons.append(f"{what}: {why}")
                else:
                    unsteady.append(what)
    most = _UNSTEADY * len(BATCH_SIZES) * len(real)
    if len(unsteady) > most + 2:
        reasons.append(f"{len(unsteady)} pictures have results that noise of {_SHAKE:g} grey levels alters")
    return gaps or [math.nan], reasons, unsteady


def _steady(trained: TrainedNetwork, picture: Tensor, results: Results) -> bool:
    """Whether the network itself gives the same for the picture with a hair's noise added, and taken away.

    Where it does not, two boxes of one object are so equal that rounding says which of them is left; on a picture of
    one colour, where all cells see the same, that is the rule.
    """
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0)).to(picture.device) * _SHAKE
    shaken = (trained.results(picture + change) for change in (noise, -noise))
    return all(trained.task.find_disagreement(results, each, trained.facts) is None for each in shaken)


def pixel_shape(trained: TrainedNetwork) -> tuple[int, int, int]:
    channels, height, width = trained.facts.image
    return height, width, channels
