"""Choose image size, batch and epochs of a recipe so that the training fits the minutes, by a measured step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnrun.base.progress import say
from cnnrun.config import yaml_reader
from cnnrun.contracts.layer import HeightWidth
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.init.layers import SMALL_SIDE
from cnnrun.experiment.init.recipes import Recipe
from cnnrun.experiment.schema import Experiment
from cnnrun.model.network import build_network, materialize
from cnnrun.training.precision import estimate_images_per_second
from cnnrun.training.step_time import StepSize

STEP_TIME_SHARE = 0.8  # share of the training time that is spent on steps, not on evaluation and saving
_FORWARD_SPEEDUP = 3  # a forward pass alone, against one with its backward pass
_MAX_ASPECT = 2  # the longer side is at most this many times the shorter one


@dataclass(frozen=True)
class Choice:
    """The chosen size, epochs and batch, and the speed of training in images per second that they were chosen by.

    With frozen features it is the speed of computing them, which is done once.
    """

    recipe: Recipe
    size: HeightWidth
    epochs: int
    batch: int
    images_per_second: float

    @property
    def channels(self) -> int:
        """The channels of the network's input."""
        return self.recipe.channels or self.recipe.survey.channels

    @property
    def seconds(self) -> float:
        """The estimated time of the training."""
        images = self.epochs * self.recipe.training_images
        if self.recipe.computes_features_once:  # of all splits
            images = self.recipe.survey.images
        return images / self.images_per_second / STEP_TIME_SHARE

    def minutes_of(self, epochs: int) -> float:
        """The estimated minutes of as many epochs."""
        return replace(self, epochs=epochs).seconds / 60

    def image_section(self) -> dict[str, Any]:
        """The section `image` of the config; empty if the source sets the size."""
        survey, own_channels = self.recipe.survey, self.recipe.channels
        size = (
            {} if survey.has_own_size and own_channels is None else {"size": list(self.size), "channels": self.channels}
        )
        return size | survey.levels

    def data_section(self) -> dict[str, Any]:
        """The sections `source`, `image`, `augment` and `split`, as far as they are written."""
        sections = {
            "source": self.recipe.survey.source,
            "image": self.image_section(),
            "augment": self.recipe.augment()[0],
            "split": self.recipe.split(),
        }
        return {key: section for key, section in sections.items() if section}


def choose(recipe: Recipe, minutes: float) -> Choice:
    """Choose the largest image size that allows the recipe's fewest epochs in `minutes`, with epochs and batch."""
    batch, count = recipe.batch(), recipe.training_images
    fewest, most = recipe.epochs
    wanted = max(fewest, min(most, math.ceil(recipe.wanted_steps / max(1, count // batch))))
    sizes = _possible_sizes(recipe)
    for size in reversed(sizes):
        speed = _measure_speed(recipe, size, batch)
        possible = int(STEP_TIME_SHARE * 60 * minutes * speed / count)
        if recipe.computes_features_once:
            if possible * count >= recipe.survey.images or size == sizes[0]:
                return Choice(recipe, size, most, batch, speed)
        elif possible >= fewest or size == sizes[0]:
            return Choice(recipe, size, max(2, min(wanted, possible)), batch, speed)
    raise AssertionError("unreachable: the smallest size is always accepted")


def _possible_sizes(recipe: Recipe) -> list[HeightWidth]:
    """The sizes (height, width) that the recipe may use for these images, the smallest first."""
    survey, multiple = recipe.survey, recipe.multiple
    height, width = survey.median
    shorter = min(survey.median)
    if survey.has_own_size and recipe.channels is None:
        return [survey.median]
    if shorter <= SMALL_SIDE and recipe.keeps_small_images:
        return [(max(8, round(height / 4) * 4), max(8, round(width / 4) * 4))]
    smallest = recipe.sides[0]
    sides = [side for side in recipe.sides if side <= max(shorter, smallest) and side % multiple == 0]
    return [_with_aspect(side, survey.median, multiple) for side in sides or [smallest]]


def _with_aspect(side: int, median: HeightWidth, multiple: int) -> HeightWidth:
    """(height, width) with this shorter side; the longer side is in proportion if images are far from square."""
    height, width = median
    longer = round(side * max(median) / min(median) / multiple) * multiple
    longer = side if longer <= 1.2 * side else min(longer, _MAX_ASPECT * side)
    return (side, longer) if height <= width else (longer, side)


def _measure_speed(recipe: Recipe, size: HeightWidth, batch: int) -> float:
    """Measure training steps, or those of a forward pass for frozen features; returns images per second."""
    say(f"measuring a training step at {size[1]}x{size[0]}")
    survey = recipe.survey
    facts = survey.facts(recipe.channels or survey.channels, size)
    trial = Choice(recipe, size, 1, batch, 1.0)
    text = "\n".join(
        [
            f"task: {recipe.task(facts.class_counts)}",
            yaml_reader.dump_yaml({"data": trial.data_section()}).rstrip(),
            recipe.model(size).rstrip(),
            *train_section(trial, recipe.monitor(None)),
        ]
    )
    experiment: Experiment = parse_config(text, "init")
    network = materialize(build_network(experiment.model.layers, experiment.task.bind(facts)).network, 0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device).to(memory_format=torch.channels_last)
    speed = estimate_images_per_second(network, StepSize(batch, facts.image_shape, device))
    return speed * _FORWARD_SPEEDUP if recipe.computes_features_once else speed / recipe.cost_factor


def train_section(choice: Choice, monitor: str) -> list[str]:
    """Lines of the section `train`."""
    lines = ["train:", f"  epochs: {choice.epochs}", f"  batch: {choice.batch}"]
    lines += [f"  {line}" for line in choice.recipe.train(choice.batch)]
    return [*lines, f"  monitor: {monitor}    # selects the best checkpoint"]
