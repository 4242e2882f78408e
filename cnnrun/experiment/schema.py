"""The whole YAML file: its sections, how it is read and overridden, and every mistake in it with its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from cnnrun.config import yaml_reader
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.facts import Facts
from cnnrun.data.settings import Data
from cnnrun.model.structures import Model
from cnnrun.tasks import Task
from cnnrun.training.settings import Train


class Experiment(Spec):
    """One config file. `task`, `data` and `model` must be there."""

    name: str = Field("", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$|^$", max_length=100)
    """The run folders' name; by default the file's."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the initial weights, the order, the augmentation and dropout."""
    task: Annotated[Task, Kinds()]
    data: Data
    model: Model
    train: Train = Train()

    def with_facts(self, facts: Facts) -> Experiment:
        """The same experiment with what was measured written into it, as a run's config.yaml has it."""
        image = self.data.image.model_copy(update={"mean": list(facts.mean), "std": list(facts.std)})
        return self.model_copy(update={"data": self.data.model_copy(update={"image": image})})

    def with_statistics_of(self, other: Experiment) -> Experiment:
        """The same experiment; where it leaves mean and deviation to be measured, with those of `other`."""
        mine, theirs = self.data.image, other.data.image
        image = mine.model_copy(update={"mean": mine.mean or theirs.mean, "std": mine.std or theirs.std})
        return self.model_copy(update={"data": self.data.model_copy(update={"image": image})})

    def with_statistics_of_weights(self, given: Facts | None) -> Experiment:
        """The same experiment; where it leaves mean and deviation to be measured, with those its weights learned by."""
        image = self.data.image
        if given is None or (image.mean and image.std) or len(given.mean) != (self.data.image_shape() or (0,))[0]:
            return self
        return self.with_facts(replace(given, mean=tuple(image.mean or given.mean), std=tuple(image.std or given.std)))

    def to_yaml(self) -> str:
        """The file with every default written out; reading it gives an equal experiment."""
        return yaml_reader.dump_yaml(self.model_dump(mode="json", by_alias=True, exclude_none=True))
