"""The parts that a bound task is made of; see `contracts.task.Task`. A part knows the task's settings and its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cnnrun.base.similarity import Similarity
from cnnrun.contracts.choices import Choices, OperatingPoint
from cnnrun.contracts.layer import HeightWidth, Shape
from cnnrun.contracts.prediction import Overlay, Prediction
from cnnrun.contracts.results import ClassScores, Measurement, Results, View

Direction = Literal["max", "min"]
Targets = dict[str, Tensor]  # by name; the first dimension is the batch


@dataclass(frozen=True)
class FeatureLevel:
    """A feature map that the head takes, with its receptive field and its stride in pixels of the input."""

    shape: Shape
    receptive_field: HeightWidth
    stride: tuple[float, float]


class Meter(Protocol):
    """Collector of results and targets, batch by batch, that computes metrics over all samples."""

    def update(self, results: Results, targets: Targets) -> None:
        """Add one batch."""
        ...

    def compute(self, tables: bool = True) -> Measurement:
        """Compute the measurement; without `tables` only the metrics and choices, which suffices after each epoch."""
        ...


class Criterion(nn.Module):
    """Module: (outputs, targets) -> named scalar losses, each a mean over the batch.

    Its parameters are trained with the network's. The loss of a batch must equal the mean over its parts, weighted by
    their sizes, so that the batch can be split into micro-batches.
    """

    def set_progress(self, fraction: float) -> None:
        """Set the fraction of the training that is done, from 0 to 1; called before each step."""

    @property
    def depends_on_progress(self) -> bool:
        """True if the losses depend on that fraction, so that a training of other length begins differently."""
        return False

    def sample_losses(self, outputs: Tensor, targets: Targets) -> Tensor:
        """Compute the loss of each sample as a batch of its own: [B]."""
        losses = []
        for index in range(len(outputs)):
            sample_targets = {name: values[index : index + 1] for name, values in targets.items()}
            losses.append(torch.stack(list(self(outputs[index : index + 1], sample_targets).values())).sum())
        return torch.stack(losses)


class Learning:
    """Parts of a task that a training needs: the head, the loss, and the targets of mixed images."""

    def build_head(self, in_shapes: Sequence[Shape]) -> nn.Module:
        """Build the head, which maps features of `in_shapes`, one argument each, to raw outputs. Raises ShapeError."""
        raise NotImplementedError

    def build_criterion(self) -> Criterion:
        """Build the criterion, which computes the loss."""
        raise NotImplementedError

    def mix_targets(self, targets: Targets, partners: Targets, own_weight_B: Tensor) -> Targets:
        """Mix the targets of mixed images: `own_weight_B` of each image is its own, the rest its partner's.

        Only for tasks whose requirements say that they mix targets.
        """
        raise NotImplementedError

    def guess_loss(self) -> float | None:
        """Loss of a network that knows nothing and guesses, or None if it is unknown."""
        return None


class Measuring:
    """Measurement of results against targets."""

    def build_meter(self, choices: Choices) -> Meter:
        """Build an empty meter for a network with these choices."""
        raise NotImplementedError

    def split_problem(self, targets: Targets) -> str | None:
        """Reason that metrics on a split with these targets would be meaningless, or None."""
        return None

    def undefined_metrics(self, targets: Targets) -> dict[str, str]:
        """Metrics that are undefined on a split with these targets, each with what the split lacks."""
        return {}

    def comparison_key(self) -> list[Any]:
        """Key of what is measured. Two runs are comparable only if their keys are equal."""
        raise NotImplementedError


class Predicting:
    """Steps from raw outputs to results, and from results to predictions."""

    has_objects: bool = False
    """True if predictions are objects with scores, which can be filtered by score and written as COCO's results."""
    has_overlays: bool = False
    """True if predictions can be drawn onto their images."""
    has_class_maps: bool = False
    """True if predictions have a class for each pixel, which can be written as an image."""
    unreadable_json: dict[str, Any] = {}
    """Keys that every row of the JSON has, with their empty values, for images that cannot be read."""

    def build_decoder(self, choices: Choices) -> nn.Module:
        """Build the module from raw outputs to results, such as probabilities. It is part of the exported network."""
        raise NotImplementedError

    def result_shapes(self) -> dict[str, Shape]:
        """Name and shape (without the batch) of each result, in the order of the decoder's outputs."""
        raise NotImplementedError

    def metadata(self, choices: Choices) -> dict[str, Any]:
        """Metadata of an exported file that its user needs to interpret results, such as thresholds."""
        raise NotImplementedError

    def thresholds(self, choices: Choices) -> dict[str, float]:
        """Minimum score of each class's predictions; empty if there is none."""
        return {}

    def predictions(
        self, results: Results, views: Sequence[View], thresholds: dict[str, float]
    ) -> Sequence[Prediction]:
        """Turn a batch's results into a prediction for each image; `views` map the original images to the input."""
        raise NotImplementedError

    def largest_difference(self, expected: Results, actual: Results) -> float:
        """Largest absolute difference between two results, for the export's record."""
        return max(float((expected[name] - actual[name]).abs().max()) for name in expected)

    def find_disagreement(self, expected: Results, actual: Results) -> str | None:
        """Reason that an exported file's results (`actual`) differ from the network's (`expected`), or None."""
        raise NotImplementedError


class Showing:
    """Texts, drawings and scores that show people the targets, the data, and how a result came about."""

    has_overlays: bool = False
    """True if targets can be drawn onto their images."""

    def describe_targets(self, targets: Targets) -> list[str]:
        """Text of each sample's target, for people."""
        raise NotImplementedError

    def target_overlays(self, targets: Targets) -> list[Overlay]:
        """Overlay of each sample's targets on its image; only if `has_overlays`."""
        raise NotImplementedError

    def data_notes(self) -> list[str]:
        """Lines for the log about the effect of the settings on this data, such as class weights."""
        return []

    def feature_level_notes(self, levels: Sequence[FeatureLevel], targets: Targets) -> list[str]:
        """Lines of `cnnrun check` about how the feature levels suit the targets of the training split."""
        return []

    def class_scores(self, outputs: Tensor, choices: Choices) -> ClassScores:
        """Compute differentiable scores from raw outputs, for explanations."""
        raise NotImplementedError


class Calibration:
    """Calibration of probabilities by a temperature."""

    error_metric: str | None = None
    """The metric of the meter that measures how well probabilities are calibrated, if it has one."""

    def negative_log_likelihood(self, outputs: Tensor, targets: Targets, temperature: float) -> float:
        """Mean negative log-likelihood of the targets with probabilities at this temperature."""
        raise NotImplementedError


class Matching:
    """Embeddings that are compared with each other: pairs, and galleries of people."""

    dimension: int
    """Number of values of an embedding."""
    fars: Sequence[float]
    """False accept rates that a threshold is chosen for, largest first."""
    similarity: Similarity
    """The comparison of two embeddings."""
    published_threshold: float | None
    """Minimum similarity that comes with the weights, for networks whose threshold was not chosen on val."""
    landmarks: Mapping[str, Sequence[float]]
    """Positions (x, y) in pixels of the landmarks of a face in the network's input; empty if images are not aligned."""

    def embeddings(self, results: Results) -> Tensor:
        """The embeddings [B, D] among a batch's results."""
        raise NotImplementedError

    def find_operating_point(self, choices: Choices, far: float | None = None) -> OperatingPoint | None:
        """Find the threshold chosen on val for a FAR, by default the config's; None if none was chosen."""
        raise NotImplementedError

    def operating_point_note(self, point: OperatingPoint) -> str:
        """Warning that few pairs support the operating point, or an empty text."""
        raise NotImplementedError


@dataclass(frozen=True)
class AssignedCell:
    """A cell of the head, its centre, and the object that it learns; `quality` (0 to 1) is its target score."""

    cell_index: int
    x_px: float
    y_px: float
    object_index: int
    quality: float


class CellAssignment:
    """Assignment of the head's cells to the objects that they learn."""

    def assigned_cells(self, outputs: Tensor, targets: Targets) -> list[AssignedCell]:
        """Cells of the first sample that are assigned to objects."""
        raise NotImplementedError
