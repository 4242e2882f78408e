"""The whole config: its top-level settings and its sections."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from cnnrun.config import yaml_reader
from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.facts import DataFacts
from cnnrun.data.settings import Data
from cnnrun.model.structures import Model
from cnnrun.tasks import TaskUnion
from cnnrun.training.settings import Train


class Experiment(Spec):
    """A config file. `task`, `data` and `model` are required."""

    name: str = Field("", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$|^$", max_length=100)
    """The name of the run folders; by default the name of the config file."""
    seed: int = Field(0, ge=0, lt=2**63)
    """The seed of the initial weights, the order of the samples, the augmentation and dropout."""
    task: Annotated[TaskUnion, Kinds()]
    data: Data
    model: Model
    train: Train = Train()

    def with_facts(self, facts: DataFacts) -> Experiment:
        """Return a copy with the mean and std of `facts`, as in a run's config.yaml."""
        image = self.data.image.model_copy(update={"mean": list(facts.mean), "std": list(facts.std)})
        return self.model_copy(update={"data": self.data.model_copy(update={"image": image})})

    def with_measured_settings_of(self, other: Experiment) -> Experiment:
        """Return a copy in which mean, std and precision, if they are left to a measurement, are those of `other`."""
        image, source = self.data.image, other.data.image
        image = image.model_copy(update={"mean": image.mean or source.mean, "std": image.std or source.std})
        data = self.data.model_copy(update={"image": image})
        precision = other.train.precision if self.train.precision == "auto" else self.train.precision
        return self.model_copy(update={"data": data}).with_train(precision=precision)

    def with_train(self, **settings: Any) -> Experiment:
        """Return a copy with other settings of `train`."""
        return self.model_copy(update={"train": self.train.model_copy(update=settings)})

    def with_statistics_of_weights(self, facts: DataFacts | None) -> Experiment:
        """Return a copy in which a mean or std that is not set is the one of the initial weights' `facts`."""
        image = self.data.image
        if facts is None or (image.mean and image.std) or len(facts.mean) != (self.data.image_shape() or (0,))[0]:
            return self
        return self.with_facts(replace(facts, mean=tuple(image.mean or facts.mean), std=tuple(image.std or facts.std)))

    def to_yaml(self) -> str:
        """Write the config as YAML, with every default. Reading it gives an equal experiment."""
        return yaml_reader.dump_yaml(self.model_dump(mode="json", by_alias=True, exclude_none=True))
