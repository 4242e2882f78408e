"""Recipes for configs whose network starts from published weights, each as it was measured (benchmarks/README.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from cnnrun.config import yaml_reader
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.dataset import Dataset
from cnnrun.experiment.init import layers
from cnnrun.experiment.init.pretrained import Pretrained
from cnnrun.experiment.init.recipes import DetectRecipe, Recipe, SegmentRecipe, VerifyRecipe
from cnnrun.experiment.init.survey import Survey

FACE_SIZE = (150, 150)


def recipes_from_weights(recipe: Recipe, pretrained: Pretrained) -> list[Recipe]:
    """The recipes that learn what `recipe` does from published weights, the best first; none if there are none."""
    if recipe.survey.channels not in (1, 3):  # the networks were trained on RGB
        return []
    if tuned := _TUNED.get(type(recipe)):
        return [tuned(recipe.survey, pretrained)] if tuned.can_start(recipe.survey, pretrained) else []
    if not recipe.can_use_features or pretrained.embeds_faces:
        return []
    features = FrozenFeatures(recipe, pretrained)
    return (
        [FineTuned(recipe, pretrained), features] if recipe.survey.images >= recipe.min_images_to_tune else [features]
    )


def reason_without_weights(recipe: Recipe) -> str:
    """The reason why a recipe cannot start from the weights that were asked for, as part of a sentence."""
    if tuned := _TUNED.get(type(recipe)):
        return f"this task starts from {tuned.needs}"
    return "this task starts from a network that was trained to classify, with grey or RGB images"


class _FromPretrained(Recipe):
    """Base of the recipes of one task that start from published weights."""

    channels = 3
    needs: ClassVar[str]
    """The networks and images that the recipe serves, as part of a sentence."""

    def __init__(self, survey: Survey, pretrained: Pretrained) -> None:
        super().__init__(survey)
        self.pretrained: Pretrained = pretrained

    @classmethod
    def can_start(cls, survey: Survey, pretrained: Pretrained) -> bool:
        """Return whether the recipe serves these images and this network."""
        raise NotImplementedError


class TunedDetectRecipe(_FromPretrained, DetectRecipe):
    """Boxes with labels, by a detector on a network that starts from published weights."""

    needs = "mobilenet_v2, resnet18 or resnet50, with grey or RGB images"
    sides = (160, 192, 224, 256, 320)
    max_batch = 8
    epochs = (25, 60)
    min_epochs = 10
    wanted_steps = 2000

    @classmethod
    def can_start(cls, survey: Survey, pretrained: Pretrained) -> bool:
        return pretrained.levels is not None

    def model(self, size: HeightWidth) -> str:
        pretrained = self.pretrained
        assert pretrained.levels is not None
        weights = str(pretrained.path)
        return layers.pretrained_detector_model(pretrained.network, weights, pretrained.last_layer, pretrained.levels)

    def train(self, batch: int) -> list[str]:
        # The stem, the stages, and the last convolution of a network that has one.
        prefixes = ["st", "last"] if self.pretrained.last_layer == "last" else ["st"]
        groups = ", ".join(f"{{params: 'layers.{name}*', lr: 1.5e-4}}" for name in prefixes)
        return [
            f"optimizer: {{adamw: {{lr: 1.5e-3, weight_decay: 0.05, groups: [{groups}]}}}}",
            "schedule: {one_cycle: {warmup: 0.1}}",
            "ema: {decay: 0.98}",
        ]


class TunedSegmentRecipe(_FromPretrained, SegmentRecipe):
    """A class for each pixel, by a U-Net whose first half starts from published weights."""

    needs = "mobilenet_v2, resnet18 or resnet50, with RGB images"
    sides: ClassVar[Sequence[int]] = (96, 128, 160, 192, 224, 256)
    max_batch = 8
    epochs = (15, 60)
    wanted_steps = 1500

    @classmethod
    def can_start(cls, survey: Survey, pretrained: Pretrained) -> bool:
        # On grey microscopy a network from scratch was as good.
        return pretrained.levels is not None and survey.channels == 3

    def model(self, size: HeightWidth) -> str:
        pretrained = self.pretrained
        assert pretrained.levels is not None
        return layers.pretrained_segmenter_model(pretrained.network, str(pretrained.path), pretrained.levels)

    def train(self, batch: int) -> list[str]:
        return [
            "optimizer: {adamw: {lr: 2.0e-3, weight_decay: 0.05, groups: [{params: 'layers.st*', lr: 4.0e-4}]}}",
            "schedule: {one_cycle: {warmup: 0.1}}",
            "ema: {decay: 0.98}",
        ]


class TunedFacesRecipe(_FromPretrained, VerifyRecipe):
    """An embedding of aligned faces, learned anew above a published network (configs/orl-faces-transfer.yaml)."""

    needs = "face_resnet29, with faces of 150x150 pixels that `cnnrun faces` has aligned"
    sides: ClassVar[Sequence[int]] = (150,)
    multiple = 1
    epochs = (3, 10)
    wanted_steps = 300
    cost_factor = 0.5  # only the last layer has a backward pass

    @classmethod
    def can_start(cls, survey: Survey, pretrained: Pretrained) -> bool:
        return pretrained.embeds_faces and survey.median == FACE_SIZE

    def task(self, class_counts: Sequence[int]) -> str:
        return (
            "{verify: {dimension: 128, loss: {arcface: {margin: 0.3, scale: 24}}, mirror: true, "
            "landmarks: {left_eye: [47.7, 47.1], right_eye: [100.3, 47.1]}}}"
        )

    def model(self, size: HeightWidth) -> str:
        settings = {"zoo": self.pretrained.network, "weights": str(self.pretrained.path)}
        return f"model: {yaml_reader.dump_flow(settings)}"

    def train(self, batch: int) -> list[str]:
        return [
            f"freeze: {self.pretrained.last_layer}    # only the head learns",
            self.sampler(batch),
            "optimizer: {adamw: {lr: 0.001, weight_decay: 0.05}}",
        ]

    def augment(self) -> tuple[dict[str, Any], str]:
        return {"flip": "horizontal"}, "Faces are aligned, so they are only mirrored."


class FineTuned(Recipe):
    """Another recipe's task, learned by a network that starts from published weights."""

    sides = (96, 128, 160, 192, 224)
    multiple = 32
    max_batch = 32
    keeps_small_images = False
    channels = 3
    epochs = (8, 30)
    wanted_steps = 1500

    def __init__(self, recipe: Recipe, pretrained: Pretrained) -> None:
        super().__init__(recipe.survey)
        self.recipe = recipe
        self.pretrained: Pretrained = pretrained

    def task(self, class_counts: Sequence[int]) -> str:
        return self.recipe.task(class_counts)

    def model(self, size: HeightWidth) -> str:
        pretrained = self.pretrained
        return layers.pretrained_model(pretrained.network, str(pretrained.path), pretrained.last_layer)

    def train(self, batch: int) -> list[str]:
        return self.recipe.tuning(batch)

    def monitor(self, dataset: Dataset | None) -> str:
        return self.recipe.monitor(dataset)

    def augment(self) -> tuple[dict[str, Any], str]:
        return self.recipe.augment()

    def split(self) -> dict[str, Any]:
        return self.recipe.split()


class FrozenFeatures(FineTuned):
    """Another recipe's task, learned by a head on the features of a network with published weights.

    Its images are not augmented, so that the features are computed once.
    """

    epochs = (40, 40)
    computes_features_once = True

    def train(self, batch: int) -> list[str]:
        return [
            "freeze: pooled    # only the head learns; see docs/transfer.md for training further layers",
            "optimizer: {adamw: {lr: 1.0e-3, weight_decay: 0.05}}",
            "schedule: {one_cycle: {warmup: 0.2}}",
        ]

    def augment(self) -> tuple[dict[str, Any], str]:
        return {}, "Images are not augmented, so that the frozen layers see each one once."


_TUNED: dict[type[Recipe], type[_FromPretrained]] = {
    VerifyRecipe: TunedFacesRecipe,
    DetectRecipe: TunedDetectRecipe,
    SegmentRecipe: TunedSegmentRecipe,
}
