"""Recipes for the configs of each task: network, image sizes, augmentation and training, each as it was measured.

The networks from scratch and their settings are those of the shipped configs (configs/), whose headers state scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from cnnrun.base.errors import DataError
from cnnrun.config import yaml_reader
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.init import layers
from cnnrun.experiment.init.pretrained import Pretrained
from cnnrun.experiment.init.survey import Survey

STEPS_PER_EPOCH = 20  # at least; a smaller batch makes more steps
_MAX_CLASS_RATIO = 3  # classes get weights if the largest has more than this many times the smallest's images
_MIN_VAL_FOR_ACCURACY = 400  # on fewer images the loss tells checkpoints apart better than the accuracy
_MIN_HELD_OUT_CLASSES = 2  # pairs of different people take two
_IMAGES_PER_PERSON, _MAX_PEOPLE_PER_BATCH = 4, 16
_COLOUR = {"brightness": 0.2, "contrast": 0.2}


class Recipe:
    """The parts of a config for a task from scratch; the base class is that of one answer per image."""

    sides: ClassVar[Sequence[int]] = (32, 48, 64, 96, 128, 160, 192, 224)
    """Shorter sides of the network's input that are tried, largest first."""
    multiple: ClassVar[int] = 8
    """Both sides of the input are multiples of this."""
    max_batch: ClassVar[int] = 128
    wanted_steps: ClassVar[int] = 3000
    epochs: ClassVar[tuple[int, int]] = (20, 150)
    """The fewest and the most epochs that are planned if the time allows them."""
    min_epochs: ClassVar[int] = 0
    """With fewer epochs at the smallest size, a recipe from scratch is better."""
    cost_factor: ClassVar[float] = 1.0
    """How many times as long a step takes as the network alone, because of its loss."""
    channels: ClassVar[int | None] = None
    """The channels of the input; None for those of the images."""
    keeps_small_images: ClassVar[bool] = True
    """True if images whose shorter side is at most 40 pixels keep their size."""
    holds_out_classes: ClassVar[bool] = False
    """True if val and test have classes that training never shows."""
    min_images_to_tune: ClassVar[int] = 1500
    """With fewer images, a head on frozen features of published weights is better than tuning all layers."""
    can_use_features: ClassVar[bool] = True
    """True if the features of a network that was trained to classify serve the task."""
    computes_features_once: ClassVar[bool] = False
    """True if only a head learns, on features that are computed before the first step."""
    pretrained: Pretrained | None = None
    """The published weights that the network starts from; None from scratch."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey

    def task(self, class_counts: Sequence[int]) -> str:
        """The line `task` without its key; `class_counts` are the training images of each class."""
        raise NotImplementedError

    def model(self, size: HeightWidth) -> str:
        """The section `model`, and `blocks` if it uses any."""
        return layers.classifier_model(min(size))

    @property
    def training_images(self) -> int:
        """The images that remain for training once val and test are held out."""
        held_out = sum(part for part in self.split().values() if isinstance(part, float))
        return max(1, round((1 - held_out) * self.survey.images))

    def batch(self) -> int:
        """The batch: a power of two that leaves at least 20 steps an epoch."""
        largest = self.training_images / STEPS_PER_EPOCH
        return max(2, min(self.max_batch, 1 << int(math.log2(max(1.0, largest)))))

    def train(self, batch: int) -> list[str]:
        """Lines of the section `train`, without epochs, batch and monitor."""
        return [
            "optimizer: {adamw: {lr: 3.0e-3, weight_decay: 0.05}}",
            "schedule: {one_cycle: {warmup: 0.2}}",
            "ema: {decay: 0.98}",
        ]

    def tuning(self, batch: int) -> list[str]:
        """Lines of the section `train` for all layers of a network with published weights."""
        learning_rate = float(f"{0.01 * math.sqrt(batch / 32):.1g}")
        return [
            f"optimizer: {{sgd: {{lr: {learning_rate}, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}}}}",
            "schedule: {one_cycle: {warmup: 0.2}}",
        ]

    def monitor(self, dataset: Dataset | None) -> str:
        """The metric that selects the best checkpoint; before the data is decoded, any that the task has."""
        raise NotImplementedError

    def augment(self) -> tuple[dict[str, Any], str]:
        """The section `augment`, and a comment on what may be changed."""
        if self.survey.channels == 1 or min(self.survey.median) <= layers.SMALL_SIDE:
            note = "Add `flip: horizontal` where left and right are alike."
            return ({"shift": 0.1} if self.survey.channels == 3 else {"shift": 0.08, "rotate": 8, "scale": 0.1}), note
        note = "Remove the flip where left and right differ."
        return {"flip": "horizontal", "crop": {"scale": [0.5, 1.0]}, **_COLOUR}, note

    def split(self) -> dict[str, Any]:
        """The section `split` for the splits that the source lacks."""
        has_test, few = "test" in self.survey.splits, self.survey.images < 40
        split: dict[str, Any] = {} if "val" in self.survey.splits else {"val": 0.1 if has_test else 0.15}
        return split | ({} if has_test or few else {"test": 0.15})


class ClassifyRecipe(Recipe):
    """A label for each image."""

    def task(self, class_counts: Sequence[int]) -> str:
        return "{classify: {class_weights: balanced}}" if is_imbalanced(class_counts) else "classify"

    def train(self, batch: int) -> list[str]:
        learning_rate = float(f"{0.1 * math.sqrt(batch / 128):.1g}")
        return [
            f"optimizer: {{sgd: {{lr: {learning_rate}, momentum: 0.9, nesterov: true, weight_decay: 5.0e-4}}}}",
            "schedule: {one_cycle: {warmup: 0.2}}",
        ]

    def monitor(self, dataset: Dataset | None) -> str:
        if dataset is not None and is_imbalanced(dataset.facts.class_counts):
            return "val/f1"
        return "val/loss" if dataset is None or len(dataset.splits["val"]) < _MIN_VAL_FOR_ACCURACY else "val/accuracy"


class MultilabelRecipe(Recipe):
    """Any number of labels for each image."""

    min_images_to_tune = 500  # satellite tiles were better tuned with 700

    def task(self, class_counts: Sequence[int]) -> str:
        return "multilabel"

    def monitor(self, dataset: Dataset | None) -> str:
        return "val/mAP"

    def tuning(self, batch: int) -> list[str]:
        return [
            "optimizer: {adamw: {lr: 2.0e-3, weight_decay: 0.05, groups: [{params: 'layers.*', lr: 4.0e-4}]}}",
            "schedule: {one_cycle: {warmup: 0.2}}",
            "ema: {decay: 0.98}",
        ]


class RegressRecipe(Recipe):
    """Numbers for each image; those that are the same in every image are left out."""

    def task(self, class_counts: Sequence[int]) -> str:
        numbers = self.survey.index.numbers()
        varied = [number.name for number in numbers if number.minimum < number.maximum]
        if len(varied) in (0, len(numbers)):
            return "regress"
        return yaml_reader.dump_flow({"regress": {"columns": varied}})

    def monitor(self, dataset: Dataset | None) -> str:
        return "val/loss"

    def augment(self) -> tuple[dict[str, Any], str]:
        return dict(_COLOUR), "Add flip, shift, rotate or crop where a changed image keeps its numbers."


class VerifyRecipe(Recipe):
    """An embedding for each image, to compare people or things that training never showed."""

    holds_out_classes = True
    keeps_small_images = False
    can_use_features = False  # faces on ImageNet's features were worse than from scratch
    sides: ClassVar[Sequence[int]] = (32, 48, 56, 64, 80, 96, 112)
    epochs = (20, 80)
    wanted_steps = 1500

    def __init__(self, survey: Survey) -> None:
        """Raises DataError if there are too few classes to learn from and to select a checkpoint by."""
        super().__init__(survey)
        self._class_sizes = sorted(filter(None, survey.index.class_counts()))  # training images
        needed = _MIN_HELD_OUT_CLASSES * (1 if "val" in survey.splits else 2)
        if (count := len(self._class_sizes)) < needed:
            held_out = "" if "val" in survey.splits else ", two of them to select the checkpoint by"
            raise DataError(f"verification needs {needed} people or things to begin with{held_out}; there are {count}")

    def task(self, class_counts: Sequence[int]) -> str:
        return "{verify: {dimension: 128, loss: {arcface: {margin: 0.8, scale: 24}}}}"

    def model(self, size: HeightWidth) -> str:
        return layers.embedder_model(min(size))

    def batch(self) -> int:
        sizes = self._class_sizes
        held_out = sum(round(part * len(sizes)) for part in self.split().values() if isinstance(part, float))
        learned = len(sizes) - held_out
        fitting = int(0.8 * sum(sizes) * learned / len(sizes)) // self._images_per_class
        return self._images_per_class * max(2, min(_MAX_PEOPLE_PER_BATCH, learned, fitting))

    @property
    def _images_per_class(self) -> int:
        """The images of each class in a batch: four, or fewer if half of the classes do not have them."""
        return max(2, min(_IMAGES_PER_PERSON, self._class_sizes[len(self._class_sizes) // 2]))

    def train(self, batch: int) -> list[str]:
        return [self.sampler(batch), "optimizer: {adamw: {lr: 0.002, weight_decay: 0.05}}"]

    def sampler(self, batch: int) -> str:
        """The line `sampler`."""
        each = self._images_per_class
        return f"sampler: {{identities: {each}}}    # a batch has {batch // each} classes"

    def monitor(self, dataset: Dataset | None) -> str:
        return "val/eer"

    def augment(self) -> tuple[dict[str, Any], str]:
        settings = {"flip": "horizontal", "shift": 0.1, "rotate": 12, "scale": 0.2, "brightness": 0.3, "contrast": 0.3}
        return {**settings, "erase": 0.3}, "Remove the flip where left and right differ."

    def split(self) -> dict[str, Any]:
        own_splits, classes = self.survey.splits, len(self._class_sizes)
        least = math.ceil(1000 * _MIN_HELD_OUT_CLASSES / classes) / 1000
        split: dict[str, Any] = {"by": "label"}
        if "val" not in own_splits:
            split["val"] = max(0.15, least)
        if "test" not in own_splits and classes >= 3 * _MIN_HELD_OUT_CLASSES:
            split["test"] = max(0.25, least)
        return split


class DetectRecipe(Recipe):
    """Boxes with labels."""

    keeps_small_images = False
    can_use_features = False
    sides: ClassVar[Sequence[int]] = (128, 160, 192, 224, 256, 320, 384, 448, 512)
    multiple = 32
    max_batch = 16
    epochs = (60, 150)
    cost_factor = 1.5

    def task(self, class_counts: Sequence[int]) -> str:
        return "{detect: {levels: [p3, p4, p5], gamma: 0}}"

    def model(self, size: HeightWidth) -> str:
        return layers.detector_model()

    def train(self, batch: int) -> list[str]:
        return [
            "optimizer: {adamw: {lr: 1.5e-3, weight_decay: 0.05}}",
            "schedule: {one_cycle: {warmup: 0.1}}",
            "ema: {decay: 0.99}",
        ]

    def monitor(self, dataset: Dataset | None) -> str:
        return "val/AP"

    def augment(self) -> tuple[dict[str, Any], str]:
        colour = {**_COLOUR, "saturation": 0.2} if self.survey.channels == 3 else _COLOUR
        note = "Remove the flip where left and right differ; `flip: both` where up and down are alike too."
        return {"flip": "horizontal", "scale": 0.2, "shift": 0.1, **colour}, note


class SegmentRecipe(Recipe):
    """A class for each pixel."""

    keeps_small_images = False
    can_use_features = False
    sides: ClassVar[Sequence[int]] = (64, 96, 128, 160, 192, 224, 256)
    multiple = 16
    max_batch = 16
    wanted_steps = 2000
    epochs = (20, 100)

    def task(self, class_counts: Sequence[int]) -> str:
        return "segment"

    def model(self, size: HeightWidth) -> str:
        return layers.segmenter_model(3 if min(size) < 128 else 4)

    def train(self, batch: int) -> list[str]:
        return [
            "optimizer: {adamw: {lr: 3.0e-3, weight_decay: 0.05}}",
            "schedule: {one_cycle: {warmup: 0.1}}",
        ]

    def monitor(self, dataset: Dataset | None) -> str:
        return "val/mean_iou"

    def augment(self) -> tuple[dict[str, Any], str]:
        return {"flip": "horizontal", "shift": 0.05, **_COLOUR}, "Remove the flip where left and right differ."


RECIPES: dict[str, type[Recipe]] = {
    "classify": ClassifyRecipe,
    "multilabel": MultilabelRecipe,
    "regress": RegressRecipe,
    "verify": VerifyRecipe,
    "detect": DetectRecipe,
    "segment": SegmentRecipe,
}


def is_imbalanced(class_counts: Sequence[int]) -> bool:
    """Return whether the largest class has more than three times the images of the smallest, which has some."""
    return bool(class_counts) and 0 < _MAX_CLASS_RATIO * min(class_counts) < max(class_counts)
